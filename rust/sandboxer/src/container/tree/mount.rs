//! Mounts that are nowhere yet (`open_tree(2)`, `mount_setattr(2)`, `move_mount(2)`).

use std::{
    ffi::OsStr,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    thread,
};

use nix::{
    libc,
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use rustix::{
    fs::{Mode, OFlags, ResolveFlags, open, openat2},
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount},
};

use super::{Dir, MountError, PLAIN, failed, step};

/// The folder in which a file system is mounted before it goes where it belongs.
const STAGE: &str = "new";

/// A mount that is nowhere: it ends with its descriptor, and nothing is passed on when it does.
#[derive(Debug)]
pub(in crate::container) struct Mount(OwnedFd);

/// Attributes and propagation to be changed; `libc::MOUNT_ATTR_*` and `libc::MS_*`.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::container) struct Change {
    pub(in crate::container) set: u64,
    pub(in crate::container) clear: u64,
    pub(in crate::container) propagation: u64,
    /// For all mounts below as well.
    pub(in crate::container) recursive: bool,
}

/// A file system as mount(2) takes it.
#[derive(Clone, Copy, Debug)]
pub(in crate::container) struct Source<'a> {
    pub(in crate::container) kind: &'a str,
    pub(in crate::container) source: &'a str,
    pub(in crate::container) flags: MsFlags,
    pub(in crate::container) data: &'a str,
    /// Folder in which relative paths of the options begin.
    pub(in crate::container) folder: Option<&'a Path>,
}

impl AsFd for Mount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Mount {
    /// Copies what is mounted at a file or folder. Mounts that come below it later arrive in the copy, and
    /// nothing that is done to the copy gets to where it is from.
    pub(in crate::container) fn copy(of: BorrowedFd<'_>, recursive: bool) -> io::Result<Self> {
        let mut flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
        let copy = Self(open_tree(of, c"", flags)?);
        step();
        copy.change(Change { propagation: libc::MS_SLAVE, recursive: true, ..Change::default() })?;
        Ok(copy)
    }

    /// Mounts a file system. mount(2) is what takes every option of every file system; it mounts in a folder
    /// of ours, from where a copy is taken.
    pub(in crate::container) fn new(fs: Source<'_>, stage: &Dir) -> Result<Self, MountError> {
        clear_stage(stage)?;
        let point = stage.make(STAGE)?;
        let doing = || format!("mounting {} {} at", fs.kind, fs.source);
        mount_at(fs, point.as_fd()).map_err(failed(doing(), &stage.path(STAGE)))?;
        step();
        Self::take(stage).map_err(failed(doing(), &stage.path(STAGE)))
    }

    /// Mounts by another program, which is told where.
    pub(in crate::container) fn by(
        stage: &Dir,
        program: impl FnOnce(&Path) -> Result<(), MountError>,
    ) -> Result<Self, MountError> {
        clear_stage(stage)?;
        stage.make(STAGE)?;
        program(&stage.path(STAGE))?;
        Self::take(stage).map_err(failed("taking what is mounted at", &stage.path(STAGE)))
    }

    fn take(stage: &Dir) -> io::Result<Self> {
        let made = openat2(stage, STAGE, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), PLAIN)?;
        let copy = Self::copy(made.as_fd(), true)?;
        copy.change(Change { propagation: libc::MS_PRIVATE, recursive: true, ..Change::default() })?;
        drop(made);
        step();
        detach(stage.as_fd(), OsStr::new(STAGE))?;
        Ok(copy)
    }

    /// Changes attributes or propagation.
    pub(in crate::container) fn change(&self, change: Change) -> io::Result<()> {
        change_mount(self.as_fd(), change)?;
        step();
        Ok(())
    }

    /// Puts it over a folder or a file, as itself is one.
    pub(in crate::container) fn attach(&self, point: BorrowedFd<'_>) -> io::Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(self, c"", point, c"", flags)?;
        step();
        Ok(())
    }
}

/// Opens a path in a mount as its own root: links lead where they would in there.
pub(in crate::container) fn open_inside(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    Ok(openat2(root, path, flags, Mode::empty(), resolve)?)
}

/// Unmounts what an earlier attempt left that was killed before it was done: a file system that nobody uses.
fn clear_stage(stage: &Dir) -> Result<(), MountError> {
    while stage.is_mounted(STAGE)? {
        stage.detach(OsStr::new(STAGE))?;
    }
    Ok(())
}

/// Changes a mount, wherever it is.
pub(in crate::container) fn change_mount(mount: BorrowedFd<'_>, change: Change) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: change.set,
        attr_clr: change.clear,
        propagation: change.propagation,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if change.recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a string, the record is as long as said, and both live beyond the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Unmounts what is at a name in a folder. The kernel keeps a mount that a descriptor is open to, so it
/// cannot be named by one of its own.
#[expect(clippy::disallowed_methods, reason = "its path begins with a descriptor of ours")]
pub(super) fn detach(folder: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    let mut path = format!("/proc/self/fd/{}/", folder.as_raw_fd()).into_bytes();
    path.extend(name.as_bytes());
    Ok(unmount(OsStr::from_bytes(&path), UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?)
}

#[expect(clippy::disallowed_methods, reason = "its path is a descriptor of ours")]
fn mount_at(fs: Source<'_>, point: BorrowedFd<'_>) -> io::Result<()> {
    let target = format!("/proc/self/fd/{}", point.as_raw_fd());
    let mount = || mount(Some(fs.source), target.as_str(), Some(fs.kind), fs.flags, Some(fs.data));
    let Some(folder) = fs.folder else { return Ok(mount()?) };
    let folder = open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    thread::scope(|scope| {
        let work = scope.spawn(|| {
            // The working folder belongs to the process; this thread takes a copy, and ends with it.
            unshare(CloneFlags::CLONE_FS)?;
            nix::unistd::fchdir(&folder)?;
            mount()
        });
        work.join().unwrap_or(Err(nix::Error::EIO)).map_err(io::Error::from)
    })
}
