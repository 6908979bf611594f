//! Messages on the socket of the kernel's uevents, to which any process of the guest may send as well.

use vmm_task::devices::uevent::parse;

const ADD: &[u8] = b"add@/devices/pci0000:00/0000:00:05.0/virtio3/block/vdb\0ACTION=add\0\
    DEVPATH=/devices/pci0000:00/0000:00:05.0/virtio3/block/vdb\0SUBSYSTEM=block\0MAJOR=254\0MINOR=16\0DEVNAME=vdb\0\
    DEVTYPE=disk\0SEQNUM=700\0";
const REMOVE: &[u8] = b"remove@/devices/virtual/net/eth0\0ACTION=remove\0SUBSYSTEM=net\0SEQNUM=1\0";
const UDEV: &[u8] = b"libudev\0\xfe\xed\xca\xfe\x28\0\0\0SUBSYSTEM=block\0";

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    [ADD, REMOVE, UDEV].map(<[u8]>::to_vec).to_vec()
}

pub(crate) fn run(input: &[u8]) {
    let Some(event) = parse(input) else { return };
    assert!(!event.action.is_empty() && event.devpath.starts_with('/'), "{event:?}");
    assert!(!event.brings_a_disk() || event.subsystem == "block");
    assert!(![event.action, event.devpath, event.subsystem].iter().any(|text| text.contains('\0')), "{event:?}");
}
