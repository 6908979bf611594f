//! Pods: one VM, its network, its share of the host's file system, its relay.
//!
//! A pod publishes its look from outside ([`View`]) in a `watch` channel, so that Status and Wait never wait
//! for anybody. A call that changes the pod holds the pod's own lock, which nobody else needs.

mod annotations;
mod caller;
mod cgroup;
mod clock;
mod collect;
mod cpusets;
mod error;
pub(crate) mod folder;
mod host;
mod log;
mod record;
mod recover;
mod relay;
mod scores;
mod setup;
mod silence;
mod size;
mod spec;
mod start;
mod stop;
mod store;
mod update;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex as SyncMutex, PoisonError, atomic::AtomicBool},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use kuasar_common::constants::pod_files;
use tokio::{
    sync::{Mutex, OwnedMutexGuard, watch},
    task::AbortHandle,
    time::timeout,
};
use tracing::{Instrument, Span};

pub use self::cgroup::ROOT as CGROUP_ROOT;
pub(crate) use self::record::parse_record;
pub use self::{
    annotations::{Annotation, Wishes},
    caller::{Caller, CallerGuard},
    collect::{Collector, Known},
    error::{PodError, StepError},
    record::Phase,
    silence::Silence,
    spec::{PodResources, PodSpec, namespace_of_cri},
    store::Pods,
};
use self::{
    cgroup::{Cgroups, Given},
    cpusets::CpuSets,
    host::HostServer,
    record::{ExitRecord, PodRecord, VERSION, boot_id},
    scores::OomScores,
    size::VmSize,
};
use crate::{
    clock::epoch_ns,
    config::HypervisorConfig,
    container::{Disks, HostSocket, Plan, Storage, StorageError, mount::RootfsMount, spec::Target},
    crash,
    network::NetworkRecord,
    process::{IdLease, Ids, Process},
    protos::types::Metric,
    vmm::{Hypervisor, Vm, VmRecord},
};

/// Settings that all pods of a daemon share.
#[derive(Clone, Debug)]
pub struct Environment {
    /// Folder of the pods' folders.
    pub dir: PathBuf,
    /// Starts VMs.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Default sizes.
    pub sizes: HypervisorConfig,
    /// The relay's program.
    pub relay: PathBuf,
    /// containerd's gRPC socket.
    pub containerd: PathBuf,
    /// User ids for pods.
    pub ids: Ids,
    /// Folder in which cgroup hierarchies are mounted.
    pub cgroup_root: PathBuf,
    /// A pod has this long from Start to ready.
    pub start_timeout: Duration,
    /// Containers have this long to end when a pod is stopped.
    pub stop_timeout: Duration,
    /// A request waits this long for mounts and disks of its pod that another one works on.
    pub mount_timeout: Duration,
    /// The daemon's start waits this long for pods to be found again after a restart. One that takes longer
    /// stays as it was.
    pub recover_timeout: Duration,
}

/// A pod from outside.
#[derive(Clone, Debug)]
pub struct View {
    /// Its phase of life.
    pub phase: Phase,
    /// Process id of its VMM; stays after the VMM ended, 0 before it started.
    pub pid: u32,
    /// When it was created.
    pub created: SystemTime,
    /// Its end, once it has ended.
    pub exit: Option<Exit>,
}

/// A pod's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// As a shell shows it.
    pub code: u32,
    /// When it was noticed.
    pub at: SystemTime,
    /// Why, if nobody had asked for it and it is known.
    pub reason: Option<String>,
}

impl Exit {
    const fn new(code: u32, at: SystemTime) -> Self {
        Self { code, at, reason: None }
    }
}

/// A pod.
#[derive(Debug)]
pub struct Pod {
    id: String,
    dir: PathBuf,
    labels: BTreeMap<String, String>,
    shared_pids: bool,
    netns: PathBuf,
    namespace: String,
    cgroup_parent: String,
    /// See [`Pod::shortage`].
    shortage: Option<String>,
    environment: Environment,
    view: watch::Sender<View>,
    work: Mutex<Work>,
    /// Held by the thread that works on it, for as long as it does.
    storage: Arc<Mutex<Storage>>,
    /// The work that is done on the storage now, and the time since when.
    busy: SyncMutex<Option<(String, Instant)>>,
    /// Taken before `storage`, and never while `work` is waited for: ending a pod must not wait for its VM's
    /// bus.
    disks: Mutex<Disks>,
    cpusets: SyncMutex<CpuSets>,
    scores: SyncMutex<OomScores>,
    /// Why it was not given other resources when that was last asked for.
    refused: SyncMutex<Option<String>>,
    /// Why its VM ends, from the first watcher that knows; a stop that was asked for is no reason.
    blame: SyncMutex<Option<String>>,
    /// The guest did not answer when it was last asked.
    silence: SyncMutex<Option<Silence>>,
    watchers: SyncMutex<Vec<AbortHandle>>,
    /// Somebody asked for the VM's end.
    stopping: AtomicBool,
}

