//! The initrd: a newc cpio archive, as the kernel's `init/initramfs.c` unpacks it.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use flate2::{Compression, GzBuilder};

use crate::tool::Tool;
use crate::tree::{Entry, Kind};
use crate::{Error, Result};

pub(crate) const ZSTD: Tool = Tool::new("zstd", "zstd");

/// Compression of the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// gzip, best compression, no name and no time in its header.
    Gzip,
    /// zstd, level 19, one thread.
    Zstd,
    /// Not at all.
    None,
}

/// Writes the entries as an archive. Owner 0:0, device numbers 0, inode numbers from 1 in the order given,
/// every time stamp `mtime` (seconds since 1970).
///
/// # Errors
/// When a file cannot be read, changes while it is read, or is of 4 GiB or more; when `zstd` is missing or
/// fails.
pub fn write(out: &File, output: &Path, entries: &[Entry], mtime: u32, packing: Packing) -> Result<()> {
    let buffered = BufWriter::with_capacity(1 << 16, out);
    match packing {
        Packing::None => archive(buffered, output, entries, mtime).map(drop),
        Packing::Gzip => {
            let packer = GzBuilder::new().mtime(0).write(buffered, Compression::best());
            let packer = archive(packer, output, entries, mtime)?;
            packer.finish().and_then(|mut out| out.flush()).map_err(Error::io("write", output))
        }
        Packing::Zstd => {
            let mut command = ZSTD.command(Path::new(""), mtime)?;
            // A size in the header would need the whole archive first; the kernel wants neither that nor a
            // checksum.
            command.args(["-19", "--single-thread", "--no-check", "-q", "-c"]);
            ZSTD.filter(command, out, output, |pipe| {
                archive(BufWriter::with_capacity(1 << 16, pipe), output, entries, mtime).map(drop)
            })
        }
    }
}

fn archive<W: Write>(out: W, output: &Path, entries: &[Entry], mtime: u32) -> Result<W> {
    let mut writer = Counting { out, written: 0 };
    for (ino, entry) in (1_u32..).zip(entries) {
        member(&mut writer, output, entry, ino, mtime)?;
    }
    let trailer = Header { name: b"TRAILER!!!", nlink: 1, ..Header::default() };
    trailer.write(&mut writer).and_then(|()| writer.pad(512)).map_err(Error::io("write", output))?;
    writer.out.flush().map_err(Error::io("write", output))?;
    Ok(writer.out)
}

fn member<W: Write>(
    writer: &mut Counting<W>,
    output: &Path,
    entry: &Entry,
    ino: u32,
    mtime: u32,
) -> Result<()> {
    let target: &[u8] = if let Kind::Symlink(target) = &entry.kind { target } else { &[] };
    let size = match entry.kind {
        Kind::File(size) => size,
        _ => target.len() as u64,
    };
    let size = u32::try_from(size).map_err(|_| Error::Format {
        path: entry.source.clone(),
        reason: format!("is {size} bytes; an initrd holds files below 4 GiB"),
    })?;
    let rdev = if let Kind::Device { major, minor, .. } = entry.kind { (major, minor) } else { (0, 0) };
    let name: &[u8] = if entry.path.is_empty() { b"." } else { &entry.path };
    let nlink = if entry.kind == Kind::Dir { 2 } else { 1 };
    let header = Header { ino, mode: entry.mode(), nlink, mtime, size, rdev, name };
    header.write(writer).and_then(|()| writer.write_all(target)).map_err(Error::io("write", output))?;
    if let Kind::File(_) = entry.kind {
        content(writer, output, &entry.source, u64::from(size))?;
    }
    writer.pad(4).map_err(Error::io("write", output))
}

fn content<W: Write>(writer: &mut Counting<W>, output: &Path, source: &Path, size: u64) -> Result<()> {
    let mut file = File::open(source).map_err(Error::io("open", source))?;
    let copied = io::copy(&mut (&mut file).take(size), writer).map_err(Error::io("write", output))?;
    let more = file.read(&mut [0]).map_err(Error::io("read", source))?;
    if copied != size || more != 0 {
        let reason = "changed while it was read".into();
        return Err(Error::Format { path: source.to_owned(), reason });
    }
    Ok(())
}

#[derive(Default)]
struct Header<'a> {
    ino: u32,
    mode: u32,
    nlink: u32,
    mtime: u32,
    size: u32,
    rdev: (u32, u32),
    name: &'a [u8],
}

impl Header<'_> {
    fn write<W: Write>(&self, writer: &mut Counting<W>) -> io::Result<()> {
        let name_size = u32::try_from(self.name.len() + 1).map_err(io::Error::other)?;
        let (uid, gid, dev_major, dev_minor, check) = (0, 0, 0, 0, 0);
        writer.write_all(b"070701")?;
        for number in [
            self.ino,
            self.mode,
            uid,
            gid,
            self.nlink,
            self.mtime,
            self.size,
            dev_major,
            dev_minor,
            self.rdev.0,
            self.rdev.1,
            name_size,
            check,
        ] {
            write!(writer, "{number:08x}")?;
        }
        writer.write_all(self.name)?;
        writer.write_all(&[0])?;
        writer.pad(4)
    }
}

/// Counts what it passes on, because the format pads to positions in the archive.
struct Counting<W> {
    out: W,
    written: u64,
}

impl<W: Write> Counting<W> {
    fn pad(&mut self, to: u64) -> io::Result<()> {
        let missing = self.written.next_multiple_of(to) - self.written;
        io::copy(&mut io::repeat(0).take(missing), self).map(drop)
    }
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let count = self.out.write(data)?;
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
