//! A guest that stands still, and what can be done with its containers.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    image::BUSYBOX,
    lab::{Lab, Pod},
    suite::handler,
};
use nix::sys::signal::{Signal, kill};
use tokio::time::Instant;

use super::{IDLE, common::vmm_of, restart::SOON};

/// Stops a pod's VM, as on an overloaded or broken host.
pub(crate) fn hang(pod: &Pod<'_>) -> Result<()> {
    kill(vmm_of(pod)?, Signal::SIGSTOP).context("stopping the VMM")
}

/// Stops it as the kubelet does after a failed liveness probe: containerd sends SIGTERM first, and ends with
/// its error.
pub(crate) async fn a_container_of_a_hung_guest_is_stopped(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("hung-probe", handler()).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    hang(&pod)?;
    let begun = Instant::now();
    lab.cri.stop(&id, 2).await.context("stopping a container of a hung guest")?;
    ensure!(begun.elapsed() < Duration::from_secs(40), "it took {:?}", begun.elapsed());
    let code = lab.cri.ended(&id, SOON).await?.exit_code;
    ensure!(code == 137, "it ended with {code}");
    pod.remove().await
}
