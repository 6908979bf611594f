//! Pods and containers from creation to removal, and what is refused.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use kuasar_e2e::{
    cri::{ContainerState, LinuxContainerResources, PodSandboxState},
    image::{ALIEN, BASH, BUSYBOX},
    lab::{self, Lab, Pod, QEMU, QEMU_INITRD},
    suite::{handler, patient},
};

use super::{
    IDLE,
    kubelet::{kubelets_limits, vmm_memory},
};

/// For a container whose command is short.
const SOON: Duration = Duration::from_secs(30);

async fn pod_state(lab: &Lab, id: &str) -> Result<PodSandboxState> {
    Ok(lab.cri.pod_status(id).await?.0.state())
}

pub(crate) async fn pod_life_is_idempotent(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("life", handler()).await?;
    let (status, _) = lab.cri.pod_status(&pod.id).await?;
    ensure!(status.state() == PodSandboxState::SandboxReady, "a running pod is {:?}", status.state());
    ensure!(status.created_at > 1_600_000_000_000_000_000, "created_at is {}", status.created_at);
    ensure!(status.network.unwrap_or_default().ip.starts_with("10.88.77."), "the pod has no address");
    ensure!(status.runtime_handler == handler(), "the handler is {:?}", status.runtime_handler);

    let id = pod.create(lab::container("idle", BUSYBOX, IDLE)).await?;
    ensure!(lab.cri.status(&id).await?.state() == ContainerState::ContainerCreated, "not created");
    lab.cri.start(&id).await?;
    let status = lab.cri.status(&id).await?;
    ensure!(
        status.state() == ContainerState::ContainerRunning,
        "a started container is {:?}",
        status.state()
    );
    ensure!(status.started_at > 0, "it has no start time");
    // PID 1 is deaf to SIGTERM until it has said what to do with it.
    lab.cri.exec(&id, &["/bin/sh", "-c", "while [ ! -e /up ]; do sleep 0.1; done"]).await?;
    lab.cri.stop(&id, 20).await?;
    let status = lab.cri.status(&id).await?;
    ensure!(status.state() == ContainerState::ContainerExited, "a stopped container is {:?}", status.state());
    ensure!(status.exit_code == 0, "its exit code is {}, SIGTERM was not handled", status.exit_code);
    ensure!(status.finished_at >= status.started_at, "it ended before it started");
    lab.cri.stop(&id, 10).await.context("stopping a stopped container")?;
    lab.cri.remove(&id).await?;
    lab.cri.remove(&id).await.context("removing a removed container")?;
    ensure!(lab.cri.containers(&pod.id).await?.is_empty(), "the removed container is still listed");

    lab.cri.stop_pod(&pod.id).await?;
    let state = pod_state(&lab, &pod.id).await?;
    ensure!(state == PodSandboxState::SandboxNotready, "a stopped pod is {state:?}");
    lab.cri.stop_pod(&pod.id).await.context("stopping a stopped pod")?;
    lab.cri.remove_pod(&pod.id).await?;
    lab.cri.remove_pod(&pod.id).await.context("removing a removed pod")?;
    ensure!(lab.cri.pod_status(&pod.id).await.is_err(), "a removed pod still has a status");
    Ok(())
}

pub(crate) async fn the_want_of_memory_is_a_reason(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("greedy", handler()).await?;
    let mut config = lab::container("greedy", BUSYBOX, &["/bin/sh", "-c", "tail /dev/zero"]);
    let resources = LinuxContainerResources { memory_limit_in_bytes: 16 << 20, ..Default::default() };
    config.linux.get_or_insert_default().resources = Some(resources);
    let id = pod.create(config).await?;
    lab.cri.start(&id).await?;
    let status = lab.cri.ended(&id, SOON).await?;
    ensure!(status.exit_code == 137, "its exit code is {}", status.exit_code);
    // The reason comes by an event, which may be a moment later than the exit.
    let until = Instant::now() + patient(SOON);
    let mut reason = status.reason;
    while reason != "OOMKilled" && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(50)).await;
        reason = lab.cri.status(&id).await?.reason;
    }
    ensure!(reason == "OOMKilled", "its reason is {reason:?}");
    pod.remove().await
}

