//! Mounts made for containers below a pod's shared folder, and their removal.

use std::{
    fs, io,
    os::unix::fs::FileTypeExt,
    path::{Component, Path, PathBuf},
    thread,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::statvfs::{FsFlags, statvfs},
};

use super::{mountinfo, remove, spec::Bind};

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

/// Why something could not be mounted, unmounted or removed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// A system call failed.
    #[error("{doing} {}: {source}", path.display())]
    Io {
        /// What was being done.
        doing: String,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Something we do not mount.
    #[error("{0}")]
    Refused(String),
}

pub(super) fn failed(doing: impl Into<String>, path: &Path) -> impl FnOnce(io::Error) -> MountError {
    let (doing, path) = (doing.into(), path.to_owned());
    move |source| MountError::Io { doing, path, source }
}

/// The kernel copies at most one page of mount data.
const MAX_DATA: usize = 4095;

/// Makes a folder a mount point whose later mounts reach processes in other mount namespaces, virtiofsd among them.
///
/// # Errors
/// When the mounts fail.
pub fn share(folder: &Path) -> Result<(), MountError> {
    if mountinfo::is_mounted(folder).map_err(failed("reading mounts for", folder))? {
        return Ok(());
    }
    bind(folder, folder, MsFlags::empty())?;
    // First away from the peers it was born with, so that nothing made in here reaches other places of the host.
    propagation(folder, MsFlags::MS_PRIVATE)?;
    propagation(folder, MsFlags::MS_SHARED)
}

/// Mounts a container's root file system. Nothing stays mounted on error.
///
/// # Errors
/// When there is nothing to mount, an option is not known to us, or the kernel refuses.
pub fn rootfs(mounts: &[RootfsMount], target: &Path, stage: &Path) -> Result<(), MountError> {
    check_any(mounts)?;
    mounts.iter().try_for_each(|one| rootfs_one(one, target, stage)).inspect_err(|_| {
        // The first error is the one to report.
        let _ = unmount_below(target);
    })
}

#[tracing::instrument(name = "mount rootfs", level = "trace", skip_all)]
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

