//! Inodes and folders of XFS: version 5, blocks of 4096 bytes, also for folders. Big endian, as the kernel's
//! `xfs_format.h` and `xfs_da_format.h` have it.

use std::io;

use super::inode::{BLOCK, Inode, MAX_INODES, Names};
use crate::pfn::field;
use crate::source::{self, Source};

/// End of an inode's own fields. Its extents or names follow.
const CORE: usize = 176;
/// A folder's index lies from here on, beyond its names.
const INDEX: u64 = 32 << 30;
const MAX_INODE: usize = 2048;
/// Trees of extents have up to five levels.
const MAX_LEVELS: usize = 8;
/// Of an inode: its extents are counted in 64 bits.
const LARGE_COUNT: u64 = 1 << 4;

pub(super) struct Xfs<'a> {
    image: &'a dyn Source,
    at: u64,
    pub(super) root: u64,
    /// Blocks of a group, and bits of a number that say which of them.
    group: (u64, u32),
    /// Bytes of an inode, and bits of a number that say which of its block.
    inode: (usize, u32),
    /// True if a byte behind each name gives the type of the entry.
    kinds: bool,
}

impl<'a> Xfs<'a> {
    pub(super) fn new(image: &'a dyn Source, at: u64) -> io::Result<Option<Self>> {
        let sb: [u8; 256] = source::block(image, at)?;
        let u16_at = |at| u16::from_be_bytes(field(&sb, at));
        let u32_at = |at| u32::from_be_bytes(field(&sb, at));
        let [inode_bits, group_bits] = field(&sb, 123);
        let [folder_bits] = field(&sb, 192);
        let volume = Self {
            image,
            at,
            root: u64::from_be_bytes(field(&sb, 56)),
            group: (u64::from(u32_at(84)), u32::from(group_bits)),
            inode: (usize::from(u16_at(104)), u32::from(inode_bits)),
            kinds: u32_at(216) & 1 != 0,
        };
        let (size, bits) = volume.inode;
        let known = u32_at(4) == 4096 && u16_at(100) & 0xf == 5 && folder_bits == 0;
        let sane = group_bits < 32 && bits < 8 && (256..=MAX_INODE).contains(&size) && size << bits == BLOCK;
        Ok((known && sane).then_some(volume))
    }

    /// Offset of a block. The upper bits of its number are its group's.
    fn place(&self, block: u64) -> u64 {
        let (blocks, bits) = self.group;
        let in_group = block & ((1 << bits) - 1);
        let block = (block >> bits).saturating_mul(blocks).saturating_add(in_group);
        block.saturating_mul(BLOCK as u64).saturating_add(self.at)
    }

    pub(super) fn inode(&self, number: u64) -> io::Result<Option<Inode>> {
        let (size, bits) = self.inode;
        let index = number & ((1 << bits) - 1);
        let at = self.place(number >> bits).saturating_add(index * size as u64);
        let raw: [u8; CORE] = source::block(self.image, at)?;
        let [version, format] = field(&raw, 4);
        Ok((raw.starts_with(b"IN") && version == 3).then(|| Inode {
            mode: u16::from_be_bytes(field(&raw, 2)),
            size: u64::from_be_bytes(field(&raw, 56)),
            raw: field(&raw, 0),
            flags: u32::from(format),
            at,
        }))
    }

