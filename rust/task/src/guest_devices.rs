//! Character devices in a container's spec: the guest's own, if its kernel has them. The host lets through what means the same
//! on every machine, and only the guest knows which of it there is.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::Path,
};

use serde_json::Value;

use crate::error::TaskError;

/// Nodes that everybody may open: whoever has them in a container, that is. The kernel makes them for root alone, and udev, which the
/// guest does not have, opens them on other machines.
const FOR_ALL: [&str; 2] = ["/dev/fuse", "/dev/net/tun"];

/// Checks that the guest has every character device that a spec lists or binds. `sys` is where the kernel shows its devices.
///
/// # Errors
/// For the first that it has not; the message names it.
pub fn check(spec: &Value, sys: &Path) -> Result<(), TaskError> {
    let list = |pointer| spec.pointer(pointer).and_then(Value::as_array).into_iter().flatten();
    for device in list("/linux/devices") {
        let number = |key| device.get(key).and_then(Value::as_u64).unwrap_or(u64::MAX);
        let is_character = matches!(device.get("type").and_then(Value::as_str), Some("c" | "u"));
        let known = sys.join(format!("dev/char/{}:{}", number("major"), number("minor")));
        if is_character && !known.exists() {
            let path = device.get("path").and_then(Value::as_str).unwrap_or("?");
            return Err(missing("linux.devices", path));
        }
    }
    for mount in list("/mounts") {
        let text = |key| mount.get(key).and_then(Value::as_str).unwrap_or_default();
        let source = Path::new(text("source"));
        if text("type") != "bind" || !source.starts_with("/dev") {
            continue;
        }
        match fs::metadata(source) {
            Err(_) => return Err(missing("mounts", text("source"))),
            Ok(node) if node.file_type().is_char_device() => open_to_all(source, &node)?,
            Ok(_) => {}
        }
    }
    Ok(())
}

fn missing(field: &str, path: &str) -> TaskError {
    TaskError::FailedPrecondition(format!(
        "{field} of the container's spec: {path} is a device of the host, which the VM's kernel does not have; remove it, or \
         set kernel_path to a kernel that has it (kernel-qemu-mini has more than kernel-qemu-micro)"
    ))
}

fn open_to_all(path: &Path, node: &fs::Metadata) -> Result<(), TaskError> {
    if !FOR_ALL.iter().any(|known| path == Path::new(known)) || node.permissions().mode() & 0o666 == 0o666 {
        return Ok(());
    }
    let doing = format!("letting users open {}", path.display());
    fs::set_permissions(path, fs::Permissions::from_mode(0o666)).map_err(TaskError::io(doing))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_kernel_has_passes_and_the_rest_is_named() {
        let sys = tempfile::tempdir().unwrap();
        fs::create_dir_all(sys.path().join("dev/char/10:229")).unwrap();
        let device =
            |kind: &str, minor: u64| json!({"path": "/dev/x", "type": kind, "major": 10, "minor": minor});
        let bind = |source: &str| json!({"destination": "/x", "type": "bind", "source": source});
        for fine in [
            json!({}),
            json!({"linux": {"devices": [device("c", 229), device("b", 7)]}}),
            json!({"mounts": [bind("/dev/null"), bind("/run/kuasar/state/c/mounts/0"), bind("/dev/shm"),
                              {"type": "tmpfs", "source": "/dev/nothing"}]}),
        ] {
            check(&fine, sys.path()).unwrap();
        }
        for (bad, begin) in [
            (
                json!({"linux": {"devices": [device("c", 200)]}}),
                "linux.devices of the container's spec: /dev/x is",
            ),
            (
                json!({"mounts": [bind("/dev/net/none")]}),
                "mounts of the container's spec: /dev/net/none is a device",
            ),
        ] {
            let error = check(&bad, sys.path()).unwrap_err().to_string();
            assert!(error.starts_with(begin) && error.contains("the VM's kernel does not have"), "{error}");
        }
    }
}
