//! Device nodes that a spec names: which the guest may have itself, and which are the host's.

use nix::sys::stat::{major, minor};
use serde_json::Value;

use super::spec::{BlockDevice, Object, SpecError, refused};

/// Character devices that mean the same on every machine, by the number that the kernel has reserved for each
/// (`Documentation/admin-guide/devices.txt`), and where a kernel that has them puts them. Whether the guest's
/// has is the agent's to say.
const OF_ANY_MACHINE: [(u64, u64, &str); 13] = [
    (1, 3, "/dev/null"),
    (1, 5, "/dev/zero"),
    (1, 7, "/dev/full"),
    (1, 8, "/dev/random"),
    (1, 9, "/dev/urandom"),
    (5, 0, "/dev/tty"),
    (5, 1, "/dev/console"),
    (5, 2, "/dev/ptmx"),
    (10, 183, "/dev/hwrng"),
    (10, 200, "/dev/net/tun"),
    (10, 229, "/dev/fuse"),
    (10, 237, "/dev/loop-control"),
    (108, 0, "/dev/ppp"),
];

/// Path in a guest of a character device of the host, if guests may have it at all.
pub(super) fn in_guest(rdev: u64) -> Option<&'static str> {
    path_of(major(rdev), minor(rdev))
}

fn path_of(major: u64, minor: u64) -> Option<&'static str> {
    OF_ANY_MACHINE.iter().find(|known| (known.0, known.1) == (major, minor)).map(|known| known.2)
}

/// Disks are plugged in; character devices have to be the guest's own.
pub(super) fn block_devices(linux: &Object) -> Result<Vec<BlockDevice>, SpecError> {
    let mut disks = Vec::new();
    for device in linux.get("devices").and_then(Value::as_array).into_iter().flatten() {
        let number = |key| device.get(key).and_then(Value::as_u64).unwrap_or(u64::MAX);
        let (major, minor) = (number("major"), number("minor"));
        let path = device.get("path").and_then(Value::as_str).unwrap_or("?");
        match device.get("type").and_then(Value::as_str) {
            Some("b") => {
                let read_only = !may_write(linux, major, minor);
                disks.push(BlockDevice { path: path.to_owned(), major, minor, read_only });
            }
            Some("c") if path_of(major, minor).is_some() => {}
            _ => {
                return Err(refused(
                    "linux.devices",
                    format!(
                        "{path} is a device of the host, which the VM does not have; remove it, or for a privileged \
                         container set privileged_without_host_devices = true in containerd's runtime table"
                    ),
                ));
            }
        }
    }
    Ok(disks)
}

/// Returns true if the rules let the container write to a disk. The last rule that is about the disk counts.
pub(super) fn may_write(linux: &Object, major: u64, minor: u64) -> bool {
    let rules =
        linux.get("resources").and_then(|resources| resources.get("devices")).and_then(Value::as_array);
    let is_about = |rule: &&Value| {
        let any = |key, wanted| {
            rule.get(key)
                .and_then(Value::as_i64)
                .is_none_or(|number| number < 0 || number.cast_unsigned() == wanted)
        };
        let kind = rule.get("type").and_then(Value::as_str).unwrap_or("a");
        matches!(kind, "a" | "b") && any("major", major) && any("minor", minor)
    };
    rules.into_iter().flatten().rfind(is_about).is_some_and(|rule| {
        let access = rule.get("access").and_then(Value::as_str).unwrap_or("rwm");
        rule.get("allow").and_then(Value::as_bool).unwrap_or(false) && access.contains('w')
    })
}
