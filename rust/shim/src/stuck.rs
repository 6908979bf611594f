//! Containers that do not end although they were killed.
//!
//! A process that waits for a file of the host ends only when the host answers: of a frozen file system, or a
//! server that is away, that may be never, and no SIGKILL reaches it before. containerd waits for a
//! container's end before it stops the pod, so such a pod could not be removed. Once every container that is
//! left was killed, nobody wants the VM any more: it is ended, and all that hangs in it with it. While a
//! container is left that nobody has killed, the VM goes on.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};

use crate::{
    log::log,
    registry::{Container, Phase},
    task::Relay,
};

/// Longest time that a killed container may take to end. Writing out its memory to a slow disk is a matter of
/// seconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(15);

impl Relay {
    /// Ends the VM after a while if only killed containers are left in it that do not end.
    pub(crate) fn look_after_killed(self: &Arc<Self>, container: &Container) {
        container.init.kill_sent();
        let relay = Arc::clone(self);
        tokio::spawn(async move {
            sleep(PATIENCE).await;
            relay.end_if_all_are_stuck();
        });
    }

    fn end_if_all_are_stuck(&self) {
        let runs = |container: &Arc<Container>| {
            container.init.phase() != Phase::Creating && container.init.life.exit().is_none()
        };
        let left: Vec<_> = self.containers.all().into_iter().filter(runs).collect();
        let now = Instant::now();
        let stuck = |container: &Arc<Container>| {
            container.init.killed_at().is_some_and(|at| now.saturating_duration_since(at) >= PATIENCE)
        };
        if left.is_empty() || !left.iter().all(stuck) || self.guest.vm.is_dead() {
            return;
        }
        let names: Vec<_> = left.iter().map(|container| container.id.as_str()).collect();
        log!(
            "containers {} do not end {} s after SIGKILL (does the host answer for their volumes?), and no other is left: \
             killing the VM",
            names.join(", "),
            PATIENCE.as_secs()
        );
        if let Err(error) = self.guest.vm.kill() {
            log!("killing the VM: {error}");
        }
    }
}
