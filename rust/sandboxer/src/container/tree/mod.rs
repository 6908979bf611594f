//! Work below a pod's folder, by descriptor. All folders, files and mounts that the daemon makes for a pod's
//! containers are made here.
//!
//! A path is resolved anew by every call that takes one, and somebody else may change between two calls what
//! it leads to. A descriptor stays what it is. So a [`Dir`] is opened once, and names are looked up below it
//! without links and without `..`. A [`Mount`] gets its attributes and its propagation while it is nowhere,
//! and is put in its place when it is complete: there is no instant at which a process that is killed leaves
//! behind a mount that passes unmounts on to one of the user's.

mod mount;
mod unmount;

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, Gid, Mode, OFlags, ResolveFlags, StatxFlags, Uid, chmodat, chownat, fchmod, mkdirat, open,
        openat2, renameat, statx, unlinkat,
    },
    io::Errno,
};

pub(super) use self::mount::{Change, Mount, Source, change_mount, open_inside};
pub(crate) use self::unmount::unmount_below;
use super::mount::{MountError, failed};

/// Nothing leads out of the folder, and nothing leads elsewhere in it.
const PLAIN: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// A folder of ours.
#[derive(Debug)]
pub(super) struct Dir {
    fd: OwnedFd,
    /// For messages.
    path: PathBuf,
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Dir {
    /// Opens a folder by a path that is the administrator's up to its last name, which may not be a link.
    pub(super) fn open(path: &Path) -> Result<Self, MountError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = open(path, flags, Mode::empty()).map_err(|error| failed("opening", path)(error.into()))?;
        Ok(Self { fd, path: path.to_owned() })
    }

    /// As a message names something in here.
    pub(super) fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.path.join(below)
    }

    fn failed(&self, doing: &str, below: &Path) -> impl FnOnce(Errno) -> MountError + use<> {
        let (doing, path) = (doing.to_owned(), self.path.join(below));
        move |error| MountError::Io { doing, path, source: error.into() }
    }

    /// Opens a folder below this one, whatever is mounted on the way.
    pub(super) fn at(&self, below: impl AsRef<Path>) -> Result<Self, MountError> {
        let below = below.as_ref();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat2(&self.fd, below, flags, Mode::empty(), PLAIN);
        Ok(Self { fd: fd.map_err(self.failed("opening", below))?, path: self.path(below) })
    }

    /// Opens a folder below this one that is in the same mount.
    fn at_in_mount(&self, below: &Path) -> Result<Self, MountError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat2(&self.fd, below, flags, Mode::empty(), PLAIN | ResolveFlags::NO_XDEV);
        Ok(Self { fd: fd.map_err(self.failed("opening", below))?, path: self.path(below) })
    }

    /// Opens whatever is at a place below this folder, if there is something.
    pub(super) fn find(&self, below: impl AsRef<Path>) -> Result<Option<OwnedFd>, MountError> {
        let below = below.as_ref();
        match openat2(&self.fd, below, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), PLAIN) {
            Err(Errno::NOENT) => Ok(None),
            found => found.map(Some).map_err(self.failed("finding", below)),
        }
    }

    /// Makes a folder in this one unless it is there.
    pub(super) fn make(&self, name: &str) -> Result<Self, MountError> {
        self.make_with(name, 0o755)
    }

    /// The same, with a mode. That of one that is there stays.
    pub(super) fn make_with(&self, name: &str, mode: u32) -> Result<Self, MountError> {
        match mkdirat(&self.fd, name, Mode::from_raw_mode(mode)) {
            // Whatever the daemon's umask says: it may become the root of a container.
            Ok(()) => chmodat(&self.fd, name, Mode::from_raw_mode(mode), AtFlags::empty())
                .map_err(self.failed("setting the mode of", Path::new(name)))?,
            Err(Errno::EXIST) => {}
            Err(error) => return Err(self.failed("creating", Path::new(name))(error)),
        }
        self.at(name)
    }

    /// Gives the folder to a user and a group.
    pub(super) fn give_to(&self, uid: u32, gid: u32) -> Result<(), MountError> {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        let given = chownat(&self.fd, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH);
        given.map_err(self.failed("giving away", Path::new("")))
    }

    /// Makes the folder or file that a mount is put over.
    pub(super) fn make_point(&self, name: &str, folder: bool) -> Result<(), MountError> {
        if folder {
            return self.make(name).map(drop);
        }
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat2(&self.fd, name, flags, Mode::from_raw_mode(0o644), PLAIN) {
            Ok(_) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(self.failed("creating", Path::new(name))(error)),
        }
    }

    /// Writes a file as a whole: a reader sees all of it, or what was there before.
    pub(super) fn write(&self, name: &str, text: &[u8], mode: u32) -> Result<(), MountError> {
        let temporary = format!(".{name}.new");
        self.remove_file(&temporary)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = openat2(&self.fd, &*temporary, flags, Mode::from_raw_mode(mode), PLAIN);
        let mut file = File::from(made.map_err(self.failed("creating", Path::new(&temporary)))?);
        // Whatever the daemon's umask says: users of containers are to read the pod's files.
        fchmod(&file, Mode::from_raw_mode(mode))
            .map_err(self.failed("setting the mode of", Path::new(name)))?;
        file.write_all(text).map_err(failed("writing", &self.path(name)))?;
        renameat(&self.fd, &*temporary, &self.fd, name).map_err(self.failed("writing", Path::new(name)))
    }

    /// Removes a file. One that is not there is no error.
    pub(super) fn remove_file(&self, name: &str) -> Result<(), MountError> {
        match unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(self.failed("removing", Path::new(name))(error)),
        }
    }

    /// Removes what a mount was put over. What is not there is no error.
    pub(super) fn remove_point(&self, name: &str) -> Result<(), MountError> {
        match unlinkat(&self.fd, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::NOTDIR) => self.remove_file(name),
            Err(error) => Err(self.failed("removing", Path::new(name))(error)),
        }
    }

    /// Returns true if something is mounted at a name in here.
    pub(super) fn is_mounted(&self, name: &str) -> Result<bool, MountError> {
        let Some(found) = self.find(name)? else { return Ok(false) };
        let ids = mount_id(self.as_fd()).and_then(|own| Ok((own, mount_id(found.as_fd())?)));
        let (own, found) = ids.map_err(failed("examining", &self.path(name)))?;
        Ok(own != found)
    }

    /// Puts a mount over the folder or file of this name, which is there.
    pub(super) fn attach(&self, name: &str, mount: &Mount) -> Result<(), MountError> {
        let point =
            self.find(name)?.ok_or(Errno::NOENT).map_err(self.failed("mounting at", Path::new(name)))?;
        mount.attach(point.as_fd()).map_err(failed("mounting at", &self.path(name)))
    }

    /// Takes away what is mounted at a name in here, with all that is mounted below it, in one step. What is
    /// still open somewhere, e.g. in a file server that is about to end, is out of sight now and released
    /// when it closes.
    pub(super) fn detach(&self, name: &OsStr) -> Result<(), MountError> {
        mount::detach(self.as_fd(), name).map_err(failed("unmounting", &self.path(name)))
    }
}

/// The number of the mount that something is in, as in mountinfo.
pub(super) fn mount_id(of: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(statx(of, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id)
}

/// Stands between two calls that change mounts, where a test ends the process.
fn step() {
    #[cfg(test)]
    tests::step();
}

#[cfg(test)]
pub(super) mod tests;
