//! The rights of a VM's processes. `docs/security-model.md` says why each has what it has.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use super::{ShareFs, VmError, VmSpec};
use crate::process::{CapabilitySet, Jail, Namespaces, Resource, Rights, vsock_device_filter};

/// Threads of one pod's processes. A VM has one for each CPU, and up to 64 that wait for disks.
const TASKS: u64 = 4096;
/// Descriptors of a VMM: its devices', and two for each disk.
const VMM_FILES: u64 = 4096;
/// Descriptors of a vsock device: one for each connection with the guest.
const VSOCK_FILES: u64 = 16_384;
/// Most that a vsock device may write to a file, which is its log, in bytes. The daemon empties it long
/// before.
const VSOCK_LOG: u64 = 64 << 20;

/// Makes and changes files on behalf of any user of the guest, as the guest's kernel has decided that they
/// may.
const FILES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETFCAP);
/// virtiofsd: besides, it takes on the user of each request. With the rest it confines itself, and then gives
/// that up: a root of its own, namespaces, more descriptors than usual, a smaller bounding set. Handles of
/// files want DAC_READ_SEARCH.
const FILE_SERVER: CapabilitySet = FILES
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::SYS_ADMIN)
    .union(CapabilitySet::SYS_RESOURCE)
    .union(CapabilitySet::SETPCAP);
/// The relay: it takes on a container's user when it connects to a socket of the host, and is root to the
/// pod's own sockets and to containerd's pipes; it ends a VMM that is another user's.
const RELAY: CapabilitySet = CapabilitySet::SETUID
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::KILL);

/// Of a process of which no more is known than that it belongs to a pod.
fn least(oom_score_adj: i32) -> Rights {
    Rights {
        no_new_privileges: true,
        limits: vec![(Resource::Core, 0)],
        oom_score_adj: Some(oom_score_adj),
        ..Rights::default()
    }
}

/// Of a process with a user and a file system of its own.
fn confined(id: u32, files: u64, jail: Jail, oom_score_adj: i32) -> Rights {
    let mut rights = Rights {
        id: Some(id),
        capabilities: Some(CapabilitySet::empty()),
        namespaces: Namespaces { pid: true, ipc: true, uts: true },
        jail: Some(jail),
        ..least(oom_score_adj)
    };
    rights.limits.extend([(Resource::Nofile, files), (Resource::Nproc, TASKS)]);
    rights
}

/// Those of root's processes that cannot have a user of their own.
fn of_root(keep: CapabilitySet, namespaces: Namespaces, oom_score_adj: i32) -> Rights {
    let root = rustix::process::geteuid().is_root();
    Rights {
        capabilities: Some(keep).filter(|_| root),
        namespaces: if root { namespaces } else { Namespaces::default() },
        ..least(oom_score_adj)
    }
}

/// The VMM's. `reopened` are the files that it opens once more by the descriptors that it has of them.
pub(super) fn vmm(spec: &VmSpec, share: ShareFs, reopened: &[BorrowedFd<'_>]) -> Result<Rights, VmError> {
    match (spec.user, share) {
        // It serves the share itself: files of all users, in a tree where mounts come and go.
        (Some(_), ShareFs::NineP) => {
            let namespaces = Namespaces { pid: true, ipc: true, uts: true };
            Ok(of_root(FILES, namespaces, spec.oom_score_adj))
        }
        (Some(id), ShareFs::Virtiofs) => {
            let mut jail = Jail::new();
            for file in reopened {
                let same = file.as_fd().try_clone_to_owned();
                let same = same.map_err(VmError::io("confining the VMM"))?;
                jail.reopened(File::from(same));
            }
            Ok(confined(id, VMM_FILES, jail, spec.oom_score_adj))
        }
        (None, _) => Ok(least(spec.oom_score_adj)),
    }
}

/// Those of `vhost-device-vsock`, which makes its sockets in `folder`.
pub(super) fn vsock_device(spec: &VmSpec, folder: &Path) -> Result<Rights, VmError> {
    let Some(id) = spec.user else { return Ok(least(spec.oom_score_adj)) };
    let mut jail = Jail::new();
    jail.writable(folder);
    let filter = vsock_device_filter();
    let filter =
        filter.map_err(|error| VmError::io("filtering vhost-device-vsock")(io::Error::other(error)))?;
    let mut rights = confined(id, VSOCK_FILES, jail, spec.oom_score_adj);
    rights.limits.push((Resource::Fsize, VSOCK_LOG));
    Ok(Rights { filter: Some(filter), ..rights })
}

/// virtiofsd's. It keeps the mount namespace of the host, or makes one that follows it: what is mounted later
/// must arrive.
///
/// `device_nodes`: the guest may make nodes of devices in the share, which the configuration allows.
pub(super) fn file_server(spec: &VmSpec, device_nodes: bool) -> Rights {
    let namespaces = Namespaces { ipc: true, uts: true, ..Namespaces::default() };
    let more = if device_nodes { CapabilitySet::MKNOD } else { CapabilitySet::empty() };
    match spec.user {
        Some(_) => of_root(FILE_SERVER.union(more), namespaces, spec.oom_score_adj),
        None => least(spec.oom_score_adj),
    }
}

/// The relay's, beside a VM with this score: it is ended after it.
#[must_use]
pub fn relay(confined: bool, oom_score_adj: i32) -> Rights {
    let score = oom_score_adj.saturating_sub(1).max(-1000);
    let namespaces = Namespaces { ipc: true, uts: true, ..Namespaces::default() };
    if confined { of_root(RELAY, namespaces, score) } else { least(score) }
}
