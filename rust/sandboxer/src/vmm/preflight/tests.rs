//! Messages that an operator reads when the configuration cannot work.

use std::fs;

use super::*;

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn put(&self, name: &str, bytes: &[u8], mode: u32) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    fn config(&self) -> VmConfig {
        let mut image = vec![0; 2 << 20];
        image[510..512].copy_from_slice(&[0x55, 0xAA]);
        VmConfig {
            path: self.put("qemu", b"#!/bin/sh\n", 0o755),
            accel: Accel::Tcg,
            machine: Machine::default(),
            cpu: None,
            kernel: self.put("kernel", &kernel_of_host(), 0o644),
            image: Some(self.put("kuasar.img", &image, 0o644)),
            initrd: None,
            root: Root::default(),
            verity: None,
            kernel_params: String::new(),
            share_fs: ShareFs::Virtiofs,
            virtiofsd: "sh".into(),
            file_server: crate::vmm::FileServer::default(),
            vsock: VsockKind::VhostUser,
            vhost_device_vsock: "sh".into(),
            free_page_reporting: true,
            task_log_level: "info".into(),
            debug: false,
        }
    }
}

fn kernel_of_host() -> Vec<u8> {
    if cfg!(target_arch = "x86_64") { elf(62) } else { image() }
}

/// Begin of an aarch64 kernel.
fn image() -> Vec<u8> {
    [&[0; 56][..], b"ARM\x64", &[0; 4]].concat()
}

fn elf(machine: u8) -> Vec<u8> {
    let mut elf = b"\x7fELF".to_vec();
    elf.resize(64, 0);
    elf[18] = machine;
    elf
}

#[track_caller]
fn refused(config: &VmConfig, expected: &str) {
    let error = check(config).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
    assert!(error.contains("; "), "says what to do: {error}");
}

#[test]
fn a_good_configuration_passes() {
    let files = Files::new();
    check(&files.config()).unwrap();
    let bz = files.put("bzImage", &[&[0; 0x202][..], b"HdrS"].concat(), 0o644);
    if cfg!(target_arch = "x86_64") {
        check(&VmConfig { kernel: bz, ..files.config() }).unwrap();
    }
}

#[test]
fn programs() {
    let files = Files::new();
    let config = files.config();
    refused(
        &VmConfig { path: "/nonexistent/qemu".into(), ..config.clone() },
        "the VMM /nonexistent/qemu cannot be executed: No such file or directory (os error 2); install it, or set \
         hypervisor.path to its path",
    );
    refused(
        &VmConfig { path: files.put("plain", b"", 0o644), ..config.clone() },
        "cannot be executed: not an executable file",
    );
    refused(
        &VmConfig { virtiofsd: "no-such-virtiofsd".into(), ..config.clone() },
        "virtiofsd no-such-virtiofsd is in no folder of PATH; install it, or set hypervisor.virtiofsd.path",
    );
    refused(
        &VmConfig { vhost_device_vsock: "/nonexistent/v".into(), ..config.clone() },
        "set hypervisor.vsock_device.path to its path",
    );
    check(&VmConfig { virtiofsd: "/nonexistent/v".into(), share_fs: ShareFs::NineP, ..config }).unwrap();
}

#[test]
fn kernels() {
    let files = Files::new();
    let config = files.config();
    refused(
        &VmConfig { kernel: "/nonexistent/vmlinux".into(), ..config.clone() },
        "the guest kernel /nonexistent/vmlinux cannot be read: No such file or directory (os error 2); set \
         hypervisor.kernel_path to a readable file",
    );
    refused(&VmConfig { kernel: files.0.path().into(), ..config.clone() }, "cannot be read: Is a directory");
    refused(&VmConfig { kernel: files.put("text", b"hello", 0o644), ..config.clone() }, "is not a kernel");
    refused(&VmConfig { kernel: files.put("short", b"\x7fELF", 0o644), ..config.clone() }, "is not a kernel");
    let other = files.put("other", &elf(243), 0o644);
    refused(&VmConfig { kernel: other, ..config }, "is for riscv64 and the machine type");
}

