//! Restarts: the work that goes on while one program is away, and the state that it finds when it comes back.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    cri::{ContainerState, PodSandboxState},
    image::BUSYBOX,
    lab::{self, Lab, Pod, QEMU_STREAM},
    suite::{handler, patient},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::time::{Instant, sleep};

use super::{IDLE, hung::hang};

/// containerd tries again to reach a daemon after at most 3 s; the rest is for emulated guests on a busy
/// machine.
pub(crate) const SOON: Duration = Duration::from_secs(60);
pub(crate) const UNTIL_TOLD: &str = "echo begin; while [ ! -e /go ]; do sleep 1; done; echo end; exit 9";

pub(crate) async fn a_killed_daemon_finds_its_pods_again(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("orphan", handler()).await?;
    let id = pod.container("waits", BUSYBOX, &["/bin/sh", "-c", UNTIL_TOLD]).await?;

    lab.kill_daemon(handler()).await?;
    let out = lab.cri.exec(&id, &["/bin/sh", "-c", "echo alone; exit 5"]).await?;
    ensure!(out.code == 5 && out.stdout == "alone\n", "exec without the daemon gave {out:?}");

    lab.restart_daemon(handler()).await?;
    lab.ready_again(&pod.id).await?;
    // Only the daemon can prepare a root for another container.
    let second = pod.container("later", BUSYBOX, &["/bin/sh", "-c", "exit 3"]).await?;
    let code = lab.cri.ended(&second, SOON).await?.exit_code;
    ensure!(code == 3, "a container made after the restart ended with {code}");

    lab.cri.exec(&id, &["/bin/touch", "/go"]).await?;
    let code = lab.cri.ended(&id, SOON).await?.exit_code;
    ensure!(code == 9, "the container from before ended with {code}");
    let (stdout, _) = pod.output("waits")?;
    ensure!(stdout == b"begin\nend\n", "its log is {:?}", String::from_utf8_lossy(&stdout));
    pod.remove().await
}

/// Lines of 64 bytes of which half is written at once, and half when it goes: more than any buffer on the way
/// holds.
const HALF: usize = (5 << 20) / 64;

pub(crate) async fn a_log_is_complete_across_a_restart_of_containerd(lab: Arc<Lab>) -> Result<()> {
    log_across_a_restart(&lab, handler()).await
}

pub(crate) async fn a_log_is_complete_across_a_restart_over_streams(lab: Arc<Lab>) -> Result<()> {
    log_across_a_restart(&lab, QEMU_STREAM).await
}

async fn log_across_a_restart(lab: &Lab, handler: &str) -> Result<()> {
    let pod = lab.pod("long", handler).await?;
    let lines =
        |from, to| format!("awk 'BEGIN {{ for (i = {from}; i < {to}; i++) printf \"%063d\\n\", i }}'");
    let wait = "while [ ! -e /go ]; do sleep 1; done; sleep 4";
    let script = format!("{}; {wait}; {}", lines(0, HALF), lines(HALF, 2 * HALF));
    let id = pod.container("writer", BUSYBOX, &["/bin/sh", "-c", &script]).await?;
    let size = written(&pod, HALF * 64).await;
    ensure!(size == HALF * 64, "{size} of {} bytes of the first half are there", HALF * 64);
    // Handed on is not yet counted as read.
    sleep(Duration::from_secs(3)).await;
    lab.cri.exec(&id, &["/bin/touch", "/go"]).await?;
    lab.kill_containerd().await?;
    // Meanwhile the other half comes, and finds nobody.
    sleep(Duration::from_secs(7)).await;
    lab.restart_containerd().await?;
    let size = written(&pod, 2 * HALF * 64).await;
    ensure!(size == 2 * HALF * 64, "{size} of {} bytes arrived", 2 * HALF * 64);
    let stdout = pod.output("writer")?.0;
    for (number, line) in stdout.chunks(64).enumerate() {
        let line = String::from_utf8_lossy(line);
        ensure!(line == format!("{number:063}\n"), "line {number} is {line:?}");
    }
    let code = lab.cri.ended(&id, SOON).await?.exit_code;
    ensure!(code == 0, "the writer ended with {code}");
    pod.remove().await
}

/// Waits until so many bytes are in the log, as long as they become more; returns how many there are.
async fn written(pod: &Pod<'_>, least: usize) -> usize {
    let (mut last, mut since) = (0, Instant::now());
    loop {
        let size = pod.output("writer").map_or(0, |(stdout, _)| stdout.len());
        if size > last {
            (last, since) = (size, Instant::now());
        }
        if size >= least || since.elapsed() > patient(SOON) {
            return size;
        }
        sleep(Duration::from_millis(500)).await;
    }
}

