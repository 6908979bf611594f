//! Reads a root file system from a folder, in an order that does not depend on the folder.

use std::fs::{self, Metadata};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Type of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A folder.
    Dir,
    /// A regular file and its size in bytes. Hard links are files of their own: a store that links equal
    /// files must not change the image.
    File(u64),
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A character or block device.
    Device {
        /// Character device, else block device.
        character: bool,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

/// One file, folder, link or node of the root file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path below the root, no leading slash; empty for the root itself.
    pub path: Vec<u8>,
    /// Path that it is read from.
    pub source: PathBuf,
    /// Permission bits, setuid, setgid and sticky bit.
    pub permissions: u32,
    /// Its type.
    pub kind: Kind,
}

impl Entry {
    /// File type and permissions as in `st_mode`.
    #[must_use]
    pub fn mode(&self) -> u32 {
        let kind = match self.kind {
            Kind::Dir => 0o040_000,
            Kind::File(_) => 0o100_000,
            Kind::Symlink(_) => 0o120_000,
            Kind::Device { character: true, .. } => 0o020_000,
            Kind::Device { character: false, .. } => 0o060_000,
            Kind::Fifo => 0o010_000,
        };
        kind | self.permissions
    }
}

/// Lists a root file system: the root first, then by the bytes of the path, so that a folder precedes its
/// content.
///
/// # Errors
/// When something cannot be read, is a socket, or is not a folder to begin with.
pub fn walk(root: &Path) -> Result<Vec<Entry>> {
    let meta = fs::metadata(root).map_err(Error::io("read the root file system", root))?;
    if !meta.is_dir() {
        return Err(Error::Root { root: root.to_owned(), reason: "is not a folder".into() });
    }
    let mut entries = vec![Entry {
        path: Vec::new(),
        source: root.to_owned(),
        permissions: meta.mode() & 0o7777,
        kind: Kind::Dir,
    }];
    let mut pending = vec![(root.to_owned(), Vec::new())];
    while let Some((folder, prefix)) = pending.pop() {
        for item in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
            let item = item.map_err(Error::io("list", &folder))?;
            let entry = read_entry(root, item.path(), &prefix, item.file_name().as_bytes())?;
            if entry.kind == Kind::Dir {
                pending.push((entry.source.clone(), entry.path.clone()));
            }
            entries.push(entry);
        }
    }
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(entries)
}

fn read_entry(root: &Path, source: PathBuf, prefix: &[u8], name: &[u8]) -> Result<Entry> {
    let meta = fs::symlink_metadata(&source).map_err(Error::io("read the attributes of", &source))?;
    let mut path = prefix.to_vec();
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    let kind = kind_of(root, &source, &meta)?;
    // The kernel ignores a link's permissions; some file systems report others than 0777.
    let permissions = if matches!(kind, Kind::Symlink(_)) { 0o777 } else { meta.mode() & 0o7777 };
    Ok(Entry { path, source, permissions, kind })
}

fn kind_of(root: &Path, source: &Path, meta: &Metadata) -> Result<Kind> {
    let file_type = meta.file_type();
    if file_type.is_dir() {
        Ok(Kind::Dir)
    } else if file_type.is_file() {
        Ok(Kind::File(meta.len()))
    } else if file_type.is_symlink() {
        let target = fs::read_link(source).map_err(Error::io("read the link", source))?;
        Ok(Kind::Symlink(target.into_os_string().into_vec()))
    } else if file_type.is_fifo() {
        Ok(Kind::Fifo)
    } else if file_type.is_char_device() || file_type.is_block_device() {
        let (major, minor) = device_numbers(meta.rdev());
        Ok(Kind::Device { character: file_type.is_char_device(), major, minor })
    } else {
        let reason = format!("{} is a socket, which an image cannot hold", source.display());
        Err(Error::Root { root: root.to_owned(), reason })
    }
}

/// Splits a `dev_t` as glibc and the kernel's 64 bit interface do.
fn device_numbers(rdev: u64) -> (u32, u32) {
    let major = ((rdev >> 8) & 0xfff) | ((rdev >> 32) & 0xffff_f000);
    let minor = (rdev & 0xff) | ((rdev >> 12) & 0xffff_ff00);
    (u32::try_from(major).unwrap_or(u32::MAX), u32::try_from(minor).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn order_is_by_path_and_folders_come_first() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b", "a", "a-b", "a/z", "a/c"] {
            let path = dir.path().join(name);
            if name.contains('/') {
                fs::write(path, name).unwrap()
            } else {
                fs::create_dir_all(path).unwrap()
            }
        }
        symlink("a", dir.path().join("link")).unwrap();
        let paths: Vec<_> =
            walk(dir.path()).unwrap().into_iter().map(|e| String::from_utf8(e.path).unwrap()).collect();
        assert_eq!(paths, ["", "a", "a-b", "a/c", "a/z", "b", "link"]);
    }

    #[test]
    fn a_file_or_a_missing_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        fs::write(&file, "").unwrap();
        assert!(walk(&file).unwrap_err().to_string().ends_with("f: is not a folder"));
        let error = walk(&dir.path().join("none")).unwrap_err().to_string();
        assert!(error.starts_with("cannot read the root file system "), "{error}");
    }

    #[test]
    fn a_socket_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
        let error = walk(dir.path()).unwrap_err().to_string();
        assert!(error.ends_with("/s is a socket, which an image cannot hold"), "{error}");
    }

    #[test]
    fn device_numbers_are_split() {
        assert_eq!(device_numbers(0x0501), (5, 1));
        assert_eq!(device_numbers(0x1000_00ab), (0, 0x100ab));
    }
}
