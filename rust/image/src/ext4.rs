//! An ext4 file system from a tree, without root, loop devices or mounting: `mke2fs` makes it empty,
//! `debugfs` fills it.
//!
//! Not `mke2fs -d`: e2fsprogs 1.47.0 copies files in the order of the builder's folder, with the builder's
//! owners and change times, and so gives other bytes on every machine. A script for `debugfs` fixes all
//! three.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;

use crate::tool::Tool;
use crate::tree::{Entry, Kind};
use crate::{Error, Result};

/// Block size, bytes. DAX needs blocks as large as pages.
pub const BLOCK: u64 = 4096;
/// UUID of every file system made here; an image is known by its hash, not by its UUID.
pub const UUID: &str = "6b756173-6172-4000-8000-000000000001";
/// Seed of the folder hashes: unused while folders are linear, fixed all the same.
const HASH_SEED: &str = "6b756173-6172-4000-8000-000000000002";
/// Volume label.
pub const LABEL: &str = "kuasar";

/// Features, all others off. No journal and no checksums: the image is never written and is verified as a
/// whole by its hash, so both would cost the guest start time and give it nothing.
const FEATURES: &str = "none,sparse_super,large_file,filetype,extent,flex_bg,dir_nlink,extra_isize";

const MKE2FS: Tool = Tool::new("mke2fs", "e2fsprogs");
const DEBUGFS: Tool = Tool::new("debugfs", "e2fsprogs");
const E2FSCK: Tool = Tool::new("e2fsck", "e2fsprogs");

const INODES_PER_BLOCK: u64 = BLOCK / 256;
const BLOCKS_PER_GROUP: u64 = BLOCK * 8;
/// Inodes below the first usable one.
const RESERVED_INODES: u64 = 10;
/// A link's target shorter than this lies in the inode.
const FAST_LINK: usize = 60;
/// Longest line debugfs reads from a script.
const MAX_LINE: usize = 8000;

/// Needs of a file system: bytes and inodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Number of inodes.
    pub inodes: u64,
    /// Bytes it needs at least, reserve included.
    pub bytes: u64,
}

/// Computes what the entries need, with `reserve` bytes left free.
#[must_use]
pub fn plan(entries: &[Entry], reserve: u64) -> Plan {
    let content: u64 = entries
        .iter()
        .map(|entry| match &entry.kind {
            Kind::File(size) => size.div_ceil(BLOCK),
            Kind::Symlink(target) if target.len() >= FAST_LINK => 1,
            _ => 0,
        })
        .sum();
    let folders = entries.iter().filter(|e| e.kind == Kind::Dir).count() as u64;
    // A folder's entries: 8 bytes and the name, padded to 4; a block is left when the next one does not fit.
    let names: u64 =
        entries.iter().map(|e| 12 + e.path.rsplit(|b| *b == b'/').next().unwrap_or(&[]).len() as u64).sum();
    let inodes = entries.len() as u64 + RESERVED_INODES;
    let data = content + folders + names.div_ceil(BLOCK - 300) + reserve.div_ceil(BLOCK);
    let groups = data / BLOCKS_PER_GROUP + 1;
    // Per group: two bitmaps, inode table, now and then a copy of the superblock and of the group table; and
    // half a percent for the extent blocks of files that do not lie in one piece.
    let tables = inodes.div_ceil(INODES_PER_BLOCK) + groups * 5 + 64;
    Plan { inodes, bytes: (data + data / 200 + tables) * BLOCK }
}

