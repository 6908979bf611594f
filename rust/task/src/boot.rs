//! Duties of PID 1 to the rest of the guest: file systems, cgroups, sysctls, and the guest's end. As a
//! service, the agent adds what containers need to what systemd has made.

use std::{ffi::CString, fs, io, os::unix::fs::MetadataExt, path::Path};

use kuasar_common::constants::{GUEST_STATE_DIR, SHARE_TAG};
use rustix::{
    fs::statfs,
    io::Errno,
    mount::{MountFlags, mount},
    process::{Resource, Rlimit, setrlimit},
    system::{RebootCommand, reboot},
};

use crate::{
    cgroup::Hierarchies,
    config::{CgroupVersion, ShareFs},
    role::Role,
    sandbox,
};

/// Mount point of cgroups.
pub const CGROUPS: &str = "/sys/fs/cgroup";
/// Below it, the cgroup of all containers.
const POD_CGROUP: &str = "kuasar";
/// Folder for the agent's own small files.
pub const WORK: &str = "/run/kuasar/work";
/// State folder of the OCI runtime.
pub const RUNC_ROOT: &str = "/run/runc";

/// Bytes in a 9p message. Each one in flight is a buffer of contiguous memory, so not the largest possible.
const NINE_P_MSIZE: u32 = 128 * 1024;
/// Bytes of `/dev/shm`, which all containers of a pod share, unless the pod asks for another size.
const SHM_SIZE: u64 = 64 << 20;
/// `CGROUP2_SUPER_MAGIC` of `linux/magic.h`.
const CGROUP2: u32 = 0x6367_7270;
/// `RAMFS_MAGIC` and `TMPFS_MAGIC` of `linux/magic.h`.
const INITRAMFS: [u32; 2] = [0x8584_58f6, 0x0102_1994];

/// Why the guest cannot be brought up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file system that the agent cannot do without.
    #[error("mounting {fs} at {target}: {source}")]
    Mount {
        /// Its type.
        fs: &'static str,
        /// Its mount point.
        target: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file or folder that the agent cannot do without.
    #[error("{doing}: {source}")]
    Io {
        /// The action that failed, and its object.
        doing: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// systemd has made the guest otherwise than the agent can use it.
    #[error("{0}")]
    Service(String),
}

struct Mount {
    fs: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &'static str,
}

const SAFE: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC).union(MountFlags::NODEV);

/// Needed to say READY: the command line, and somewhere to log to.
const EARLY: [Mount; 2] = [
    Mount { fs: "proc", target: "/proc", flags: SAFE, data: "" },
    Mount {
        fs: "devtmpfs",
        target: "/dev",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        data: "mode=0755",
    },
];

/// Needed by containers only: made while the host reads READY.
const LATE: [Mount; 6] = [
    Mount { fs: "sysfs", target: "/sys", flags: SAFE, data: "" },
    Mount {
        fs: "tmpfs",
        target: "/run",
        flags: MountFlags::NOSUID.union(MountFlags::NODEV),
        data: "mode=0755",
    },
    Mount {
        fs: "tmpfs",
        target: "/tmp",
        flags: MountFlags::NOSUID.union(MountFlags::NODEV),
        data: "mode=1777",
    },
    Mount {
        fs: "devpts",
        target: "/dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        data: "gid=5,mode=620,ptmxmode=666",
    },
    Mount { fs: "tmpfs", target: "/dev/shm", flags: SAFE, data: "mode=1777,size=64m" },
    Mount { fs: "mqueue", target: "/dev/mqueue", flags: SAFE, data: "" },
];
/// Controllers of version 2, in one hierarchy.
const CGROUP_V2: Mount = Mount { fs: "cgroup2", target: CGROUPS, flags: SAFE, data: "" };
/// Folders of the hierarchies of version 1.
const CGROUP_V1: Mount = Mount { fs: "tmpfs", target: CGROUPS, flags: SAFE, data: "mode=755" };

