//! A part that dies while a container or a pod is being ended; and a relay that dies in every other phase of
//! a container.

use std::{future::Future, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    image::BUSYBOX,
    lab::{Lab, Pod, run},
    suite::{handler, patient},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::time::{sleep, timeout};

use super::{
    IDLE,
    restart::{SOON, relay_of},
    sandbox::{folders, until, until_ready},
};

async fn after<T>(millis: u64, work: impl Future<Output = T>) -> T {
    sleep(Duration::from_millis(millis)).await;
    work.await
}

/// Ends the pod as the kubelet does, which asks again until it is done. Then nothing of the pod is left.
async fn ends(lab: &Lab, pod: Pod<'_>, others: &[String]) -> Result<()> {
    let what = pod.id.clone();
    lab.cri.stop_pod(&pod.id).await.context("stopping the pod once more")?;
    pod.remove().await.context("removing the pod")?;
    until(&format!("everything of pod {what} is gone"), || folders() == others).await
}

/// A stop takes some 300 ms here; the daemon dies in every part of it.
pub(crate) async fn a_daemon_killed_while_a_pod_stops(lab: Arc<Lab>) -> Result<()> {
    // Nobody touches it, and each daemon finds it again.
    let witness = lab.pod("witness", handler()).await?;
    let others = folders();
    for millis in [5, 40, 120, 250] {
        let pod = lab.pod("stops", handler()).await?;
        pod.container("idle", BUSYBOX, IDLE).await?;
        let (_, killed) = tokio::join!(lab.cri.stop_pod(&pod.id), after(millis, lab.kill_daemon(handler())));
        killed?;
        lab.restart_daemon(handler()).await?;
        lab.ready_again(&witness.id).await?;
        ends(&lab, pod, &others).await.with_context(|| format!("the daemon died after {millis} ms"))?;
    }
    witness.remove().await
}

/// The container's root is unmounted by the daemon, which is not there; what it owes is done when it is back.
pub(crate) async fn a_daemon_killed_while_a_container_is_deleted(lab: Arc<Lab>) -> Result<()> {
    let others = folders();
    let pod = lab.pod("deletes", handler()).await?;
    for (number, millis) in [5, 60, 150].into_iter().enumerate() {
        let id = pod.container(&format!("idle-{number}"), BUSYBOX, IDLE).await?;
        let (stopped, killed) = tokio::join!(lab.cri.stop(&id, 5), after(millis, lab.kill_daemon(handler())));
        killed?;
        stopped.with_context(|| format!("stopping without the daemon, which died after {millis} ms"))?;
        lab.cri.ended(&id, SOON).await?;
        lab.restart_daemon(handler()).await?;
        lab.ready_again(&pod.id).await?;
        lab.cri.remove(&id).await.context("removing what was deleted without the daemon")?;
    }
    let id = pod.container("after", BUSYBOX, &["/bin/sh", "-c", "exit 3"]).await?;
    let code = lab.cri.ended(&id, SOON).await?.exit_code;
    ensure!(code == 3, "a container made afterwards ended with {code}");
    ends(&lab, pod, &others).await
}

/// It dies while a container of its is stopped, and while its pod is.
pub(crate) async fn a_relay_killed_while_its_pod_ends(lab: Arc<Lab>) -> Result<()> {
    let others = folders();
    for (millis, whole) in [(5, false), (60, false), (5, true), (60, true), (200, true)] {
        let pod = lab.pod("relayless", handler()).await?;
        let id = pod.container("idle", BUSYBOX, IDLE).await?;
        let relay = Pid::from_raw(relay_of(&pod.id)?);
        // It may be over already, and must not have been another's.
        let dies = after(millis, async { relay_of(&pod.id).map(|_| kill(relay, Signal::SIGKILL)) });
        if whole {
            let _ = tokio::join!(lab.cri.stop_pod(&pod.id), dies);
        } else {
            let _ = tokio::join!(lab.cri.stop(&id, 5), dies);
        }
        lab.cri.ended(&id, SOON).await.context("a container whose relay died never ends")?;
        ends(&lab, pod, &others).await.with_context(|| format!("the relay died after {millis} ms"))?;
    }
    Ok(())
}

/// A relay that dies takes its pod with it, whatever goes on there: everything ends, and says so in time.
pub(crate) async fn a_relay_killed_in_every_phase(lab: Arc<Lab>) -> Result<()> {
    let others = folders();
    for millis in [5, 40, 120, 300] {
        let what = format!("the relay died {millis} ms after a container was wanted");
        let pod = lab.pod("relayless-made", handler()).await?;
        let made = pod.container("idle", BUSYBOX, IDLE);
        let (made, died) = tokio::join!(timeout(patient(SOON), made), after(millis, kill_relay(&pod.id)));
        died?;
        // Whether it fails depends on how far it came.
        if let Ok(id) = made.with_context(|| format!("{what}, and that never came to an end"))? {
            lab.cri.ended(&id, SOON).await.with_context(|| what.clone())?;
        }
        gone(&lab, pod, &others).await.context(what)?;
    }

    let pod = lab.pod("relayless-exec", handler()).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    let exec = lab.cri.exec(&id, &["sleep", "1000"]);
    let (exec, died) = tokio::join!(timeout(patient(SOON), exec), after(1000, kill_relay(&pod.id)));
    died?;
    let exec = exec.context("an exec whose relay died never ends")?;
    ensure!(exec.as_ref().map_or(true, |out| out.code != 0), "an exec whose relay died gave {exec:?}");
    lab.cri.ended(&id, SOON).await.context("a container with an exec whose relay died")?;
    gone(&lab, pod, &others).await.context("the relay died during an exec")?;

    let pod = lab.pod("relayless-paused", handler()).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    run(lab.ctr().args(["tasks", "pause", &id])).await?;
    kill_relay(&pod.id).await?;
    lab.cri.ended(&id, SOON).await.context("a paused container whose relay died")?;
    gone(&lab, pod, &others).await.context("the relay of a paused container died")
}

async fn kill_relay(pod: &str) -> Result<()> {
    kill(Pid::from_raw(relay_of(pod)?), Signal::SIGKILL).context("killing the relay")
}

/// Its pod is not ready any more, and can be removed.
async fn gone(lab: &Lab, pod: Pod<'_>, others: &[String]) -> Result<()> {
    until_ready(lab, &pod.id, false).await?;
    ends(lab, pod, others).await
}
