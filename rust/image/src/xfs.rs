//! An XFS file system from a tree, without root, loop devices or mounting: `mkfs.xfs` makes and fills it.
//!
//! `mkfs.xfs` stamps every inode with the clock and a generation; both are written over here, and the inodes'
//! checksums with them. Layouts are those of the kernel's `fs/xfs/libxfs/xfs_format.h`: big endian, but for
//! checksums.

use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use crate::pfn::field;
use crate::tool::Tool;
use crate::tree::{Entry, Kind};
use crate::{Error, MIB, Result, crc32c};

/// UUID of every XFS made here; an image is known by its hash, not by its UUID.
pub const UUID: &str = "6b756173-6172-4000-8000-000000000004";
const LABEL: &str = "kuasar";
const MKFS: Tool = Tool::new("mkfs.xfs", "xfsprogs");
const XFS_DB: Tool = Tool::new("xfs_db", "xfsprogs");
const XFS_REPAIR: Tool = Tool::new("xfs_repair", "xfsprogs");

const BLOCK: u64 = 4096;
const INODE: usize = 512;
/// The smallest that `mkfs.xfs` makes, and that is with its word that nobody supports a file system so small.
const SMALLEST: u64 = 16 * MIB;
/// Bytes of the log in file systems of a few hundred MiB, and of some blocks of trees.
const LOG: u64 = 7 * MIB;
/// Seconds from the start of XFS' large time stamps to 1970.
const EPOCH: u64 = 1 << 31;
/// Blocks of the tree of inodes that may be looked at: a damaged one may lead round in circles.
const MAX_BLOCKS: u32 = 1 << 16;

/// Bytes that the entries need, with `reserve` bytes left free.
#[must_use]
pub fn size(entries: &[Entry], reserve: u64) -> u64 {
    let content: u64 = entries
        .iter()
        .map(|entry| match &entry.kind {
            Kind::File(size) => size.div_ceil(BLOCK),
            Kind::Symlink(_) => 1,
            // Its names, and a block for the index of them.
            Kind::Dir => 2,
            _ => 0,
        })
        .sum();
    let names: u64 = entries.iter().map(|e| 24 + e.path.len() as u64).sum();
    let bytes = content * BLOCK + names * 2 + (entries.len() * INODE) as u64 + reserve;
    (LOG + bytes + bytes / 50).max(SMALLEST)
}

/// Makes the file system in the file `image`, which exists and has its size. Every time stamp becomes
/// `epoch`.
///
/// # Errors
/// When a tool of xfsprogs is missing or fails, or a name cannot be given to it.
pub fn make(image: &Path, entries: &[Entry], epoch: u32) -> Result<()> {
    let stage = tempfile::tempdir().map_err(Error::io("create a folder in", &std::env::temp_dir()))?;
    let prototype = prototype(entries, stage.path())?;
    let file = stage.path().join("prototype");
    std::fs::write(&file, prototype).map_err(Error::io("write", &file))?;
    let folder = image.parent().unwrap_or(Path::new(""));
    let name = image.file_name().unwrap_or_default();

    let usage = MKFS.output(&mut MKFS.command(folder, epoch)?)?;
    let newer = newer(&String::from_utf8_lossy(&[usage.stdout, usage.stderr].concat()));
    let mut mkfs = MKFS.command(folder, epoch)?;
    mkfs.args([
        "--unsupported",
        "-q",
        "-f",
        "-b",
        "size=4096",
        "-s",
        "size=4096",
        "-d",
        "agcount=1",
        "-L",
        LABEL,
    ]);
    mkfs.arg("-m").arg(format!("crc=1,finobt=0,reflink=0,rmapbt=0,inobtcount=0,bigtime=1,uuid={UUID}"));
    mkfs.args(newer).args(["-i", "sparse=0,size=512,nrext64=0", "-p"]).arg(&file).arg(name);
    MKFS.run(&mut mkfs)?;

    sticky(entries, folder, name, epoch)?;
    let file = File::options().read(true).write(true).open(image).map_err(Error::io("open", image))?;
    stamp(&file, image, epoch)?;
    let mut repair = XFS_REPAIR.command(folder, epoch)?;
    XFS_REPAIR.run(repair.args(["-n", "-f", "-o", "force_geometry"]).arg(name))?;
    Ok(())
}

/// Turns off what later versions of `mkfs.xfs` turn on by themselves, if `usage` says that this is one:
/// parent pointers hold the generations of inodes, which are written over here. Versions before them refuse
/// the words.
fn newer(usage: &str) -> Vec<&'static str> {
    let options = [("exchange=0|1", ["-i", "exchange=0"]), ("parent=0|1", ["-n", "parent=0"])];
    options.into_iter().filter(|(word, _)| usage.contains(word)).flat_map(|(_, option)| option).collect()
}

/// A prototype cannot say "sticky".
fn sticky(entries: &[Entry], folder: &Path, name: &std::ffi::OsStr, epoch: u32) -> Result<()> {
    let mut command = XFS_DB.command(folder, epoch)?;
    let mut needed = false;
    for entry in entries.iter().filter(|e| e.permissions & 0o1000 != 0) {
        needed = true;
        command.arg("-c").arg(format!("path /{}", String::from_utf8_lossy(&entry.path)));
        command.arg("-c").arg(format!("write core.mode 0{:o}", entry.mode()));
    }
    if needed {
        XFS_DB.run(command.arg("-x").arg("-f").arg(name))?;
    }
    Ok(())
}

