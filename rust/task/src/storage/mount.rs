//! Mounts made with the kernel's newer interface (`fsopen(2)`, `open_tree(2)`, `mount_setattr(2)`): a mount
//! gets its attributes before anybody can see it, options need no escaping, and the file system says in words
//! what it refuses.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    time::Duration,
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, SeekFrom, fstat, openat2},
    io::{Errno, read},
    mount::{
        FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
        OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_reconfigure, fsconfig_set_flag,
        fsconfig_set_string, fsmount, fsopen, fspick, mount_change, move_mount, open_tree, unmount,
    },
};

use super::options::Options;
use crate::error::TaskError;

/// Longest message of a file system that is passed on.
const MAX_MESSAGE: usize = 512;

/// Longest record of the kernel's log (`PRINTKRB_RECORD_MAX` of `kernel/printk/printk.c` is a little less),
/// and how many are passed on.
const MAX_RECORD: usize = 2048;
const MAX_LINES: usize = 3;
/// Number of times that a busy mount is tried again, and the pause before each.
const BUSY_TRIES: u32 = 10;
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// A file system to be mounted.
pub(super) struct NewFs<'a> {
    pub(super) fstype: &'a str,
    /// Device or name; empty for none.
    pub(super) source: &'a str,
    /// The superblock is not to be written.
    pub(super) read_only: bool,
    pub(super) data: &'a [(String, Option<String>)],
}

/// Makes a mount that is nowhere yet.
pub(super) fn new_fs(fs: &NewFs, attributes: MountAttrFlags) -> Result<OwnedFd, TaskError> {
    let doing = || match fs.source {
        "" => format!("mounting a new {}", fs.fstype),
        source => format!("mounting {} of {source}", fs.fstype),
    };
    let context = fsopen(fs.fstype, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|error| match error {
        Errno::NODEV => TaskError::InvalidArgument(format!(
            "{}: the guest's kernel does not have this file system",
            doing()
        )),
        error => TaskError::io(doing())(error),
    })?;
    let log = KernelLog::open();
    if let Err((what, error)) = configure(context.as_fd(), fs) {
        let mut said = messages(&context);
        let device = fs.source.rsplit('/').next().unwrap_or_default();
        said.extend(log.map(|log| log.about(device)).unwrap_or_default());
        return Err(explained(&said, format!("{}{what}", doing()), error));
    }
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(TaskError::io(doing()))
}

fn configure(context: BorrowedFd, fs: &NewFs) -> Result<(), (String, Errno)> {
    let at = |what: &str| {
        let what = what.to_owned();
        move |error| (what, error)
    };
    if !fs.source.is_empty() {
        fsconfig_set_string(context, "source", fs.source).map_err(at(""))?;
    }
    if fs.read_only {
        fsconfig_set_flag(context, "ro").map_err(at(""))?;
    }
    for (name, value) in fs.data {
        match value {
            Some(value) => fsconfig_set_string(context, name.as_str(), value.as_str()),
            None => fsconfig_set_flag(context, name.as_str()),
        }
        .map_err(at(&format!(" with option {name:?}")))?;
    }
    fsconfig_create(context).map_err(at(""))
}

/// Lets a mounted file system be written that was not.
pub(super) fn make_writable(mounted: &Path) -> Result<(), TaskError> {
    let doing = || format!("making the file system at {} writable", mounted.display());
    let context = fspick(CWD, mounted, FsPickFlags::FSPICK_CLOEXEC).map_err(TaskError::io(doing()))?;
    let done = fsconfig_set_flag(&context, "rw").and_then(|()| fsconfig_reconfigure(&context));
    done.map_err(|error| explained(&messages(&context), doing(), error))
}

/// The kernel's error with what else is known about it.
fn explained(said: &[String], doing: String, error: Errno) -> TaskError {
    let doing = if said.is_empty() { doing } else { format!("{doing} ({})", said.join("; ")) };
    TaskError::io(doing)(error)
}

/// Reads a file system's messages about its options.
fn messages(context: &OwnedFd) -> Vec<String> {
    let mut said = Vec::new();
    let mut message = [0; MAX_MESSAGE];
    // One message a read: a letter for its kind, a space, the text. ENODATA after the last.
    while let Ok(length @ 1..) = read(context, &mut message) {
        said.push(String::from_utf8_lossy(message.get(2..length).unwrap_or_default()).trim().to_owned());
    }
    said
}

