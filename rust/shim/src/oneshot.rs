//! The actions that answer and end: `delete`, `-info`, `start`, `-v`, `-h`.

use std::time::SystemTime;

use containerd_shim_protos::{
    api::DeleteResponse,
    types::introspection::{RuntimeInfo, RuntimeVersion},
};
use kuasar_common::constants::RUNTIME_TYPE;
use protobuf::{Message, MessageField, well_known_types::timestamp::Timestamp};

use crate::task::EXIT_KILLED;

/// Name and version of this program.
pub const VERSION: &str = concat!("containerd-shim-kuasar-vmm-v1 ", env!("CARGO_PKG_VERSION"));

/// Text that `-h` prints.
pub const USAGE: &str = "\
Relay between containerd's Task API and one pod's microVM.

  serve -pod-dir DIR -guest hvsock://PATH|vsock://CID -listen-fd N [-vmm-pidfd N]
                        serve a pod's Task endpoint (started by vmm-sandboxer)
  -id CID … delete      print containerd's DeleteResponse; changes nothing
  -info                 print containerd's RuntimeInfo
  -v                    print the version
";

/// Answer to `delete`: containerd found the container's endpoint gone, so the container is, too. Nothing is
/// cleaned up here; the pod belongs to the daemon, and the VM may well be alive with other containers in it.
///
/// # Errors
/// When it cannot be encoded.
pub fn delete() -> protobuf::Result<Vec<u8>> {
    let response = DeleteResponse {
        exit_status: EXIT_KILLED,
        exited_at: MessageField::some(Timestamp::from(SystemTime::now())),
        ..Default::default()
    };
    response.write_to_bytes()
}

/// Key of `RuntimeInfo`'s annotations: mounts that containerd 2.2 and later leaves to the runtime. (From 2.4
/// on there is another way to say so, in the answer to `start`, which this program never gives.)
const ALLOWED_MOUNTS: &str = "containerd.io/runtime-allow-mounts";
/// Images as layers, and what is made of them. Making a file system in a new image (`mkfs`) is left to
/// containerd.
const OUR_MOUNTS: &str = "erofs,format/*,mkdir/*";

/// Answer to `-info`.
///
/// # Errors
/// When it cannot be encoded.
pub fn info() -> protobuf::Result<Vec<u8>> {
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").to_owned(), ..Default::default() };
    let info = RuntimeInfo {
        name: RUNTIME_TYPE.to_owned(),
        version: MessageField::some(version),
        annotations: [(ALLOWED_MOUNTS.to_owned(), OUR_MOUNTS.to_owned())].into(),
        ..Default::default()
    };
    info.write_to_bytes()
}

/// Why `start` is refused, on one line: containerd shows it to whoever created the pod.
#[must_use]
pub fn refusal(namespace: &str, id: &str) -> String {
    let id = if id.is_empty() { "a container" } else { id };
    let place = if namespace.is_empty() { String::new() } else { format!(" in namespace {namespace}") };
    format!(
        "starting {id}{place}: containerd asked for a shim, but {RUNTIME_TYPE} has none to start, its pods are made by a \
         sandboxer; containerd is older than 2.1, or this runtime handler is not configured for one: use containerd >= \
         2.1 and set `sandboxer = \"<name of the vmm-sandboxer proxy plugin>\"` beside `runtime_type = \
         \"{RUNTIME_TYPE}\"`"
    )
}

#[cfg(test)]
mod tests {
    use super::refusal;

    #[test]
    fn the_refusal_is_one_line() {
        for (namespace, id) in [("k8s.io", "c1"), ("", "")] {
            let text = refusal(namespace, id);
            assert!(!text.contains('\n') && !text.contains("  "), "{text}");
        }
    }
}
