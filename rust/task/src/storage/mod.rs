//! Mounts that a container needs before its runtime starts: block devices, parts of the share, memory,
//! overlays.
//!
//! A mount is known by its place, and by its exact storage and owner. It is made when the first container
//! asks for it and taken away with the last. The file system of a device is mounted once, out of sight, and
//! each storage that shows it is a bind mount of that with attributes of its own: so the same volume can be
//! read-only for one container and writable for another.

mod drivers;
mod huge_pages;
mod mount;
pub mod options;
mod refs;
mod shares;

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kuasar_common::storage::{self, MOUNT_POINTS, Storage, StorageError, driver};
use tokio::{
    sync::OnceCell,
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};

use self::{
    drivers::{Base, Filesystem, Mounted},
    refs::References,
    shares::Shares,
};
use crate::{
    devices::{Device, Devices},
    error::TaskError,
    host_socket::HostSockets,
};

/// Folder in which the agent mounts file systems of devices, for itself alone.
pub const DEVICES: &str = "/run/kuasar/devices";
/// Longest time that a device may take to come. The host has plugged it in before it asks for the container.
const DEVICE_DEADLINE: Duration = Duration::from_secs(10);
/// Longest time that mounting or unmounting one storage may take: a journal may have to be replayed first.
const MOUNT_DEADLINE: Duration = Duration::from_secs(30);

/// Devices of a container: the number in its spec, and what the guest has under another.
pub type Nodes = HashMap<(u64, u64), Node>;

/// A device that a container uses itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The guest's number of it, first half.
    pub major: u64,
    /// And second half.
    pub minor: u64,
    /// Its node in the guest.
    pub path: PathBuf,
}

/// Owner of a mount, and its storage: two mounts that differ in any of it are not the same.
type Identity = (Option<String>, Storage);

/// All storages of the VM.
#[derive(Default)]
pub struct Storages {
    mounts: References<PathBuf, Identity, Mounted>,
    bases: References<String, Filesystem, Base>,
    /// Mounts that each container has a reference to, in the order of its list.
    users: Mutex<HashMap<String, Vec<PathBuf>>>,
    /// Started with the first storage that is a device: most pods have none.
    monitor: OnceCell<Arc<Devices>>,
    /// Those that are sockets of the host.
    pub sockets: Arc<HostSockets>,
    /// Volumes of the shared folder.
    pub shares: Arc<Shares>,
}

impl From<StorageError> for TaskError {
    fn from(error: StorageError) -> Self {
        Self::InvalidArgument(error.to_string())
    }
}

impl Storages {
    fn users(&self) -> MutexGuard<'_, HashMap<String, Vec<PathBuf>>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Mounts what the list in a container's bundle says, in its order; returns the devices that are for the
    /// container itself. Whatever comes of it, [`Self::release`] must follow when the container is gone.
    ///
    /// # Errors
    /// At the first that cannot be mounted.
    pub async fn attach(self: &Arc<Self>, container: &str, bundle: &Path) -> Result<Nodes, TaskError> {
        let list = self.list(bundle.join(storage::FILE)).await?;
        // Devices are waited for side by side; mounts may build on one another.
        let mut waits = Vec::with_capacity(list.len());
        for storage in &list {
            waits.push(self.wait_for_device(storage).await?);
        }
        let mut nodes = Nodes::new();
        for (storage, wait) in list.into_iter().zip(waits) {
            let device = match wait {
                Some(wait) => Some(joined(wait.await)?),
                None => None,
            };
            if let (Some(given), Some(device)) = (storage.number(), &device) {
                let (major, minor) = (device.major.into(), device.minor.into());
                nodes.insert(given, Node { major, minor, path: device.node.clone() });
            }
            if storage.driver == driver::SHARE {
                let (shares, id, path) =
                    (Arc::clone(&self.shares), container.to_owned(), storage.source.clone());
                let enter = move || {
                    shares.enter_one(&id, &path);
                    Ok(())
                };
                blocking(format!("mounting the volume of {storage}"), enter).await?;
            }
            self.attach_one(container, storage, device).await?;
        }
        Ok(nodes)
    }

    async fn list(&self, file: PathBuf) -> Result<Vec<Storage>, TaskError> {
        let read = blocking(format!("reading {}", file.display()), move || match fs::read(&file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.map(Some).map_err(TaskError::io(format!("reading {}", file.display()))),
        });
        Ok(read.await?.map(|json| storage::parse(&json)).transpose()?.unwrap_or_default())
    }

