//! The file system of a confined process: a root of its own in memory, and below it read-only what the
//! program executes.
//!
//! Nothing of the host's configuration, of its users or of other pods is there to be found, whoever may read
//! it. Which libraries a program wants, nobody needs to know: it gets the folders in which distributions keep
//! programs and their libraries, whole.

use std::{
    collections::BTreeSet,
    ffi::{CStr, CString, OsStr},
    fs, io,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
};

use nix::libc;
use rustix::{
    fs::{Mode, OFlags},
    mount::{MountFlags, MountPropagationFlags, UnmountFlags},
};

use super::landlock::{self, Ruleset};

/// Folders and files in which distributions keep programs and libraries, or by which they are found. The jail
/// leaves out those that a host does not have.
const SYSTEM: [&str; 10] = [
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/nix/store",
    "/etc/ld.so.cache",
    "/etc/alternatives",
];
/// Devices that any program may expect.
const DEVICES: [&str; 5] = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"];
/// Folder on which the daemon puts the new root together. Every host has it, and nothing that is mounted into
/// the new root lies below it.
const STAGE: &CStr = c"/proc";

/// The part of the file system that a process sees, beside the programs and libraries of the host.
#[derive(Debug, Default)]
pub struct Jail {
    writable: Vec<PathBuf>,
    readable: Vec<fs::File>,
}

/// Something made in the new root; paths are relative to it.
#[derive(Debug)]
enum Make {
    Folder(CString),
    File(CString),
    Link { text: CString, path: CString },
    Bind { source: CString, path: CString, attributes: u64 },
}

/// The new root, ready to be made with system calls only.
#[derive(Debug)]
pub(super) struct Mounts(Vec<Make>);

impl Jail {
    /// Nothing but programs and libraries.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a folder, at its own path, in which files may be made.
    pub fn writable(&mut self, folder: impl Into<PathBuf>) -> &mut Self {
        self.writable.push(folder.into());
        self
    }

    /// Lets a file be opened once more by the descriptor that the process has of it.
    pub fn reopened(&mut self, file: fs::File) -> &mut Self {
        self.readable.push(file);
        self
    }