/// Controllers of version 1 without which a container could not be limited, or would not be confined to its
/// devices.
const REQUIRED_V1: [&str; 5] = ["cpu", "devices", "freezer", "memory", "pids"];

/// Open files that a container's process may have unless its spec says otherwise, as on a Kubernetes node; a
/// kernel starts PID 1 with 1024, at most 4096.
const MAX_FILES: u64 = 1 << 20;

/// Values that containers find on a Kubernetes node. Besides, none of the agent's log lines is left out,
/// which the kernel takes with the end of its line only (kernel/printk/printk.c,
/// `devkmsg_sysctl_set_loglvl`).
const SYSCTLS: [(&str, &str); 3] = [
    ("vm/overcommit_memory", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/printk_devkmsg", "on\n"),
];

/// Mounts what is needed to say READY.
///
/// # Errors
/// When the kernel refuses.
pub fn early() -> Result<(), BootError> {
    EARLY.iter().try_for_each(mount_one)
}

/// Mounts and sets the rest.
///
/// # Errors
/// When the kernel refuses something that containers cannot do without.
pub fn late(share: ShareFs, version: CgroupVersion, role: Role) -> Result<(), BootError> {
    for entry in LATE.iter().filter(|entry| role == Role::Init || is_lacking(entry)) {
        match mount_one(entry) {
            // A kernel without POSIX message queues still runs most containers, an image without /tmp too.
            Err(error) if matches!(entry.target, "/dev/mqueue" | "/tmp") => log::warn!("{error}"),
            done => done?,
        }
    }
    make_dir(WORK)?;
    make_dir(RUNC_ROOT)?;
    limits();
    match role {
        Role::Init => {
            links();
            cgroups(version)?;
        }
        Role::Service => {
            // systemd's may be half of the memory.
            if let Err(error) = sandbox::set_shm_size(SHM_SIZE) {
                log::info!("{error}");
            }
            cgroups_of_systemd(version)?;
        }
    }
    for (name, value) in SYSCTLS {
        if let Err(error) = fs::write(Path::new("/proc/sys").join(name), value) {
            log::info!("setting sysctl {name}: {error}");
        }
    }
    mount_share(share)
}

/// Mounts the pod's shared folder.
fn mount_share(share: ShareFs) -> Result<(), BootError> {
    let (fs, data) = match share {
        ShareFs::None => return Ok(()),
        ShareFs::Virtiofs => ("virtiofs", String::new()),
        ShareFs::NineP => ("9p", format!("trans=virtio,version=9p2000.L,cache=mmap,msize={NINE_P_MSIZE}")),
    };
    make_dir(GUEST_STATE_DIR)?;
    let data = CString::new(data).unwrap_or_default();
    // No nosuid and the like: root file systems of containers are in there.
    mount(SHARE_TAG, GUEST_STATE_DIR, fs, MountFlags::RELATIME, data.as_c_str())
        .map_err(|source| BootError::Mount { fs, target: GUEST_STATE_DIR, source: source.into() })
}

/// Returns true if a service has to mount it: other services may have files in `/tmp` already.
fn is_lacking(entry: &Mount) -> bool {
    entry.target != "/tmp" && !is_mount_point(Path::new(entry.target))
}

fn is_mount_point(path: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|about| about.dev()).ok();
    let (Some(own), Some(above)) = (device(path), path.parent().and_then(device)) else { return false };
    own != above
}

fn mount_one(entry: &Mount) -> Result<(), BootError> {
    let Mount { fs, target, flags, data } = *entry;
    let attempt = || {
        let data = CString::new(data).unwrap_or_default();
        mount(fs, target, fs, flags, data.as_c_str())
    };
    let mounted = match attempt() {
        // No such folder yet.
        Err(Errno::NOENT) => fs::create_dir_all(target).and_then(|()| Ok(attempt()?)),
        // The kernel mounts some of them itself.
        Err(Errno::BUSY) => Ok(()),
        done => done.map_err(io::Error::from),
    };
    mounted.map_err(|source| BootError::Mount { fs, target, source })
}

