//! Drivers of storages; their names are in [`kuasar_common::storage::driver`].

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use kuasar_common::{
    constants::GUEST_STATE_DIR,
    host_socket::Access,
    storage::{
        Storage,
        driver::{BLOCK, DISKS, EPHEMERAL, OVERLAY, PMEM, SCSI, SHARE, SOCKET},
        is_plain,
    },
};
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    mount::MountAttrFlags,
};

use super::{
    DEVICES, Storages,
    huge_pages::{self, Reserved},
    mount::{self, NewFs},
    options::Options,
};
use crate::{
    devices::{self, Device, Matcher},
    error::TaskError,
    storage::joined,
};

/// File systems that cannot be written, whatever the options say.
const READ_ONLY_FILE_SYSTEMS: [&str; 3] = ["erofs", "squashfs", "iso9660"];

/// Mount of a device's file system: one at a time for a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filesystem {
    fstype: String,
    data: Vec<(String, Option<String>)>,
}

/// A device's file system, where only the agent looks; or a device that a container uses itself.
#[derive(Clone)]
pub(super) struct Base {
    /// Mount point of the file system, if it is mounted.
    dir: Option<PathBuf>,
    writable: bool,
    /// The device's folder in sysfs.
    sys: PathBuf,
}

/// A storage that is mounted: what goes with it.
#[derive(Default)]
pub(super) struct Mounted {
    /// The device whose file system it shows.
    base: Option<String>,
    pages: Option<Reserved>,
    /// Mounts below its source came along.
    recursive: bool,
    /// Nothing is mounted: the container has the device itself.
    node: bool,
    /// Nothing is mounted: the agent listens there.
    socket: bool,
}

/// The device that a storage needs, if it is one.
pub(super) fn device(storage: &Storage) -> Result<Option<Matcher>, TaskError> {
    let driver = storage.driver.as_str();
    if !DISKS.contains(&driver) {
        return Ok(None);
    }
    let wanted: Matcher = storage.source.parse().map_err(|error| storage.refuse(format!("{error}")))?;
    let fits = match wanted {
        Matcher::BlockPci(_) | Matcher::BlockSerial(_) => driver == BLOCK,
        Matcher::Scsi { .. } => driver == SCSI,
        Matcher::PmemPci(_) => driver == PMEM,
        Matcher::Name(_) => driver != SCSI,
    };
    if !fits {
        return Err(storage.refuse(format!("driver {driver} has no devices like {wanted}")).into());
    }
    if storage.fstype.is_empty() && storage.device.is_empty() {
        return Err(storage.refuse(format!("driver {driver} needs the file system's type")).into());
    }
    Ok(Some(wanted))
}

/// Mounts a storage.
pub(super) async fn mount(
    storages: &Storages,
    storage: &Storage,
    device: Option<Device>,
) -> Result<Mounted, TaskError> {
    if storage.driver == SOCKET {
        return socket(storages, storage);
    }
    let options = Options::parse(&storage.options);
    if let Some(device) = device {
        return show(storages, storage, options, device).await;
    }
    let storage = storage.clone();
    in_thread(move || match storage.driver.as_str() {
        SHARE => share(&storage, &options),
        EPHEMERAL => ephemeral(&storage, options),
        OVERLAY => overlay(&storage, options),
        other => Err(storage.refuse(format!("there is no driver {other:?}")).into()),
    })
    .await
}

/// Takes a storage away.
pub(super) async fn unmount(storages: &Storages, target: &Path, mounted: &Mounted) -> Result<(), TaskError> {
    if mounted.socket {
        let doing = format!("removing the socket {}", target.display());
        storages.sockets.close(target).map_err(TaskError::io(doing))?;
    } else if !mounted.node {
        let (place, recursive) = (target.to_owned(), mounted.recursive);
        in_thread(move || if recursive { mount::detach_all(&place) } else { mount::detach(&place) }).await?;
    }
    if let Some(pages) = &mounted.pages {
        pages.release()?;
    }
    match &mounted.base {
        Some(device) => drop_base(storages, device).await,
        None => Ok(()),
    }
}

/// Without a deadline: the caller has one, and what the kernel has begun is followed to its end.
async fn in_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TaskError> + Send + 'static,
) -> Result<T, TaskError> {
    joined(tokio::task::spawn_blocking(work).await)
}

