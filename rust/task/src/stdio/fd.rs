//! Descriptors of pipes and terminals, read and written without blocking the agent's only thread.

use std::{io, os::fd::OwnedFd, sync::Arc, time::Duration};

use rustix::io::Errno;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};

use crate::reaper::Exit;

/// Time that a terminal stays open for descendants of a process that has exited, in case there is more
/// output.
const TTY_GRACE: Duration = Duration::from_millis(200);

/// Longest time that a descendant may lock the pipe of a process that has exited. Then the content is given
/// up.
const LOCKED_GRACE: Duration = Duration::from_secs(1);

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
        // SAFETY: an `OwnedFd` names the same open file for as long as it lives, and nothing here takes it
        // out.
        let fd = unsafe { AsyncFd::register_with_interest(fd, interest) }?;
        Ok(Self { fd: Arc::new(fd), tty })
    }

    /// The descriptor itself.
    #[must_use]
    pub fn get(&self) -> &OwnedFd {
        self.fd.get_ref()
    }

    /// Does something with a pipe in a thread that may be held up: a process that splices into a pipe or out
    /// of it has it locked for as long as the other end of the splice keeps it waiting (splice(2)), and
    /// then not even FIONREAD returns at once.
    fn apart<T: Send + 'static>(&self, work: impl FnOnce(&OwnedFd) -> T + Send + 'static) -> JoinHandle<T> {
        let fd = Arc::clone(&self.fd);
        spawn_blocking(move || work(fd.get_ref()))
    }

    /// Bytes that wait to be read, or more: a terminal does not know.
    async fn waiting(&self) -> usize {
        if self.tty {
            return TTY_BUFFER;
        }
        let asked = self.apart(|fd| rustix::io::ioctl_fionread(fd));
        let bytes = timeout(LOCKED_GRACE, asked).await.ok().and_then(Result::ok).and_then(Result::ok);
        bytes.and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(0)
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
            if !self.tty {
                let own = bytes.to_vec();
                match self.apart(move |fd| rustix::io::write(fd, &own)).await.map_err(io::Error::other)? {
                    Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                    Err(Errno::AGAIN) => ready.clear_ready(),
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
                continue;
            }
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

/// A read of a pipe, and what it was read into.
type Reading = JoinHandle<(rustix::io::Result<usize>, Vec<u8>)>;

/// Output of a process, up to its end.
pub struct Source {
    fd: Fd,
    /// Under way; kept if nobody waits for it any more.
    reading: Option<Reading>,
    /// Bytes still to be read of a process that has exited.
    rest: Option<usize>,
}

impl Source {
    /// Reads from `fd`.
    #[must_use]
    pub fn new(fd: Fd) -> Self {
        Self { fd, reading: None, rest: None }
    }

    /// Reads what there is; 0 at the end. Once the process has exited, the end is behind what it had written,
    /// because a descendant may keep the other side open, and even write, for ever. Cancelling loses nothing,
    /// as long as the next buffer has as much room.
    pub async fn read(&mut self, buffer: &mut [u8], exited: &mut watch::Receiver<Option<Exit>>) -> usize {
        if self.rest.is_none() && exited.borrow().is_none() {
            tokio::select! {
                biased;
                read = self.read_ready(buffer) => return read,
                // Or it was forgotten: its output will not end by itself then.
                () = has_exited(exited) => {}
            }
        }
        self.read_rest(buffer).await
    }

    async fn read_ready(&mut self, buffer: &mut [u8]) -> usize {
        if self.fd.tty {
            return self.fd.read_ready(buffer).await;
        }
        let fd = self.fd.clone();
        loop {
            let Ok(mut ready) = fd.fd.readable().await else { return 0 };
            // What a kept read found says nothing of now: bytes may have come since, and their only notice.
            let is_kept = self.reading.is_some();
            match self.read_apart(buffer).await {
                Ok(read) => return read,
                Err(Errno::AGAIN) if !is_kept => ready.clear_ready(),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => return 0,
            }
        }
    }

    /// One read, which goes on if it is not waited for.
    async fn read_apart(&mut self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        let room = buffer.len();
        let reading = self.reading.get_or_insert_with(|| {
            self.fd.apart(move |fd| {
                let mut own = vec![0; room];
                (rustix::io::read(fd, &mut own), own)
            })
        });
        let done = reading.await;
        self.reading = None;
        let (read, own) = done.map_err(|_| Errno::IO)?;
        let read = read?.min(room);
        if let Some((to, from)) = buffer.get_mut(..read).zip(own.get(..read)) {
            to.copy_from_slice(from);
        }
        Ok(read)
    }

    async fn read_rest(&mut self, buffer: &mut [u8]) -> usize {
        if self.reading.is_some() {
            // Of before the exit, and so not counted.
            match timeout(LOCKED_GRACE, self.read_apart(buffer)).await {
                Ok(Ok(read @ 1..)) => return read,
                Ok(_) => {}
                Err(_) => return 0,
            }
        }
        let rest = match self.rest {
            Some(rest) => rest,
            None => *self.rest.insert(self.fd.waiting().await),
        };
        let wanted = rest.min(buffer.len());
        let Some(buffer) = buffer.get_mut(..wanted).filter(|buffer| !buffer.is_empty()) else { return 0 };
        let read = if self.fd.tty {
            match rustix::io::read(self.fd.get(), &mut *buffer) {
                Ok(read) => read,
                // Closing the other side of a terminal ends it with EIO, after all output. Still open: wait a
                // little.
                Err(Errno::AGAIN) => timeout(TTY_GRACE, self.fd.read_ready(buffer)).await.unwrap_or(0),
                Err(_) => 0,
            }
        } else {
            timeout(LOCKED_GRACE, self.read_apart(buffer)).await.ok().and_then(Result::ok).unwrap_or(0)
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
    use std::{os::fd::RawFd, sync::Arc, time::SystemTime};

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
        // Two were left at the exit; whether more is taken together with them is up to the kernel, but it
        // ends.
        assert_eq!(all.first(), Some(&2));
        assert_eq!(all.last(), Some(&0));
    }

    #[tokio::test]
    async fn a_read_that_nobody_waited_for_does_not_hide_what_came_after_it() {
        let (read, write) = pipe().unwrap();
        let (_sender, mut seen) = watch::channel(None);
        let mut source = Source::new(Fd::new(read, Interest::READABLE, false).unwrap());
        let mut buffer = [0; 16];
        rustix::io::write(&write, b"one").unwrap();
        assert_eq!(source.read(&mut buffer, &mut seen).await, 3);
        // Begun when there was nothing, and given up before it said so: whoever reads has gone.
        source.reading = Some(spawn_blocking(|| (Err(Errno::AGAIN), vec![0; 16])));
        rustix::io::write(&write, b"two").unwrap();
        // Its notice is there before the read goes on.
        tokio::time::sleep(Duration::from_millis(50)).await;
        let read = timeout(Duration::from_secs(5), source.read(&mut buffer, &mut seen)).await;
        assert_eq!(read, Ok(3));
    }

    /// `io::copy` of Rust's library splices in a container that copies a socket to its output.
    #[tokio::test]
    async fn who_splices_holds_nobody_else_up() {
        use std::{io::Write, os::fd::AsRawFd, os::unix::net::UnixStream, thread, time::Instant};

        let splice = |from: RawFd, to: RawFd| {
            // SAFETY: the descriptors are open until the thread that calls this has ended; there are no
            // offsets.
            unsafe { libc::splice(from, std::ptr::null_mut(), to, std::ptr::null_mut(), 1000, 0) }
        };
        let soon = Duration::from_millis(300);
        let (read, write) = pipe().unwrap();
        let (mut sends, waits) = UnixStream::pair().unwrap();
        rustix::io::write(&write, b"before").unwrap();
        let splicing = thread::spawn(move || splice(waits.as_raw_fd(), write.as_raw_fd()));
        thread::sleep(soon);
        let (_sender, mut seen) = watch::channel(None);
        let mut source = Source::new(Fd::new(read, Interest::READABLE, false).unwrap());
        let mut buffer = [0; 16];
        let begun = Instant::now();
        let early = timeout(soon, source.read(&mut buffer, &mut seen)).await;
        assert!(begun.elapsed() < soon * 10 && early.is_err(), "{early:?} after {:?}", begun.elapsed());
        sends.write_all(b"after").unwrap();
        let mut all = Vec::new();
        while let read @ 1.. = source.read(&mut buffer, &mut seen).await {
            all.extend_from_slice(&buffer[..read]);
        }
        assert_eq!(all, b"beforeafter");
        assert_eq!(splicing.join().unwrap(), 5);

        // And out of it, into what nobody reads.
        let (read, write) = pipe().unwrap();
        let (full, _kept) = UnixStream::pair().unwrap();
        full.set_nonblocking(true).unwrap();
        while (&full).write(&[0; 4096]).is_ok() {}
        full.set_nonblocking(false).unwrap();
        let sink = Fd::new(write, Interest::WRITABLE, false).unwrap();
        sink.write_all(b"first").await.unwrap();
        let (kept, splicing) =
            (full.try_clone().unwrap(), thread::spawn(move || splice(read.as_raw_fd(), full.as_raw_fd())));
        thread::sleep(soon);
        let begun = Instant::now();
        assert!(timeout(soon, sink.write_all(b"second")).await.is_err());
        assert!(begun.elapsed() < soon * 10, "it took {:?}", begun.elapsed());
        kept.shutdown(std::net::Shutdown::Both).unwrap();
        assert_eq!(splicing.join().unwrap(), -1);
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
