//! Bytes for a service of the host, in the name of who is connected in the guest.
//!
//! A service that sets `SO_PASSCRED` learns from the kernel who wrote each piece. Unless that is said, it is
//! this process, and with it root.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, UCred, sendmsg, shutdown};
use tokio::{
    io::{AsyncWrite, Interest},
    net::UnixStream,
};

/// Writes to a connection as another user.
pub(super) struct AsUser<'a> {
    socket: &'a UnixStream,
    user: UCred,
}

impl<'a> AsUser<'a> {
    /// The process is named as what it is: the service could not do anything with one of the guest's.
    pub(super) fn new(socket: &'a UnixStream, uid: u32, gid: u32) -> Self {
        let (uid, gid) = (rustix::process::Uid::from_raw(uid), rustix::process::Gid::from_raw(gid));
        Self { socket, user: UCred { pid: rustix::process::getpid(), uid, gid } }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmCredentials(self.user)) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(sendmsg(self.socket, &[IoSlice::new(bytes)], &mut control, flags)?)
    }
}

impl AsyncWrite for AsUser<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.socket.poll_write_ready(cx))?;
            match self.socket.try_io(Interest::WRITABLE, || self.send(bytes)) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                sent => return Poll::Ready(sent),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(shutdown(self.socket, rustix::net::Shutdown::Write).map_err(io::Error::from))
    }
}
