//! Character devices in a container's spec: the guest's own, if its kernel has them. The host lets through
//! what means the same on every machine, and only the guest knows which of it there is.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::Path,
};

use serde_json::{Value, json};

use crate::error::TaskError;

/// Nodes that everybody may open: whoever has them in a container, that is. The kernel makes them for root
/// alone, and udev, which the guest does not have, opens them on other machines.
const FOR_ALL: [&str; 2] = ["/dev/fuse", "/dev/net/tun"];

/// Devices that a container gets which may use all, with their numbers
/// (`Documentation/admin-guide/devices.txt`): what runs privileged expects them.
const FOR_PRIVILEGED: [(&str, u64, u64); 3] =
    [("/dev/fuse", 10, 229), ("/dev/net/tun", 10, 200), ("/dev/loop-control", 10, 237)];

/// Adds to a container that may use all devices those of the guest's own that privileged programs look for,
/// so far as its kernel has them and the spec has nothing in their place. `sys` is where the kernel shows its
/// devices.
pub fn give(spec: &mut Value, sys: &Path) {
    if !may_use_all(spec) {
        return;
    }
    let taken = |path: &str| {
        let has = |list: &str, key: &str| {
            let entries = spec.pointer(list).and_then(Value::as_array).into_iter().flatten();
            entries.filter_map(|entry| entry.get(key)?.as_str()).any(|there| there == path)
        };
        has("/linux/devices", "path") || has("/mounts", "destination")
    };
    let is_there = |major, minor| sys.join(format!("dev/char/{major}:{minor}")).exists();
    let given: Vec<Value> = FOR_PRIVILEGED
        .into_iter()
        .filter(|(path, major, minor)| is_there(*major, *minor) && !taken(path))
        .map(|(path, major, minor)| {
            json!({"path": path, "type": "c", "major": major, "minor": minor, "fileMode": 0o666, "uid": 0, "gid": 0})
        })
        .collect();
    let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) else { return };
    let devices = linux.entry("devices").or_insert_with(|| json!([]));
    if devices.is_null() {
        *devices = json!([]);
    }
    if let Some(devices) = devices.as_array_mut() {
        devices.extend(given);
    }
}

/// The last rule about all devices is that they may be read and written.
fn may_use_all(spec: &Value) -> bool {
    let rules = spec.pointer("/linux/resources/devices").and_then(Value::as_array);
    let any = |rule: &Value, key| rule.get(key).and_then(Value::as_i64).is_none_or(|number| number < 0);
    let of_all = |rule: &&Value| {
        let kind = rule.get("type").and_then(Value::as_str).unwrap_or("a");
        matches!(kind, "a" | "") && any(rule, "major") && any(rule, "minor")
    };
    rules.into_iter().flatten().rfind(of_all).is_some_and(|rule| {
        let access = rule.get("access").and_then(Value::as_str).filter(|access| !access.is_empty());
        let access = access.unwrap_or("rwm");
        rule.get("allow") == Some(&Value::Bool(true)) && access.contains('r') && access.contains('w')
    })
}

/// Checks that the guest has every character device that a spec lists or binds. `sys` is where the kernel
/// shows its devices.
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
    fn who_may_use_all_devices_gets_what_the_kernel_has() {
        let sys = tempfile::tempdir().unwrap();
        for number in ["10:229", "10:200"] {
            fs::create_dir_all(sys.path().join("dev/char").join(number)).unwrap();
        }
        let given = |mut spec: Value| -> Vec<String> {
            give(&mut spec, sys.path());
            let devices = spec["linux"]["devices"].as_array().cloned().unwrap_or_default();
            devices.iter().map(|device| device["path"].as_str().unwrap().to_owned()).collect()
        };
        let all = json!([{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]);
        let spec = |rules: &Value| json!({"linux": {"resources": {"devices": rules}}});
        assert_eq!(
            given(spec(&all)),
            ["/dev/fuse", "/dev/net/tun"],
            "and no /dev/loop-control, which is not there"
        );
        assert_eq!(given(spec(&json!([{"allow": true, "type": "a", "major": -1, "minor": -1}]))).len(), 2);
        let mut null = spec(&all);
        null["linux"]["devices"] = Value::Null;
        assert_eq!(given(null).len(), 2);
        // What the spec has there stays.
        let mut own = spec(&all);
        own["linux"]["devices"] = json!([{"path": "/dev/fuse", "type": "c", "major": 1, "minor": 3}]);
        own["mounts"] = json!([{"destination": "/dev/net/tun", "source": "/run/x"}]);
        assert_eq!(given(own), ["/dev/fuse"]);
        for few in [
            json!(null),
            json!([]),
            json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"}]),
            json!([{"allow": true, "access": "rwm"}, {"allow": false, "access": "rwm"}]),
            json!([{"allow": true, "type": "c", "access": "rwm"}]),
            json!([{"allow": true, "access": "m"}]),
        ] {
            assert!(given(spec(&few)).is_empty(), "{few}");
        }
    }

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
