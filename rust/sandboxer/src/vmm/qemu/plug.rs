//! Disks that come and go while the VM runs.
//!
//! They sit behind a bridge with a hot-plug controller (SHPC) that no guest of ours drives: a new disk is on
//! the bus at once, and the agent has the guest's kernel look there; the agent has it let go of a disk before
//! we take it away, and since the guest never switched the slot on, QEMU asks nobody. That takes no ACPI, no
//! option of the guest's kernel, and none of the seconds for which a native PCIe slot waits for a person's
//! hand.
//!
//! QEMU's own list is the truth: the daemon that follows one that died in the middle asks for it.

use std::{
    collections::BTreeMap,
    fs::File,
    os::{fd::OwnedFd, unix::fs::FileTypeExt},
    path::Path,
    sync::{MutexGuard, PoisonError},
    time::Duration,
};

use qapi::{
    Command, Empty, ErrorClass, ExecuteError,
    qmp::{self, QmpCommand},
};
use serde::Serialize;
use serde_json::{Value, json};

use super::{QMP_SOCKET, QemuVm, args::AT_BOOT, qmp::Conversation};
use crate::vmm::{Bus, DeviceAddress, DeviceInfo, VmError};

/// The bus that disks are plugged into.
pub(super) const BUS: &str = "plug";
/// Its slots: 1 to 31; the controller itself takes slot 0.
pub(super) const SLOTS: u32 = 31;
/// Longest time that one disk may take to come or go.
const DEADLINE: Duration = Duration::from_secs(10);
/// Suffix that makes the name of a disk's device from its id.
const SUFFIX: &str = "-device";
/// Path of the devices with names in QEMU's object tree.
const PERIPHERAL: &str = "/machine/peripheral";
/// Longest serial that virtio-blk has (`VIRTIO_BLK_ID_BYTES`).
const MAX_SERIAL: usize = 20;

/// The source of the daemon's list of plugged devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Plugged {
    /// By this daemon, or QEMU has said so.
    #[default]
    Known,
    /// An earlier daemon wrote it down, and may have died in the middle.
    AsRecorded,
}

/// A command whose arguments the schema's types would make unreadable.
macro_rules! command {
    ($type:ident, $name:literal) => {
        #[derive(Serialize)]
        #[serde(transparent)]
        struct $type(Value);

        impl QmpCommand for $type {}
        impl Command for $type {
            type Ok = Empty;

            const NAME: &'static str = $name;
            const ALLOW_OOB: bool = false;
        }
    };
}

command!(BlockdevAdd, "blockdev-add");
command!(DeviceAdd, "device_add");

impl QemuVm {
    fn buses(&self) -> MutexGuard<'_, Vec<Bus>> {
        self.bus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn converse(&self, deadline: Duration) -> Result<Conversation, VmError> {
        Conversation::open(&self.dir.join(QMP_SOCKET), deadline).await
    }

    /// Plugs a disk in. Nothing of it stays on error.
    pub(super) async fn plug(&self, device: DeviceInfo) -> Result<DeviceAddress, VmError> {
        let DeviceInfo::Block { id, path, file, read_only } = device else {
            return Err(VmError::Unsupported(format!(
                "plugging {} into a running VM: only disks can be plugged in while a VM runs",
                device.id()
            )));
        };
        if !(1..=MAX_SERIAL).contains(&id.len()) {
            return Err(VmError::Unsupported(format!(
                "plugging {id} in: a disk's id has 1 to {MAX_SERIAL} bytes"
            )));
        }
        let mut plugged = self.plugging.lock().await;
        self.know(&mut plugged).await?;
        let slot = self.take_slot(&id)?;
        let added = match self.converse(DEADLINE).await {
            Ok(mut qemu) => add(&mut qemu, &Disk { id: &id, slot, path: &path, read_only }, file).await,
            Err(error) => Err(error),
        };
        match added {
            Ok(()) => Ok(DeviceAddress::Serial(id)),
            Err(error) => {
                self.free_slot(&id);
                Err(error)
            }
        }
    }

    fn take_slot(&self, id: &str) -> Result<u32, VmError> {
        let mut buses = self.buses();
        let Some(bus) = buses.iter_mut().find(|bus| bus.id == BUS) else {
            return Err(VmError::Unsupported(format!(
                "plugging {id} into a running VM: its machine type has no bus for that; set hypervisor.machine_type to \
                 \"q35\", and create the pod again"
            )));
        };
        let slots = bus.slots;
        bus.take(id).ok_or_else(|| {
            VmError::Unsupported(format!("plugging {id} in: all {slots} slots of the VM have disks already"))
        })
    }

    fn free_slot(&self, id: &str) {
        if let Some(bus) = self.buses().iter_mut().find(|bus| bus.id == BUS) {
            bus.release(id);
        }
    }

    /// Takes a disk away. One that is not there is no error; one that the VMM does not let go of keeps its
    /// slot.
    pub(super) async fn unplug(&self, id: &str) -> Result<(), VmError> {
        let mut plugged = self.plugging.lock().await;
        if self.supervisor.outcome().is_none() {
            self.know(&mut plugged).await?;
        }
        if !self.buses().iter().any(|bus| bus.id == BUS && bus.used.values().any(|used| used == id)) {
            return Ok(());
        }
        if self.supervisor.outcome().is_none() {
            remove(&mut self.converse(DEADLINE).await?, id).await?;
        }
        self.free_slot(id);
        Ok(())
    }

