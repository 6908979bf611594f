//! Inputs of the tests, and an initrd made of them.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Inputs of the tests; `Err` names a missing one.
#[derive(Clone)]
pub(crate) struct Given {
    pub(crate) kernel: PathBuf,
    initrd: Option<PathBuf>,
    pub(crate) disk: Option<PathBuf>,
    /// The disk of the image, whatever the VM's own is.
    image: Option<PathBuf>,
    pub(crate) virtiofsd: Option<PathBuf>,
    agent: Option<PathBuf>,
    runc: Option<PathBuf>,
    pub(crate) busybox: PathBuf,
    pub(crate) qemu: PathBuf,
    pub(crate) vsock: PathBuf,
}

fn var(name: &str) -> Option<PathBuf> {
    env::var_os(name).map(PathBuf::from)
}

impl Given {
    /// `KUASAR_IMAGE`: a folder with `vmlinux` and `kuasar.initrd`. Or `KUASAR_KERNEL`, `KUASAR_AGENT` and
    /// `KUASAR_RUNC`: files, of which an initrd is made. Tools come from the cache that the lab's setup
    /// fills.
    pub(crate) fn from_env() -> Result<Self, String> {
        let cache = var("KUASAR_CACHE").or_else(|| {
            let base = var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|home| home.join(".cache")));
            base.map(|base| base.join("kuasar-nix"))
        });
        let tool = |name: &str, tool: &str| {
            let cached = cache.as_ref().map(|cache| cache.join("tools/bin").join(tool));
            let found = var(name).or(cached).filter(|path| path.exists());
            found.ok_or_else(|| format!("{tool}: set {name}, or run tests/lab/setup"))
        };
        let image = var("KUASAR_IMAGE");
        let in_image = |name: &str| image.as_ref().map(|image| image.join(name));
        let kernel = var("KUASAR_KERNEL").or_else(|| in_image("vmlinux"));
        let given = Self {
            kernel: kernel.ok_or("neither KUASAR_IMAGE nor KUASAR_KERNEL is set")?,
            initrd: in_image("kuasar.initrd"),
            disk: in_image("kuasar.img"),
            image: in_image("kuasar.img"),
            virtiofsd: tool("KUASAR_VIRTIOFSD", "virtiofsd").ok(),
            agent: var("KUASAR_AGENT"),
            runc: var("KUASAR_RUNC"),
            busybox: tool("KUASAR_BUSYBOX", "busybox")?,
            qemu: tool("KUASAR_QEMU", "qemu-system-x86_64")?,
            vsock: tool("KUASAR_VHOST_DEVICE_VSOCK", "vhost-device-vsock")?,
        };
        if given.initrd.is_none() && (given.agent.is_none() || given.runc.is_none()) {
            return Err("KUASAR_KERNEL needs KUASAR_AGENT and KUASAR_RUNC beside it".to_owned());
        }
        Ok(given)
    }

    /// The same with the kernel that has more: `KUASAR_MINI_KERNEL`, a vmlinux.
    pub(crate) fn mini_from_env() -> Result<Self, String> {
        let kernel = var("KUASAR_MINI_KERNEL").ok_or("KUASAR_MINI_KERNEL is not set")?;
        Ok(Self { kernel, ..Self::from_env()? })
    }

    /// A program of the guest, by its path in the image: the one that is given, or else the image's.
    pub(crate) fn program(&self, path: &str, to: &Path) {
        let given = if path == "/sbin/init" { &self.agent } else { &self.runc };
        if let Some(given) = given {
            fs::copy(given, to).unwrap();
        } else {
            // Behind the image's tables.
            let disk = format!("{}?offset={}", self.image.as_ref().unwrap().display(), 3 << 20);
            let dump = format!("dump {path} {}", to.display());
            let done = Command::new("debugfs").args(["-R", &dump, &disk]).stderr(Stdio::null()).status();
            assert!(
                done.unwrap().success() && fs::metadata(to).is_ok_and(|about| about.len() > 0),
                "{path} of {disk}"
            );
        }
        fs::set_permissions(to, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// The initrd of the image, unless another agent or runtime is to be tried.
    pub(crate) fn initrd(&self, dir: &Path) -> PathBuf {
        if let (Some(initrd), None, None) = (&self.initrd, &self.agent, &self.runc) {
            return initrd.clone();
        }
        let mut cpio = Cpio::default();
        for name in ["bin", "dev", "proc", "sys", "run", "tmp", "etc"] {
            cpio.add(name, 0o040_755, &[]);
        }
        cpio.add("init", 0o100_755, &fs::read(self.agent.as_ref().unwrap()).unwrap());
        cpio.add("bin/runc", 0o100_755, &fs::read(self.runc.as_ref().unwrap()).unwrap());
        cpio.add("TRAILER!!!", 0, &[]);
        let path = dir.join("initrd");
        fs::write(&path, cpio.bytes).unwrap();
        path
    }
}

/// Parts of a virtual machine.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Root on an initrd, shared folder by 9p.
    InitrdNineP,
    /// Root on the image as pmem with DAX, shared folder by virtiofs.
    DiskVirtiofs,
    /// The same without the tables of an image: a file system on virtio-blk.
    PlainDisk,
}

impl Kind {
    /// Names an input that it lacks.
    pub(crate) fn missing(self, given: &Given) -> Option<&'static str> {
        match self {
            Self::InitrdNineP => None,
            Self::DiskVirtiofs if given.disk.is_none() => Some("KUASAR_IMAGE is not set"),
            Self::DiskVirtiofs | Self::PlainDisk if given.virtiofsd.is_none() => {
                Some("there is no virtiofsd")
            }
            Self::DiskVirtiofs | Self::PlainDisk => None,
        }
    }
}

/// An archive as the kernel unpacks it ("newc").
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
}

impl Cpio {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        let fields = [0, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0]
            .map(|field| format!("{field:08x}"));
        self.bytes.extend(format!("070701{}{name}\0", fields.concat()).bytes());
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
