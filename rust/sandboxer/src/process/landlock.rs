//! Landlock, where the kernel has it: what a process may open, whatever its user may.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
};

use nix::libc;
use rustix::fs::OFlags;

// Of `linux/landlock.h`.
const ACCESS_EXECUTE: u64 = 1;
const ACCESS_WRITE_FILE: u64 = 1 << 1;
const ACCESS_READ_FILE: u64 = 1 << 2;
const ACCESS_READ_DIR: u64 = 1 << 3;
const ACCESS_REMOVE_FILE: u64 = 1 << 5;
const ACCESS_MAKE_SOCK: u64 = 1 << 9;
const CREATE_RULESET_VERSION: libc::c_uint = 1;
const RULE_PATH_BENEATH: libc::c_int = 1;
/// Binding and connecting TCP sockets.
const ACCESS_NET: u64 = 3;
/// Abstract unix sockets, and signals to processes outside.
const SCOPED: u64 = 3;

/// Programs and libraries.
pub(super) const EXECUTE: u64 = ACCESS_EXECUTE | ACCESS_READ_FILE | ACCESS_READ_DIR;
/// Devices.
pub(super) const READ_WRITE: u64 = ACCESS_READ_FILE | ACCESS_WRITE_FILE;
/// A folder in which sockets are made.
pub(super) const SOCKETS: u64 = ACCESS_READ_DIR | ACCESS_REMOVE_FILE | ACCESS_MAKE_SOCK;
/// The process's own entries of `/proc`.
const PROC: u64 = ACCESS_READ_FILE | ACCESS_READ_DIR;

#[repr(C)]
struct RulesetAttr {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

#[repr(C, packed)]
struct PathBeneathAttr {
    allowed_access: u64,
    parent_fd: RawFd,
}

/// Rules that are complete but for what exists only in the process's own namespaces.
#[derive(Debug)]
pub(super) struct Ruleset(OwnedFd);

impl Ruleset {
    /// A rule set that allows nothing; `None` where the kernel has no Landlock.
    pub(super) fn new() -> io::Result<Option<Self>> {
        // SAFETY: with this flag the kernel reads no structure.
        let version = unsafe {
            libc::syscall(
                libc::SYS_landlock_create_ruleset,
                std::ptr::null::<RulesetAttr>(),
                0,
                CREATE_RULESET_VERSION,
            )
        };
        let Some(version) = u32::try_from(version).ok().filter(|version| *version > 0) else {
            return Ok(None);
        };
        let attr = RulesetAttr {
            handled_access_fs: handled(version),
            handled_access_net: if version >= 4 { ACCESS_NET } else { 0 },
            scoped: if version >= 6 { SCOPED } else { 0 },
        };
        // Older kernels refuse a structure whose end they do not know, unless it is zero.
        // SAFETY: the pointer is of a live structure of that size.
        let fd = unsafe {
            libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attr, size_of::<RulesetAttr>(), 0)
        };
        match RawFd::try_from(fd) {
            // SAFETY: the kernel has just given this descriptor to nobody else.
            Ok(fd) if fd >= 0 => Ok(Some(Self(unsafe { OwnedFd::from_raw_fd(fd) }))),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Confines the process, which may have no new privileges. System calls only.
    pub(super) fn enter(&self) -> io::Result<()> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc = rustix::fs::open(c"/proc", flags, rustix::fs::Mode::empty())?;
        add(self, &proc, PROC)?;
        // SAFETY: the call has no pointers.
        let done = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, self.0.as_raw_fd(), 0) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Everything that this version of Landlock can refuse about files.
const fn handled(version: u32) -> u64 {
    let known = match version {
        1 => 13,
        2 => 14,
        3 | 4 => 15,
        _ => 16,
    };
    (1 << known) - 1
}

/// Allows something of a file or folder and all below it.
pub(super) fn allow(rules: &mut Option<Ruleset>, path: &Path, access: u64) -> io::Result<()> {
    let Some(rules) = rules else { return Ok(()) };
    let flags = i32::try_from(OFlags::PATH.bits()).map_err(io::Error::other)?;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    let access = if file.metadata()?.is_dir() { access } else { access & (READ_WRITE | ACCESS_EXECUTE) };
    add(rules, &file, access)
}

/// Allows a file to be read.
pub(super) fn allow_file(rules: &mut Option<Ruleset>, file: &File) -> io::Result<()> {
    rules.as_ref().map_or(Ok(()), |rules| add(rules, file, ACCESS_READ_FILE))
}

fn add(rules: &Ruleset, file: &impl AsFd, access: u64) -> io::Result<()> {
    let attr = PathBeneathAttr { allowed_access: access, parent_fd: file.as_fd().as_raw_fd() };
    // SAFETY: the pointer is of a live structure of the kind that the number names.
    let done = unsafe {
        libc::syscall(libc::SYS_landlock_add_rule, rules.0.as_raw_fd(), RULE_PATH_BENEATH, &raw const attr, 0)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
