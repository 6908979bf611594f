//! Requests that a VM cannot meet: each is refused over CRI by one sentence that names the request and the
//! way out. The list is that of docs/config.md, "What is refused, and where".

use std::{fs, os::unix::net::UnixDatagram, path::Path, sync::Arc};

use anyhow::{Context, Result, anyhow, bail, ensure};
use kuasar_e2e::{
    cri::{
        ContainerConfig, Device, IdMapping, LinuxSandboxSecurityContext, Mount, NamespaceMode,
        NamespaceOption, PodSandboxConfig, UserNamespace,
    },
    image::BUSYBOX,
    lab::{self, Lab, Pod, QEMU_HUGE_PAGES, QEMU_PROFILE, own_pids},
    suite::handler,
};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::IDLE;

/// Two parts that an error must have: the request and why it cannot be met, and the way out.
type Sentence = [&'static str; 2];

fn with_namespaces(lab: &Lab, options: NamespaceOption) -> Result<PodSandboxConfig> {
    let mut config = lab.pod_config("refused")?;
    config.linux.get_or_insert_default().security_context =
        Some(LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() });
    Ok(config)
}

fn says(what: &str, text: &str, sentence: Sentence) -> Result<()> {
    for part in sentence {
        ensure!(text.contains(part), "of {what} it is not said {part:?}: {text}");
    }
    Ok(())
}

/// Each when the pod is to be made, of which nothing stays.
pub(crate) async fn pods_with_namespaces_that_a_vm_cannot_have_are_refused(lab: Arc<Lab>) -> Result<()> {
    let node = i32::from(NamespaceMode::Node);
    let others = super::sandbox::folders();
    let ids = || vec![IdMapping { host_id: 100_000, container_id: 0, length: 65_536 }];
    let users = UserNamespace { mode: NamespaceMode::Pod.into(), uids: ids(), gids: ids() };
    for (what, options, sentence) in [
        (
            "hostNetwork",
            NamespaceOption { network: node, ..own_pids() },
            ["network is NODE (hostNetwork: true)", "set hostNetwork: false"],
        ),
        (
            "hostPID",
            NamespaceOption { pid: node, ..own_pids() },
            ["pid is NODE (hostPID: true)", "set hostPID: false"],
        ),
        (
            "hostIPC",
            NamespaceOption { ipc: node, ..own_pids() },
            ["ipc is NODE (hostIPC: true)", "set hostIPC: false"],
        ),
        (
            "users",
            NamespaceOption { userns_options: Some(users), ..own_pids() },
            ["user namespaces are not supported in the VM", "set hostUsers: true"],
        ),
    ] {
        let config = with_namespaces(&lab, options)?;
        let error = lab.cri.run_pod(&config, handler()).await.err();
        let error = error.with_context(|| format!("a pod with {what} was started"))?;
        says(what, error.message(), sentence)?;
        let name = config.metadata.unwrap_or_default().name;
        let of_it = |pod: &kuasar_e2e::cri::PodSandbox| pod.metadata.as_ref().is_some_and(|m| m.name == name);
        ensure!(!lab.cri.pods().await?.iter().any(of_it), "the refused pod with {what} is listed");
        ensure!(super::sandbox::folders() == others, "the refused pod with {what} has a folder");
    }
    Ok(())
}

/// Returns containerd's words when a container is to be made and started.
async fn refusal(lab: &Lab, pod: &Pod<'_>, config: ContainerConfig) -> Result<String> {
    let id = match pod.create(config).await {
        Ok(id) => id,
        Err(error) => return Ok(format!("{error:#}")),
    };
    match lab.cri.start(&id).await {
        Ok(()) => bail!("it was started"),
        Err(status) => Ok(status.message().to_owned()),
    }
}

fn idle() -> ContainerConfig {
    lab::container("refused", BUSYBOX, IDLE)
}