/// The kernel's log from now on: many a file system says only there what is wrong with a disk.
struct KernelLog(OwnedFd);

impl KernelLog {
    fn open() -> Option<Self> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let log = rustix::fs::open("/dev/kmsg", flags, Mode::empty()).ok()?;
        rustix::fs::seek(&log, SeekFrom::End(0)).ok()?;
        Some(Self(log))
    }

    /// The last lines that name a device as file systems do: `EXT4-fs (vda): …`.
    fn about(self, device: &str) -> Vec<String> {
        let (mark, mut lines) = (format!("({device})"), Vec::new());
        let mut record = [0; MAX_RECORD];
        // One record a read: numbers, a semicolon, the text, and lines that begin with a space for programs.
        loop {
            match read(&self.0, &mut record) {
                Ok(length @ 1..) => {
                    let text = String::from_utf8_lossy(record.get(..length).unwrap_or_default());
                    let line = text.lines().next().and_then(|line| line.split_once(';'));
                    lines.extend(line.map(|(_, line)| line.to_owned()).filter(|line| line.contains(&mark)));
                }
                // Records were overwritten before they were read.
                Err(Errno::PIPE) => {}
                _ => break,
            }
        }
        lines.split_off(lines.len().saturating_sub(MAX_LINES))
    }
}

/// Opens a path below a folder that others write to: what was meant is a path without links, so none is
/// followed.
pub(super) fn open_below(folder: &Path, path: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let top = rustix::fs::open(folder, flags | OFlags::DIRECTORY, Mode::empty())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok(openat2(top, path, flags, Mode::empty(), resolve)?)
}

/// Makes a copy of what is mounted at a file or folder, nowhere yet.
pub(super) fn copy_tree(of: BorrowedFd, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    Ok(open_tree(of, c"", flags)?)
}

/// Gives a mount that is nowhere yet its attributes.
pub(super) fn set_attributes(mount: BorrowedFd, options: &Options) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: u64::from(options.attributes.bits()),
        attr_clr: u64::from(options.cleared.bits()),
        propagation: 0,
        userns_fd: 0,
    };
    let mut flags = libc::AT_EMPTY_PATH;
    if options.recursive {
        flags |= libc::AT_RECURSIVE;
    }
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

/// Puts a mount where it is to be seen, over a file or a folder as itself is one, which is made if it is not
/// there.
pub(super) fn attach(mount: BorrowedFd, target: &Path) -> io::Result<()> {
    let folder = FileType::from_raw_mode(fstat(mount)?.st_mode) == FileType::Directory;
    if folder {
        fs::create_dir_all(target)?;
    } else {
        target.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::OpenOptions::new().append(true).create(true).open(target)?;
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(mount, c"", CWD, target, flags)?)
}

/// Says how mounts below this one propagate.
pub(super) fn propagate(target: &Path, how: MountPropagationFlags) -> io::Result<()> {
    Ok(mount_change(target, how)?)
}

/// Writes out and takes away what is mounted at a place, and the place. One that is not there is no error.
pub(super) fn detach(target: &Path) -> Result<(), TaskError> {
    let doing = || format!("unmounting {}", target.display());
    match unmount_patiently(target) {
        // Nothing is mounted there, or there is no such place.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        Err(error) => return Err(TaskError::io(doing())(error)),
    }
    remove_place(target);
    Ok(())
}

/// A process that is just being started holds copies of all open files until it runs its program, and so a
/// mount that one of them is in: that is over in a moment.
fn unmount_patiently(target: &Path) -> Result<(), Errno> {
    for _ in 0..BUSY_TRIES {
        match unmount(target, UnmountFlags::NOFOLLOW) {
            Err(Errno::BUSY) => std::thread::sleep(BUSY_PAUSE),
            done => return done,
        }
    }
    unmount(target, UnmountFlags::NOFOLLOW)
}

