//! After a restart: takes the recorded pods over, and clears what belongs to none.

use std::{
    fs,
    future::pending,
    io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use kuasar_common::constants::pod_files;
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tracing::Instrument;

use super::{
    Environment, Exit, Phase, Pod, PodError, Pods, StepError, View, cgroup,
    folder::{self, aside},
    from_epoch_ns,
    host::HostServer,
    log,
    record::{PodRecord, RecordError},
    stop::end_lost,
};
use crate::{
    container::is_safe_id,
    crash,
    process::{POD_VARIABLE, Process, ProcessRecord},
    vmm::Vm,
};

/// A process that was killed has this long to be gone.
const GONE: Duration = Duration::from_secs(10);

/// VMs that are looked for at the same time.
const AT_ONCE: usize = 16;
/// A VM that takes longer is waited for beside the others, and keeps none of them.
const TURN: Duration = Duration::from_secs(2);
/// When to look again for a VM whose VMM lives and which could not be taken over.
const AGAIN: Duration = Duration::from_secs(5);

/// Work that is left to do for a pod when it is in the list.
enum Left {
    /// Its VM has to be found.
    Running(Arc<Pod>, PodRecord),
    /// Its relay has to be served.
    Ended(Arc<Pod>),
    /// It has to be removed.
    Interrupted(PodRecord),
    /// It was never recorded, and has to be removed.
    Nothing,
}

impl Pods {
    /// Takes over every pod that an earlier daemon left. All of them are in the list at once; what takes its
    /// time goes on beside, and is not waited for longer than [`Environment::recover_timeout`]. Returns how
    /// many there are; what goes wrong with one of them is logged and concerns no other.
    ///
    /// # Errors
    /// When the folder of the pods cannot be read at all.
    pub async fn recover(self: &Arc<Self>) -> io::Result<usize> {
        let mut set = JoinSet::new();
        let entries = match fs::read_dir(&self.environment().dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            entries => entries?,
        };
        let turns = Arc::new(Semaphore::new(AT_ONCE));
        for entry in entries {
            let path = match entry {
                Ok(entry) => entry.path(),
                Err(error) => {
                    tracing::error!(%error, "looking for the sandboxes of before");
                    continue;
                }
            };
            let Some(id) = path.file_name().and_then(|name| name.to_str()).map(str::to_owned) else {
                continue;
            };
            let span = tracing::info_span!("pod", id);
            let Some(left) = span.in_scope(|| self.take_in(&path, &id)) else { continue };
            let (pods, turns) = (self.clone(), turns.clone());
            let recovery = async move { pods.recover_one(&path, left, &turns).await };
            set.spawn(recovery.instrument(span));
        }
        let all = async { while set.join_next().await.is_some() {} };
        if timeout(self.environment().recover_timeout, all).await.is_err() {
            tracing::warn!(
                left = set.len(),
                "not every sandbox of before has answered yet; serving meanwhile"
            );
            set.detach_all();
        }
        Ok(self.len())
    }

    /// Reads what is recorded of a pod and puts it into the list; waits for nobody.
    fn take_in(&self, dir: &Path, id: &str) -> Option<Left> {
        if !folder::is_pods(dir) {
            // The daemon's own files, what is none of its business, and where one died between making a
            // folder and marking it.
            if is_safe_id(id) && dir.is_dir() && fs::remove_dir(dir).is_err() {
                tracing::warn!("nothing proves that this folder is a sandbox's; it is left alone");
            }
            return None;
        }
        let mut record = match PodRecord::read(dir) {
            Ok(record) => record,
            Err(RecordError::Missing) => {
                reserve_user(self.environment(), dir);
                return Some(Left::Nothing);
            }
            Err(error) => {
                reserve_user(self.environment(), dir);
                set_aside(dir, &error);
                return None;
            }
        };
        if record.is_of_another_boot() {
            tracing::info!("the host was restarted since; nothing of the sandbox runs");
            record.forget_processes();
        }
        at("recover: listed");
        if record.phase == Phase::Starting {
            // New pods come before its processes are gone.
            record.user.into_iter().for_each(|id| self.environment().ids.reserve(id));
            return Some(Left::Interrupted(record));
        }
        let pod = revive(self.environment(), id, &record);
        self.insert(pod.clone());
        match record.phase {
            Phase::Running => Some(Left::Running(pod, record)),
            Phase::Stopped => Some(Left::Ended(pod)),
            Phase::Created | Phase::Starting => None,
        }
    }

    async fn recover_one(&self, dir: &Path, left: Left, turns: &Semaphore) {
        let environment = self.environment();
        match left {
            Left::Nothing => {
                tracing::info!("removing what is left of a sandbox that was never recorded");
                clear(environment, dir).await;
            }
            // Its Start died with the daemon; containerd has given it up.
            Left::Interrupted(record) => {
                tracing::info!("removing a sandbox whose start was interrupted");
                end_recorded(environment, &record).await;
                // A process that was started and not recorded yet is known by its cgroup, or by its
                // arguments.
                cgroup::end_members(&record.cgroups);
                end_strays(environment, dir).await;
                at("recover: ended");
                // Before the folder, with which the record of them goes.
                match cgroup::remove(&record.cgroups).await {
                    Ok(()) => clear(environment, dir).await,
                    Err(error) => {
                        tracing::error!(%error, "removing the sandbox's cgroup; its folder is kept")
                    }
                }
            }
            Left::Ended(pod) => {
                serve_host(&pod).await;
                at("recover: host");
            }
            Left::Running(pod, record) => {
                serve_host(&pod).await;
                at("recover: host");
                let relay = pod.work.lock().await.relay.clone();
                let vm = pod.find_vm(&record, relay.as_deref(), turns).await;
                at("recover: found");
                pod.go_on(vm, relay, &record).await;
            }
        }
    }
}

impl Pod {
    /// Finds the VM of a pod that was running; `None` when it has ended, or its relay has. While its VMM
    /// lives it is not given up, however long that takes to answer: it stays ready, as it was, and can be
    /// stopped.
    async fn find_vm(
        &self,
        record: &PodRecord,
        relay: Option<&Process>,
        turns: &Semaphore,
    ) -> Option<Arc<dyn Vm>> {
        let vm = record.vm.clone()?;
        let vmm =
            Process::adopt(vm.vmm).inspect_err(|error| tracing::error!(%error, "finding the VMM")).ok()??;
        let asked = SystemTime::now();
        let finding = async {
            loop {
                match self.environment.hypervisor.adopt(vm.clone()).await {
                    Ok(found) => return found,
                    Err(error) => tracing::error!(%error, "taking the VM over; trying again in {AGAIN:?}"),
                }
                sleep(AGAIN).await;
            }
        };
        let ended = async {
            tokio::select! {
                _ = vmm.wait() => {}
                () = async {
                    match relay {
                        Some(relay) => drop(relay.wait().await),
                        None => pending().await,
                    }
                } => {}
            }
        };
        let mut found = pin!(async {
            tokio::select! {
                biased;
                () = ended => None,
                found = finding => found,
            }
        });
        let in_turn = async {
            let _turn = turns.acquire().await;
            timeout(TURN, &mut found).await
        };
        if let Ok(found) = in_turn.await {
            return found;
        }
        self.unheard(asked, "its VMM has not answered yet since the daemon was restarted".to_owned());
        let found = found.await;
        self.heard();
        found
    }

    /// Goes on with a pod that was running: watches it, or clears up after it.
    async fn go_on(
        self: &Arc<Self>,
        vm: Option<Arc<dyn Vm>>,
        relay: Option<Arc<Process>>,
        record: &PodRecord,
    ) {
        if let Some(vm) = &vm {
            self.disks.lock().await.set_vm(vm.clone());
        }
        let mut work = self.work.lock().await;
        if self.view().phase != Phase::Running {
            // Stopped meanwhile, and with it what was recorded.
            return;
        }
        match (vm, relay) {
            (Some(vm), Some(relay)) => {
                work.lost = None;
                work.vm = Some(vm.clone());
                tracing::info!(pid = vm.pid(), "the sandbox goes on");
                self.watch(vm, relay, None);
            }
            (vm, relay) => {
                let vmm_lives = vm.is_some() || record.vm.as_ref().is_some_and(|vm| lives(vm.vmm));
                let whose = if vmm_lives { "relay" } else { "VM" };
                let log = log::tails(self.dir(), &["vmm.log", "console.log", "relay.log"]);
                let why = if record.is_of_another_boot() {
                    "with the host, which was restarted"
                } else {
                    "while no daemon watched"
                };
                let reason = format!("its {whose} ended {why}{log}");
                tracing::warn!(reason, relay_lives = relay.is_some(), "the sandbox has ended");
                self.blame(&*reason);
                // Known before it is cleared up: containerd is not to wait for that, nor to take it for a
                // mere stop.
                self.set_ended(Exit { code: 255, at: SystemTime::now(), reason: Some(reason) });
                // A guest without a relay still has file systems to sync; of a VM that ended, processes may
                // be left.
                work.guest_up = vm.is_some();
                if vm.is_some() {
                    work.lost = None;
                }
                work.vm = vm;
                drop(work);
                let stopping = self.clone();
                self.beside(async move {
                    if let Err(error) = stopping.stop().await {
                        tracing::error!(%error, "clearing up after a sandbox that ended");
                    }
                });
            }
        }
    }
}

/// For tests, which end the daemon here: recovery is as far as this.
fn at(name: &'static str) {
    if let Err(error) = crash::step(name) {
        tracing::error!(%error, name, "recovering");
    }
}

/// The pod of a record, without its processes.
fn revive(environment: &Environment, id: &str, record: &PodRecord) -> Arc<Pod> {
    let view = View {
        phase: record.phase,
        pid: record.vm.as_ref().map_or(0, |vm| vm.vmm.pid),
        created: from_epoch_ns(record.created_ns),
        exit: record.exit.as_ref().map(|exit| Exit {
            code: exit.code,
            at: from_epoch_ns(exit.at_ns),
            reason: exit.reason.clone(),
        }),
    };
    let pod = Pod::new(environment, id, record.spec.clone(), view);
    if let Ok(mut work) = pod.work.try_lock() {
        work.network.clone_from(&record.network);
        work.cgroups.clone_from(&record.cgroups);
        work.size = record.size;
        // Until it is found.
        work.lost.clone_from(&record.vm);
        work.relay = record.relay.and_then(adopt_relay);
        work.user = record.user.map(|id| environment.ids.keep(id));
    }
    pod
}

fn lives(process: ProcessRecord) -> bool {
    Process::adopt(process).is_ok_and(|process| process.is_some())
}

fn adopt_relay(relay: ProcessRecord) -> Option<Arc<Process>> {
    let relay = Process::adopt(relay).inspect_err(|error| tracing::error!(%error, "taking the relay over"));
    relay.ok().flatten().map(Arc::new)
}

async fn serve_host(pod: &Arc<Pod>) {
    match HostServer::start(pod).await {
        Ok(host) => pod.work.lock().await.host = Some(host),
        Err(error) => tracing::error!(%error, "serving the relay: no new containers in this sandbox"),
    }
}

/// A record that is torn or of another make says nothing about whether its VM lives, so nothing is ended or
/// deleted until containerd asks for it.
fn set_aside(dir: &Path, error: &RecordError) {
    let moved = fs::rename(dir.join(pod_files::RECORD), aside(dir));
    tracing::error!(%error, ?moved, folder = %dir.display(), "the sandbox is left alone until containerd removes it");
}

/// Keeps the user id of a pod whose record cannot be read from being given to another one: it is in what can
/// be read of the record, or else its folder has something of it.
fn reserve_user(environment: &Environment, dir: &Path) {
    let text = fs::read(dir.join(pod_files::RECORD)).or_else(|_| fs::read(aside(dir))).unwrap_or_default();
    let record: Option<serde_json::Value> = serde_json::from_slice(&text).ok();
    let recorded = record.as_ref().and_then(|record| record.pointer("/user")?.as_u64());
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let owners = entries.filter_map(|entry| entry.metadata().ok()).map(|there| there.gid());
    let ids = owners.chain(recorded.and_then(|id| u32::try_from(id).ok()));
    ids.filter(|id| *id != 0).for_each(|id| environment.ids.reserve(id));
}

impl Pods {
    /// Pods whose records cannot be read, by id and containerd's namespace. Not those whose record does not
    /// even tell the latter: nobody can say then whether containerd knows them.
    pub(super) fn unreadable(&self) -> Vec<(String, String)> {
        let folders = fs::read_dir(&self.environment().dir).into_iter().flatten().flatten();
        let of = |folder: fs::DirEntry| {
            let id = folder.file_name().into_string().ok()?;
            if self.get(&id).is_ok() {
                return None;
            }
            let record: serde_json::Value =
                serde_json::from_slice(&fs::read(aside(&folder.path())).ok()?).ok()?;
            Some((id, record.pointer("/spec/namespace")?.as_str()?.to_owned()))
        };
        folders.filter_map(of).collect()
    }

    /// Ends and removes a pod whose record cannot be read: what names its folder, and what is in a cgroup of
    /// its name. (What it has in a network namespace goes with that, which is containerd's.) No other one is
    /// touched.
    pub(super) async fn remove_unreadable(&self, id: &str) -> Result<(), PodError> {
        let (environment, dir) = (self.environment(), self.environment().dir.join(id));
        if !folder::is_pods(&dir) || !aside(&dir).exists() {
            return Ok(());
        }
        tracing::warn!("removing a sandbox whose record cannot be read");
        end_strays(environment, &dir).await;
        let failed = |doing| move |source| PodError::End { doing, source };
        let (root, name) = (environment.cgroup_root.clone(), id.to_owned());
        let found = tokio::task::spawn_blocking(move || cgroup::find(&root, &name)).await;
        let found = found.map_err(|error| StepError::Internal(error.to_string()));
        let cgroups = found.map_err(failed("finding the sandbox's cgroup"))?;
        cgroup::end_members(&cgroups);
        let removed = cgroup::remove(&cgroups).await.map_err(StepError::Cgroup);
        removed.map_err(failed("removing the sandbox's cgroup"))?;
        let folder = dir.clone();
        let removed =
            timeout(environment.mount_timeout, tokio::task::spawn_blocking(move || folder::remove(&folder)));
        let removed = match removed.await {
            Ok(Ok(removed)) => removed,
            Ok(Err(error)) => Err(StepError::Internal(error.to_string())),
            Err(_) => Err(StepError::Internal(format!("an unmount below {} hangs", dir.display()))),
        };
        removed.map_err(failed("removing the sandbox's folder"))
    }
}

async fn end_recorded(environment: &Environment, record: &PodRecord) {
    if let Some(vm) = record.vm.clone() {
        match environment.hypervisor.adopt(vm.clone()).await {
            Ok(Some(vm)) => {
                if let Err(error) = vm.stop(true, GONE).await {
                    tracing::error!(%error, "ending the VM");
                }
            }
            Ok(None) => {}
            Err(error) => tracing::error!(%error, "ending the VM"),
        }
        if let Err(error) = end_lost(&vm).await {
            tracing::error!(%error, "ending the VM's processes");
        }
    }
    if let Some(relay) = record.relay
        && let Ok(Some(relay)) = Process::adopt(relay)
        && let Err(error) = relay.end(Duration::ZERO).await
    {
        tracing::error!(%error, "ending the relay");
    }
    if let Some(network) = &record.network
        && let Err(error) = crate::network::remove(network).await
    {
        tracing::warn!(%error, "giving the network back");
    }
}

/// Ends what runs for a folder and removes it, unless somebody has put a record aside there to look at.
async fn clear(environment: &Environment, dir: &Path) {
    if aside(dir).exists() {
        return;
    }
    end_strays(environment, dir).await;
    let folder = dir.to_owned();
    let removed = tokio::task::spawn_blocking(move || folder::remove(&folder)).await;
    match removed {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%error, "removing the sandbox's folder"),
        Err(error) => tracing::error!(%error, "removing the sandbox's folder"),
    }
}

