//! GUID partition tables, which the builders of Kata and Kuasar write. Our images have none: a table's
//! entries would lie where the PFN superblock has to be, and the guest's kernel does not read them.

use std::io;

use flate2::Crc;

use crate::mbr::SECTOR;
use crate::pfn::field;
use crate::report::{Report, hex};
use crate::source::{self, Source};

/// The type byte of the MBR before a GPT.
pub(crate) const TYPE_PROTECTIVE: u8 = 0xee;
/// As many bytes of entries as any partitioning tool writes, four times over.
const MAX_ENTRIES: u64 = 64 << 10;

/// Adds the table whose MBR is at `base`; gives where its first partition starts, bytes from `base`.
pub(crate) fn examine(
    report: &mut Report,
    section: &'static str,
    image: &dyn Source,
    base: u64,
) -> io::Result<Option<u64>> {
    let header: [u8; 512] = source::block(image, base + SECTOR)?;
    let u32_at = |at| u32::from_le_bytes(field(&header, at));
    let u64_at = |at| u64::from_le_bytes(field(&header, at));
    let signature: [u8; 8] = field(&header, 0);
    let known = signature == *b"EFI PART";
    report.check(section, "GPT signature", signature.escape_ascii(), known, "must be EFI PART");
    if !known {
        return Ok(None);
    }
    let revision = format!("{}.{}", u32_at(8) >> 16, u32_at(8) & 0xffff);
    report.note(section, "GPT revision", revision);
    checksum(report, section, &header);
    report.note(section, "GPT disk", hex(&field::<16>(&header, 56)));
    let (own, backup) = (u64_at(24), u64_at(32));
    report.check(section, "GPT sector", own, own == 1, "must be 1, where it is");
    let end = base.checked_add(backup.saturating_add(1).saturating_mul(SECTOR));
    let inside = end.is_some_and(|end| end <= image.size());
    report.check(
        section,
        "GPT backup",
        format!("sector {backup}"),
        inside,
        "lies beyond the end of the file",
    );
    report.note(section, "GPT usable", format!("sectors {} to {}", u64_at(40), u64_at(48)));

    let (first, count, size) = (u64_at(72), u64::from(u32_at(80)), u64::from(u32_at(84)));
    let bytes = count * size;
    let sane = bytes <= MAX_ENTRIES && size >= 128;
    let shown = format!("{count} of {size} bytes from sector {first}");
    report.check(section, "GPT entries", shown, sane, "are too many, or too small");
    let (Some(at), true) = (first.checked_mul(SECTOR).and_then(|at| at.checked_add(base)), sane) else {
        return Ok(None);
    };
    let mut entries = vec![0; usize::try_from(bytes).unwrap_or(0)];
    image.read(at, &mut entries)?;
    let (computed, stored) = (crc(&[&entries]), u32_at(88));
    let wanted = format!("must be {computed:#010x}; what else lies in the entries is no table's");
    report.check(section, "GPT entries' CRC", format!("{stored:#010x}"), stored == computed, wanted);
    Ok(partitions(report, section, &entries, usize::try_from(size).unwrap_or(128)))
}

fn checksum(report: &mut Report, section: &'static str, header: &[u8; 512]) {
    let stored = u32::from_le_bytes(field(header, 16));
    let length = u32::from_le_bytes(field(header, 12));
    let whole =
        usize::try_from(length).ok().filter(|length| *length >= 92).and_then(|length| header.get(..length));
    let Some(whole) = whole else {
        report.check(section, "GPT header", format!("{length} bytes"), false, "must be 92 to 512 bytes");
        return;
    };
    let (before, after) = (whole.get(..16).unwrap_or_default(), whole.get(20..).unwrap_or_default());
    let computed = crc(&[before, &[0; 4], after]);
    let wanted = format!("must be {computed:#010x}");
    report.check(section, "GPT header's CRC", format!("{stored:#010x}"), stored == computed, wanted);
}

fn partitions(report: &mut Report, section: &'static str, entries: &[u8], size: usize) -> Option<u64> {
    let mut start = None;
    for entry in entries.chunks_exact(size.max(1)).filter(|e| field::<16>(e, 0) != [0; 16]).take(8) {
        let (first, last) = (u64::from_le_bytes(field(entry, 32)), u64::from_le_bytes(field(entry, 40)));
        let name: Vec<u16> =
            field::<72>(entry, 56).as_chunks().0.iter().map(|c| u16::from_le_bytes(*c)).collect();
        let name = String::from_utf16_lossy(name.split(|c| *c == 0).next().unwrap_or_default());
        let shown = format!("sectors {first} to {last}, named {:?}", name.escape_default().to_string());
        report.check(section, "GPT partition", shown, first <= last, "ends before it begins");
        start = start.or_else(|| first.checked_mul(SECTOR));
    }
    start
}

fn crc(parts: &[&[u8]]) -> u32 {
    let mut crc = Crc::new();
    parts.iter().for_each(|part| crc.update(part));
    crc.sum()
}
