//! After a restart: takes the recorded pods over, and clears what belongs to none.

use std::{
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use kuasar_common::constants::pod_files;
use tokio::{task::JoinSet, time::timeout};
use tracing::Instrument;

use super::{
    Environment, Exit, Phase, Pod, PodError, Pods, StepError, View, cgroup, from_epoch_ns,
    host::HostServer,
    log,
    record::{PodRecord, RecordError},
    stop::end_lost,
};
use crate::{
    container::{is_safe_id, remove},
    process::Process,
};

/// A process that was killed has this long to be gone.
const GONE: Duration = Duration::from_secs(10);

impl Pods {
    /// Takes over every pod that an earlier daemon left. Returns how many there are; what goes wrong with one of them is
    /// logged and concerns no other.
    ///
    /// # Errors
    /// When the folder of the pods cannot be read at all.
    pub async fn recover(self: &Arc<Self>) -> io::Result<usize> {
        let mut set = JoinSet::new();
        let entries = match fs::read_dir(&self.environment().dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let Some(id) = entry.file_name().to_str().map(str::to_owned) else { continue };
            if !entry.file_type()?.is_dir() || !is_safe_id(&id) {
                continue;
            }
            let span = tracing::info_span!("pod", id);
            let pods = self.clone();
            let recovery = async move {
                let deadline = pods.environment().recover_timeout;
                if timeout(deadline, pods.recover_one(&entry.path(), &id)).await.is_err() {
                    pods.give_up(&entry.path(), &id, deadline);
                }
            };
            set.spawn(recovery.instrument(span));
        }
        while set.join_next().await.is_some() {}
        Ok(self.len())
    }

    async fn recover_one(&self, dir: &Path, id: &str) {
        let record = match PodRecord::read(dir) {
            Ok(record) => record,
            Err(RecordError::Missing) => {
                tracing::info!("removing what is left of a sandbox that was never recorded");
                return clear(self.environment(), dir).await;
            }
            Err(error) => return set_aside(dir, &error),
        };
        let environment = self.environment();
        match record.phase {
            // Its Start died with the daemon; containerd has given it up.
            Phase::Starting => {
                tracing::info!("removing a sandbox whose start was interrupted");
                end_recorded(environment, &record).await;
                // A process that was started and not recorded yet is known by its cgroup, or by its arguments.
                cgroup::end_members(&record.cgroups);
                end_strays(environment, dir).await;
                // Before the folder, with which the record of them goes.
                match cgroup::remove(&record.cgroups).await {
                    Ok(()) => clear(environment, dir).await,
                    Err(error) => {
                        tracing::error!(%error, "removing the sandbox's cgroup; its folder is kept")
                    }
                }
            }
            Phase::Created | Phase::Stopped => {
                let pod = revive(environment, id, &record);
                adopt_relay(&pod, &record).await;
                if record.phase == Phase::Stopped {
                    pod.work.lock().await.lost = record.vm;
                    serve_host(&pod).await;
                }
                self.insert(pod);
            }
            Phase::Running => self.recover_running(id, &record).await,
        }
    }

    async fn recover_running(&self, id: &str, record: &PodRecord) {
        let environment = self.environment();
        let pod = revive(environment, id, record);
        let relay = adopt_relay(&pod, record).await;
        let vm = match record.vm.clone() {
            Some(vm) => environment.hypervisor.adopt(vm).await,
            None => Ok(None),
        };
        let vm = vm.unwrap_or_else(|error| {
            tracing::error!(%error, "taking the VM over");
            None
        });
        if let Some(vm) = &vm {
            pod.disks.lock().await.set_vm(vm.clone());
        }
        serve_host(&pod).await;
        self.insert(pod.clone());
        match (vm, relay) {
            (Some(vm), Some(relay)) => {
                pod.work.lock().await.vm = Some(vm.clone());
                tracing::info!(pid = vm.pid(), "the sandbox goes on");
                pod.watch(vm, relay, None);
            }
            (vm, relay) => {
                let whose = if vm.is_none() { "VM" } else { "relay" };
                let log = log::tails(pod.dir(), &["vmm.log", "console.log", "relay.log"]);
                let reason = format!("its {whose} ended while no daemon watched{log}");
                tracing::warn!(reason, relay_lives = relay.is_some(), "the sandbox has ended");
                pod.blame(&*reason);
                // Known before it is cleared up: containerd is not to wait for that, nor to take it for a mere stop.
                pod.set_ended(Exit { code: 255, at: SystemTime::now(), reason: Some(reason) });
                {
                    let mut work = pod.work.lock().await;
                    // A guest without a relay still has file systems to sync; of a VM that ended, processes may be left.
                    work.guest_up = vm.is_some();
                    work.lost = if vm.is_none() { record.vm.clone() } else { None };
                    work.vm = vm;
                }
                let stopping = pod.clone();
                pod.beside(async move {
                    if let Err(error) = stopping.stop().await {
                        tracing::error!(%error, "clearing up after a sandbox that ended");
                    }
                });
            }
        }
    }
}

impl Pods {
    /// What cannot be found again in time is not ready, and can be stopped and removed like any other.
    fn give_up(&self, dir: &Path, id: &str, deadline: Duration) {
        tracing::error!("the sandbox is not recovered within {deadline:?}");
        let Ok(record) = PodRecord::read(dir) else { return };
        let reason = format!("it was not found again within {deadline:?} after the daemon's restart");
        let pod = revive(self.environment(), id, &record);
        pod.blame(&*reason);
        pod.set_ended(Exit { code: 255, at: SystemTime::now(), reason: Some(reason) });
        if let Ok(mut work) = pod.work.try_lock() {
            work.lost = record.vm;
            work.relay = record.relay.and_then(|relay| Process::adopt(relay).ok().flatten()).map(Arc::new);
        }
        self.insert(pod);
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
    }
    pod
}

async fn adopt_relay(pod: &Arc<Pod>, record: &PodRecord) -> Option<Arc<Process>> {
    let relay = match Process::adopt(record.relay?) {
        Ok(relay) => Arc::new(relay?),
        Err(error) => {
            tracing::error!(%error, "taking the relay over");
            return None;
        }
    };
    pod.work.lock().await.relay = Some(relay.clone());
    Some(relay)
}

async fn serve_host(pod: &Arc<Pod>) {
    match HostServer::start(pod).await {
        Ok(host) => pod.work.lock().await.host = Some(host),
        Err(error) => tracing::error!(%error, "serving the relay: no new containers in this sandbox"),
    }
}

/// A record that is torn or of another make says nothing about whether its VM lives, so nothing is ended or deleted until
/// containerd asks for it.
fn set_aside(dir: &Path, error: &RecordError) {
    let moved = fs::rename(dir.join(pod_files::RECORD), aside(dir));
    tracing::error!(%error, ?moved, folder = %dir.display(), "the sandbox is left alone until containerd removes it");
}

/// Where a record goes that cannot be read.
fn aside(dir: &Path) -> PathBuf {
    dir.join(format!("{}.unreadable", pod_files::RECORD))
}

impl Pods {
    /// Pods whose records cannot be read, by id and containerd's namespace. Not those whose record does not even tell the latter:
    /// nobody can say then whether containerd knows them.
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

    /// Ends and removes a pod whose record cannot be read: what names its folder, and what is in a cgroup of its name. (What it
    /// has in a network namespace goes with that, which is containerd's.) No other one is touched.
    pub(super) async fn remove_unreadable(&self, id: &str) -> Result<(), PodError> {
        let (environment, dir) = (self.environment(), self.environment().dir.join(id));
        if !is_safe_id(id) || !aside(&dir).exists() {
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
            timeout(environment.mount_timeout, tokio::task::spawn_blocking(move || remove::remove(&folder)));
        let removed = match removed.await {
            Ok(Ok(removed)) => removed.map_err(StepError::from),
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
    let removed = tokio::task::spawn_blocking(move || remove::remove(&folder)).await;
    match removed {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%error, "removing the sandbox's folder"),
        Err(error) => tracing::error!(%error, "removing the sandbox's folder"),
    }
}

/// Kills processes of ours that were started for this folder: those whose program we start and whose arguments name it.
async fn end_strays(environment: &Environment, dir: &Path) {
    let sizes = &environment.sizes;
    let programs = [&sizes.path, &sizes.virtiofsd.path, &sizes.vsock_device.path, &environment.relay];
    let programs = programs.map(Clone::clone);
    for pid in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = pid.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // Held before it is looked at, so that the signal goes to what was looked at.
        let Ok(process) = Process::open(pid) else { continue };
        let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        if is_for(&command, dir, &programs) {
            tracing::info!(pid, "ending a process of a sandbox that is no more");
            if let Err(error) = process.end(Duration::ZERO).await {
                tracing::error!(%error, "ending a process of a sandbox that is no more");
            }
        }
    }
}

fn is_for(command: &[u8], dir: &Path, programs: &[PathBuf]) -> bool {
    let mut prefix = dir.as_os_str().as_bytes().to_vec();
    let named = |argument: &[u8], text: &[u8]| argument.windows(text.len()).any(|part| part == text);
    let mut arguments = command.split(|byte| *byte == 0);
    let program = arguments.next().unwrap_or_default();
    let base = program.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let ours = programs.iter().filter_map(|path| path.file_name()).any(|name| name.as_bytes() == base);
    prefix.push(b'/');
    ours && arguments.any(|argument| argument == dir.as_os_str().as_bytes() || named(argument, &prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_programs_for_this_folder_are_strays() {
        let dir = Path::new("/run/kuasar/qemu/p1");
        let programs = [PathBuf::from("/opt/qemu-system-x86_64"), PathBuf::from("virtiofsd")];
        let is = |command: &str| is_for(command.replace(' ', "\0").as_bytes(), dir, &programs);
        assert!(is("/usr/bin/qemu-system-x86_64 -qmp unix:/run/kuasar/qemu/p1/qmp.sock,server=on"));
        assert!(is("virtiofsd --shared-dir /run/kuasar/qemu/p1/shared"));
        assert!(is("virtiofsd /run/kuasar/qemu/p1"));
        assert!(!is("virtiofsd --shared-dir /run/kuasar/qemu/p10/shared"));
        assert!(!is("tail -f /run/kuasar/qemu/p1/log/vmm.log"));
        assert!(!is(""));
    }
}
