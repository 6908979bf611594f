//! Common parts of tests that boot a VM: a configuration, a pod's folder, a VM in it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use vmm_sandboxer::vmm::{Accel, FileServer, Machine, Root, ShareFs, VmConfig, VmSpec, VsockKind};

pub(crate) const TOKEN: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// The driver's part of a daemon's configuration. Programs come from `PATH`; `KUASAR_ACCEL=kvm` and
/// `KUASAR_VSOCK=vhost` are for machines that have these.
pub(crate) fn config(
    machine: Machine,
    kernel: PathBuf,
    image: PathBuf,
    initrd: PathBuf,
    root: Root,
) -> VmConfig {
    let asked = |key, value| std::env::var(key).is_ok_and(|given| given == value);
    VmConfig {
        path: format!("qemu-system-{}", machine.architecture()).into(),
        accel: if asked("KUASAR_ACCEL", "kvm") { Accel::Kvm } else { Accel::Tcg },
        machine,
        cpu: None,
        kernel,
        image: Some(image),
        initrd: Some(initrd),
        root,
        verity: None,
        kernel_params: String::new(),
        share_fs: ShareFs::Virtiofs,
        virtiofsd: "virtiofsd".into(),
        file_server: FileServer::default(),
        vsock: if asked("KUASAR_VSOCK", "vhost") { VsockKind::Vhost } else { VsockKind::VhostUser },
        vhost_device_vsock: "vhost-device-vsock".into(),
        free_page_reporting: true,
        task_log_level: "warn".into(),
        debug: false,
    }
}

/// A pod's folder, as the daemon makes it.
pub(crate) fn pod_folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for folder in ["shared", "log"] {
        fs::create_dir(dir.path().join(folder)).unwrap();
    }
    dir
}

/// A small VM in a pod's folder.
pub(crate) fn spec(dir: &Path) -> VmSpec {
    VmSpec {
        pod: "guest".into(),
        dir: dir.into(),
        netns: None,
        cgroup_procs: Vec::new(),
        vcpus: 1,
        memory_mib: 256,
        devices: Vec::new(),
        kernel_params: String::new(),
        // As the daemon does it where root runs it.
        user: rustix::process::geteuid().is_root().then_some(1_900_000_000),
        oom_score_adj: 0,
    }
}
