//! The connection that calls to the guest share, and what may come on it.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, ready},
};

use kuasar_common::streaming::frame::HEADER;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};
use ttrpc::asynchronous::{Client, transport::Socket};

use super::Conn;

/// Longest answer of a guest to a call, in bytes. ttrpc's own limit is 4 MiB, of which a pod's relay would
/// have to keep one for each call that waits.
pub const MAX_ANSWER: usize = 256 * 1024;

/// The client of that connection.
#[derive(Default)]
pub(super) struct Link {
    /// The client, and a mark that lives as long as its connection.
    client: Option<(Client, Weak<()>)>,
    /// Since when every attempt to connect has failed.
    pub(super) lost_since: Option<Instant>,
}

impl Link {
    /// The client; an error if its connection is gone, which is said once.
    pub(super) fn client(&mut self) -> Result<Option<Client>, Gone> {
        match &self.client {
            Some((client, mark)) if mark.strong_count() > 0 => Ok(Some(client.clone())),
            Some(_) => {
                self.client = None;
                Err(Gone)
            }
            None => Ok(None),
        }
    }

    /// Takes a new connection.
    pub(super) fn connect(&mut self, conn: Conn) {
        let mark = Arc::new(());
        let weak = Arc::downgrade(&mark);
        self.client = Some((
            Client::new(Socket::new(Watched { conn, answers: Answers::default(), _mark: mark })),
            weak,
        ));
        self.lost_since = None;
    }
}

/// There was a connection, and is none any more.
pub(super) struct Gone;

/// Keeps an eye on the lengths of a ttrpc connection's frames as their bytes go by.
#[derive(Debug, Default)]
pub struct Answers {
    head: [u8; HEADER],
    known: usize,
    rest: usize,
}

impl Answers {
    /// Looks at the connection's next bytes.
    ///
    /// # Errors
    /// When a frame announces more than [`MAX_ANSWER`] bytes.
    pub fn look(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while let Some((byte, behind)) = bytes.split_first() {
            if self.rest > 0 {
                let skipped = self.rest.min(bytes.len());
                self.rest -= skipped;
                bytes = bytes.get(skipped..).unwrap_or_default();
                continue;
            }
            bytes = behind;
            if let Some(place) = self.head.get_mut(self.known) {
                *place = *byte;
            }
            self.known += 1;
            if self.known == HEADER {
                self.known = 0;
                self.rest = announced(self.head)?;
            }
        }
        Ok(())
    }
}

fn announced([a, b, c, d, ..]: [u8; HEADER]) -> io::Result<usize> {
    let length = u32::from_be_bytes([a, b, c, d]);
    usize::try_from(length).ok().filter(|length| *length <= MAX_ANSWER).ok_or_else(|| {
        let why = format!("an answer of {length} bytes, at most {MAX_ANSWER} are taken");
        io::Error::new(io::ErrorKind::InvalidData, why)
    })
}

/// A connection whose frames are watched, and whose mark tells when the ttrpc client dropped it.
struct Watched {
    conn: Conn,
    answers: Answers,
    _mark: Arc<()>,
}

impl AsyncRead for Watched {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.conn).poll_read(cx, buf))?;
        Poll::Ready(this.answers.look(buf.filled().get(before..).unwrap_or_default()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.conn).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.conn).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.conn).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_answer_is_seen_wherever_its_header_is_cut() {
        let frame = |length: usize| {
            let mut frame = u32::try_from(length).unwrap().to_be_bytes().to_vec();
            frame.extend([0, 0, 0, 1, 2, 0]);
            frame.resize(HEADER + length.min(MAX_ANSWER), 0xff);
            frame
        };
        let good = [frame(0), frame(20), frame(MAX_ANSWER), frame(3)].concat();
        let bad = [good.as_slice(), &frame(MAX_ANSWER + 1)].concat();
        for cut in [1, 3, 9, 10, 11, 4096, bad.len()] {
            let look = |bytes: &[u8]| {
                let mut answers = Answers::default();
                bytes.chunks(cut).try_for_each(|part| answers.look(part))
            };
            look(&good).unwrap();
            let error = look(&bad).unwrap_err().to_string();
            assert_eq!(error, "an answer of 262145 bytes, at most 262144 are taken", "{cut}");
        }
    }
}