/// The host's resources that a pod holds; behind its lock.
#[derive(Debug, Default)]
struct Work {
    spec: PodSpec,
    network: Option<NetworkRecord>,
    vm: Option<Arc<dyn Vm>>,
    relay: Option<Arc<Process>>,
    host: Option<HostServer>,
    cgroups: Vec<PathBuf>,
    size: Option<VmSize>,
    /// The user of its processes.
    user: Option<IdLease>,
    /// A VM that could not be taken over, and whose processes have yet to be ended.
    lost: Option<VmRecord>,
    /// The guest of a pod that is not running any more has yet to be told to end.
    guest_up: bool,
}

impl Pod {
    fn new(environment: &Environment, id: &str, spec: PodSpec, view: View) -> Arc<Self> {
        let (dir, sizes) = (environment.dir.join(id), &environment.sizes);
        let size = VmSize::of(&spec, sizes).ok();
        let scores = OomScores::new(&dir, &spec.cgroup_parent, spec.oom_score_adj);
        Arc::new(Self {
            id: id.to_owned(),
            labels: spec.labels.clone(),
            shared_pids: spec.shared_pids,
            netns: spec.netns.clone(),
            namespace: spec.namespace.clone(),
            cgroup_parent: spec.cgroup_parent.clone(),
            shortage: size.and_then(|size| size.shortage(&spec, sizes)),
            environment: environment.clone(),
            view: watch::Sender::new(view),
            work: Mutex::new(Work { spec, ..Work::default() }),
            storage: Arc::new(Mutex::new(Storage::new(&dir))),
            busy: SyncMutex::default(),
            disks: Mutex::new(Disks::new(&dir)),
            cpusets: SyncMutex::new(CpuSets::new(&dir)),
            scores: SyncMutex::new(scores),
            refused: SyncMutex::default(),
            blame: SyncMutex::default(),
            silence: SyncMutex::default(),
            watchers: SyncMutex::default(),
            stopping: AtomicBool::new(false),
            dir,
        })
    }

