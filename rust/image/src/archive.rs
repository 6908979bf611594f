//! Reads an initrd back, all of it: enough of newc to say what is in it.

use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::path::Path;
use std::process::Stdio;

use flate2::bufread::GzDecoder;

use crate::cpio::ZSTD;
use crate::report::{LARGEST, Report};
use crate::{Error, Result};

const SECTION: &str = "archive";
const HEADER: usize = 110;
/// Limits of what is unpacked to look at it: a few bytes of gzip can stand for gigabytes.
const MAX_UNPACKED: u64 = 4 << 30;
const MAX_NAME: u64 = 4096;
const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// Returns true if a file that starts with these bytes is an initrd.
pub(crate) fn is_initrd(start: &[u8; 6]) -> bool {
    start.starts_with(GZIP_MAGIC) || start.starts_with(ZSTD_MAGIC) || start == b"070701"
}

/// Adds what an initrd holds to the report.
///
/// # Errors
/// When a part is packed by `zstd`, and the program is not there or does not start.
pub fn judge(input: impl Read, report: &mut Report) -> Result<()> {
    let mut summary = Summary::default();
    let reason = match summary.parts(input) {
        Ok(()) if summary.archives > 0 => String::new(),
        Ok(()) => "holds no archive".to_owned(),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => "ends in the middle".to_owned(),
        // This crate's own are not the archive's fault.
        Err(error) => error.downcast::<Error>().map_or_else(|e| Ok(e.to_string()), Err)?,
    };
    report.note(SECTION, "packing", summary.packings.join(", "));
    report.note(SECTION, "entries", summary.entries);
    report.note(SECTION, "content", format!("{} bytes", summary.bytes));
    let shown = if reason.is_empty() { "complete" } else { "damaged" };
    report.check(SECTION, "end", shown, reason.is_empty(), reason);
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
    Ok(())
}

#[derive(Default)]
struct Summary {
    /// The ways its parts are packed, each once.
    packings: Vec<&'static str>,
    /// Bytes that came out of packed parts.
    unpacked: u64,
    archives: u64,
    entries: u64,
    bytes: u64,
    foreign: u64,
    init: Option<u32>,
    /// Size and name, the largest first.
    largest: Vec<(u64, String)>,
}

impl Summary {
    /// Reads input as the kernel's `unpack_to_rootfs` does: one archive after the other, each packed or not,
    /// with zeros between and behind them.
    fn parts(&mut self, input: impl Read) -> io::Result<()> {
        let mut input = Counted::new(input, u64::MAX);
        while let Some(first) = input.first_but_zero()? {
            if first == b'0' {
                self.packed("none");
                self.archive(&mut input)?;
            } else if GZIP_MAGIC.first() == Some(&first) {
                self.packed("gzip");
                // Read to its end, so to its CRC, which the kernel does not look at.
                self.unpack(GzDecoder::new(&mut input))?;
            } else if ZSTD_MAGIC.first() == Some(&first) {
                self.zstd(&mut input)?;
            } else {
                return Err(invalid(format!("no archive begins at byte {}, where zeros end", input.at)));
            }
        }
        Ok(())
    }

    /// All of a packed part: archives, too, and zeros.
    fn unpack(&mut self, input: impl Read) -> io::Result<()> {
        let mut input = Counted::new(input, MAX_UNPACKED - self.unpacked);
        while let Some(first) = input.first_but_zero()? {
            if first != b'0' {
                return Err(invalid("packed with an archive is what is none".into()));
            }
            self.archive(&mut input)?;
        }
        self.unpacked += input.at;
        Ok(())
    }

    fn zstd(&mut self, input: &mut impl Read) -> io::Result<()> {
        let mut frame = tempfile::tempfile()
            .map_err(Error::io("create a file in", &std::env::temp_dir()))
            .map_err(io::Error::other)?;
        let checksum = copy_frame(input, &mut frame)?;
        self.packed(if checksum {
            "zstd"
        } else {
            "zstd without a checksum: only what cannot be unpacked is found"
        });
        frame.rewind()?;
        let mut command = ZSTD.command(Path::new(""), 0).map_err(io::Error::other)?;
        command.args(["-d", "-q", "-c"]).stdin(frame).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child =
            command.spawn().map_err(Error::io("start", Path::new(ZSTD.name))).map_err(io::Error::other)?;
        let judged = child.stdout.take().map_or(Ok(()), |unpacked| self.unpack(unpacked));
        let output = child.wait_with_output()?;
        // It ends by a signal where reading it ended first.
        if output.status.code().is_some_and(|code| code != 0) {
            return Err(invalid(ZSTD.failed(&output).to_string()));
        }
        judged
    }

    fn packed(&mut self, how: &'static str) {
        if !self.packings.contains(&how) {
            self.packings.push(how);
        }
    }

