//! Processes of the host that outlive the daemon: known by pid and start time, held by pidfd.
//!
//! They run in a session of their own and have no parent-death signal, so nothing that happens to the daemon
//! ends them. An exit status is collected by pidfd; nothing here reaps children it does not know.

mod filter;
mod ids;
mod jail;
mod landlock;
mod rights;
mod spawn;

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions},
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::OnceCell,
    time::timeout,
};

/// Longest time that a killed process may take to be gone; it takes longer only when the kernel cannot end it
/// (uninterruptible I/O).
const KILL_DEADLINE: Duration = Duration::from_secs(10);
pub use self::{
    filter::vsock_device as vsock_device_filter,
    ids::{IdError, IdLease, IdRange, Ids},
    jail::Jail,
    rights::{Namespaces, Rights},
    spawn::{POD_VARIABLE, Spawn},
};
pub use rustix::{process::Resource, thread::CapabilitySet};

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
    /// The action that failed.
    pub doing: &'static str,
    /// The program concerned.
    pub program: String,
    /// Why it failed.
    pub source: io::Error,
}

/// A process held by its pidfd. Dropping it does nothing to the process.
#[derive(Debug)]
pub struct Process {
    record: ProcessRecord,
    pidfd: OwnedFd,
    /// Set when it has ended; the inner value is its status, if it was ours to collect.
    exit: OnceCell<Option<u32>>,
}

impl Process {
    /// Holds whatever process has this pid now.
    pub(crate) fn open(pid: u32) -> io::Result<Self> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::INVAL)?;
        let pidfd = rustix::process::pidfd_open(number, PidfdFlags::empty())?;
        // Read after the pidfd is held: the pid cannot change hands in between.
        let start_time = start_time(pid)?;
        Ok(Self { record: ProcessRecord { pid, start_time }, pidfd, exit: OnceCell::new() })
    }

    /// Holds a process that was recorded earlier; `None` when it is gone, even if its pid is in use again.
    ///
    /// # Errors
    /// When the system refuses to tell.
    pub fn adopt(record: ProcessRecord) -> Result<Option<Self>, ProcessError> {
        match Self::open(record.pid) {
            Ok(process) if process.record == record => Ok(Some(process)),
            Ok(_) => Ok(None),
            Err(e) if matches!(Errno::from_io_error(&e), Some(Errno::SRCH | Errno::NOENT | Errno::INVAL)) => {
                Ok(None)
            }
            Err(source) => {
                Err(ProcessError { doing: "holding", program: format!("pid {}", record.pid), source })
            }
        }
    }

    /// Its name for records.
    #[must_use]
    pub const fn record(&self) -> ProcessRecord {
        self.record
    }

    /// Its process id.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.record.pid
    }

    /// Readable when it has ended.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Sends a signal; a process that has ended is no error.
    ///
    /// # Errors
    /// When the signal is not permitted.
    pub fn signal(&self, signal: Signal) -> Result<(), ProcessError> {
        match rustix::process::pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(e) => Err(self.error("signalling", e.into())),
        }
    }

    /// Waits for its end; returns its status as a shell shows it (128 + signal), or `None` when it is not our
    /// child.
    ///
    /// # Errors
    /// When the system refuses to watch it.
    pub async fn wait(&self) -> Result<Option<u32>, ProcessError> {
        let collected = self.exit.get_or_try_init(|| async {
            // SAFETY: a borrowed descriptor always names the same, open file as long as it is borrowed.
            let pidfd = unsafe { AsyncFd::register_with_interest(self.pidfd.as_fd(), Interest::READABLE) }?;
            // Readiness of a pidfd is final, there is nothing to clear.
            let _ready = pidfd.readable().await?;
            Ok(collect(&self.pidfd))
        });
        collected.await.copied().map_err(|source| self.error("watching", source))
    }

    /// Ends it: SIGTERM, and SIGKILL if it is still there after `grace` (at once when that is zero).
    /// Idempotent.
    ///
    /// # Errors
    /// When it cannot be signalled, or is not gone even after SIGKILL.
    pub async fn end(&self, grace: Duration) -> Result<(), ProcessError> {
        if !grace.is_zero() {
            self.signal(Signal::TERM)?;
            if let Ok(ended) = timeout(grace, self.wait()).await {
                return ended.map(drop);
            }
        }
        self.signal(Signal::KILL)?;
        match timeout(KILL_DEADLINE, self.wait()).await {
            Ok(ended) => ended.map(drop),
            Err(_) => Err(self.error("killing", io::ErrorKind::TimedOut.into())),
        }
    }

    fn error(&self, doing: &'static str, source: io::Error) -> ProcessError {
        ProcessError { doing, program: format!("pid {}", self.record.pid), source }
    }
}

