//! Plans the way of a container's files into the VM: over the pod's shared folder, or as a disk that the
//! guest mounts itself.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use kuasar_common::{
    constants::GUEST_BLOCK_NODES,
    storage::{MOUNT_POINTS, Storage, driver},
};
use serde_json::{Value, json};

use super::{
    disks::{Room, Wanted},
    host_disk::{self, HostDisk},
    host_mount::HostMount,
    layers::{InGuest, Layers},
    mount::{self, MountError, RootfsMount},
    mountinfo, nodes,
    sockets::HostSocket,
    spec::{self, Bind, BlockDevice, CpuSet, Needs, Object, SpecError, Target, refused},
    storage::{StorageError, is_safe_id},
    volumes,
};
use crate::file_system;

/// Slots that layers leave to volumes and devices of containers that may come.
const SPARE: usize = 8;

/// Plan by which a container is made.
#[derive(Debug)]
pub struct Plan {
    /// Its spec, for the guest.
    pub(super) spec: Value,
    /// Root file system to be mounted on the host; empty if the guest mounts it.
    pub(super) rootfs: Vec<RootfsMount>,
    /// The same, if it is made of images.
    pub(super) layers: Option<Layers>,
    /// Volumes to be mounted on the host.
    pub(super) binds: Vec<Bind>,
    /// File systems that the guest mounts, in this order; the first ones are `disks`.
    pub(super) storages: Vec<Storage>,
    disks: Vec<Wanted>,
    sockets: Vec<HostSocket>,
    cpuset: CpuSet,
}

impl Plan {
    /// Reads the bundle that containerd made, and decides. `room`: what the VM can be given.
    ///
    /// # Errors
    /// When the container asks for something that a VM cannot have.
    pub fn new(
        target: &Target,
        bundle: &Path,
        rootfs: Vec<RootfsMount>,
        room: &Room,
    ) -> Result<Self, StorageError> {
        if !is_safe_id(target.container) {
            return Err(StorageError::Id(target.container.to_owned()));
        }
        let source = bundle.join("config.json");
        let text = fs::read(&source).map_err(StorageError::file("reading", &source))?;
        let mut spec: Value = serde_json::from_slice(&text)
            .map_err(|e| SpecError::Malformed(format!("{}: {e}", source.display())))?;
        let Needs { binds, devices, cpuset } = spec::rewrite(&mut spec, target)?;
        let (rootfs, layers) = match Layers::of(&rootfs)? {
            Some(layers) => (Vec::new(), Some(layers)),
            None => (rootfs, None),
        };
        let mut plan = Self {
            spec,
            rootfs: Vec::new(),
            layers: None,
            binds: Vec::new(),
            storages: Vec::new(),
            disks: Vec::new(),
            sockets: Vec::new(),
            cpuset,
        };
        if layers.is_none() {
            plan.add_rootfs(target.container, rootfs, room.any())?;
        }
        for device in devices {
            plan.add_device(device)?;
        }
        for bind in binds {
            plan.add_bind(target.container, bind)?;
        }
        // Last: disks that can be nothing else come first.
        if let Some(layers) = layers {
            plan.add_layers(target.container, layers, room);
        }
        plan.storages.extend(plan.sockets.iter().map(HostSocket::storage));
        Ok(plan)
    }

    /// Disks to plug in.
    #[must_use]
    pub fn disks(&self) -> &[Wanted] {
        &self.disks
    }

    /// Sockets of the host that it has mounted.
    #[must_use]
    pub fn sockets(&self) -> &[HostSocket] {
        &self.sockets
    }

    /// CPUs and memory nodes of the host that the guest's CPUs may use for it.
    #[must_use]
    pub const fn cpuset(&self) -> &CpuSet {
        &self.cpuset
    }

    /// OOM score that it asks for: the readiness with which the kernel is to kill its processes for want of
    /// memory.
    #[must_use]
    pub fn oom_score_adj(&self) -> Option<i64> {
        self.spec.pointer("/process/oomScoreAdj")?.as_i64()
    }

    /// Tells the guest where it finds what was plugged in.
    pub fn plugged_in(&mut self, addresses: Vec<String>) {
        for (storage, address) in self.storages.iter_mut().zip(addresses) {
            storage.source = address;
        }
    }

