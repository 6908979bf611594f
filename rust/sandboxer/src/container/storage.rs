//! The part of a pod's shared folder that belongs to each container.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use kuasar_common::{
    constants::{GUEST_STATE_DIR, pod_files},
    storage as guest,
};

use super::{
    exports::{Exports, Shown},
    mount::{self, MountError},
    plan::Plan,
    remove,
    spec::{Bind, SpecError},
    tree::Dir,
    volumes,
};
use crate::vmm::VmError;

/// Folder in which file systems are mounted before they go where they belong.
const STAGE: &str = "stage";
/// Folder in which the images are mounted that root file systems are made of.
const LAYERS: &str = "layers";
/// A container's root file system, in its folder.
pub(super) const ROOTFS: &str = "rootfs";

/// Makes and removes what containers have in the pod's folder. One at a time per pod: the caller holds the
/// pod's lock.
#[derive(Clone, Debug)]
pub struct Storage {
    dir: PathBuf,
}

/// Why a container's files could not be made ready.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The id cannot be a folder's name.
    #[error("the container id {0:?} is not 1 to 128 letters, digits, '-', '_' and '.'")]
    Id(String),
    /// Reading or writing a file.
    #[error("{doing} {}: {source}", path.display())]
    File {
        /// The operation that failed.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Mounting or unmounting.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The spec cannot be run in a VM.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Understood, and not possible.
    #[error("{0}")]
    Refused(String),
    /// Setting which of the host's CPUs the guest's may use.
    #[error("setting the CPUs and memory nodes that the container asks for: {0}")]
    CpuSet(io::Error),
    /// Plugging a disk in or taking it away.
    #[error(transparent)]
    Vm(VmError),
    /// Another request of the pod is not done.
    #[error(
        "the sandbox's mounts are in use: waited {} s for {doing} in vain; see whether the servers of its volumes answer, and \
         repeat the request", deadline.as_secs()
    )]
    Busy {
        /// Time that the request waited.
        deadline: Duration,
        /// The work that is not done.
        doing: String,
    },
    /// The daemon itself failed.
    #[error("making a container's files ready: {0}")]
    Broken(String),
}

impl StorageError {
    pub(super) fn file(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { doing, path, source }
    }

    /// Returns true if the request itself is at fault, not the host.
    #[must_use]
    pub const fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Id(_)
                | Self::Spec(_)
                | Self::Refused(_)
                | Self::Mount(MountError::Refused(_))
                | Self::Vm(VmError::Unsupported(_))
        )
    }
}

/// Replaces a file as a whole: a crash at any instruction leaves the old one or the new one.
pub(crate) fn write_new(path: &Path, text: &[u8]) -> io::Result<()> {
    crate::replace::replace(path, text)
}

/// Returns true if an id from outside can be used as the name of a folder.
#[must_use]
pub fn is_safe_id(id: &str) -> bool {
    (1..=128).contains(&id.len())
        && !id.starts_with('.')
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
        && !matches!(id, "hosts" | "hostname" | "resolv.conf" | pod_files::FILES | pod_files::VOLUMES)
}

impl Storage {
    /// The storage of the pod with this folder.
    #[must_use]
    pub fn new(pod_dir: &Path) -> Self {
        Self { dir: pod_dir.to_owned() }
    }

    /// Makes the folder to work in and what the guest sees of it, also by processes in other mount
    /// namespaces.
    ///
    /// # Errors
    /// When it cannot be created or mounted.
    pub fn create(&self) -> Result<(), StorageError> {
        let pod = Dir::open(&self.dir)?;
        let work = mount::share(&pod)?;
        Ok(mount::common_files(&work, &pod.make(STAGE)?)?)
    }

    /// Writes a file that all containers of the pod see.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_pod_file(&self, name: &str, text: &str) -> Result<(), StorageError> {
        let files = Dir::open(&self.dir)?.at(pod_files::WORK)?.at(pod_files::FILES)?;
        Ok(files.write(name, text.as_bytes(), 0o644)?)
    }

    /// Makes what a container needs on the host, writes its spec, and returns the bundle's path in the guest.
    /// A container that was prepared before is made anew. Nothing stays on error. What is plugged in has its
    /// address by now. `servers`: processes that serve the shared folder.
    ///
    /// # Errors
    /// When the host cannot provide something.
    #[tracing::instrument(name = "mount and write spec", level = "trace", skip_all)]
    pub fn prepare(&self, container: &str, plan: &Plan, servers: &[u32]) -> Result<String, StorageError> {
        self.release(container, servers)?;
        self.make(container, plan, servers).inspect_err(|_| {
            if let Err(error) = self.release(container, servers) {
                tracing::warn!(container, %error, "undoing a failed preparation");
            }
        })?;
        Ok(format!("{GUEST_STATE_DIR}/{container}"))
    }

    fn make(&self, container: &str, plan: &Plan, servers: &[u32]) -> Result<(), StorageError> {
        let pod = Dir::open(&self.dir)?;
        let (work, stage) = (pod.at(pod_files::WORK)?, pod.make(STAGE)?);
        let folder = work.make(container)?;
        match &plan.layers {
            Some(layers) => layers.on_host(&folder, &stage, &pod.make(LAYERS)?.make(container)?)?,
            None if plan.rootfs.is_empty() => {}
            None => mount::rootfs(&plan.rootfs, &folder, ROOTFS, &stage)?,
        }
        let (mut spec, mut storages) = (plan.spec.clone(), plan.storages.clone());
        let mut exports = Exports::of(&self.dir, &work)?;
        for bind in &plan.binds {
            let wish = volumes::wish(&mut spec, container, bind);
            let shown = exports.attach(container, bind, wish, servers)?;
            let source = match shown.whole() {
                Some(path) => path,
                None => show_part(container, bind, &shown, &mut storages)?,
            };
            volumes::set_source(&mut spec, container, &bind.name, &source);
        }
        if !storages.is_empty() {
            let text = serde_json::to_vec(&storages).map_err(|e| StorageError::Broken(e.to_string()))?;
            folder.write(guest::FILE, &text, 0o600)?;
        }
        Ok(folder.write("config.json", spec.to_string().as_bytes(), 0o600)?)
    }

    /// Undoes [`Storage::prepare`]. An unknown container is no error.
    ///
    /// # Errors
    /// When something stays mounted; then nothing is deleted.
    pub fn release(&self, container: &str, servers: &[u32]) -> Result<(), StorageError> {
        if !is_safe_id(container) {
            return Err(StorageError::Id(container.to_owned()));
        }
        remove::remove(&self.dir.join(pod_files::WORK).join(container))?;
        remove::remove(&self.dir.join(LAYERS).join(container))?;
        // A pod that has not begun, or has ended, has none.
        match Dir::open(&self.dir)?.find(pod_files::WORK)? {
            Some(_) => {
                let work = Dir::open(&self.dir)?.at(pod_files::WORK)?;
                Exports::of(&self.dir, &work)?.release(container, servers)
            }
            None => Ok(()),
        }
    }

    /// Unmounts everything of all containers, and the shared folder itself.
    ///
    /// # Errors
    /// When something stays mounted.
    #[tracing::instrument(name = "unmount", level = "trace", skip_all)]
    pub fn unmount(&self) -> Result<(), StorageError> {
        // What is shared is a view of the first, and what is mounted there goes from both.
        for folder in [pod_files::WORK, pod_files::SHARED, LAYERS, STAGE] {
            mount::unmount_below(&self.dir.join(folder))?;
        }
        Ok(())
    }
}

