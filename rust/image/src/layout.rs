//! The layout of a disk image: one file, two ways to read it.
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

use crate::MIB;
use crate::mbr::{self, Partition, SECTOR};

/// Start of the data a DAX reader sees, and the alignment of the whole, bytes.
pub const DAX_OFFSET: u64 = 2 * MIB;
/// Alignment the superblock asks for: the size of a huge page, bytes.
pub const ALIGN: u32 = 2 << 20;
/// Offset of the file system, bytes.
pub const FS_OFFSET: u64 = 3 * MIB;
/// An MBR counts 512 byte sectors in 32 bits.
pub(crate) const MAX_SIZE: u64 = (u32::MAX as u64) * SECTOR;

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
