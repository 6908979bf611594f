//! Rights of a container: the things that it may see and do.

use std::sync::Arc;

use anyhow::{Result, anyhow, ensure};
use kuasar_e2e::{
    cri::{LinuxContainerSecurityContext, NamespaceMode, NamespaceOption},
    image::BUSYBOX,
    lab::{Lab, container},
    suite::handler,
};

/// As `kubectl debug --target`: a container that comes later sees the processes of one that is there, and no
/// others.
pub(crate) async fn a_container_sees_the_processes_of_its_target(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("target", handler()).await?;
    let target = pod.container("one", BUSYBOX, &["/bin/sleep", "4711"]).await?;
    pod.container("other", BUSYBOX, &["/bin/sleep", "4712"]).await?;
    let mut config = container("debug", BUSYBOX, &["/bin/sleep", "4713"]);
    let options = NamespaceOption {
        pid: NamespaceMode::Target.into(),
        target_id: target.clone(),
        ..Default::default()
    };
    config.linux.get_or_insert_default().security_context =
        Some(LinuxContainerSecurityContext { namespace_options: Some(options), ..Default::default() });
    let debug = lab.cri.create(&pod.id, &pod.config, config).await;
    let debug = debug.map_err(|e| anyhow!("creating the container: {}", e.message()))?;
    lab.cri.start(&debug).await.map_err(|e| anyhow!("starting it: {}", e.message()))?;
    let seen = lab.cri.exec(&debug, &["/bin/ps", "-o", "pid,args"]).await?.stdout;
    ensure!(seen.contains("/bin/sleep 4711") && seen.contains("/bin/sleep 4713"), "{seen}");
    ensure!(!seen.contains("4712"), "it sees a container that it did not name: {seen}");
    pod.remove().await
}
