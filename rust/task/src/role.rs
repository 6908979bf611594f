//! The agent's role in its guest: the first process, or a service of a first process that is systemd.

use std::io;

use rustix::process::{getpid, set_child_subreaper};

use crate::boot;

/// The agent's role in its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Process 1: everything in the guest is its business.
    Init,
    /// One process of many: what process 1 owes the guest has been done, and is done by it.
    Service,
}

impl Role {
    /// Nothing but the process id tells.
    #[must_use]
    pub fn of_this_process() -> Self {
        if std::process::id() == 1 { Self::Init } else { Self::Service }
    }

    /// Has what its children leave behind, as the OCI runtime leaves containers, become its own children.
    /// Process 1 is given all of that in any case.
    ///
    /// # Errors
    /// The kernel's.
    pub fn adopt(self) -> io::Result<()> {
        match self {
            Self::Init => Ok(()),
            Self::Service => Ok(set_child_subreaper(Some(getpid()))?),
        }
    }

    /// Ends the VM. A service only ends itself, with this status: its unit has systemd stop what else there
    /// is, unmount, and restart the machine (`SuccessAction=`, `FailureAction=`).
    pub fn end(self, status: i32) -> ! {
        match self {
            Self::Init => boot::end_vm(),
            Self::Service => std::process::exit(status),
        }
    }
}
