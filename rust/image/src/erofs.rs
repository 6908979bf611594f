//! An EROFS file system from a tree: nothing packed, every file's content in whole blocks, so that each page
//! of it can be mapped by DAX.
//!
//! Written here and not by `mkfs.erofs`: that one stores files that happen to be hard links of each other as
//! one, so that a store that links equal files changes the image, and its bytes differ between releases. The
//! layout is that of the kernel's `fs/erofs/erofs_fs.h`.
//!
//! | block | what |
//! |---|---|
//! | 0 | superblock at 1024, inodes from 1152 on, short targets of links behind their inodes |
//! | then | the rest of the inodes |
//! | then | folders, long targets of links, content of files, each from a block of its own |

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::tree::{Entry, Kind};
use crate::{Error, Result, crc32c};

/// Block size, bytes. DAX needs blocks as large as pages.
pub const BLOCK: u64 = 4096;
/// Magic number of the superblock.
pub const MAGIC: u32 = 0xe0f5_e1e2;
/// Offset of the superblock, bytes.
pub const SUPER_OFFSET: u64 = 1024;
/// UUID of every EROFS made here; an image is known by its hash, not by its UUID.
const UUID: [u8; 16] = *b"kuasar\x40\x00\x80\x00\x00\x00\x00\x00\x00\x03";
const LABEL: &[u8; 6] = b"kuasar";

const FIRST_INODE: u64 = SUPER_OFFSET + 128;
/// Extended inodes, 64 bytes: sizes of 64 bits, link counts and owners of 32.
const INODE: u64 = 64;
/// Inodes are numbered in units of this.
const SLOT: u64 = 32;
const COMPAT_CHECKSUM: u32 = 1;
const DIRENT: usize = 12;

/// Placement of every inode and block.
#[derive(Debug)]
pub struct Plan {
    inodes: Vec<Inode>,
    /// Blocks of the whole.
    blocks: u64,
}

#[derive(Debug, Default)]
struct Inode {
    /// Bytes from the start of the file system.
    at: u64,
    size: u64,
    links: u32,
    /// First block of the content.
    data: u64,
    /// The content lies behind the inode.
    inline: bool,
    /// Encoded folder.
    folder: Vec<u8>,
}

impl Inode {
    fn number(&self) -> u64 {
        self.at / SLOT
    }
}

impl Plan {
    /// Bytes of the file system.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.blocks * BLOCK
    }
}

/// Decides where everything lies.
///
/// # Errors
/// When a name or a link's target is longer than EROFS takes, or there is too much of everything.
pub fn plan(entries: &[Entry]) -> Result<Plan> {
    let mut inodes: Vec<Inode> = Vec::with_capacity(entries.len());
    let mut at = FIRST_INODE;
    for entry in entries {
        let (size, inline) = match &entry.kind {
            Kind::File(size) => (*size, false),
            Kind::Symlink(target) if target.len() as u64 >= BLOCK => {
                return Err(unusable(entry, "is a link whose target is longer than 4095 bytes"));
            }
            Kind::Symlink(target) => (target.len() as u64, target.len() as u64 <= BLOCK - INODE),
            _ => (0, false),
        };
        let behind = if inline { size } else { 0 };
        // An inode and what lies behind it stay in one block.
        if at % BLOCK + INODE + behind > BLOCK {
            at = at.next_multiple_of(BLOCK);
        }
        inodes.push(Inode { at, size, links: 1, inline, ..Inode::default() });
        at = (at + INODE + behind).next_multiple_of(SLOT);
    }
    let mut plan = Plan { inodes, blocks: at.div_ceil(BLOCK) };
    folders(entries, &mut plan)?;
    for inode in &mut plan.inodes {
        if !inode.inline && inode.size > 0 {
            inode.data = plan.blocks;
            plan.blocks += inode.size.div_ceil(BLOCK);
        }
    }
    if plan.blocks > u64::from(u32::MAX) {
        return Err(Error::Size("is beyond the 16 TiB of an EROFS".into()));
    }
    Ok(plan)
}

