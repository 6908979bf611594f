//! Finds the largest files of an ext4, EROFS or XFS file system. The bytes may come from anywhere: whatever
//! they claim, the work is bounded, and what makes no sense is left out.

mod inode;
mod xfs;

use std::collections::BTreeSet;
use std::io;

use crate::pfn::field;
use crate::source::{self, Source};
use crate::superblock::Known;
use inode::{BLOCK, Inode, MAX_INODES, Names};
use xfs::Xfs;

/// Blocks of folders read.
const MAX_BLOCKS: usize = 100_000;
const MAX_DEPTH: usize = 64;
/// Bytes of a path, escaped.
const MAX_PATH: usize = 4096;

/// A file's size and its path, escaped for a terminal.
pub(crate) type Found = (u64, String);

/// The `count` largest regular files, or none where the file system cannot be walked.
pub(crate) fn largest(image: &dyn Source, at: u64, known: Known, count: usize) -> io::Result<Vec<Found>> {
    let mut files = Vec::new();
    let mut budget = (MAX_INODES, MAX_BLOCKS);
    let volume = match known {
        Known::Ext4 => Ext4::new(image, at)?.map(Volume::Ext4),
        Known::Erofs => Some(Volume::Erofs(Erofs::new(image, at)?)),
        Known::Xfs => Xfs::new(image, at)?.map(Volume::Xfs),
    };
    let Some(volume) = volume else { return Ok(files) };
    let mut seen = BTreeSet::new();
    let mut pending = vec![(volume.root(), String::new(), 0)];
    while let Some((number, path, depth)) = pending.pop() {
        if budget.0 == 0 || depth > MAX_DEPTH || path.len() > MAX_PATH || !seen.insert(number) {
            continue;
        }
        budget.0 -= 1;
        let Some(inode) = volume.inode(number)? else { continue };
        match inode.mode & 0o170_000 {
            0o040_000 => {
                for (child, name) in volume.folder(&inode, &mut budget.1)? {
                    if name != b"." && name != b".." && pending.len() < MAX_INODES {
                        pending.push((child, format!("{path}/{}", name.escape_ascii()), depth + 1));
                    }
                }
            }
            0o100_000 => files.push((inode.size, path)),
            _ => {}
        }
    }
    files.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    files.truncate(count);
    Ok(files)
}

enum Volume<'a> {
    Ext4(Ext4<'a>),
    Erofs(Erofs<'a>),
    Xfs(Xfs<'a>),
}

impl Volume<'_> {
    fn root(&self) -> u64 {
        match self {
            Self::Ext4(_) => 2,
            Self::Erofs(erofs) => erofs.root,
            Self::Xfs(xfs) => xfs.root,
        }
    }

    fn inode(&self, number: u64) -> io::Result<Option<Inode>> {
        match self {
            Self::Ext4(ext4) => ext4.inode(number),
            Self::Erofs(erofs) => erofs.inode(number),
            Self::Xfs(xfs) => xfs.inode(number),
        }
    }

    fn folder(&self, inode: &Inode, budget: &mut usize) -> io::Result<Names> {
        let mut names = Names::new();
        match self {
            Self::Ext4(ext4) => ext4.folder(&inode.raw, 0, budget, &mut names)?,
            Self::Erofs(erofs) => erofs.folder(inode, budget, &mut names)?,
            Self::Xfs(xfs) => xfs.folder(inode, budget, &mut names)?,
        }
        Ok(names)
    }
}

struct Ext4<'a> {
    image: &'a dyn Source,
    at: u64,
    inodes_per_group: u64,
    inode_size: u64,
    descriptor_size: u64,
    inodes: u64,
}

impl<'a> Ext4<'a> {
    /// 4096 byte blocks and group descriptors in a row only: what every builder of images makes.
    fn new(image: &'a dyn Source, at: u64) -> io::Result<Option<Self>> {
        let sb: [u8; 1024] = source::block(image, at + 1024)?;
        let u16_at = |at| u64::from(u16::from_le_bytes(field(&sb, at)));
        let u32_at = |at| u32::from_le_bytes(field(&sb, at));
        let wide = u32_at(96) & 0x80 != 0;
        let volume = Self {
            image,
            at,
            inodes_per_group: u64::from(u32_at(40)),
            inode_size: if u32_at(76) == 0 { 128 } else { u16_at(88) },
            descriptor_size: if wide { u16_at(254) } else { 32 },
            inodes: u64::from(u32_at(0)),
        };
        let sane = volume.inodes_per_group > 0 && volume.inode_size >= 128 && u32_at(96) & 0x10 == 0;
        Ok((sane && u32_at(24) == 2).then_some(volume))
    }

    fn inode(&self, number: u64) -> io::Result<Option<Inode>> {
        if number == 0 || number > self.inodes {
            return Ok(None);
        }
        let (group, index) = ((number - 1) / self.inodes_per_group, (number - 1) % self.inodes_per_group);
        let descriptor: [u8; 64] =
            source::block(self.image, self.at + BLOCK as u64 + group * self.descriptor_size)?;
        let low = u64::from(u32::from_le_bytes(field(&descriptor, 8)));
        let high = if self.descriptor_size >= 64 { u32::from_le_bytes(field(&descriptor, 40)) } else { 0 };
        let table = (low | u64::from(high) << 32).saturating_mul(BLOCK as u64);
        let at = table.saturating_add(self.at + index * self.inode_size);
        let raw: [u8; 128] = source::block(self.image, at)?;
        let size = u64::from(u32::from_le_bytes(field(&raw, 4)));
        Ok(Some(Inode {
            mode: u16::from_le_bytes(field(&raw, 0)),
            size: size | u64::from(u32::from_le_bytes(field(&raw, 108))) << 32,
            flags: u32::from_le_bytes(field(&raw, 32)),
            raw: field(&raw, 40),
            at,
        }))
    }

