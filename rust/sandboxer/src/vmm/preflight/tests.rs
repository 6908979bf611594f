//! What an operator reads when the configuration cannot work.

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
            machine: Machine::Q35,
            cpu: None,
            kernel: self.put("vmlinux", &elf(host()), 0o644),
            image: Some(self.put("kuasar.img", &image, 0o644)),
            initrd: None,
            root: Root::Pmem,
            verity: None,
            kernel_params: String::new(),
            share_fs: ShareFs::Virtiofs,
            virtiofsd: "sh".into(),
            vsock: VsockKind::VhostUser,
            vhost_device_vsock: "sh".into(),
            task_log_level: "info".into(),
            debug: false,
        }
    }
}

fn host() -> u8 {
    if cfg!(target_arch = "x86_64") { 62 } else { 183 }
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
    if host() == 62 {
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
    refused(&VmConfig { kernel: other, ..config }, "is for riscv64 and this host is");
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
        &VmConfig { image: Some(files.put("odd", &table(4096), 0o644)), ..config.clone() },
        "has 4096 bytes and persistent memory needs whole 2 MiB",
    );
    refused(&VmConfig { machine: Machine::Microvm, ..config.clone() }, "microvm has no persistent memory");
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
