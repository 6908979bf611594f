//! Recognises the file system of an image and judges its superblock, field by field.

use crate::pfn::field;
use crate::report::{Report, hex};
use crate::{crc32c, erofs};

/// ext4 incompatible features the guest's kernel has no reason to know here: a journal that must be replayed.
const NEEDS_RECOVERY: u32 = 0x4;
/// ext4: the superblock has a checksum.
const METADATA_CSUM: u32 = 0x400;

/// EROFS: content is packed: ZERO_PADDING, COMPR_CFGS (BIG_PCLUSTER), ZTAILPACKING, FRAGMENTS (DEDUPE).
const PACKED: u32 = 0x33;
/// EROFS: content lies in other devices. With COMPR_CFGS, the bit is COMPR_HEAD2.
const DEVICE_TABLE: u32 = 0x8;

/// A file system whose content can be listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    Ext4,
    Erofs,
    Xfs,
}

/// Judges the first 4096 bytes of a file system in a partition of `room` bytes. Gives its kind and its size
/// in bytes.
pub(crate) fn examine(
    report: &mut Report,
    section: &'static str,
    start: &[u8; 4096],
    room: u64,
) -> Option<(Known, u64)> {
    let (name, known) = if u16::from_le_bytes(field(start, 1024 + 56)) == 0xef53 {
        ("ext4", Some(Known::Ext4))
    } else if u32::from_le_bytes(field(start, 1024)) == erofs::MAGIC {
        ("erofs", Some(Known::Erofs))
    } else if start.starts_with(b"XFSB") {
        ("xfs", Some(Known::Xfs))
    } else if start.starts_with(b"hsqs") {
        ("squashfs", None)
    } else {
        ("unknown", None)
    };
    report.check(section, "type", name, name != "unknown", "no ext4, erofs, xfs or squashfs begins here");
    let mut part = Part { report, section, start, room };
    let bytes = match known? {
        Known::Ext4 => part.ext4(),
        Known::Erofs => part.erofs(),
        Known::Xfs => part.xfs(),
    };
    Some((known?, bytes))
}

struct Part<'a> {
    report: &'a mut Report,
    section: &'static str,
    start: &'a [u8; 4096],
    room: u64,
}