    /// One archive, to its end mark.
    fn archive(&mut self, input: &mut Counted<impl Read>) -> io::Result<()> {
        if !input.at.is_multiple_of(4) {
            return Err(invalid(format!("an archive begins at byte {}, no multiple of 4", input.at)));
        }
        loop {
            let (numbers, name) = member(input, self.entries + 1)?;
            if name == b"TRAILER!!!" {
                self.archives += 1;
                return Ok(());
            }
            let [_ino, mode, uid, gid, _nlink, _mtime, size, ..] = numbers;
            let size = u64::from(size);
            copy(input, size + padding(size), &mut io::sink())?;
            self.entries += 1;
            self.bytes += size;
            self.foreign += u64::from(uid != 0 || gid != 0);
            // All are unpacked in the root, whether they say so or not.
            let name = name.strip_prefix(b"./").or_else(|| name.strip_prefix(b"/")).unwrap_or(&name);
            if mode & 0o170_000 == 0o100_000 {
                let place = self.largest.partition_point(|(other, _)| *other >= size);
                if place < LARGEST {
                    self.largest.insert(place, (size, name.escape_ascii().to_string()));
                    self.largest.truncate(LARGEST);
                }
            }
            if name == b"init" {
                self.init = Some(mode);
            }
        }
    }
}

/// The numbers of a member's header, and its name.
fn member(input: &mut impl Read, number: u64) -> io::Result<([u32; 13], Vec<u8>)> {
    let mut header = [0; HEADER];
    input.read_exact(&mut header)?;
    let (magic, digits) = header.split_at(6);
    if magic != b"070701" {
        return Err(invalid(format!("entry {number} does not start with 070701")));
    }
    let mut numbers = [0_u32; 13];
    for (number, digits) in numbers.iter_mut().zip(digits.as_chunks::<8>().0) {
        *number = hex_number(digits).ok_or_else(|| invalid("a header holds other than hex digits".into()))?;
    }
    let [.., name_size, _check] = numbers;
    let name_size = u64::from(name_size);
    if name_size == 0 || name_size > MAX_NAME {
        return Err(invalid(format!("a name is {name_size} bytes; 1 to {MAX_NAME} are allowed")));
    }
    let mut name = Vec::new();
    copy(input, name_size, &mut name)?;
    copy(input, padding(HEADER as u64 + name_size), &mut io::sink())?;
    name.pop();
    Ok((numbers, name))
}

/// Copies one frame (RFC 8878) and nothing of what follows it; says whether it carries a checksum.
fn copy_frame(input: &mut impl Read, out: &mut impl Write) -> io::Result<bool> {
    let mut start = [0; 5];
    input.read_exact(&mut start)?;
    out.write_all(&start)?;
    let [magic @ .., descriptor] = start;
    if magic != ZSTD_MAGIC {
        return Err(invalid("no frame of zstd begins where one should".into()));
    }
    let (single, checksum) = (u64::from(descriptor >> 5 & 1), descriptor & 4 != 0);
    let size = if descriptor >> 6 == 0 { single } else { 1 << (descriptor >> 6) };
    let dictionary = 1 << (descriptor & 3) >> 1;
    copy(input, 1 - single + dictionary + size, out)?;
    loop {
        let mut header = [0; 3];
        input.read_exact(&mut header)?;
        out.write_all(&header)?;
        let [low, middle, high] = header;
        let header = u32::from_le_bytes([low, middle, high, 0]);
        // One byte stands for a run of it.
        let size = if header >> 1 & 3 == 1 { 1 } else { header >> 3 };
        copy(input, u64::from(size), out)?;
        if header & 1 == 1 {
            copy(input, if checksum { 4 } else { 0 }, out)?;
            return Ok(checksum);
        }
    }
}

/// Counts what is taken from it, and gives no more than `limit` bytes.
struct Counted<R> {
    input: BufReader<R>,
    at: u64,
    limit: u64,
}

impl<R: Read> Counted<R> {
    fn new(input: R, limit: u64) -> Self {
        Self { input: BufReader::with_capacity(1 << 16, input), at: 0, limit }
    }

    /// Skips zeros; gives the byte behind them, which is not taken.
    fn first_but_zero(&mut self) -> io::Result<Option<u8>> {
        loop {
            let bytes = self.fill_buf()?;
            let (length, zeros) = (bytes.len(), bytes.iter().take_while(|byte| **byte == 0).count());
            let first = bytes.get(zeros).copied();
            self.consume(zeros);
            if first.is_some() || length == 0 {
                return Ok(first);
            }
        }
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(into)?;
        self.consume(count);
        Ok(count)
    }
}

impl<R: Read> BufRead for Counted<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at > self.limit {
            return Err(invalid(format!("more than {MAX_UNPACKED} bytes come out of it")));
        }
        self.input.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        self.at += count as u64;
        self.input.consume(count);
    }
}

fn padding(length: u64) -> u64 {
    length.next_multiple_of(4) - length
}

fn copy(input: &mut impl Read, count: u64, out: &mut impl Write) -> io::Result<()> {
    let copied = io::copy(&mut input.take(count), out)?;
    if copied == count { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

fn hex_number(digits: &[u8; 8]) -> Option<u32> {
    digits.iter().try_fold(0_u32, |number, digit| Some((number << 4) | char::from(*digit).to_digit(16)?))
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}