fn make_dir(path: &str) -> Result<(), BootError> {
    fs::create_dir_all(path).map_err(|source| BootError::Io { doing: format!("making {path}"), source })
}

/// Limits that containers inherit.
fn limits() {
    let files = Rlimit { current: Some(MAX_FILES), maximum: Some(MAX_FILES) };
    let unlimited = Rlimit { current: None, maximum: None };
    for (resource, limit) in [(Resource::Nofile, files), (Resource::Nproc, unlimited)] {
        if let Err(error) = setrlimit(resource, limit) {
            log::info!("setting the limit {resource:?}: {error}");
        }
    }
}

/// Names that programs expect in `/dev` beside what the kernel puts there.
fn links() {
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
        ("pts/ptmx", "/dev/ptmx"),
    ] {
        let _ = fs::remove_file(link);
        if let Err(error) = std::os::unix::fs::symlink(target, link) {
            log::info!("linking {link}: {error}");
        }
    }
}

/// Hierarchies of the containers' cgroups.
#[must_use]
pub fn hierarchies(version: CgroupVersion) -> Hierarchies {
    match version {
        CgroupVersion::V2 => Hierarchies::Unified(CGROUPS.into()),
        CgroupVersion::V1 => Hierarchies::Legacy(CGROUPS.into()),
    }
}

fn cgroups(version: CgroupVersion) -> Result<(), BootError> {
    if version == CgroupVersion::V1 {
        return cgroups_v1();
    }
    mount_one(&CGROUP_V2)?;
    pass_on_controllers()
}

/// Containers have their own cgroup beside systemd's slices and scopes, as those of a kubelet with the driver
/// `cgroupfs` have: none of systemd's has this name, systemd passes on to it every controller that the kernel
/// has, and cannot take one back while it is passed on further. A cgroup below the service's own would lack
/// those that systemd does not know (`hugetlb`), and what happens to a container there would be a matter of
/// the service (`OOMPolicy=`).
fn cgroups_of_systemd(version: CgroupVersion) -> Result<(), BootError> {
    if version == CgroupVersion::V1 {
        return Err(BootError::Service(
            "task.cgroup=v1: process 1 of this guest is systemd, which has cgroups of version 2; leave the word out, or \
             take a root whose process 1 is the agent"
                .to_owned(),
        ));
    }
    if !statfs(CGROUPS).is_ok_and(|fs| u32::try_from(fs.f_type).is_ok_and(|kind| kind == CGROUP2)) {
        return Err(BootError::Service(format!(
            "process 1 of this guest has not mounted cgroup v2 at {CGROUPS}, which the agent needs; boot with \
             systemd.unified_cgroup_hierarchy=1"
        )));
    }
    pass_on_controllers()
}

fn pass_on_controllers() -> Result<(), BootError> {
    delegate_controllers(Path::new(CGROUPS))
        .map_err(|source| BootError::Io { doing: format!("enabling the controllers of {CGROUPS}"), source })
}

