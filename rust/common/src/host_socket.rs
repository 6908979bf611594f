//! Sockets of the host that containers have mounted.
//!
//! A file server passes names, not connections. So the agent listens in the host's place, on a socket with
//! the owner and mode of the host's, which is what is mounted in the container: the guest's kernel decides
//! who may connect. The relay waits for the next connection on the guest's port
//! [`crate::constants::PORT_FORWARD`], connects to the host's socket as the user who is connected in the
//! guest, and carries the bytes.

use serde::{Deserialize, Serialize};

use crate::storage::{Storage, driver};

/// Most supplementary groups of a user that are passed on: what fits the answer's line.
pub const MAX_GROUPS: usize = 256;

/// The agent's answer when nothing more is to be waited for: the container is gone.
pub const GONE: &str = "ERR gone";

/// The connected peer of a socket in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
    /// Supplementary groups, [`MAX_GROUPS`] at most.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<u32>,
}

/// Owner, group and mode of a socket: the mode says who may connect to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// The twelve bits of chmod(2).
    pub mode: u32,
}

impl Access {
    /// The storage that has the agent make such a socket.
    #[must_use]
    pub fn storage(self, mount_point: &str) -> Storage {
        let Self { uid, gid, mode } = self;
        Storage {
            driver: driver::SOCKET.into(),
            options: vec![format!("uid={uid}"), format!("gid={gid}"), format!("mode={mode:o}")],
            mount_point: mount_point.into(),
            ..Storage::default()
        }
    }

    /// Reads the options of such a storage.
    ///
    /// # Errors
    /// When the options are wrong; the error says how.
    pub fn parse(options: &[String]) -> Result<Self, String> {
        let (mut uid, mut gid, mut mode) = (None, None, None);
        for option in options {
            let wrong = || format!("driver socket knows no option {option}");
            let (name, value) = option.split_once('=').ok_or_else(wrong)?;
            let (into, radix) = match name {
                "uid" => (&mut uid, 10),
                "gid" => (&mut gid, 10),
                "mode" => (&mut mode, 8),
                _ => return Err(wrong()),
            };
            *into = Some(u32::from_str_radix(value, radix).map_err(|_| wrong())?);
        }
        match (uid, gid, mode) {
            (Some(uid), Some(gid), Some(mode @ ..=0o7777)) => Ok(Self { uid, gid, mode }),
            _ => Err("a socket needs uid=, gid= and mode=".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handshake::MAX_LINE;

    #[test]
    fn access_survives_being_a_storage() {
        let access = Access { uid: 0, gid: 998, mode: 0o660 };
        let storage = access.storage("/run/kuasar/storage/c/sockets/0");
        assert_eq!(storage.options, ["uid=0", "gid=998", "mode=660"]);
        assert_eq!(Access::parse(&storage.options), Ok(access));
        let list = serde_json::to_vec(&vec![storage]).unwrap();
        crate::storage::parse(&list).unwrap();
    }

    #[test]
    fn options_that_say_too_little_or_too_much_are_named() {
        let parse = |options: &[&str]| {
            Access::parse(&options.iter().map(|&o| o.to_owned()).collect::<Vec<_>>()).unwrap_err()
        };
        for missing in [&["uid=0", "gid=0"][..], &[], &["uid=0", "gid=0", "mode=10000"]] {
            assert_eq!(parse(missing), "a socket needs uid=, gid= and mode=");
        }
        for wrong in ["ro", "size=1", "mode=8", "uid=-1", "uid="] {
            assert_eq!(parse(&[wrong]), format!("driver socket knows no option {wrong}"));
        }
    }

    #[test]
    fn a_peer_has_the_documented_shape_and_fits_a_line() {
        let peer = Peer { uid: 1000, gid: 1000, groups: vec![998] };
        assert_eq!(serde_json::to_string(&peer).unwrap(), r#"{"uid":1000,"gid":1000,"groups":[998]}"#);
        assert_eq!(serde_json::from_str::<Peer>(r#"{"uid":0,"gid":0}"#).unwrap(), Peer::default());
        let most = Peer { uid: u32::MAX, gid: u32::MAX, groups: vec![u32::MAX; MAX_GROUPS] };
        assert!(serde_json::to_string(&most).unwrap().len() + "OK \n".len() <= MAX_LINE);
    }
}
