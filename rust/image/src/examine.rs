//! Examines an image into a report. `inspect` prints all fields, `verify` those that are wrong.
//!
//! The bytes may come from anywhere: every size and count is bounded before it is used.

use std::fs::File;
use std::path::Path;

use crate::layout::{self, ALIGN, DAX_OFFSET, FS_OFFSET};
use crate::mbr::{self, SECTOR};
use crate::pfn::{self, Superblock, field};
use crate::report::{LARGEST, Report, hex};
use crate::source::{self, FileSource, Source};
use crate::{Error, MIB, Result, archive, gpt, list, superblock, verity};

/// Examines a disk image or an initrd; which of them it is, its first bytes say.
///
/// # Errors
/// Only when the file cannot be read. What is wrong inside is in the report.
pub fn examine(path: &Path) -> Result<Report> {
    // Asked before it is opened: opening a pipe would wait for a writer.
    let meta = std::fs::metadata(path).map_err(Error::io("open", path))?;
    if !meta.is_file() {
        return Err(Error::Format { path: path.to_owned(), reason: "is not a regular file".into() });
    }
    let file = File::open(path).map_err(Error::io("open", path))?;
    let image = FileSource { file: &file, size: meta.len() };
    let start: [u8; 6] = source::block(&image, 0).map_err(Error::io("read", path))?;
    if !archive::is_initrd(&start) {
        return disk_image(&image).map_err(Error::io("read", path));
    }
    let mut report = Report::default();
    report.note("file", "kind", "initrd");
    report.note("file", "size", format!("{} bytes", image.size));
    archive::judge(&file, &mut report)?;
    Ok(report)
}

/// Examines a disk image.
///
/// # Errors
/// Only when it cannot be read.
pub fn disk_image(image: &dyn Source) -> std::io::Result<Report> {
    let mut report = Report::default();
    let size = image.size();
    report.note("file", "kind", "disk image");
    let problem = layout::size_problem(size);
    report.check("file", "size", format!("{size} bytes"), problem.is_none(), problem.unwrap_or_default());
    if size <= FS_OFFSET {
        return Ok(report);
    }
    let start = table(&mut report, "table 1, at 0", image, 0, size)?;
    superblock(&mut report, &source::block(image, pfn::OFFSET)?, size);
    table(&mut report, "table 2, at 2 MiB", image, DAX_OFFSET, size)?;
    // Images of other builders may have their file system elsewhere.
    let start = start.filter(|start| (MIB..size).contains(start)).unwrap_or(FS_OFFSET);
    content(&mut report, image, start)?;
    Ok(report)
}

/// The file system, what lies behind it, and its largest files.
fn content(report: &mut Report, image: &dyn Source, at: u64) -> std::io::Result<()> {
    let section = if at == FS_OFFSET { "file system, at 3 MiB" } else { "file system, where table 1 says" };
    let room = image.size() - at;
    let Some((known, bytes)) = superblock::examine(report, section, &source::block(image, at)?, room) else {
        return Ok(());
    };
    if bytes > 0 && bytes < room {
        tree(report, &source::block(image, at + bytes)?, bytes, room);
    }
    for (size, path) in list::largest(image, at, known, LARGEST)? {
        report.note("largest files", "file", format!("{size:>10} bytes  {path}"));
    }
    Ok(())
}

/// Examines the superblock that `veritysetup` writes before a tree (`struct verity_sb`).
fn tree(report: &mut Report, sb: &[u8; 512], bytes: u64, room: u64) {
    const SECTION: &str = "dm-verity, behind the file system";
    if !sb.starts_with(verity::MAGIC) {
        return;
    }
    let u32_at = |at| u32::from_le_bytes(field(sb, at));
    let versions = (u32_at(8), u32_at(12));
    report.check(
        SECTION,
        "version",
        format!("{}, hash type {}", versions.0, versions.1),
        versions == (1, 1),
        "must be 1, hash type 1",
    );
    report.note(SECTION, "uuid", hex(&field::<16>(sb, 16)));
    let algorithm: [u8; 32] = field(sb, 32);
    let algorithm = algorithm.split(|b| *b == 0).next().unwrap_or_default();
    report.check(
        SECTION,
        "hash",
        algorithm.escape_ascii(),
        algorithm == b"sha256",
        "must be sha256, which the guest's kernel knows",
    );
    let sizes = (u32_at(64), u32_at(68));
    report.check(
        SECTION,
        "block sizes",
        format!("{} and {} bytes", sizes.0, sizes.1),
        sizes == (4096, 4096),
        "must be 4096",
    );
    let blocks = u64::from_le_bytes(field(sb, 72));
    let wanted = format!("must be {}, as many as the file system has", bytes / 4096);
    report.check(SECTION, "data blocks", blocks, blocks == bytes / 4096, wanted);
    let salt = usize::from(u16::from_le_bytes(field(sb, 80)));
    report.note(SECTION, "salt", sb.get(88..88 + salt.min(256)).map(hex).unwrap_or_default());
    let needed = verity::size(bytes);
    report.check(
        SECTION,
        "tree",
        format!("{needed} bytes"),
        bytes.saturating_add(needed) <= room,
        "does not fit into the file",
    );
}