/// As small as the daemon takes it, its guest still does what it is for; any smaller, it is refused.
pub(crate) async fn a_pod_of_the_least_size_works(lab: Arc<Lab>) -> Result<()> {
    for (handler, least) in [(QEMU, 48), (QEMU_INITRD, 60)] {
        let sized = |mib: i64| {
            // What is left of the pod's cgroup beside the VMM.
            let mut config = lab.pod_config("small")?;
            kubelets_limits(&mut config, mib, 0, mib + vmm_memory())?;
            anyhow::Ok(config)
        };
        let pod =
            lab.run(sized(least)?, handler).await.with_context(|| format!("{handler} of {least} MiB"))?;
        let id = pod.container("idle", BUSYBOX, IDLE).await?;
        let out = lab.cri.exec(&id, &["grep", "MemTotal", "/proc/meminfo"]).await?;
        let total: i64 = out.stdout.split_whitespace().nth(1).context("no MemTotal")?.parse()?;
        ensure!(out.code == 0 && total < least << 10, "{handler}: its guest has {total} KiB");
        let out = lab.cri.exec(&id, &["echo", "here"]).await?;
        ensure!(out.stdout == "here\n", "{handler}: an exec gave {out:?}");
        pod.remove().await?;
        let error = match lab.run(sized(least - 1)?, handler).await {
            Ok(_) => bail!("{handler} takes a pod of {} MiB", least - 1),
            Err(error) => format!("{error:#}"),
        };
        ensure!(
            error.contains(&format!(
                "{least} MiB for the smallest guest and {} MiB for the VMM",
                vmm_memory()
            )),
            "{error}"
        );
    }
    Ok(())
}

pub(crate) async fn exit_codes_arrive(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("codes", handler()).await?;
    let wanted = [
        ("zero", "exit 0", 0, "Completed"),
        ("seven", "exit 7", 7, "Error"),
        ("killed", "kill -9 $$", 137, "Error"),
        ("terminated", "trap - TERM; kill -15 $$", 143, "Error"),
    ];
    for (name, script, code, reason) in wanted {
        // A shell that is PID 1 is deaf to its own signals, so a child of it is what gets killed.
        let script = format!("sh -c '{script}'; exit $?");
        let id = pod.container(name, BUSYBOX, &["/bin/sh", "-c", &script]).await?;
        let status = lab.cri.ended(&id, SOON).await?;
        ensure!(status.exit_code == code, "`{script}` gave {} instead of {code}", status.exit_code);
        ensure!(status.reason == reason, "`{script}` has the reason {:?} instead of {reason}", status.reason);
    }
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    for (script, code) in [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("exit 255", 255)] {
        let out = lab.cri.exec(&id, &["/bin/sh", "-c", script]).await?;
        ensure!(out.code == code, "exec of `{script}` gave {} instead of {code}", out.code);
    }
    // The kernel ends PID 1 of a container only with SIGKILL from outside: what a kubelet does after the
    // grace period.
    let stubborn = pod.container("stubborn", BUSYBOX, &["/bin/sleep", "1000"]).await?;
    // The start is over a moment before runc becomes the program; until then SIGTERM ends runc, with its code
    // 2.
    let out = lab.cri.exec(&stubborn, &["/bin/true"]).await?;
    ensure!(out.code == 0, "exec of /bin/true gave {}", out.code);
    lab.cri.stop(&stubborn, 1).await?;
    let status = lab.cri.ended(&stubborn, SOON).await?;
    ensure!(status.exit_code == 137, "a killed container's exit code is {}", status.exit_code);
    pod.remove().await
}

/// Checks that an error tells the user of `/bin/nothing-here`, whether it was started or exec'd.
fn explains_missing_command(text: &str) -> Result<()> {
    ensure!(text.contains("/bin/nothing-here"), "it does not name the command: {text}");
    ensure!(text.contains("no such file or directory"), "it does not say why: {text}");
    Ok(())
}

pub(crate) async fn exec_of_a_command_that_does_not_exist(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("noexec", handler()).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    let error = lab.cri.exec(&id, &["/bin/nothing-here"]).await.err().context("exec of nothing worked")?;
    explains_missing_command(error.message())?;
    let out = lab.cri.exec(&id, &["echo", "still here"]).await?;
    ensure!(out.stdout == "still here\n", "the container suffered: {out:?}");
    pod.remove().await
}

pub(crate) async fn a_command_that_does_not_exist(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("nostart", handler()).await?;
    let id = pod.create(lab::container("nothing", BUSYBOX, &["/bin/nothing-here"])).await?;
    let error = lab.cri.start(&id).await.err().context("starting nothing worked")?;
    explains_missing_command(error.message())?;
    let status = lab.cri.status(&id).await?;
    ensure!(status.state() == ContainerState::ContainerExited, "it is {:?}", status.state());
    ensure!(status.reason == "StartError", "its reason is {:?}", status.reason);
    lab.cri.remove(&id).await?;
    let id = pod.container("after", BUSYBOX, &["/bin/true"]).await.context("in the same pod afterwards")?;
    ensure!(lab.cri.ended(&id, SOON).await?.exit_code == 0, "the pod suffered");
    pod.remove().await
}

pub(crate) async fn an_image_of_another_architecture(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("alien", handler()).await?;
    // runc learns it after it reported the start, and tells it on the container's standard error.
    let id = pod.container("alien", ALIEN, &["/bin/alien"]).await?;
    let status = lab.cri.ended(&id, SOON).await?;
    ensure!(status.exit_code != 0, "a program of another architecture ran");
    let (_, stderr) = pod.output("alien")?;
    let stderr = String::from_utf8_lossy(&stderr);
    ensure!(stderr.contains("exec format error"), "its log does not say why: {stderr:?}");
    ensure!(stderr.contains("/bin/alien"), "its log does not name the program: {stderr:?}");
    pod.remove().await
}