    /// Follows a node of an extent tree: header, then entries of 12 bytes.
    fn folder(&self, node: &[u8], depth: usize, budget: &mut usize, names: &mut Names) -> io::Result<()> {
        if u16::from_le_bytes(field(node, 0)) != 0xf30a || depth > 5 {
            return Ok(());
        }
        let count = usize::from(u16::from_le_bytes(field(node, 2)));
        let leaf = u16::from_le_bytes(field(node, 6)) == 0;
        for entry in node.get(12..).unwrap_or_default().chunks_exact(12).take(count) {
            let u16_at = |at| u64::from(u16::from_le_bytes(field(entry, at)));
            let u32_at = |at| u64::from(u32::from_le_bytes(field(entry, at)));
            let (start, length) = if leaf {
                (u32_at(8) | u16_at(6) << 32, u16_at(4))
            } else {
                (u32_at(4) | u16_at(8) << 32, 1)
            };
            for number in start..start + length.min(32768) {
                if *budget == 0 || names.len() > MAX_INODES {
                    return Ok(());
                }
                *budget -= 1;
                let at = number.saturating_mul(BLOCK as u64).saturating_add(self.at);
                let block: [u8; BLOCK] = source::block(self.image, at)?;
                if leaf { ext4_names(&block, names) } else { self.folder(&block, depth + 1, budget, names)? }
            }
        }
        Ok(())
    }
}

fn ext4_names(block: &[u8; BLOCK], names: &mut Names) {
    let mut at = 0;
    while at + 8 <= BLOCK {
        let number = u32::from_le_bytes(field(block, at));
        let length = usize::from(u16::from_le_bytes(field(block, at + 4)));
        let [name] = field(block, at + 6);
        if let (Some(name), true) = (block.get(at + 8..at + 8 + usize::from(name)), number != 0 && name != 0)
        {
            names.push((u64::from(number), name.to_vec()));
        }
        if length < 8 {
            return;
        }
        at += length;
    }
}

struct Erofs<'a> {
    image: &'a dyn Source,
    at: u64,
    root: u64,
    /// Offset of inode 0, if there were one.
    inodes: u64,
}

impl<'a> Erofs<'a> {
    fn new(image: &'a dyn Source, at: u64) -> io::Result<Self> {
        let sb: [u8; 128] = source::block(image, at + 1024)?;
        let first = u64::from(u32::from_le_bytes(field(&sb, 40)));
        Ok(Self {
            image,
            at,
            root: u64::from(u16::from_le_bytes(field(&sb, 14))),
            inodes: at + first * BLOCK as u64,
        })
    }

    fn inode(&self, number: u64) -> io::Result<Option<Inode>> {
        let at = number.saturating_mul(32).saturating_add(self.inodes);
        let raw: [u8; 64] = source::block(self.image, at)?;
        let format = u16::from_le_bytes(field(&raw, 0));
        let size = if format & 1 == 0 {
            u64::from(u32::from_le_bytes(field(&raw, 8)))
        } else {
            u64::from_le_bytes(field(&raw, 8))
        };
        Ok(Some(Inode { mode: u16::from_le_bytes(field(&raw, 4)), size, flags: u32::from(format), raw, at }))
    }

    fn folder(&self, inode: &Inode, budget: &mut usize, names: &mut Names) -> io::Result<()> {
        let layout = inode.flags >> 1 & 7;
        if layout != 0 && layout != 2 {
            return Ok(());
        }
        let block = BLOCK as u64;
        let start = u64::from(u32::from_le_bytes(field(&inode.raw, 16)))
            .saturating_mul(block)
            .saturating_add(self.at);
        let attributes = match u16::from_le_bytes(field(&inode.raw, 2)) {
            0 => 0,
            count => 12 + 4 * (u64::from(count) - 1),
        };
        // With the second layout, what does not fill a block lies behind the inode.
        let tail = inode.at.saturating_add(if inode.flags & 1 == 0 { 32 } else { 64 } + attributes);
        let mut done = 0;
        while done < inode.size && *budget > 0 && names.len() <= MAX_INODES {
            *budget -= 1;
            let length = (inode.size - done).min(block);
            let at = if layout == 2 && length < block { tail } else { start.saturating_add(done) };
            let mut piece: [u8; BLOCK] = source::block(self.image, at)?;
            let length = usize::try_from(length).unwrap_or(BLOCK);
            piece.get_mut(length..).unwrap_or_default().fill(0);
            erofs_names(piece.get(..length).unwrap_or_default(), names);
            done += block;
        }
        Ok(())
    }
}

fn erofs_names(block: &[u8], names: &mut Names) {
    let start = |entry: usize| usize::from(u16::from_le_bytes(field(block, entry * 12 + 8)));
    let count = start(0) / 12;
    for entry in 0..count.min(block.len() / 12) {
        let end = if entry + 1 < count { start(entry + 1) } else { block.len() };
        let name = block.get(start(entry)..end).unwrap_or_default();
        let name = name.split(|b| *b == 0).next().unwrap_or_default();
        if !name.is_empty() {
            names.push((u64::from_le_bytes(field(block, entry * 12)), name.to_vec()));
        }
    }
}
