//! Guests to boot, and what a booted one takes of the host.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use vmm_sandboxer::vmm::{Hypervisor, Machine, ReadyGuest, Root, Verity, Vm, VmConfig, VsockHub, qemu::Qemu};

use crate::{
    common::{self, TOKEN},
    given::{self, Process},
    vmm::Vmm,
};

/// Emulation on a busy machine is slow, and slower where a machine is emulated to have KVM.
pub(crate) const DEADLINE: Duration = Duration::from_secs(600);

/// The folder of `KUASAR_GUESTS`, or of another variable for another hypervisor or architecture, with
/// `kernels/<name>/` and `roots/<kind>/`.
pub(crate) struct Guests {
    folder: PathBuf,
    vmm: Vmm,
    /// The hypervisor's program, where it is the test that starts it.
    program: Option<PathBuf>,
    /// Takes the calls of guests on the kernel's vsock.
    hub: Option<VsockHub>,
}

/// A kind of root: how it comes in, and the folder that has it.
#[derive(Clone, Copy)]
pub(crate) struct RootKind {
    pub name: &'static str,
    pub root: Root,
    pub folder: &'static str,
    /// Kernel option that it needs besides those that every kernel here has.
    pub needs: &'static str,
}

const fn kind(name: &'static str, root: Root, folder: &'static str, needs: &'static str) -> RootKind {
    RootKind { name, root, folder, needs }
}

pub(crate) const ROOTS: [RootKind; 10] = [
    kind("ext4 on pmem", Root::Pmem, "ext4", "CONFIG_EXT4_FS=y"),
    kind("EROFS on pmem", Root::Pmem, "erofs", "CONFIG_EROFS_FS=y"),
    kind("XFS on pmem", Root::Pmem, "xfs", "CONFIG_XFS_FS=y"),
    kind("EROFS on pmem, dm-verity", Root::Pmem, "verity", "CONFIG_DM_VERITY=y"),
    kind("ext4 on virtio-blk", Root::Blk, "ext4", "CONFIG_EXT4_FS=y"),
    kind("EROFS on virtio-blk", Root::Blk, "erofs", "CONFIG_EROFS_FS=y"),
    kind("XFS on virtio-blk", Root::Blk, "xfs", "CONFIG_XFS_FS=y"),
    kind("EROFS on virtio-blk, dm-verity", Root::Blk, "verity", "CONFIG_DM_VERITY=y"),
    kind("initrd, gzip", Root::Initrd, "gzip", "CONFIG_RD_GZIP=y"),
    kind("initrd, zstd", Root::Initrd, "zstd", "CONFIG_RD_ZSTD=y"),
];

/// An image whose init says that it is there and does nothing else.
const FLOOR: RootKind = kind("empty init", Root::Pmem, "floor", "CONFIG_EXT4_FS=y");

/// One kernel in one of its forms.
pub(crate) struct Kernel {
    /// Like `micro, vmlinux`.
    pub name: String,
    pub path: PathBuf,
    /// The form that its hypervisor enters fastest.
    pub is_first: bool,
    config: String,
}

impl Kernel {
    pub(crate) fn has(&self, symbol: &str) -> bool {
        self.config.lines().any(|line| line == symbol)
    }
}

impl Guests {
    pub(crate) fn new(vmm: Vmm) -> Option<Self> {
        let (variable, output) = vmm.guests();
        let what = format!("no guests of {} on {} to boot", vmm.name(), vmm.architecture());
        let Some(folder) = std::env::var_os(variable).map(PathBuf::from) else {
            println!("skipped: {variable} is not given: {what} (nix build .#{output})");
            return None;
        };
        let program = match vmm.program() {
            None => None,
            Some(variable) => {
                let Some(program) = std::env::var_os(variable) else {
                    println!("skipped: {variable} is not given: {what}, as no registry has the program");
                    return None;
                };
                Some(program.into())
            }
        };
        let hub = (vmm == Vmm::StratoVirt).then(|| VsockHub::listen().unwrap());
        Some(Self { folder, vmm, program, hub })
    }

    pub(crate) fn vmm(&self) -> Vmm {
        self.vmm
    }

    /// The kinds of roots that the machine can have.
    pub(crate) fn roots(&self) -> impl Iterator<Item = RootKind> + use<> {
        let pmem = self.has_pmem();
        ROOTS.into_iter().filter(move |kind| pmem || kind.root != Root::Pmem)
    }

    /// The empty init, on what the machine starts from fastest.
    pub(crate) fn floor(&self) -> RootKind {
        RootKind { root: if self.has_pmem() { Root::Pmem } else { Root::Blk }, ..FLOOR }
    }

    fn has_pmem(&self) -> bool {
        self.vmm != Vmm::Qemu(Machine::Virt)
    }

