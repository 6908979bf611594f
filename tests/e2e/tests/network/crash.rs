//! Whatever is killed: taps, filters and queueing disciplines go, and `eth0` is CNI's as before.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    cri::PodSandboxState,
    image::BUSYBOX,
    lab::{Lab, NET_TAP, Pod},
    suite::{handler, patient},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::time::{Instant, sleep};

use super::{IDLE, netns::Netns};

const SOON: Duration = Duration::from_secs(20);

/// Looks for the daemon's own taps and filters in a pod's namespace.
async fn ours(netns: &Netns) -> Result<(bool, bool)> {
    let links = netns.run(&["ip", "-o", "link"]).await?;
    ensure!(links.contains("eth0"), "eth0 is not there: {links}");
    let taps = links.contains(": kua");
    Ok((taps, netns.run(&["tc", "qdisc", "show"]).await?.contains("ingress")))
}

async fn running<'a>(lab: &'a Lab) -> Result<(Pod<'a>, Netns)> {
    let pod = lab.pod("victim", handler()).await?;
    pod.container("idle", BUSYBOX, IDLE).await?;
    let netns = Netns::of(&pod)?;
    ensure!(ours(&netns).await? == (true, true), "a running pod has no tap and no filters");
    Ok((pod, netns))
}

fn kill_process(pod: &Pod<'_>, path: &str) -> Result<()> {
    let pid = pod.recorded_pid(path)?;
    kill(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("killing process {pid}"))
}

/// The pod is told dead, its network given back while its namespace and its `eth0` are still there, and then
/// removed.
async fn ends_clean(lab: &Lab, pod: Pod<'_>, netns: &Netns) -> Result<()> {
    let end = Instant::now() + patient(SOON);
    loop {
        let state = lab.cri.pod_status(&pod.id).await?.0.state();
        let left = ours(netns).await?;
        if state == PodSandboxState::SandboxNotready && left == (false, false) {
            break;
        }
        ensure!(Instant::now() < end, "the pod is {state:?}; (tap, filter) left: {left:?}");
        sleep(Duration::from_millis(100)).await;
    }
    pod.remove().await?;
    let links = netns.run(&["ip", "-o", "link"]).await?;
    ensure!(!links.contains("eth0"), "CNI did not find its eth0: {links}");
    Ok(())
}

pub(crate) async fn a_killed_vmm_gives_the_network_back(lab: Arc<Lab>) -> Result<()> {
    let (pod, netns) = running(&lab).await?;
    kill_process(&pod, "/vm/vmm/pid")?;
    ends_clean(&lab, pod, &netns).await
}

pub(crate) async fn a_killed_virtiofsd_gives_the_network_back(lab: Arc<Lab>) -> Result<()> {
    let (pod, netns) = running(&lab).await?;
    kill_process(&pod, "/vm/companions/virtiofsd/pid")?;
    ends_clean(&lab, pod, &netns).await
}

/// containerd tries again to reach a new daemon after at most 3 s.
async fn answered(lab: &Lab, pod: &Pod<'_>) -> Result<()> {
    let end = Instant::now() + patient(SOON);
    while let Err(status) = lab.cri.pod_status(&pod.id).await {
        ensure!(Instant::now() < end, "the pod has no status: {}", status.message());
        sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

pub(crate) async fn a_tap_of_cni_is_left_as_it_was(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("tap-victim", NET_TAP).await?;
    let netns = Netns::of(&pod)?;
    let quiet = async || netns.run(&["cat", "/proc/sys/net/ipv4/conf/all/arp_ignore"]).await;
    ensure!(quiet().await?.trim() == "1", "the namespace answers for the guest's address");
    lab.kill_daemon(handler()).await?;
    kill_process(&pod, "/vm/vmm/pid")?;
    lab.restart_daemon(handler()).await?;
    let end = Instant::now() + patient(SOON);
    while quiet().await?.trim() != "0" {
        ensure!(Instant::now() < end, "the namespace stays quiet");
        sleep(Duration::from_millis(100)).await;
    }
    let link = netns.run(&["ip", "addr", "show", "eth0"]).await?;
    ensure!(link.contains("master kbr0") && link.contains("inet 10.88.84."), "the tap is {link}");
    answered(&lab, &pod).await?;
    pod.remove().await
}

pub(crate) async fn a_killed_daemon_gives_the_network_back(lab: Arc<Lab>) -> Result<()> {
    let (pod, netns) = running(&lab).await?;
    lab.kill_daemon(handler()).await?;
    // Nobody notices.
    kill_process(&pod, "/vm/vmm/pid")?;
    lab.restart_daemon(handler()).await?;
    answered(&lab, &pod).await?;
    let (_, info) = lab.cri.pod_status(&pod.id).await?;
    let ours = info.get("kuasar").context("nothing of ours in the status")?;
    ensure!(ours.contains("its VM ended while no daemon watched"), "it says {ours}");
    ends_clean(&lab, pod, &netns).await
}