    pub(super) fn prepare(self, program: &Path) -> io::Result<(Mounts, Option<Ruleset>)> {
        let mut plan = Plan::default();
        let mut rules = Ruleset::new()?;
        for path in SYSTEM.map(Path::new) {
            match fs::symlink_metadata(path) {
                Ok(there) if there.is_symlink() => plan.link(path)?,
                Ok(there) => {
                    plan.bind(path, there.is_dir(), READ_ONLY)?;
                    landlock::allow(&mut rules, path, landlock::EXECUTE)?;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        let home = home(program);
        if !SYSTEM.iter().any(|folder| home.starts_with(folder)) {
            // Beside a program in the root folder is everything.
            let (home, is_dir) = if home == Path::new("/") { (program, false) } else { (home, true) };
            plan.bind(home, is_dir, READ_ONLY)?;
            landlock::allow(&mut rules, home, landlock::EXECUTE)?;
        }
        for path in DEVICES.map(Path::new).into_iter().filter(|path| path.exists()) {
            plan.bind(path, false, DEVICE)?;
            landlock::allow(&mut rules, path, landlock::READ_WRITE)?;
        }
        for folder in &self.writable {
            plan.bind(folder, true, WRITABLE)?;
            landlock::allow(&mut rules, folder, landlock::SOCKETS)?;
        }
        for file in &self.readable {
            landlock::allow_file(&mut rules, file)?;
        }
        plan.folder(Path::new("/proc"))?;
        Ok((Mounts(plan.made), rules))
    }
}

/// Nothing changes below it, and nothing of it gives rights or is a device.
const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
/// Files may be made, and none of them executed.
const WRITABLE: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
/// A device works as one.
const DEVICE: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;

#[derive(Default)]
struct Plan {
    made: Vec<Make>,
    folders: BTreeSet<PathBuf>,
}

impl Plan {
    fn link(&mut self, path: &Path) -> io::Result<()> {
        self.parents(path)?;
        let text = text(fs::read_link(path)?.as_os_str())?;
        self.made.push(Make::Link { text, path: relative(path)? });
        Ok(())
    }

    fn bind(&mut self, path: &Path, is_dir: bool, attributes: u64) -> io::Result<()> {
        if is_dir {
            self.folder(path)?;
        } else {
            self.parents(path)?;
            self.made.push(Make::File(relative(path)?));
        }
        self.made.push(Make::Bind { source: text(path.as_os_str())?, path: relative(path)?, attributes });
        Ok(())
    }

    fn folder(&mut self, path: &Path) -> io::Result<()> {
        self.parents(path)?;
        if self.folders.insert(path.to_owned()) {
            self.made.push(Make::Folder(relative(path)?));
        }
        Ok(())
    }

    fn parents(&mut self, path: &Path) -> io::Result<()> {
        match path.parent() {
            Some(parent) if parent != Path::new("/") => self.folder(parent),
            _ => Ok(()),
        }
    }
}

impl Mounts {
    /// Makes the new root and leaves the old one for good. System calls only.
    #[allow(
        clippy::disallowed_methods,
        reason = "in a mount namespace that nobody else is in yet, at constant paths"
    )]
    pub(super) fn enter(&self) -> io::Result<()> {
        // The daemon's may let nobody else into the folders that are made here.
        rustix::process::umask(Mode::from_raw_mode(0o022));
        let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change(c"/", flags)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        rustix::mount::mount(c"tmpfs", STAGE, c"tmpfs", flags, c"mode=755,size=1m,nr_inodes=1k")?;
        rustix::process::chdir(STAGE)?;
        for make in &self.0 {
            make.make()?;
        }
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
        rustix::mount::mount(c"proc", c"proc", c"proc", flags, c"subset=pid")?;
        set_attributes(c".", libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOEXEC, false)?;
        rustix::process::pivot_root(c".", c".")?;
        rustix::mount::unmount(c".", UnmountFlags::DETACH)?;
        rustix::process::chdir(c"/")?;
        Ok(())
    }
}

impl Make {
    fn make(&self) -> io::Result<()> {
        let mode = Mode::from_raw_mode;
        match self {
            Self::Folder(path) => match rustix::fs::mkdir(path.as_c_str(), mode(0o755)) {
                // It came with a mount above it.
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            },
            Self::File(path) => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::WRONLY;
                drop(rustix::fs::open(path.as_c_str(), flags, mode(0o644))?);
            }
            Self::Link { text, path } => rustix::fs::symlink(text.as_c_str(), path.as_c_str())?,
            Self::Bind { source, path, attributes } => {
                rustix::mount::mount_bind_recursive(source.as_c_str(), path.as_c_str())?;
                set_attributes(path, *attributes, true)?;
            }
        }
        Ok(())
    }
}

fn set_attributes(path: &CStr, attributes: u64, recursive: bool) -> io::Result<()> {
    let how = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let flags = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: both pointers are of live values, and the size is that of the structure.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            &raw const how,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The file of a program, without any link in its path: links may lead through folders that the new root does
/// not have.
pub(super) fn find(program: &Path) -> io::Result<PathBuf> {
    if program.components().count() > 1 {
        return fs::canonicalize(program);
    }
    let executable = |path: &PathBuf| {
        fs::metadata(path).is_ok_and(|there| there.is_file() && there.permissions().mode() & 0o111 != 0)
    };
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&folders).map(|folder| folder.join(program)).find(executable);
    fs::canonicalize(found.ok_or(io::ErrorKind::NotFound)?)
}

/// The folder that a program was installed to, with what else was: `…` of `…/bin/program`, or else the
/// program's own.
fn home(program: &Path) -> &Path {
    let folder = program.parent().unwrap_or(Path::new("/"));
    match folder.file_name().and_then(OsStr::to_str) {
        Some("bin" | "sbin" | "libexec") => folder.parent().unwrap_or(folder),
        _ => folder,
    }
}

fn relative(path: &Path) -> io::Result<CString> {
    text(path.strip_prefix("/").map_err(io::Error::other)?.as_os_str())
}

fn text(text: &OsStr) -> io::Result<CString> {
    CString::new(text.as_bytes()).map_err(io::Error::other)
}
