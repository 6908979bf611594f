//! The disks that sysfs shows.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{
    Device, Matcher,
    matcher::{is_pci_address, scsi_address},
};

/// A disk or partition in sysfs.
pub(super) struct Disk {
    name: String,
    sys: PathBuf,
    /// The folders above it, from the root of all devices.
    parents: Vec<String>,
}

/// All of them, in the order of their names.
pub(super) fn disks(sysfs: &Path) -> Vec<Disk> {
    let Ok(root) = fs::canonicalize(sysfs) else { return Vec::new() };
    let entries = fs::read_dir(root.join("class/block")).into_iter().flatten().flatten();
    let mut disks: Vec<Disk> = entries.filter_map(|entry| Disk::new(&root, &entry)).collect();
    disks.sort_by(|one, other| one.name.cmp(&other.name));
    disks
}

/// Lists the devices that there are, for a person who misses one.
pub(super) fn list(sysfs: &Path) -> String {
    let disks = disks(sysfs);
    let shown: Vec<String> =
        disks.iter().filter(|disk| !disk.is_partition()).map(|disk| disk.to_string()).collect();
    if shown.is_empty() { "none".to_owned() } else { shown.join(", ") }
}

/// Folders of PCI buses that are behind bridges: devices come and go there.
pub(super) fn buses_behind_bridges(sysfs: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(sysfs.join("class/pci_bus")).into_iter().flatten().flatten();
    let real = entries.filter_map(|entry| fs::canonicalize(entry.path()).ok());
    let behind = |path: &PathBuf| path.iter().any(|part| part.to_str().is_some_and(is_pci_address));
    let mut buses: Vec<PathBuf> = real.filter(behind).collect();
    buses.sort();
    buses
}

/// Has the kernel let go of the PCI device that a disk is on, if it is behind a bridge: the host may take it
/// away. It comes back with the next scan, if it is still there.
///
/// # Errors
/// When the kernel refuses.
pub fn let_go(disk: &Path) -> io::Result<()> {
    let named =
        |path: &&Path, is: fn(&str) -> bool| path.file_name().and_then(|name| name.to_str()).is_some_and(is);
    // A SCSI disk's PCI device is the adapter, which has other disks.
    if disk.ancestors().any(|path| named(&path, |name| scsi_address(name).is_some())) {
        return Ok(());
    }
    let mut above = disk.ancestors().filter(|path| named(path, is_pci_address));
    match (above.next(), above.next()) {
        (Some(device), Some(_)) => fs::write(device.join("remove"), "1"),
        _ => Ok(()),
    }
}

impl Disk {
    fn new(root: &Path, entry: &fs::DirEntry) -> Option<Self> {
        let name = entry.file_name().into_string().ok()?;
        // It may have gone by now.
        let sys = fs::canonicalize(entry.path()).ok()?;
        let below = sys.strip_prefix(root).ok()?;
        let parents = below.parent()?.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        Some(Self { name, sys, parents })
    }

    pub(super) fn is(&self, wanted: &Matcher) -> bool {
        if let Matcher::Name(name) = wanted {
            return *name == self.name;
        }
        if self.is_partition() {
            return false;
        }
        match wanted {
            Matcher::BlockPci(address) => self.scsi().is_none() && !self.is_pmem() && self.is_at_pci(address),
            Matcher::PmemPci(address) => self.is_pmem() && self.is_at_pci(address),
            Matcher::BlockSerial(serial) => self.attribute("serial").is_some_and(|text| text == *serial),
            Matcher::Scsi { host, channel, target, lun } => self.scsi().is_some_and(|address| {
                host.is_none_or(|host| host == address.0)
                    && (*channel, *target, *lun) == (address.1, address.2, address.3)
            }),
            Matcher::Name(_) => false,
        }
    }

    /// With its numbers and its node; None if it is gone, or its node has not come yet.
    pub(super) fn device(self, dev: &Path) -> Option<Device> {
        let (major, minor) = self.attribute("dev")?.split_once(':').map(|(a, b)| (a.parse(), b.parse()))?;
        let read_only = self.attribute("ro").is_some_and(|text| text != "0");
        // Names with a slash in them have a ! in sysfs.
        let node = dev.join(self.name.replace('!', "/"));
        node.exists().then_some(())?;
        Some(Device {
            name: self.name,
            node,
            major: major.ok()?,
            minor: minor.ok()?,
            sys: self.sys,
            read_only,
        })
    }

    fn attribute(&self, name: &str) -> Option<String> {
        Some(fs::read_to_string(self.sys.join(name)).ok()?.trim().to_owned())
    }

    fn is_partition(&self) -> bool {
        self.sys.join("partition").exists()
    }

    fn is_pmem(&self) -> bool {
        self.parents.iter().any(|part| part.starts_with("ndbus"))
    }

    fn scsi(&self) -> Option<(u32, u32, u32, u64)> {
        self.parents.iter().rev().find_map(|part| scsi_address(part))
    }

    fn pci(&self) -> impl Iterator<Item = &String> {
        self.parents.iter().rev().filter(|part| is_pci_address(part))
    }

    /// Its own address, and that of what is directly above it, if that is a bridge.
    fn is_at_pci(&self, address: &str) -> bool {
        self.pci().take(2).any(|own| own == address)
    }
}

impl std::fmt::Display for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.name)?;
        if let Some((host, channel, target, lun)) = self.scsi() {
            return write!(f, " (scsi:{host}:{channel}:{target}:{lun})");
        }
        if let Some(serial) = self.attribute("serial").filter(|serial| !serial.is_empty()) {
            write!(f, " (serial:{serial})")?;
        }
        let kind = if self.is_pmem() { "pmem" } else { "pci" };
        self.pci().next().map_or(Ok(()), |address| write!(f, " ({kind}:{address})"))
    }
}
