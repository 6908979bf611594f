//! Stdio streams between the relay and the agent, on guest port [`crate::constants::PORT_STDIO`].
//!
//! One connection a stream. It opens with a [`Hello`] line, answered by `OK\n` or `ERR <why>\n`; then frames
//! follow in the stream's direction: a big-endian `u32` length (at most [`MAX_FRAME`]) and that many bytes.
//! Length 0 is the end of the stream, after which the receiver closes. The end is a frame and not a
//! half-close because the three ways to a vsock treat half-close, and a close with data in flight,
//! differently.

use std::io;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Most bytes of payload a frame carries.
pub const MAX_FRAME: usize = 64 * 1024;
/// Bytes of a frame's header.
pub const HEADER: usize = 4;
/// Most bytes that are read from a connection at once.
const CHUNK: usize = 16 * 1024;

/// One of a process's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Host to guest.
    Stdin,
    /// Guest to host.
    Stdout,
    /// Guest to host.
    Stderr,
}

/// The first line of a stream's connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The pod's token.
    pub token: String,
    /// Container id.
    pub container: String,
    /// Exec id; empty for the container's own process.
    #[serde(default)]
    pub exec: String,
    /// The stream of the process.
    pub stream: Stream,
}

/// A frame announced more than [`MAX_FRAME`] bytes.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("reading a stdio frame: {0} bytes announced, at most {MAX_FRAME} allowed")]
pub struct FrameTooLong(pub u32);

/// Header of a frame of `len` payload bytes; 0 ends the stream. Longer payloads are cut to [`MAX_FRAME`] by
/// the caller.
#[must_use]
pub fn header(len: usize) -> [u8; HEADER] {
    u32::try_from(len.min(MAX_FRAME)).unwrap_or(0).to_be_bytes()
}

/// Payload length that a header announces.
///
/// # Errors
/// When it is more than [`MAX_FRAME`].
pub fn payload_len(header: [u8; HEADER]) -> Result<usize, FrameTooLong> {
    let len = u32::from_be_bytes(header);
    match usize::try_from(len) {
        Ok(n) if n <= MAX_FRAME => Ok(n),
        _ => Err(FrameTooLong(len)),
    }
}

/// Takes frames apart as their bytes come, however these are cut: each byte is looked at once and moved once,
/// whatever the frames' lengths.
#[derive(Clone, Debug, Default)]
pub struct Frames {
    head: [u8; HEADER],
    /// Bytes of the header that are there.
    known: usize,
    /// Bytes of payload that are still to come.
    rest: usize,
}

impl Frames {
    /// Hands the payload in the stream's next bytes to `take`, piece by piece. `Some` at the stream's end:
    /// what lies behind it.
    ///
    /// # Errors
    /// When a frame announces more than [`MAX_FRAME`] bytes; what came before it was taken.
    pub fn unpack<'a>(
        &mut self,
        mut raw: &'a [u8],
        mut take: impl FnMut(&'a [u8]),
    ) -> Result<Option<&'a [u8]>, FrameTooLong> {
        loop {
            if self.rest > 0 {
                let (piece, behind) = raw.split_at(self.rest.min(raw.len()));
                if piece.is_empty() {
                    return Ok(None);
                }
                take(piece);
                self.rest -= piece.len();
                raw = behind;
            }
            while self.rest == 0 {
                let Some((byte, behind)) = raw.split_first() else { return Ok(None) };
                raw = behind;
                if let Some(place) = self.head.get_mut(self.known) {
                    *place = *byte;
                }
                self.known += 1;
                if self.known == HEADER {
                    self.known = 0;
                    self.rest = payload_len(self.head)?;
                    if self.rest == 0 {
                        return Ok(Some(raw));
                    }
                }
            }
        }
    }

    /// Returns true if a frame's payload has yet to come, so that waiting for it holds nothing up.
    #[must_use]
    pub fn wants_payload(&self) -> bool {
        self.rest > 0
    }
}

/// Content of frames.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Payload, of as many frames as came at once.
    pub payload: Vec<u8>,
    /// At the end of the stream: number of bytes behind it that were read, too.
    pub end: Option<usize>,
}

/// Reads frames off a connection, many at once where they are short, with no buffer as long as nothing comes.
#[derive(Debug, Default)]
pub struct FrameReader {
    frames: Frames,
    broken: Option<FrameTooLong>,
}