/// An entry of a folder: name, number of the inode, type.
type Name<'a> = (&'a [u8], u64, u8);

/// Encodes every folder, and counts links of folders: one by its name, one by its `.`, one by the `..` of
/// each in it.
fn folders(entries: &[Entry], plan: &mut Plan) -> Result<()> {
    let index: BTreeMap<&[u8], usize> = entries.iter().enumerate().map(|(i, e)| (&*e.path, i)).collect();
    let mut lists: BTreeMap<usize, Vec<Name<'_>>> = BTreeMap::new();
    let number = |i: usize| plan.inodes.get(i).map_or(0, Inode::number);
    let mut links: BTreeMap<usize, u32> = BTreeMap::new();
    for (i, entry) in entries.iter().enumerate() {
        let (parent, name) = split(&entry.path);
        let parent = index.get(parent).copied().unwrap_or(0);
        if entry.kind == Kind::Dir {
            let own = lists.entry(i).or_default();
            own.push((b".", number(i), 2));
            own.push((b"..", number(parent), 2));
            *links.entry(i).or_default() += 2;
            if i != parent {
                *links.entry(parent).or_default() += 1;
            }
        }
        if name.len() > 255 {
            return Err(unusable(entry, "has a name longer than 255 bytes"));
        }
        if !name.is_empty() {
            lists.entry(parent).or_default().push((name, number(i), file_type(&entry.kind)));
        }
    }
    for (i, mut list) in lists {
        list.sort_unstable();
        if let Some(inode) = plan.inodes.get_mut(i) {
            inode.folder = encode_folder(&list);
            inode.size = inode.folder.len() as u64;
            inode.links = links.get(&i).copied().unwrap_or(2);
        }
    }
    Ok(())
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (path.get(..slash).unwrap_or_default(), path.get(slash + 1..).unwrap_or_default()),
        None => (&[], path),
    }
}

