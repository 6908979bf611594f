//! Volumes of the pod's shared folder, each of them one file system for all containers that use it.
//!
//! A volume is a file system of its own in the shared folder, which the kernel mounts when a process goes
//! there, and in that process's mount namespace. A runtime that goes there for its container would have it
//! apart from all others: no socket, lock or watch of one container would be seen in another. So the agent
//! goes first, and the containers' namespaces are copies of its own. It is taken away with the last
//! container, or the file server would keep the host's mount for ever.

use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use kuasar_common::constants::{GUEST_STATE_DIR, pod_files};
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
    mount::{UnmountFlags, unmount},
};
use serde_json::Value;

/// Containers, and the volumes that each uses.
#[derive(Default)]
pub struct Shares {
    users: Mutex<HashMap<String, BTreeSet<PathBuf>>>,
}

impl Shares {
    /// Mounts the volumes that a container's spec binds.
    pub fn enter_bound(&self, container: &str, spec: &Value) {
        let mounts = spec.get("mounts").and_then(Value::as_array).into_iter().flatten();
        let sources = mounts.filter_map(|mount| mount.get("source").and_then(Value::as_str));
        self.enter(container, sources.filter_map(|source| volume_of(Path::new(source))));
    }

    /// Mounts the volume that has a path of the shared folder in it.
    pub(super) fn enter_one(&self, container: &str, path: &str) {
        self.enter(container, volume_of(&Path::new(GUEST_STATE_DIR).join(path)).into_iter());
    }

    fn enter(&self, container: &str, volumes: impl Iterator<Item = PathBuf>) {
        for volume in volumes {
            // Known before it is mounted: nobody takes it away any more.
            self.users().entry(container.to_owned()).or_default().insert(volume.clone());
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match openat(CWD, &volume, flags, Mode::empty()) {
                // A file is in the share's own file system.
                Ok(_) | Err(Errno::NOTDIR) => {}
                // The runtime says so, too, if it is needed.
                Err(error) => log::warn!("opening the volume {}: {error}", volume.display()),
            }
        }
    }

    /// Takes away what no other container uses.
    pub fn leave(&self, container: &str) {
        let mut users = self.users();
        let Some(volumes) = users.remove(container) else { return };
        for volume in volumes {
            if users.values().any(|others| others.contains(&volume)) {
                continue;
            }
            match unmount(&volume, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH) {
                // A file, a share without file systems in it, or one that went away with its folder.
                Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
                Err(error) => log::warn!("unmounting the volume {}: {error}", volume.display()),
            }
        }
    }

    fn users(&self) -> MutexGuard<'_, HashMap<String, BTreeSet<PathBuf>>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The file system of the shared folder that a path is in, if it is one that containers have in common.
fn volume_of(path: &Path) -> Option<PathBuf> {
    let shared = Path::new(GUEST_STATE_DIR);
    let mut names = path.strip_prefix(shared).ok()?.iter();
    let first = names.next()?.to_str()?;
    let number = |name: &&str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
    match first {
        pod_files::FILES => Some(shared.join(first)),
        pod_files::VOLUMES => {
            names.next()?.to_str().filter(number).map(|number| shared.join(first).join(number))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_volume_is_known_by_its_path() {
        for (path, volume) in [
            ("/run/kuasar/state/volumes/3", Some("/run/kuasar/state/volumes/3")),
            ("/run/kuasar/state/volumes/12/a/b", Some("/run/kuasar/state/volumes/12")),
            ("/run/kuasar/state/files/hosts", Some("/run/kuasar/state/files")),
            ("/run/kuasar/state/volumes", None),
            ("/run/kuasar/state/volumes/..", None),
            ("/run/kuasar/state/volumes/x", None),
            ("/run/kuasar/state/c1/rootfs", None),
            ("/run/kuasar/states/volumes/3", None),
            ("/dev/shm", None),
        ] {
            assert_eq!(volume_of(Path::new(path)).as_deref(), volume.map(Path::new), "{path}");
        }
    }

    #[test]
    fn a_volume_stays_until_its_last_user_leaves() {
        let shares = Shares::default();
        let spec = json!({"mounts": [
            {"destination": "/v", "source": "/run/kuasar/state/volumes/7"},
            {"destination": "/proc", "type": "proc"},
        ]});
        shares.enter_bound("a", &spec);
        shares.enter_one("b", "volumes/7/sub");
        let used = |shares: &Shares| shares.users().values().flatten().count();
        assert_eq!(used(&shares), 2);
        shares.leave("a");
        shares.leave("a");
        assert_eq!(used(&shares), 1);
        shares.leave("b");
        assert_eq!(used(&shares), 0);
    }
}
