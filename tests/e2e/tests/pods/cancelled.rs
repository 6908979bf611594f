//! A kubelet that does not wait: calls that are given up in every part of what they do.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow, ensure};
use kuasar_e2e::{
    image::BUSYBOX,
    lab::Lab,
    leaks::Snapshot,
    suite::{handler, patient},
};
use tokio::time::{Instant, sleep, timeout};

use super::sandbox::folders;

const SOON: Duration = Duration::from_secs(60);

/// Parts of the time that a whole start takes here: CNI is in the first of them, and in most the guest boots.
const MOMENTS: [f64; 8] = [0.02, 0.06, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95];

pub(crate) async fn a_pod_whose_start_is_cancelled_leaves_nothing(lab: Arc<Lab>) -> Result<()> {
    let begun = Instant::now();
    let pod = lab.pod("whole", handler()).await?;
    let whole = begun.elapsed();
    pod.remove().await?;
    // With their cgroups, which are kubelet's.
    let configs = MOMENTS.iter().map(|_| lab.pod_config("cancelled")).collect::<Result<Vec<_>>>()?;
    let (before, others) = (Snapshot::take(&lab.machine.root)?, folders());
    let mut cancelled = 0;
    for (moment, config) in MOMENTS.into_iter().zip(&configs) {
        let time = whole.mul_f64(moment);
        let started = timeout(time, lab.cri.run_pod(config, handler())).await;
        cancelled += usize::from(started.is_err());
        gone(&lab, config, &before).await.with_context(|| format!("a start cancelled after {time:?}"))?;
        ensure!(folders() == others, "cancelled after {time:?}, it has a folder: {:?}", folders());
    }
    ensure!(cancelled >= MOMENTS.len() / 2, "only {cancelled} starts took longer than they were given");
    // Its name is free again, and the node as good as before.
    let config = configs.first().context("no pod was tried")?;
    let pod = lab.run(config.clone(), handler()).await?;
    let id = pod.container("after", BUSYBOX, &["/bin/sh", "-c", "exit 3"]).await?;
    ensure!(lab.cri.ended(&id, SOON).await?.exit_code == 3, "a pod that comes after suffers");
    pod.remove().await
}

/// Waits until nothing is left, having removed what containerd lists, as kubelet does with a pod that it does
/// not know.
async fn gone(lab: &Lab, config: &kuasar_e2e::cri::PodSandboxConfig, before: &Snapshot) -> Result<()> {
    let name = config.metadata.clone().unwrap_or_default().name;
    let end = Instant::now() + patient(SOON);
    loop {
        for pod in lab.cri.pods().await? {
            if pod.metadata.as_ref().is_some_and(|metadata| metadata.name == name) {
                lab.cri.stop_pod(&pod.id).await.map_err(|e| anyhow!("stopping it: {}", e.message()))?;
                lab.cri.remove_pod(&pod.id).await.map_err(|e| anyhow!("removing it: {}", e.message()))?;
            }
        }
        let left = Snapshot::take(&lab.machine.root)?.since(before);
        if left.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < end, "it has left:\n{}", left.join("\n"));
        sleep(Duration::from_millis(100)).await;
    }
}