async fn is_refused(lab: &Lab, pod: Pod<'_>, wanted: Vec<(&str, ContainerConfig, Sentence)>) -> Result<()> {
    for (what, mut config, sentence) in wanted {
        config.metadata.get_or_insert_default().name = what.to_owned();
        let said = refusal(lab, &pod, config).await.with_context(|| what.to_owned())?;
        says(what, &said, sentence)?;
        for container in lab.cri.containers(&pod.id).await? {
            lab.cri.remove(&container.id).await.map_err(|e| anyhow!("removing {what}: {}", e.message()))?;
        }
    }
    pod.remove().await
}

/// Each when the container is to be made; the pod goes on.
pub(crate) async fn containers_with_what_is_the_hosts_are_refused(lab: Arc<Lab>) -> Result<()> {
    let folder = lab.machine.root.join("tmp/sockets");
    fs::create_dir_all(&folder)?;
    let socket = folder.join("dev-log");
    let _takes = UnixDatagram::bind(&socket)?;
    let kvm = folder.join("kvm");
    mknod(&kvm, SFlag::S_IFCHR, Mode::S_IRUSR, makedev(10, 232))?;
    let device = |path: &Path| {
        let path = path.to_string_lossy().into_owned();
        Device { container_path: path.clone(), host_path: path, permissions: "rwm".into() }
    };
    let mount = |path: &Path| Mount {
        container_path: "/there".into(),
        host_path: path.to_string_lossy().into_owned(),
        ..Mount::default()
    };
    let pod = lab.pod("refuses", handler()).await?;
    let wanted = vec![
        (
            "device",
            ContainerConfig { devices: vec![device(Path::new("/dev/net/tun"))], ..idle() },
            ["/dev/net/tun is a device of the host, which the VM's kernel does not have", "remove it, or"],
        ),
        (
            "number",
            ContainerConfig { devices: vec![device(&kvm)], ..idle() },
            ["kvm is a device of the host, which the VM does not have", "remove it, or"],
        ),
        (
            "bound",
            ContainerConfig { mounts: vec![mount(Path::new("/dev/net/tun"))], ..idle() },
            ["/dev/net/tun is a device of the host, which the VM's kernel does not have", "remove it, or"],
        ),
        (
            "socket",
            ContainerConfig { mounts: vec![mount(&socket)], ..idle() },
            ["dev-log, which takes datagrams", "listen on a stream socket or on a port"],
        ),
    ];
    is_refused(&lab, pod, wanted).await
}

/// Profiles and limits that containerd itself leaves out on a host without AppArmor or the controller of huge
/// pages, and that its `base_runtime_spec` may say all the same.
pub(crate) async fn profiles_and_huge_pages_of_the_host_are_refused(lab: Arc<Lab>) -> Result<()> {
    for (handler, sentence) in [
        (
            QEMU_PROFILE,
            [
                "kuasar-own is a profile of the host",
                "set the AppArmor profile to RuntimeDefault or Unconfined",
            ],
        ),
        (
            QEMU_HUGE_PAGES,
            ["the VM has no huge pages of 2MB", "remove the hugepages-* limits from the container"],
        ),
    ] {
        let pod = lab.pod("base", handler).await?;
        is_refused(&lab, pod, vec![("base", idle(), sentence)]).await?;
    }
    Ok(())
}

/// CRI asks for it only where the host has a CRIU; `ctr` everywhere. The container goes on.
pub(crate) async fn checkpoints_are_refused(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("checkpoint", handler()).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    let said = lab::run(lab.ctr().args(["tasks", "checkpoint", &id])).await;
    let said = said.err().context("it was checkpointed")?.to_string();
    says(
        "a checkpoint",
        &said,
        ["cannot be checkpointed: its microVM has no CRIU", "stop it and start another"],
    )?;
    let out = lab.cri.exec(&id, &["echo", "here"]).await?;
    ensure!(out.stdout == "here\n", "the container suffered: {out:?}");
    pod.remove().await
}