/// Reaps an ended process if it is our child.
fn collect(pidfd: &OwnedFd) -> Option<u32> {
    let status = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED).ok()??;
    let code = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => signal.saturating_add(128),
        (None, None) => return None,
    };
    u32::try_from(code).ok()
}

/// Field 22 of `/proc/<pid>/stat`. The second field may hold anything, parentheses and spaces included, so
/// fields are counted from the last `)`.
fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat"))?;
    let stat = String::from_utf8_lossy(&stat);
    let field = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19));
    field.and_then(|field| field.parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use std::{io::Write, path::Path, time::Instant};

    use super::*;

    fn sleeper() -> Process {
        let mut spawn = Spawn::new("sleep");
        spawn.args(["60"]);
        spawn.spawn().unwrap()
    }

    #[tokio::test]
    async fn status_of_exit_and_of_signal() {
        let mut spawn = Spawn::new("sh");
        spawn.args(["-c", "exit 7"]);
        let process = spawn.spawn().unwrap();
        assert_eq!(process.wait().await.unwrap(), Some(7));
        assert_eq!(process.wait().await.unwrap(), Some(7), "a second caller gets the same");

        let process = sleeper();
        process.end(Duration::from_secs(5)).await.unwrap();
        assert_eq!(process.wait().await.unwrap(), Some(128 + 15));
        process.end(Duration::ZERO).await.unwrap();
    }

    #[tokio::test]
    async fn a_process_that_ignores_sigterm_is_killed_after_the_grace() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut spawn = Spawn::new("sh");
        spawn.args(["-c", "trap '' TERM; echo up; while :; do sleep 0.05; done"]).log(&log);
        let process = spawn.spawn().unwrap();
        while !fs::read_to_string(&log).unwrap().contains("up") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let start = Instant::now();
        process.end(Duration::from_millis(200)).await.unwrap();
        assert!(start.elapsed() >= Duration::from_millis(200));
        assert_eq!(process.wait().await.unwrap(), Some(128 + 9));
    }

    #[tokio::test]
    async fn a_reused_pid_is_not_adopted() {
        let process = sleeper();
        let record = process.record();
        assert!(Process::adopt(record).unwrap().is_some());
        let other = ProcessRecord { start_time: record.start_time + 1, ..record };
        assert!(Process::adopt(other).unwrap().is_none());
        process.end(Duration::ZERO).await.unwrap();
        assert!(Process::adopt(record).unwrap().is_none());
        assert!(Process::adopt(ProcessRecord { pid: 0, start_time: 0 }).unwrap().is_none());
    }

    #[tokio::test]
    async fn descriptors_log_and_session_arrive() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut files = Vec::new();
        let mut spawn = Spawn::new("sh");
        for text in ["a", "b"] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(text.as_bytes()).unwrap();
            io::Seek::rewind(&mut file).unwrap();
            files.push(spawn.fd(file.into()));
        }
        assert_eq!(files, [3, 4]);
        spawn
            .args(["-c", "cat <&3; cat <&4 >&2; [ $(cut -d' ' -f6 /proc/$$/stat) = $$ ] && echo leads"])
            .log(&log);
        let process = spawn.spawn().unwrap();
        assert_eq!(process.wait().await.unwrap(), Some(0));
        assert_eq!(fs::read_to_string(&log).unwrap(), "ableads\n");
    }

    #[tokio::test]
    async fn it_joins_its_cgroups_before_it_executes() {
        let procs = tempfile::NamedTempFile::new().unwrap();
        let mut spawn = Spawn::new("true");
        spawn.cgroup_procs(&[procs.path().to_owned()]);
        assert_eq!(spawn.spawn().unwrap().wait().await.unwrap(), Some(0));
        assert_eq!(fs::read_to_string(procs.path()).unwrap(), "0");
    }

    #[test]
    fn what_cannot_be_started_says_so() {
        let error = Spawn::new("/nonexistent/vmm").spawn().unwrap_err().to_string();
        assert_eq!(error, "starting /nonexistent/vmm: No such file or directory (os error 2)");
        let mut spawn = Spawn::new("true");
        spawn.netns(Some(Path::new("/nonexistent/ns")));
        let error = spawn.spawn().unwrap_err().to_string();
        assert!(error.starts_with("opening the network namespace of true: "), "{error}");
    }
}