/// Takes away what is mounted at a place and below it. What propagates from there is not asked to do the
/// same.
pub(super) fn detach_all(target: &Path) -> Result<(), TaskError> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    match mount_change(target, private) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        Err(error) => {
            return Err(TaskError::io(format!("making the mounts at {} private", target.display()))(error));
        }
    }
    for below in mounted_below(&mountinfo()?, &[target]) {
        let below = Path::new(&below);
        if below != target {
            unmount_patiently(below).map_err(TaskError::io(format!("unmounting {}", below.display())))?;
        }
    }
    detach(target)
}

/// Reads the mounts of this thread's namespace (proc_pid_mountinfo(5)).
pub(super) fn mountinfo() -> Result<String, TaskError> {
    let file = "/proc/thread-self/mountinfo";
    fs::read_to_string(file).map_err(TaskError::io(format!("reading {file}")))
}

/// Removes an empty folder or file that a mount was over. One with content is kept: it is not ours.
fn remove_place(target: &Path) {
    let removed = match fs::symlink_metadata(target) {
        Ok(place) if place.is_dir() => fs::remove_dir(target),
        Ok(place) if place.is_file() && place.len() == 0 => fs::remove_file(target),
        Ok(_) => Err(io::Error::other("there is something in it")),
        Err(_) => return,
    };
    if let Err(error) = removed {
        log::warn!("removing the mount point {}: {error}", target.display());
    }
}

/// Writes out what a file system has not written yet.
pub(super) fn sync(mounted: &Path) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = rustix::fs::openat(CWD, mounted, flags, Mode::empty())?;
    Ok(rustix::fs::syncfs(top)?)
}

/// The paths mounted below folders, the last mounted first.
pub(super) fn mounted_below(mountinfo: &str, folders: &[&Path]) -> Vec<String> {
    // Field 5 is the mount point, with blanks and the like in octal (proc_pid_mountinfo(5)).
    let points = mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    let mut below: Vec<String> =
        points.filter(|point| folders.iter().any(|folder| Path::new(point).starts_with(folder))).collect();
    below.reverse();
    below
}

fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        match part.split_at_checked(3).map(|(code, rest)| (u8::from_str_radix(code, 8), rest)) {
            Some((Ok(byte), rest)) => {
                bytes.push(byte);
                bytes.extend(rest.bytes());
            }
            _ => {
                bytes.push(b'\\');
                bytes.extend(part.bytes());
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_below_folders_are_found_last_first() {
        let info = "22 1 0:21 / /run rw - tmpfs tmpfs rw\n\
                    30 22 8:0 / /run/kuasar/storage/a rw,relatime shared:1 - ext4 /dev/vda rw\n\
                    31 22 8:0 / /run/kuasar/storage/a\\040b rw - ext4 /dev/vda rw\n\
                    32 22 8:0 / /run/kuasar/storages rw - ext4 /dev/vda rw\n\
                    33 22 8:0 / /run/kuasar/devices/vda rw - ext4 /dev/vda rw\n";
        let folders = [Path::new("/run/kuasar/storage"), Path::new("/run/kuasar/devices")];
        assert_eq!(
            mounted_below(info, &folders),
            ["/run/kuasar/devices/vda", "/run/kuasar/storage/a b", "/run/kuasar/storage/a"]
        );
        assert!(mounted_below("", &folders).is_empty());
    }

    #[test]
    fn escapes_are_undone() {
        for (escaped, plain) in [("a\\134b", "a\\b"), ("\\011", "\t"), ("a\\9", "a\\9"), ("\\", "\\")] {
            assert_eq!(unescape(escaped), plain);
        }
    }

    #[test]
    fn nothing_leads_out_of_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("share")).unwrap();
        fs::write(dir.path().join("secret"), "x").unwrap();
        std::os::unix::fs::symlink("../secret", dir.path().join("share/link")).unwrap();
        let share = dir.path().join("share");
        assert!(open_below(&share, "link").is_err());
        assert!(open_below(&share, "../secret").is_err());
        fs::write(share.join("secret"), "y").unwrap();
        assert!(open_below(&share, "link").is_err());
        std::os::unix::fs::symlink("secret", share.join("inner")).unwrap();
        assert!(open_below(&share, "inner").is_err());
        open_below(&share, "secret").unwrap();
    }
}
