//! The host's block devices: a node counts as a disk only if it is the one that the kernel made in `/dev`.
//!
//! Anybody who may make nodes in a volume can make one of any device's number. So the daemon compares the
//! node that a mount names with the kernel's own node. The latter, held open, goes all the way to the VMM:
//! nobody can put another in its place.

use std::{
    fs::{self, File, Metadata},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::sys::stat::{major, makedev, minor};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use super::spec::{Bind, SpecError, refused};

/// Folder in which the kernel makes its nodes.
const DEV: &str = "/dev";

/// The kernel's own node of a block device. It is held, not open for use.
#[derive(Clone, Debug)]
pub(super) struct HostDisk {
    /// Below `/dev`.
    pub(super) path: PathBuf,
    file: Arc<File>,
    rdev: u64,
}

impl PartialEq for HostDisk {
    fn eq(&self, other: &Self) -> bool {
        self.rdev == other.rdev
    }
}

impl Eq for HostDisk {}

impl HostDisk {
    /// Takes hold of the node of the device with this number.
    ///
    /// # Errors
    /// When the kernel has no such device, or `/dev` has no node of it.
    pub(super) fn open(rdev: u64) -> io::Result<Self> {
        let uevent = fs::read_to_string(format!("/sys/dev/block/{}:{}/uevent", major(rdev), minor(rdev)))?;
        let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
        let name = name.ok_or_else(|| io::Error::other("the kernel has no name for it"))?;
        let path = Path::new(DEV).join(name);
        let dev = File::open(DEV)?;
        let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let file = File::from(openat2(&dev, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), within)?);
        let found = file.metadata()?;
        if !found.file_type().is_block_device() || found.rdev() != rdev {
            return Err(io::Error::other(format!("{} is another device", path.display())));
        }
        Ok(Self { path, file: Arc::new(file), rdev })
    }

    /// Takes hold of the disk that a mount names, if what was found at its source is the kernel's node and no
    /// other of the same number.
    ///
    /// # Errors
    /// When it is not.
    pub(super) fn named(bind: &Bind, found: &Metadata) -> Result<Self, SpecError> {
        let number = format!("{}:{}", major(found.rdev()), minor(found.rdev()));
        let refuse = |why: String| {
            let (to, from) = (&bind.destination, bind.source.display());
            refused("mounts", format!("{to} is {from}, a node of the host's disk {number}, {why}"))
        };
        let own = Self::open(found.rdev()).map_err(|error| refuse(format!("which is not there: {error}")))?;
        if own.is(found).map_err(|error| refuse(format!("which cannot be read: {error}")))? {
            return Ok(own);
        }
        Err(refuse(format!(
            "but not the one that the kernel made: whoever may make nodes there may have made it; name {} instead",
            own.path.display()
        )))
    }

    fn is(&self, found: &Metadata) -> io::Result<bool> {
        let own = self.file.metadata()?;
        Ok((own.dev(), own.ino(), own.rdev()) == (found.dev(), found.ino(), found.rdev()))
    }

    /// The file that holds it.
    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// As `major:minor`.
    pub(super) fn number(&self) -> String {
        format!("{}:{}", major(self.rdev), minor(self.rdev))
    }

    /// The halves of its number.
    pub(super) fn halves(&self) -> (u64, u64) {
        (major(self.rdev), minor(self.rdev))
    }

    /// Something that stands for a disk.
    #[cfg(test)]
    pub(super) fn double(of_major: u64, of_minor: u64) -> Self {
        let file = Arc::new(File::open("/dev/null").unwrap());
        Self { path: "/dev/sdx".into(), file, rdev: makedev(of_major, of_minor) }
    }
}

/// The number of a device from its halves.
pub(super) const fn number(of_major: u64, of_minor: u64) -> u64 {
    makedev(of_major, of_minor)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::sys::stat::{Mode, SFlag, mknod};

    use super::*;

    fn bind(source: &Path) -> Bind {
        Bind {
            name: "0".into(),
            source: source.into(),
            destination: "/m".into(),
            read_only: false,
            recursive: true,
            disk: None,
        }
    }

    /// Any disk of the machine that this runs on.
    fn any() -> HostDisk {
        let mut found = fs::read_dir("/sys/dev/block").unwrap().filter_map(|entry| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let (of_major, of_minor) = name.split_once(':').unwrap();
            HostDisk::open(number(of_major.parse().unwrap(), of_minor.parse().unwrap())).ok()
        });
        found.next().expect("the machine has a block device")
    }

    #[test]
    fn only_the_kernels_own_node_is_a_disk_whatever_number_another_has() {
        let disk = any();
        let dir = tempfile::tempdir().unwrap();
        let found = |path: &Path| HostDisk::named(&bind(path), &fs::metadata(path).unwrap());
        assert_eq!(found(&disk.path).unwrap(), disk);
        let link = dir.path().join("link");
        symlink(&disk.path, &link).unwrap();
        assert_eq!(found(&link).unwrap(), disk, "another name of it is it");
        let made = dir.path().join("made");
        let mode = Mode::from_bits_truncate(0o600);
        mknod(&made, SFlag::S_IFBLK, mode, disk.rdev).unwrap();
        let error = found(&made).unwrap_err().to_string();
        let expected = format!(
            "mounts of the container's spec: /m is {}, a node of the host's disk {}, but not the one that the kernel made",
            made.display(),
            disk.number()
        );
        assert!(error.starts_with(&expected), "{error}");
        assert!(error.ends_with(&format!("name {} instead", disk.path.display())), "{error}");
    }

    #[test]
    fn a_node_of_no_device_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let made = dir.path().join("made");
        mknod(&made, SFlag::S_IFBLK, Mode::from_bits_truncate(0o600), number(4095, 7)).unwrap();
        let error = HostDisk::named(&bind(&made), &fs::metadata(&made).unwrap()).unwrap_err().to_string();
        assert!(error.contains("a node of the host's disk 4095:7, which is not there"), "{error}");
    }
}