#[test]
fn machines_of_another_architecture() {
    let files = Files::new();
    let kernel = |name, bytes: &[u8]| files.put(name, bytes, 0o644);
    let virt = VmConfig {
        machine: Machine::Virt,
        root: Root::Blk,
        kernel: kernel("Image", &image()),
        ..files.config()
    };
    check(&virt).unwrap();
    refused(
        &VmConfig { kernel: kernel("vmlinux", &elf(183)), ..virt.clone() },
        "/vmlinux is a vmlinux (ELF) and the machine type virt starts an Image only; set hypervisor.kernel_path to the \
         Image of that kernel",
    );
    refused(
        &VmConfig { kernel: kernel("x86", &elf(62)), ..virt.clone() },
        "/x86 is for x86_64 and the machine type virt is for aarch64; set hypervisor.kernel_path to a kernel for aarch64",
    );
    refused(
        &VmConfig { machine: Machine::Pc, ..virt.clone() },
        "/Image is for aarch64 and the machine type pc is for x86_64; set",
    );
    refused(
        &VmConfig { root: Root::Pmem, ..virt.clone() },
        "the machine type virt has no persistent memory; set hypervisor.root = \"blk\"",
    );
    let (foreign, own) = if cfg!(target_arch = "aarch64") { ("q35", "virt") } else { ("virt", "q35") };
    let machine = if cfg!(target_arch = "aarch64") { Machine::Q35 } else { Machine::Virt };
    refused(
        &VmConfig { machine, accel: Accel::Kvm, ..virt },
        &format!(
            "the machine type {foreign} is for {} and this host's KVM runs {} only; set hypervisor.machine_type = {own:?}",
            machine.architecture(),
            std::env::consts::ARCH
        ),
    );
}

#[test]
fn images() {
    let files = Files::new();
    let config = files.config();
    refused(&VmConfig { image: None, ..config.clone() }, "hypervisor.image_path is not set");
    refused(
        &VmConfig { image: Some("/nonexistent/i".into()), ..config.clone() },
        "the guest image /nonexistent/i cannot",
    );
    let table = |size: usize| {
        let mut image = vec![0; size];
        image[510..512].copy_from_slice(&[0x55, 0xAA]);
        image
    };
    refused(
        &VmConfig { image: Some(files.put("none", &[0; 4096], 0o644)), ..config.clone() },
        "has no partition table",
    );
    refused(
        &VmConfig { root: Root::Pmem, image: Some(files.put("odd", &table(4096), 0o644)), ..config.clone() },
        "has 4096 bytes and persistent memory needs whole 2 MiB",
    );
    if cfg!(target_arch = "x86_64") {
        refused(
            &VmConfig { machine: Machine::Microvm, ..config.clone() },
            "the machine type microvm has no persistent memory; set hypervisor.root = \"blk\", or hypervisor.machine_type = \"q35\"",
        );
    }
    let blk =
        VmConfig { image: Some(files.put("blk", &table(4096), 0o644)), root: Root::Blk, ..config.clone() };
    check(&blk).unwrap();
    refused(&VmConfig { root: Root::Initrd, ..config.clone() }, "hypervisor.initrd_path is not set");
    let initrd = Some("/nonexistent/i".into());
    refused(
        &VmConfig { root: Root::Initrd, initrd, ..config },
        "the guest initrd /nonexistent/i cannot be read",
    );
}

#[test]
fn kvm_must_be_kvm() {
    let error = kvm(Path::new("/nonexistent/kvm")).unwrap_err().to_string();
    assert_eq!(
        error,
        "accel = \"kvm\" is configured and /nonexistent/kvm cannot be opened: No such file or directory (os error 2); \
         enable virtualisation in the firmware and load kvm_intel or kvm_amd, or set hypervisor.accel = \"tcg\" (slow)"
    );
    let real = Path::new("/dev/kvm");
    if fs::OpenOptions::new().read(true).write(true).open(real).is_ok() {
        kvm(real).unwrap();
    }
    let error = kvm(Path::new("/dev/null")).unwrap_err().to_string();
    assert!(error.contains("/dev/null is not KVM: ENOTTY"), "{error}");
}

#[test]
fn the_kernels_vsock_must_be_there() {
    if !Path::new(vsock::VHOST_VSOCK).exists() {
        let files = Files::new();
        refused(
            &VmConfig { vsock: VsockKind::Vhost, ..files.config() },
            "vsock = \"vhost\" is configured and /dev/vhost-vsock cannot be opened: No such file or directory (os error 2); \
             load the kernel module vhost_vsock, or set hypervisor.vsock = \"vhost-user\"",
        );
    }
}

#[test]
fn a_hash_tree_that_is_not_there_is_missed() {
    let files = Files::new();
    let verity = Some(crate::vmm::Verity { root_hash: "0".repeat(64), data_blocks: 7 });
    refused(&VmConfig { verity, ..files.config() }, "has no hash tree behind 7 blocks");
}