/// A part of a volume is bound by the agent first: a path that other containers may change is looked up by it
/// without links.
fn show_part(
    container: &str,
    bind: &Bind,
    shown: &Shown,
    storages: &mut Vec<guest::Storage>,
) -> Result<String, StorageError> {
    let source = shown.in_share().ok_or_else(|| {
        StorageError::Refused(format!(
            "the path of {} has bytes that are no UTF-8; rename it",
            bind.source.display()
        ))
    })?;
    let mount_point = format!("{}/{container}/mounts/{}", guest::MOUNT_POINTS, bind.name);
    let options = if bind.recursive { vec!["rbind".to_owned()] } else { Vec::new() };
    let driver = guest::driver::SHARE.into();
    let part =
        guest::Storage { driver, source, options, mount_point: mount_point.clone(), ..Default::default() };
    storages.push(part);
    Ok(mount_point)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::container::{Room, mount::RootfsMount, spec::Target};

    #[test]
    fn ids_that_would_leave_the_folder_are_refused() {
        for bad in
            ["", "..", ".hidden", "a/b", "a b", "hosts", "resolv.conf", "files", "volumes", &"x".repeat(129)]
        {
            assert!(!is_safe_id(bad), "{bad}");
        }
        assert!(is_safe_id("6f0c2d_A.b-1"));
    }

    #[test]
    fn a_container_is_prepared_and_released_and_two_do_not_share_a_root() {
        let dir = tempfile::tempdir().unwrap();
        let (bundle, pod) = (dir.path().join("bundle"), dir.path().join("pod"));
        for name in ["bundle", "pod", "image1", "image2", "data"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("image1/one"), "").unwrap();
        fs::write(dir.path().join("data/f"), "precious").unwrap();
        let spec = json!({"mounts": [{"destination": "/data", "type": "bind", "source": dir.path().join("data"), "options": ["rbind", "rw"]}]});
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let storage = Storage::new(&pod);
        storage.create().unwrap();
        let image = |name: &str| RootfsMount {
            kind: "bind".into(),
            source: dir.path().join(name).to_str().unwrap().into(),
            target: String::new(),
            options: vec!["rbind".into(), "rw".into()],
        };
        for (container, name) in [("c1", "image1"), ("c2", "image2")] {
            let target = Target { container, pod_pid: 1, shared_pids: false };
            let plan = Plan::new(&target, &bundle, vec![image(name)], &Room::default()).unwrap();
            let path = storage.prepare(container, &plan, &[]).unwrap();
            assert_eq!(path, format!("/run/kuasar/state/{container}"));
        }
        assert!(pod.join("shared/c1/rootfs/one").exists() && !pod.join("shared/c2/rootfs/one").exists());
        assert!(pod.join("shared/volumes/1/f").exists());
        assert!(pod.join("shared/c1/config.json").exists());
        storage.release("c1", &[]).unwrap();
        storage.release("c1", &[]).unwrap();
        assert!(!pod.join("shared/c1").exists() && pod.join("shared/c2/config.json").exists());
        // What fails leaves nothing behind.
        let target = Target { container: "c3", pod_pid: 1, shared_pids: false };
        let plan = Plan::new(&target, &bundle, vec![image("nowhere")], &Room::default()).unwrap();
        storage.prepare("c3", &plan, &[]).unwrap_err();
        assert!(!pod.join("shared/c3").exists());
        fs::write(bundle.join("config.json"), r#"{"linux": {"namespaces": [{"type": "user"}]}}"#).unwrap();
        let error = Plan::new(&target, &bundle, vec![image("image1")], &Room::default()).unwrap_err();
        assert!(error.is_refusal(), "{error}");
        storage.unmount().unwrap();
        remove::remove(&pod).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("data/f")).unwrap(), "precious");
    }
}
