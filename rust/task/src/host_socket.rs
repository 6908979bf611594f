//! Sockets of the host that containers have mounted: listens in their place, and hands each connection to the
//! relay (see [`kuasar_common::host_socket`]).

use std::{
    collections::HashMap,
    fs, io, mem,
    os::{
        fd::AsRawFd,
        unix::{fs::PermissionsExt, net::UnixListener as StdListener},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kuasar_common::{
    forward::{Side, carry_unix},
    host_socket::{Access, GONE, MAX_GROUPS, Peer},
    storage::MOUNT_POINTS,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::watch,
};

use crate::stdio::{listener::refuse, registry::Connection};

/// All of them, by where they are in the guest.
#[derive(Default)]
pub struct HostSockets {
    table: Mutex<HashMap<PathBuf, Arc<Listening>>>,
}

struct Listening {
    listener: UnixListener,
    gone: watch::Sender<bool>,
}

impl HostSockets {
    fn table(&self) -> MutexGuard<'_, HashMap<PathBuf, Arc<Listening>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens at a path that is not there yet.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn open(&self, path: &Path, access: Access) -> io::Result<()> {
        let listener = listen(path, access)?;
        listener.set_nonblocking(true)?;
        let listening =
            Listening { listener: UnixListener::from_std(listener)?, gone: watch::Sender::new(false) };
        self.table().insert(path.to_owned(), Arc::new(listening));
        Ok(())
    }

    /// Listens no more; connections that are carried go on. One that is not there is no error.
    ///
    /// # Errors
    /// When its file cannot be removed.
    pub fn close(&self, path: &Path) -> io::Result<()> {
        if let Some(listening) = self.table().remove(path) {
            listening.gone.send_replace(true);
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Folders that had nothing else in them.
        for folder in path.ancestors().skip(1).take_while(|folder| *folder != Path::new(MOUNT_POINTS)) {
            if fs::remove_dir(folder).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Answers a connection of the relay's with the next one to a socket, and carries that.
    pub(crate) async fn serve(&self, path: &str, mut connection: Connection) {
        let listening = self.table().get(Path::new(path)).cloned();
        let Some(listening) = listening else {
            return none(connection).await;
        };
        let mut gone = listening.gone.subscribe();
        let accepted = tokio::select! {
            accepted = listening.listener.accept() => Some(accepted),
            () = async { drop(gone.wait_for(|gone| *gone).await) } => None,
            // It has nothing to say now, so it has hung up.
            _ = connection.fill_buf() => return,
        };
        let Some(accepted) = accepted else { return none(connection).await };
        drop(listening);
        let begun = async {
            let (unix, _) = accepted?;
            let peer = serde_json::to_string(&peer(&unix)?)?;
            connection.write_all(format!("OK {peer}\n").as_bytes()).await?;
            connection.flush().await?;
            Ok::<_, io::Error>(unix)
        };
        match begun.await {
            Ok(unix) => {
                if let Err(error) = carry_unix(unix, connection, Side::Agent).await {
                    log::debug!("a connection to the host's socket at {path} broke: {error}");
                }
            }
            Err(error) => {
                log::warn!("a connection to the host's socket at {path}: {error}");
                refuse(&mut connection, &error.to_string()).await;
            }
        }
    }
}

async fn none(mut connection: Connection) {
    let _ = connection.write_all(format!("{GONE}\n").as_bytes()).await;
    let _ = connection.flush().await;
}

/// Makes a socket that nobody can connect to before it has its owner and mode: nothing shows it to a
/// container yet.
fn listen(path: &Path, Access { uid, gid, mode }: Access) -> io::Result<StdListener> {
    let (folder, name) = path.parent().zip(path.file_name()).ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(folder)?;
    // A socket's path has 107 bytes at most, and a container's id alone may have 128.
    let folder = fs::File::open(folder)?;
    let short = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
    let listener = StdListener::bind(&short)?;
    let owned = std::os::unix::fs::lchown(path, Some(uid), Some(gid))
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)));
    owned.inspect_err(|_| {
        let _ = fs::remove_file(path);
    })?;
    Ok(listener)
}

/// The connected peer, as the kernel knows it.
fn peer(unix: &UnixStream) -> io::Result<Peer> {
    let of = unix.peer_cred()?;
    Ok(Peer { uid: of.uid(), gid: of.gid(), groups: groups(unix)? })
}

fn groups(unix: &UnixStream) -> io::Result<Vec<u32>> {
    let mut groups = vec![0_u32; MAX_GROUPS];
    let mut length = libc::socklen_t::try_from(mem::size_of_val(groups.as_slice())).unwrap_or(0);
    // SAFETY: the kernel writes at most `length` bytes, which the vector has, and then how many it wrote.
    let result = unsafe {
        libc::getsockopt(
            unix.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        let error = io::Error::last_os_error();
        let why = format!("whoever connects to a mounted socket is in at most {MAX_GROUPS} groups: {error}");
        return Err(if error.raw_os_error() == Some(libc::ERANGE) { io::Error::other(why) } else { error });
    }
    groups.truncate(usize::try_from(length).unwrap_or(0) / mem::size_of::<u32>());
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::MetadataExt, time::Duration};

    use tokio::{
        io::{AsyncReadExt, BufReader, DuplexStream, duplex},
        task::JoinHandle,
        time::timeout,
    };

    use super::*;

    const ACCESS: Access = Access { uid: 0, gid: 0, mode: 0o660 };

    fn relay(sockets: &Arc<HostSockets>, path: &Path) -> (BufReader<DuplexStream>, JoinHandle<()>) {
        let (ours, theirs) = duplex(1024);
        let (sockets, path) = (Arc::clone(sockets), path.to_str().unwrap().to_owned());
        let serving =
            tokio::spawn(async move { sockets.serve(&path, Connection::new(Box::new(ours))).await });
        (BufReader::new(theirs), serving)
    }

    async fn answer(conn: &mut BufReader<DuplexStream>) -> String {
        let mut line = String::new();
        timeout(Duration::from_secs(10), conn.read_line(&mut line)).await.unwrap().unwrap();
        line
    }

    #[tokio::test]
    async fn a_connection_is_handed_over_with_who_it_is_of() {
        let dir = tempfile::tempdir().unwrap();
        // Longer than a socket's path may be.
        let path = dir.path().join("c".repeat(128)).join("sockets/0");
        let sockets = Arc::new(HostSockets::default());
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        sockets.open(&path, Access { uid, gid, mode: 0o640 }).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
        assert!(sockets.open(&path, ACCESS).is_err(), "there is one already");
        let (mut first, _serving) = relay(&sockets, &path);
        let folder = fs::File::open(path.parent().unwrap()).unwrap();
        let short = format!("/proc/self/fd/{}/0", folder.as_raw_fd());
        let mut client = UnixStream::connect(short).await.unwrap();
        let line = answer(&mut first).await;
        let peer: Peer = serde_json::from_str(line.strip_prefix("OK ").unwrap()).unwrap();
        assert_eq!((peer.uid, peer.gid), (uid, gid));
        client.write_all(b"hi").await.unwrap();
        client.shutdown().await.unwrap();
        let mut frames = [0; 10];
        first.read_exact(&mut frames).await.unwrap();
        assert_eq!(&frames, b"\0\0\0\x02hi\0\0\0\0");
        first.write_all(b"\0\0\0\x02ho\0\0\0\0").await.unwrap();
        let mut all = Vec::new();
        client.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"ho");
        // The next one waits until the container is gone.
        let (mut second, waiting) = relay(&sockets, &path);
        tokio::task::yield_now().await;
        sockets.close(&path).unwrap();
        assert_eq!(answer(&mut second).await, "ERR gone\n");
        waiting.await.unwrap();
        assert!(!path.exists() && !path.parent().unwrap().exists(), "its folder stays");
        sockets.close(&path).unwrap();
        let (mut none, _) = relay(&sockets, &path);
        assert_eq!(answer(&mut none).await, "ERR gone\n");
    }

    #[tokio::test]
    async fn a_relay_that_hung_up_gets_no_connection() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let sockets = Arc::new(HostSockets::default());
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        sockets.open(&path, Access { uid, gid, ..ACCESS }).unwrap();
        let (gone, serving) = relay(&sockets, &path);
        drop(gone);
        timeout(Duration::from_secs(10), serving).await.unwrap().unwrap();
        let (mut there, _serving) = relay(&sockets, &path);
        let _client = UnixStream::connect(&path).await.unwrap();
        assert!(answer(&mut there).await.starts_with("OK {"));
    }
}
