//! One socket for calls and streams: a connection's first frame tells which it is.

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

use super::{
    frame::{self, Frame},
    wire::asks_for_a_stream,
};

/// Purpose of a connection.
pub enum Purpose<S> {
    /// Calls; for ttrpc's own server, to which it looks untouched.
    Calls(Rewound<S>),
    /// The stream that its first frame asks for.
    Stream(S, Frame),
    /// Nothing: it was closed before it said anything.
    Nothing,
}

/// Reads a connection's first frame.
///
/// # Errors
/// When it breaks, or announces too much.
pub async fn purpose<S: AsyncRead + Unpin>(mut connection: S) -> io::Result<Purpose<S>> {
    Ok(match frame::read(&mut connection).await? {
        None => Purpose::Nothing,
        Some(first) => of_first(connection, first),
    })
}

/// The purpose of a connection whose first frame was read already.
pub fn of_first<S>(connection: S, first: Frame) -> Purpose<S> {
    if asks_for_a_stream(&first) {
        Purpose::Stream(connection, first)
    } else {
        Purpose::Calls(Rewound::new(first.encode(), connection))
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
}
