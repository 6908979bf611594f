//! Mounts of the guest for a container: a list in the container's bundle, which the host writes and the agent
//! carries out before the OCI runtime looks at the spec. The spec then names mount points of the list, as its
//! root or as sources of bind mounts.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The list's file in a container's bundle: JSON, a list of [`Storage`]. A container without one has no
/// storages.
pub const FILE: &str = "storages.json";
/// Longest such file, in bytes.
pub const MAX_FILE: usize = 1 << 20;
/// Most storages of a container. An overlay with many layers needs one for each.
pub const MAX_STORAGES: usize = 1024;
/// Folder in the guest below which mount points are.
pub const MOUNT_POINTS: &str = "/run/kuasar/storage";

/// Names of drivers, as in [`Storage::driver`].
pub mod driver {
    /// A block device, from its PCI address or serial: source `pci:dddd:bb:dd.f`, `serial:<text>` or
    /// `name:<device>`.
    pub const BLOCK: &str = "blk";
    /// A SCSI disk: source `scsi:<host or *>:<channel>:<target>:<lun>`.
    pub const SCSI: &str = "scsi";
    /// Persistent memory: source `pmem:dddd:bb:dd.f` or `name:<device>`. Option `dax` leaves the page cache
    /// out.
    pub const PMEM: &str = "pmem";
    /// A file or folder of the pod's shared folder: source is its path in there.
    pub const SHARE: &str = "share";
    /// Memory of the VM: file system type `tmpfs`, or `hugetlbfs` with options `size=` and `pagesize=`.
    pub const EPHEMERAL: &str = "ephemeral";
    /// An overlay of others: options `lowerdir=`, `upperdir=`, `workdir=`, with paths in the guest.
    pub const OVERLAY: &str = "overlay";
    /// A socket of the host's: options `uid=`, `gid=`, `mode=` (octal). See [`crate::host_socket`].
    pub const SOCKET: &str = "socket";
    /// Those whose devices are disks.
    pub const DISKS: [&str; 3] = [BLOCK, SCSI, PMEM];
    /// All of them.
    pub const ALL: [&str; 7] = [BLOCK, SCSI, PMEM, SHARE, EPHEMERAL, OVERLAY, SOCKET];
}

/// One thing to mount.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Storage {
    /// One of [`driver`].
    pub driver: String,
    /// Source of the mount; its form depends on the driver.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// File system type; only for drivers that leave a choice.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub fstype: String,
    /// Words as in `fstab`: flags (`ro`, `rro`, `noexec`, …), propagation (`rshared`, …), what the file
    /// system knows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
    /// Path of the mount, below [`MOUNT_POINTS`]; the agent makes it if it is not there. Empty for a device
    /// that is not mounted.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mount_point: String,
    /// Not mounted: a device node for the container. This is the number, `major:minor`, under which the spec
    /// lists it, the host's; the agent puts the guest's in its place.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub device: String,
    /// One mount for all containers of the pod that list it, alike in every field. Otherwise it is this
    /// container's own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pod: bool,
}

/// Why a list is refused.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// It is not the JSON that it should be.
    #[error("reading {FILE}: {0}")]
    Json(#[from] serde_json::Error),
    /// It is longer than anybody needs.
    #[error("reading {FILE}: {0}")]
    TooLong(String),
    /// An entry cannot be done; the sentence names what of it.
    #[error("storage {which}: {why}")]
    Entry {
        /// The entry.
        which: String,
        /// The fault in it.
        why: String,
    },
}

impl Storage {
    /// An error about this storage.
    #[must_use]
    pub fn refuse(&self, why: impl Into<String>) -> StorageError {
        StorageError::Entry { which: self.to_string(), why: why.into() }
    }

    /// The two halves of [`Self::device`].
    #[must_use]
    pub fn number(&self) -> Option<(u64, u64)> {
        let (major, minor) = self.device.split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    }

    fn check(&self) -> Result<(), StorageError> {
        if !driver::ALL.contains(&self.driver.as_str()) {
            let known = driver::ALL.join(", ");
            return Err(self.refuse(format!("there is no driver {:?}; known are {known}", self.driver)));
        }
        let words = self.options.iter().chain([&self.source, &self.fstype, &self.mount_point]);
        if words.into_iter().any(|word| word.contains('\0')) {
            return Err(self.refuse("a field has a zero byte in it"));
        }
        if !self.device.is_empty() {
            return self.check_device();
        }
        let below = self.mount_point.strip_prefix(MOUNT_POINTS).and_then(|rest| rest.strip_prefix('/'));
        if !below.is_some_and(is_plain) {
            return Err(
                self.refuse(format!("a mount point is a path below {MOUNT_POINTS}, without . and .."))
            );
        }
        Ok(())
    }

