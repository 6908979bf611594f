//! Disks that come and go while the guest runs.
//!
//! Sysfs says which disks there are; the agent remembers nothing of it, so nothing can be out of date when a
//! slot is used again. The kernel's uevents only tell that looking again is worth while: a caller that waits
//! for a device has subscribed before its first look, and is forgotten when it gives up.

mod matcher;
mod sysfs;
pub mod uevent;

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SocketAddrAny, SocketFlags, SocketType, bind, netlink, recvfrom,
        socket_with,
    },
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{Mutex, watch},
    task::spawn_blocking,
    time::timeout,
};

pub use self::{
    matcher::{Matcher, WrongForm},
    sysfs::let_go,
};

/// The kernel's own group of uevents; group 2 is udev's.
const KERNEL_GROUP: u32 = 1;
/// Longest uevent that is read, bytes: `UEVENT_BUFFER_SIZE` and the header of `linux/kobject.h`, and to
/// spare.
const BUFFER: usize = 8 * 1024;

/// A disk or partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The kernel's name for it.
    pub name: String,
    /// Its node, which exists.
    pub node: PathBuf,
    /// Device number's first half.
    pub major: u32,
    /// And second half.
    pub minor: u32,
    /// Its folder in sysfs.
    pub sys: PathBuf,
    /// It cannot be written.
    pub read_only: bool,
}

/// Why there is no such device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// It did not come in time.
    #[error("no device {wanted} came within {} s; there are: {there}", .within.as_secs())]
    TimedOut {
        /// The device that was waited for.
        wanted: Matcher,
        /// For how long.
        within: Duration,
        /// Devices that are there instead.
        there: String,
    },
}

/// Sees devices come.
pub struct Devices {
    sysfs: PathBuf,
    dev: PathBuf,
    /// Counts what happened.
    changes: watch::Sender<u64>,
    /// Held by the one who has the kernel scan PCI.
    scanning: Mutex<()>,
}

impl Devices {
    /// Begins to listen to the kernel; `sysfs` and `dev` are where it shows its devices.
    ///
    /// # Errors
    /// When the kernel has no uevents.
    pub fn start(sysfs: &Path, dev: &Path) -> io::Result<Arc<Self>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let protocol = Some(netlink::KOBJECT_UEVENT);
        let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, protocol)?;
        bind(&socket, &netlink::SocketAddrNetlink::new(0, KERNEL_GROUP))?;
        Self::listen(socket, sysfs, dev)
    }

    /// The same with a socket that somebody else opened.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn listen(socket: OwnedFd, sysfs: &Path, dev: &Path) -> io::Result<Arc<Self>> {
        // SAFETY: it stays open and registered until the reader's task, which owns both, ends.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?;
        let changes = watch::Sender::new(0);
        let devices = Arc::new(Self {
            sysfs: sysfs.to_owned(),
            dev: dev.to_owned(),
            changes,
            scanning: Mutex::default(),
        });
        tokio::spawn(read(socket, devices.changes.clone()));
        Ok(devices)
    }

    /// Number of calls that wait for a device now.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.changes.receiver_count()
    }

    /// A device, as soon as it is there.
    ///
    /// # Errors
    /// When it has not come by the deadline; the message says what is there instead.
    pub async fn wait(&self, wanted: &Matcher, deadline: Duration) -> Result<Device, DeviceError> {
        let mut changes = self.changes.subscribe();
        let search = async {
            if let Some(found) = self.find(wanted) {
                return found;
            }
            self.scan_scsi(wanted);
            self.scan_pci(wanted).await;
            loop {
                if let Some(found) = self.find(wanted) {
                    return found;
                }
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        let found = timeout(deadline, search).await.ok();
        // Once more, in case the kernel could not tell.
        found.or_else(|| self.find(wanted)).ok_or_else(|| DeviceError::TimedOut {
            wanted: wanted.clone(),
            within: deadline,
            there: sysfs::list(&self.sysfs),
        })
    }

    /// Has the kernel look what is plugged in behind bridges: on a machine without ACPI and native hot-plug
    /// nobody tells it.
    async fn scan_pci(&self, wanted: &Matcher) {
        if !matches!(wanted, Matcher::BlockPci(_) | Matcher::BlockSerial(_) | Matcher::PmemPci(_)) {
            return;
        }
        // Who comes second finds what the first has found.
        let _one = self.scanning.lock().await;
        if self.find(wanted).is_some() {
            return;
        }
        let buses = sysfs::buses_behind_bridges(&self.sysfs);
        let scan = move || {
            for bus in buses {
                if let Err(error) = fs::write(bus.join("rescan"), "1") {
                    log::warn!("scanning {}: {error}", bus.display());
                }
            }
        };
        // Whoever waits has a deadline; a scan is done to its end.
        if let Err(error) = spawn_blocking(scan).await {
            log::error!("scanning PCI: {error}");
        }
    }

    fn find(&self, wanted: &Matcher) -> Option<Device> {
        sysfs::disks(&self.sysfs).into_iter().find(|disk| disk.is(wanted))?.device(&self.dev)
    }

    /// Tells SCSI hosts to look for a disk: not every one says by itself that there is a new one. That may
    /// take the host a while, and what it finds comes as a uevent.
    fn scan_scsi(&self, wanted: &Matcher) {
        let Matcher::Scsi { host, channel, target, lun } = *wanted else { return };
        let hosts = fs::read_dir(self.sysfs.join("class/scsi_host"));
        for entry in hosts.into_iter().flatten().flatten() {
            let chosen = host.is_none_or(|host| entry.file_name() == format!("host{host}").as_str());
            if chosen {
                let file = entry.path().join("scan");
                spawn_blocking(move || {
                    if let Err(error) = fs::write(&file, format!("{channel} {target} {lun}")) {
                        log::warn!("scanning for SCSI disks by {}: {error}", file.display());
                    }
                });
            }
        }
    }
}

/// Reads uevents for as long as the agent lives.
async fn read(socket: AsyncFd<OwnedFd>, changes: watch::Sender<u64>) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let received = socket.async_io(Interest::READABLE, |socket| {
            Ok(recvfrom(socket, buffer.as_mut_slice(), RecvFlags::empty())?)
        });
        let news = match received.await {
            Ok((length, _, from)) => {
                let message = buffer.get(..length).unwrap_or_default();
                is_kernel(from.as_ref()) && uevent::parse(message).is_some_and(|event| event.brings_a_disk())
            }
            // Events were lost: anything may have come.
            Err(error) if error.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) => true,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => false,
            Err(error) => {
                log::error!("devices that come will not be seen: reading uevents: {error}");
                return;
            }
        };
        if news {
            changes.send_modify(|count| *count = count.wrapping_add(1));
        }
    }
}

/// Any process may send to a netlink socket; the kernel is 0. A socket of another family has two ends and no
/// others.
fn is_kernel(from: Option<&SocketAddrAny>) -> bool {
    let Some(from) = from else { return true };
    if from.address_family() != AddressFamily::NETLINK {
        return true;
    }
    netlink::SocketAddrNetlink::try_from(from.clone()).is_ok_and(|address| address.pid() == 0)
}

#[cfg(test)]
mod tests {
    use rustix::net::addr::SocketAddrArg;

    use super::*;

    #[test]
    fn only_the_kernel_is_believed() {
        let from = |pid| netlink::SocketAddrNetlink::new(pid, KERNEL_GROUP).as_any();
        assert!(is_kernel(Some(&from(0))));
        assert!(!is_kernel(Some(&from(1234))), "a process of the guest");
    }
}