/// The description of the tree that `mkfs.xfs -p` reads. Files are named by links in `stage`: a blank ends a
/// name.
fn prototype(entries: &[Entry], stage: &Path) -> Result<String> {
    let mut text = String::from("/dev/null\n0 0\n");
    let mut open: Vec<&[u8]> = Vec::new();
    for (i, entry) in entries.iter().enumerate() {
        let (parent, name) = match entry.path.iter().rposition(|b| *b == b'/') {
            Some(slash) => entry.path.split_at(slash),
            None => (&[][..], entry.path.as_slice()),
        };
        let name = std::str::from_utf8(name.strip_prefix(b"/").unwrap_or(name));
        let name = name.ok().filter(|name| !name.contains(char::is_whitespace));
        let name =
            name.ok_or_else(|| unusable(entry, "has a blank in its name, which mkfs.xfs cannot take"))?;
        while open.len() > 1 && open.last().is_some_and(|folder| *folder != parent) {
            open.pop();
            text.push_str("$\n");
        }
        let target = match &entry.kind {
            Kind::File(_) => {
                let link = stage.join(i.to_string());
                symlink(&entry.source, &link).map_err(Error::io("link to", &entry.source))?;
                link.display().to_string()
            }
            Kind::Symlink(target) => String::from_utf8_lossy(target).into_owned(),
            Kind::Device { major, minor, .. } => format!("{major} {minor}"),
            Kind::Dir | Kind::Fifo => String::new(),
        };
        if matches!(entry.kind, Kind::File(_) | Kind::Symlink(_)) && target.contains(char::is_whitespace) {
            return Err(unusable(entry, "leads to a path with a blank, which mkfs.xfs cannot take"));
        }
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name} {} 0 0 {target}", mode(entry));
        if entry.kind == Kind::Dir {
            open.push(&entry.path);
        }
    }
    open.iter().for_each(|_| text.push_str("$\n"));
    Ok(text)
}

fn mode(entry: &Entry) -> String {
    let kind = match entry.kind {
        Kind::File(_) => '-',
        Kind::Dir => 'd',
        Kind::Symlink(_) => 'l',
        Kind::Device { character: true, .. } => 'c',
        Kind::Device { character: false, .. } => 'b',
        Kind::Fifo => 'p',
    };
    let bit = |bit: u32, letter| if entry.permissions & bit != 0 { letter } else { '-' };
    format!("{kind}{}{}{:03o}", bit(0o4000, 'u'), bit(0o2000, 'g'), entry.permissions & 0o777)
}

/// Writes `epoch` and generation 0 into every inode there is room for, used or not.
fn stamp(image: &File, path: &Path, epoch: u32) -> Result<()> {
    let damaged = |reason: &str| Error::Format { path: path.to_owned(), reason: reason.into() };
    let block = |number: u32| -> Result<[u8; BLOCK as usize]> {
        let mut block = [0; BLOCK as usize];
        image.read_exact_at(&mut block, u64::from(number) * BLOCK).map_err(Error::io("read", path))?;
        Ok(block)
    };
    // Sectors are blocks here, so the header of the inodes' tree is block 2.
    let header = block(2)?;
    if !header.starts_with(b"XAGI") {
        return Err(damaged("mkfs.xfs left no table of inodes"));
    }
    let (mut next, mut level) = (be32(&header, 20), be32(&header, 24));
    for _ in 0..MAX_BLOCKS {
        let node = block(next)?;
        if !node.starts_with(b"IAB3") {
            return Err(damaged("the tree of its inodes is damaged"));
        }
        if level > 1 {
            // Down to the leftmost leaf: pointers lie behind the room for all keys.
            next = be32(&node, 56 + (BLOCK as usize - 56) / 8 * 4);
            level -= 1;
            continue;
        }
        for record in 0..usize::from(u16::from_be_bytes(field(&node, 6))) {
            let first = u64::from(be32(&node, 56 + record * 16));
            chunk(image, path, first * INODE as u64, epoch)?;
        }
        next = be32(&node, 12);
        if next == u32::MAX {
            return Ok(());
        }
    }
    Err(damaged("the tree of its inodes has no end"))
}

/// 64 inodes in a row.
fn chunk(image: &File, path: &Path, at: u64, epoch: u32) -> Result<()> {
    let stamp = ((EPOCH + u64::from(epoch)) * 1_000_000_000).to_be_bytes();
    let mut inodes = vec![0; 64 * INODE];
    image.read_exact_at(&mut inodes, at).map_err(Error::io("read", path))?;
    for inode in inodes.as_chunks_mut::<INODE>().0 {
        let used = be32(inode, 0) & 0xffff != 0;
        let empty: [u8; 8] = [0; 8];
        // Access, change of content, change of the inode, creation; in an inode that is free they are zero.
        for at in [32, 40, 48, 144] {
            put(inode, at, if used { &stamp } else { &empty });
        }
        put(inode, 92, &[0; 4]);
        put(inode, 100, &[0; 4]);
        let sum = !crc32c::update(!0, inode);
        put(inode, 100, &sum.to_le_bytes());
    }
    image.write_all_at(&inodes, at).map_err(Error::io("write", path))
}

fn be32(block: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(field(block, at))
}

fn put(block: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = block.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

fn unusable(entry: &Entry, reason: &str) -> Error {
    Error::Format { path: entry.source.clone(), reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_mkfs_that_knows_the_newer_features_is_told_to_leave_them_out() {
        let old = "/* inode size */\t[-i perblock=n,nrext64=0|1]\n/* naming */\t\t[-n size=num,ftype=0|1]\n";
        assert!(newer(old).is_empty());
        let middle = "[-i nrext64=0|1,exchange=0|1]\n[-n size=num,ftype=0|1]";
        assert_eq!(newer(middle), ["-i", "exchange=0"]);
        let new = "[-i nrext64=0|1,exchange=0|1,max_atomic_write=n]\n[-n ftype=0|1,parent=0|1]]";
        assert_eq!(newer(new), ["-i", "exchange=0", "-n", "parent=0"]);
    }
}