    /// After a restart: what is plugged in, as QEMU knows it; what is half plugged in goes.
    pub(super) async fn take_stock(&self, plugged: &mut Plugged, deadline: Duration) -> Result<(), VmError> {
        if !self.buses().iter().any(|bus| bus.id == BUS) {
            return Ok(());
        }
        *plugged = Plugged::AsRecorded;
        let mut qemu = self.converse(deadline).await?;
        let there = stock(&mut qemu).await?;
        forget_backends(&mut qemu, &there).await?;
        if let Some(bus) = self.buses().iter_mut().find(|bus| bus.id == BUS) {
            bus.used = there;
        }
        *plugged = Plugged::Known;
        Ok(())
    }

    /// Asks a QEMU that did not say in time, after a restart, what is plugged in.
    async fn know(&self, plugged: &mut Plugged) -> Result<(), VmError> {
        match plugged {
            Plugged::Known => Ok(()),
            Plugged::AsRecorded => self.take_stock(plugged, DEADLINE).await,
        }
    }
}

/// A disk to be plugged in.
struct Disk<'a> {
    id: &'a str,
    slot: u32,
    path: &'a Path,
    read_only: bool,
}

/// Gives QEMU the open file, never its path: what was checked is what the guest gets, whatever comes to the
/// path since.
async fn add(qemu: &mut Conversation, disk: &Disk<'_>, file: OwnedFd) -> Result<(), VmError> {
    let file = File::from(file);
    let kind =
        file.metadata().map_err(VmError::io(format!("plugging in {}", disk.path.display())))?.file_type();
    let set = qemu.give(file.into()).await?;
    let added = add_from(qemu, disk, set, kind.is_block_device()).await;
    // An added disk has a descriptor of its own by now.
    if let Err(error) = qemu.execute(qmp::remove_fd { fdset_id: set, fd: None }).await {
        tracing::warn!(id = disk.id, %error, "closing the file that a disk was plugged in with");
    }
    added
}

async fn add_from(
    qemu: &mut Conversation,
    disk: &Disk<'_>,
    set: i64,
    is_device: bool,
) -> Result<(), VmError> {
    let id = disk.id;
    qemu.execute(BlockdevAdd(backend(disk, set, is_device))).await?;
    let device = json!({
        "driver": "virtio-blk-pci",
        "id": format!("{id}{SUFFIX}"),
        "bus": BUS,
        "addr": format!("{:#x}", disk.slot),
        "drive": id,
        "serial": id,
        // On a bus that is not Express it would have the old interface, too, and want ports for it.
        "disable-legacy": "on",
    });
    if let Err(error) = qemu.execute(DeviceAdd(device)).await {
        if let Err(more) = qemu.execute(qmp::blockdev_del { node_name: id.to_owned() }).await {
            tracing::warn!(id, error = %more, "giving back a disk that could not be plugged in");
        }
        return Err(error);
    }
    Ok(())
}

/// The driver that reads and writes a block device or an image.
pub(super) const fn driver(is_device: bool) -> &'static str {
    if is_device { "host_device" } else { "file" }
}

fn backend(disk: &Disk, set: i64, is_device: bool) -> Value {
    let driver = driver(is_device);
    json!({
        "driver": "raw",
        "node-name": disk.id,
        "read-only": disk.read_only,
        // What the guest trims goes back to the host.
        "discard": "unmap",
        "cache": {"direct": is_device},
        "file": {
            "driver": driver,
            "filename": format!("/dev/fdset/{set}"),
            "cache": {"direct": is_device},
        },
    })
}

async fn remove(qemu: &mut Conversation, id: &str) -> Result<(), VmError> {
    let device = format!("{id}{SUFFIX}");
    match qemu.try_execute(qmp::device_del { id: device.clone() }).await {
        Ok(_) => qemu.deleted(&device).await?,
        // Gone already: only its backend is left.
        Err(ExecuteError::Qapi(error)) if error.class == ErrorClass::DeviceNotFound => {}
        Err(error) => return Err(Conversation::failed::<qmp::device_del>(&error)),
    }
    qemu.execute(qmp::blockdev_del { node_name: id.to_owned() }).await.map(drop)
}

/// Occupied slots of the bus, and the disks in them.
async fn stock(qemu: &mut Conversation) -> Result<BTreeMap<u32, String>, VmError> {
    let mut there = BTreeMap::new();
    for object in qemu.execute(qmp::qom_list { path: PERIPHERAL.into() }).await? {
        let Some(id) = object.name.strip_suffix(SUFFIX) else { continue };
        let path = format!("{PERIPHERAL}/{}", object.name);
        let property = |property: &str| qmp::qom_get { path: path.clone(), property: property.into() };
        let bus = qemu.execute(property("parent_bus")).await?;
        if bus.as_str().and_then(|bus| bus.rsplit('/').next()) != Some(BUS) {
            continue;
        }
        // Device and function in one number.
        let place = qemu.execute(property("addr")).await?;
        if let Some(slot) = place.as_u64().and_then(|place| u32::try_from(place >> 3).ok()) {
            there.insert(slot, id.to_owned());
        }
    }
    Ok(there)
}

/// Closes files that no disk shows: the daemon died between the two commands.
async fn forget_backends(qemu: &mut Conversation, there: &BTreeMap<u32, String>) -> Result<(), VmError> {
    let nodes = qemu.execute(qmp::query_named_block_nodes { flat: Some(true) }).await?;
    for name in nodes.into_iter().filter_map(|node| node.node_name) {
        // QEMU's own names for what has none begin with a #.
        let shown =
            name.starts_with('#') || name.starts_with(AT_BOOT) || there.values().any(|id| *id == name);
        if !shown && let Err(error) = qemu.execute(qmp::blockdev_del { node_name: name.clone() }).await {
            tracing::debug!(name, %error, "not closing a disk's file");
        }
    }
    Ok(())
}
