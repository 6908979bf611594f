//! dm-verity: a tree of hashes behind the file system, whose root on the kernel's command line vouches for
//! every block. `veritysetup` makes it and checks it.

use std::fmt;
use std::fs::File;
use std::path::Path;

use crate::ext4::BLOCK;
use crate::layout::FS_OFFSET;
use crate::report::Report;
use crate::source::{self, FileSource, copy};
use crate::tool::Tool;
use crate::{Error, Result, superblock};

/// First bytes of a dm-verity superblock (`struct verity_sb` of veritysetup).
pub(crate) const MAGIC: &[u8; 8] = b"verity\0\0";
const VERITYSETUP: Tool = Tool::new("veritysetup", "cryptsetup");
/// UUID of every tree made here; an image is known by its root hash, not by this.
const UUID: &str = "6b756173-6172-4000-8000-000000000005";
const HASHES_PER_BLOCK: u64 = BLOCK / 32;

/// Parameters for the kernel. The tree begins in the block after the superblock, which is behind the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verity {
    /// SHA-256 of the tree's root, hexadecimal.
    pub root_hash: String,
    /// Blocks of 4096 bytes that it covers.
    pub data_blocks: u64,
}

/// As the daemon's configuration has it.
impl fmt::Display for Verity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "root_hash = \"{}\"\ndata_blocks = {}", self.root_hash, self.data_blocks)
    }
}

/// Bytes of the superblock and the tree for `data` bytes.
#[must_use]
pub fn size(data: u64) -> u64 {
    let mut level = data.div_ceil(BLOCK);
    let mut blocks = 1;
    loop {
        level = level.div_ceil(HASHES_PER_BLOCK);
        blocks += level;
        if level <= 1 {
            return blocks * BLOCK;
        }
    }
}

/// Finds the tree's superblock: bytes from the start of the file system, or none if there is no tree.
pub(crate) fn offset(file: &File, path: &Path) -> Result<Option<u64>> {
    let size = file.metadata().map_err(Error::io("read the size of", path))?.len();
    let image = FileSource { file, size };
    let io = |e| Error::io("read", path)(e);
    let start = source::block(&image, FS_OFFSET).map_err(io)?;
    let room = size.saturating_sub(FS_OFFSET);
    let found = superblock::examine(&mut Report::default(), "", &start, room);
    let Some((_, bytes)) = found.filter(|(_, bytes)| *bytes > 0) else { return Ok(None) };
    let sb: [u8; 8] = source::block(&image, FS_OFFSET + bytes).map_err(Error::io("read", path))?;
    Ok((sb == *MAGIC).then_some(bytes))
}

/// Puts the tree behind the `data` bytes at `offset`.
pub(crate) fn append(image: &File, path: &Path, offset: u64, data: u64, epoch: u32) -> Result<Verity> {
    let (alone, data_blocks) = extract(image, path, offset, data, 0)?;
    let mut command = command(alone.path(), epoch)?;
    command.arg("format").args(arguments(data)).args(["--salt=-", "--uuid", UUID]);
    let name = alone.path().file_name().unwrap_or_default();
    let output = VERITYSETUP.run(command.arg(name).arg(name))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let root_hash =
        said.lines().find_map(|line| line.strip_prefix("Root hash:")).map(|hash| hash.trim().to_owned());
    let root_hash = root_hash.ok_or_else(|| VERITYSETUP.failed_with("it named no root hash".into()))?;
    let made = alone.as_file().metadata().map_err(Error::io("read the size of", path))?.len();
    if made != data + size(data) {
        return Err(VERITYSETUP.failed_with(format!(
            "its tree has {} bytes, not {}",
            made - data,
            size(data)
        )));
    }
    copy(alone.as_file(), data, image, offset + data, size(data)).map_err(Error::io("write", path))?;
    Ok(Verity { root_hash, data_blocks })
}

/// Checks every block of a disk image against a root hash.
///
/// # Errors
/// When a block or the tree differs, the image has none, the hash is no hash, or `veritysetup` is missing.
pub fn check(path: &Path, root_hash: &str) -> Result<()> {
    if root_hash.len() != 64 || !root_hash.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(Error::RootHash(root_hash.to_owned()));
    }
    let image = File::open(path).map_err(Error::io("open", path))?;
    let wrong = |reason: String| Error::Format { path: path.to_owned(), reason };
    let data = self::offset(&image, path)?
        .ok_or_else(|| wrong("has no dm-verity tree behind its file system".into()))?;
    let (alone, _) = extract(&image, path, FS_OFFSET, data, size(data))?;
    let name = alone.path().file_name().unwrap_or_default();
    let mut command = command(alone.path(), 0)?;
    command.arg("verify").arg(format!("--hash-offset={data}")).arg(name).arg(name).arg(root_hash);
    let output = VERITYSETUP.output(&mut command)?;
    let said = VERITYSETUP.said(&output);
    let changed = || wrong(format!("is not what this root hash stands for: {said} (veritysetup)"));
    if output.status.success() { Ok(()) } else { Err(changed()) }
}

/// The file system, and what is behind it, in a file of its own.
fn extract(
    image: &File,
    path: &Path,
    offset: u64,
    data: u64,
    more: u64,
) -> Result<(tempfile::NamedTempFile, u64)> {
    let folder = std::env::temp_dir();
    let alone = tempfile::NamedTempFile::new().map_err(Error::io("create a file in", &folder))?;
    alone.as_file().set_len(data + more).map_err(Error::io("set the size of", alone.path()))?;
    copy(image, offset, alone.as_file(), 0, data + more).map_err(Error::io("copy from", path))?;
    Ok((alone, data / BLOCK))
}

fn arguments(data: u64) -> [String; 5] {
    [
        "--hash=sha256".to_owned(),
        "--data-block-size=4096".to_owned(),
        "--hash-block-size=4096".to_owned(),
        format!("--data-blocks={}", data / BLOCK),
        format!("--hash-offset={data}"),
    ]
}

fn command(file: &Path, epoch: u32) -> Result<std::process::Command> {
    VERITYSETUP.command(file.parent().unwrap_or(Path::new("")), epoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_count_every_level_and_the_superblock() {
        assert_eq!(size(4096), 2 * 4096);
        assert_eq!(size(128 * 4096), 2 * 4096);
        assert_eq!(size(129 * 4096), 4 * 4096);
        assert_eq!(size(20_000 * 4096), (1 + 157 + 2 + 1) * 4096);
    }
}