impl Part<'_> {
    fn check(
        &mut self,
        name: &'static str,
        value: impl std::fmt::Display,
        good: bool,
        wanted: impl std::fmt::Display,
    ) {
        self.report.check(self.section, name, value, good, wanted);
    }

    fn note(&mut self, name: &'static str, value: impl std::fmt::Display) {
        self.report.note(self.section, name, value);
    }

    /// Block size and number of blocks; gives their product.
    fn blocks(&mut self, block: u64, blocks: u64) -> u64 {
        self.check(
            "block size",
            format!("{block} bytes"),
            block == 4096,
            "must be 4096, the page size, for DAX",
        );
        let bytes = blocks.checked_mul(block).filter(|bytes| blocks > 0 && *bytes <= self.room);
        let limit = format!("must be 1 to {}, which the partition holds", self.room / block.max(1));
        self.check("blocks", blocks, bytes.is_some(), limit);
        bytes.unwrap_or(0)
    }

    fn name(&mut self, uuid: usize, label: &[u8]) {
        let uuid = hex(&field::<16>(self.start, uuid));
        self.note("uuid", uuid);
        let label = label.split(|b| *b == 0).next().unwrap_or_default();
        self.note("label", label.escape_ascii());
    }

    fn checksum(&mut self, stored: u32, computed: u32) {
        let wanted = format!("must be {computed:#010x}, CRC-32C of the superblock");
        self.check("checksum", format!("{stored:#010x}"), stored == computed, wanted);
    }

    /// Offsets of the kernel's `struct ext4_super_block`, which lies 1024 bytes into the file system.
    fn ext4(&mut self) -> u64 {
        let start = self.start;
        let u16_at = |at: usize| u16::from_le_bytes(field(start, 1024 + at));
        let u32_at = |at: usize| u32::from_le_bytes(field(start, 1024 + at));
        // An exponent above 6 (64 KiB blocks) is no ext4; the shift must not overflow on hostile input.
        let bytes = self.blocks(1024 << u32_at(24).min(32), u64::from(u32_at(4)));
        self.note("free blocks", u32_at(12));
        let (inodes, free) = (u32_at(0), u32_at(16));
        self.check("inodes", format!("{inodes}, {free} free"), free < inodes, "more are free than there are");
        let state = u16_at(58);
        self.check("state", state, state == 1, "must be 1: unmounted cleanly, no errors");
        let (incompat, ro_compat) = (u32_at(96), u32_at(100));
        let clean = incompat & NEEDS_RECOVERY == 0;
        let features = format!("compat {:#x}, incompat {incompat:#x}, ro_compat {ro_compat:#x}", u32_at(92));
        self.check("features", features, clean, "has a journal to replay, on a disk that cannot be written");
        self.name(1024 + 104, &field::<16>(start, 1024 + 120));
        self.note("made at", format!("{} s since 1970", u32_at(264)));
        if ro_compat & METADATA_CSUM != 0 {
            self.checksum(u32_at(1020), crc32c::update(!0, start.get(1024..2044).unwrap_or_default()));
        }
        bytes
    }

    /// Offsets of the kernel's `struct erofs_super_block`.
    fn erofs(&mut self) -> u64 {
        let start = self.start;
        let u32_at = |at: usize| u32::from_le_bytes(field(start, 1024 + at));
        let u64_at = |at: usize| u64::from_le_bytes(field(start, 1024 + at));
        let [exponent] = field(start, 1024 + 12);
        let bytes = self.blocks(1_u64.checked_shl(u32::from(exponent)).unwrap_or(0), u64::from(u32_at(36)));
        self.note("inodes", u64_at(16));
        self.note("root inode", u16::from_le_bytes(field(start, 1024 + 14)));
        let (compat, incompat) = (u32_at(8), u32_at(80));
        let problem = if incompat & PACKED != 0 {
            "content is packed: DAX cannot map it"
        } else {
            "content lies in other files"
        };
        let features = format!("compat {compat:#x}, incompat {incompat:#x}");
        self.check("features", features, incompat & (PACKED | DEVICE_TABLE) == 0, problem);
        self.name(1024 + 48, &field::<16>(start, 1024 + 64));
        self.note("made at", format!("{} s since 1970", u64_at(24)));
        if compat & 1 != 0 {
            let mut rest: [u8; 3072] = field(start, 1024);
            rest.iter_mut().skip(4).take(4).for_each(|byte| *byte = 0);
            self.checksum(u32_at(4), crc32c::update(!0, &rest));
        }
        bytes
    }

    /// Offsets of the kernel's `struct xfs_dsb`, big endian.
    fn xfs(&mut self) -> u64 {
        let start = self.start;
        let u16_at = |at| u16::from_be_bytes(field(start, at));
        let u32_at = |at| u32::from_be_bytes(field(start, at));
        let u64_at = |at| u64::from_be_bytes(field(start, at));
        let bytes = self.blocks(u64::from(u32_at(4)), u64_at(8));
        self.note("free blocks", u64_at(144));
        self.note("inodes", format!("{}, {} free", u64_at(128), u64_at(136)));
        self.note("groups", u32_at(88));
        let version = u16_at(100) & 0xf;
        self.check(
            "version",
            version,
            version == 5,
            "must be 5, with checksums: the guest's kernel reads no other",
        );
        let sector = u16_at(102);
        self.note("sector size", format!("{sector} bytes"));
        let features =
            format!("compat {:#x}, ro_compat {:#x}, incompat {:#x}", u32_at(208), u32_at(212), u32_at(216));
        self.note("features", features);
        self.name(32, &field::<12>(start, 108));
        if let Some(block) = start.get(..usize::from(sector).clamp(512, 4096)) {
            let (before, after) =
                (block.get(..224).unwrap_or_default(), block.get(228..).unwrap_or_default());
            let crc = [before, &[0; 4], after].iter().fold(!0, |crc, part| crc32c::update(crc, part));
            self.checksum(u32::from_le_bytes(field(start, 224)), !crc);
        }
        bytes
    }
}
