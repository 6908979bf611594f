//! Removal of folders in which something may be mounted: never deletes what is behind a mount, and needs no
//! more memory, stack or descriptors for a deep or a wide tree than for a small one.

use std::{
    ffi::{CStr, OsStr},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use rustix::{
    fs::{
        AtFlags, FileType, Mode, OFlags, RawDir, RenameFlags, ResolveFlags, SeekFrom, lstat, open, openat2,
        renameat_with, seek, unlinkat,
    },
    io::Errno,
};

use super::{
    mount::{MountError, failed},
    tree::unmount_below,
};

/// Bytes of names that are read at once.
const NAMES: usize = 32 << 10;

/// Unmounts everything at and below a folder or file, verifies it, and removes it without entering other
/// mounts. One that is not there is no error.
///
/// # Errors
/// When something stays mounted, in which case nothing is removed, or when a file cannot be removed.
pub fn remove(folder: &Path) -> Result<(), MountError> {
    unmount_below(folder)?;
    remove_tree(folder)
}

/// The second half of [`remove`]. Stops at the first mount it meets, even of the same file system.
pub(super) fn remove_tree(folder: &Path) -> Result<(), MountError> {
    let at = |doing: &'static str| move |error: Errno| failed(doing, folder)(error.into());
    match lstat(folder) {
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(at("removing")(error)),
        Ok(found) if FileType::from_raw_mode(found.st_mode) != FileType::Directory => {
            return unlinkat(rustix::fs::CWD, folder, AtFlags::empty()).map_err(at("removing"));
        }
        Ok(_) => {}
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = open(folder, flags, Mode::empty()).map_err(at("opening"))?;
    Emptying { top: dir.as_fd(), path: folder, moved: 0 }.run()?;
    drop(dir);
    unlinkat(rustix::fs::CWD, folder, AtFlags::REMOVEDIR).map_err(at("removing"))
}

/// Empties a folder. What it finds in a folder of that one and cannot remove, a folder that is not empty, it
/// moves up first: so it is never more than one folder deep.
struct Emptying<'a> {
    top: BorrowedFd<'a>,
    path: &'a Path,
    moved: u64,
}

impl Emptying<'_> {
    fn run(&mut self) -> Result<(), MountError> {
        let mut names = vec![MaybeUninit::uninit(); NAMES];
        let mut inner = vec![MaybeUninit::uninit(); NAMES];
        // Until a look from the beginning finds nothing: names have come meanwhile.
        loop {
            let mut found = false;
            self.rewind(self.top)?;
            let mut entries = RawDir::new(self.top, &mut names);
            while let Some(entry) = entries.next() {
                let entry = entry.map_err(self.failed("listing", c""))?;
                if is_dots(entry.file_name()) {
                    continue;
                }
                found = true;
                let name = entry.file_name();
                if !self.try_remove(self.top, name)? {
                    let folder = self.enter(name)?;
                    self.flatten(&folder, &mut inner)?;
                    drop(folder);
                    self.remove_empty(name)?;
                }
            }
            if !found {
                return Ok(());
            }
        }
    }

    /// Empties a folder into the top one.
    fn flatten(&mut self, folder: &OwnedFd, names: &mut [MaybeUninit<u8>]) -> Result<(), MountError> {
        loop {
            let mut found = false;
            self.rewind(folder.as_fd())?;
            let mut entries = RawDir::new(folder, names);
            while let Some(entry) = entries.next() {
                let entry = entry.map_err(self.failed("listing", c""))?;
                if is_dots(entry.file_name()) {
                    continue;
                }
                found = true;
                if !self.try_remove(folder.as_fd(), entry.file_name())? {
                    self.move_up(folder.as_fd(), entry.file_name())?;
                }
            }
            if !found {
                return Ok(());
            }
        }
    }

    /// Removes a file or an empty folder; says no to a folder that is not empty.
    fn try_remove(&self, folder: BorrowedFd<'_>, name: &CStr) -> Result<bool, MountError> {
        match unlinkat(folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(true),
            Err(Errno::ISDIR) => {}
            Err(error) => return Err(self.failed("removing", name)(error)),
        }
        match unlinkat(folder, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(true),
            Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
            Err(Errno::BUSY) => Err(self.failed("entering (is something mounted there?)", name)(Errno::BUSY)),
            Err(error) => Err(self.failed("removing", name)(error)),
        }
    }

    fn remove_empty(&self, name: &CStr) -> Result<(), MountError> {
        match unlinkat(self.top, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(self.failed("removing", name)(error)),
        }
    }

    fn enter(&self, name: &CStr) -> Result<OwnedFd, MountError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_XDEV | ResolveFlags::BENEATH;
        let entered = openat2(self.top, name, flags, Mode::empty(), resolve);
        entered.map_err(self.failed("entering (is something mounted there?)", name))
    }

    fn move_up(&mut self, folder: BorrowedFd<'_>, name: &CStr) -> Result<(), MountError> {
        loop {
            self.moved = self.moved.wrapping_add(1);
            let to = format!(".removing-{}", self.moved);
            match renameat_with(folder, name, self.top, &*to, RenameFlags::NOREPLACE) {
                Ok(()) | Err(Errno::NOENT) => return Ok(()),
                // An earlier attempt left one.
                Err(Errno::EXIST) => {}
                Err(error) => {
                    return Err(self.failed("entering (is something mounted there?)", name)(error));
                }
            }
        }
    }

    fn rewind(&self, folder: BorrowedFd<'_>) -> Result<(), MountError> {
        seek(folder, SeekFrom::Start(0)).map(drop).map_err(self.failed("listing", c""))
    }

    fn failed(&self, doing: &str, name: &CStr) -> impl FnOnce(Errno) -> MountError + use<> {
        let (doing, path) = (doing.to_owned(), self.path.join(OsStr::from_bytes(name.to_bytes())));
        move |error| MountError::Io { doing, path, source: error.into() }
    }
}

fn is_dots(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}