/// Adds the partition table at `base`. Gives where its first partition starts, bytes from the start of the
/// file.
fn table(
    report: &mut Report,
    section: &'static str,
    image: &dyn Source,
    base: u64,
    size: u64,
) -> std::io::Result<Option<u64>> {
    let wanted = layout::partition(size, base);
    let table = mbr::decode(&source::block(image, base)?);
    let [first, others @ ..] = table.partitions;
    let signature = if table.signature { "55 aa" } else { "none" };
    report.check(section, "signature", signature, table.signature, "no partition table ends here with 55 aa");
    report.note(section, "disk id", format!("{:#010x}", table.disk_id));
    let kind = format!("{:#04x}", first.kind);
    let linux = format!("must be {:#04x}, Linux", wanted.kind);
    report.check(section, "type", kind, first.kind == wanted.kind, linux);
    if table.signature && first.kind == gpt::TYPE_PROTECTIVE {
        let start = gpt::examine(report, section, image, base)?;
        return Ok(start.and_then(|start| start.checked_add(base)));
    }
    let place = format!("must be {}: the file system lies 3 MiB into the file", wanted.start);
    report.check(section, "start", format!("sector {}", first.start), first.start == wanted.start, place);
    let length = format!("must be {}, to the end of the file", wanted.sectors);
    let sectors = format!("{} of 512 bytes", first.sectors);
    report.check(section, "sectors", sectors, first.sectors == wanted.sectors, length);
    let used = others.iter().filter(|p| p.is_used()).count();
    report.check(section, "other entries", used, used == 0, "there must be one partition only");
    let found = table.signature && first.is_used();
    Ok(found.then(|| base + u64::from(first.start) * SECTOR))
}

fn superblock(report: &mut Report, raw: &[u8; pfn::SIZE], size: u64) {
    const SECTION: &str = "PFN superblock, at 4096";
    let sb = Superblock::decode(raw);
    let computed = pfn::checksum(raw);
    let zero = |bytes: &[u8]| bytes.iter().all(|b| *b == 0);
    let mut check =
        |name, value: String, good: bool, wanted: &str| report.check(SECTION, name, value, good, wanted);
    let signature = sb.signature.escape_ascii().to_string();
    check("signature", signature, sb.signature == *pfn::SIGNATURE, "must be NVDIMM_PFN_INFO and a zero");
    check("uuid", hex(&sb.uuid), true, "");
    check("parent uuid", hex(&sb.parent_uuid), zero(&sb.parent_uuid), "must be zero: virtio-pmem has none");
    check("flags", format!("{:#x}", sb.flags), sb.flags == 0, "must be 0");
    let version = format!("{}.{}", sb.version_major, sb.version_minor);
    let known = sb.version_major == 0 && sb.version_minor == 2;
    check("version", version, known, "must be 0.2, which has an alignment and no page size");
    let offset = sb.dataoff == DAX_OFFSET;
    check("data offset", format!("{} bytes", sb.dataoff), offset, "must be 2097152, where table 2 is");
    check("page frames", sb.npfns.to_string(), sb.npfns == 0, "must be 0 in mode RAM");
    let mode = match sb.mode {
        0 => "0, none".to_owned(),
        1 => "1, RAM".to_owned(),
        2 => "2, pmem".to_owned(),
        other => other.to_string(),
    };
    check(
        "mode",
        mode,
        sb.mode == pfn::MODE_RAM,
        "must be 1: page descriptors in guest RAM, the file is never written",
    );
    check("start pad", format!("{} bytes", sb.start_pad), sb.start_pad == 0, "must be 0");
    check("end trunc", format!("{} bytes", sb.end_trunc), sb.end_trunc == 0, "must be 0");
    let align = sb.align == ALIGN && size.is_multiple_of(u64::from(ALIGN));
    check(
        "alignment",
        format!("{} bytes", sb.align),
        align,
        "must be 2097152 and divide the size of the file",
    );
    let padding = raw.get(88..pfn::SIZE - 8).is_some_and(zero);
    check("padding", if padding { "zero" } else { "not zero" }.into(), padding, "must be zero");
    let wanted = format!("must be {computed:#018x}, Fletcher-64 of this block");
    check("checksum", format!("{:#018x}", sb.checksum), sb.checksum == computed, &wanted);
}
