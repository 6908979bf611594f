//! Files that are replaced as a whole, also where there is no room left.
//!
//! Beside each lies a spare that holds the text of before. The new text is written over that, and the two
//! change places: no byte and no inode more is needed, so the end of a pod can be written down on a disk that
//! the pod has filled.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, FallocateFlags, OFlags, RenameFlags, fallocate, renameat_with},
    io::Errno,
};

use crate::crash;

/// Bytes by which the next text may be longer than the present one, and still has its room.
const GROWTH: u64 = 4096;

/// The name under which the spare of a file lies.
pub(crate) fn spare(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    PathBuf::from(name)
}

/// Replaces a file as a whole: a crash at any instruction leaves the old one or the new one.
pub(crate) fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let spare = spare(path);
    let length = u64::try_from(text.len()).unwrap_or(u64::MAX);
    let mut file = open(&spare)?;
    file.write_all(text)?;
    file.set_len(length)?;
    file.sync_all()?;
    crash::step("record: written")?;
    match renameat_with(CWD, &spare, CWD, path, RenameFlags::EXCHANGE) {
        Ok(()) => {}
        // There is none yet, or the file system cannot exchange.
        Err(Errno::NOENT | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => fs::rename(&spare, path)?,
        Err(error) => return Err(error.into()),
    }
    crash::step("record: replaced")?;
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())?;
    reserve(&spare, length.saturating_add(GROWTH));
    Ok(())
}

/// Keeps room for the next text. Without it, that one needs what is free then.
fn reserve(spare: &Path, length: u64) {
    let reserved = open(spare).and_then(|file| Ok(fallocate(&file, FallocateFlags::KEEP_SIZE, 0, length)?));
    if let Err(error) = reserved {
        tracing::debug!(%error, path = %spare.display(), "keeping room for the next record");
    }
}

/// Not emptied: what it has of the disk is what it is for.
fn open(spare: &Path) -> io::Result<File> {
    let flags = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or_default();
    OpenOptions::new().write(true).create(true).truncate(false).custom_flags(flags).mode(0o600).open(spare)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::SmallDisk;

    #[test]
    fn the_old_text_or_the_new_one_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        for text in ["first", "second, and longer", "3"] {
            replace(&path, text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "the text and its spare");
        // Who died while writing has left a spare of any length.
        fs::write(spare(&path), "x".repeat(50_000)).unwrap();
        replace(&path, b"fourth").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "fourth");
    }

    #[test]
    fn a_full_disk_takes_the_next_text_as_well() {
        let Some(disk) = SmallDisk::new(1 << 20) else { return };
        let path = disk.path().join("record");
        replace(&path, &[b'a'; 3000]).unwrap();
        disk.fill();
        fs::write(disk.path().join("other"), "x").expect_err("the disk is full");
        // Some longer, some shorter, and somebody takes at once what becomes free.
        for (letter, length) in [(b'b', 6000), (b'c', 100), (b'd', 3500), (b'e', 7000)] {
            replace(&path, &vec![letter; length]).unwrap();
            disk.fill();
            assert_eq!(fs::read(&path).unwrap(), vec![letter; length]);
        }
    }
}