    fn add_disk(&mut self, wanted: Wanted, storage: Storage) {
        self.disks.push(wanted);
        self.storages.push(Storage { driver: driver::BLOCK.into(), ..storage });
    }

    fn add_rootfs(
        &mut self,
        container: &str,
        mounts: Vec<RootfsMount>,
        disks: bool,
    ) -> Result<(), StorageError> {
        mount::check_any(&mounts)?;
        let [one] = mounts.as_slice() else {
            self.rootfs = mounts;
            return Ok(());
        };
        let is = |name: &str| one.options.iter().any(|option| option == name);
        let (image, bind) = (is("loop"), one.kind == "bind" || is("bind") || is("rbind"));
        let device =
            !bind && fs::metadata(&one.source).is_ok_and(|found| found.file_type().is_block_device());
        if image && !disks {
            return Err(MountError::Refused(format!(
                "the root file system is the image file {}, which can only be plugged into a VM of another machine type: set \
                 hypervisor.machine_type to \"q35\", or use the overlayfs snapshotter",
                one.source
            ))
            .into());
        }
        if !disks || !(image || device) || !one.target.trim_matches('/').is_empty() {
            self.rootfs = mounts;
            return Ok(());
        }
        let mount_point = format!("{MOUNT_POINTS}/{container}/rootfs");
        let options = one.options.iter().filter(|option| *option != "loop").cloned().collect();
        let storage = Storage {
            fstype: one.kind.clone(),
            options,
            mount_point: mount_point.clone(),
            ..Storage::default()
        };
        if let Some(path) = self.spec.pointer_mut("/root/path") {
            *path = json!(mount_point);
        }
        self.add_disk(Wanted::file(&one.source, is("ro")), storage);
        Ok(())
    }

    /// Layers are disks if there is room for them, and shared from the host if there is not.
    fn add_layers(&mut self, container: &str, layers: Layers, room: &Room) {
        let made = layers.in_guest(container).and_then(|made| {
            let wanted = self.disks.iter().chain(made.disks.iter().map(|(disk, _)| disk));
            if room.fits(wanted, SPARE) { Ok(made) } else { Err("the VM has too few slots left".to_owned()) }
        });
        match made {
            Ok(InGuest { disks, overlay, root }) => {
                for (disk, storage) in disks {
                    self.add_disk(disk, storage);
                }
                self.storages.extend(overlay);
                if let Some(path) = self.spec.pointer_mut("/root/path") {
                    *path = json!(root);
                }
            }
            Err(why) => {
                tracing::info!(container, why, "mounting the root file system's layers on the host");
                self.layers = Some(layers);
            }
        }
    }

    fn add_device(&mut self, device: BlockDevice) -> Result<(), StorageError> {
        let BlockDevice { path, major, minor, read_only } = device;
        let disk = HostDisk::open(host_disk::number(major, minor)).map_err(|error| {
            refused(
                "linux.devices",
                format!("{path} is the host's device {major}:{minor}, which is not there: {error}"),
            )
        })?;
        let options = if read_only { vec!["ro".to_owned()] } else { Vec::new() };
        let storage = Storage { device: disk.number(), options, ..Storage::default() };
        self.add_disk(Wanted::disk(disk, read_only), storage);
        Ok(())
    }

    /// The spec's mount that shows a bind mount of the host.
    fn mount_of(&mut self, container: &str, bind: &Bind) -> Option<&mut Object> {
        volumes::mount_of(&mut self.spec, container, &bind.name)
    }

    /// Read-only is the top of a mount, not what is mounted below it or will be. In the guest all of it is
    /// one mount, and what is below inherits from the top; the host's own mount, which the file server goes
    /// through, knows the difference.
    fn leave_read_only_to_the_host(&mut self, container: &str, bind: &Bind) -> Result<(), StorageError> {
        let below = bind.recursive
            && mountinfo::has_mounts_below(&bind.source)
                .map_err(StorageError::file("reading the mounts below", &bind.source))?;
        let options = self.mount_of(container, bind).and_then(|mount| mount.get_mut("options"));
        let Some(options) = options.and_then(Value::as_array_mut) else { return Ok(()) };
        let has = |name: &str| options.iter().any(|option| option == name);
        if !has("rro") && (below || has("rslave") || has("slave")) {
            options.iter_mut().filter(|option| **option == "ro").for_each(|option| *option = json!("rw"));
        }
        Ok(())
    }

