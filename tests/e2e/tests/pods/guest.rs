//! Facts that a pod's guest is told or that become known of it: names, sysctls, shared memory, time, and the
//! reason of its end.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use kuasar_e2e::{
    cri::{Capability, PodSandboxState},
    image::BUSYBOX,
    lab::{self, Lab, Pod, folder_of},
    suite::{handler, patient},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    time::{Instant, sleep, timeout},
};

use super::IDLE;

/// Less than the time between two looks at a clock that runs.
const SOON: Duration = Duration::from_secs(30);

async fn read(lab: &Lab, container: &str, script: &str) -> Result<String> {
    let out = lab.cri.exec(container, &["/bin/sh", "-c", script]).await?;
    ensure!(out.code == 0, "{script:?} gave {out:?}");
    Ok(out.stdout)
}

/// One that is called while its driver sets up the vsock may never be heard of (see the daemon's
/// `pod::start`).
pub(crate) async fn nobody_calls_a_guest_that_is_not_up(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("uncalled", handler()).await?;
    pod.container("idle", BUSYBOX, IDLE).await?;
    let path = folder_of(handler()).join(&pod.id).join("log/relay.log");
    let log = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    ensure!(log.contains(": serving, process "), "the relay's log is {log:?}");
    ensure!(!log.contains("connecting to the guest's port"), "the relay has called too early: {log}");
    pod.remove().await
}

/// More than the user-space vsock has ports below the guest's own call to the host, were that a low one:
/// every exec takes two.
pub(crate) async fn a_guest_is_reached_any_number_of_times(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("reached", handler()).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    let socket = folder_of(handler()).join(&pod.id).join("vsock");
    // Without it, the vsock is the kernel's.
    let calls = if socket.exists() { 2100 } else { 0 };
    for call in 0..calls {
        let talk = async {
            let mut guest = BufReader::new(UnixStream::connect(&socket).await?);
            guest.write_all(b"CONNECT 1024\n").await?;
            let mut answer = String::new();
            guest.read_line(&mut answer).await?;
            anyhow::Ok(answer)
        };
        let answer =
            timeout(patient(SOON), talk).await.with_context(|| format!("call {call} has no answer"))??;
        ensure!(answer.starts_with("OK "), "call {call} was answered by {answer:?}");
    }
    let out = lab.cri.exec(&id, &["echo", "here"]).await?;
    ensure!(out.stdout == "here\n", "an exec after {calls} calls gave {out:?}");
    pod.remove().await
}

pub(crate) async fn a_pod_has_its_name_sysctls_and_shared_memory(lab: Arc<Lab>) -> Result<()> {
    let mut config = lab.pod_config("told")?;
    config.hostname = "web-0".into();
    let sysctls = &mut config.linux.get_or_insert_default().sysctls;
    sysctls.insert("net.ipv4.ip_local_port_range".into(), "2000 3000".into());
    let pod = lab.run(config, handler()).await?;
    let one = pod.container("one", BUSYBOX, IDLE).await?;
    let two = pod.container("two", BUSYBOX, IDLE).await?;
    ensure!(
        read(&lab, &one, "hostname; cat /etc/hostname").await? == "web-0\nweb-0\n",
        "it has another name"
    );
    let wanted = [
        ("net/ipv4/ip_local_port_range", "2000\t3000\n"),
        // What CRI promises every pod.
        ("net/ipv4/ip_unprivileged_port_start", "0\n"),
        ("net/ipv4/ping_group_range", "0\t2147483647\n"),
    ];
    for (name, value) in wanted {
        let is = read(&lab, &one, &format!("cat /proc/sys/{name}")).await?;
        ensure!(is == value, "{name} is {is:?}");
    }
    let size = read(&lab, &one, "df -k /dev/shm | tail -n 1").await?;
    ensure!(size.split_whitespace().nth(1) == Some("65536"), "/dev/shm: {size}");
    read(&lab, &one, "echo shared > /dev/shm/file").await?;
    ensure!(read(&lab, &two, "cat /dev/shm/file").await? == "shared\n", "/dev/shm is not the pod's");
    pod.remove().await
}

