//! A connection to a guest that takes only so much from it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Most that a guest may send over one connection, in bytes. Every connection is for one call, whose answers
/// are a few hundred.
const MOST: usize = 64 << 10;

/// A stream from which not much more than [`MOST`] bytes are read: an answer without end costs neither memory
/// nor time.
#[derive(Debug)]
pub(crate) struct Frugal<S> {
    stream: S,
    left: usize,
}

impl<S> Frugal<S> {
    pub(crate) const fn new(stream: S) -> Self {
        Self { stream, left: MOST }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Frugal<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.left == 0 && buffer.remaining() > 0 {
            return Poll::Ready(Err(io::Error::other("the guest sends more than an answer can be")));
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.left = self.left.saturating_sub(buffer.filled().len().saturating_sub(before));
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Frugal<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, repeat};

    use super::*;

    #[tokio::test]
    async fn a_stream_without_end_ends_with_an_error() {
        let mut taken = Vec::new();
        let error = Frugal::new(repeat(b'x')).read_to_end(&mut taken).await.unwrap_err().to_string();
        assert_eq!(error, "the guest sends more than an answer can be");
        assert!((MOST..4 * MOST).contains(&taken.len()), "{}", taken.len());
    }

    #[tokio::test]
    async fn answers_pass_both_ways() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut near = Frugal::new(near);
        near.write_all(b"ask").await.unwrap();
        let mut asked = [0; 3];
        far.read_exact(&mut asked).await.unwrap();
        far.write_all(b"answer").await.unwrap();
        let mut answer = [0; 6];
        near.read_exact(&mut answer).await.unwrap();
        assert_eq!((&asked, &answer), (b"ask", b"answer"));
    }
}