async fn read(lab: &Lab, container: &str, command: &[&str]) -> Result<String> {
    let out = lab.cri.exec(container, command).await?;
    ensure!(out.code == 0, "{command:?} gave {out:?}");
    Ok(out.stdout)
}

pub(crate) async fn two_images_in_one_pod(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("two", handler()).await?;
    let first = pod.container("busybox", BUSYBOX, IDLE).await?;
    let wait = ["/bin/bash", "-c", "trap 'exit 0' TERM; exec 3<> <(:); while :; do read -t 1 -u 3; done"];
    let second = pod.container("bash", BASH, &wait).await?;
    let release = read(&lab, &first, &["cat", "/etc/os-release"]).await?;
    // The uppermost of three layers wins.
    ensure!(release.contains("ID=lab-busybox") && !release.contains("hidden"), "A has {release:?}");
    let release = read(&lab, &second, &["/bin/bash", "-c", "echo $(</etc/os-release)"]).await?;
    ensure!(release.contains("ID=lab-bash"), "B has {release:?}");
    // What one writes, the other does not see.
    read(&lab, &first, &["/bin/sh", "-c", "echo mine > /tmp/mark"]).await?;
    let out =
        lab.cri.exec(&second, &["/bin/bash", "-c", "[ ! -e /tmp/mark ] && [ ! -e /bin/busybox ]"]).await?;
    ensure!(out.code == 0, "B sees A's files");
    ensure!(read(&lab, &first, &["cat", "/tmp/mark"]).await? == "mine\n", "A lost its file");
    pod.remove().await
}

pub(crate) async fn a_container_restarts_in_a_living_pod(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("again", handler()).await?;
    let mut seen = Vec::new();
    for attempt in 0..3 {
        let mut config = lab::container(
            "worker",
            BUSYBOX,
            &["/bin/sh", "-c", "echo run; cat /tmp/mark; echo x > /tmp/mark"],
        );
        config.metadata.get_or_insert_default().attempt = attempt;
        config.log_path = format!("worker-{attempt}.log");
        let id = pod.create(config).await?;
        lab.cri.start(&id).await?;
        let status = lab.cri.ended(&id, SOON).await?;
        ensure!(status.exit_code == 0, "attempt {attempt} ended with {}", status.exit_code);
        // All containers of the pod have ended now, and the pod lives on.
        let state = pod_state(&lab, &pod.id).await?;
        ensure!(state == PodSandboxState::SandboxReady, "after attempt {attempt} the pod is {state:?}");
        let (stdout, stderr) = pod.output(&format!("worker-{attempt}"))?;
        ensure!(stdout == b"run\n", "attempt {attempt} wrote {:?}", String::from_utf8_lossy(&stdout));
        ensure!(!stderr.is_empty(), "attempt {attempt} found the file of the one before");
        lab.cri.remove(&id).await?;
        seen.push(boot_id(&lab, &pod, attempt).await?);
    }
    seen.dedup();
    ensure!(seen.len() == 1, "the pod's kernel was started anew: {seen:?}");
    pod.remove().await
}

/// Tells one start of a kernel from another.
async fn boot_id(lab: &Lab, pod: &Pod<'_>, number: u32) -> Result<Vec<u8>> {
    let name = format!("boot-{number}");
    let id = pod.container(&name, BUSYBOX, &["cat", "/proc/sys/kernel/random/boot_id"]).await?;
    lab.cri.ended(&id, SOON).await?;
    Ok(pod.output(&name)?.0)
}

/// Sees what a sidecar with a debugger sees: the processes of the others, and one that collects orphans
/// before them.
pub(crate) async fn containers_of_a_pod_share_processes(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod_with_shared_pids("shared", handler()).await?;
    let one = pod.container("one", BUSYBOX, &["/bin/sleep", "4711"]).await?;
    let two = pod.container("two", BUSYBOX, &["/bin/sleep", "4712"]).await?;
    let seen = lab.cri.exec(&two, &["/bin/ps", "-o", "pid,args"]).await?.stdout;
    for command in ["kuasar-pause", "/bin/sleep 4711", "/bin/sleep 4712"] {
        ensure!(seen.contains(command), "{command} is not in\n{seen}");
    }
    let first = seen.lines().find(|line| line.trim_start().starts_with("1 "));
    ensure!(first.is_some_and(|line| line.contains("kuasar-pause")), "process 1 is another: {seen}");
    // One ends, the other lives on.
    lab.cri.stop(&one, 0).await?;
    ensure!(lab.cri.ended(&one, SOON).await?.exit_code == 137);
    let seen = lab.cri.exec(&two, &["/bin/ps", "-o", "args"]).await?.stdout;
    ensure!(!seen.contains("4711") && seen.contains("4712"), "{seen}");
    pod.remove().await
}
