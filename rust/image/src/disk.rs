//! The disk image: one file, two ways to read it.
//!
//! | at | what | read by |
//! |---|---|---|
//! | 0 | MBR, partition 1 at 3 MiB | virtio-blk: `/dev/vda1` |
//! | 4096 | PFN superblock, data at 2 MiB | the kernel's nvdimm driver |
//! | 2 MiB | MBR, partition 1 at 1 MiB from here | pmem with DAX: `/dev/pmem0p1` |
//! | 3 MiB | file system | both |
//! | behind it | dm-verity's superblock and hash tree, if wanted | both |
//!
//! The whole file is a multiple of 2 MiB: the kernel maps pmem in pieces of that size and refuses others.

use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use crate::check::{self, Arch};
use crate::mbr::{self, Partition, SECTOR};
use crate::pfn::{self, Superblock};
use crate::tree::Entry;
use crate::verity::{self, Verity};
use crate::{Error, MIB, Result, cpio, erofs, ext4, report, tree, xfs};

/// Start of the data a DAX reader sees, and the alignment of the whole, bytes.
pub const DAX_OFFSET: u64 = 2 * MIB;
/// Alignment the superblock asks for: the size of a huge page, bytes.
pub const ALIGN: u32 = 2 << 20;
/// Where the file system begins, bytes.
pub const FS_OFFSET: u64 = 3 * MIB;
/// An MBR counts 512 byte sectors in 32 bits.
const MAX_SIZE: u64 = (u32::MAX as u64) * SECTOR;

/// What to build.
#[derive(Debug, Clone)]
pub struct Options<'a> {
    /// Folder that becomes the guest's root.
    pub rootfs: &'a Path,
    /// File to write; replaced in one step when it exists.
    pub output: &'a Path,
    /// Machine the image is for.
    pub arch: Arch,
    /// Seconds since 1970 for every time stamp.
    pub epoch: u32,
}

/// File systems an image can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4, no journal.
    Ext4,
    /// EROFS, nothing packed.
    Erofs,
    /// XFS, at least 16 MiB, of which its log takes 6.5.
    Xfs,
}

/// What is in a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    /// File system.
    pub fs: FileSystem,
    /// Bytes to leave free in it, at least.
    pub reserve: u64,
    /// Whether a hash tree for dm-verity lies behind it.
    pub verity: bool,
}

/// Where the parts of the partition are, and what fills them.
struct Layout {
    /// Bytes of the file system.
    fs: u64,
    /// Bytes of the whole image.
    size: u64,
    inodes: u64,
    erofs: Option<erofs::Plan>,
}

/// Builds a disk image. Gives back what dm-verity has to be told.
///
/// # Errors
/// When the root cannot boot or be read, a tool is missing or fails, or the file cannot be written.
pub fn build(options: &Options<'_>, content: Content) -> Result<Option<Verity>> {
    let root = absolute(options.rootfs)?;
    let entries = tree::walk(&root)?;
    check::init(&root, Path::new("/sbin/init"), options.arch)?;
    let layout = layout(&entries, content)?;
    let mut verity = None;
    replace(options.output, |file, path| {
        file.set_len(layout.size).map_err(Error::io("set the size of", path))?;
        fill(file, path, &layout, content.fs, &entries, options.epoch)?;
        if content.verity {
            let made = verity::append(file, path, FS_OFFSET, layout.fs, options.epoch)?;
            // Who looks for the tree looks behind the file system: that must be as large as it was told to be.
            if report::verity_offset(file, path)? != Some(layout.fs) {
                return Err(Error::Size("the file system is smaller than asked for; add a reserve".into()));
            }
            verity = Some(made);
        }
        write_tables(file, path, layout.size)
    })?;
    Ok(verity)
}

fn layout(entries: &[Entry], content: Content) -> Result<Layout> {
    let (mut inodes, mut plan) = (0, None);
    let needed = match content.fs {
        FileSystem::Ext4 => {
            let plan = ext4::plan(entries, content.reserve);
            inodes = plan.inodes;
            plan.bytes
        }
        FileSystem::Erofs if content.reserve > 0 => {
            return Err(Error::Size("EROFS is never written to: it takes no reserve".into()));
        }
        FileSystem::Erofs => plan.insert(erofs::plan(entries)?).bytes(),
        FileSystem::Xfs => xfs::size(entries, content.reserve).next_multiple_of(ext4::BLOCK),
    };
    let tree = if content.verity { verity::size(needed) } else { 0 };
    let size = needed.checked_add(FS_OFFSET + tree).and_then(|s| s.checked_next_multiple_of(DAX_OFFSET));
    let size =
        size.filter(|s| *s <= MAX_SIZE).ok_or_else(|| Error::Size("is beyond the 2 TiB of an MBR".into()))?;
    // What rounding leaves is the file system's, unless a tree lies behind it.
    let fs = if content.verity { needed } else { size - FS_OFFSET };
    Ok(Layout { fs, size, inodes, erofs: plan })
}

