//! Looks at an image: every field with its value and, where it is wrong, what is wrong. `inspect` prints them all,
//! `verify` those that are wrong.
//!
//! The bytes looked at may come from anywhere: every size and count is bounded before it is used.

use std::fmt::{self, Display};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::mbr::{self, Partition};
use crate::pfn::{self, Superblock};
use crate::{Error, Result, archive, disk, filesystem};

/// One field of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// Part of the image it belongs to.
    pub section: &'static str,
    /// Its name.
    pub name: &'static str,
    /// What it holds.
    pub value: String,
    /// What is wrong with that, if something is.
    pub problem: Option<String>,
}

/// All fields of an image, in the order of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The fields.
    pub fields: Vec<Field>,
}

impl Report {
    /// The fields that are wrong.
    pub fn problems(&self) -> impl Iterator<Item = &Field> {
        self.fields.iter().filter(|f| f.problem.is_some())
    }

    pub(crate) fn note(&mut self, section: &'static str, name: &'static str, value: impl Display) {
        self.fields.push(Field { section, name, value: value.to_string(), problem: None });
    }

    /// Adds a field that has to fulfil a condition; `wanted` says which, and why.
    pub(crate) fn check(
        &mut self,
        section: &'static str,
        name: &'static str,
        value: impl Display,
        good: bool,
        wanted: impl Display,
    ) {
        let problem = (!good).then(|| wanted.to_string());
        self.fields.push(Field { section, name, value: value.to_string(), problem });
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut section = "";
        for field in &self.fields {
            if field.section != section {
                section = field.section;
                writeln!(f, "{section}")?;
            }
            write!(f, "  {:<16} {}", field.name, field.value)?;
            match &field.problem {
                Some(problem) => writeln!(f, "   WRONG: {problem}")?,
                None => writeln!(f)?,
            }
        }
        Ok(())
    }
}

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
    let size = meta.len();
    let mut report = Report::default();
    let mut start = [0; 6];
    if size >= 6 {
        file.read_exact_at(&mut start, 0).map_err(Error::io("read", path))?;
    }
    if archive::is_initrd(&start) {
        report.note("file", "kind", "initrd");
        report.note("file", "size", format!("{size} bytes"));
        archive::examine(&file, &mut report);
    } else {
        report.note("file", "kind", "disk image");
        disk_image(&file, path, size, &mut report)?;
    }
    Ok(report)
}

fn disk_image(file: &File, path: &Path, size: u64, report: &mut Report) -> Result<()> {
    let verdict = disk::check_size(size).err().map(|e| e.to_string()).unwrap_or_default();
    report.check("file", "size", format!("{size} bytes"), verdict.is_empty(), &verdict);
    if size <= disk::FS_OFFSET {
        return Ok(());
    }
    table(report, "table 1, at 0", &block(file, path, 0)?, disk::partition(size, 0));
    superblock(report, &block(file, path, pfn::OFFSET)?, size);
    let second = block(file, path, disk::DAX_OFFSET)?;
    table(report, "table 2, at 2 MiB", &second, disk::partition(size, disk::DAX_OFFSET));
    filesystem::examine(report, &block(file, path, disk::FS_OFFSET)?, size - disk::FS_OFFSET);
    Ok(())
}

/// Reads `N` bytes; those beyond the end of the file are zero.
fn block<const N: usize>(file: &File, path: &Path, offset: u64) -> Result<[u8; N]> {
    let mut block = [0; N];
    let mut at = offset;
    let mut rest = block.as_mut_slice();
    while !rest.is_empty() {
        let count = file.read_at(rest, at).map_err(Error::io("read", path))?;
        if count == 0 {
            break;
        }
        at += count as u64;
        rest = rest.get_mut(count..).unwrap_or_default();
    }
    Ok(block)
}

fn table(report: &mut Report, section: &'static str, sector: &[u8; 512], wanted: Partition) {
    let table = mbr::decode(sector);
    let [first, others @ ..] = table.partitions;
    let signature = if table.signature { "55 aa" } else { "none" };
    report.check(section, "signature", signature, table.signature, "no partition table ends here with 55 aa");
    report.note(section, "disk id", format!("{:#010x}", table.disk_id));
    let kind = format!("{:#04x}", first.kind);
    report.check(
        section,
        "type",
        kind,
        first.kind == wanted.kind,
        format!("must be {:#04x}, Linux", wanted.kind),
    );
    let place = format!("must be {}: the file system lies 3 MiB into the file", wanted.start);
    report.check(section, "start", format!("sector {}", first.start), first.start == wanted.start, place);
    let length = format!("must be {}, to the end of the file", wanted.sectors);
    let sectors = format!("{} of 512 bytes", first.sectors);
    report.check(section, "sectors", sectors, first.sectors == wanted.sectors, length);
    let used = others.iter().filter(|p| p.is_used()).count();
    report.check(section, "other entries", used, used == 0, "there must be one partition only");
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
    let offset = sb.dataoff == disk::DAX_OFFSET;
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
    let align = sb.align == disk::ALIGN && size.is_multiple_of(u64::from(disk::ALIGN));
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

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
