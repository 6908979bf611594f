//! Frames of ttrpc (its PROTOCOL.md): ten bytes of header, then a message.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes of a header: length, stream (both big-endian `u32`), type, flags.
pub const HEADER: usize = 10;
/// Longest message that is taken, in bytes, as in ttrpc.
pub const MAX_MESSAGE: usize = 4 << 20;

/// Longest first message of a connection to a guest's agent, in bytes: it shows the pod's token, and before
/// that little is taken of anybody. A longer call comes after a short one.
pub const MAX_FIRST: usize = 64 << 10;

/// Type of a frame that opens a stream.
pub const REQUEST: u8 = 1;
/// Type of a frame that answers a call, or ends a stream with an error.
pub const RESPONSE: u8 = 2;
/// Type of a frame of an open stream.
pub const DATA: u8 = 3;

/// Flag: the sender sends no more.
pub const REMOTE_CLOSED: u8 = 1;
/// Flag: there is no message, not even an empty one.
pub const NO_DATA: u8 = 4;

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Number of the stream, odd when a client opened it.
    pub stream: u32,
    /// [`REQUEST`], [`RESPONSE`], [`DATA`], or unknown.
    pub kind: u8,
    /// [`REMOTE_CLOSED`] and others.
    pub flags: u8,
    /// The message.
    pub message: Vec<u8>,
}

impl Frame {
    /// Its bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let length = u32::try_from(self.message.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(HEADER + self.message.len());
        bytes.extend(length.to_be_bytes());
        bytes.extend(self.stream.to_be_bytes());
        bytes.extend([self.kind, self.flags]);
        bytes.extend(&self.message);
        bytes
    }
}

/// Reads a frame; `None` at the end of the connection between two frames.
///
/// # Errors
/// When the connection breaks within a frame, or a message is longer than [`MAX_MESSAGE`].
pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
    read_at_most(from, MAX_MESSAGE).await
}

/// Reads a frame with a message of at most `most` bytes; `None` at the end of the connection between two
/// frames.
///
/// # Errors
/// When the connection breaks within a frame, or a message is longer.
pub async fn read_at_most(from: &mut (impl AsyncRead + Unpin), most: usize) -> io::Result<Option<Frame>> {
    let mut header = [0; HEADER];
    let Some((first, rest)) = header.split_first_mut() else { return Ok(None) };
    if from.read(std::slice::from_mut(first)).await? == 0 {
        return Ok(None);
    }
    from.read_exact(rest).await?;
    let [l3, l2, l1, l0, s3, s2, s1, s0, kind, flags] = header;
    let announced = u32::from_be_bytes([l3, l2, l1, l0]);
    let length = usize::try_from(announced).ok().filter(|length| *length <= most);
    let Some(length) = length else {
        let why = format!("a ttrpc frame announces {announced} bytes, at most {most} are taken");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    };
    let mut message = vec![0; length];
    from.read_exact(&mut message).await?;
    Ok(Some(Frame { stream: u32::from_be_bytes([s3, s2, s1, s0]), kind, flags, message }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_are_read_as_they_are_written() {
        let frame = Frame { stream: 1, kind: DATA, flags: REMOTE_CLOSED | NO_DATA, message: Vec::new() };
        assert_eq!(frame.encode(), [0, 0, 0, 0, 0, 0, 0, 1, 3, 5]);
        let other = Frame { stream: 0x0102_0304, kind: REQUEST, flags: 2, message: b"xy".to_vec() };
        let bytes = [frame.encode(), other.encode()].concat();
        let mut from = bytes.as_slice();
        assert_eq!(read(&mut from).await.unwrap(), Some(frame));
        assert_eq!(read(&mut from).await.unwrap(), Some(other));
        assert_eq!(read(&mut from).await.unwrap(), None);
    }

    #[tokio::test]
    async fn torn_and_oversized_frames_are_errors() {
        let bytes = Frame { stream: 1, kind: DATA, flags: 0, message: b"abc".to_vec() }.encode();
        for cut in 1..bytes.len() {
            assert!(read(&mut &bytes[..cut]).await.is_err(), "{cut}");
        }
        let error = read(&mut &[0xff; 10][..]).await.unwrap_err().to_string();
        assert_eq!(error, "a ttrpc frame announces 4294967295 bytes, at most 4194304 are taken");
    }
}
