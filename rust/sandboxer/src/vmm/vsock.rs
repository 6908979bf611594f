//! The two ways to a vsock that need the host's help: the kernel's `vhost-vsock`, and `vhost-device-vsock` in
//! user space.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::Duration,
};

use rustix::{
    fs::inotify,
    rand::{GetRandomFlags, getrandom},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

/// The kernel's device.
pub(super) const VHOST_VSOCK: &str = "/dev/vhost-vsock";
/// Number of context ids that the daemon tries; among two thousand million, one is free at once.
const CID_TRIES: u32 = 64;
/// Longest time that `vhost-device-vsock` may take to listen; it needs milliseconds.
const LISTEN_DEADLINE: Duration = Duration::from_secs(10);

nix::ioctl_write_ptr!(
    /// `VHOST_VSOCK_SET_GUEST_CID` of `linux/vhost.h`.
    set_guest_cid,
    0xAF,
    0x60,
    u64
);

/// Opens the kernel's device and takes a context id that no other guest of the host has: the kernel refuses
/// those.
pub(super) fn open_vhost() -> io::Result<(OwnedFd, u32)> {
    let device: File = OpenOptions::new().read(true).write(true).open(VHOST_VSOCK)?;
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..CID_TRIES {
        let cid = random_cid()?;
        // SAFETY: the descriptor is a vhost-vsock device's, and the number outlives the call.
        match unsafe { set_guest_cid(device.as_raw_fd(), &raw const cid) } {
            Ok(_) => return Ok((device.into(), u32::try_from(cid).map_err(io::Error::other)?)),
            Err(error) => last = error.into(),
        }
        if last.kind() != io::ErrorKind::AddrInUse {
            break;
        }
    }
    Err(last)
}

/// 0 to 2 are not for guests; the upper half is left to others, as the kernel's own users do.
fn random_cid() -> io::Result<u64> {
    let mut bytes = [0; 4];
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(u64::from((u32::from_ne_bytes(bytes) >> 1).max(3)))
}

/// Says when a socket appears in a folder. Made before the process that binds it is started.
#[derive(Debug)]
pub(super) struct SocketWatch(OwnedFd);

impl SocketWatch {
    pub(super) fn new(folder: &Path) -> io::Result<Self> {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        inotify::add_watch(&watch, folder, inotify::WatchFlags::CREATE)?;
        Ok(Self(watch))
    }

    /// Connects to the socket as soon as it is there.
    pub(super) async fn connect(self, socket: &Path) -> io::Result<UnixStream> {
        // SAFETY: a borrowed descriptor always names the same, open file as long as it is borrowed.
        let events = unsafe { AsyncFd::register_with_interest(self.0.as_fd(), Interest::READABLE) }?;
        let connect = async {
            loop {
                match UnixStream::connect(socket) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {
                        let mut ready = events.readable().await?;
                        drain(&self.0)?;
                        ready.clear_ready();
                    }
                    // Bound, and about to listen: the two calls follow each other at once.
                    Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                        tokio::time::sleep(Duration::from_micros(100)).await;
                    }
                    done => return done,
                }
            }
        };
        timeout(LISTEN_DEADLINE, connect).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}

fn drain(watch: &OwnedFd) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match rustix::io::read(watch, &mut buffer) {
            Ok(0) | Err(rustix::io::Errno::AGAIN) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::net::UnixListener, thread};

    use super::*;

    #[tokio::test]
    async fn a_socket_is_found_whenever_it_comes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        for delay in [0, 50] {
            let watch = SocketWatch::new(dir.path()).unwrap();
            let bound = path.clone();
            let server = thread::spawn(move || {
                thread::sleep(Duration::from_millis(delay));
                fs::write(bound.with_extension("other"), "").unwrap();
                UnixListener::bind(bound).unwrap().accept().unwrap();
            });
            watch.connect(&path).await.unwrap();
            server.join().unwrap();
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn context_ids_are_for_guests() {
        for _ in 0..100 {
            assert!((3..=u64::from(u32::MAX >> 1)).contains(&random_cid().unwrap()));
        }
    }

    #[test]
    fn no_device_is_said_so() {
        if !Path::new(VHOST_VSOCK).exists() {
            assert_eq!(open_vhost().unwrap_err().kind(), io::ErrorKind::NotFound);
        }
    }
}