    fn add_bind(&mut self, container: &str, bind: Bind) -> Result<(), StorageError> {
        let found = fs::metadata(&bind.source);
        let block = found.as_ref().is_ok_and(|found| found.file_type().is_block_device());
        if let Some((fstype, options)) = bind.disk.clone() {
            let (Ok(found), true) = (&found, block) else {
                return Err(volumes::not_mountable(&bind.destination, &fstype).into());
            };
            let disk = HostDisk::named(&bind, found)?;
            return self.add_file_system(container, bind, disk, fstype, options);
        }
        match &found {
            Ok(found) if block => {
                let disk = HostDisk::named(&bind, found)?;
                self.add_node(container, &bind, disk);
                return Ok(());
            }
            Ok(found) if found.file_type().is_char_device() => {
                if let Some(path) = nodes::in_guest(found.rdev()) {
                    self.set_source(container, &bind, path);
                    return Ok(());
                }
            }
            Ok(found) if found.file_type().is_socket() => {
                let socket = HostSocket::new(container, &bind, found)?;
                self.set_source(container, &bind, &socket.guest);
                self.sockets.push(socket);
                return Ok(());
            }
            Ok(found) if found.is_dir() || found.is_file() => {
                self.confine(container, &bind)?;
                if found.is_dir() && bind.read_only {
                    self.leave_read_only_to_the_host(container, &bind)?;
                }
            }
            _ => {}
        }
        self.binds.push(bind);
        Ok(())
    }

    /// Applies the limits of a shared source's file system to its users in the guest, or refuses the source.
    fn confine(&mut self, container: &str, bind: &Bind) -> Result<(), StorageError> {
        let host = HostMount::of(&bind.source).map_err(StorageError::file("reading", &bind.source))?;
        host.check(bind)?;
        if let Some(mount) = self.mount_of(container, bind) {
            host.confine(mount);
        }
        Ok(())
    }

    fn set_source(&mut self, container: &str, bind: &Bind, source: &str) {
        if let Some(mount) = self.mount_of(container, bind) {
            mount.insert("source".into(), json!(source));
        }
    }

    /// A bind mount of a disk's node is the node. What may be done with it, the rules about devices say, as
    /// on the host; a disk that they say nothing of cannot be written even by a container that gets around
    /// them.
    fn add_node(&mut self, container: &str, bind: &Bind, disk: HostDisk) {
        let ((major, minor), device) = (disk.halves(), disk.number());
        self.set_source(container, bind, &format!("{GUEST_BLOCK_NODES}/{device}"));
        let linux = self.spec.get("linux").and_then(Value::as_object);
        let writes = linux.is_some_and(|linux| nodes::may_write(linux, major, minor));
        let read_only = bind.read_only || !writes;
        let listed = self.storages.iter().position(|storage| storage.device == device);
        let known = listed.and_then(|at| self.storages.get_mut(at).zip(self.disks.get_mut(at)));
        match known {
            // The same disk under several names: writable if one of them is.
            Some((storage, there)) if !read_only => {
                storage.options.clear();
                there.read_only = false;
            }
            Some(_) => {}
            None => {
                let options = if read_only { vec!["ro".to_owned()] } else { Vec::new() };
                let storage = Storage { device, options, ..Storage::default() };
                self.add_disk(Wanted::disk(disk, read_only), storage);
            }
        }
    }

    /// A disk that is to be mounted.
    fn add_file_system(
        &mut self,
        container: &str,
        bind: Bind,
        disk: HostDisk,
        fstype: String,
        options: Vec<String>,
    ) -> Result<(), StorageError> {
        let found = file_system::of(&disk.path, 0).map_err(StorageError::file("reading", &disk.path))?;
        if found.is_none() {
            return Err(refused(
                "mounts",
                format!(
                    "{} is the disk {}, which has no file system to mount; make one, or give it to the container as a device \
                     (volumeMode: Block)",
                    bind.destination,
                    bind.source.display()
                ),
            )
            .into());
        }
        let mount_point = format!("{MOUNT_POINTS}/{container}/mounts/{}", bind.name);
        self.set_source(container, &bind, &mount_point);
        let storage = Storage { fstype, options, mount_point, ..Storage::default() };
        self.add_disk(Wanted::disk(disk, bind.read_only), storage);
        Ok(())
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
