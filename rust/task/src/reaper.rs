//! The one place that waits for children.
//!
//! PID 1 inherits every orphan of the VM, so `waitpid(-1)` is called here and nowhere else, and each exit is
//! handed to the code that registered its pid. A container's process becomes known only when the runtime that
//! made it has ended, and may have exited before: while a [`Spawning`] guard lives, exits of unknown pids are
//! kept for it.

use std::{
    collections::HashMap,
    io,
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use protobuf::{MessageField, well_known_types::timestamp::Timestamp};
use rustix::process::{Pid, WaitOptions, WaitStatus, test_kill_process, wait};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};

/// Exit of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 plus the signal's number.
    pub code: u32,
    /// When it was seen.
    pub at: SystemTime,
}

/// When a process ended, as protocols want it.
#[must_use]
pub fn timestamp(exit: &Exit) -> MessageField<Timestamp> {
    let since = exit.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut timestamp = Timestamp::new();
    timestamp.seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    timestamp.nanos = i32::try_from(since.subsec_nanos()).unwrap_or(0);
    MessageField::some(timestamp)
}

/// Channel that announces the exit of one process; `None` until then.
pub type ExitSender = Arc<watch::Sender<Option<Exit>>>;

#[derive(Default)]
struct Table {
    watched: HashMap<i32, ExitSender>,
    early: HashMap<i32, Exit>,
    spawning: usize,
}

/// Hands out exits; see the module.
#[derive(Default)]
pub struct Reaper {
    table: Mutex<Table>,
}

/// While it lives, exits of pids that nobody registered are kept.
pub struct Spawning {
    reaper: Arc<Reaper>,
}

impl Reaper {
    /// A reaper without work.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Reaps from now on, for as long as what is returned is driven: it never ends.
    ///
    /// # Errors
    /// When SIGCHLD cannot be received.
    pub fn start(self: &Arc<Self>) -> io::Result<impl Future<Output = ()> + Send + use<>> {
        let children = signal(SignalKind::child())?;
        // Something may have ended before the signal was received.
        self.reap();
        Ok(run(Arc::clone(self), children))
    }

    /// Keeps the exits of pids unknown yet, until the guard is dropped. Take it before starting what makes
    /// the process.
    #[must_use]
    pub fn spawning(self: &Arc<Self>) -> Spawning {
        self.lock().spawning += 1;
        Spawning { reaper: Arc::clone(self) }
    }

    /// Announces the exit of `pid` on `exit`, at once if it has exited under a [`Spawning`] guard that still
    /// lives.
    pub fn watch(&self, pid: i32, exit: ExitSender) {
        let mut table = self.lock();
        let early = table.early.remove(&pid);
        match early {
            // A kept exit is stale if the pid is in use again.
            Some(early) if !is_process(pid) => {
                exit.send_replace(Some(early));
            }
            _ => {
                table.watched.insert(pid, exit);
            }
        }
    }

    /// Starts a process whose exit is announced on what is returned beside its pid.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(
        self: &Arc<Self>,
        command: &mut Command,
    ) -> io::Result<(Pid, watch::Receiver<Option<Exit>>)> {
        // Its exit may be collected before it is registered.
        let _guard = self.spawning();
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
        let (sender, receiver) = watch::channel(None);
        self.watch(pid.as_raw_nonzero().get(), Arc::new(sender));
        Ok((pid, receiver))
    }

    /// Collects everything that has ended.
    pub fn reap(&self) {
        // Errors mean that there is nothing to wait for.
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            self.ended(pid, status);
        }
    }

    fn ended(&self, pid: Pid, status: WaitStatus) {
        let code = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => code,
            (None, Some(signal)) => 128 + signal,
            // Stopped or continued, which was not asked for.
            (None, None) => return,
        };
        let exit = Exit { code: u32::try_from(code).unwrap_or(255), at: SystemTime::now() };
        let pid = pid.as_raw_nonzero().get();
        let mut table = self.lock();
        if let Some(sender) = table.watched.remove(&pid) {
            sender.send_replace(Some(exit));
        } else if table.spawning > 0 {
            table.early.insert(pid, exit);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Spawning {
    fn drop(&mut self) {
        let mut table = self.reaper.lock();
        table.spawning = table.spawning.saturating_sub(1);
        if table.spawning == 0 {
            table.early.clear();
        }
    }
}

async fn run(reaper: Arc<Reaper>, mut children: Signal) {
    while children.recv().await.is_some() {
        reaper.reap();
    }
}

fn is_process(pid: i32) -> bool {
    Pid::from_raw(pid).is_some_and(|pid| test_kill_process(pid).is_ok())
}
