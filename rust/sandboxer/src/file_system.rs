//! Recognises the file system on a disk or in an image by its magic number.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

/// Offset, magic number and name of each known file system. The guest's kernel need not have all of them; it
/// says so. ext4's two bytes lie in EROFS' UUID, so EROFS goes first.
const MAGIC: [(u64, &[u8], &str); 5] = [
    (1024, b"\xe2\xe1\xf5\xe0", "erofs"),
    (1080, b"\x53\xef", "ext4"),
    (0, b"XFSB", "xfs"),
    (0, b"hsqs", "squashfs"),
    (0x1_0040, b"_BHRfS_M", "btrfs"),
];

/// The file system that begins `begin` bytes into a disk or an image; nothing if there is none that is known.
///
/// # Errors
/// When it cannot be read.
pub(crate) fn of(disk: &Path, begin: u64) -> io::Result<Option<&'static str>> {
    let disk = File::open(disk)?;
    for (at, magic, name) in MAGIC {
        let mut there = vec![0; magic.len()];
        match disk.read_exact_at(&mut there, begin + at) {
            Ok(()) if there == magic => return Ok(Some(name)),
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error),
            _ => {}
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_known_by_what_is_written() {
        let disk = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(of(disk.path(), 0).unwrap(), None, "an empty one");
        disk.as_file().set_len(1 << 20).unwrap();
        assert_eq!(of(disk.path(), 0).unwrap(), None);
        for (at, magic, name) in MAGIC {
            disk.as_file().write_all_at(magic, at).unwrap();
            assert_eq!(of(disk.path(), 0).unwrap(), Some(name));
            disk.as_file().write_all_at(&vec![0; magic.len()], at).unwrap();
        }
        of(Path::new("/nonexistent"), 0).unwrap_err();
    }
}