    pub(super) fn folder(&self, inode: &Inode, budget: &mut usize, names: &mut Names) -> io::Result<()> {
        let raw: [u8; MAX_INODE] = source::block(self.image, inode.at)?;
        let [fork] = field(&raw, 82);
        // Attributes, if there are any, lie behind what is wanted.
        let end = if fork == 0 { self.inode.0 } else { self.inode.0.min(CORE + usize::from(fork) * 8) };
        let fork = raw.get(CORE..end).unwrap_or_default();
        match inode.flags {
            1 => self.short(fork, names),
            2 => {
                let large = u64::from_be_bytes(field(&raw, 120)) & LARGE_COUNT != 0;
                let count = if large {
                    u64::from_be_bytes(field(&raw, 24))
                } else {
                    u64::from(u32::from_be_bytes(field(&raw, 76)))
                };
                self.extents(fork, usize::try_from(count).unwrap_or(usize::MAX), budget, names)?;
            }
            3 => {
                let count = u16::from_be_bytes(field(fork, 2));
                self.nodes(fork.get(4..).unwrap_or_default(), count, MAX_LEVELS, budget, names)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// The names of a small folder, which lie in its inode; numbers are short unless one is long.
    fn short(&self, fork: &[u8], names: &mut Names) {
        let [count, long] = field(fork, 0);
        let width = if long == 0 { 4 } else { 8 };
        // Behind the number of the folder above.
        let mut at = 2 + width;
        for _ in 0..count {
            let [length] = field(fork, at);
            let end = at + 3 + usize::from(length);
            let number = end + usize::from(self.kinds);
            let Some(name) = fork.get(at + 3..end).filter(|_| number + width <= fork.len()) else { return };
            let number = if long == 0 {
                u64::from(u32::from_be_bytes(field(fork, number)))
            } else {
                u64::from_be_bytes(field(fork, number))
            };
            names.push((number, name.to_vec()));
            at = end + usize::from(self.kinds) + width;
        }
    }

    /// Nodes of a tree of extents: room for keys, then as much for the numbers of blocks.
    fn nodes(
        &self,
        entries: &[u8],
        count: u16,
        levels: usize,
        budget: &mut usize,
        names: &mut Names,
    ) -> io::Result<()> {
        let numbers = entries.get(entries.len() / 16 * 8..).unwrap_or_default();
        for number in numbers.as_chunks().0.iter().take(usize::from(count)) {
            if *budget == 0 || levels == 0 {
                return Ok(());
            }
            *budget -= 1;
            let block: [u8; BLOCK] = source::block(self.image, self.place(u64::from_be_bytes(*number)))?;
            let (level, count) = (u16::from_be_bytes(field(&block, 4)), u16::from_be_bytes(field(&block, 6)));
            let entries = block.get(72..).unwrap_or_default();
            match level {
                _ if !block.starts_with(b"BMA3") => {}
                0 => self.extents(entries, usize::from(count), budget, names)?,
                _ => self.nodes(entries, count, levels - 1, budget, names)?,
            }
        }
        Ok(())
    }

    /// Extents of a folder: bits 73 to 126 say where in it, 21 to 72 the first block, 0 to 20 how many.
    fn extents(&self, extents: &[u8], count: usize, budget: &mut usize, names: &mut Names) -> io::Result<()> {
        for extent in extents.as_chunks().0.iter().take(count) {
            let extent = u128::from_be_bytes(*extent);
            let bits = |from: u32, count: u32| (extent >> from) as u64 & ((1 << count) - 1);
            if bits(73, 54) >= INDEX / BLOCK as u64 {
                continue;
            }
            for number in bits(21, 52)..bits(21, 52) + bits(0, 21) {
                if *budget == 0 || names.len() > MAX_INODES {
                    return Ok(());
                }
                *budget -= 1;
                self.names(&source::block(self.image, self.place(number))?, names);
            }
        }
        Ok(())
    }

    /// The names in a block of a folder. A folder of one block has its index at the end of it.
    fn names(&self, block: &[u8; BLOCK], names: &mut Names) {
        let end = if block.starts_with(b"XDD3") {
            BLOCK
        } else if block.starts_with(b"XDB3") {
            let indexed = u32::from_be_bytes(field(block, BLOCK - 8));
            (BLOCK - 8).saturating_sub(usize::try_from(indexed).unwrap_or(BLOCK).saturating_mul(8))
        } else {
            return;
        };
        let mut at = 64;
        while at + 8 < end {
            if field(block, at) == [0xff, 0xff] {
                let unused = usize::from(u16::from_be_bytes(field(block, at + 2)));
                at += unused.max(8);
                continue;
            }
            let [length] = field(block, at + 8);
            let after = at + 9 + usize::from(length);
            let Some(name) = block.get(at + 9..after).filter(|_| length > 0 && after <= end) else { return };
            names.push((u64::from_be_bytes(field(block, at)), name.to_vec()));
            // Behind the name, where the entry is.
            at = (after + usize::from(self.kinds) + 2).next_multiple_of(8);
        }
    }
}
