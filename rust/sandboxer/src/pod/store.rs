//! All pods of the daemon.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use tokio::sync::Notify;

use super::{Annotation, Environment, Phase, Pod, PodError, PodSpec, StepError, View, VmSize, Work, folder};
use crate::{container::is_safe_id, crash};

/// Longest path of a unix socket that the kernel takes, less the end that marks it.
const MAX_SOCKET_PATH: usize = 107;
/// The longest name of a socket in a pod's folder.
const LONGEST_SOCKET: &str = "vs/s_4294967295";

/// All pods of the daemon.
#[derive(Debug)]
pub struct Pods {
    environment: Environment,
    /// Never held while anything is awaited.
    pods: Mutex<BTreeMap<String, Arc<Pod>>>,
    /// Something happened after which containerd may not know a pod any more.
    suspicion: Notify,
    creation: Notify,
}

impl Pods {
    /// None yet.
    #[must_use]
    pub fn new(environment: Environment) -> Self {
        Self { environment, pods: Mutex::default(), suspicion: Notify::new(), creation: Notify::new() }
    }

    /// Has containerd's list looked at soon.
    pub fn suspect(&self) {
        self.suspicion.notify_one();
    }

    pub(super) async fn suspected(&self) {
        self.suspicion.notified().await;
    }

    pub(super) async fn created(&self) {
        self.creation.notified().await;
    }

    pub(super) fn all(&self) -> Vec<Arc<Pod>> {
        self.lock().values().cloned().collect()
    }

    /// Annotations with which a pod may ask for another VM.
    #[must_use]
    pub fn allowed_annotations(&self) -> &[Annotation] {
        &self.environment.sizes.allowed_annotations
    }

    pub(super) const fn environment(&self) -> &Environment {
        &self.environment
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Pod>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds a pod.
    ///
    /// # Errors
    /// When there is none with this id.
    pub fn get(&self, id: &str) -> Result<Arc<Pod>, PodError> {
        self.lock().get(id).cloned().ok_or_else(|| PodError::NotFound(id.to_owned()))
    }

    pub(super) fn insert(&self, pod: Arc<Pod>) {
        self.lock().insert(pod.id().to_owned(), pod);
    }

    /// Leaves all pods, which go on, to the next daemon.
    pub fn leave(&self) {
        for pod in self.lock().values() {
            pod.leave();
        }
    }

    /// Number of pods.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Returns true if there is no pod.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Creates a pod: its folder and its record. The same request again, before Start, is no error.
    ///
    /// # Errors
    /// When the id or the paths made from it cannot be used, the pod exists and is further, or its folder
    /// cannot be made.
    pub async fn create(&self, id: &str, mut spec: PodSpec) -> Result<(), PodError> {
        if !is_safe_id(id) {
            return Err(PodError::Invalid(format!(
                "the sandbox id {id:?} is not 1 to 128 letters, digits, '-', '_' and '.'"
            )));
        }
        spec.look_at_cgroup(&self.environment.cgroup_root);
        VmSize::of(&spec, &self.environment.sizes)?;
        let dir = self.environment.dir.join(id);
        let longest = dir.join(LONGEST_SOCKET);
        if longest.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(PodError::Refused(format!(
                "{} is longer than the {MAX_SOCKET_PATH} bytes of a socket's path; start the daemon with a shorter --dir",
                longest.display()
            )));
        }
        loop {
            let view = View { phase: Phase::Created, pid: 0, created: SystemTime::now(), exit: None };
            let pod = match self.lock().entry(id.to_owned()) {
                Entry::Occupied(there) => there.get().clone(),
                Entry::Vacant(free) => {
                    free.insert(Pod::new(&self.environment, id, spec.clone(), view)).clone()
                }
            };
            let exists = || PodError::Exists(id.to_owned());
            // Checked before waiting as well: a pod that is starting holds its lock for long.
            if pod.view().phase != Phase::Created {
                return Err(exists());
            }
            let work = pod.work.lock().await;
            if !self.has(&pod) {
                // Another request has made it in vain meanwhile, and it is in no list any more.
                continue;
            }
            if pod.view().phase != Phase::Created || work.spec != spec {
                return Err(exists());
            }
            self.creation.notify_one();
            return self.make(&pod, &work).map_err(|source| PodError::Start {
                step: "creating the sandbox's folder",
                source,
                log: String::new(),
            });
        }
    }

    /// Makes the folder and the record of a pod, or nothing.
    fn make(&self, pod: &Arc<Pod>, work: &Work) -> Result<(), StepError> {
        let at = |name| crash::step(name).map_err(StepError::file(pod.dir()));
        let made = folder::make(pod.dir())
            .and_then(|()| at("create: folder"))
            .and_then(|()| pod.persist(work))
            .and_then(|()| at("create: recorded"));
        if let Err(error) = &made {
            self.forget(pod);
            let foreign = matches!(error, StepError::Foreign(_));
            if !foreign && let Err(error) = folder::undo(pod.dir()) {
                tracing::warn!(%error, "removing the folder of a sandbox that could not be created");
            }
        }
        made
    }

    fn has(&self, pod: &Arc<Pod>) -> bool {
        self.lock().get(pod.id()).is_some_and(|known| Arc::ptr_eq(known, pod))
    }

    /// Ends and removes a pod. One that is not there is no error.
    ///
    /// # Errors
    /// When something of it cannot be ended or removed; it is kept then.
    pub async fn remove(&self, id: &str) -> Result<(), PodError> {
        let Ok(pod) = self.get(id) else { return self.remove_unreadable(id).await };
        pod.remove().await?;
        self.forget(&pod);
        Ok(())
    }

    /// Drops a pod of which nothing is left, unless its id was given to another one since.
    pub fn forget(&self, pod: &Arc<Pod>) {
        let mut pods = self.lock();
        if pods.get(pod.id()).is_some_and(|known| Arc::ptr_eq(known, pod)) {
            pods.remove(pod.id());
        }
    }
}
