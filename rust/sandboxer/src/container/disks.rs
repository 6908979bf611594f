//! Disks of a pod's containers: which of the host's devices and image files are plugged into its VM, and for
//! which containers.
//!
//! A file or device is plugged in once, however many containers of the pod use it. The table is on disk
//! before anything is plugged in, so a daemon that was restarted knows what to take away and when.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    fs::{self, File, Metadata, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::libc::{O_DIRECT, O_PATH};
use serde::{Deserialize, Serialize};

use super::{
    host_disk::HostDisk,
    storage::{StorageError, write_new},
};
use crate::vmm::{DeviceInfo, Vm};

/// The table, in the pod's folder.
const FILE: &str = "disks.json";

/// A disk that a container wants plugged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    source: Source,
    /// The VM cannot write to it.
    pub(super) read_only: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    /// A file or a device that containerd's snapshotter names.
    Named(PathBuf),
    /// A device that the container's spec names.
    Disk(HostDisk),
}

impl Wanted {
    /// An image file, or a device, of the container's root file system.
    pub(super) fn file(source: impl Into<PathBuf>, read_only: bool) -> Self {
        Self { source: Source::Named(source.into()), read_only }
    }

    /// A disk of the host.
    pub(super) const fn disk(disk: HostDisk, read_only: bool) -> Self {
        Self { source: Source::Disk(disk), read_only }
    }

    /// Its name on the host.
    pub(super) fn path(&self) -> &Path {
        match &self.source {
            Source::Named(path) => path,
            Source::Disk(disk) => &disk.path,
        }
    }

    /// Takes hold of it, without opening it for use.
    fn hold(&self) -> io::Result<Held> {
        let file = match &self.source {
            Source::Named(path) => Arc::new(OpenOptions::new().read(true).custom_flags(O_PATH).open(path)?),
            Source::Disk(disk) => disk.file().clone(),
        };
        let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        Ok(Held { path, identity: identity(&file.metadata()?), file })
    }
}

/// Something to be plugged in, held: what comes to its path later is another.
#[derive(Clone)]
struct Held {
    /// For messages.
    path: PathBuf,
    identity: String,
    file: Arc<File>,
}

impl Held {
    /// Opens it for the VMM. A device without the host's cache: the guest has one.
    fn open(&self, read_only: bool) -> io::Result<OwnedFd> {
        let device = self.file.metadata()?.file_type().is_block_device();
        let flags = if device { O_DIRECT } else { 0 };
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path)?.into())
    }
}

/// The same for every name of a file or device, and different for others.
fn identity(found: &Metadata) -> String {
    if found.file_type().is_block_device() {
        return format!(
            "device {}:{}",
            nix::sys::stat::major(found.rdev()),
            nix::sys::stat::minor(found.rdev())
        );
    }
    format!("file {} of {}", found.ino(), found.dev())
}

/// Room that a VM still has for disks.
#[derive(Clone, Debug, Default)]
pub struct Room {
    /// The VM has a bus for disks. Without it none can be plugged in at all.
    bus: bool,
    free: usize,
    /// Identities of what is plugged in.
    there: BTreeSet<String>,
}

impl Room {
    /// Returns true if disks can be plugged in at all.
    #[must_use]
    pub const fn any(&self) -> bool {
        self.bus
    }

    /// A bus with so many free slots; no bus for 0.
    #[cfg(test)]
    pub(super) fn with(free: usize) -> Self {
        Self { bus: free > 0, free, there: BTreeSet::new() }
    }

    /// Returns true if there are slots for these, and `spare` more.
    #[must_use]
    pub fn fits<'a>(&self, wanted: impl Iterator<Item = &'a Wanted>, spare: usize) -> bool {
        let new = wanted.filter_map(|one| one.hold().ok()).map(|held| held.identity);
        let new: BTreeSet<String> = new.filter(|identity| !self.there.contains(identity)).collect();
        self.bus && new.len().saturating_add(spare) <= self.free
    }
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Disk {
    source: PathBuf,
    /// Records of older daemons have none.
    #[serde(default)]
    identity: Option<String>,
    read_only: bool,
    /// Containers that use it; without any, it is on its way out.
    users: BTreeSet<String>,
    /// As the guest finds it, once it is plugged in.
    address: Option<String>,
}

impl Disk {
    fn identity(&self) -> Option<String> {
        self.identity.clone().or_else(|| fs::metadata(&self.source).ok().map(|found| identity(&found)))
    }
}

/// The disks of a pod.
#[derive(Default)]
pub struct Disks {
    dir: PathBuf,
    vm: Option<Arc<dyn Vm>>,
    /// By id; read when the first one is asked for.
    table: Option<BTreeMap<String, Disk>>,
}

impl fmt::Debug for Disks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disks").field("dir", &self.dir).field("table", &self.table).finish_non_exhaustive()
    }
}

impl Disks {
    /// The disks of the pod with this folder.
    #[must_use]
    pub fn new(pod_dir: &Path) -> Self {
        Self { dir: pod_dir.to_owned(), ..Self::default() }
    }

    /// The VM to plug them into.
    pub fn set_vm(&mut self, vm: Arc<dyn Vm>) {
        self.vm = Some(vm);
    }

    /// The processes that may serve the VM its shared folder.
    #[must_use]
    pub fn servers(&self) -> Vec<u32> {
        let Some(record) = self.vm.as_ref().map(|vm| vm.record()) else { return Vec::new() };
        let companions = record.companions.values().map(|process| process.pid);
        std::iter::once(record.vmm.pid).chain(companions).collect()
    }

