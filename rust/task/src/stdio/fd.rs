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

/// More than the kernel keeps of a terminal's output.
const TTY_BUFFER: usize = 128 * 1024;

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

    /// Bytes that wait to be read, or more: a terminal does not know.
    fn waiting(&self) -> usize {
        if self.tty {
            return TTY_BUFFER;
        }
        rustix::io::ioctl_fionread(self.get()).ok().and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(0)
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

/// What a process writes, up to the end of it.
pub struct Source {
    fd: Fd,
    /// Bytes still to be read of a process that has exited.
    rest: Option<usize>,
}

impl Source {
    /// Reads from `fd`.
    #[must_use]
    pub fn new(fd: Fd) -> Self {
        Self { fd, rest: None }
    }

    /// Reads what there is; 0 at the end. Once the process has exited, the end is behind what it had written, because a
    /// descendant may keep the other side open, and even write, for ever. Cancelling loses nothing.
    pub async fn read(&mut self, buffer: &mut [u8], exited: &mut watch::Receiver<Option<Exit>>) -> usize {
        if self.rest.is_none() && exited.borrow().is_none() {
            tokio::select! {
                biased;
                read = self.fd.read_ready(buffer) => return read,
                // Or it was forgotten: its output will not end by itself then.
                () = has_exited(exited) => {}
            }
        }
        self.read_rest(buffer).await
    }

    async fn read_rest(&mut self, buffer: &mut [u8]) -> usize {
        let rest = *self.rest.get_or_insert_with(|| self.fd.waiting());
        let wanted = rest.min(buffer.len());
        let Some(buffer) = buffer.get_mut(..wanted).filter(|buffer| !buffer.is_empty()) else { return 0 };
        let read = match rustix::io::read(self.fd.get(), &mut *buffer) {
            Ok(read) => read,
            // Closing the other side of a terminal ends it with EIO, after all output. Still open: wait a little.
            Err(Errno::AGAIN) if self.fd.tty => {
                timeout(TTY_GRACE, self.fd.read_ready(buffer)).await.unwrap_or(0)
            }
            Err(_) => 0,
        };
        self.rest = Some(rest.saturating_sub(read));
        read
    }
}

/// Waits until an exit is known, or is known never to be.
async fn has_exited(exited: &mut watch::Receiver<Option<Exit>>) {
    let _ = exited.wait_for(Option::is_some).await;
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::SystemTime};

    use rustix::pipe::pipe;

    use super::*;

    #[tokio::test]
    async fn what_an_ended_process_wrote_is_read_and_no_more() {
        let (read, write) = pipe().unwrap();
        let exited = Arc::new(watch::Sender::new(None));
        let mut source = Source::new(Fd::new(read, Interest::READABLE, false).unwrap());
        let mut seen = exited.subscribe();
        let mut buffer = [0; 8];
        rustix::io::write(&write, b"0123456789").unwrap();
        assert_eq!(source.read(&mut buffer, &mut seen).await, 8);
        let waiting = tokio::spawn(async move {
            let mut all = vec![source.read(&mut buffer, &mut seen).await];
            // The descendant that keeps the pipe writes on.
            rustix::io::write(&write, b"more").unwrap();
            all.push(source.read(&mut buffer, &mut seen).await);
            all.push(source.read(&mut buffer, &mut seen).await);
            (all, write)
        });
        exited.send_replace(Some(Exit { code: 0, at: SystemTime::now() }));
        let (all, _write) = waiting.await.unwrap();
        // Two were left at the exit; whether more is taken together with them is up to the kernel, but it ends.
        assert_eq!(all.first(), Some(&2));
        assert_eq!(all.last(), Some(&0));
    }

    #[tokio::test]
    async fn an_open_pipe_of_a_forgotten_process_ends() {
        let (read, _write) = pipe().unwrap();
        let mut source = Source::new(Fd::new(read, Interest::READABLE, false).unwrap());
        let (sender, mut seen) = watch::channel(None);
        drop(sender);
        assert_eq!(source.read(&mut [0; 8], &mut seen).await, 0);
    }
}
