//! containerd dies while a pod or a container begins.

use std::{fs, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    cri::ContainerState,
    image::BUSYBOX,
    lab::{self, Lab},
    suite::handler,
};
use tokio::time::sleep;

use super::{
    IDLE,
    restart::SOON,
    sandbox::{folders, until},
};

/// It is away for this long.
async fn containerd_dies(lab: &Lab, away: Duration) -> Result<()> {
    lab.kill_containerd().await?;
    sleep(away).await;
    lab.restart_containerd().await
}

const AWAY: Duration = Duration::from_millis(500);

/// The daemon's work does not end with the call for it. What came of it containerd knows, and the kubelet has
/// it removed, or containerd does not, and the daemon removes it.
pub(crate) async fn a_containerd_killed_while_a_pod_starts(lab: Arc<Lab>) -> Result<()> {
    let others = folders();
    for millis in [0, 100, 400, 900, 1300] {
        let config = lab.pod_config("torn")?;
        let dies = async {
            // Before this, it is containerd's own work only.
            until("the daemon makes a pod", || folders() != others).await?;
            sleep(Duration::from_millis(millis)).await;
            containerd_dies(&lab, AWAY).await
        };
        let (_, died) = tokio::join!(lab.cri.run_pod(&config, handler()), dies);
        died?;
        for pod in lab.cri.pods().await? {
            if pod.metadata.is_some_and(|metadata| metadata.name.starts_with("torn")) {
                lab.cri.stop_pod(&pod.id).await.context("stopping what was left")?;
                lab.cri.remove_pod(&pod.id).await.context("removing what was left")?;
            }
        }
        until(&format!("the pod that was starting for {millis} ms is gone"), || folders() == others).await?;
    }
    let again = lab.pod("again", handler()).await?;
    let id = again.container("three", BUSYBOX, &["/bin/sh", "-c", "exit 3"]).await?;
    let code = lab.cri.ended(&id, SOON).await?.exit_code;
    ensure!(code == 3, "a container of the next pod ended with {code}");
    again.remove().await
}

/// containerd that is back while the container is still being made does not find it, and forgets it: its
/// Create is taken back.
pub(crate) async fn a_containerd_killed_while_a_container_is_made(lab: Arc<Lab>) -> Result<()> {
    let others = folders();
    let pod = lab.pod("made", handler()).await?;
    // From the call for it; and from the moment in which its root is mounted, with most of the work still to
    // do.
    let (call, root) = (false, true);
    let moments =
        [(call, 5), (root, 0), (call, 40), (root, 50), (root, 0), (call, 250), (root, 150), (call, 500)];
    for (number, (after, millis)) in moments.into_iter().enumerate() {
        let what = if after == root { "its root was mounted" } else { "the call to start it" };
        let what = format!("containerd died {millis} ms after {what}");
        let id = pod.create(lab::container(&format!("torn-{number}"), BUSYBOX, IDLE)).await?;
        let (_, died) = tokio::join!(lab.cri.start(&id), async {
            while after == root && !mounted(&pod.id)? {
                sleep(Duration::from_millis(1)).await;
            }
            sleep(Duration::from_millis(millis)).await;
            containerd_dies(&lab, if after == root { Duration::ZERO } else { AWAY }).await
        });
        died?;
        let mut state = lab.cri.status(&id).await.with_context(|| what.clone())?.state();
        if state == ContainerState::ContainerCreated && number % 2 == 1 {
            lab.cri.start(&id).await.with_context(|| format!("{what}; starting it once more"))?;
            state = ContainerState::ContainerRunning;
        }
        if state == ContainerState::ContainerRunning {
            let out = lab.cri.exec(&id, &["echo", "here"]).await?;
            ensure!(out.stdout == "here\n", "{what}; it runs, and an exec gave {out:?}");
        }
        lab.cri.stop(&id, 0).await.with_context(|| format!("{what}; stopping the {state:?}"))?;
        lab.cri.remove(&id).await.with_context(|| format!("{what}; removing the {state:?}"))?;
        let id = pod.container(&format!("again-{number}"), BUSYBOX, &["/bin/sh", "-c", "exit 3"]).await?;
        let code = lab.cri.ended(&id, SOON).await?.exit_code;
        ensure!(code == 3, "{what}; the next container ended with {code}");
        lab.cri.remove(&id).await?;
        until(&format!("{what}; nothing of it is mounted"), || mounted(&pod.id).is_ok_and(|is| !is)).await?;
    }
    let relay = fs::read_to_string(lab::folder_of(handler()).join(&pod.id).join("log/relay.log"))?;
    ensure!(relay.contains("it is taken back"), "containerd was never back while a container was being made");
    let what = pod.id.clone();
    pod.remove().await?;
    until(&format!("everything of pod {what} is gone"), || folders() == others).await
}

/// Returns true if the folder of some container of the pod is mounted.
fn mounted(pod: &str) -> Result<bool> {
    let shared = lab::folder_of(handler()).join(pod).join("shared");
    let prefix = format!(" {}/", shared.display());
    Ok(fs::read_to_string("/proc/self/mountinfo")?.contains(&prefix))
}