/// Blocks of entries, each followed by their names; the kernel searches them by halves, so they are sorted.
fn encode_folder(list: &[Name<'_>]) -> Vec<u8> {
    let mut folder = Vec::new();
    let mut rest = list;
    while !rest.is_empty() {
        let mut room = BLOCK as usize;
        let fits = rest.iter().take_while(|(name, ..)| {
            let needed = DIRENT + name.len();
            let fits = needed <= room;
            room = room.saturating_sub(needed);
            fits
        });
        let (block, others) = rest.split_at(fits.count());
        folder.resize(folder.len().next_multiple_of(BLOCK as usize), 0);
        let mut name_at = block.len() * DIRENT;
        for (name, number, kind) in block {
            folder.extend_from_slice(&number.to_le_bytes());
            folder.extend_from_slice(&u16::try_from(name_at).unwrap_or(u16::MAX).to_le_bytes());
            folder.extend_from_slice(&[*kind, 0]);
            name_at += name.len();
        }
        block.iter().for_each(|(name, ..)| folder.extend_from_slice(name));
        rest = others;
    }
    folder
}

fn file_type(kind: &Kind) -> u8 {
    match kind {
        Kind::File(_) => 1,
        Kind::Dir => 2,
        Kind::Device { character: true, .. } => 3,
        Kind::Device { character: false, .. } => 4,
        Kind::Fifo => 5,
        Kind::Symlink(_) => 7,
    }
}

/// Writes the file system into `image` from byte `offset` on; what lies there must be zero. Every time stamp
/// becomes `epoch`.
///
/// # Errors
/// When a file cannot be read, changes while it is read, or the image cannot be written.
pub fn make(
    image: &File,
    path: &Path,
    offset: u64,
    plan: &Plan,
    entries: &[Entry],
    epoch: u32,
) -> Result<()> {
    let put =
        |bytes: &[u8], at: u64| image.write_all_at(bytes, offset + at).map_err(Error::io("write", path));
    for ((ino, entry), inode) in (1_u32..).zip(entries).zip(&plan.inodes) {
        put(&encode_inode(ino, entry, inode, epoch), inode.at)?;
        match &entry.kind {
            Kind::Symlink(target) if inode.inline => put(target, inode.at + INODE)?,
            Kind::Symlink(target) => put(target, inode.data * BLOCK)?,
            Kind::Dir => put(&inode.folder, inode.data * BLOCK)?,
            Kind::File(size) => copy(image, path, offset + inode.data * BLOCK, entry, *size)?,
            Kind::Device { .. } | Kind::Fifo => {}
        }
    }
    put(&superblock(plan, epoch), SUPER_OFFSET)?;
    let mut first = vec![0; (BLOCK - SUPER_OFFSET) as usize];
    image.read_exact_at(&mut first, offset + SUPER_OFFSET).map_err(Error::io("read", path))?;
    put(&crc32c::update(!0, &first).to_le_bytes(), SUPER_OFFSET + 4)
}

fn copy(image: &File, path: &Path, at: u64, entry: &Entry, size: u64) -> Result<()> {
    let mut file = File::open(&entry.source).map_err(Error::io("open", &entry.source))?;
    let mut out = image;
    out.seek(SeekFrom::Start(at)).map_err(Error::io("write", path))?;
    let copied = io::copy(&mut (&mut file).take(size), &mut out).map_err(Error::io("write", path))?;
    let more = file.read(&mut [0]).map_err(Error::io("read", &entry.source))?;
    if copied != size || more != 0 {
        return Err(unusable(entry, "changed while it was read"));
    }
    out.flush().map_err(Error::io("write", path))
}

fn encode_inode(ino: u32, entry: &Entry, inode: &Inode, epoch: u32) -> [u8; INODE as usize] {
    // Extended; content behind the inode (2) or in blocks of its own (0).
    let format: u16 = 1 | if inode.inline { 2 << 1 } else { 0 };
    let place = match entry.kind {
        Kind::Device { major, minor, .. } => (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12),
        _ => u32::try_from(inode.data).unwrap_or(u32::MAX),
    };
    let mode = u16::try_from(entry.mode()).unwrap_or(u16::MAX);
    let mut raw = [0; INODE as usize];
    let fields: [(usize, &[u8]); 7] = [
        (0, &format.to_le_bytes()),
        (4, &mode.to_le_bytes()),
        (8, &inode.size.to_le_bytes()),
        (16, &place.to_le_bytes()),
        (20, &ino.to_le_bytes()),
        (32, &u64::from(epoch).to_le_bytes()),
        (44, &inode.links.to_le_bytes()),
    ];
    place_all(&mut raw, &fields);
    raw
}

fn superblock(plan: &Plan, epoch: u32) -> [u8; 128] {
    let root = plan.inodes.first().map_or(0, Inode::number);
    let blocks = u32::try_from(plan.blocks).unwrap_or(u32::MAX);
    let mut raw = [0; 128];
    let fields: [(usize, &[u8]); 9] = [
        (0, &MAGIC.to_le_bytes()),
        (8, &COMPAT_CHECKSUM.to_le_bytes()),
        (12, &[12]), // 2^12 bytes in a block
        (14, &u16::try_from(root).unwrap_or(u16::MAX).to_le_bytes()),
        (16, &(plan.inodes.len() as u64).to_le_bytes()),
        (24, &u64::from(epoch).to_le_bytes()),
        (36, &blocks.to_le_bytes()),
        (48, &UUID),
        (64, LABEL),
    ];
    place_all(&mut raw, &fields);
    raw
}

fn place_all(raw: &mut [u8], fields: &[(usize, &[u8])]) {
    for (at, bytes) in fields {
        if let Some(place) = raw.get_mut(*at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
}

fn unusable(entry: &Entry, reason: &str) -> Error {
    Error::Format { path: entry.source.clone(), reason: reason.into() }
}