    async fn wait_for_device(
        &self,
        storage: &Storage,
    ) -> Result<Option<JoinHandle<Result<Device, TaskError>>>, TaskError> {
        let Some(wanted) = drivers::device(storage)? else { return Ok(None) };
        let start = || async { Devices::start(Path::new("/sys"), Path::new("/dev")) };
        let monitor = self.monitor.get_or_try_init(start).await;
        let monitor = Arc::clone(monitor.map_err(TaskError::io("watching for devices"))?);
        let storage = storage.clone();
        Ok(Some(tokio::spawn(async move {
            let found = monitor.wait(&wanted, DEVICE_DEADLINE).await;
            Ok(found.map_err(|error| storage.refuse(error.to_string()))?)
        })))
    }

    async fn attach_one(
        self: &Arc<Self>,
        container: &str,
        storage: Storage,
        device: Option<Device>,
    ) -> Result<(), TaskError> {
        let target = match storage.device.as_str() {
            "" => PathBuf::from(&storage.mount_point),
            // No mount point is a relative path.
            number => Path::new(container).join(number),
        };
        let owner = (!storage.pod).then(|| container.to_owned());
        let slot = self.mounts.add(target.clone(), (owner, storage.clone())).map_err(|(owner, other)| {
            let whose = owner.map_or("the pod".to_owned(), |owner| format!("container {owner}"));
            storage
                .refuse(format!("the mount point is that of another storage of {whose} ({})", other.driver))
        })?;
        self.users().entry(container.to_owned()).or_default().push(target);
        let this = Arc::clone(self);
        let doing = format!("attaching the storage {storage}");
        // In a task of its own: it is done to the end, and known, even if nobody waits for it any more.
        bounded(doing, async move {
            let mut there = slot.lock_owned().await;
            if there.is_none() {
                *there = Some(drivers::mount(&this, &storage, device).await?);
            }
            Ok(())
        })
        .await
    }

    /// Takes away what only this container still had mounted, the last mounted first. What cannot be
    /// unmounted is kept and reported.
    pub async fn release(self: &Arc<Self>, container: &str) {
        let targets = self.users().remove(container).unwrap_or_default();
        for target in targets.into_iter().rev() {
            let this = Arc::clone(self);
            let doing = format!("unmounting the storage at {}", target.display());
            let done = bounded(doing, async move { this.release_one(&target).await });
            if let Err(error) = done.await {
                log::error!("container {container}: {error}");
            }
        }
    }

    async fn release_one(&self, target: &PathBuf) -> Result<(), TaskError> {
        let Some(mut there) = self.mounts.drop_one(target).await else { return Ok(()) };
        if let Some(mounted) = there.as_ref() {
            drivers::unmount(self, target, mounted).await?;
        }
        *there = None;
        self.mounts.forget(target, &there);
        Ok(())
    }

    /// Takes all mounts away before the VM ends, whoever has a reference to them.
    pub fn leave(&self) {
        let mountinfo = mount::mountinfo().unwrap_or_else(|error| {
            log::error!("{error}");
            String::new()
        });
        for target in mount::mounted_below(&mountinfo, &[Path::new(MOUNT_POINTS), Path::new(DEVICES)]) {
            if let Err(error) = mount::detach(Path::new(&target)) {
                log::warn!("{error}");
            }
        }
    }

    /// Returns the number of mounts, and the number of file systems of devices.
    #[must_use]
    pub fn count(&self) -> (usize, usize) {
        (self.mounts.len(), self.bases.len())
    }
}

fn joined<T>(result: Result<Result<T, TaskError>, tokio::task::JoinError>) -> Result<T, TaskError> {
    result.map_err(|error| TaskError::Internal(error.to_string()))?
}

/// Waits for work that goes on if it takes too long to be waited for.
async fn bounded(
    doing: String,
    work: impl Future<Output = Result<(), TaskError>> + Send + 'static,
) -> Result<(), TaskError> {
    match timeout(MOUNT_DEADLINE, tokio::spawn(work)).await {
        Ok(result) => joined(result),
        Err(_) => Err(TaskError::Deadline(doing)),
    }
}

/// Does in a thread of its own what the kernel may take long for: the agent has only one for all its
/// containers.
pub(crate) async fn blocking<T: Send + 'static>(
    doing: String,
    work: impl FnOnce() -> Result<T, TaskError> + Send + 'static,
) -> Result<T, TaskError> {
    match timeout(MOUNT_DEADLINE, spawn_blocking(work)).await {
        Ok(result) => joined(result),
        Err(_) => Err(TaskError::Deadline(doing)),
    }
}
