//! OCI hooks: programs that the runtime runs around a container's life. In a VM they run in the guest, so
//! they must exist there; one that does not is an error at create, because a hook that silently did not run
//! (one that adds a GPU, say) is noticed much later and by somebody else.

use std::path::Path;

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags, Stat, fstat, open, openat2},
    io::Errno,
};
use serde_json::Value;

use crate::error::TaskError;

/// The lists of a spec whose programs run in the guest's own file system.
const IN_GUEST: [&str; 5] = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"];
/// The one whose programs run in the container's.
const IN_CONTAINER: &str = "startContainer";
const EXECUTABLE: u32 = 0o111;

/// Checks that every hook of a spec can run; `guest` is the guest's root folder.
///
/// # Errors
/// At the first that cannot; the message names it.
pub fn check(spec: &Value, guest: &Path) -> Result<(), TaskError> {
    let Some(hooks) = spec.get("hooks") else { return Ok(()) };
    let hooks = hooks.as_object().ok_or_else(|| refuse("hooks", "is not a JSON object"))?;
    for (list, entries) in hooks {
        let entries = match entries {
            Value::Array(entries) => entries,
            Value::Null => continue,
            _ => return Err(refuse(&format!("hooks.{list}"), "is not a list")),
        };
        for (n, hook) in entries.iter().enumerate() {
            let name = format!("hooks.{list}[{n}]");
            let path = hook.get("path").and_then(Value::as_str).unwrap_or_default();
            if !path.starts_with('/') {
                return Err(refuse(&name, &format!("path {path:?} is not absolute")));
            }
            if IN_GUEST.contains(&list.as_str()) {
                runnable(&name, guest, path, "in the VM's image, where it would run")?;
            } else if list != IN_CONTAINER {
                return Err(refuse(
                    &name,
                    "is of a kind that the OCI runtime does not know and would not run",
                ));
            } else if !on_a_mount(spec, path) {
                let root = spec.pointer("/root/path").and_then(Value::as_str).unwrap_or_default();
                runnable(&name, Path::new(root), path, "in the container, where it would run")?;
            }
        }
    }
    Ok(())
}

fn refuse(field: &str, why: &str) -> TaskError {
    TaskError::InvalidArgument(format!("{field} of the container's spec {why}"))
}

/// Returns true if a path lies on a mount over the container's root, whose content cannot be seen yet.
fn on_a_mount(spec: &Value, path: &str) -> bool {
    let mounts = spec.get("mounts").and_then(Value::as_array).into_iter().flatten();
    mounts
        .filter_map(|mount| mount.get("destination").and_then(Value::as_str))
        .any(|destination| destination != "/" && Path::new(path).starts_with(destination))
}

fn runnable(name: &str, root: &Path, path: &str, wher: &str) -> Result<(), TaskError> {
    let why = match find(root, path) {
        Ok(found) if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile => {
            "is not a file".to_owned()
        }
        Ok(found) if found.st_mode & EXECUTABLE == 0 => "is not executable".to_owned(),
        Ok(_) => return Ok(()),
        Err(Errno::NOENT | Errno::NOTDIR) => "does not exist".to_owned(),
        Err(error) => format!("cannot be looked up ({error})"),
    };
    Err(refuse(
        name,
        &format!(
            "cannot run: {path} {why} {wher}; remove the CDI device, NRI plugin or runtime setting that adds it, or put \
             the program there"
        ),
    ))
}

/// Follows a path, symbolic links included, for a process whose root folder is `root`.
fn find(root: &Path, path: &str) -> rustix::io::Result<Stat> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = open(root, flags | OFlags::DIRECTORY, Mode::empty())?;
    let relative = path.trim_start_matches('/');
    let found = openat2(&root, relative, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
    fstat(found)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use serde_json::json;
    use tempfile::TempDir;

    use super::*;

    fn guest() -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["bin", "container/opt"] {
            fs::create_dir_all(dir.path().join(folder)).unwrap();
        }
        for (name, mode) in [("bin/hook", 0o755), ("bin/text", 0o644), ("container/opt/inside", 0o755)] {
            fs::write(dir.path().join(name), "").unwrap();
            fs::set_permissions(dir.path().join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        // Absolute, so it must be followed below the root and nowhere else.
        std::os::unix::fs::symlink("/bin/hook", dir.path().join("bin/link")).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", dir.path().join("bin/escape")).unwrap();
        dir
    }

    fn check_one(guest: &TempDir, list: &str, path: &str) -> Result<(), String> {
        let spec = json!({
            "root": {"path": guest.path().join("container")},
            "mounts": [{"destination": "/data"}, {"destination": "/"}],
            "hooks": {list: [{"path": "/bin/hook"}, {"path": path}]},
        });
        // The first is in every list's place but the container's.
        let spec = if list == IN_CONTAINER {
            json!({"root": spec["root"], "mounts": spec["mounts"], "hooks": {list: [{"path": path}]}})
        } else {
            spec
        };
        check(&spec, guest.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn hooks_that_exist_where_they_run_are_taken() {
        let guest = guest();
        for list in IN_GUEST {
            check_one(&guest, list, "/bin/hook").unwrap();
            check_one(&guest, list, "/bin/link").unwrap();
        }
        check_one(&guest, IN_CONTAINER, "/opt/inside").unwrap();
        // Whether it exists shows at start, and the runtime says so.
        check_one(&guest, IN_CONTAINER, "/data/hook").unwrap();
        check(&json!({}), guest.path()).unwrap();
        check(&json!({"hooks": {"poststop": null, "prestart": []}}), guest.path()).unwrap();
    }

    #[test]
    fn a_hook_that_cannot_run_is_named() {
        let guest = guest();
        let nvidia = "/usr/bin/nvidia-container-runtime-hook";
        assert_eq!(
            check_one(&guest, "prestart", nvidia).unwrap_err(),
            "hooks.prestart[1] of the container's spec cannot run: /usr/bin/nvidia-container-runtime-hook does not exist \
             in the VM's image, where it would run; remove the CDI device, NRI plugin or runtime setting that adds it, or \
             put the program there"
        );
        for (list, path, why) in [
            ("createRuntime", "/bin/text", "/bin/text is not executable in the VM"),
            ("createRuntime", "/bin", "/bin is not a file in the VM"),
            ("poststop", "/bin/text/x", "does not exist in the VM"),
            ("poststart", "/bin/escape", "/bin/escape does not exist in the VM"),
            ("poststart", "hook", "path \"hook\" is not absolute"),
            ("poststart", "", "path \"\" is not absolute"),
            (IN_CONTAINER, "/bin/hook", "/bin/hook does not exist in the container, where it would run"),
            ("onTuesdays", "/bin/hook", "hooks.onTuesdays[0] of the container's spec is of a kind"),
        ] {
            let error = check_one(&guest, list, path).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        for (bad, why) in [
            (json!({"hooks": 1}), "is not a JSON object"),
            (json!({"hooks": {"prestart": 1}}), "is not a list"),
        ] {
            assert!(check(&bad, guest.path()).unwrap_err().to_string().ends_with(why));
        }
    }
}
