//! Results of every file system's reader: an inode, and the names in a folder.

/// Inodes looked at.
pub(super) const MAX_INODES: usize = 100_000;
/// Bytes of a block.
pub(super) const BLOCK: usize = 4096;

/// Names in a folder, each with the number of its inode.
pub(super) type Names = Vec<(u64, Vec<u8>)>;

/// An inode, as far as a list of files needs it.
pub(super) struct Inode {
    pub(super) mode: u16,
    pub(super) size: u64,
    /// As the file system has it: an ext4 inode's block map, the start of the others'.
    pub(super) raw: [u8; 64],
    /// ext4's flags, the others' format.
    pub(super) flags: u32,
    pub(super) at: u64,
}
