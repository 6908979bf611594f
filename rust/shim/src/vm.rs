//! Life and death of the pod's VM.

use std::{io, os::fd::OwnedFd, sync::Arc};

use rustix::process::{Signal, pidfd_send_signal};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
};

use crate::log::log;

/// The VM as the relay knows it: it lives until it is declared dead, once and for all.
pub(crate) struct Vm {
    dead: watch::Sender<bool>,
    pidfd: Option<Arc<AsyncFd<OwnedFd>>>,
    /// True if the kernel tells of its death. If not, a guest that cannot be reached any more counts as dead.
    pub(crate) watched: bool,
}

impl Vm {
    /// A living VM; `pidfd` refers to its VMM and becomes readable with its end.
    pub(crate) fn new(pidfd: Option<OwnedFd>) -> io::Result<Arc<Self>> {
        let register = |pidfd| {
            // SAFETY: an `OwnedFd` keeps its descriptor open and the same until it is dropped.
            unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }
        };
        let pidfd = pidfd.map(register).transpose().map_err(|e| e.into_parts().1)?.map(Arc::new);
        let watched = pidfd.is_some();
        let vm = Arc::new(Self { dead: watch::Sender::new(false), pidfd: pidfd.clone(), watched });
        if let Some(pidfd) = pidfd {
            let vm = Arc::clone(&vm);
            tokio::spawn(async move {
                match pidfd.readable().await {
                    Ok(_) => vm.declare_dead("its process ended"),
                    Err(e) => log!("watching the VM's process: {e}"),
                }
            });
        }
        Ok(vm)
    }

    /// Returns true if the VM is known to be dead.
    pub(crate) fn is_dead(&self) -> bool {
        *self.dead.borrow()
    }

    /// Returns when the VM is dead.
    pub(crate) async fn dead(&self) {
        // The sender is in `self`, so this cannot end early.
        let _ = self.dead.subscribe().wait_for(|dead| *dead).await;
    }

    /// Kills the VM's process, if it is known.
    pub(crate) fn kill(&self) -> io::Result<()> {
        let pidfd = self.pidfd.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        Ok(pidfd_send_signal(pidfd.get_ref(), Signal::KILL)?)
    }

    /// Makes the death known.
    pub(crate) fn declare_dead(&self, why: &str) {
        if !self.dead.send_replace(true) {
            log!("the VM is gone: {why}");
        }
    }
}
