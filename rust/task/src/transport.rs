//! vsock connections whose writes are small enough for every device model.

use std::{
    io::{self, BufRead},
    pin::Pin,
    task::{Context, Poll},
};

use futures_core::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc,
};

/// Most bytes that are written at once. Guests' kernels since 6.12.43 put larger writes (from about 32 KiB on) into
/// packets of several pieces, and vhost-device-vsock 0.3 drops those.
pub const MAX_WRITE: usize = 16 * 1024;

/// A connection that writes at most [`MAX_WRITE`] bytes at once.
pub struct SmallWrites<S>(pub S);

impl<S: AsyncRead + Unpin> AsyncRead for SmallWrites<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for SmallWrites<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let bytes = bytes.get(..MAX_WRITE).unwrap_or(bytes);
        Pin::new(&mut self.get_mut().0).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_shutdown(context)
    }
}

/// A connection of which the first bytes have been read already: they are read once more.
pub struct Rewound<S> {
    first: io::Cursor<Vec<u8>>,
    rest: S,
}

impl<S> Rewound<S> {
    /// `first`, then what `rest` still has.
    pub fn new(first: Vec<u8>, rest: S) -> Self {
        Self { first: io::Cursor::new(first), rest }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Rewound<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let left = this.first.fill_buf()?;
        if left.is_empty() {
            return Pin::new(&mut this.rest).poll_read(context, buffer);
        }
        let fits = left.len().min(buffer.remaining());
        buffer.put_slice(left.get(..fits).unwrap_or_default());
        this.first.consume(fits);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rewound<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().rest).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().rest).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().rest).poll_shutdown(context)
    }
}

/// Connections that somebody else accepts, as a stream.
pub struct Incoming<S>(pub mpsc::Receiver<S>);

impl<S> Stream for Incoming<S> {
    type Item = io::Result<S>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().0.poll_recv(context).map(|next| next.map(Ok))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn what_was_read_is_read_once_more() {
        let (ours, mut theirs) = duplex(64);
        theirs.write_all(b"world").await.unwrap();
        drop(theirs);
        let mut all = Vec::new();
        Rewound::new(b"hello ".to_vec(), ours).read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"hello world");
    }

    #[tokio::test]
    async fn a_large_write_goes_out_in_small_ones() {
        let (ours, mut theirs) = duplex(1 << 20);
        let mut ours = SmallWrites(ours);
        assert_eq!(ours.write(&[1; 100_000]).await.unwrap(), MAX_WRITE);
        ours.write_all(&[2; 100_000]).await.unwrap();
        ours.shutdown().await.unwrap();
        let mut all = Vec::new();
        theirs.read_to_end(&mut all).await.unwrap();
        assert_eq!(all.len(), MAX_WRITE + 100_000);
    }
}
