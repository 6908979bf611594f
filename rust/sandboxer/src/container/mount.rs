//! Mounts made for containers below a pod's folder: their root file systems and volumes.
//!
//! The daemon works in `work/`, which no guest sees. What the guest sees is `shared/`, another view of it:
//! its top and every folder that the daemon made are read-only there, and what is mounted in `work/` arrives
//! with the attributes that it was mounted with.

use std::{
    fs::File,
    io,
    os::fd::AsFd,
    path::{Component, Path, PathBuf},
};

use kuasar_common::constants::pod_files;
use nix::{libc, mount::MsFlags};
use rustix::fs::{Mode, OFlags, open};

pub use super::error::MountError;
pub(super) use super::error::failed;
pub(crate) use super::tree::unmount_below;
use super::tree::{self, Change, Dir, Mount, Source};

/// A file system as a snapshotter describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RootfsMount {
    /// File system, or `bind`.
    pub kind: String,
    /// Device or folder of the host.
    pub source: String,
    /// Below the root file system; mostly empty.
    pub target: String,
    /// As given to mount(8).
    pub options: Vec<String>,
}

/// The kernel copies at most one page of mount data.
const MAX_DATA: usize = 4095;

/// Limits of a pod's own files, which a guest may write to.
const FILES: &str = "size=256k,nr_inodes=16,mode=755";

/// Makes the folder in which the daemon works, and the view of it that is shared. Mounts that are made in the
/// one later reach the other, also in the mount namespaces of other processes.
///
/// # Errors
/// When the mounts fail.
pub(super) fn share(pod: &Dir) -> Result<Dir, MountError> {
    let (work, shared) = (pod_files::WORK, pod_files::SHARED);
    if !pod.is_mounted(work)? {
        let make = |folder: &Dir| {
            let own = Mount::copy(folder.as_fd(), false)?;
            // First away from the peers it was born with, so that nothing made in here reaches other places
            // of the host.
            for propagation in [libc::MS_PRIVATE, libc::MS_SHARED] {
                own.change(Change { propagation, ..Change::default() })?;
            }
            Ok(own)
        };
        let folder = pod.make_with(work, 0o700)?;
        pod.attach(work, &make(&folder).map_err(failed("sharing", &pod.path(work)))?)?;
    }
    let folder = pod.at(work)?;
    pod.make_with(shared, 0o700)?;
    if !pod.is_mounted(shared)? {
        let make = || {
            let view = Mount::copy(folder.as_fd(), true)?;
            let set = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
            view.change(Change { set, ..Change::default() })?;
            Ok(view)
        };
        pod.attach(shared, &make().map_err(failed("sharing", &pod.path(shared)))?)?;
    }
    Ok(folder)
}

/// Makes the folder of the files that all containers of the pod have, which they may write to, and fill.
///
/// # Errors
/// When it cannot be mounted.
pub(super) fn common_files(work: &Dir, stage: &Dir) -> Result<(), MountError> {
    let name = pod_files::FILES;
    if work.is_mounted(name)? {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let fs = Source { kind: "tmpfs", source: "kuasar-files", flags, data: FILES, folder: None };
    work.make_point(name, true)?;
    work.attach(name, &Mount::new(fs, stage)?)
}

/// Mounts a container's root file system over a folder. Nothing stays mounted on error.
///
/// # Errors
/// When there is nothing to mount, an option is not known to us, or the kernel refuses.
#[tracing::instrument(name = "mount rootfs", level = "trace", skip_all)]
pub(super) fn rootfs(
    mounts: &[RootfsMount],
    folder: &Dir,
    name: &str,
    stage: &Dir,
) -> Result<(), MountError> {
    check_any(mounts)?;
    folder.make_point(name, true)?;
    mounts.iter().try_for_each(|one| rootfs_one(one, folder, name, stage)).inspect_err(|_| {
        // The first error is the one to report.
        let _ = unmount_below(&folder.path(name));
    })
}

/// A container has to have a root.
///
/// # Errors
/// When there is nothing to mount.
pub(super) fn check_any(mounts: &[RootfsMount]) -> Result<(), MountError> {
    if mounts.is_empty() {
        return Err(MountError::Refused(
            "the container has no root file system: containerd sent no mounts; use a snapshotter that gives some".into(),
        ));
    }
    Ok(())
}

fn rootfs_one(one: &RootfsMount, folder: &Dir, name: &str, stage: &Dir) -> Result<(), MountError> {
    let inside = inside(&one.target)?;
    let made = file_system(one, stage)?;
    // The guest's kernel has devices of its own.
    let change = Change { set: libc::MOUNT_ATTR_NODEV, recursive: true, ..Change::default() };
    made.change(change).map_err(failed("setting the attributes of", Path::new(&one.source)))?;
    if inside.as_os_str().is_empty() {
        return folder.attach(name, &made);
    }
    // What is in an image leads nowhere outside of it, and a guest that sees it already may change it.
    let point = folder.find(name)?.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound));
    let point = point.and_then(|root| tree::open_inside(root.as_fd(), &inside));
    let attached = point.and_then(|point| made.attach(point.as_fd()));
    attached.map_err(failed(format!("mounting {} at", one.source), &folder.path(name).join(&inside)))
}

