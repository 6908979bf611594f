//! Builds, inspects and verifies guest images.
//!
//! * [`cpio`]: the initrd, a deterministic newc archive of a root file system;
//! * [`disk`]: the disk image, one file that boots as plain virtio-blk and as pmem with DAX;
//! * [`pfn`]: the superblock by which the kernel's nvdimm driver finds the DAX data in that file;
//! * [`layout`]: where the parts of the disk image lie;
//! * [`examine`]: makes the [`report`] that `inspect` prints and `verify` judges.
//!
//! Everything written depends on the content of the root file system only: no clock, no random number, no
//! order of a directory listing, no owner or time stamp of the builder's files. `SOURCE_DATE_EPOCH`, when
//! set, is the one time used.

pub mod archive;
pub mod check;
pub mod cpio;
mod crc32c;
pub mod disk;
pub mod elf;
pub mod erofs;
pub mod error;
pub mod examine;
pub mod ext4;
mod gpt;
pub mod layout;
mod list;
pub mod mbr;
pub mod pfn;
pub mod report;
pub mod source;
mod superblock;
mod systemd;
mod tool;
pub mod tree;
pub mod verity;
pub mod xfs;

pub use error::{Error, Result};

/// Bytes in one mebibyte.
pub const MIB: u64 = 1 << 20;

/// Reads `SOURCE_DATE_EPOCH`: seconds since 1970, 0 when unset.
///
/// # Errors
/// When it is set to something that is no number of seconds a 32 bit inode or cpio field can hold.
pub fn source_date_epoch() -> Result<u32> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Err(std::env::VarError::NotPresent) => Ok(0),
        Ok(text) => text.trim().parse().map_err(|_| Error::Epoch(text)),
        Err(std::env::VarError::NotUnicode(raw)) => Err(Error::Epoch(raw.to_string_lossy().into_owned())),
    }
}
