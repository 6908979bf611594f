//! Sources of an image's bytes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes that can be read anywhere; beyond their end there are zeros.
pub trait Source {
    /// Number of bytes.
    fn size(&self) -> u64;

    /// Fills `into` with the bytes from `at` on.
    ///
    /// # Errors
    /// The system's.
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()>;
}

/// `N` bytes at `at`.
pub(crate) fn block<const N: usize>(source: &dyn Source, at: u64) -> io::Result<[u8; N]> {
    let mut block = [0; N];
    source.read(at, &mut block)?;
    Ok(block)
}

/// A file, and its size when it was opened.
#[derive(Debug)]
pub struct FileSource<'a> {
    /// The file.
    pub file: &'a File,
    /// Its size.
    pub size: u64,
}

impl Source for FileSource<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let (mut at, mut rest) = (at, into);
        while !rest.is_empty() {
            let count = match self.file.read_at(rest, at) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // An offset that no file can have is beyond the end of this one.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => 0,
                Err(error) => return Err(error),
            };
            if count == 0 {
                rest.fill(0);
                return Ok(());
            }
            at = at.saturating_add(count as u64);
            rest = rest.get_mut(count..).unwrap_or_default();
        }
        Ok(())
    }
}

/// Pieces on a ground of zeros: an image without its megabytes.
#[derive(Debug)]
pub struct Pieces<'a> {
    /// Number of bytes.
    pub size: u64,
    /// Offset and bytes of each piece.
    pub pieces: Vec<(u64, &'a [u8])>,
}

impl Source for Pieces<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(0);
        let end = at.saturating_add(into.len() as u64);
        for (start, piece) in &self.pieces {
            let (from, to) = (at.max(*start), end.min(start.saturating_add(piece.len() as u64)));
            if from >= to {
                continue;
            }
            let index = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
            let source = piece.get(index(from - start)..index(to - start));
            if let (Some(source), Some(place)) = (source, into.get_mut(index(from - at)..index(to - at))) {
                place.copy_from_slice(source);
            }
        }
        Ok(())
    }
}

/// Copies bytes, holes where they are zero; where they go must be zero.
pub(crate) fn copy(from: &File, from_at: u64, to: &File, to_at: u64, length: u64) -> std::io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    let mut done = 0;
    while done < length {
        let part = usize::try_from(length - done).unwrap_or(usize::MAX).min(buffer.len());
        let piece = buffer.get_mut(..part).unwrap_or_default();
        from.read_exact_at(piece, from_at + done)?;
        if piece.iter().any(|byte| *byte != 0) {
            to.write_all_at(piece, to_at + done)?;
        }
        done += part as u64;
    }
    Ok(())
}
