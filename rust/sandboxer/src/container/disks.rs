//! Disks of a pod's containers: which of the host's devices and image files are plugged into its VM, and for whom.
//!
//! A file or device is plugged in once, however many containers of the pod use it. The table is on disk before anything
//! is plugged in, so a daemon that was restarted knows what to take away and when.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::storage::{StorageError, write_new};
use crate::vmm::{DeviceInfo, Vm};

/// The table, in the pod's folder.
const FILE: &str = "disks.json";

/// What a container wants plugged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// A block device or an image file of the host.
    pub source: PathBuf,
    /// The VM cannot write to it.
    pub read_only: bool,
}

/// What a VM can still be given.
#[derive(Clone, Debug, Default)]
pub struct Room {
    /// None at all can be plugged in without.
    bus: bool,
    free: usize,
    there: BTreeSet<PathBuf>,
}

impl Room {
    /// Whether disks can be plugged in at all.
    #[must_use]
    pub const fn any(&self) -> bool {
        self.bus
    }

    /// A bus with so many free slots; no bus for 0.
    #[cfg(test)]
    pub(super) fn with(free: usize) -> Self {
        Self { bus: free > 0, free, there: BTreeSet::new() }
    }

    /// Whether there are slots for these, and some to spare.
    #[must_use]
    pub fn fits<'a>(&self, wanted: impl Iterator<Item = &'a Wanted>, spare: usize) -> bool {
        let new = wanted.filter_map(|one| fs::canonicalize(&one.source).ok());
        let new: BTreeSet<PathBuf> = new.filter(|source| !self.there.contains(source)).collect();
        self.bus && new.len().saturating_add(spare) <= self.free
    }
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Disk {
    source: PathBuf,
    read_only: bool,
    /// Containers that use it; without any, it is on its way out.
    users: BTreeSet<String>,
    /// As the guest finds it, once it is plugged in.
    address: Option<String>,
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

    /// What the VM can take.
    ///
    /// # Errors
    /// When the table of what it has cannot be read.
    pub fn room(&mut self) -> Result<Room, StorageError> {
        let Some(vm) = self.vm.clone().filter(|vm| vm.can_hot_attach()) else { return Ok(Room::default()) };
        let there = self.table()?.values().map(|disk| disk.source.clone()).collect();
        Ok(Room { bus: true, free: vm.free_slots(), there })
    }

    /// Plugs in what a container wants, and returns how the guest finds each. On error, [`Disks::release`] undoes what was done.
    ///
    /// # Errors
    /// When something cannot be plugged in.
    pub async fn attach(&mut self, container: &str, wanted: &[Wanted]) -> Result<Vec<String>, StorageError> {
        let mut sources = Vec::with_capacity(wanted.len());
        for Wanted { source, .. } in wanted {
            sources.push(fs::canonicalize(source).map_err(StorageError::file("finding", source))?);
        }
        let mut addresses = Vec::with_capacity(wanted.len());
        for source in &sources {
            // Whoever wants one for reading and once more for writing gets it for both; the guest tells them apart.
            let mut all = sources.iter().zip(wanted).filter(|(other, _)| *other == source);
            let read_only = all.all(|(_, one)| one.read_only);
            addresses.push(self.attach_one(container, source.clone(), read_only).await?);
        }
        Ok(addresses)
    }

    async fn attach_one(
        &mut self,
        container: &str,
        source: PathBuf,
        read_only: bool,
    ) -> Result<String, StorageError> {
        let vm = self.vm.clone().ok_or_else(|| StorageError::Broken("the pod has no VM".into()))?;
        let table = self.table()?;
        let same = table.iter_mut().find(|(_, disk)| disk.source == source && disk.address.is_some());
        let id = if let Some((id, disk)) = same {
            if disk.read_only && !read_only {
                return Err(StorageError::Refused(format!(
                    "the disk {} is plugged into the VM read-only for another container of the pod, and this one wants to write \
                     to it; let all of them write, or none",
                    source.display()
                )));
            }
            disk.users.insert(container.to_owned());
            id.clone()
        } else {
            let id = (1..).map(|n: u32| format!("disk-{n}")).find(|id| !table.contains_key(id));
            let id = id.ok_or_else(|| StorageError::Broken("no number is left for a disk".into()))?;
            let users = BTreeSet::from([container.to_owned()]);
            let disk = Disk { source: source.clone(), read_only, users, address: None };
            table.insert(id.clone(), disk);
            id
        };
        self.write()?;
        if let Some(address) = self.table()?.get(&id).and_then(|disk| disk.address.clone()) {
            return Ok(address);
        }
        let device = DeviceInfo::Block { id: id.clone(), path: source, read_only };
        let address = vm.hot_attach(device).await.map_err(StorageError::Vm)?.to_string();
        if let Some(disk) = self.table()?.get_mut(&id) {
            disk.address = Some(address.clone());
        }
        self.write()?;
        Ok(address)
    }

    /// A container uses no disk any more: those that nobody else uses are taken away. The guest has let go of them.
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
        // The daemon knows it all the same, and writes it with the next change: an end never waits for room on a disk.
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
