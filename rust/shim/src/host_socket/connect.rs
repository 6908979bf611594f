//! Connects to a socket as another user: services ask the kernel who called.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::net::UnixStream as StdStream},
    sync::Arc,
    thread,
    time::Duration,
};

use kuasar_common::host_socket::{MAX_GROUPS, Peer};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect as connect_socket, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};
use tokio::{net::UnixStream, sync::oneshot};

/// Longest time that a service may take to have room for a connection.
const LIMIT: Duration = Duration::from_secs(10);
/// Of the thread: it makes system calls.
const STACK: usize = 64 << 10;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("taking on the user {uid}, group {gid}: {source}")]
    User { uid: u32, gid: u32, source: io::Error },
    #[error("connecting to it as user {uid}, group {gid}: {source}")]
    Connect { uid: u32, gid: u32, source: io::Error },
    #[error("starting a thread: {0}")]
    Thread(io::Error),
}

/// Connects to the socket that a file is, as the one who is connected to it in the guest. That its
/// permissions allow it, the guest's kernel has found by all that a user may have; this one looks again, by
/// user and groups.
pub(super) async fn connect(socket: &Arc<File>, peer: Peer) -> Result<UnixStream, ConnectError> {
    let (answer, connected) = oneshot::channel();
    let socket = Arc::clone(socket);
    // A thread of its own, that ends with its user.
    let thread = thread::Builder::new().stack_size(STACK).spawn(move || {
        // Whoever does not wait any more needs no connection.
        let _ = answer.send(connect_as(&socket, &peer));
    });
    thread.map_err(ConnectError::Thread)?;
    let defect = || ConnectError::Thread(io::Error::other("it ended without an answer"));
    let connected = connected.await.map_err(|_| defect())??;
    let ready = connected.set_nonblocking(true).and_then(|()| UnixStream::from_std(connected));
    ready.map_err(ConnectError::Thread)
}

fn connect_as(socket: &File, peer: &Peer) -> Result<StdStream, ConnectError> {
    let Peer { uid, gid, ref groups } = *peer;
    become_user(uid, gid, groups).map_err(|source| ConnectError::User { uid, gid, source })?;
    let made = || {
        let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&stream, Timeout::Send, Some(LIMIT))?;
        // By descriptor: the socket's path, which this user may have no way to, does not matter any more.
        let path = SocketAddrUnix::new(format!("/proc/self/fd/{}", socket.as_raw_fd()))?;
        connect_socket(&stream, &path)?;
        set_socket_timeout(&stream, Timeout::Send, None)?;
        Ok::<_, rustix::io::Errno>(StdStream::from(stream))
    };
    made().map_err(|error| {
        let again = error == rustix::io::Errno::AGAIN;
        let source = if again { io::ErrorKind::TimedOut.into() } else { error.into() };
        ConnectError::Connect { uid, gid, source }
    })
}

/// Numbers of system calls, `asm/unistd_64.h` and `asm-generic/unistd.h`.
#[cfg(target_arch = "x86_64")]
mod number {
    pub(super) const SETGROUPS: i64 = 116;
    pub(super) const SETRESUID: i64 = 117;
    pub(super) const SETRESGID: i64 = 119;
}
#[cfg(target_arch = "aarch64")]
mod number {
    pub(super) const SETGROUPS: i64 = 159;
    pub(super) const SETRESUID: i64 = 147;
    pub(super) const SETRESGID: i64 = 149;
}

unsafe extern "C" {
    fn syscall(number: std::ffi::c_long, ...) -> std::ffi::c_long;
}

/// Leaves an id as it is.
const KEEP: u32 = u32::MAX;

/// Makes this thread act as a user, with nothing left of what root may. By the system calls themselves, as
/// libc's own functions change all threads. Real and saved ids stay root's: a user of the same number on the
/// host must not be able to signal it.
fn become_user(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    if uid == KEEP || gid == KEEP || groups.len() > MAX_GROUPS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let done = |result| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: the kernel reads `len` numbers, which the slice has.
    done(unsafe { syscall(number::SETGROUPS, groups.len(), groups.as_ptr()) })?;
    // SAFETY: it takes three numbers.
    done(unsafe { syscall(number::SETRESGID, KEEP, gid, KEEP) })?;
    // SAFETY: the same.
    done(unsafe { syscall(number::SETRESUID, KEEP, uid, KEEP) })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::OpenOptionsExt, os::unix::fs::PermissionsExt};

    use tokio::net::UnixListener;

    use super::*;

    fn on_one_thread<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    fn socket() -> (tempfile::TempDir, UnixListener, Arc<File>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).unwrap();
        let inode = fs::OpenOptions::new().read(true).custom_flags(super::super::O_PATH).open(path).unwrap();
        (dir, listener, Arc::new(inode))
    }

    #[test]
    fn a_service_sees_the_user_and_this_process_stays_what_it_was() {
        on_one_thread(async {
            let (dir, listener, inode) = socket();
            std::os::unix::fs::chown(dir.path().join("s"), Some(0), Some(4242)).unwrap();
            // Its folder is nobody's but root's, and its name is gone.
            fs::remove_file(dir.path().join("s")).unwrap();
            for peer in [
                Peer { uid: 1000, gid: 1000, groups: vec![7, 4242] },
                Peer { uid: 1001, gid: 4242, groups: Vec::new() },
                Peer::default(),
            ] {
                let _client = connect(&inode, peer.clone()).await.unwrap();
                let (served, _) = listener.accept().await.unwrap();
                let seen = served.peer_cred().unwrap();
                assert_eq!((seen.uid(), seen.gid()), (peer.uid, peer.gid));
            }
            let own = fs::read_to_string("/proc/self/status").unwrap();
            assert!(own.lines().any(|line| line == "Uid:\t0\t0\t0\t0"), "{own}");
        });
    }

    #[test]
    fn who_may_not_connect_is_refused_by_the_hosts_kernel_too() {
        on_one_thread(async {
            let (_dir, _listener, inode) = socket();
            let stranger = Peer { uid: 1000, gid: 1000, groups: vec![4242] };
            let error = connect(&inode, stranger).await.unwrap_err().to_string();
            assert_eq!(error, "connecting to it as user 1000, group 1000: Permission denied (os error 13)");
            let nobody = Peer { uid: u32::MAX, gid: 0, groups: Vec::new() };
            let error = connect(&inode, nobody).await.unwrap_err().to_string();
            assert!(error.starts_with("taking on the user 4294967295, group 0: "), "{error}");
        });
    }
}
