//! The end of a pod: VM, network, mounts, folder.

use std::{
    fs,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use kuasar_common::constants::pod_files;

use super::{Exit, Phase, Pod, PodError, StepError, Work, cgroup, folder};
use crate::{
    container::StorageError,
    crash,
    guest::Guest,
    network,
    process::{Process, ProcessError},
    vmm::{Vm, VmRecord},
};

/// A VMM that was asked to quit has this long.
const QUIT: Duration = Duration::from_secs(5);
/// A VMM that was killed has this long.
const KILL: Duration = Duration::from_secs(20);
/// The relay has this long after SIGTERM.
const RELAY: Duration = Duration::from_secs(2);
/// Beyond the time that containers get, the agent has this long to unmount and answer.
const AGENT: Duration = Duration::from_secs(3);

impl Pod {
    /// Ends the VM and gives back network and mounts. The relay stays, for containerd's last questions.
    /// Idempotent.
    ///
    /// # Errors
    /// When something cannot be ended; the rest has been, and the call can be repeated.
    pub async fn stop(self: &Arc<Self>) -> Result<(), PodError> {
        let mut work = self.work.lock().await;
        self.stop_locked(&mut work).await
    }

    /// Ends and removes everything of the pod. Idempotent.
    ///
    /// # Errors
    /// As [`Pod::stop`]; the folder is kept then.
    pub async fn remove(self: &Arc<Self>) -> Result<(), PodError> {
        let mut work = self.work.lock().await;
        self.remove_all(&mut work).await
    }

    #[tracing::instrument(name = "stop", level = "trace", skip_all)]
    async fn stop_locked(self: &Arc<Self>, work: &mut Work) -> Result<(), PodError> {
        let running = self.view().phase == Phase::Running;
        self.stopping.store(true, Ordering::Relaxed);
        if let Some(vm) = work.vm.clone() {
            if running || std::mem::take(&mut work.guest_up) {
                self.shut_guest_down(&*vm).await;
            }
            at("stop: guest")?;
            end("stopping the VM", stop_vm(&vm).await)?;
            at("stop: VM")?;
            let exit = vm.wait().await;
            self.set_ended(Exit { code: exit.code.unwrap_or(0), at: exit.at, reason: self.blamed() });
        }
        if let Some(lost) = &work.lost {
            end("ending the VM that was not taken over", end_lost(lost).await)?;
            work.lost = None;
        }
        self.set_ended(Exit { code: 0, at: SystemTime::now(), reason: self.blamed() });
        // Independent of each other: all are tried, the first failure is reported.
        let network = match &work.network {
            Some(record) => network::remove(record).await.map_err(StepError::from),
            None => Ok(()),
        };
        if network.is_ok() {
            work.network = None;
        }
        at("stop: network")?;
        let mounts = self.unmount().await;
        at("stop: unmounted")?;
        // What it would say is worth less than the end, which may be what makes room for it.
        if self.dir.exists()
            && let Err(error) = self.persist(work)
        {
            tracing::warn!(%error, "recording the end of the sandbox");
        }
        end("giving the network back", network)?;
        end("unmounting what containers used", mounts)
    }

    /// Not waited for for ever either: of a server that is away even an unmount may hang.
    async fn unmount(self: &Arc<Self>) -> Result<(), StorageError> {
        let storage = self.take_storage("unmounting what containers used").await?;
        self.free(storage.with(|storage| storage.unmount())).await?
    }

    /// Lets containers end and file systems sync; a guest that does not answer is ended all the same.
    #[tracing::instrument(name = "end containers", level = "trace", skip_all)]
    async fn shut_guest_down(&self, vm: &dyn Vm) {
        let token = match fs::read_to_string(self.dir.join(pod_files::TOKEN)) {
            Ok(token) => token,
            Err(error) => return tracing::warn!(%error, "reading the sandbox's token"),
        };
        let grace = self.environment.stop_timeout;
        let guest = Guest::new(vm.address(), token);
        if let Err(error) = guest.shutdown(grace, grace.saturating_add(AGENT)).await {
            tracing::warn!(%error, "shutting the guest down");
        }
    }

    #[tracing::instrument(name = "remove", level = "trace", skip_all)]
    pub(super) async fn remove_all(self: &Arc<Self>, work: &mut Work) -> Result<(), PodError> {
        self.stop_locked(work).await?;
        if let Some(relay) = &work.relay {
            end("ending the relay", relay.end(RELAY).await)?;
        }
        at("remove: relay")?;
        if let Some(host) = work.host.take() {
            host.stop().await;
        }
        end("removing the sandbox's cgroup", cgroup::remove(&work.cgroups).await.map_err(StepError::Cgroup))?;
        work.cgroups.clear();
        at("remove: cgroup")?;
        let dir = self.dir.clone();
        let removed = tokio::task::spawn_blocking(move || folder::remove(&dir)).await;
        let removed = removed.map_err(|error| StepError::Internal(error.to_string()));
        end("removing the sandbox's folder", removed.and_then(|removed| removed))?;
        work.relay = None;
        work.vm = None;
        // Nothing is left that was this user's.
        work.user = None;
        Ok(())
    }
}

/// Ends the processes of a VM without a word to it.
pub(super) async fn end_lost(vm: &VmRecord) -> Result<(), ProcessError> {
    for record in std::iter::once(&vm.vmm).chain(vm.companions.values()) {
        if let Some(process) = Process::adopt(*record)? {
            process.end(Duration::ZERO).await?;
        }
    }
    Ok(())
}

#[tracing::instrument(name = "end VM", level = "trace", skip_all)]
async fn stop_vm(vm: &Arc<dyn Vm>) -> Result<(), StepError> {
    if let Err(error) = vm.stop(false, QUIT).await {
        tracing::warn!(%error, "the VMM does not quit, killing it");
        vm.stop(true, KILL).await?;
    }
    Ok(())
}

/// For tests: the end is as far as this.
fn at(name: &'static str) -> Result<(), PodError> {
    end(name, crash::step(name).map_err(|error| StepError::Internal(error.to_string())))
}

fn end<T, E: Into<StepError>>(doing: &'static str, done: Result<T, E>) -> Result<T, PodError> {
    done.map_err(|error| PodError::End { doing, source: error.into() })
}
