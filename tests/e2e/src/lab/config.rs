//! Configuration of containerd, CNI and our daemons, as the lab writes it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::thin_pool;
use crate::{image, machine::Machine, paths::Paths};

/// containerd's socket, where `ctr` looks without being told.
pub const SOCKET: &str = "/run/containerd/containerd.sock";
/// CRI's containerd namespace.
pub const NAMESPACE: &str = "k8s.io";
/// Handler with every default: image on pmem, virtiofs.
pub const QEMU: &str = "kuasar-qemu";
/// Handler without virtiofsd: image on virtio-blk, 9p.
pub const QEMU_9P: &str = "kuasar-qemu-9p";
/// Handler whose guest runs from the initrd.
pub const QEMU_INITRD: &str = "kuasar-qemu-initrd";
/// [`QEMU`] once more, from the same daemon, with streaming IO instead of fifos.
pub const QEMU_STREAM: &str = "kuasar-qemu-stream";
/// [`QEMU`]'s daemon, with roots from the blockfile snapshotter: image files with ext4.
pub const QEMU_BLOCKFILE: &str = "kuasar-qemu-blockfile";
/// [`QEMU`]'s daemon, with roots from the devmapper snapshotter, where there is a pool for it: block devices.
pub const QEMU_DEVMAPPER: &str = "kuasar-qemu-devmapper";
/// [`QEMU`]'s daemon, with roots from the erofs snapshotter, each with an image file of its own to write to.
pub const QEMU_EROFS: &str = "kuasar-qemu-erofs";
/// [`QEMU`]'s daemon, with roots from the native snapshotter: plain folders.
pub const QEMU_NATIVE: &str = "kuasar-qemu-native";
/// [`QEMU`]'s daemon; to every container's spec containerd adds an AppArmor profile of the operator's own.
pub const QEMU_PROFILE: &str = "kuasar-qemu-profile";
/// [`QEMU`]'s daemon; to every container's spec containerd adds a limit of huge pages.
pub const QEMU_HUGE_PAGES: &str = "kuasar-qemu-huge-pages";
/// Handler of a daemon that a case brings up itself, with [`Lab::start_daemon`](super::Lab::start_daemon):
/// its image is checked by dm-verity.
pub const QEMU_VERITY: &str = "kuasar-qemu-verity";
/// Handler of ordinary containers, to tell a fault of the lab from one of ours.
pub const RUNC: &str = "runc";

/// Program that the CNI plugin for port mappings calls.
const IPTABLES: &str = "/usr/sbin/iptables";

/// The pods' bridge.
pub(super) const BRIDGE: &str = "klab0";

/// Keys of `[hypervisor]` by handler, over the `config.toml` of the image.
pub(super) const VARIANTS: [(&str, &[(&str, &str)]); 3] =
    [(QEMU, &[]), (QEMU_9P, &[("share_fs", "9p"), ("root", "blk")]), (QEMU_INITRD, &[("root", "initrd")])];

/// Settings that may differ from the lab's usual containerd.
#[derive(Clone, Debug, Default)]
pub struct Containerd {
    /// The program, when it is not the unpacked one.
    pub program: Option<PathBuf>,
    /// Folder of `hosts.toml` files, when images are pulled through CRI.
    pub registries: Option<PathBuf>,
    /// True if NRI is on, as it is in containerd's own settings.
    pub nri: bool,
    /// True if there is a thin pool, and the devmapper snapshotter with it.
    pub thin_pool: bool,
    /// Handler of pods that name none, as all do that a kubelet without an API server runs; runc unless set.
    pub default_handler: Option<&'static str>,
}

impl Containerd {
    /// The lab's usual one, or that of `KUASAR_CONTAINERD`.
    #[must_use]
    pub fn given() -> Self {
        let program = std::env::var_os("KUASAR_CONTAINERD").map(PathBuf::from);
        Self { program, ..Self::default() }
    }