/// Kills processes of ours that were started for this folder: those whose program we start and whose
/// environment or arguments name it.
async fn end_strays(environment: &Environment, dir: &Path) {
    let sizes = &environment.sizes;
    let programs = [&sizes.path, &sizes.virtiofsd.path, &sizes.vsock_device.path, &environment.relay];
    let programs = programs.map(Clone::clone);
    for pid in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = pid.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // Held before it is looked at, so that the signal goes to what was looked at.
        let Ok(process) = Process::open(pid) else { continue };
        let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        if is_for(&command, &environment, dir, &programs) {
            tracing::info!(pid, "ending a process of a sandbox that is no more");
            if let Err(error) = process.end(Duration::ZERO).await {
                tracing::error!(%error, "ending a process of a sandbox that is no more");
            }
        }
    }
}

fn is_for(command: &[u8], environment: &[u8], dir: &Path, programs: &[PathBuf]) -> bool {
    let variable = [POD_VARIABLE.as_bytes(), b"=", dir.as_os_str().as_bytes()].concat();
    let started_for_it = environment.split(|byte| *byte == 0).any(|entry| entry == variable);
    let mut prefix = dir.as_os_str().as_bytes().to_vec();
    let named = |argument: &[u8], text: &[u8]| argument.windows(text.len()).any(|part| part == text);
    let mut arguments = command.split(|byte| *byte == 0);
    let program = arguments.next().unwrap_or_default();
    let base = program.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let ours = programs.iter().filter_map(|path| path.file_name()).any(|name| name.as_bytes() == base);
    prefix.push(b'/');
    let mut names_it =
        arguments.map(|argument| argument == dir.as_os_str().as_bytes() || named(argument, &prefix));
    ours && (started_for_it || names_it.any(|names| names))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_programs_for_this_folder_are_strays() {
        let dir = Path::new("/run/kuasar/qemu/p1");
        let programs = [PathBuf::from("/opt/qemu-system-x86_64"), PathBuf::from("virtiofsd")];
        let with = |command: &str, environment: &str| {
            let words = |text: &str| text.replace(' ', "\0").into_bytes();
            is_for(&words(command), &words(environment), dir, &programs)
        };
        let is = |command: &str| with(command, "PATH=/bin");
        assert!(is("/usr/bin/qemu-system-x86_64 -qmp unix:/run/kuasar/qemu/p1/qmp.sock,server=on"));
        assert!(is("virtiofsd --shared-dir /run/kuasar/qemu/p1/shared"));
        assert!(is("virtiofsd /run/kuasar/qemu/p1"));
        assert!(!is("virtiofsd --shared-dir /run/kuasar/qemu/p10/shared"));
        assert!(!is("tail -f /run/kuasar/qemu/p1/log/vmm.log"));
        assert!(!is(""));
        // It opens nothing by path, and so names no folder.
        let qemu = "qemu-system-x86_64 -name guest=sandbox-p1";
        assert!(with(qemu, "PATH=/bin KUASAR_POD_FOLDER=/run/kuasar/qemu/p1 A=b"));
        assert!(!with(qemu, "KUASAR_POD_FOLDER=/run/kuasar/qemu/p10"));
        assert!(!with("sleep 5", "KUASAR_POD_FOLDER=/run/kuasar/qemu/p1"));
    }
}