    /// Runs something beside the pod until it ends or the pod is left to another daemon.
    fn beside(&self, task: impl Future<Output = ()> + Send + 'static) {
        let task = tokio::spawn(task.instrument(self.span())).abort_handle();
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner).push(task);
    }

    /// Span of the work that goes on for this pod beside the calls that began it. A call's own span would end
    /// with the last of that work, and be as long as the pod in the trace.
    pub(super) fn span(&self) -> Span {
        tracing::info_span!(parent: None, "pod", id = self.id)
    }

    /// From here on this daemon notices nothing of the pod's processes and writes nothing of them: the next
    /// one does.
    pub(super) fn leave(&self) {
        for watcher in self.watchers.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            watcher.abort();
        }
    }

    /// The pod's id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The pod's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Labels that containerd gave it.
    #[must_use]
    pub const fn labels(&self) -> &BTreeMap<String, String> {
        &self.labels
    }

    /// Its present look from outside; never waits.
    #[must_use]
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Resources that the pod uses on the host; never waits for anybody.
    #[must_use]
    pub fn metrics(&self) -> Metric {
        let cgroups = self.cgroups().ok();
        let counted = cgroups.and_then(|cgroups| cgroup::of_cgroups(&self.id, &cgroups));
        counted.unwrap_or_else(|| {
            let mut pids = vec![self.view().pid];
            if let Ok(work) = self.work.try_lock() {
                let companions = work.vm.iter().flat_map(|vm| vm.record().companions.into_values());
                pids.extend(companions.map(|process| process.pid));
                pids.extend(work.relay.iter().map(|relay| relay.pid()));
            }
            cgroup::of_processes(&self.id, &pids)
        })
    }

    fn cgroups(&self) -> std::io::Result<Cgroups> {
        Cgroups::plan(&self.environment.cgroup_root, &self.cgroup_parent, &self.id)
    }

    /// Why the host's kernel killed a process of the pod for want of memory, if it did.
    fn killed_for_memory(&self) -> Option<String> {
        let given = Given::of_pod(&self.environment.cgroup_root, &self.cgroup_parent);
        self.cgroups().ok()?.killed_for_memory(&given)
    }

    /// Why the guest has less memory than the pod's limits promise, if it has.
    #[must_use]
    pub fn shortage(&self) -> Option<&str> {
        self.shortage.as_deref()
    }

    /// Address at which containerd reaches the pod's containers. The scheme is the only one that containerd
    /// 2.1 can use for both Task calls and streams.
    #[must_use]
    pub fn address(&self) -> String {
        format!("ttrpc+unix://{}", self.dir.join(pod_files::TASK_SOCKET).display())
    }

    /// Waits until the VM is gone; at once when it is.
    pub async fn wait(&self) -> Exit {
        let mut view = self.view.subscribe();
        loop {
            if let Some(exit) = view.borrow_and_update().exit.clone() {
                return exit;
            }
            if view.changed().await.is_err() {
                // Cannot be: the sender lives in `self`.
                return Exit::new(255, SystemTime::now());
            }
        }
    }

    /// Makes what a container needs; returns its bundle's path in the guest, and the sockets whose
    /// connections are to be carried.
    #[tracing::instrument(name = "prepare container", level = "trace", skip_all)]
    async fn prepare(
        self: &Arc<Self>,
        container: String,
        bundle: PathBuf,
        rootfs: Vec<RootfsMount>,
    ) -> Result<(String, Vec<HostSocket>), StorageError> {
        let (pod_pid, shared_pids) = (self.view().pid, self.shared_pids);
        let mut disks = self.free(self.disks.lock()).await?;
        let (id, room, servers) = (container.clone(), disks.room()?, disks.servers());
        let mut plan = blocking(move || {
            Plan::new(&Target { container: &id, pod_pid, shared_pids }, &bundle, rootfs, &room)
        })
        .await?;
        at("prepare: planned")?;
        // What an earlier attempt left.
        disks.release(&container).await?;
        let id = container.clone();
        let sockets = plan.sockets().to_vec();
        let made = async {
            self.pin(&container, Some(plan.cpuset().clone()))?;
            self.score(&container, plan.oom_score_adj());
            at("prepare: pinned")?;
            plan.plugged_in(disks.attach(&container, plan.disks()).await?);
            at("prepare: attached")?;
            let doing = format!("mounting for the container {id}");
            let storage = self.take_storage(doing).await?;
            // Looked at with the storage in hand: what is mounted from here on, the pod's end unmounts.
            if self.view().phase != Phase::Running {
                return Err(StorageError::Refused(format!(
                    "preparing the container {id}: its sandbox {} has ended; create it in a new one",
                    self.id
                )));
            }
            let bundle = storage.with(move |storage| storage.prepare(&id, &plan, &servers)).await?;
            at("prepare: mounted")?;
            Ok(bundle)
        };
        let made = made.await;
        if made.is_err() {
            self.score(&container, None);
            for undone in [disks.release(&container).await, self.pin(&container, None)] {
                if let Err(error) = undone {
                    tracing::warn!(container, %error, "undoing a failed preparation");
                }
            }
        }
        self.persist_if_free();
        Ok((made?, sockets))
    }

    /// Removes what a container needed.
    #[tracing::instrument(name = "release container", level = "trace", skip_all)]
    async fn release(self: &Arc<Self>, container: String) -> Result<(), StorageError> {
        let mut disks = self.free(self.disks.lock()).await?;
        let (gone, servers) = (disks.release(&container).await, disks.servers());
        let pinned = self.pin(&container, None);
        self.score(&container, None);
        at("release: detached")?;
        let storage = self.take_storage(format!("unmounting for the container {container}")).await?;
        storage.with(move |storage| storage.release(&container, &servers)).await?;
        at("release: unmounted")?;
        self.persist_if_free();
        // A pod that has ended has no CPUs to give back.
        gone.and(if self.view().phase == Phase::Running { pinned } else { Ok(()) })
    }

    /// Writes the buses down, unless the task that works on the pod does so anyway; a restarted daemon asks
    /// the VMM as well.
    fn persist_if_free(&self) {
        let Ok(work) = self.work.try_lock() else { return };
        if work.vm.is_some()
            && self.view().phase == Phase::Running
            && let Err(error) = self.persist(&work)
        {
            tracing::warn!(%error, "recording what is plugged into the VM");
        }
    }

    /// Waits for what another request of the pod works with, and not for ever: a mount may hang for as long
    /// as another machine's server is away.
    async fn free<T>(&self, work: impl Future<Output = T>) -> Result<T, StorageError> {
        let deadline = self.environment.mount_timeout;
        timeout(deadline, work).await.map_err(|_| {
            let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let doing = busy.map_or_else(
                || "another request".to_owned(),
                |(doing, since)| format!("{doing}, which has taken {} s so far,", since.elapsed().as_secs()),
            );
            StorageError::Busy { deadline, doing }
        })
    }

    /// The mounts of the pod's containers, to do something to them.
    async fn take_storage(self: &Arc<Self>, doing: impl Into<String>) -> Result<TakenStorage, StorageError> {
        let storage = self.free(self.storage.clone().lock_owned()).await?;
        *self.busy.lock().unwrap_or_else(PoisonError::into_inner) = Some((doing.into(), Instant::now()));
        Ok(TakenStorage { storage, pod: self.clone() })
    }

    fn record(&self, work: &Work) -> PodRecord {
        let view = self.view();
        PodRecord {
            version: VERSION,
            id: self.id.clone(),
            phase: view.phase,
            created_ns: epoch_ns(view.created),
            spec: work.spec.clone(),
            network: work.network.clone(),
            vm: work.vm.as_ref().map(|vm| vm.record()).or_else(|| work.lost.clone()),
            relay: work.relay.as_ref().map(|relay| relay.record()),
            cgroups: work.cgroups.clone(),
            size: work.size,
            user: work.user.as_ref().map(IdLease::id),
            exit: view.exit.map(|exit| ExitRecord {
                code: exit.code,
                at_ns: epoch_ns(exit.at),
                reason: exit.reason,
            }),
            boot: boot_id(),
        }
    }

    #[tracing::instrument(name = "record", level = "trace", skip_all)]
    fn persist(&self, work: &Work) -> Result<(), StepError> {
        self.record(work).write(&self.dir).map_err(StepError::file(self.dir.join(pod_files::RECORD)))
    }

    fn set_phase(&self, phase: Phase) {
        self.view.send_modify(|view| view.phase = phase);
    }

    /// Says why the VM is about to end; the first word holds.
    fn blame(&self, why: impl Into<String>) {
        self.blame.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why.into());
    }

    fn blamed(&self) -> Option<String> {
        self.blame.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets the pod's end. The first watcher that notices the end says how it was.
    fn set_ended(&self, exit: Exit) {
        self.view.send_modify(|view| {
            view.phase = Phase::Stopped;
            view.exit.get_or_insert(exit);
        });
    }
}

/// The storage of the pod's containers, in the hands of one task.
struct TakenStorage {
    storage: OwnedMutexGuard<Storage>,
    pod: Arc<Pod>,
}

impl TakenStorage {
    /// Mounting may block on another machine's server, so it happens on a thread that may block, and that
    /// gives the storage back: a caller that does not wait any more has not ended it.
    async fn with<T: Send + 'static>(
        self,
        work: impl FnOnce(&Storage) -> Result<T, StorageError> + Send + 'static,
    ) -> Result<T, StorageError> {
        blocking(move || work(&self.storage)).await
    }
}

impl Drop for TakenStorage {
    fn drop(&mut self) {
        *self.pod.busy.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// For tests: what is done for a container is as far as this.
fn at(name: &'static str) -> Result<(), StorageError> {
    crash::step(name).map_err(|error| StorageError::Broken(format!("{name}: {error}")))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
) -> Result<T, StorageError> {
    let span = Span::current();
    let done = tokio::task::spawn_blocking(move || span.in_scope(work)).await;
    done.unwrap_or_else(|error| Err(StorageError::Broken(error.to_string())))
}

fn from_epoch_ns(ns: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(u64::try_from(ns).unwrap_or(0))
}