/// Makes the file system in `image` from byte `offset` on, `bytes` long. The file must exist, filled with
/// zeros. Every time stamp becomes `epoch` (seconds since 1970), or 1 when that is 0: e2fsprogs takes 0 for
/// "now".
///
/// # Errors
/// When a tool of e2fsprogs is missing or fails, or a name cannot be given to it.
pub fn make(image: &Path, offset: u64, bytes: u64, inodes: u64, entries: &[Entry], epoch: u32) -> Result<()> {
    let epoch = epoch.max(1);
    let script = script(entries, epoch)?;
    let mut file =
        tempfile::NamedTempFile::new().map_err(Error::io("create a file in", &std::env::temp_dir()))?;
    file.write_all(&script).map_err(Error::io("write", file.path()))?;

    let extended =
        format!("hash_seed={HASH_SEED},root_owner=0:0,lazy_itable_init=0,nodiscard,offset={offset}");
    let mut mke2fs = command(MKE2FS, image, epoch)?;
    mke2fs.args(["-F", "-q", "-b", "4096", "-I", "256", "-m", "0", "-O", FEATURES, "-U", UUID, "-L", LABEL]);
    mke2fs.args(["-N", &inodes.to_string(), "-E", &extended]);
    mke2fs.arg(base_name(image)).arg((bytes / BLOCK).to_string());
    MKE2FS.run(&mut mke2fs)?;

    let mut at = OsString::from(base_name(image));
    at.push(format!("?offset={offset}"));
    let mut debugfs = command(DEBUGFS, image, epoch)?;
    debugfs.arg("-w").arg("-f").arg(file.path()).arg(&at);
    let output = DEBUGFS.output(&mut debugfs)?;
    // debugfs exits with 0 whatever its script met; only its banner may be on stderr.
    let complained = String::from_utf8_lossy(&output.stderr).lines().any(|l| !l.starts_with("debugfs "));
    if complained || !output.status.success() {
        return Err(DEBUGFS.failed(&output));
    }

    E2FSCK.run(command(E2FSCK, image, epoch)?.arg("-fn").arg(&at))?;
    Ok(())
}

/// The commands that fill the empty file system.
fn script(entries: &[Entry], epoch: u32) -> Result<Vec<u8>> {
    let mut script = b"rmdir /lost+found\n".to_vec();
    for entry in entries {
        let inside = quote(&[b"/", entry.path.as_slice()].concat(), entry)?;
        let create = match &entry.kind {
            Kind::Dir if entry.path.is_empty() => Vec::new(),
            Kind::Dir => [b"mkdir ", inside.as_slice()].concat(),
            Kind::File(_) => {
                let source = quote(entry.source.as_os_str().as_bytes(), entry)?;
                [b"write ", source.as_slice(), b" ", &inside].concat()
            }
            Kind::Symlink(target) => {
                [b"symlink ", inside.as_slice(), b" ", quote(target, entry)?.as_slice()].concat()
            }
            Kind::Fifo => [b"mknod ", inside.as_slice(), b" p"].concat(),
            Kind::Device { character, major, minor } => {
                let kind = if *character { 'c' } else { 'b' };
                [b"mknod ", inside.as_slice(), format!(" {kind} {major} {minor}").as_bytes()].concat()
            }
        };
        if create.len() > MAX_LINE {
            return Err(unusable(entry, "has a path too long for debugfs"));
        }
        script.extend_from_slice(&create);
        script.push(b'\n');
        let mut attributes = format!("mode 0{:o}\nuid 0\ngid 0", entry.mode());
        for stamp in ["atime", "mtime", "ctime", "crtime"] {
            // Writing to a String cannot fail.
            let _ = write!(attributes, "\n{stamp} @{epoch}");
        }
        for attribute in attributes.lines() {
            script
                .extend_from_slice(&[b"sif ", inside.as_slice(), b" ", attribute.as_bytes(), b"\n"].concat());
        }
    }
    Ok(script)
}

/// Quotes an argument as the `ss` library, which reads debugfs' commands, wants it: a quote within is
/// doubled.
fn quote(argument: &[u8], entry: &Entry) -> Result<Vec<u8>> {
    if argument.contains(&b'\n') {
        return Err(unusable(entry, "has a line break in its name, which debugfs cannot take"));
    }
    let mut quoted = vec![b'"'];
    for byte in argument {
        if *byte == b'"' {
            quoted.push(b'"');
        }
        quoted.push(*byte);
    }
    quoted.push(b'"');
    Ok(quoted)
}

fn unusable(entry: &Entry, reason: &str) -> Error {
    Error::Format { path: entry.source.clone(), reason: reason.into() }
}

/// A tool of e2fsprogs, run in the image's folder.
fn command(tool: Tool, image: &Path, epoch: u32) -> Result<Command> {
    let mut command = tool.command(image.parent().unwrap_or(Path::new("")), epoch)?;
    // The first is known to 1.47.0, the standard variable to later releases.
    command.env("MKE2FS_CONFIG", "/dev/null").env("E2FSPROGS_FAKE_TIME", epoch.to_string());
    Ok(command)
}

fn base_name(image: &Path) -> &std::ffi::OsStr {
    image.file_name().unwrap_or_default()
}
