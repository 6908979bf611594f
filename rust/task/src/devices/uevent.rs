//! Messages of the kernel when a device comes or goes (`lib/kobject_uevent.c`): `<action>@<path>`, then
//! `KEY=value` each, all ended by zero bytes.

/// A uevent, as far as the agent reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uevent<'a> {
    /// `add`, `remove`, `change` and so on.
    pub action: &'a str,
    /// The device's path in sysfs, from its root.
    pub devpath: &'a str,
    /// `block`, `net` and so on.
    pub subsystem: &'a str,
}

impl Uevent<'_> {
    /// A disk may be there now that was not, or be usable that was not.
    #[must_use]
    pub fn brings_a_disk(&self) -> bool {
        self.subsystem == "block" && self.action != "remove"
    }
}

/// Reads a message. None: it is not one of the kernel's.
#[must_use]
pub fn parse(message: &[u8]) -> Option<Uevent<'_>> {
    let mut fields = message.split(|byte| *byte == 0).map(std::str::from_utf8);
    let (action, devpath) = fields.next()?.ok()?.split_once('@')?;
    if action.is_empty() || !devpath.starts_with('/') {
        return None;
    }
    let subsystem = fields.flatten().find_map(|field| field.strip_prefix("SUBSYSTEM="));
    Some(Uevent { action, devpath, subsystem: subsystem.unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADD: &[u8] = b"add@/devices/pci0000:00/0000:00:05.0/virtio3/block/vdb\0ACTION=add\0\
        DEVPATH=/devices/pci0000:00/0000:00:05.0/virtio3/block/vdb\0SUBSYSTEM=block\0MAJOR=254\0MINOR=16\0DEVNAME=vdb\0\
        DEVTYPE=disk\0DISKSEQ=2\0SEQNUM=700\0";

    #[test]
    fn messages_are_read() {
        let event = parse(ADD).unwrap();
        assert_eq!((event.action, event.subsystem), ("add", "block"));
        assert_eq!(event.devpath, "/devices/pci0000:00/0000:00:05.0/virtio3/block/vdb");
        assert!(event.brings_a_disk());
        assert!(!parse(b"remove@/x\0SUBSYSTEM=block\0").unwrap().brings_a_disk());
        assert!(!parse(b"add@/x\0SUBSYSTEM=net\0").unwrap().brings_a_disk());
        assert!(!parse(b"add@/x").unwrap().brings_a_disk());
    }

    #[test]
    fn what_is_none_is_ignored() {
        for bad in [&b""[..], b"\0", b"libudev\0\xfe\xed\xca\xfe", b"@/x\0", b"add@x\0", b"\xff@/x\0", b"add"]
        {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
        assert_eq!(parse(b"add@/x\0\xff\0SUBSYSTEM=block").unwrap().subsystem, "block");
    }
}
