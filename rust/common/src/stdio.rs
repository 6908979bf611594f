//! Stdio streams between the relay and the agent, on guest port [`crate::constants::PORT_STDIO`].
//!
//! One connection a stream. It opens with a [`Hello`] line, answered by `OK\n` or `ERR <why>\n`; then frames follow in the
//! stream's direction: a big-endian `u32` length (at most [`MAX_FRAME`]) and that many bytes. Length 0 is the end of the
//! stream, after which the receiver closes. The end is a frame and not a half-close because the three ways to a vsock
//! treat half-close, and a close with data in flight, differently.

use serde::{Deserialize, Serialize};

/// Most bytes of payload a frame carries.
pub const MAX_FRAME: usize = 64 * 1024;
/// Bytes of a frame's header.
pub const HEADER: usize = 4;

/// Which of a process's streams.
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
    /// Which stream.
    pub stream: Stream,
}

/// A frame announced more than [`MAX_FRAME`] bytes.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("reading a stdio frame: {0} bytes announced, at most {MAX_FRAME} allowed")]
pub struct FrameTooLong(pub u32);

/// Header of a frame of `len` payload bytes; 0 ends the stream. Longer payloads are cut to [`MAX_FRAME`] by the caller.
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

#[cfg(test)]
mod tests {
    use super::*;

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
