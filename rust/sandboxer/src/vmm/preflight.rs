//! Finds the faults that can be known before the first pod comes.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::{fd::AsRawFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
};

use super::{Accel, Machine, PreflightError, Root, ShareFs, VmConfig, VsockKind, vsock};

/// `KVM_GET_API_VERSION`'s only answer since Linux 2.6.22.
const KVM_API_VERSION: i32 = 12;
/// As much of a kernel as tells its kind and architecture.
const KERNEL_HEADER: usize = 1024;
/// Persistent memory is mapped by the guest's large pages, in bytes.
const PMEM_ALIGN: u64 = 2 << 20;

nix::ioctl_write_int_bad!(
    /// `KVM_GET_API_VERSION` of `linux/kvm.h`; its argument must be 0.
    kvm_get_api_version,
    nix::request_code_none!(0xAE, 0x00)
);

/// Checks programs, kernel, image, accelerator and vsock.
pub(super) fn check(config: &VmConfig) -> Result<(), PreflightError> {
    program("the VMM", "hypervisor.path", &config.path)?;
    if config.share_fs == ShareFs::Virtiofs {
        program("virtiofsd", "hypervisor.virtiofsd.path", &config.virtiofsd)?;
    }
    kernel(config)?;
    root(config)?;
    if config.accel == Accel::Kvm {
        kvm(Path::new("/dev/kvm"))?;
    }
    match config.vsock {
        VsockKind::VhostUser => {
            program("vhost-device-vsock", "hypervisor.vsock_device.path", &config.vhost_device_vsock)
        }
        VsockKind::Vhost => device(
            Path::new(vsock::VHOST_VSOCK),
            "vsock = \"vhost\"",
            "load the kernel module vhost_vsock, or set hypervisor.vsock = \"vhost-user\"",
        )
        .map(drop),
    }
}

fn refused(text: String) -> PreflightError {
    PreflightError::Refused(text)
}

/// A program given by path, or by name in `PATH`.
fn program(what: &str, key: &str, path: &Path) -> Result<(), PreflightError> {
    if path.components().count() == 1 {
        let folders = std::env::var_os("PATH").unwrap_or_default();
        if std::env::split_paths(&folders).any(|folder| executable(&folder.join(path)).is_ok()) {
            return Ok(());
        }
        return Err(refused(format!(
            "{what} {} is in no folder of PATH; install it, or set {key} to its path",
            path.display()
        )));
    }
    executable(path).map_err(|source| {
        refused(format!(
            "{what} {} cannot be executed: {source}; install it, or set {key} to its path",
            path.display()
        ))
    })
}

fn executable(path: &Path) -> io::Result<()> {
    let metadata = fs::metadata(path)?;
    if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, "not an executable file"))
}

fn read(what: &'static str, key: &'static str, path: &Path) -> Result<(Vec<u8>, u64), PreflightError> {
    let open = || {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut header = Vec::new();
        file.take(u64::try_from(KERNEL_HEADER).unwrap_or(u64::MAX)).read_to_end(&mut header)?;
        Ok((header, size))
    };
    open().map_err(|source| PreflightError::File { what, key, path: path.to_owned(), source })
}

/// KVM runs guests of the host's own kind, emulation those of its machine's.
fn kernel(config: &VmConfig) -> Result<(), PreflightError> {
    let (host, machine) = (std::env::consts::ARCH, config.machine.architecture());
    let name = config.machine.name();
    if config.accel == Accel::Kvm && machine != host {
        return Err(refused(format!(
            "the machine type {name} is for {machine} and this host's KVM runs {host} only; set hypervisor.machine_type = {:?}",
            Machine::default().name()
        )));
    }
    let path = config.kernel.as_path();
    let (header, _) = read("the guest kernel", "hypervisor.kernel_path", path)?;
    match kernel_architecture(&header) {
        Some("aarch64") if machine == "aarch64" && header.starts_with(b"\x7fELF") => Err(refused(format!(
            "the guest kernel {} is a vmlinux (ELF) and the machine type {name} starts an Image only; set \
             hypervisor.kernel_path to the Image of that kernel",
            path.display()
        ))),
        Some(architecture) if architecture == machine => Ok(()),
        Some(architecture) => Err(refused(format!(
            "the guest kernel {} is for {architecture} and the machine type {name} is for {machine}; set \
             hypervisor.kernel_path to a kernel for {machine}",
            path.display()
        ))),
        None => Err(refused(format!(
            "the guest kernel {} is not a kernel; set hypervisor.kernel_path to a vmlinux (ELF), bzImage or Image",
            path.display()
        ))),
    }
}