fn rootfs_one(one: &RootfsMount, target: &Path, stage: &Path) -> Result<(), MountError> {
    let target = join_below(target, &one.target)?;
    let (flags, data) = parse_options(&one.options)?;
    if one.kind == "bind" || flags.contains(MsFlags::MS_BIND) {
        let read_only = flags.contains(MsFlags::MS_RDONLY);
        return staged_bind(Path::new(&one.source), &target, stage, flags & MsFlags::MS_REC, read_only);
    }
    let doing = || format!("mounting {} {} at", one.kind, one.source);
    if data.len() <= MAX_DATA {
        return mount(
            Some(one.source.as_str()),
            &target,
            Some(one.kind.as_str()),
            flags,
            Some(data.as_str()),
        )
        .map_err(|e| failed(doing(), &target)(e.into()));
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
    mount_from(&folder, one, &target, flags, &data).map_err(failed(doing(), &target))
}

/// Mounts with a working folder of its own: relative layer paths are resolved there.
fn mount_from(folder: &Path, one: &RootfsMount, target: &Path, flags: MsFlags, data: &str) -> io::Result<()> {
    thread::scope(|scope| {
        let work = scope.spawn(|| {
            // The working folder belongs to the process; this thread takes a copy, and ends with it.
            unshare(CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(folder)?;
            mount(Some(one.source.as_str()), target, Some(one.kind.as_str()), flags, Some(data))
        });
        work.join().unwrap_or(Err(nix::Error::EIO)).map_err(io::Error::from)
    })
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

/// Makes a bind mount of a container's spec at `target`, creating the mount point. `stage` is a folder for mounts in the
/// making, outside of what the guest sees.
///
/// # Errors
/// When the source is missing, is of a kind that a VM cannot use, or the kernel refuses.
pub fn volume(volume: &Bind, target: &Path, stage: &Path) -> Result<(), MountError> {
    let kind = fs::metadata(&volume.source)
        .map_err(failed(format!("mounting for {}", volume.destination), &volume.source))?
        .file_type();
    if !kind.is_dir() && !kind.is_file() {
        let what = if kind.is_socket() {
            "a socket"
        } else if kind.is_fifo() {
            "a pipe"
        } else {
            "a device"
        };
        return Err(MountError::Refused(format!(
            "the mount of {} at {}: it is {what} of the host, which does not work inside a VM; remove the mount",
            volume.source.display(),
            volume.destination
        )));
    }
    mount_point(target, kind.is_dir())?;
    let recursive = if volume.recursive { MsFlags::MS_REC } else { MsFlags::empty() };
    staged_bind(&volume.source, target, stage, recursive, volume.read_only)
}

fn mount_point(path: &Path, is_dir: bool) -> Result<(), MountError> {
    let made = if is_dir { fs::create_dir_all(path) } else { fs::File::create(path).map(drop) };
    made.map_err(failed("creating", path))
}

/// A bind mount that is complete before it gets to `target`: flags and propagation that are set later would not reach
/// the copies of the mount in other mount namespaces, so virtiofsd's would stay writable.
#[tracing::instrument(name = "mount volume", level = "trace", skip_all)]
fn staged_bind(
    source: &Path,
    target: &Path,
    stage: &Path,
    recursive: MsFlags,
    ro: bool,
) -> Result<(), MountError> {
    let is_dir = fs::metadata(source).map_err(failed("mounting", source))?.is_dir();
    fs::create_dir_all(stage).map_err(failed("creating", stage))?;
    let point = stage.join("mount");
    remove::remove(&point)?;
    mount_point(&point, is_dir)?;
    let made = bind(source, &point, recursive)
        // Later mounts below the source arrive (HostToContainer), and unmounting here does not unmount there.
        .and_then(|()| propagation(&point, MsFlags::MS_SLAVE))
        .and_then(|()| if ro { read_only(&point) } else { Ok(()) })
        .and_then(|()| bind(&point, target, MsFlags::MS_REC));
    made.and(remove::remove(&point))
}

fn propagation(point: &Path, kind: MsFlags) -> Result<(), MountError> {
    let none = None::<&str>;
    mount(none, point, none, kind | MsFlags::MS_REC, none)
        .map_err(|e| failed("setting the propagation of", point)(e.into()))
}

fn bind(source: &Path, target: &Path, more: MsFlags) -> Result<(), MountError> {
    let none = None::<&str>;
    mount(Some(source), target, none, MsFlags::MS_BIND | more, none)
        .map_err(|e| failed(format!("mounting {} at", source.display()), target)(e.into()))
}

/// A bind mount takes its flags only in a second call, which must repeat those that are locked.
fn read_only(target: &Path) -> Result<(), MountError> {
    let given = statvfs(target).map_err(|e| failed("reading the mount flags of", target)(e.into()))?.flags();
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    for (has, keep) in [
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ] {
        if given.contains(has) {
            flags |= keep;
        }
    }
    let none = None::<&str>;
    mount(none, target, none, flags, none).map_err(|e| failed("making read-only", target)(e.into()))
}

/// Unmounts everything at and below a path, and checks that nothing is left.
///
/// # Errors
/// When something stays mounted.
pub fn unmount_below(path: &Path) -> Result<(), MountError> {
    let read = || mountinfo::below(path).map_err(failed("reading the mounts below", path));
    let mut last = None;
    for point in read()? {
        if let Err(error) = unmount(&point) {
            last = Some(failed("unmounting", &point)(error));
        }
    }
    match read()?.first() {
        None => Ok(()),
        Some(left) => {
            Err(last.unwrap_or_else(|| MountError::Refused(format!("{} is still mounted", left.display()))))
        }
    }
}

fn unmount(point: &Path) -> io::Result<()> {
    match umount2(point, MntFlags::UMOUNT_NOFOLLOW) {
        // Gone with a mount above it, or by another hand.
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => Ok(()),
        // Still open somewhere, e.g. in a file server that is about to end: out of sight now, released when it closes.
        Err(nix::Error::EBUSY) => Ok(umount2(point, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH)?),
        Err(error) => Err(error.into()),
    }
}

/// Joins a path that came from elsewhere so that it stays below `base`.
fn join_below(base: &Path, path: &str) -> Result<PathBuf, MountError> {
    let mut joined = base.to_owned();
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => joined.push(name),
            Component::RootDir | Component::CurDir => {}
            _ => {
                return Err(MountError::Refused(format!(
                    "the mount target {path:?} leaves the root file system"
                )));
            }
        }
    }
    Ok(joined)
}

#[cfg(test)]
#[path = "mount_tests.rs"]
mod tests;