/// Puts a mount in its place, with its propagation.
fn place(storage: &Storage, options: &Options, mounted: &OwnedFd) -> Result<(), TaskError> {
    let target = Path::new(&storage.mount_point);
    let doing = || format!("mounting the storage at {}", target.display());
    mount::attach(mounted.as_fd(), target).map_err(TaskError::io(doing()))?;
    let propagated = options.propagation.map_or(Ok(()), |how| mount::propagate(target, how));
    propagated.map_err(|error| {
        let _ = mount::detach(target);
        TaskError::io(doing())(error)
    })
}

/// Shows the file system of a device.
async fn show(
    storages: &Storages,
    storage: &Storage,
    options: Options,
    device: Device,
) -> Result<Mounted, TaskError> {
    let node = !storage.device.is_empty();
    let writable = !options.read_only() && !READ_ONLY_FILE_SYSTEMS.contains(&storage.fstype.as_str());
    if writable && device.read_only {
        let why = format!("device {} is read-only; list the storage with option ro", device.name);
        return Err(storage.refuse(why).into());
    }
    let filesystem = Filesystem { fstype: storage.fstype.clone(), data: options.data.clone() };
    let name = device.name.clone();
    let slot = storages.bases.add(name.clone(), filesystem.clone()).map_err(|other| {
        let how = match other.fstype.as_str() {
            "" => "used as a device".to_owned(),
            fstype if storage.device.is_empty() => format!("mounted as {fstype} with other options"),
            fstype => format!("mounted as {fstype}"),
        };
        storage.refuse(format!("device {name} is {how} already"))
    })?;
    let shown = async {
        let mut base = slot.lock_owned().await;
        let now = base.clone();
        let now = in_thread(move || ready(now, &filesystem, &device, writable)).await?;
        let dir = now.dir.clone();
        *base = Some(now);
        let Some(dir) = dir else { return Ok(()) };
        let storage = storage.clone();
        in_thread(move || bind(&storage, &options, || Ok(openat(CWD, &dir, PATH, Mode::empty())?))).await
    };
    match shown.await {
        Ok(()) => Ok(Mounted { base: Some(name), node, ..Mounted::default() }),
        Err(error) => {
            if let Err(more) = drop_base(storages, &name).await {
                log::error!("{more}");
            }
            Err(error)
        }
    }
}

const PATH: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// A device's file system, mounted if it was not, writable if it has to be.
fn ready(
    base: Option<Base>,
    filesystem: &Filesystem,
    device: &Device,
    writable: bool,
) -> Result<Base, TaskError> {
    if let Some(base) = base {
        if let Some(dir) = base.dir.as_ref().filter(|_| writable && !base.writable) {
            mount::make_writable(dir)?;
        }
        return Ok(Base { writable: base.writable || writable, ..base });
    }
    let sys = device.sys.clone();
    if filesystem.fstype.is_empty() {
        return Ok(Base { dir: None, writable, sys });
    }
    let dir = Path::new(DEVICES).join(&device.name);
    let source = device.node.to_string_lossy();
    let Filesystem { fstype, data } = filesystem;
    let new = NewFs { fstype, source: &source, read_only: !writable, data };
    let mounted = mount::new_fs(&new, MountAttrFlags::empty())?;
    let doing = || format!("mounting {fstype} of {source} at {}", dir.display());
    mount::attach(mounted.as_fd(), &dir).map_err(TaskError::io(doing()))?;
    Ok(Base { dir: Some(dir), writable, sys })
}

/// Gives back a reference to a device; at the last its file system is written out and unmounted, and the
/// kernel lets go of it, so that the host can take it away.
async fn drop_base(storages: &Storages, name: &str) -> Result<(), TaskError> {
    let name = name.to_owned();
    let Some(mut there) = storages.bases.drop_one(&name).await else { return Ok(()) };
    if let Some(base) = there.as_ref() {
        let base = base.clone();
        in_thread(move || {
            if let Some(dir) = &base.dir {
                if base.writable
                    && let Err(error) = mount::sync(dir)
                {
                    // The disk may be gone: what was not written is lost, and must not keep the rest.
                    log::error!("writing out the file system at {}: {error}", dir.display());
                }
                mount::detach(dir)?;
            }
            if let Err(error) = devices::let_go(&base.sys) {
                log::warn!("letting go of the device {}: {error}", base.sys.display());
            }
            Ok(())
        })
        .await?;
    }
    *there = None;
    storages.bases.forget(&name, &there);
    Ok(())
}