impl FrameReader {
    /// Waits for payload or the end.
    ///
    /// # Errors
    /// When the connection breaks or ends before the stream does, or a frame announces too much.
    pub async fn next(&mut self, from: &mut (impl AsyncRead + Unpin)) -> io::Result<Batch> {
        let mut batch = Batch::default();
        loop {
            if let Some(error) = self.broken.take() {
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
            if self.frames.wants_payload() {
                let mut raw = Vec::with_capacity(CHUNK);
                some(from.read_buf(&mut raw).await?)?;
                self.unpack(&raw, &mut batch);
            } else {
                let mut head = [0; HEADER];
                let got = some(from.read(&mut head).await?)?;
                self.unpack(head.get(..got).unwrap_or_default(), &mut batch);
            }
            if batch.end.is_some() || !batch.payload.is_empty() {
                return Ok(batch);
            }
        }
    }

    fn unpack(&mut self, raw: &[u8], batch: &mut Batch) {
        match self.frames.unpack(raw, |piece| batch.payload.extend(piece)) {
            Ok(behind) => batch.end = behind.map(<[u8]>::len),
            // What came before it is handed out first.
            Err(error) => self.broken = Some(error),
        }
    }
}

/// No bytes are the end of a connection, in the middle of what should have come.
fn some(got: usize) -> io::Result<usize> {
    if got == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(got) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn short_frames_are_read_many_at_once_and_in_order() {
        let flood = [&header(1)[..], b"x"].concat().repeat(10_000);
        let (mut from, mut reader) = (flood.as_slice(), FrameReader::default());
        let (mut reads, mut bytes) = (0, 0);
        while bytes < 10_000 {
            bytes += reader.next(&mut from).await.unwrap().payload.len();
            reads += 1;
        }
        // A piece of 16 KiB, and up to four short ones until a header ends where a read does.
        assert!(reads <= 20, "{reads} batches for 10000 frames");
        let error = reader.next(&mut from).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);

        let raw = [&header(2)[..], b"ab", &header(0), b"behind"].concat();
        let (mut from, mut reader) = (raw.as_slice(), FrameReader::default());
        assert_eq!(reader.next(&mut from).await.unwrap(), Batch { payload: b"ab".to_vec(), end: Some(6) });
        let raw = [&header(2)[..], b"ab", &[0xff; 4]].concat();
        let (mut from, mut reader) = (raw.as_slice(), FrameReader::default());
        assert_eq!(reader.next(&mut from).await.unwrap(), Batch { payload: b"ab".to_vec(), end: None });
        assert_eq!(reader.next(&mut from).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    type Unpacked = (Vec<Vec<u8>>, Result<Option<Vec<u8>>, FrameTooLong>);

    fn unpacked(frames: &mut Frames, raw: &[u8]) -> Unpacked {
        let mut pieces = Vec::new();
        let end = frames.unpack(raw, |piece| pieces.push(piece.to_vec()));
        (pieces, end.map(|behind| behind.map(<[u8]>::to_vec)))
    }

    #[test]
    fn frames_come_apart_wherever_they_are_cut() {
        let raw = [&header(5)[..], b"hello", &header(1), b" ", &header(5), b"world", &header(0), b"behind"]
            .concat();
        for cut in 1..=raw.len() {
            let (mut frames, mut payload, mut behind) = (Frames::default(), Vec::new(), None);
            for part in raw.chunks(cut) {
                match behind.as_mut() {
                    None => {
                        let (pieces, end) = unpacked(&mut frames, part);
                        payload.extend(pieces.concat());
                        behind = end.unwrap();
                    }
                    Some(behind) => behind.extend(part),
                }
            }
            assert_eq!(
                (payload.as_slice(), behind.as_deref()),
                (&b"hello world"[..], Some(&b"behind"[..])),
                "{cut}"
            );
        }
    }

    #[test]
    fn a_frame_that_is_none_ends_all_and_what_came_before_it_counts() {
        let raw = [&header(1)[..], b"a", &[0xff; 9]].concat();
        let (pieces, end) = unpacked(&mut Frames::default(), &raw);
        assert_eq!((pieces, end), (vec![b"a".to_vec()], Err(FrameTooLong(u32::MAX))));
    }

    /// Counts what is moved, not how long it takes: the number of pieces, and their bytes.
    #[test]
    fn the_work_of_a_byte_does_not_depend_on_how_many_come_with_it() {
        for count in [1_000, 100_000] {
            let raw = [&header(1)[..], b"x"].concat().repeat(count);
            let (mut frames, mut pieces, mut moved) = (Frames::default(), 0_usize, 0_usize);
            let end =
                frames.unpack(&raw, |piece| (pieces, moved) = (pieces + 1, moved + piece.len())).unwrap();
            assert_eq!((end, pieces, moved), (None, count, count));
        }
    }

    #[test]
    fn headers_round_trip() {
        for len in [0, 1, 4095, MAX_FRAME] {
            assert_eq!(payload_len(header(len)), Ok(len));
        }
        assert_eq!(payload_len([0, 1, 0, 1]), Err(FrameTooLong(65537)));
        assert_eq!(payload_len([0xff; 4]), Err(FrameTooLong(u32::MAX)));
    }

    #[test]
    fn hello_has_the_documented_shape() {
        let text = r#"{"token":"t","container":"c","stream":"stderr"}"#;
        let hello: Hello = serde_json::from_str(text).unwrap();
        assert_eq!(
            hello,
            Hello { token: "t".into(), container: "c".into(), exec: String::new(), stream: Stream::Stderr }
        );
    }
}
