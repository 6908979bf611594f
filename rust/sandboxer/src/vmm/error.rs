//! Errors of VMs, worded so that a person knows what to do.

use std::{io, path::PathBuf, time::Duration};

use crate::process::ProcessError;

/// Why no VM can be started with this configuration. One sentence each: what was asked, why it cannot be,
/// what to do.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// A file of the configuration is missing or unreadable.
    #[error("{what} {} cannot be read: {source}; set {key} to a readable file", path.display())]
    File {
        /// The file's purpose.
        what: &'static str,
        /// Configuration key.
        key: &'static str,
        /// Its value.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Anything else.
    #[error("{0}")]
    Refused(String),
}

/// Why an operation on a VM failed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A step of the start failed.
    #[error("starting the VM: {step}: {why}{log}")]
    Start {
        /// The step that failed.
        step: &'static str,
        /// Why it failed.
        why: String,
        /// Empty, or `; <log>: <last lines>`.
        log: String,
    },
    /// Reading, writing or preparing something on the host.
    #[error("{doing}: {source}")]
    Io {
        /// The action that failed, and its object.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Spawning or ending a process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The VMM refused a command.
    #[error("asking the VMM to {command}: {why}")]
    Command {
        /// The command's name in the VMM's protocol.
        command: &'static str,
        /// The VMM's answer.
        why: String,
    },
    /// Something did not happen in time.
    #[error("{doing}: nothing within {deadline:?}{log}")]
    Deadline {
        /// The event that the daemon waited for.
        doing: &'static str,
        /// The longest wait.
        deadline: Duration,
        /// Empty, or `; <log>: <last lines>`.
        log: String,
    },
    /// The VM has ended.
    #[error("the VM has ended{0}")]
    Ended(String),
    /// This hypervisor, or this machine type, cannot do it.
    #[error("{0}")]
    Unsupported(String),
}

impl VmError {
    /// An I/O error with the action that failed.
    pub(crate) fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }
}

/// The exit status of a process in words, for the end of a sentence; empty if nobody knows it.
pub(crate) fn with_status(code: Option<u32>) -> String {
    match code {
        Some(code @ 129..=192) => format!(" with status {code} (signal {})", code.saturating_sub(128)),
        Some(code) => format!(" with status {code}"),
        None => String::new(),
    }
}
