//! Builds disk images and initrds; [`crate::layout`] has where the parts of a disk image lie.

use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use crate::check;
use crate::elf::Arch;
use crate::layout::{ALIGN, DAX_OFFSET, FS_OFFSET, MAX_SIZE, partition, size_problem};
use crate::mbr;
use crate::pfn::{self, Superblock};
use crate::source::copy;
use crate::tree::Entry;
use crate::verity::{self, Verity};
use crate::{Error, Result, cpio, erofs, ext4, tree, xfs};

/// Options of a build.
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

/// Content of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    /// File system.
    pub fs: FileSystem,
    /// Bytes to leave free in it, at least.
    pub reserve: u64,
    /// True if a hash tree for dm-verity lies behind it.
    pub verity: bool,
}

/// Sizes of the parts of the partition, and their content.
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
            // Who looks for the tree looks behind the file system: that must be as large as it was told to
            // be.
            if verity::offset(file, path)? != Some(layout.fs) {
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

/// Writes both tables and the superblock into `output` and leaves all other bytes as they are. The file is
/// made, full of zeros, when `size` is given; else it must exist. Gives back its size in bytes.
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