/// Shows what is at a place somewhere else.
fn bind(
    storage: &Storage,
    options: &Options,
    open: impl FnOnce() -> io::Result<OwnedFd>,
) -> Result<(), TaskError> {
    let doing = || format!("mounting {} {:?} at {}", storage.driver, storage.source, storage.mount_point);
    let made = open().and_then(|source| {
        let copy = mount::copy_tree(source.as_fd(), options.recursive_bind)?;
        mount::set_attributes(copy.as_fd(), options)?;
        Ok(copy)
    });
    place(storage, options, &made.map_err(TaskError::io(doing()))?)
}

fn share(storage: &Storage, options: &Options) -> Result<Mounted, TaskError> {
    if !is_plain(&storage.source) {
        let why = format!("source {:?} is no path in the shared folder", storage.source);
        return Err(storage.refuse(why).into());
    }
    no_data(storage, options)?;
    bind(storage, options, || mount::open_below(Path::new(GUEST_STATE_DIR), &storage.source))?;
    Ok(Mounted { recursive: options.recursive_bind, ..Mounted::default() })
}

fn socket(storages: &Storages, storage: &Storage) -> Result<Mounted, TaskError> {
    let access = Access::parse(&storage.options).map_err(|why| storage.refuse(why))?;
    let path = Path::new(&storage.mount_point);
    let doing = format!("making a socket at {}", path.display());
    storages.sockets.open(path, access).map_err(TaskError::io(doing))?;
    Ok(Mounted { socket: true, ..Mounted::default() })
}

/// Refuses options that the kernel would ignore: somebody relies on them.
fn no_data(storage: &Storage, options: &Options) -> Result<(), TaskError> {
    match options.data.first() {
        Some((name, _)) => {
            Err(storage.refuse(format!("driver {} knows no option {name}", storage.driver)).into())
        }
        None => Ok(()),
    }
}

fn ephemeral(storage: &Storage, options: Options) -> Result<Mounted, TaskError> {
    let pages = match storage.fstype.as_str() {
        "tmpfs" | "" => None,
        "hugetlbfs" => Some(huge_pages::reserve(Path::new(huge_pages::POOLS), &options)?),
        other => {
            let why = format!("driver ephemeral makes tmpfs and hugetlbfs, not {other}");
            return Err(storage.refuse(why).into());
        }
    };
    let fstype = if pages.is_some() { "hugetlbfs" } else { "tmpfs" };
    let fs = NewFs { fstype, source: fstype, read_only: false, data: &options.data };
    let mounted = mount::new_fs(&fs, options.attributes).and_then(|fs| place(storage, &options, &fs));
    match mounted {
        Ok(()) => Ok(Mounted { pages, ..Mounted::default() }),
        Err(error) => {
            let returned = pages.map_or(Ok(()), |pages| pages.release());
            returned.unwrap_or_else(|error| log::error!("{error}"));
            Err(error)
        }
    }
}

fn overlay(storage: &Storage, mut options: Options) -> Result<Mounted, TaskError> {
    let lower = options.take_data("lowerdir").unwrap_or_default();
    let layers: Vec<&str> = lower.split(':').filter(|layer| !layer.is_empty()).collect();
    if layers.is_empty() {
        return Err(storage.refuse("an overlay needs lowerdir=<path>[:<path>...]").into());
    }
    // One layer a parameter: all in one string would be cut at the length of a page.
    let mut data: Vec<(String, Option<String>)> =
        layers.iter().map(|layer| ("lowerdir+".to_owned(), Some((*layer).to_owned()))).collect();
    for (name, value) in &options.data {
        let dir = value.as_deref().unwrap_or_default();
        if ["upperdir", "workdir"].contains(&name.as_str()) {
            std::fs::create_dir_all(dir)
                .map_err(TaskError::io(format!("making the overlay's {name} {dir}")))?;
        }
    }
    data.append(&mut options.data);
    let fs = NewFs { fstype: "overlay", source: "overlay", read_only: false, data: &data };
    place(storage, &options, &mount::new_fs(&fs, options.attributes)?)?;
    Ok(Mounted::default())
}