    /// Finds the room that the VM still has.
    ///
    /// # Errors
    /// When the table of the disks that it has cannot be read.
    pub fn room(&mut self) -> Result<Room, StorageError> {
        let Some(vm) = self.vm.clone().filter(|vm| vm.can_hot_attach()) else { return Ok(Room::default()) };
        let there = self.table()?.values().filter_map(Disk::identity).collect();
        Ok(Room { bus: true, free: vm.free_slots(), there })
    }

    /// Plugs in what a container wants, and returns how the guest finds each. On error, [`Disks::release`]
    /// undoes what was done.
    ///
    /// # Errors
    /// When something cannot be plugged in.
    pub async fn attach(&mut self, container: &str, wanted: &[Wanted]) -> Result<Vec<String>, StorageError> {
        let mut all = Vec::with_capacity(wanted.len());
        for one in wanted {
            all.push(one.hold().map_err(StorageError::file("finding", one.path()))?);
        }
        let mut addresses = Vec::with_capacity(wanted.len());
        for held in &all {
            // A container that wants one for reading and once more for writing gets it for both; the guest
            // tells them apart.
            let mut same = all.iter().zip(wanted).filter(|(other, _)| other.identity == held.identity);
            let read_only = same.all(|(_, one)| one.read_only);
            addresses.push(self.attach_one(container, held, read_only).await?);
        }
        Ok(addresses)
    }

    async fn attach_one(
        &mut self,
        container: &str,
        held: &Held,
        read_only: bool,
    ) -> Result<String, StorageError> {
        let vm = self.vm.clone().ok_or_else(|| StorageError::Broken("the pod has no VM".into()))?;
        let id = self.enter(container, held, read_only)?;
        self.write()?;
        if let Some(address) = self.table()?.get(&id).and_then(|disk| disk.address.clone()) {
            return Ok(address);
        }
        let (path, opened) = (held.path.clone(), held.clone());
        // A device may take its time to open.
        let file = tokio::task::spawn_blocking(move || opened.open(read_only)).await;
        let file = file.map_err(|e| StorageError::Broken(e.to_string()))?;
        let file = file.map_err(StorageError::file("opening", &path))?;
        let device = DeviceInfo::Block { id: id.clone(), path, file, read_only };
        let address = vm.hot_attach(device).await.map_err(StorageError::Vm)?.to_string();
        if let Some(disk) = self.table()?.get_mut(&id) {
            disk.address = Some(address.clone());
        }
        self.write()?;
        Ok(address)
    }

    /// Notes in the table the container that is to use a disk; returns the disk's id.
    fn enter(&mut self, container: &str, held: &Held, read_only: bool) -> Result<String, StorageError> {
        let table = self.table()?;
        let is_it = |disk: &Disk| disk.identity().as_ref() == Some(&held.identity);
        if let Some((id, disk)) = table.iter_mut().find(|(_, disk)| disk.address.is_some() && is_it(disk)) {
            if disk.read_only && !read_only {
                return Err(StorageError::Refused(format!(
                    "the disk {} is plugged into the VM read-only for another container of the pod, and this one wants to write \
                     to it; let all of them write, or none",
                    held.path.display()
                )));
            }
            disk.users.insert(container.to_owned());
            return Ok(id.clone());
        }
        let id = (1..).map(|n: u32| format!("disk-{n}")).find(|id| !table.contains_key(id));
        let id = id.ok_or_else(|| StorageError::Broken("no number is left for a disk".into()))?;
        let disk = Disk {
            source: held.path.clone(),
            identity: Some(held.identity.clone()),
            read_only,
            users: BTreeSet::from([container.to_owned()]),
            address: None,
        };
        table.insert(id.clone(), disk);
        Ok(id)
    }

    /// A container uses no disk any more: those that nobody else uses are taken away. The guest has let go of
    /// them.
    ///
    /// # Errors
    /// When one cannot be taken away; it is tried again at the next release.
    pub async fn release(&mut self, container: &str) -> Result<(), StorageError> {
        let vm = self.vm.clone();
        let table = self.table()?;
        let mut changed = false;
        for disk in table.values_mut() {
            changed |= disk.users.remove(container);
        }
        let unused: Vec<String> =
            table.iter().filter(|(_, disk)| disk.users.is_empty()).map(|(id, _)| id.clone()).collect();
        let mut failed = None;
        for id in unused {
            let gone = match &vm {
                Some(vm) => vm.hot_detach(&id).await,
                None => Ok(()),
            };
            match gone {
                Ok(()) => changed |= self.table()?.remove(&id).is_some(),
                Err(error) => failed = Some(error),
            }
        }
        // The daemon knows it all the same, and writes it with the next change: an end never waits for room
        // on a disk.
        if changed && let Err(error) = self.write() {
            tracing::warn!(%error, container, "recording that a container's disks are gone");
        }
        failed.map_or(Ok(()), |error| Err(StorageError::Vm(error)))
    }

    fn table(&mut self) -> Result<&mut BTreeMap<String, Disk>, StorageError> {
        let table = match self.table.take() {
            Some(table) => table,
            None => read(&self.dir.join(FILE))?,
        };
        Ok(self.table.insert(table))
    }

    fn write(&self) -> Result<(), StorageError> {
        let path = self.dir.join(FILE);
        let text = serde_json::to_vec_pretty(&self.table).map_err(|e| StorageError::Broken(e.to_string()))?;
        write_new(&path, &text).map_err(StorageError::file("writing", &path))
    }
}

fn read(path: &Path) -> Result<BTreeMap<String, Disk>, StorageError> {
    let text = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        read => read.map_err(StorageError::file("reading", path))?,
    };
    serde_json::from_slice(&text)
        .map_err(|error| StorageError::Broken(format!("{}: {error}", path.display())))
}

#[cfg(test)]
#[path = "disks_tests.rs"]
mod tests;
