//! The end of output in a fifo that nobody has open to read: containerd is away.
//!
//! A fifo without descriptors loses what is in it, and with it the last words of a container that ends
//! meanwhile. So a writing end stays open until somebody has opened the fifo to read. No event tells of that;
//! but an `open` for writing returns in this moment, and waits in a thread of its own.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd},
    sync::{Arc, OnceLock},
};

use rustix::io::{Errno, ioctl_fionread};
use tokio::{net::unix::pipe, task::spawn_blocking};

/// Returns when somebody reads the fifo, or when nothing is in it. Dropping the future gives the rest of it
/// up.
pub(crate) async fn until_read(pipe: pipe::Sender) -> io::Result<()> {
    if ioctl_fionread(&pipe)? == 0 {
        return Ok(());
    }
    // `pipe` is a reading end, too, and would be taken for a reader.
    let writer = pipe::OpenOptions::new().open_sender(again(&pipe))?;
    drop(pipe);
    match pipe::OpenOptions::new().open_sender(again(&writer)) {
        Ok(_) => return Ok(()),
        Err(e) if e.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => {}
        Err(e) => return Err(e),
    }
    let fifo = Arc::new(Fifo { writer, reader: OnceLock::new() });
    let waiting = Waiting(Arc::clone(&fifo));
    let opened =
        spawn_blocking(move || File::options().write(true).open(again(&fifo.writer)).map(drop)).await;
    drop(waiting);
    opened.map_err(io::Error::other)?
}

/// A name of an open file that is good as long as it is open, whether or not the file has another.
fn again(file: &impl AsFd) -> String {
    format!("/proc/self/fd/{}", file.as_fd().as_raw_fd())
}

struct Fifo {
    writer: pipe::Sender,
    /// Held until the thread is done, so that its `open` cannot come too late to be let go.
    reader: OnceLock<File>,
}

/// Lets the waiting thread go when it is dropped.
struct Waiting(Arc<Fifo>);

impl Drop for Waiting {
    fn drop(&mut self) {
        // For both, because that waits for nobody.
        if let Ok(file) = File::options().read(true).write(true).open(again(&self.0.writer)) {
            let _ = self.0.reader.set(file);
        }
    }
}
