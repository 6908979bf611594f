//! Descriptors of pipes and terminals, read and written without blocking the agent's only thread.

use std::{io, os::fd::OwnedFd, sync::Arc, time::Duration};

use rustix::io::Errno;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
    time::timeout,
};

use crate::reaper::Exit;

/// How long a terminal stays open for descendants of a process that has exited, in case there is more output.
const TTY_GRACE: Duration = Duration::from_millis(200);

/// Our end of a pipe or terminal.
#[derive(Clone)]
pub struct Fd {
    fd: Arc<AsyncFd<OwnedFd>>,
    /// A terminal's master side.
    tty: bool,
}

impl Fd {
    /// Takes over a descriptor.
    ///
    /// # Errors
    /// When it cannot be made non-blocking or polled.
    pub fn new(fd: OwnedFd, interest: Interest, tty: bool) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        // SAFETY: an `OwnedFd` names the same open file for as long as it lives, and nothing here takes it out.
        let fd = unsafe { AsyncFd::register_with_interest(fd, interest) }?;
        Ok(Self { fd: Arc::new(fd), tty })
    }

    /// The descriptor itself.
    #[must_use]
    pub fn get(&self) -> &OwnedFd {
        self.fd.get_ref()
    }

    /// Whether it is a terminal.
    #[must_use]
    pub fn is_tty(&self) -> bool {
        self.tty
    }

    /// Reads what there is; 0 at the end. Once the process has exited, the end is where nothing more is to be had at
    /// once, because a descendant may keep the other side open for ever. Cancelling loses nothing.
    pub async fn read(&self, buffer: &mut [u8], exited: &mut watch::Receiver<Option<Exit>>) -> usize {
        loop {
            if exited.borrow().is_some() {
                return self.read_rest(buffer).await;
            }
            tokio::select! {
                biased;
                read = self.read_ready(buffer) => return read,
                // An error means that the process was forgotten: its output will not end by itself then.
                gone = has_exited(exited) => if !gone { return self.read_rest(buffer).await },
            }
        }
    }

    async fn read_rest(&self, buffer: &mut [u8]) -> usize {
        match rustix::io::read(self.get(), &mut *buffer) {
            Ok(read) => read,
            // Closing the other side of a terminal ends it with EIO, after all output. Still open: wait a little.
            Err(Errno::AGAIN) if self.tty => timeout(TTY_GRACE, self.read_ready(buffer)).await.unwrap_or(0),
            Err(_) => 0,
        }
    }

    async fn read_ready(&self, buffer: &mut [u8]) -> usize {
        loop {
            let Ok(mut ready) = self.fd.readable().await else { return 0 };
            let result = ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut *buffer)?));
            match result {
                Ok(Ok(read)) => return read,
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(_)) => return 0,
                Err(_would_block) => {}
            }
        }
    }

    /// Writes everything.
    ///
    /// # Errors
    /// When the other side is closed.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.fd.writable().await?;
            match ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?)) {
                Ok(Ok(written)) => bytes = bytes.get(written..).unwrap_or_default(),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
        Ok(())
    }
}

/// Waits for an exit; false if it will never be known.
async fn has_exited(exited: &mut watch::Receiver<Option<Exit>>) -> bool {
    exited.wait_for(Option::is_some).await.is_ok()
}
