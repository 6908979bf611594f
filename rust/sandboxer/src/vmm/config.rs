//! Configuration that all VMs of a daemon have in common, as the driver sees it.

use std::path::PathBuf;

use serde::Deserialize;

use super::root::Verity;

/// Configuration of a hypervisor, the same for all of them. Paths are the host's; a program without `/` is
/// searched in `PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// The VMM's program.
    pub path: PathBuf,
    /// The accelerator: it executes the guest's instructions.
    pub accel: Accel,
    /// The machine that the guest sees.
    pub machine: Machine,
    /// CPU model in the VMM's words; `None`: `host` under KVM, `max` otherwise.
    pub cpu: Option<String>,
    /// Guest kernel.
    pub kernel: PathBuf,
    /// Guest image, for the roots that need one.
    pub image: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Source of the guest's root file system.
    pub root: Root,
    /// The hash tree that vouches for the image, if there is one.
    pub verity: Option<Verity>,
    /// Appended to the kernel command line.
    pub kernel_params: String,
    /// The share that carries the pod's shared folder into the guest.
    pub share_fs: ShareFs,
    /// Program for [`ShareFs::Virtiofs`].
    pub virtiofsd: PathBuf,
    /// The manner in which it serves.
    pub file_server: FileServer,
    /// The vsock device between host and guest.
    pub vsock: VsockKind,
    /// Program for [`VsockKind::VhostUser`].
    pub vhost_device_vsock: PathBuf,
    /// The guest tells which of its memory it does not use any more, and the host takes it back.
    pub free_page_reporting: bool,
    /// Log level of the guest's agent.
    pub task_log_level: String,
    /// The kernel's messages go to the console, and the agent says more.
    pub debug: bool,
}

/// The accelerator: it executes the guest's instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// The host kernel's KVM.
    #[default]
    Kvm,
    /// Emulation; slow, needs nothing of the host.
    Tcg,
}

/// The machine that the guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Machine {
    /// PCI Express.
    #[cfg_attr(not(target_arch = "aarch64"), default)]
    Q35,
    /// PCI.
    Pc,
    /// virtio-mmio only: the shortest boot, no hot-plug.
    Microvm,
    /// The one of aarch64: PCI Express, as its device tree describes it.
    #[cfg_attr(target_arch = "aarch64", default)]
    Virt,
}

impl Machine {
    /// Architecture of its processors, in Rust's words.
    #[must_use]
    pub const fn architecture(self) -> &'static str {
        match self {
            Self::Q35 | Self::Pc | Self::Microvm => "x86_64",
            Self::Virt => "aarch64",
        }
    }

    /// As the configuration names it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Pc => "pc",
            Self::Microvm => "microvm",
            Self::Virt => "virt",
        }
    }
}

/// Source of the guest's root file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Root {
    /// The image as persistent memory, read with DAX: its pages are shared by all VMs of the host.
    #[cfg_attr(not(target_arch = "aarch64"), default)]
    Pmem,
    /// The image as a virtio disk.
    #[cfg_attr(target_arch = "aarch64", default)]
    Blk,
    /// The initial RAM disk is the root.
    Initrd,
}

/// The share that carries the pod's shared folder into the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShareFs {
    /// virtiofsd, one process per pod.
    #[default]
    Virtiofs,
    /// 9p, served by the VMM itself.
    #[serde(rename = "9p")]
    NineP,
}

/// The manner in which virtiofsd serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileServer {
    /// Requests that may wait for the host at the same time.
    pub threads: u16,
    /// The file server's reference to a file that the guest remembers.
    pub inode_file_handles: InodeFileHandles,
    /// The confinement of the process.
    pub sandbox: FileServerSandbox,
    /// The guest may make nodes of devices.
    pub device_nodes: bool,
    /// The guest is told where a file system of the host ends and another begins.
    pub announce_submounts: bool,
}

impl Default for FileServer {
    fn default() -> Self {
        Self {
            threads: 32,
            inode_file_handles: InodeFileHandles::default(),
            sandbox: FileServerSandbox::default(),
            device_nodes: false,
            announce_submounts: true,
        }
    }
}

/// The file server's reference to a file that the guest remembers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InodeFileHandles {
    /// A handle, where the file system has them; a descriptor elsewhere.
    #[default]
    Prefer,
    /// A descriptor.
    Never,
}

/// The confinement of the file server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileServerSandbox {
    /// Mount, process and network namespaces of its own.
    #[default]
    Namespace,
    /// Another root folder.
    Chroot,
}

/// The vsock device between host and guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VsockKind {
    /// The kernel's vhost-vsock; the guest has a context id.
    #[default]
    Vhost,
    /// `vhost-device-vsock`, one process per pod; the guest is behind a unix socket.
    VhostUser,
}
