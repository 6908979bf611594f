//! Receives the master side of a process's terminal from the OCI runtime.

use std::{
    fs,
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::{
    io::Interest,
    net::{UnixListener, UnixStream},
    time::timeout,
};

/// The runtime sends the terminal before it ends; this much later it is not going to come.
const DEADLINE: Duration = Duration::from_secs(5);

static NEXT: AtomicU64 = AtomicU64::new(0);

/// A socket on which the runtime delivers one terminal. Its file is removed when it is dropped.
pub struct ConsoleSocket {
    path: PathBuf,
    listener: UnixListener,
}

impl ConsoleSocket {
    /// Makes a socket of a new, short name in `dir`: socket paths are limited to 107 bytes, container ids are
    /// long.
    ///
    /// # Errors
    /// When it cannot be bound.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let path = dir.join(format!("pty-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let listener = UnixListener::bind(&path)?;
        Ok(Self { path, listener })
    }

    /// Path of the socket that the runtime connects to.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the terminal, once the runtime has said that it succeeded.
    ///
    /// # Errors
    /// When none comes in time.
    pub async fn receive(&self) -> io::Result<OwnedFd> {
        let receive = async {
            let (stream, _) = self.listener.accept().await?;
            receive_fd(&stream).await
        };
        timeout(DEADLINE, receive).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

async fn receive_fd(stream: &UnixStream) -> io::Result<OwnedFd> {
    stream
        .async_io(Interest::READABLE, || {
            // The message's text is the terminal's name inside the container, which nobody needs.
            let mut text = [0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            recvmsg(stream, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
            let mut fds = control.drain().filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            });
            fds.next().ok_or_else(|| io::Error::other("the runtime sent no terminal"))
        })
        .await
}