    fn check_device(&self) -> Result<(), StorageError> {
        if !driver::DISKS.contains(&self.driver.as_str()) {
            return Err(self.refuse(format!("driver {} has no device nodes", self.driver)));
        }
        if self.number().is_none() {
            return Err(self.refuse("a device is the number of one, major:minor"));
        }
        if !self.mount_point.is_empty() || !self.fstype.is_empty() {
            return Err(self.refuse("a device node is not mounted"));
        }
        Ok(())
    }
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.device.is_empty() {
            write!(f, "at {:?}", self.mount_point)
        } else {
            write!(f, "for the device {:?}", self.device)
        }
    }
}

/// Returns true if a path is relative, has no empty part, and goes only down.
#[must_use]
pub fn is_plain(path: &str) -> bool {
    path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// Reads a container's list and checks what can be checked without doing it.
///
/// # Errors
/// At the first entry that cannot be right.
pub fn parse(json: &[u8]) -> Result<Vec<Storage>, StorageError> {
    if json.len() > MAX_FILE {
        return Err(StorageError::TooLong(format!("it is longer than {MAX_FILE} bytes")));
    }
    let list: Vec<Storage> = serde_json::from_slice(json)?;
    if list.len() > MAX_STORAGES {
        return Err(StorageError::TooLong(format!("it has more than {MAX_STORAGES} storages")));
    }
    list.iter().try_for_each(Storage::check)?;
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage() -> Storage {
        Storage {
            driver: driver::BLOCK.into(),
            source: "pci:0000:00:05.0".into(),
            fstype: "ext4".into(),
            options: vec!["ro".into()],
            mount_point: format!("{MOUNT_POINTS}/c/data"),
            device: String::new(),
            pod: true,
        }
    }

    #[test]
    fn a_list_survives_writing_and_reading() {
        let list = vec![storage(), Storage { options: Vec::new(), pod: false, ..storage() }];
        assert_eq!(parse(&serde_json::to_vec(&list).unwrap()).unwrap(), list);
        assert!(parse(b"[]").unwrap().is_empty());
    }

    #[test]
    fn what_cannot_be_right_is_named() {
        let refused =
            |storage: Storage| parse(&serde_json::to_vec(&vec![storage]).unwrap()).unwrap_err().to_string();
        assert_eq!(
            refused(Storage { driver: "mmioblk".into(), ..storage() }),
            "storage at \"/run/kuasar/storage/c/data\": there is no driver \"mmioblk\"; known are blk, scsi, pmem, share, \
             ephemeral, overlay, socket"
        );
        for bad in [
            "",
            "/etc",
            MOUNT_POINTS,
            "/run/kuasar/storage/",
            "/run/kuasar/storage/../x",
            "/run/kuasar/storagex",
        ] {
            let error = refused(Storage { mount_point: bad.into(), ..storage() });
            assert!(
                error.ends_with("a mount point is a path below /run/kuasar/storage, without . and .."),
                "{error}"
            );
        }
        assert!(
            refused(Storage { source: "a\0b".into(), ..storage() })
                .ends_with("a field has a zero byte in it")
        );
        let node =
            Storage { device: "8:16".into(), mount_point: String::new(), fstype: String::new(), ..storage() };
        assert_eq!(node.number(), Some((8, 16)));
        parse(&serde_json::to_vec(&vec![node.clone()]).unwrap()).unwrap();
        for (bad, why) in [
            (Storage { driver: driver::SHARE.into(), ..node.clone() }, "driver share has no device nodes"),
            (Storage { device: "sda".into(), ..node.clone() }, "a device is the number of one, major:minor"),
            (Storage { fstype: "ext4".into(), ..node.clone() }, "a device node is not mounted"),
        ] {
            let expected = format!("storage for the device {:?}: {why}", bad.device);
            assert_eq!(refused(bad), expected);
        }
        let unknown =
            parse(br#"[{"driver":"blk","mount_point":"/run/kuasar/storage/x","colour":1}]"#).unwrap_err();
        assert!(
            unknown.to_string().starts_with("reading storages.json: unknown field `colour`"),
            "{unknown}"
        );
        assert!(
            parse(&vec![b' '; MAX_FILE + 1]).unwrap_err().to_string().contains("longer than 1048576 bytes")
        );
        let many = serde_json::to_vec(&vec![storage(); MAX_STORAGES + 1]).unwrap();
        assert!(parse(&many).unwrap_err().to_string().contains("more than 1024 storages"));
    }
}
