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
    Environment, Exit, Phase, Pod, Pods, View, cgroup, from_epoch_ns,
    host::HostServer,
    record::{PodRecord, RecordError},
};
use crate::{
    container::{is_safe_id, remove},
    process::Process,
};

/// One pod's recovery has this long; the others do not wait for it, but the daemon's start does.
const DEADLINE: Duration = Duration::from_secs(30);
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
                if timeout(DEADLINE, pods.recover_one(&entry.path(), &id)).await.is_err() {
                    tracing::error!("the sandbox is not recovered within {DEADLINE:?}; its folder is kept");
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
                clear(environment, dir).await;
                if let Err(error) = cgroup::remove(&record.cgroups).await {
                    tracing::warn!(%error, "removing the sandbox's cgroup");
                }
            }
            Phase::Created | Phase::Stopped => {
                let pod = revive(environment, id, &record);
                adopt_relay(&pod, &record).await;
                if record.phase == Phase::Stopped {
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
                let (vm_lives, relay_lives) = (vm.is_some(), relay.is_some());
                tracing::warn!(vm_lives, relay_lives, "the sandbox has ended while no daemon watched");
                pod.work.lock().await.vm = vm;
                if let Err(error) = pod.stop().await {
                    tracing::error!(%error, "clearing up after a sandbox that ended");
                }
                pod.set_ended(Exit::new(255, SystemTime::now()));
            }
        }
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

/// A record that is torn or of another make says nothing about whether its VM lives, so nothing is ended or deleted.
fn set_aside(dir: &Path, error: &RecordError) {
    let record = dir.join(pod_files::RECORD);
    let aside = dir.join(format!("{}.unreadable", pod_files::RECORD));
    let moved = fs::rename(&record, &aside);
    tracing::error!(%error, moved = ?moved.map(|()| aside), folder = %dir.display(),
        "the sandbox is left alone; remove its processes and its folder by hand");
}

async fn end_recorded(environment: &Environment, record: &PodRecord) {
    if let Some(vm) = record.vm.clone() {
        match environment.hypervisor.adopt(vm).await {
            Ok(Some(vm)) => {
                if let Err(error) = vm.stop(true, GONE).await {
                    tracing::error!(%error, "ending the VM");
                }
            }
            Ok(None) => {}
            Err(error) => tracing::error!(%error, "ending the VM"),
        }
    }
    if let Some(network) = &record.network
        && let Err(error) = crate::network::remove(network).await
    {
        tracing::warn!(%error, "giving the network back");
    }
}

/// Ends what runs for a folder and removes it, unless somebody has put a record aside there to look at.
async fn clear(environment: &Environment, dir: &Path) {
    if dir.join(format!("{}.unreadable", pod_files::RECORD)).exists() {
        return;
    }
    let sizes = &environment.sizes;
    let programs = [&sizes.path, &sizes.virtiofsd.path, &sizes.vsock_device.path, &environment.relay];
    end_strays(dir, &programs.map(Clone::clone)).await;
    let folder = dir.to_owned();
    let removed = tokio::task::spawn_blocking(move || remove::remove(&folder)).await;
    match removed {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%error, "removing the sandbox's folder"),
        Err(error) => tracing::error!(%error, "removing the sandbox's folder"),
    }
}

/// Kills processes of ours that were started for this folder: those whose program we start and whose arguments name it.
async fn end_strays(dir: &Path, programs: &[PathBuf]) {
    for pid in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = pid.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // Held before it is looked at, so that the signal goes to what was looked at.
        let Ok(process) = Process::open(pid) else { continue };
        let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        if is_for(&command, dir, programs) {
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
