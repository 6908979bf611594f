//! Errors in a pod's life.

use std::{io, path::PathBuf};

use crate::{
    container::{StorageError, mount::MountError},
    guest::GuestError,
    network::NetworkError,
    process::{IdError, ProcessError},
    vmm::{ReadyError, VmError},
};

/// Why a request about a pod failed.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// There is no such pod.
    #[error("there is no sandbox {0}")]
    NotFound(String),
    /// There is one already, and it is further than Create.
    #[error("the sandbox {0} exists already")]
    Exists(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The request is understood and will not be served. One sentence: field, reason, way out.
    #[error("{0}")]
    Refused(String),
    /// The caller went away.
    #[error("starting the sandbox: cancelled while {0}")]
    Cancelled(&'static str),
    /// A step of the pod's start failed.
    #[error("starting the sandbox: {step}: {source}{log}")]
    Start {
        /// The step that failed.
        step: &'static str,
        /// Why it failed.
        source: StepError,
        /// Empty, or the last lines of the log that may explain it.
        log: String,
    },
    /// The VM or its guest did not come up; the driver names the step itself.
    #[error("starting the sandbox: {0}")]
    StartVm(VmError),
    /// Something of a pod could not be ended or removed; it is kept, and the request can be repeated.
    #[error("{doing}: {source}")]
    End {
        /// The step that failed.
        doing: &'static str,
        /// Why it failed.
        source: StepError,
    },
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// Reading or writing a file of the pod.
    #[error("{}: {source}", path.display())]
    File {
        /// The file's path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody else's folder.
    #[error(
        "{} is there already and no sandbox's that this daemon made; move it out of --dir", .0.display()
    )]
    Foreign(PathBuf),
    /// The pod's network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The VM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// Files for containers.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Unmounting or removing.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The agent's first call.
    #[error(transparent)]
    Ready(#[from] ReadyError),
    /// A call to the agent.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The pod's cgroup.
    #[error("{0}")]
    Cgroup(io::Error),
    /// A user id for the pod.
    #[error(transparent)]
    Id(#[from] IdError),
    /// A task of the daemon broke.
    #[error("{0}")]
    Internal(String),
}

impl StepError {
    /// An I/O error at a path.
    pub(super) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}
