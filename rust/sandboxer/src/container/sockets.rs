//! Sockets of the host that containers mount: connections to them are carried (see
//! [`kuasar_common::host_socket`]).

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use kuasar_common::{
    host_socket::Access,
    storage::{MOUNT_POINTS, Storage},
};

use super::spec::{Bind, SpecError, refused};

/// A socket of the host in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSocket {
    /// The host's path.
    pub host: PathBuf,
    /// Path in the guest at which the agent listens in its place.
    pub guest: String,
    access: Access,
}

impl HostSocket {
    /// Makes the socket that a bind mount names.
    pub(super) fn new(container: &str, bind: &Bind, found: &fs::Metadata) -> Result<Self, SpecError> {
        // Of this process's network namespace, which is the host's; what is bound elsewhere is not known, and
        // taken.
        let known = fs::read_to_string("/proc/net/unix").unwrap_or_default();
        let names = [Some(bind.source.clone()), fs::canonicalize(&bind.source).ok()];
        check_kind(&known, &names.into_iter().flatten().collect::<Vec<_>>(), bind)?;
        Ok(Self {
            host: bind.source.clone(),
            guest: format!("{MOUNT_POINTS}/{container}/sockets/{}", bind.name),
            access: Access { uid: found.uid(), gid: found.gid(), mode: found.mode() & 0o7777 },
        })
    }

    /// The socket that the agent makes for it, as a storage of the request.
    pub(super) fn storage(&self) -> Storage {
        self.access.storage(&self.guest)
    }
}

/// Only streams can be carried.
fn check_kind(known: &str, names: &[PathBuf], bind: &Bind) -> Result<(), SpecError> {
    // Num RefCount Protocol Flags Type St Inode Path (proc_net(5)); the path, which may have blanks, only if
    // it is bound.
    let kinds: Vec<&str> = known
        .lines()
        .filter_map(|line| {
            let mut words = line.splitn(8, ' ').filter(|word| !word.is_empty());
            let kind = words.by_ref().nth(4)?;
            let path = line.find(" /").and_then(|at| line.get(at..))?.trim_start();
            names.iter().any(|name| name == Path::new(path)).then_some(kind)
        })
        .collect();
    let what = match kinds.first() {
        _ if kinds.contains(&"0001") => return Ok(()),
        Some(&"0002") => "datagrams (SOCK_DGRAM)",
        Some(&"0005") => "packets (SOCK_SEQPACKET)",
        _ => return Ok(()),
    };
    Err(refused(
        "mounts",
        format!(
            "{} is the host's socket {}, which takes {what}, and only connections of streams can be carried into the VM; remove \
             the mount, or have the service listen on a stream socket or on a port as well",
            bind.destination,
            bind.source.display()
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &str = "Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 24123 /run/a.sock
0000000000000000: 00000003 00000000 00000000 0001 03 24124
0000000000000000: 00000002 00000000 00000000 0002 01 24125 /run/dev log
0000000000000000: 00000002 00000000 00010000 0005 01 24126 /run/udev/control
0000000000000000: 00000002 00000000 00000000 0002 01 24127 /run/both
0000000000000000: 00000002 00000000 00010000 0001 01 24128 /run/both
0000000000000000: 00000002 00000000 00000000 0002 01 24129 @/run/abstract
";

    fn said(path: &str) -> Option<String> {
        let bind = Bind {
            name: "0".into(),
            source: path.into(),
            destination: "/s".into(),
            read_only: false,
            recursive: true,
            disk: None,
        };
        check_kind(KNOWN, std::slice::from_ref(&bind.source), &bind).err().map(|error| error.to_string())
    }

    #[test]
    fn only_what_is_known_to_be_no_stream_is_refused() {
        for fine in ["/run/a.sock", "/run/both", "/run/unknown", "/run/abstract", "/run/dev"] {
            assert_eq!(said(fine), None);
        }
        let datagrams = said("/run/dev log").unwrap();
        assert!(datagrams.starts_with(
            "mounts of the container's spec: /s is the host's socket /run/dev log, which takes datagrams"
        ));
        assert!(datagrams.contains("have the service listen on a stream socket or on a port"), "{datagrams}");
        assert!(said("/run/udev/control").unwrap().contains("packets (SOCK_SEQPACKET)"));
    }
}
