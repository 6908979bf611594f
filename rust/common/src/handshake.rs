//! Messages of agent and daemon on the connection that the agent opens when it is up.
//!
//! One JSON object a line, at most [`MAX_LINE`] bytes each. The guest says [`ToHost::Ready`], the host
//! answers [`ToGuest::Token`]; the connection stays open for the life of the VM and carries [`ToHost::Fatal`]
//! if the agent has to give up. Everything that arrives at the host comes from a guest and is hostile until
//! parsed.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Longest line either side accepts, in bytes, newline included.
pub const MAX_LINE: usize = 4096;

/// A line from the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToHost {
    /// The agent listens on its ports.
    Ready(Ready),
    /// The agent cannot go on; the VM ends after this.
    Fatal(Fatal),
}

/// The agent's report that it is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Version of the agent.
    pub agent: String,
    /// Nanoseconds since the guest's kernel started (`CLOCK_BOOTTIME`).
    pub uptime_ns: u64,
    /// File system and options of the guest's root, as `/proc/mounts` has them.
    #[serde(default)]
    pub root: String,
}

/// Why the agent gave up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fatal {
    /// One sentence for a person.
    pub reason: String,
}

/// A line from the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToGuest {
    /// The secret that every call of the host to this guest carries: 64 hex digits.
    Token(String),
}

/// Why a line was not understood.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// No newline within the limit.
    #[error("parsing a handshake line: longer than {MAX_LINE} bytes")]
    TooLong,
    /// Not the JSON that was expected.
    #[error("parsing a handshake line: {0}")]
    Json(#[from] serde_json::Error),
}

/// Renders a message as one line, newline included.
///
/// # Errors
/// When the message does not fit [`MAX_LINE`].
pub fn to_line(message: &impl Serialize) -> Result<Vec<u8>, LineError> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    if line.len() > MAX_LINE { Err(LineError::TooLong) } else { Ok(line) }
}

/// Parses one line, with or without its newline.
///
/// # Errors
/// When the line is too long or not a message of type `T`.
pub fn from_line<T: DeserializeOwned>(line: &[u8]) -> Result<T, LineError> {
    if line.len() > MAX_LINE {
        return Err(LineError::TooLong);
    }
    Ok(serde_json::from_slice(line)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_has_the_documented_shape() {
        let ready = ToHost::Ready(Ready { agent: "0.1.0".into(), uptime_ns: 123, root: "ext4 ro".into() });
        let line = to_line(&ready).unwrap();
        assert_eq!(line, b"{\"ready\":{\"agent\":\"0.1.0\",\"uptime_ns\":123,\"root\":\"ext4 ro\"}}\n");
        assert_eq!(from_line::<ToHost>(&line).unwrap(), ready);
    }

    #[test]
    fn an_endless_line_is_refused() {
        let long = vec![b' '; MAX_LINE + 1];
        assert!(matches!(from_line::<ToHost>(&long), Err(LineError::TooLong)));
        let fatal = ToHost::Fatal(Fatal { reason: "x".repeat(MAX_LINE) });
        assert!(matches!(to_line(&fatal), Err(LineError::TooLong)));
    }

    #[test]
    fn garbage_is_refused() {
        for bad in [&b"\xff\xfe"[..], b"", b"{}", b"{\"ready\":{}}", b"[[[[[[[[", b"{\"token\":\"x\"}"] {
            assert!(from_line::<ToHost>(bad).is_err(), "{bad:?}");
        }
    }
}
