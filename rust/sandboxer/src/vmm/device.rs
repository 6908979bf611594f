//! Devices of a VM and the buses they sit on.

use std::{collections::BTreeMap, fmt, os::fd::OwnedFd, path::PathBuf};

use serde::{Deserialize, Serialize};

/// A device that a pod brings.
#[derive(Debug)]
pub enum DeviceInfo {
    /// A network card backed by a tap.
    Tap(Nic),
    /// A block device or a raw image file.
    Block {
        /// Unique in the VM.
        id: String,
        /// The host's path, for messages.
        path: PathBuf,
        /// The open file that the VMM gets: for reading, and for writing unless `read_only`; a block device
        /// is open without the host's cache (`O_DIRECT`).
        file: OwnedFd,
        /// The guest cannot write.
        read_only: bool,
    },
}

impl DeviceInfo {
    /// The device's id, unique in its VM.
    #[must_use]
    pub fn id(&self) -> &str {
        match self {
            Self::Tap(nic) => &nic.id,
            Self::Block { id, .. } => id,
        }
    }
}

/// A network card of the guest.
#[derive(Debug)]
pub struct Nic {
    /// Unique in the VM.
    pub id: String,
    /// The tap's name in the pod's network namespace.
    pub tap: String,
    /// Hardware address, `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// Bytes; also set on the tap.
    pub mtu: u32,
    /// One open tap queue each; the VMM inherits them.
    pub queues: Vec<OwnedFd>,
    /// One open `/dev/vhost-net` for each queue, where the host has one: its kernel then moves the frames,
    /// and not the VMM.
    pub vhost: Vec<OwnedFd>,
}

/// Kinds of buses that devices can be plugged into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BusKind {
    /// PCI and PCI Express.
    Pci,
    /// virtio-mmio: devices exist from boot on and have no address to choose.
    Mmio,
}

/// A bus with its slots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bus {
    /// Its kind.
    pub kind: BusKind,
    /// The VMM's name of it.
    pub id: String,
    /// Slots that devices may take, from 1 on.
    pub slots: u32,
    /// Occupied slots and the ids of the devices in them.
    pub used: BTreeMap<u32, String>,
}

impl Bus {
    /// An empty bus.
    #[must_use]
    pub fn new(kind: BusKind, id: impl Into<String>, slots: u32) -> Self {
        Self { kind, id: id.into(), slots, used: BTreeMap::new() }
    }

    /// Takes the lowest free slot for a device; `None` when the bus is full.
    pub fn take(&mut self, device: &str) -> Option<u32> {
        let slot = (1..=self.slots).find(|slot| !self.used.contains_key(slot))?;
        self.used.insert(slot, device.to_owned());
        Some(slot)
    }

    /// Frees the slot of a device, if it has one here.
    pub fn release(&mut self, device: &str) -> Option<u32> {
        let slot = self.used.iter().find(|(_, id)| *id == device).map(|(slot, _)| *slot)?;
        self.used.remove(&slot);
        Some(slot)
    }
}

/// Address at which the guest finds a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceAddress {
    /// Domain, bus, device and function as sysfs spells them.
    Pci(String),
    /// Its serial: the guest decides on its place, or it has none.
    Serial(String),
}

/// As the agent is told (`kuasar_common::storage::driver`).
impl fmt::Display for DeviceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(bdf) => write!(f, "pci:{bdf}"),
            Self::Serial(serial) => write!(f, "serial:{serial}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_reused_lowest_first_and_end() {
        let mut bus = Bus::new(BusKind::Pci, "pcie.0", 2);
        assert_eq!(bus.take("a"), Some(1));
        assert_eq!(bus.take("b"), Some(2));
        assert_eq!(bus.take("c"), None);
        assert_eq!(bus.release("a"), Some(1));
        assert_eq!(bus.release("a"), None);
        assert_eq!(bus.take("c"), Some(1));
    }
}