/// Architecture of a kernel in Rust's words, by its first bytes.
fn kernel_architecture(header: &[u8]) -> Option<&'static str> {
    let at = |offset: usize, text: &[u8]| header.get(offset..).is_some_and(|rest| rest.starts_with(text));
    if at(0, b"\x7fELF") {
        // `e_machine`; little endian on all architectures that we know.
        let machine = u16::from_le_bytes([*header.get(18)?, *header.get(19)?]);
        return Some(match machine {
            62 => "x86_64",
            183 => "aarch64",
            3 => "x86",
            243 => "riscv64",
            _ => "another architecture",
        });
    }
    // Magic numbers of Documentation/arch/x86/boot.rst and arm64/booting.rst.
    match (at(0x202, b"HdrS"), at(56, b"ARM\x64")) {
        (true, _) => Some("x86_64"),
        (_, true) => Some("aarch64"),
        _ => None,
    }
}

fn root(config: &VmConfig) -> Result<(), PreflightError> {
    if config.root == Root::Initrd {
        let key = "hypervisor.initrd_path";
        let path = given(config.initrd.as_ref(), key, "root = \"initrd\"")?;
        return read("the guest initrd", key, path).map(drop);
    }
    let key = "hypervisor.image_path";
    let path = given(config.image.as_ref(), key, "this kind of root")?;
    let (header, size) = read("the guest image", key, path)?;
    if header.get(510..512) != Some(&[0x55, 0xAA]) {
        return Err(refused(format!(
            "the guest image {} has no partition table; set {key} to an image made by kuasar-image",
            path.display()
        )));
    }
    if let Some(verity) = &config.verity
        && !verity.is_in(path).unwrap_or(false)
    {
        return Err(refused(format!(
            "the guest image {} has no hash tree behind {} blocks; set hypervisor.verity to what kuasar-image build --verity \
             printed for it",
            path.display(),
            verity.data_blocks
        )));
    }
    if config.root != Root::Pmem {
        return Ok(());
    }
    if size == 0 || size % PMEM_ALIGN != 0 {
        return Err(refused(format!(
            "the guest image {} has {size} bytes and persistent memory needs whole 2 MiB; set {key} to an image made by \
             kuasar-image, or hypervisor.root = \"blk\"",
            path.display()
        )));
    }
    let or = match config.machine {
        Machine::Q35 | Machine::Pc => return Ok(()),
        Machine::Microvm => ", or hypervisor.machine_type = \"q35\"",
        // QEMU 10 has no virtio-pmem for it, and its NVDIMMs want ACPI and so a firmware.
        Machine::Virt => "",
    };
    Err(refused(format!(
        "the machine type {} has no persistent memory; set hypervisor.root = \"blk\"{or}",
        config.machine.name()
    )))
}

fn given<'a>(path: Option<&'a PathBuf>, key: &str, why: &str) -> Result<&'a Path, PreflightError> {
    path.map(PathBuf::as_path).ok_or_else(|| refused(format!("{key} is not set and {why} needs it; set it")))
}

fn device(path: &Path, wanted: &str, advice: &str) -> Result<File, PreflightError> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map_err(|source| {
        refused(format!("{wanted} is configured and {} cannot be opened: {source}; {advice}", path.display()))
    })
}

/// Opening is not enough: anything may be at that path.
fn kvm(path: &Path) -> Result<(), PreflightError> {
    let advice = "enable virtualisation in the firmware and load kvm_intel or kvm_amd, or set hypervisor.accel = \"tcg\" \
                  (slow)";
    let device = device(path, "accel = \"kvm\"", advice)?;
    // SAFETY: the request's argument is a number, and it touches no memory.
    let version = unsafe { kvm_get_api_version(device.as_raw_fd(), 0) };
    match version {
        Ok(KVM_API_VERSION) => Ok(()),
        Ok(version) => Err(refused(format!(
            "accel = \"kvm\" is configured and {} speaks version {version} of its interface, not {KVM_API_VERSION}; {advice}",
            path.display()
        ))),
        Err(error) => Err(refused(format!(
            "accel = \"kvm\" is configured and {} is not KVM: {error}; {advice}",
            path.display()
        ))),
    }
}

#[cfg(test)]
mod tests;