/// One hierarchy for each controller that the kernel has in version 1.
fn cgroups_v1() -> Result<(), BootError> {
    mount_one(&CGROUP_V1)?;
    let doing = || "task.cgroup=v1: reading the controllers in /proc/cgroups".to_owned();
    let list =
        fs::read_to_string("/proc/cgroups").map_err(|source| BootError::Io { doing: doing(), source })?;
    for controller in enabled_controllers(&list) {
        let target = format!("{CGROUPS}/{controller}");
        make_dir(&target)?;
        let data = CString::new(controller).unwrap_or_default();
        if let Err(error) = mount("cgroup", &target, "cgroup", SAFE, data.as_c_str()) {
            // Some controllers are of version 2 only by the kernel's configuration.
            log::info!("mounting the cgroup v1 hierarchy of {controller}: {error}");
            let _ = fs::remove_dir(&target);
        }
    }
    let missing: Vec<&str> =
        REQUIRED_V1.into_iter().filter(|name| !Path::new(CGROUPS).join(name).exists()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(BootError::Io {
        doing: format!(
            "task.cgroup=v1: this kernel has no cgroup v1 controller {}; take another kernel or leave the word out",
            missing.join(", ")
        ),
        source: Errno::NODEV.into(),
    })
}

/// Names of the controllers of a `/proc/cgroups` that are on.
fn enabled_controllers(list: &str) -> Vec<&str> {
    let rows = list.lines().filter(|line| !line.starts_with('#'));
    let on = rows.filter(|line| line.split_whitespace().nth(3) == Some("1"));
    on.filter_map(|line| line.split_whitespace().next()).collect()
}

/// Lets containers' cgroups have limits: each level passes on to the next what it has.
fn delegate_controllers(root: &Path) -> io::Result<()> {
    enable_controllers(root)?;
    let pod = root.join(POD_CGROUP);
    match fs::create_dir(&pod) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => enable_controllers(&pod),
    }
}

fn enable_controllers(cgroup: &Path) -> io::Result<()> {
    let available = fs::read_to_string(cgroup.join("cgroup.controllers"))?;
    for controller in available.split_whitespace() {
        // One at a time: some cannot be passed on, which must not keep back the others.
        if let Err(error) = fs::write(cgroup.join("cgroup.subtree_control"), format!("+{controller}")) {
            log::info!("enabling controller {controller} in {}: {error}", cgroup.display());
        }
    }
    Ok(())
}

/// Returns true if the root file system is an initramfs, which cannot be pivoted away from.
#[must_use]
pub fn root_is_initramfs() -> bool {
    statfs("/").is_ok_and(|root| u32::try_from(root.f_type).is_ok_and(|kind| INITRAMFS.contains(&kind)))
}

/// Ends the VM. A reboot and not a power-off, because a guest without ACPI cannot power off, and the VMM is
/// told to end at a reboot.
pub fn end_vm() -> ! {
    rustix::fs::sync();
    loop {
        let _ = reboot(RebootCommand::Restart);
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_are_passed_on_at_both_levels() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.controllers"), "cpu memory\n").unwrap();
        fs::create_dir(root.path().join(POD_CGROUP)).unwrap();
        fs::write(root.path().join("kuasar/cgroup.controllers"), "memory\n").unwrap();
        delegate_controllers(root.path()).unwrap();
        // Plain files keep the last write only; the kernel's keep all.
        assert_eq!(fs::read_to_string(root.path().join("cgroup.subtree_control")).unwrap(), "+memory");
        assert_eq!(fs::read_to_string(root.path().join("kuasar/cgroup.subtree_control")).unwrap(), "+memory");
    }

    #[test]
    fn controllers_of_version_1_are_those_that_are_on() {
        let list =
            "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t0\t1\t1\nmemory\t0\t1\t0\npids\t0\t1\t1\n";
        assert_eq!(enabled_controllers(list), ["cpu", "pids"]);
    }

    #[test]
    fn what_is_mounted_is_told_from_what_is_not() {
        assert!(is_mount_point(Path::new("/proc")));
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        assert!(!is_mount_point(&dir.path().join("a")));
        assert!(!is_mount_point(&dir.path().join("none")));
    }

    #[test]
    fn systemds_cgroups_are_not_of_version_1() {
        let error = cgroups_of_systemd(CgroupVersion::V1).unwrap_err().to_string();
        assert!(error.starts_with("task.cgroup=v1: process 1 of this guest is systemd, "), "{error}");
    }

    #[test]
    fn errors_name_what_and_where() {
        let error = BootError::Mount { fs: "virtiofs", target: GUEST_STATE_DIR, source: Errno::NODEV.into() };
        assert_eq!(error.to_string(), "mounting virtiofs at /run/kuasar/state: No such device (os error 19)");
    }
}