    /// Major and minor version.
    ///
    /// # Errors
    /// When it does not say one.
    pub fn version(&self, paths: &Paths) -> Result<(u32, u32)> {
        let program = self.program.clone().unwrap_or_else(|| paths.tool("containerd"));
        let output = std::process::Command::new(&program).arg("--version").output();
        let output = output.with_context(|| format!("running {}", program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let word = text.split_whitespace().nth(2).unwrap_or_default().trim_start_matches('v');
        let mut parts = word.split('.').map(str::parse);
        match (parts.next(), parts.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
            _ => anyhow::bail!("containerd says {text:?} for its version"),
        }
    }
}

/// All handlers whose pods are VMs.
pub fn handlers() -> impl Iterator<Item = &'static str> {
    VARIANTS.iter().map(|(handler, _)| *handler)
}

/// Socket of a handler's daemon; for the first handler the place where it is by default.
#[must_use]
pub fn socket_of(handler: &str) -> PathBuf {
    folder_of(handler).with_extension("sock")
}

/// Folder of a handler's pods. Short: the sockets in it have to fit the 107 bytes of a socket's address.
#[must_use]
pub fn folder_of(handler: &str) -> PathBuf {
    Path::new("/run/kuasar").join(handler.trim_start_matches("kuasar-"))
}

/// The vsock by which guests are reached: the one in user space, unless `KUASAR_VSOCK` names another.
#[must_use]
pub fn vsock() -> String {
    std::env::var("KUASAR_VSOCK").unwrap_or_else(|_| "vhost-user".into())
}

/// The daemon's configuration: the image's own, with this machine's programs, emulation, and `keys` of
/// `[hypervisor]`.
///
/// # Errors
/// When the image's `config.toml` cannot be read.
pub fn daemon_config(paths: &Paths, keys: &[(&str, &str)]) -> Result<toml::Table> {
    let file = paths.image.join("config.toml");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let mut config: toml::Table = text.parse().with_context(|| format!("parsing {}", file.display()))?;
    let tool = |name: &str| paths.tool(name).to_string_lossy().into_owned();
    let part = |name: &str| paths.image.join(name).to_string_lossy().into_owned();
    let hypervisor = table(&mut config, "hypervisor")?;
    let accel = std::env::var("KUASAR_ACCEL").unwrap_or_else(|_| "tcg".into());
    for (key, value) in [
        ("accel", accel),
        ("vsock", vsock()),
        ("path", tool("qemu-system-x86_64")),
        ("kernel_path", part("vmlinux")),
        ("image_path", part("kuasar.img")),
        ("initrd_path", part("kuasar.initrd")),
    ] {
        hypervisor.insert(key.into(), value.into());
    }
    if let Ok(memory) = std::env::var("KUASAR_MEMORY_MIB") {
        let memory: i64 = memory.parse().context("KUASAR_MEMORY_MIB is no number")?;
        hypervisor.insert("memory_in_mb".into(), memory.into());
    }
    for (key, value) in keys {
        hypervisor.insert((*key).into(), (*value).into());
    }
    let virtiofsd = table(hypervisor, "virtiofsd")?;
    virtiofsd.insert("path".into(), tool("virtiofsd").into());
    if keys.contains(&("root", "initrd")) {
        // One handler has the other way of showing volumes, in which access lists hold.
        virtiofsd.insert("announce_submounts".into(), false.into());
    }
    table(hypervisor, "vsock_device")?.insert("path".into(), tool("vhost-device-vsock").into());
    let relay = paths.relay().to_string_lossy().into_owned();
    let sandbox = table(&mut config, "sandbox")?;
    sandbox.insert("relay_path".into(), relay.into());
    // Tests cannot wait as long as operators, but for guests: many that are emulated start at once.
    for (key, seconds) in [("collect_interval_s", 3), ("collect_grace_s", 3), ("start_timeout_s", 120)] {
        sandbox.insert(key.into(), seconds.into());
    }
    Ok(config)
}

/// The table of that name, made when it is not there.
///
/// # Errors
/// When the key holds something else.
pub fn table<'a>(parent: &'a mut toml::Table, key: &str) -> Result<&'a mut toml::Table> {
    let value = parent.entry(key).or_insert_with(|| toml::Value::Table(toml::Table::new()));
    value.as_table_mut().with_context(|| format!("{key} in config.toml is not a table"))
}

