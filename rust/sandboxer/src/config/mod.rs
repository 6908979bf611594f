//! The daemon's configuration: one TOML schema for every hypervisor (documented for operators in
//! `docs/config.md`).

mod nearest;

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::pod::Annotation;
use crate::process::{IdRange, Ids};
use crate::vmm::{
    Accel, FileServer, FileServerSandbox, InodeFileHandles, Machine, Root, ShareFs, Verity, VmConfig,
    VsockKind,
};

/// Default path of the daemon's configuration.
pub const DEFAULT_PATH: &str = "/etc/kuasar/qemu.toml";

/// Least memory of a guest in MiB, by measurement (docs/benchmarks.md): with 4 less, a pod still starts and
/// runs a container and an exec, on one vCPU and either kernel; with 8 less it does not, on the larger kernel
/// or from the initrd.
const LEAST_MEMORY: u32 = 48;
/// The same with the initrd as root: all its files are memory.
const LEAST_MEMORY_INITRD: u32 = 60;

/// Memory, in MiB, that QEMU takes beside the guest's, with virtiofsd, vsock device and relay, by measurement
/// (docs/kubernetes.md).
const VMM_MEMORY: u32 = 72;
/// The same with emulation, which keeps what it has translated.
const VMM_MEMORY_TCG: u32 = 160;

/// The whole file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The daemon itself.
    pub sandbox: SandboxConfig,
    /// The agent in the guest.
    pub task: TaskConfig,
    /// The VM and what runs beside it.
    pub hypervisor: HypervisorConfig,
}

/// `[sandbox]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SandboxConfig {
    /// The VMM that runs the pods.
    pub hypervisor: HypervisorKind,
    /// `tracing` filter: a level, or directives as in `RUST_LOG`.
    pub log_level: String,
    /// The relay's binary; a name without `/` is searched in `PATH`.
    pub relay_path: PathBuf,
    /// containerd's gRPC socket; containers' events go to the one beside it whose name ends in `.ttrpc`.
    pub containerd_address: PathBuf,
    /// Seconds a pod may take from Start to ready.
    pub start_timeout_s: u64,
    /// Seconds containers have to end when a pod is stopped.
    pub stop_timeout_s: u64,
    /// Seconds between two looks at containerd's list of pods, for those that it has forgotten.
    pub collect_interval_s: u64,
    /// Seconds for which a pod must be missing there before it is removed.
    pub collect_grace_s: u64,
    /// User and group ids for pods, `FIRST-LAST`; empty: none, and pods' processes are the daemon's user's.
    pub uid_range: String,
}

impl Default for SandboxConfig {
    fn default() -> Self {
        Self {
            hypervisor: HypervisorKind::default(),
            log_level: "info".into(),
            relay_path: "containerd-shim-kuasar-vmm-v1".into(),
            containerd_address: "/run/containerd/containerd.sock".into(),
            start_timeout_s: 60,
            stop_timeout_s: 10,
            collect_interval_s: 600,
            collect_grace_s: 60,
            uid_range: IdRange::default().to_string(),
        }
    }
}

/// A VMM that the daemon can run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HypervisorKind {
    /// QEMU, 8.2 or later.
    #[default]
    Qemu,
}

/// `[task]`: reaches the guest on its kernel command line.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TaskConfig {
    /// The agent's log level.
    pub log_level: LogLevel,
    /// Turns the agent's debug aids on (see D9: off unless asked for).
    pub debug: bool,
}

impl Default for TaskConfig {
    fn default() -> Self {
        Self { log_level: LogLevel::Info, debug: false }
    }
}

