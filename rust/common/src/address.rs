//! Addresses of guests: `hvsock://<absolute path>[:port]` (hybrid sockets) and `vsock://<cid>[:port]` (the
//! kernel's vsock).

use std::{fmt, path::PathBuf, str::FromStr};

/// Address at which the host reaches a guest's vsock ports.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GuestAddress {
    /// A unix socket that takes `CONNECT <port>\n`: Cloud Hypervisor's own, or `vhost-device-vsock`'s.
    Hybrid(PathBuf),
    /// A context id of the kernel's vsock.
    Vsock(u32),
}

/// Why an address was not understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("parsing the guest address {address:?}: {why}")]
pub struct AddressError {
    address: String,
    why: &'static str,
}

impl GuestAddress {
    /// Address text of one port.
    #[must_use]
    pub fn with_port(&self, port: u32) -> String {
        format!("{self}:{port}")
    }
}

impl fmt::Display for GuestAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hybrid(path) => write!(f, "hvsock://{}", path.display()),
            Self::Vsock(cid) => write!(f, "vsock://{cid}"),
        }
    }
}

impl FromStr for GuestAddress {
    type Err = AddressError;

    /// Parses an address without a port.
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let error = |why| AddressError { address: text.to_owned(), why };
        if let Some(path) = text.strip_prefix("hvsock://") {
            if !path.starts_with('/') {
                return Err(error("hvsock:// needs an absolute path"));
            }
            return Ok(Self::Hybrid(path.into()));
        }
        let Some(cid) = text.strip_prefix("vsock://") else {
            return Err(error("it starts with neither hvsock:// nor vsock://"));
        };
        match cid.parse() {
            Ok(cid) if (3..u32::MAX).contains(&cid) => Ok(Self::Vsock(cid)),
            _ => Err(error("vsock:// needs a guest's context id, 3 or more")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        for text in ["hvsock:///run/kuasar/qemu/p/vsock.sock", "vsock://3"] {
            assert_eq!(text.parse::<GuestAddress>().unwrap().to_string(), text);
        }
        assert_eq!(GuestAddress::Vsock(7).with_port(1024), "vsock://7:1024");
    }

    #[test]
    fn bad_addresses_say_why() {
        for bad in ["", "vsock://", "vsock://2", "vsock://x", "hvsock://relative", "unix:///x"] {
            let error = bad.parse::<GuestAddress>().unwrap_err().to_string();
            assert!(error.starts_with("parsing the guest address"), "{error}");
        }
    }
}
