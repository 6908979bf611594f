//! Recognises the file system of an image and judges an ext4 superblock.

use crate::pfn::field;
use crate::report::{Report, hex};

const SECTION: &str = "file system, at 3 MiB";
/// ext4 incompatible features the guest's kernel has no reason to know here: a journal that must be replayed.
const NEEDS_RECOVERY: u32 = 0x4;

/// Judges the first 4096 bytes of a file system in a partition of `room` bytes.
pub(crate) fn examine(report: &mut Report, start: &[u8; 4096], room: u64) {
    let u16_at = |at| u16::from_le_bytes(field(start, at));
    let u32_at = |at| u32::from_le_bytes(field(start, at));
    let known = if u16_at(1024 + 56) == 0xef53 {
        Some("ext4")
    } else if u32_at(1024) == 0xe0f5_e1e2 {
        Some("erofs")
    } else if start.starts_with(b"XFSB") {
        Some("xfs")
    } else if start.starts_with(b"hsqs") {
        Some("squashfs")
    } else {
        None
    };
    let wanted = "no ext4, erofs, xfs or squashfs begins here";
    report.check(SECTION, "type", known.unwrap_or("unknown"), known.is_some(), wanted);
    if known != Some("ext4") {
        return;
    }
    // Offsets of the kernel's `struct ext4_super_block`, which lies 1024 bytes into the file system.
    let sb = |at: usize| 1024 + at;
    // An exponent above 6 (64 KiB blocks) is no ext4; the shift must not overflow on hostile input.
    let block = 1024_u64 << u32_at(sb(24)).min(32);
    report.check(
        SECTION,
        "block size",
        format!("{block} bytes"),
        block == 4096,
        "must be 4096, the page size, for DAX",
    );
    let blocks = u64::from(u32_at(sb(4)));
    let fits = blocks > 0 && blocks.checked_mul(block).is_some_and(|bytes| bytes <= room);
    let limit = format!("must be 1 to {}, which the partition holds", room / block.max(1));
    report.check(SECTION, "blocks", blocks, fits, limit);
    report.note(SECTION, "free blocks", u32_at(sb(12)));
    let (inodes, free) = (u32_at(sb(0)), u32_at(sb(16)));
    report.check(
        SECTION,
        "inodes",
        format!("{inodes}, {free} free"),
        free < inodes,
        "more are free than there are",
    );
    let state = u16_at(sb(58));
    report.check(SECTION, "state", state, state == 1, "must be 1: unmounted cleanly, no errors");
    let incompat = u32_at(sb(96));
    let clean = incompat & NEEDS_RECOVERY == 0;
    let features =
        format!("compat {:#x}, incompat {incompat:#x}, ro_compat {:#x}", u32_at(sb(92)), u32_at(sb(100)));
    report.check(
        SECTION,
        "features",
        features,
        clean,
        "has a journal to replay, on a disk that cannot be written",
    );
    report.note(SECTION, "uuid", hex(&field::<16>(start, sb(104))));
    let label: [u8; 16] = field(start, sb(120));
    let label = label.split(|b| *b == 0).next().unwrap_or_default();
    report.note(SECTION, "label", label.escape_ascii());
    report.note(SECTION, "made at", format!("{} s since 1970", u32_at(sb(264))));
}