/// A log level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    /// Failures only.
    Error,
    /// And what may become one.
    Warn,
    /// And what happened to pods.
    Info,
    /// And how.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// The word used on command lines.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// `[hypervisor]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HypervisorConfig {
    /// The VMM's binary; a name without `/` is searched in `PATH`.
    pub path: PathBuf,
    /// Hardware virtualisation or emulation.
    pub accel: Accel,
    /// The machine that the guest sees.
    pub machine_type: Machine,
    /// CPU model. Empty: `host` with KVM, `max` with emulation.
    pub cpu_model: String,
    /// vCPUs of a pod without a CPU limit, if it does not request more.
    pub vcpus: u32,
    /// Guest memory, in MiB, of a pod without a memory limit; without it, a share of the node's.
    pub memory_in_mb: Option<u32>,
    /// MiB added to a pod's memory limit for the guest's kernel and agent.
    pub memory_overhead_in_mb: u32,
    /// MiB of the pod's cgroup that VMM, companions and relay take beside the guest; without it, what was
    /// measured.
    pub vmm_memory_in_mb: Option<u32>,
    /// The guest gives memory that it does not use any more back to the host.
    pub free_page_reporting: bool,
    /// Annotations with which a pod may ask for another VM.
    pub allowed_annotations: Vec<Annotation>,
    /// Guest kernel.
    pub kernel_path: PathBuf,
    /// Guest image; needed with `root = "pmem"` and `"blk"`.
    pub image_path: PathBuf,
    /// Guest initrd; needed with `root = "initrd"`.
    pub initrd_path: PathBuf,
    /// Added to the kernel command line.
    pub kernel_params: String,
    /// Source of the guest's root.
    pub root: Root,
    /// Lets dm-verity check the image block by block.
    pub verity: Option<Verity>,
    /// The share that carries the pod's folder to the guest.
    pub share_fs: ShareFs,
    /// The vsock device between host and guest.
    pub vsock: VsockKind,
    /// Keeps the VMM's own debug output in `log/vmm.log` and the guest's console verbose.
    pub debug: bool,
    /// virtiofsd, used with `share_fs = "virtiofs"`.
    pub virtiofsd: VirtiofsdConfig,
    /// vhost-device-vsock, used with `vsock = "vhost-user"`.
    pub vsock_device: VsockDeviceConfig,
}

/// The form of a kernel that is entered without being unpacked.
const KERNEL: &str = if cfg!(target_arch = "aarch64") { "Image" } else { "vmlinux" };

impl HypervisorConfig {
    /// Least memory, in MiB, with which a guest starts and can be worked with.
    #[must_use]
    pub const fn least_memory_in_mb(&self) -> u32 {
        match self.root {
            Root::Pmem | Root::Blk => LEAST_MEMORY,
            Root::Initrd => LEAST_MEMORY_INITRD,
        }
    }

    /// MiB of the pod's cgroup that are not for the guest.
    #[must_use]
    pub fn vmm_memory(&self) -> u64 {
        let measured = match self.accel {
            Accel::Kvm => VMM_MEMORY,
            Accel::Tcg => VMM_MEMORY_TCG,
        };
        self.vmm_memory_in_mb.unwrap_or(measured).into()
    }
}

impl Default for HypervisorConfig {
    fn default() -> Self {
        Self {
            path: format!("qemu-system-{}", std::env::consts::ARCH).into(),
            accel: Accel::default(),
            machine_type: Machine::default(),
            cpu_model: String::new(),
            vcpus: 1,
            memory_in_mb: None,
            memory_overhead_in_mb: 64,
            vmm_memory_in_mb: None,
            free_page_reporting: true,
            allowed_annotations: Vec::new(),
            kernel_path: Path::new("/usr/share/kuasar").join(KERNEL),
            image_path: "/usr/share/kuasar/kuasar.img".into(),
            initrd_path: "/usr/share/kuasar/kuasar.initrd".into(),
            kernel_params: String::new(),
            root: Root::default(),
            verity: None,
            share_fs: ShareFs::default(),
            vsock: VsockKind::default(),
            debug: false,
            virtiofsd: VirtiofsdConfig::default(),
            vsock_device: VsockDeviceConfig::default(),
        }
    }
}