fn fill(
    file: &File,
    path: &Path,
    layout: &Layout,
    fs: FileSystem,
    entries: &[Entry],
    epoch: u32,
) -> Result<()> {
    match (fs, &layout.erofs) {
        (FileSystem::Erofs, Some(plan)) => erofs::make(file, path, FS_OFFSET, plan, entries, epoch),
        (FileSystem::Xfs, _) => {
            // mkfs.xfs knows no offset.
            let alone = beside(path)?;
            alone.as_file().set_len(layout.fs).map_err(Error::io("set the size of", path))?;
            xfs::make(alone.path(), entries, epoch)?;
            copy(alone.as_file(), 0, file, FS_OFFSET, layout.fs).map_err(Error::io("write", path))
        }
        _ => ext4::make(path, FS_OFFSET, layout.fs, layout.inodes, entries, epoch),
    }
}

/// An empty file in the folder of `path`, gone when dropped.
pub(crate) fn beside(path: &Path) -> Result<tempfile::NamedTempFile> {
    let folder = path.parent().unwrap_or(Path::new("."));
    tempfile::Builder::new()
        .prefix(".kuasar-image-")
        .tempfile_in(folder)
        .map_err(Error::io("create a file in", folder))
}

/// Copies bytes, holes where they are zero; where they go must be zero.
pub(crate) fn copy(from: &File, from_at: u64, to: &File, to_at: u64, length: u64) -> std::io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    let mut done = 0;
    while done < length {
        let part = usize::try_from(length - done).unwrap_or(usize::MAX).min(buffer.len());
        let piece = buffer.get_mut(..part).unwrap_or_default();
        from.read_exact_at(piece, from_at + done)?;
        if piece.iter().any(|byte| *byte != 0) {
            to.write_all_at(piece, to_at + done)?;
        }
        done += part as u64;
    }
    Ok(())
}

/// Builds an initrd of the same kind of root; the kernel starts `/init` in it.
///
/// # Errors
/// When the root cannot boot or be read, or the file cannot be written.
pub fn build_initrd(options: &Options<'_>, packing: cpio::Packing) -> Result<()> {
    let root = absolute(options.rootfs)?;
    let entries = tree::walk(&root)?;
    check::init(&root, Path::new("/init"), options.arch)?;
    replace(options.output, |file, path| cpio::write(file, path, &entries, options.epoch, packing))
}

/// Writes both tables and the superblock into `output` and leaves all other bytes as they are. The file is made, full
/// of zeros, when `size` is given; else it must exist. Gives back its size in bytes.
///
/// # Errors
/// When the size cannot be an image's, or the file cannot be written.
pub fn write_header(output: &Path, size: Option<u64>) -> Result<u64> {
    let mut open = OpenOptions::new();
    open.read(true).write(true);
    let file = match size {
        Some(size) => {
            check_size(size)?;
            let file = open.create_new(true).open(output).map_err(Error::io("create", output))?;
            file.set_len(size).map_err(Error::io("set the size of", output))?;
            file
        }
        None => open.open(output).map_err(Error::io("open", output))?,
    };
    let size = file.metadata().map_err(Error::io("read the size of", output))?.len();
    check_size(size)?;
    write_tables(&file, output, size)?;
    Ok(size)
}

/// Partition 1 as the table at `table` bytes sees it, for an image of `size` bytes.
#[must_use]
pub fn partition(size: u64, table: u64) -> Partition {
    let sectors = |bytes: u64| u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX);
    Partition {
        kind: mbr::TYPE_LINUX,
        start: sectors(FS_OFFSET - table),
        sectors: sectors(size.saturating_sub(FS_OFFSET)),
    }
}

/// Why a file of `size` bytes cannot be an image: too small, too large, or no multiple of 2 MiB.
pub(crate) fn size_problem(size: u64) -> Option<&'static str> {
    if size <= FS_OFFSET {
        Some("leaves no room for a file system behind the first 3 MiB")
    } else if !size.is_multiple_of(DAX_OFFSET) {
        Some("is no multiple of 2 MiB, which DAX needs")
    } else {
        (size > MAX_SIZE).then_some("is beyond the 2 TiB of an MBR")
    }
}

fn check_size(size: u64) -> Result<()> {
    size_problem(size).map_or(Ok(()), |problem| Err(Error::Size(format!("{size} bytes {problem}"))))
}

fn write_tables(file: &File, path: &Path, size: u64) -> Result<()> {
    let superblock = Superblock::new(DAX_OFFSET, ALIGN);
    let parts: [(u64, &[u8]); 3] = [
        (0, &mbr::encode(partition(size, 0))),
        (pfn::OFFSET, &superblock.encode()),
        (DAX_OFFSET, &mbr::encode(partition(size, DAX_OFFSET))),
    ];
    for (at, bytes) in parts {
        file.write_all_at(bytes, at).map_err(Error::io("write", path))?;
    }
    Ok(())
}

fn absolute(path: &Path) -> Result<std::path::PathBuf> {
    path.canonicalize().map_err(Error::io("read the root file system", path))
}

/// Lets `fill` write a new file next to `output` and puts it in place only when that worked.
fn replace(output: &Path, fill: impl FnOnce(&File, &Path) -> Result<()>) -> Result<()> {
    let folder = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = tempfile::Builder::new()
        .prefix(".kuasar-image-")
        .permissions(Permissions::from_mode(0o644))
        .tempfile_in(folder)
        .map_err(Error::io("create a file in", folder))?;
    fill(temporary.as_file(), temporary.path())?;
    temporary.as_file().sync_all().map_err(Error::io("flush", output))?;
    temporary.persist(output).map_err(|e| e.error).map_err(Error::io("write", output))?;
    Ok(())
}
