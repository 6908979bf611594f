//! What goes on while the daemon is away, and what it finds when it comes back.

use std::{sync::Arc, time::Duration};

use anyhow::{Result, ensure};
use kuasar_e2e::{cri::PodSandboxState, image::BUSYBOX, lab::Lab, suite::handler};
use tokio::time::{Instant, sleep};

/// containerd tries again to reach a daemon after at most 3 s.
const SOON: Duration = Duration::from_secs(15);
const UNTIL_TOLD: &str = "echo begin; while [ ! -e /go ]; do sleep 0.1; done; echo end; exit 9";

pub(crate) async fn a_killed_daemon_finds_its_pods_again(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("orphan", handler()).await?;
    let id = pod.container("waits", BUSYBOX, &["/bin/sh", "-c", UNTIL_TOLD]).await?;

    lab.kill_daemon(handler()).await?;
    let out = lab.cri.exec(&id, &["/bin/sh", "-c", "echo alone; exit 5"]).await?;
    ensure!(out.code == 5 && out.stdout == "alone\n", "exec without the daemon gave {out:?}");

    lab.restart_daemon(handler()).await?;
    let end = Instant::now() + SOON;
    loop {
        let state = lab.cri.pod_status(&pod.id).await.map(|(status, _)| status.state());
        match state {
            Ok(PodSandboxState::SandboxReady) => break,
            other => ensure!(Instant::now() < end, "the pod is {other:?} after the daemon came back"),
        }
        sleep(Duration::from_millis(200)).await;
    }
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