/// Most threads of virtiofsd that may be asked for: each costs the pod memory.
const MAX_FILE_SERVER_THREADS: u16 = 256;

/// `[hypervisor.virtiofsd]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VirtiofsdConfig {
    /// The binary; a name without `/` is searched in `PATH`.
    pub path: PathBuf,
    /// Requests that may wait for the host at the same time.
    pub threads: u16,
    /// The file server's reference to a file that the guest remembers: a handle or a descriptor.
    pub inode_file_handles: InodeFileHandles,
    /// The confinement of the process.
    pub sandbox: FileServerSandbox,
    /// Containers may make nodes of devices in their root and in volumes.
    pub device_nodes: bool,
    /// Each file system of the host is one of its own in the guest, too.
    pub announce_submounts: bool,
}

impl Default for VirtiofsdConfig {
    fn default() -> Self {
        let FileServer { threads, inode_file_handles, sandbox, device_nodes, announce_submounts } =
            FileServer::default();
        let path = "virtiofsd".into();
        Self { path, threads, inode_file_handles, sandbox, device_nodes, announce_submounts }
    }
}

/// `[hypervisor.vsock_device]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VsockDeviceConfig {
    /// The binary; a name without `/` is searched in `PATH`.
    pub path: PathBuf,
}

impl Default for VsockDeviceConfig {
    fn default() -> Self {
        Self { path: "vhost-device-vsock".into() }
    }
}

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("reading the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, or not this schema.
    #[error("parsing the configuration {path}: {why}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Place and reason, over several lines.
        why: String,
    },
    /// A value that cannot work.
    #[error("checking the configuration {path}: {key} {why}")]
    Value {
        /// The file.
        path: PathBuf,
        /// Dotted name of the key.
        key: &'static str,
        /// The fault of its value.
        why: String,
    },
}

