//! Identity of a volume on the host: the same by whatever path it is named.

use std::{
    fs::{File, FileType, Metadata},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, ResolveFlags, StatVfsMountFlags, fstatvfs, open, openat2};
use serde::{Deserialize, Serialize};

use super::{Bind, Change, Mount, MountError, failed, libc};
use crate::container::{mountinfo, tree::mount_id};

/// Attributes of a mount by which two mounts of one file system differ for their users.
const FLAGS: StatVfsMountFlags = StatVfsMountFlags::RDONLY
    .union(StatVfsMountFlags::NOSUID)
    .union(StatVfsMountFlags::NODEV)
    .union(StatVfsMountFlags::NOEXEC);

/// A file or folder of the host's, as it is told from others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    /// The file system's device.
    device: String,
    inode: u64,
    /// Its path in the file system, whatever is mounted where.
    within: PathBuf,
    /// Flags of the host's mount of it.
    flags: u64,
    /// The mount that it was found in.
    mount: u64,
    /// It is not the same in another mount: something is mounted below it, or will be.
    pub(super) tied: bool,
    recursive: bool,
}

impl Place {
    /// Returns true if the host's own mount of it cannot be written.
    pub(super) fn is_read_only(&self) -> bool {
        StatVfsMountFlags::from_bits_retain(self.flags).contains(StatVfsMountFlags::RDONLY)
    }

    /// The way from here to another place, if there is one: empty if they are the same.
    pub(super) fn leads_to(&self, other: &Self) -> Option<PathBuf> {
        let mounts_matter = self.tied || other.tied;
        if (&self.device, self.flags) != (&other.device, other.flags)
            || (mounts_matter && (self.mount, self.recursive) != (other.mount, other.recursive))
        {
            return None;
        }
        if self.inode == other.inode {
            return Some(PathBuf::new());
        }
        let inside = other.within.strip_prefix(&self.within).ok()?;
        (!inside.as_os_str().is_empty() && inside.to_str().is_some()).then(|| inside.to_owned())
    }
}

/// A file or folder of the host's that is open.
#[derive(Debug)]
pub(super) struct Source {
    fd: OwnedFd,
    pub(super) path: PathBuf,
    pub(super) place: Place,
    pub(super) folder: bool,
}

impl Source {
    /// Opens what a mount of a spec names.
    pub(super) fn open(bind: &Bind) -> Result<Self, MountError> {
        let failed = || failed(format!("mounting for {}", bind.destination), &bind.source);
        let fd = open(&bind.source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let fd = fd.map_err(|error| failed()(error.into()))?;
        let found = metadata(fd.as_fd()).map_err(failed())?;
        check_kind(bind, found.file_type())?;
        Self::new(fd, &bind.source, &found, bind.recursive).map_err(failed())
    }

    fn new(fd: OwnedFd, path: &Path, found: &Metadata, recursive: bool) -> io::Result<Self> {
        let mount = mount_id(fd.as_fd())?;
        let all = mountinfo::read()?;
        let entry = all.iter().find(|entry| entry.id == mount);
        let entry = entry.ok_or_else(|| io::Error::other("its mount is not in mountinfo"))?;
        let real = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        let below = real.strip_prefix(&entry.point).map_err(io::Error::other)?;
        let within = if below.as_os_str().is_empty() { entry.root.clone() } else { entry.root.join(below) };
        let children = all.iter().filter(|other| other.point != real && other.point.starts_with(&real));
        let place = Place {
            device: entry.device.clone(),
            inode: found.ino(),
            within,
            flags: (fstatvfs(&fd)?.f_flag & FLAGS).bits(),
            mount,
            tied: recursive && found.is_dir() && children.count() > 0,
            recursive,
        };
        Ok(Self { fd, path: path.to_owned(), place, folder: found.is_dir() })
    }

    /// Returns true if a path in a mount leads to it, without links and without another mount on the way.
    pub(super) fn is_at(&self, top: BorrowedFd<'_>, inside: &Path) -> bool {
        let found = open_inside(top, inside).and_then(|fd| metadata(fd.as_fd()));
        let own = metadata(self.fd.as_fd());
        found.is_ok_and(|found| own.is_ok_and(|own| (own.dev(), own.ino()) == (found.dev(), found.ino())))
    }

    /// Mounts it, nowhere yet.
    pub(super) fn mount(&self, read_only: bool) -> Result<Mount, MountError> {
        let make = || {
            let made = Mount::copy(self.fd.as_fd(), self.place.recursive)?;
            // The guest's kernel has devices of its own.
            let set = libc::MOUNT_ATTR_NODEV;
            made.change(Change { set, recursive: true, ..Change::default() })?;
            if read_only {
                // Of the top of it: what is mounted below has its own access, as on the host.
                made.change(Change { set: libc::MOUNT_ATTR_RDONLY, ..Change::default() })?;
            }
            Ok(made)
        };
        make().map_err(failed("mounting", &self.path))
    }

    /// The pod's own volume that this is a part of, and the way from there. The kubelet mounts a `subPath` at
    /// `pods/<uid>/volume-subpaths/<volume>/<container>/<n>`. An `emptyDir` belongs to one pod; other volumes
    /// may have more in them than the pod was given.
    pub(super) fn root_of_volume(&self) -> Option<(Self, PathBuf)> {
        let names: Vec<&str> = self.path.iter().map(std::ffi::OsStr::to_str).collect::<Option<_>>()?;
        let at = names.iter().rposition(|name| *name == "volume-subpaths")?;
        let volume = names.get(at.checked_add(1)?)?;
        let pod: PathBuf = names.get(..at)?.iter().collect();
        let path = pod.join("volumes/kubernetes.io~empty-dir").join(volume);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = open(&path, flags, Mode::empty()).ok()?;
        let found = metadata(fd.as_fd()).ok()?;
        let root = Self::new(fd, &path, &found, true).ok()?;
        let inside = root.place.leads_to(&self.place).filter(|inside| !inside.as_os_str().is_empty())?;
        self.is_at(root.fd.as_fd(), &inside).then_some((root, inside))
    }
}

fn open_inside(top: BorrowedFd<'_>, inside: &Path) -> io::Result<OwnedFd> {
    if inside.as_os_str().is_empty() {
        return top.try_clone_to_owned();
    }
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    Ok(openat2(top, inside, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?)
}

fn metadata(fd: BorrowedFd<'_>) -> io::Result<Metadata> {
    File::from(fd.try_clone_to_owned()?).metadata()
}

fn check_kind(volume: &Bind, kind: FileType) -> Result<(), MountError> {
    if kind.is_dir() || kind.is_file() {
        return Ok(());
    }
    let what = if kind.is_socket() {
        "a socket"
    } else if kind.is_fifo() {
        "a pipe"
    } else {
        "a device"
    };
    Err(MountError::Refused(format!(
        "the mount of {} at {}: it is {what} of the host, which does not work inside a VM; remove the mount",
        volume.source.display(),
        volume.destination
    )))
}
