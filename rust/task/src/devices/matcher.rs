//! Names that the host gives to devices of the guest.

use std::{
    fmt::{self, Display},
    str::FromStr,
};

/// Longest serial that virtio-blk has (`VIRTIO_BLK_ID_BYTES` of `linux/virtio_blk.h`).
const MAX_SERIAL: usize = 20;

/// Name of a device. As text: `pci:0000:00:05.0`, `serial:data`, `scsi:0:0:1:2` or `scsi:*:0:1:2`,
/// `pmem:0000:00:06.0`, `name:vdb`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Matcher {
    /// A disk at a PCI address: its own, or that of the bridge directly above it, which is all that a host
    /// knows of a slot behind a port.
    BlockPci(String),
    /// A virtio disk by its serial.
    BlockSerial(String),
    /// A SCSI disk.
    Scsi {
        /// Number of the host adapter; None for any.
        host: Option<u32>,
        /// Channel of the adapter.
        channel: u32,
        /// Target of the channel.
        target: u32,
        /// Logical unit of the target.
        lun: u64,
    },
    /// Persistent memory at a PCI address, as [`Self::BlockPci`].
    PmemPci(String),
    /// A disk or partition by the name that the kernel gives it.
    Name(String),
}

/// A text that names no device.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} names no device; forms are pci:0000:00:05.0, serial:<at most 20 bytes>, scsi:<host or *>:<channel>:<target>:<lun>, \
     pmem:0000:00:06.0 and name:<kernel's name>"
)]
pub struct WrongForm(pub String);

impl FromStr for Matcher {
    type Err = WrongForm;

    fn from_str(text: &str) -> Result<Self, WrongForm> {
        let parsed = text.split_once(':').and_then(|(kind, rest)| match kind {
            "pci" => is_pci_address(rest).then(|| Self::BlockPci(rest.to_ascii_lowercase())),
            "pmem" => is_pci_address(rest).then(|| Self::PmemPci(rest.to_ascii_lowercase())),
            "serial" => {
                let fits = (1..=MAX_SERIAL).contains(&rest.len()) && rest.trim() == rest;
                fits.then(|| Self::BlockSerial(rest.to_owned()))
            }
            "name" => is_name(rest).then(|| Self::Name(rest.to_owned())),
            "scsi" => scsi(rest),
            _ => None,
        });
        parsed.ok_or_else(|| WrongForm(text.to_owned()))
    }
}

impl Display for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BlockPci(address) => write!(f, "pci:{address}"),
            Self::BlockSerial(serial) => write!(f, "serial:{serial}"),
            Self::PmemPci(address) => write!(f, "pmem:{address}"),
            Self::Name(name) => write!(f, "name:{name}"),
            Self::Scsi { host: Some(host), channel, target, lun } => {
                write!(f, "scsi:{host}:{channel}:{target}:{lun}")
            }
            Self::Scsi { host: None, channel, target, lun } => write!(f, "scsi:*:{channel}:{target}:{lun}"),
        }
    }
}

/// Returns true if a text is a PCI address as sysfs writes it, `dddd:bb:dd.f`.
pub(super) fn is_pci_address(text: &str) -> bool {
    let hex = |text: &str, length: usize| text.len() == length && text.bytes().all(|b| b.is_ascii_hexdigit());
    let mut parts = text.split(':');
    let (domain, bus, rest) = (parts.next(), parts.next(), parts.next());
    let (device, function) = rest.and_then(|rest| rest.split_once('.')).unwrap_or_default();
    parts.next().is_none()
        && domain.is_some_and(|domain| hex(domain, 4))
        && bus.is_some_and(|bus| hex(bus, 2))
        && hex(device, 2)
        && hex(function, 1)
}

/// A name is one part of a path.
fn is_name(text: &str) -> bool {
    !text.is_empty() && !text.starts_with('.') && !text.contains(['/', '\0'])
}

fn scsi(text: &str) -> Option<Matcher> {
    let mut parts = text.split(':');
    let host = match parts.next()? {
        "*" => None,
        host => Some(host.parse().ok()?),
    };
    let (channel, target) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let lun = parts.next()?.parse().ok()?;
    parts.next().is_none().then_some(Matcher::Scsi { host, channel, target, lun })
}

/// Host, channel, target and logical unit, as sysfs names a SCSI device.
pub(super) fn scsi_address(text: &str) -> Option<(u32, u32, u32, u64)> {
    match scsi(text)? {
        Matcher::Scsi { host: Some(host), channel, target, lun } => Some((host, channel, target, lun)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_and_written() {
        for text in [
            "pci:0000:00:05.0",
            "pmem:0000:ff:1f.7",
            "serial:data-1",
            "scsi:0:0:1:2",
            "scsi:*:0:1:18446744073709551615",
            "name:vdb",
        ] {
            assert_eq!(text.parse::<Matcher>().unwrap().to_string(), text);
        }
        assert_eq!("pci:0000:00:1F.0".parse(), Ok(Matcher::BlockPci("0000:00:1f.0".to_owned())));
    }

    #[test]
    fn other_forms_are_refused() {
        for bad in [
            "",
            "vdb",
            "pci:",
            "pci:00:05.0",
            "pci:0000:00:05",
            "pci:0000:00:05.0:1",
            "pci:0000:0:05.0",
            "pmem:1",
            "serial:",
            "serial: x",
            "serial:123456789012345678901",
            "scsi:0:0:1",
            "scsi:0:0:1:2:3",
            "scsi:a:0:1:2",
            "scsi:-1:0:1:2",
            "name:",
            "name:../vda",
            "name:a/b",
            "nvme:1",
        ] {
            let error = bad.parse::<Matcher>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{bad:?} names no device; forms are pci:0000")), "{error}");
        }
    }
}
