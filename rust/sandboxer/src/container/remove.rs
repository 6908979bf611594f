//! Removal of folders in which something may be mounted: never deletes what is behind a mount.

use std::{ffi::OsStr, fs, io, os::unix::ffi::OsStrExt, path::Path};

use nix::{
    dir::{Dir, Type},
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    unistd::{UnlinkatFlags, unlinkat},
};

use super::mount::{MountError, failed, unmount_below};

/// Unmounts everything at and below a folder or file, verifies it, and removes it without entering other mounts.
/// One that is not there is no error.
///
/// # Errors
/// When something stays mounted, in which case nothing is removed, or when a file cannot be removed.
pub fn remove(folder: &Path) -> Result<(), MountError> {
    unmount_below(folder)?;
    remove_tree(folder)
}

/// The second half of [`remove`]. Stops at the first mount it meets, even of the same file system.
pub(super) fn remove_tree(folder: &Path) -> Result<(), MountError> {
    match fs::symlink_metadata(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("removing", folder)(error)),
        Ok(found) if !found.is_dir() => return fs::remove_file(folder).map_err(failed("removing", folder)),
        Ok(_) => {}
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut dir = Dir::open(folder, flags, nix::sys::stat::Mode::empty())
        .map_err(|e| failed("opening", folder)(e.into()))?;
    empty(&mut dir, folder)?;
    drop(dir);
    fs::remove_dir(folder).map_err(failed("removing", folder))
}

fn empty(dir: &mut Dir, path: &Path) -> Result<(), MountError> {
    let entries: Vec<_> =
        dir.iter().collect::<Result<_, _>>().map_err(|e| failed("listing", path)(e.into()))?;
    for entry in entries {
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let child = path.join(OsStr::from_bytes(name.to_bytes()));
        let is_dir = match entry.file_type() {
            Some(kind) => kind == Type::Directory,
            None => fs::symlink_metadata(&child).map_err(failed("examining", &child))?.is_dir(),
        };
        let how = if is_dir {
            let how = OpenHow::new()
                .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
                .resolve(ResolveFlag::RESOLVE_NO_XDEV | ResolveFlag::RESOLVE_BENEATH);
            let fd = openat2(&*dir, name, how)
                .map_err(|e| failed("entering (is something mounted there?)", &child)(e.into()))?;
            let mut inner = Dir::from_fd(fd).map_err(|e| failed("opening", &child)(e.into()))?;
            empty(&mut inner, &child)?;
            UnlinkatFlags::RemoveDir
        } else {
            UnlinkatFlags::NoRemoveDir
        };
        unlinkat(&*dir, name, how).map_err(|e| failed("removing", &child)(e.into()))?;
    }
    Ok(())
}