pub(super) fn cni_config(machine: &Machine) -> String {
    let mut plugins = vec![serde_json::json!({
        "type": "bridge", "bridge": BRIDGE, "isGateway": true, "ipMasq": false,
        "ipam": {
            "type": "host-local",
            "dataDir": machine.root.join("cni/leases"),
            "ranges": [[{"subnet": "10.88.77.0/24"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    })];
    // Only where its program is: the demo has no use for it.
    if Path::new(IPTABLES).exists() {
        plugins.push(serde_json::json!({"type": "portmap", "capabilities": {"portMappings": true}}));
    }
    serde_json::json!({
        "cniVersion": "1.0.0",
        "name": "lab",
        "plugins": plugins,
    })
    .to_string()
}

/// Stock settings, but for places, and without what needs a network or a device of the host.
pub(super) fn containerd_config(machine: &Machine, paths: &Paths, containerd: &Containerd) -> String {
    let root = machine.root.display();
    let nri = if containerd.nri { "" } else { "\"io.containerd.nri.v1.nri\", " };
    let devmapper = if containerd.thin_pool { "" } else { "\"io.containerd.snapshotter.v1.devmapper\", " };
    let mut text = format!(
        r#"version = 3
root = "{root}/containerd"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.internal.v1.opt", {nri}"io.containerd.snapshotter.v1.btrfs",
  {devmapper}"io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "{SOCKET}"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{}"
[plugins.'io.containerd.cri.v1.runtime']
  # A machine that is itself a container may not lower an OOM score.
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = {:?}
  conf_dir = "{root}/cni"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
"#,
        image::PAUSE,
        super::networks::plugins(machine, paths),
    );
    if let Some(handler) = containerd.default_handler {
        text.push_str(&format!(
            "[plugins.'io.containerd.cri.v1.runtime'.containerd]\n  default_runtime_name = \"{handler}\"\n"
        ));
    }
    if let Some(folder) = &containerd.registries {
        text.push_str(&format!(
            "[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = \"{}\"\n",
            folder.display()
        ));
    }
    text.push_str(&format!(
        r#"[plugins.'io.containerd.snapshotter.v1.blockfile']
  root_path = "{root}/blockfile"
  scratch_file = "{}"
  fs_type = "ext4"
[plugins.'io.containerd.snapshotter.v1.erofs']
  default_size = "16MiB"
"#,
        scratch_file(machine).display()
    ));
    for handler in handlers().chain([QEMU_VERITY]) {
        text.push_str(&format!(
            "[proxy_plugins.{handler}]\n  type = \"sandbox\"\n  address = \"{}\"\n",
            socket_of(handler).display()
        ));
        text.push_str(&runtime(handler, handler, "fifo", ""));
    }
    text.push_str(&runtime(QEMU_STREAM, QEMU, "streaming", ""));
    if containerd.thin_pool {
        let pool = thin_pool::name_in(machine);
        text.push_str(&format!(
            "[plugins.'io.containerd.snapshotter.v1.devmapper']\n  root_path = \"{root}/devmapper\"\n  \
             pool_name = \"{pool}\"\n  base_image_size = \"64MB\"\n  fs_type = \"ext4\"\n"
        ));
        text.push_str(&runtime(QEMU_DEVMAPPER, QEMU, "fifo", "  snapshotter = \"devmapper\"\n"));
    }
    for handler in BASE_SPECS {
        let base = format!("  base_runtime_spec = \"{}\"\n", base_spec(machine, handler).display());
        text.push_str(&runtime(handler, QEMU, "fifo", &base));
    }
    text.push_str(&runtime(QEMU_NATIVE, QEMU, "fifo", "  snapshotter = \"native\"\n"));
    text.push_str(&runtime(QEMU_EROFS, QEMU, "fifo", "  snapshotter = \"erofs\"\n"));
    text.push_str(&runtime(QEMU_BLOCKFILE, QEMU, "fifo", "  snapshotter = \"blockfile\"\n"));
    text
}

/// Handlers that have a spec of their own to begin with.
const BASE_SPECS: [&str; 2] = [QEMU_PROFILE, QEMU_HUGE_PAGES];

fn base_spec(machine: &Machine, handler: &str) -> PathBuf {
    machine.root.join(format!("{handler}.json"))
}

/// Writes those: containerd's own, and what the handler is for.
pub(super) fn write_base_specs(machine: &Machine, paths: &Paths) -> Result<()> {
    let output = std::process::Command::new(paths.tool("ctr")).args(["oci", "spec"]).output();
    let output = output.context("running ctr oci spec")?;
    for handler in BASE_SPECS {
        let mut spec: serde_json::Value =
            serde_json::from_slice(&output.stdout).context("parsing what ctr oci spec says")?;
        let (part, key, value) = match handler {
            QEMU_PROFILE => ("/process", "apparmorProfile", serde_json::json!("kuasar-own")),
            _ => (
                "/linux/resources",
                "hugepageLimits",
                serde_json::json!([{"pageSize": "2MB", "limit": 2 << 20}]),
            ),
        };
        let part = spec.pointer_mut(part).and_then(serde_json::Value::as_object_mut);
        part.context("a part of containerd's spec is missing")?.insert(key.into(), value);
        fs::write(base_spec(machine, handler), spec.to_string())?;
    }
    Ok(())
}

/// Image that the blockfile snapshotter begins with: an empty file system.
pub(super) fn scratch_file(machine: &Machine) -> PathBuf {
    machine.root.join("scratch.ext4")
}

fn runtime(handler: &str, sandboxer: &str, io_type: &str, more: &str) -> String {
    format!(
        r#"[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{handler}]
  runtime_type = "io.containerd.kuasar-vmm.v1"
  sandboxer = "{sandboxer}"
  io_type = "{io_type}"
  privileged_without_host_devices = true
{more}"#
    )
}
