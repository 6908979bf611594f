//! The debug console on guest port [`crate::constants::PORT_DEBUG`]: one shell on one terminal a connection.
//!
//! The host opens with a [`Hello`] line, answered by `OK\n` or `ERR <why>\n`. Then both sides send frames as
//! on the stdio port (see [`crate::stdio`]), and length 0 is the end: from the host it hangs up, from the
//! guest it says that the shell has ended. The guest's frames are the terminal's output; the host's start
//! with a byte that says what follows.

use serde::{Deserialize, Serialize};

/// First byte of a frame of the host: the rest is typed into the terminal.
pub const INPUT: u8 = 0;
/// First byte of a frame of the host: rows and columns follow, two big-endian `u16`.
pub const RESIZE: u8 = 1;

/// The first line of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The pod's token.
    pub token: String,
    /// Rows of the terminal; 0 if unknown.
    #[serde(default)]
    pub rows: u16,
    /// Columns of the terminal; 0 if unknown.
    #[serde(default)]
    pub columns: u16,
}

/// A frame of the host, parsed.
#[derive(Debug, PartialEq, Eq)]
pub enum FromHost<'a> {
    /// Typed.
    Input(&'a [u8]),
    /// The terminal's new size.
    Resize {
        /// Rows.
        rows: u16,
        /// Columns.
        columns: u16,
    },
}

impl<'a> FromHost<'a> {
    /// Reads a frame's payload; `None` for what this version does not know.
    #[must_use]
    pub fn parse(payload: &'a [u8]) -> Option<Self> {
        match *payload {
            [INPUT, ref input @ ..] => Some(Self::Input(input)),
            [RESIZE, r1, r0, c1, c0] => Some(Self::Resize {
                rows: u16::from_be_bytes([r1, r0]),
                columns: u16::from_be_bytes([c1, c0]),
            }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_the_host_are_told_apart() {
        assert_eq!(FromHost::parse(b"\0ls\n"), Some(FromHost::Input(b"ls\n")));
        assert_eq!(
            FromHost::parse(&[RESIZE, 0, 50, 1, 4]),
            Some(FromHost::Resize { rows: 50, columns: 260 })
        );
        for unknown in [&b""[..], &[RESIZE], &[RESIZE, 0, 1, 0, 1, 0], &[2, 0]] {
            assert_eq!(FromHost::parse(unknown), None, "{unknown:?}");
        }
    }

    #[test]
    fn hello_needs_a_token_only() {
        let hello: Hello = serde_json::from_str(r#"{"token":"t"}"#).unwrap();
        assert_eq!(hello, Hello { token: "t".into(), rows: 0, columns: 0 });
    }
}
