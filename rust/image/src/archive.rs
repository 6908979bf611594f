//! Reads an initrd back: enough of newc to say what is in it.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;
use std::process::Stdio;

use flate2::read::GzDecoder;

use crate::cpio::{Packing, ZSTD};
use crate::report::{LARGEST, Report};
use crate::{Error, Result};

const SECTION: &str = "archive";
const HEADER: usize = 110;
/// Limits of what is unpacked to look at it: a few bytes of gzip can stand for gigabytes.
const MAX_UNPACKED: u64 = 4 << 30;
const MAX_NAME: u64 = 4096;

/// How a file that starts so is packed, if it is an initrd.
pub(crate) fn packing(start: &[u8; 6]) -> Option<Packing> {
    if start.starts_with(&[0x1f, 0x8b]) {
        Some(Packing::Gzip)
    } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        Some(Packing::Zstd)
    } else {
        (start == b"070701").then_some(Packing::None)
    }
}

#[derive(Default)]
struct Summary {
    entries: u64,
    bytes: u64,
    foreign: u64,
    init: Option<u32>,
    /// Size and name, the largest first.
    largest: Vec<(u64, String)>,
    complete: bool,
}

/// Adds what the archive holds to the report.
pub(crate) fn examine(file: &File, path: &Path, packing: Packing, report: &mut Report) -> Result<()> {
    let name = match packing {
        Packing::None => "none",
        Packing::Gzip => "gzip",
        Packing::Zstd => "zstd",
    };
    report.note(SECTION, "packing", name);
    let plain = BufReader::with_capacity(1 << 16, file);
    match packing {
        Packing::None => judge(plain, report),
        Packing::Gzip => judge(GzDecoder::new(plain), report),
        Packing::Zstd => {
            let input = file.try_clone().map_err(Error::io("read", path))?;
            let mut command = ZSTD.command(Path::new(""), 0)?;
            command.args(["-d", "-q", "-c"]).stdin(input).stdout(Stdio::piped()).stderr(Stdio::null());
            let mut child = command.spawn().map_err(Error::io("unpack", path))?;
            if let Some(unpacked) = child.stdout.take() {
                judge(BufReader::with_capacity(1 << 16, unpacked), report);
            }
            // What follows the end of the archive is not read; the program ends by the pipe that nobody reads.
            child.wait().map_err(Error::io("unpack", path))?;
        }
    }
    Ok(())
}

/// Adds what an unpacked archive holds to the report.
pub fn judge(input: impl Read, report: &mut Report) {
    let mut summary = Summary::default();
    let end = read(input.take(MAX_UNPACKED), &mut summary);
    report.note(SECTION, "entries", summary.entries);
    report.note(SECTION, "content", format!("{} bytes", summary.bytes));
    let reason = end.err().map_or_else(|| "has no end mark".to_owned(), |e| e.to_string());
    let shown = if summary.complete { "complete" } else { "damaged" };
    report.check(SECTION, "end", shown, summary.complete, reason);
    let init = summary.init.map_or("missing".to_owned(), |mode| format!("mode {mode:o}"));
    // A link's target is not followed here; building checked it.
    let runs = summary.init.is_some_and(|mode| mode & 0o111 != 0);
    report.check(SECTION, "/init", init, runs, "must be an executable file: the kernel starts it");
    report.check(
        SECTION,
        "owners",
        format!("{} not 0:0", summary.foreign),
        summary.foreign == 0,
        "must all be 0:0",
    );
    for (size, path) in summary.largest {
        report.note("largest files", "file", format!("{size:>10} bytes  /{path}"));
    }
}

fn read(mut input: impl Read, summary: &mut Summary) -> io::Result<()> {
    loop {
        let mut header = [0; HEADER];
        input.read_exact(&mut header)?;
        let (magic, digits) = header.split_at(6);
        if magic != b"070701" {
            return Err(invalid(format!("entry {} does not start with 070701", summary.entries + 1)));
        }
        let mut numbers = [0_u32; 13];
        for (number, digits) in numbers.iter_mut().zip(digits.as_chunks::<8>().0) {
            *number =
                hex_number(digits).ok_or_else(|| invalid("a header holds other than hex digits".into()))?;
        }
        let [_ino, mode, uid, gid, _nlink, _mtime, size, _, _, _, _, name_size, _check] = numbers;
        let name_size = u64::from(name_size);
        if name_size == 0 || name_size > MAX_NAME {
            return Err(invalid(format!("a name is {name_size} bytes; 1 to {MAX_NAME} are allowed")));
        }
        let mut name = Vec::new();
        (&mut input).take(name_size).read_to_end(&mut name)?;
        skip(&mut input, padding(HEADER as u64 + name_size))?;
        name.pop();
        if name == b"TRAILER!!!" {
            summary.complete = true;
            return Ok(());
        }
        let size = u64::from(size);
        skip(&mut input, size + padding(size))?;
        summary.entries += 1;
        summary.bytes += size;
        summary.foreign += u64::from(uid != 0 || gid != 0);
        if mode & 0o170_000 == 0o100_000 {
            let place = summary.largest.partition_point(|(other, _)| *other >= size);
            if place < LARGEST {
                summary.largest.insert(place, (size, name.escape_ascii().to_string()));
                summary.largest.truncate(LARGEST);
            }
        }
        if name == b"init" {
            summary.init = Some(mode);
        }
    }
}

fn padding(length: u64) -> u64 {
    length.next_multiple_of(4) - length
}

fn skip(input: &mut impl Read, count: u64) -> io::Result<()> {
    let skipped = io::copy(&mut input.take(count), &mut io::sink())?;
    if skipped == count { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

fn hex_number(digits: &[u8; 8]) -> Option<u32> {
    digits.iter().try_fold(0_u32, |number, digit| Some((number << 4) | char::from(*digit).to_digit(16)?))
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}
