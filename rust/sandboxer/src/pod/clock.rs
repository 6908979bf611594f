//! The guest's clock follows the host's for as long as the pod runs.

use std::{
    fs,
    future::pending,
    ops::ControlFlow,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use kuasar_common::constants::pod_files;
use tokio::{sync::watch, time::timeout};

use super::Pod;
use crate::{
    clock::{Occasion, Ticker},
    guest::Guest,
    vmm::Vm,
};

/// Time between two looks at the guest's clock. The host's own drifts less than 30 ms in that time, which the
/// guest makes good without a jump.
const INTERVAL: Duration = Duration::from_secs(60);
/// One look may take so long.
const DEADLINE: Duration = Duration::from_secs(10);
/// The end of a VM is known at most so long after its guest hung up.
const END: Duration = Duration::from_secs(1);

impl Pod {
    /// Keeps the guest's clock in step until the VM ends.
    pub(super) fn keep_clock(self: &Arc<Self>, vm: Arc<dyn Vm>) {
        let (dir, pod) = (self.dir.clone(), self.clone());
        self.beside(async move {
            let (token, ticker) =
                match (fs::read_to_string(dir.join(pod_files::TOKEN)), Ticker::new(INTERVAL)) {
                    (Ok(token), Ok(ticker)) => (token, ticker),
                    (Err(error), _) | (_, Err(error)) => {
                        return tracing::error!(%error, "the guest's clock is not kept in step");
                    }
                };
            let guest = Guest::new(vm.address(), token);
            tokio::select! {
                _ = vm.wait() => {}
                () = follow(&pod, &guest, &*vm, &ticker) => {}
            }
        });
    }
}

async fn follow(pod: &Pod, guest: &Guest, vm: &dyn Vm, ticker: &Ticker) {
    let mut resumptions = vm.resumptions();
    // At once: what the guest was told at its setup took a while to get there, and a daemon that was
    // restarted does not know what happened meanwhile.
    let mut why = "it is set up";
    loop {
        if look(pod, guest, vm, why).await.is_break() {
            return;
        }
        why = tokio::select! {
            () = changed(resumptions.as_mut()) => "the VM goes on after a pause",
            tick = ticker.tick() => match tick {
                Ok(Occasion::Regular) => "it is time",
                Ok(Occasion::HostClockSet) => "the host's clock was set",
                Err(error) => return tracing::error!(%error, "the guest's clock is not kept in step any more"),
            },
        };
    }
}

/// Corrects the guest's clock once, and notes whether the guest answers at all. Breaks off when the VM is
/// ending.
async fn look(pod: &Pod, guest: &Guest, vm: &dyn Vm, why: &str) -> ControlFlow<()> {
    let asked = SystemTime::now();
    // A paused VM answers no call. It is asked for nothing, and corrected when it goes on.
    if pod.silence().is_some()
        && let Err(error) = vm.ping().await
    {
        if is_ending(pod, vm).await {
            return ControlFlow::Break(());
        }
        pod.unheard(asked, error.to_string());
        return ControlFlow::Continue(());
    }
    let synced = guest.sync_clock(DEADLINE).await;
    // A guest may hang up on a question when it ends. Its end is told by others.
    if synced.is_err() && is_ending(pod, vm).await {
        return ControlFlow::Break(());
    }
    pod.note(vm, asked, &synced).await;
    match synced {
        Ok(0) => {}
        Ok(delta_ns) => tracing::info!(delta_ns, why, "corrected the guest's clock"),
        Err(error) if error.is_answer() => tracing::warn!(%error, why, "correcting the guest's clock"),
        // Noted, and told, as a guest that does not answer.
        Err(_) => {}
    }
    ControlFlow::Continue(())
}

async fn is_ending(pod: &Pod, vm: &dyn Vm) -> bool {
    pod.stopping.load(Ordering::Relaxed) || timeout(END, vm.wait()).await.is_ok()
}

/// Ends with the next change; never when there is nobody who would tell.
async fn changed(watched: Option<&mut watch::Receiver<u64>>) {
    if let Some(watched) = watched
        && watched.changed().await.is_ok()
    {
        return;
    }
    pending().await
}