/// Has the pod's QEMU execute a command.
async fn qmp(pod: &Pod<'_>, command: &str) -> Result<()> {
    let socket = folder_of(handler()).join(&pod.id).join("qmp.sock");
    let mut qemu = BufReader::new(UnixStream::connect(&socket).await.context("connecting to QEMU")?);
    for command in ["qmp_capabilities", command] {
        qemu.write_all(format!("{{\"execute\":\"{command}\"}}\n").as_bytes()).await?;
        loop {
            let mut line = String::new();
            timeout(patient(SOON), qemu.read_line(&mut line)).await.context("QEMU does not answer")??;
            ensure!(!line.is_empty() && !line.contains("\"error\""), "{command}: QEMU says {line:?}");
            if line.contains("\"return\"") {
                break;
            }
        }
    }
    Ok(())
}

/// Seconds by which a container's clock differs from the host's.
async fn difference(lab: &Lab, container: &str) -> Result<u64> {
    let seconds = || Ok::<_, anyhow::Error>(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs());
    let before = seconds()?;
    let guest: u64 = read(lab, container, "date +%s").await?.trim().parse()?;
    let after = seconds()?;
    Ok(before.saturating_sub(guest).max(guest.saturating_sub(after)))
}

/// A clock that is far off, as after a pause or a restore, is put right by whoever looks; a daemon that has
/// just come looks at once. (The lab's vsock in user space does not outlive a pause, so none is made here.)
pub(crate) async fn a_wrong_clock_is_put_right(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("time", handler()).await?;
    let mut config = lab::container("idle", BUSYBOX, IDLE);
    let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
    security.capabilities = Some(Capability { add_capabilities: vec!["SYS_TIME".into()] });
    let id = pod.create(config).await?;
    lab.cri.start(&id).await?;
    for hours in [-2_i64, 3] {
        read(&lab, &id, &format!("date -s @$(( $(date +%s) + {hours} * 3600 ))")).await?;
        let wrong = difference(&lab, &id).await?;
        ensure!(wrong > 3000, "the clock was not set, it differs by {wrong} s");
        lab.kill_daemon(handler()).await?;
        lab.restart_daemon(handler()).await?;
        let end = Instant::now() + patient(SOON);
        loop {
            let left = difference(&lab, &id).await?;
            if left <= 1 {
                break;
            }
            ensure!(Instant::now() < end, "{hours} h off: {SOON:?} later the clock differs by {left} s");
            sleep(Duration::from_millis(200)).await;
        }
    }
    pod.remove().await
}

pub(crate) async fn a_kernel_panic_is_the_reason_of_a_pods_end(lab: Arc<Lab>) -> Result<()> {
    let mut config = lab.pod_config("panics")?;
    let sysctls = &mut config.linux.get_or_insert_default().sysctls;
    sysctls.insert("kernel.unknown_nmi_panic".into(), "1".into());
    let pod = lab.run(config, handler()).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    qmp(&pod, "inject-nmi").await?;
    let end = Instant::now() + patient(SOON);
    let info = loop {
        let (status, info) = lab.cri.pod_status(&pod.id).await?;
        if status.state() == PodSandboxState::SandboxNotready {
            break info;
        }
        ensure!(Instant::now() < end, "the pod is still ready");
        sleep(Duration::from_millis(100)).await;
    };
    let Some(ours) = info.get("kuasar") else { bail!("there is nothing of ours in {info:?}") };
    ensure!(ours.contains("Kernel panic - not syncing"), "the reason is not told: {ours}");
    let code = lab.cri.ended(&id, SOON).await?.exit_code;
    ensure!(code != 0, "its container ended with 0");
    pod.remove().await
}