    /// Every form of every kernel, in the order of their names.
    pub(crate) fn kernels(&self) -> Vec<Kernel> {
        let entries = fs::read_dir(self.folder.join("kernels")).unwrap();
        let mut folders: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        folders.sort();
        let forms = self.vmm.forms();
        let form = |folder: &PathBuf, form: &str| {
            let path = folder.join(form);
            let name = folder.file_name().unwrap().to_string_lossy().into_owned();
            let config = fs::read_to_string(folder.join("config")).unwrap();
            let is_first = forms.first() == Some(&form);
            path.exists().then(|| Kernel { name: format!("{name}, {form}"), path, is_first, config })
        };
        let kernels: Vec<_> = folders
            .iter()
            .flat_map(|folder| forms.iter().map(move |name| form(folder, name)))
            .flatten()
            .collect();
        assert!(!kernels.is_empty(), "{} has no kernels", self.folder.display());
        kernels
    }

    /// The file that is the root.
    pub(crate) fn root(&self, kind: RootKind) -> PathBuf {
        let name = if kind.root == Root::Initrd { "kuasar.initrd" } else { "kuasar.img" };
        fs::canonicalize(self.folder.join("roots").join(kind.folder).join(name)).unwrap()
    }

    /// The driver's part of a daemon's configuration.
    pub(crate) fn config(&self, kernel: &Kernel, kind: RootKind) -> VmConfig {
        let file = self.root(kind);
        let verity = verity(&file.with_file_name("verity.toml"));
        let config = common::config(self.vmm.machine(), kernel.path.clone(), file.clone(), file, kind.root);
        VmConfig { verity, ..config }
    }

    /// Starts a VM of this kernel and this root.
    pub(crate) async fn start(&self, kernel: &Kernel, kind: RootKind) -> Booted {
        let config = self.config(kernel, kind);
        let Some(program) = &self.program else { return start(config).await };
        let dir = common::pod_folder();
        let process = given::start(
            self.vmm,
            &VmConfig { path: program.clone(), ..config },
            dir.path(),
            self.hub.as_ref(),
        );
        Booted { vm: Running::Given(process.into()), dir }
    }
}

/// The table `hypervisor.verity` that is written beside an image that has a hash tree.
fn verity(path: &Path) -> Option<Verity> {
    let text = fs::read_to_string(path).ok()?;
    let mut table: toml::Table = text.parse().unwrap();
    let mut hypervisor = table.remove("hypervisor").unwrap();
    let verity = hypervisor.as_table_mut().unwrap().remove("verity").unwrap();
    Some(verity.try_into().unwrap())
}

/// A VM, by whom it was started.
pub(crate) enum Running {
    Daemon(Arc<dyn Vm>),
    Given(Box<Process>),
}

/// A VM, and the pod's folder that it has.
pub(crate) struct Booted {
    pub vm: Running,
    pub dir: tempfile::TempDir,
}

/// Starts a VM of QEMU.
pub(crate) async fn start(config: VmConfig) -> Booted {
    let dir = common::pod_folder();
    let spec = common::spec(dir.path());
    let qemu = Qemu::new(config);
    qemu.preflight().await.unwrap();
    Booted { vm: Running::Daemon(qemu.start(spec).await.unwrap()), dir }
}

impl Booted {
    /// The call of the guest's agent. The caller must keep it: a guest that loses its host ends.
    pub(crate) async fn ready(&self) -> ReadyGuest {
        match self.called().await {
            Ok(mut guest) => {
                guest.give_token(TOKEN).await.unwrap();
                guest
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// The agent's call, or why there is none.
    pub(crate) async fn called(&self) -> Result<ReadyGuest, String> {
        match &self.vm {
            Running::Daemon(vm) => vm.ready(DEADLINE).await.map_err(|error| error.to_string()),
            Running::Given(process) => process.ready(self.dir.path()).await,
        }
    }

    fn pid(&self) -> u32 {
        match &self.vm {
            Running::Daemon(vm) => vm.pid(),
            Running::Given(process) => process.pid(),
        }
    }

    /// Waits until the guest's console has said something.
    pub(crate) async fn said(&self, text: &str) {
        let console = self.dir.path().join("log/console.log");
        let end = tokio::time::Instant::now() + DEADLINE;
        while !fs::read_to_string(&console).unwrap_or_default().contains(text) {
            assert!(tokio::time::Instant::now() < end, "{text} is not on the guest's console");
            if let Running::Given(process) = &self.vm
                && let Some(why) = process.ended(self.dir.path()).await
            {
                panic!("{text} is not on the guest's console: {why}");
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Processor time that the VMM has used: unlike the clock's, no other process of the machine adds to it.
    pub(crate) fn busy(&self) -> Duration {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let nanoseconds = threads.filter_map(|thread| {
            let text = fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<u64>().ok()
        });
        Duration::from_nanos(nanoseconds.sum())
    }

    /// KiB of a mapping of the VMM whose name contains `name`: its resident pages, or (`Pss`) its part of
    /// them.
    pub(crate) fn mapped(&self, name: &str, field: &str) -> u64 {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.pid())).unwrap();
        let (mut sum, mut wanted) = (0, false);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some(first), _) if first.contains('-') => wanted = line.contains(name),
                (Some(first), Some(value)) if wanted && first.strip_suffix(':') == Some(field) => {
                    sum += value.parse::<u64>().unwrap();
                }
                _ => {}
            }
        }
        sum
    }

    pub(crate) async fn stop(self) {
        match self.vm {
            Running::Daemon(vm) => vm.stop(true, Duration::from_secs(10)).await.unwrap(),
            Running::Given(process) => process.stop().await,
        }
    }
}
