//! A guest that stands still, and what can be done with its containers.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{image::BUSYBOX, lab::Lab, suite::handler};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::time::Instant;

use super::{IDLE, restart::SOON};

/// Stops a pod's VM, as on an overloaded or broken host.
pub(crate) async fn hang(lab: &Lab, pod: &str) -> Result<()> {
    let (_, info) = lab.cri.pod_status(pod).await?;
    let info: serde_json::Value = serde_json::from_str(info.get("info").context("no info")?)?;
    let vmm = i32::try_from(info.get("pid").and_then(serde_json::Value::as_i64).context("no pid")?)?;
    kill(Pid::from_raw(vmm), Signal::SIGSTOP).context("stopping the VMM")
}

/// What the kubelet does after a liveness probe failed: containerd sends SIGTERM first, and ends with its error.
pub(crate) async fn a_container_of_a_hung_guest_is_stopped(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("hung-probe", handler()).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    hang(&lab, &pod.id).await?;
    let begun = Instant::now();
    lab.cri.stop(&id, 2).await.context("stopping a container of a hung guest")?;
    ensure!(begun.elapsed() < Duration::from_secs(40), "it took {:?}", begun.elapsed());
    let code = lab.cri.ended(&id, SOON).await?.exit_code;
    ensure!(code == 137, "it ended with {code}");
    pod.remove().await
}