/// A relay cannot come back: containerd gives up every container of the pod at once. So the pod ends, and
/// says so.
pub(crate) async fn a_killed_relay_ends_its_pod_and_no_other(lab: Arc<Lab>) -> Result<()> {
    let (pod, other) = (lab.pod("relayless", handler()).await?, lab.pod("other", handler()).await?);
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    let there = other.container("idle", BUSYBOX, IDLE).await?;
    let created = pod.create(lab::container("created", BUSYBOX, IDLE)).await?;
    let relay = relay_of(&pod.id)?;
    kill(Pid::from_raw(relay), Signal::SIGKILL).context("killing the relay")?;
    let status = lab.cri.ended(&id, SOON).await?;
    ensure!(status.exit_code != 0, "the container ended with {}", status.exit_code);
    let end = Instant::now() + patient(Duration::from_secs(30));
    loop {
        let state = lab.cri.pod_status(&pod.id).await?.0.state();
        if state == PodSandboxState::SandboxNotready {
            break;
        }
        ensure!(Instant::now() < end, "the pod is still {state:?}");
        sleep(Duration::from_millis(200)).await;
    }
    let error = lab.cri.start(&created).await.err().context("a container started in a pod that ended")?;
    ensure!(!error.message().is_empty(), "it does not say why");
    let out = lab.cri.exec(&there, &["echo", "here"]).await?;
    ensure!(out.stdout == "here\n", "the other pod gave {out:?}");
    pod.remove().await?;
    other.remove().await
}

/// Process id of a pod's relay.
pub(crate) fn relay_of(pod: &str) -> Result<i32> {
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let words = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        if words.contains("containerd-shim-kuasar-vmm-v1 serve") && words.contains(pod) {
            return Ok(pid);
        }
    }
    anyhow::bail!("there is no relay of {pod}")
}

/// Waits for the words of the pod's status about a guest that does not answer; the daemon asks each guest
/// once a minute.
async fn silence_of(lab: &Lab, pod: &str) -> Result<String> {
    let end = Instant::now() + patient(Duration::from_secs(90));
    loop {
        let (status, info) = lab.cri.pod_status(pod).await?;
        ensure!(status.state() == PodSandboxState::SandboxReady, "the pod is {:?}", status.state());
        let ours: serde_json::Value = serde_json::from_str(info.get("kuasar").context("nothing of ours")?)?;
        if let Some(silent) = ours.get("guestSilent").filter(|said| said.is_object()) {
            return Ok(silent.to_string());
        }
        ensure!(Instant::now() < end, "the pod's status says nothing of its silent guest: {ours}");
        sleep(Duration::from_millis(500)).await;
    }
}

/// A VM that stands still, as on an overloaded or broken host.
pub(crate) async fn a_hung_guest_holds_nobody_up_and_can_be_removed(lab: Arc<Lab>) -> Result<()> {
    let (hung, other) = (lab.pod("hung", handler()).await?, lab.pod("lively", handler()).await?);
    let id = hung.container("idle", BUSYBOX, IDLE).await?;
    let there = other.container("idle", BUSYBOX, IDLE).await?;
    let mut all = vec![id.clone(), there.clone()];
    for number in 1..5 {
        all.push(hung.container(&format!("idle-{number}"), BUSYBOX, IDLE).await?);
    }
    ensure!(lab.cri.stats().await?.len() >= all.len(), "containers have no figures");
    hang(&hung)?;

    // One silent guest costs the node its patience once, however many containers it has.
    for limit in [4, 1] {
        let begun = Instant::now();
        let stats = lab.cri.stats().await?;
        let ids: Vec<_> = stats.iter().filter_map(|stats| Some(&stats.attributes.as_ref()?.id)).collect();
        ensure!(all.iter().all(|id| ids.contains(&id)), "figures of {ids:?} only");
        let (took, limit) = (begun.elapsed(), Duration::from_secs(limit));
        ensure!(took < limit, "the node's figures took {took:?} instead of {limit:?}");
    }
    let begun = Instant::now();
    ensure!(
        lab.cri.status(&there).await?.state() == ContainerState::ContainerRunning,
        "the other does not run"
    );
    let state = lab.cri.pod_status(&other.id).await?.0.state();
    ensure!(state == PodSandboxState::SandboxReady, "the other pod is {state:?}");
    let state = lab.cri.pod_status(&hung.id).await?.0.state();
    ensure!(state == PodSandboxState::SandboxReady, "the pod is {state:?}");
    ensure!(lab.cri.status(&id).await?.state() == ContainerState::ContainerRunning, "it does not run");
    ensure!(begun.elapsed() < Duration::from_secs(3), "its states took {:?}", begun.elapsed());
    let out = lab.cri.exec(&there, &["echo", "here"]).await?;
    ensure!(out.stdout == "here\n", "the other pod gave {out:?}");
    let begun = Instant::now();
    let error = lab.cri.exec(&id, &["true"]).await.err().context("exec in a hung guest worked")?;
    ensure!(begun.elapsed() < Duration::from_secs(40), "it took {:?} to fail", begun.elapsed());
    ensure!(error.message().contains("guest"), "it does not say what is the matter: {}", error.message());
    let said = silence_of(&lab, &hung.id).await?;
    ensure!(said.contains("no answer within"), "the pod's status says {said}");
    let begun = Instant::now();
    hung.remove().await.context("removing the hung pod")?;
    ensure!(begun.elapsed() < Duration::from_secs(60), "it took {:?} to remove it", begun.elapsed());
    other.remove().await
}
