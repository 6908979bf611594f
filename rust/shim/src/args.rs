//! The command line: containerd's, in the style of Go's `flag` package (`-id CID … delete`), and the daemon's
//! (`serve`).

use std::{collections::HashMap, path::PathBuf};

use kuasar_common::address::{AddressError, GuestAddress};

/// Flags that take a value: containerd's, then those of `serve`.
const VALUED: [&str; 11] = [
    "namespace",
    "address",
    "publish-binary",
    "id",
    "bundle",
    "socket",
    "pod-dir",
    "guest",
    "listen-fd",
    "vmm-pidfd",
    "forward-fd",
];

/// containerd's socket, unless the command line names another.
const CONTAINERD: &str = "/run/containerd/containerd.sock";

/// Action that the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Serve one pod's Task endpoint.
    Serve(Serve),
    /// Tell containerd what became of a container whose endpoint is gone.
    Delete,
    /// containerd wants a shim: refused.
    Start {
        /// containerd's namespace; may be empty.
        namespace: String,
        /// The container's id; may be empty.
        id: String,
    },
    /// Describe the runtime to containerd.
    Info,
    /// Print the version.
    Version,
    /// Print the usage.
    Help,
}

/// Parameters of `serve`.
#[derive(Debug, PartialEq, Eq)]
pub struct Serve {
    /// The pod's folder.
    pub pod_dir: PathBuf,
    /// Address of the guest's ports.
    pub guest: GuestAddress,
    /// containerd's gRPC socket; the one for events has its name and `.ttrpc`.
    pub containerd: PathBuf,
    /// Inherited listening socket.
    pub listen_fd: i32,
    /// Inherited pidfd of the VMM.
    pub vmm_pidfd: Option<i32>,
    /// Inherited listening socket for port-forward.
    pub forward_fd: Option<i32>,
}

/// Why a command line was not understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each says itself what it is")]
pub enum ArgsError {
    #[error("unknown flag {0}; see -h")]
    UnknownFlag(String),
    #[error("flag -{0} needs a value")]
    NoValue(String),
    #[error("unknown action {0:?}: it is serve, delete or start; see -h")]
    UnknownAction(String),
    #[error("no action given: it is serve, delete or start; see -h")]
    NoAction,
    #[error("{action} needs -{flag}")]
    Missing { action: &'static str, flag: &'static str },
    #[error("flag -{flag}: {value:?} is no file descriptor number of 3 or more")]
    Descriptor { flag: &'static str, value: String },
    #[error("flag -guest: {0}")]
    Guest(#[from] AddressError),
}

/// Understands a command line without its first word.
///
/// # Errors
/// When a flag or the action is unknown, or something is missing.
pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Action, ArgsError> {
    let mut values = HashMap::new();
    let mut action = None;
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
            action.get_or_insert(arg);
            continue;
        };
        let (name, inline) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        match name {
            "info" => return Ok(Action::Info),
            "v" | "version" => return Ok(Action::Version),
            "h" | "help" => return Ok(Action::Help),
            "debug" => {}
            _ if VALUED.contains(&name) => {
                let value =
                    inline.or_else(|| args.next()).ok_or_else(|| ArgsError::NoValue(name.to_owned()))?;
                values.insert(name.to_owned(), value);
            }
            _ => return Err(ArgsError::UnknownFlag(arg)),
        }
    }
    let mut take = |name: &str| values.remove(name);
    match action.as_deref() {
        Some("serve") => Ok(Action::Serve(serve(take)?)),
        Some("delete") => match take("id") {
            Some(id) if !id.is_empty() => Ok(Action::Delete),
            _ => Err(ArgsError::Missing { action: "delete", flag: "id" }),
        },
        Some("start") => Ok(Action::Start {
            namespace: take("namespace").unwrap_or_default(),
            id: take("id").unwrap_or_default(),
        }),
        Some(other) => Err(ArgsError::UnknownAction(other.to_owned())),
        None => Err(ArgsError::NoAction),
    }
}

fn serve(mut take: impl FnMut(&str) -> Option<String>) -> Result<Serve, ArgsError> {
    let mut need = |flag| take(flag).ok_or(ArgsError::Missing { action: "serve", flag });
    let pod_dir = need("pod-dir")?.into();
    let guest = need("guest")?.parse()?;
    let containerd = take("address").unwrap_or_else(|| CONTAINERD.to_owned()).into();
    let mut need = |flag| take(flag).ok_or(ArgsError::Missing { action: "serve", flag });
    let listen_fd = descriptor("listen-fd", need("listen-fd")?)?;
    let mut optional = |flag| take(flag).map(|value| descriptor(flag, value)).transpose();
    let (vmm_pidfd, forward_fd) = (optional("vmm-pidfd")?, optional("forward-fd")?);
    Ok(Serve { pod_dir, guest, containerd, listen_fd, vmm_pidfd, forward_fd })
}

fn descriptor(flag: &'static str, value: String) -> Result<i32, ArgsError> {
    match value.parse() {
        Ok(fd) if fd >= 3 => Ok(fd),
        _ => Err(ArgsError::Descriptor { flag, value }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Result<Action, ArgsError> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn containerd_s_own_lines() {
        let common =
            "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd";
        assert_eq!(words(&format!("{common} -id c1 -bundle /b delete")), Ok(Action::Delete));
        assert_eq!(words(&format!("{common} -id c1 -bundle /b -debug delete")), Ok(Action::Delete));
        assert_eq!(
            words(&format!("{common} -id c1 start")),
            Ok(Action::Start { namespace: "k8s.io".into(), id: "c1".into() })
        );
        assert_eq!(words("-info"), Ok(Action::Info));
        assert_eq!(words("-v"), Ok(Action::Version));
    }

    #[test]
    fn the_daemon_s_line() {
        let serve = Serve {
            pod_dir: "/run/kuasar/qemu/p".into(),
            guest: GuestAddress::Hybrid("/run/kuasar/qemu/p/vsock.sock".into()),
            containerd: "/run/k3s/containerd/containerd.sock".into(),
            listen_fd: 3,
            vmm_pidfd: Some(4),
            forward_fd: Some(5),
        };
        let line = "serve --pod-dir /run/kuasar/qemu/p --guest hvsock:///run/kuasar/qemu/p/vsock.sock";
        let line = format!("{line} --address /run/k3s/containerd/containerd.sock");
        assert_eq!(
            words(&format!("{line} --listen-fd 3 --vmm-pidfd=4 --forward-fd 5")),
            Ok(Action::Serve(serve))
        );
    }

    #[test]
    fn bad_lines_say_what_is_wrong() {
        for (line, text) in [
            ("", "no action given: it is serve, delete or start; see -h"),
            ("stop", "unknown action \"stop\": it is serve, delete or start; see -h"),
            ("-idd c1 delete", "unknown flag -idd; see -h"),
            ("delete -id", "flag -id needs a value"),
            ("delete", "delete needs -id"),
            ("serve", "serve needs -pod-dir"),
            ("serve -pod-dir /p -guest vsock://3", "serve needs -listen-fd"),
            (
                "serve -pod-dir /p -guest vsock://3 -listen-fd 1",
                "flag -listen-fd: \"1\" is no file descriptor number of 3 or more",
            ),
            (
                "serve -pod-dir /p -guest vsock://1 -listen-fd 3",
                "flag -guest: parsing the guest address \"vsock://1\": vsock:// needs a guest's context id, 3 or more",
            ),
        ] {
            assert_eq!(words(line).unwrap_err().to_string(), text, "{line}");
        }
    }
}