/// Mounts what a snapshotter describes, nowhere yet.
pub(super) fn file_system(one: &RootfsMount, stage: &Dir) -> Result<Mount, MountError> {
    let (flags, data) = parse_options(&one.options)?;
    if one.kind == "bind" || flags.contains(MsFlags::MS_BIND) {
        return bind(Path::new(&one.source), flags);
    }
    let fs = Source { kind: &one.kind, source: &one.source, flags, data: &data, folder: None };
    if data.len() <= MAX_DATA {
        return Mount::new(fs, stage);
    }
    let (folder, short) = relative_layers(&one.options).ok_or_else(|| {
        MountError::Refused(format!(
            "mounting {}: its options take {} bytes, the kernel takes {MAX_DATA}",
            one.kind,
            data.len()
        ))
    })?;
    let (flags, data) = parse_options(&short)?;
    if data.len() > MAX_DATA {
        return Err(MountError::Refused(format!(
            "mounting {}: too many layers, {} bytes of options where the kernel takes {MAX_DATA}",
            one.kind,
            data.len()
        )));
    }
    Mount::new(Source { flags, data: &data, folder: Some(&folder), ..fs }, stage)
}

/// Copies what is mounted somewhere on the host. Its own attributes stay, those of the flags are added.
fn bind(source: &Path, flags: MsFlags) -> Result<Mount, MountError> {
    let failed = || failed("mounting", source);
    let from = open(source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(|e| failed()(e.into()))?;
    // A process that waits here for a server that is away has a name; in the guest it would only stand still.
    let found = from.try_clone().and_then(|from| File::from(from).metadata()).map_err(failed())?;
    if !found.is_dir() {
        return Err(failed()(io::ErrorKind::NotADirectory.into()));
    }
    let made = Mount::copy(from.as_fd(), flags.contains(MsFlags::MS_REC)).map_err(failed())?;
    let attributes = [
        (MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
        (MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
        (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
    ];
    let set = attributes.iter().filter(|(flag, _)| flags.contains(*flag)).fold(0, |set, (_, one)| set | one);
    made.change(Change { set, ..Change::default() }).map_err(failed())?;
    Ok(made)
}

/// Splits the folder that all lower layers share from their paths.
fn relative_layers(options: &[String]) -> Option<(PathBuf, Vec<String>)> {
    let layers = options.iter().find_map(|option| option.strip_prefix("lowerdir="))?;
    let mut common: Option<PathBuf> = None;
    for layer in layers.split(':').map(Path::new) {
        let parent = layer.parent()?;
        common = Some(match common {
            None => parent.to_owned(),
            Some(so_far) => so_far.ancestors().find(|ancestor| parent.starts_with(ancestor))?.to_owned(),
        });
    }
    let common = common.filter(|folder| folder.is_absolute())?;
    let short: Option<Vec<&str>> =
        layers.split(':').map(|layer| Path::new(layer).strip_prefix(&common).ok()?.to_str()).collect();
    let lowerdir = format!("lowerdir={}", short?.join(":"));
    let replace =
        |option: &String| if option.starts_with("lowerdir=") { lowerdir.clone() } else { option.clone() };
    Some((common, options.iter().map(replace).collect()))
}

fn parse_options(options: &[String]) -> Result<(MsFlags, String), MountError> {
    let mut flags = MsFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" => flags &= !MsFlags::MS_RDONLY,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "dirsync" => flags |= MsFlags::MS_DIRSYNC,
            "defaults" | "suid" | "dev" | "exec" | "" => {}
            "loop" => {
                return Err(MountError::Refused(
                    "the root file system is an image file (mount option loop) together with others, which is not supported; use the overlayfs snapshotter".into(),
                ));
            }
            other => data.push(other),
        }
    }
    Ok((flags, data.join(",")))
}

/// A path from elsewhere as one that goes only down.
fn inside(path: &str) -> Result<PathBuf, MountError> {
    let mut inside = PathBuf::new();
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => inside.push(name),
            Component::RootDir | Component::CurDir => {}
            _ => {
                return Err(MountError::Refused(format!(
                    "the mount target {path:?} leaves the root file system"
                )));
            }
        }
    }
    Ok(inside)
}

#[cfg(test)]
#[path = "mount_tests.rs"]
pub(super) mod tests;