impl Config {
    /// Reads and checks a file. Relative paths of artefacts are relative to the file's own folder, so that a
    /// folder made by one build can be moved as a whole.
    ///
    /// # Errors
    /// When the file cannot be read, has an unknown key or a value that cannot work.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Self::from_text(&text, &path)
    }

    /// As [`Config::load`], from text that came from `path`.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn from_text(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = toml::from_str(text).map_err(|e| ConfigError::Parse {
            path: path.to_owned(),
            why: nearest::explain(&e.to_string()),
        })?;
        config.resolve(path.parent().unwrap_or(Path::new("/")));
        config.check().map_err(|(key, why)| ConfigError::Value { path: path.to_owned(), key, why })?;
        Ok(config)
    }

    /// The part of the configuration that the hypervisor's driver needs.
    #[must_use]
    pub fn vm(&self) -> VmConfig {
        let some = |path: &Path| (!path.as_os_str().is_empty()).then(|| path.to_owned());
        let hypervisor = &self.hypervisor;
        VmConfig {
            path: hypervisor.path.clone(),
            accel: hypervisor.accel,
            machine: hypervisor.machine_type,
            cpu: Some(hypervisor.cpu_model.clone()).filter(|model| !model.is_empty()),
            kernel: hypervisor.kernel_path.clone(),
            image: some(&hypervisor.image_path),
            initrd: some(&hypervisor.initrd_path).filter(|_| hypervisor.root == Root::Initrd),
            root: hypervisor.root,
            verity: hypervisor.verity.clone(),
            kernel_params: hypervisor.kernel_params.clone(),
            share_fs: hypervisor.share_fs,
            virtiofsd: hypervisor.virtiofsd.path.clone(),
            file_server: FileServer {
                threads: hypervisor.virtiofsd.threads,
                inode_file_handles: hypervisor.virtiofsd.inode_file_handles,
                sandbox: hypervisor.virtiofsd.sandbox,
                device_nodes: hypervisor.virtiofsd.device_nodes,
                announce_submounts: hypervisor.virtiofsd.announce_submounts,
            },
            vsock: hypervisor.vsock,
            vhost_device_vsock: hypervisor.vsock_device.path.clone(),
            free_page_reporting: hypervisor.free_page_reporting,
            task_log_level: self.task.log_level.as_str().to_owned(),
            debug: hypervisor.debug || self.task.debug,
        }
    }

    /// User ids for pods; those of a daemon that is not root's have its own.
    #[must_use]
    pub fn ids(&self) -> Ids {
        let root = rustix::process::geteuid().is_root();
        Ids::new(self.sandbox.uid_range.parse().ok().filter(|_| root))
    }

    fn resolve(&mut self, base: &Path) {
        let hypervisor = &mut self.hypervisor;
        for path in [&mut hypervisor.kernel_path, &mut hypervisor.image_path, &mut hypervisor.initrd_path] {
            if !path.as_os_str().is_empty() && path.is_relative() {
                *path = base.join(&*path);
            }
        }
        // Programs: a bare name is for PATH, "./x" and "dir/x" are relative to the file.
        for path in [
            &mut hypervisor.path,
            &mut hypervisor.virtiofsd.path,
            &mut hypervisor.vsock_device.path,
            &mut self.sandbox.relay_path,
        ] {
            if path.is_relative() && path.components().count() > 1 {
                *path = base.join(&*path);
            }
        }
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        let hypervisor = &self.hypervisor;
        if hypervisor.vcpus == 0 {
            return Err(("hypervisor.vcpus", "is 0, a VM needs at least 1".into()));
        }
        let least = hypervisor.least_memory_in_mb();
        if let Some(memory) = hypervisor.memory_in_mb.filter(|memory| *memory < least) {
            let why = format!("is {memory}, a guest needs at least {least}");
            return Err(("hypervisor.memory_in_mb", why));
        }
        if !(1..=MAX_FILE_SERVER_THREADS).contains(&hypervisor.virtiofsd.threads) {
            let why =
                format!("is {}, virtiofsd has 1 to {MAX_FILE_SERVER_THREADS}", hypervisor.virtiofsd.threads);
            return Err(("hypervisor.virtiofsd.threads", why));
        }
        if !self.sandbox.uid_range.is_empty() {
            let range: Result<IdRange, _> = self.sandbox.uid_range.parse();
            range.map_err(|why| ("sandbox.uid_range", why.to_string()))?;
        }
        if self.sandbox.start_timeout_s == 0 {
            return Err(("sandbox.start_timeout_s", "is 0, no pod can start within that".into()));
        }
        for (key, seconds) in [
            ("sandbox.collect_interval_s", self.sandbox.collect_interval_s),
            ("sandbox.collect_grace_s", self.sandbox.collect_grace_s),
        ] {
            if seconds == 0 {
                return Err((
                    key,
                    "is 0, and a pod that is being created must not be taken for a forgotten one".into(),
                ));
            }
        }
        let mut needed = vec![
            ("hypervisor.path", &hypervisor.path),
            ("hypervisor.kernel_path", &hypervisor.kernel_path),
            ("sandbox.relay_path", &self.sandbox.relay_path),
            ("sandbox.containerd_address", &self.sandbox.containerd_address),
        ];
        match hypervisor.root {
            Root::Pmem | Root::Blk => needed.push(("hypervisor.image_path", &hypervisor.image_path)),
            Root::Initrd => needed.push(("hypervisor.initrd_path", &hypervisor.initrd_path)),
        }
        if let Some(verity) = &hypervisor.verity {
            if hypervisor.root == Root::Initrd {
                let why = "is set and the root is the initrd, which no hash tree covers; set root = \"pmem\" or \"blk\"";
                return Err(("hypervisor.verity", why.into()));
            }
            if let Some(problem) = verity.problem() {
                return Err(problem);
            }
        }
        match needed.iter().find(|(_, path)| path.as_os_str().is_empty()) {
            Some((key, _)) => Err((key, "is empty".into())),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
