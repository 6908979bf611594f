//! Processes of the host that outlive the daemon: known by pid and start time, held by pidfd.

use std::io;

use serde::{Deserialize, Serialize};

/// Names one process for good: a pid alone is reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// Process id.
    pub pid: u32,
    /// Field 22 of `/proc/<pid>/stat`: clock ticks after boot.
    pub start_time: u64,
}

/// Why a process could not be started, found or ended.
#[derive(Debug, thiserror::Error)]
#[error("{doing} {program}: {source}")]
pub struct ProcessError {
    /// What was being done.
    pub doing: &'static str,
    /// To what.
    pub program: String,
    /// Why it failed.
    pub source: io::Error,
}
