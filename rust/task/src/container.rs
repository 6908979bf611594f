//! One container: its processes, its cgroup, what may be done to it at the same time.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use rustix::process::Pid;
use tokio::sync::RwLock;

use crate::{
    cgroup::{Cgroup, Stats},
    error::TaskError,
    events::Events,
    process::{Process, signal_pid},
    stdio::process_io::{ProcessIo, StdioSpec},
    tasks::{Context, no_container},
};

const SIGKILL: u32 = 9;

/// Parts that a container is made from.
#[derive(Clone, Debug, Default)]
pub struct NewContainer {
    /// Its id.
    pub id: String,
    /// Its bundle's path in the guest.
    pub bundle: String,
    /// containerd's namespace that it belongs to.
    pub namespace: String,
    /// Standard streams of its first process.
    pub stdio: StdioSpec,
}

/// A container.
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle's path in the guest.
    pub bundle: String,
    /// containerd's namespace that it belongs to.
    pub namespace: String,
    /// Its own process.
    pub init: Process,
    execs: Mutex<BTreeMap<String, Arc<Exec>>>,
    /// Taken for writing by what changes the container, for reading by what starts a process in it.
    pub(crate) gate: RwLock<()>,
    pub(crate) cgroup: OnceLock<Cgroup>,
    last_stats: Mutex<Option<Stats>>,
    /// Number of the kernel's kills for want of memory that are known.
    oom_kills: AtomicU64,
    gone: AtomicBool,
    /// Its PID namespace has processes of others.
    shares_pids: AtomicBool,
}

/// A process that was added to a container.
pub struct Exec {
    /// The process.
    pub process: Process,
    /// Its OCI description, as JSON.
    pub spec: Vec<u8>,
}

/// One of a container's processes.
#[derive(Clone)]
pub enum Target {
    /// The container's own.
    Init(Arc<Container>),
    /// An added one.
    Exec(Arc<Exec>),
}

impl Target {
    /// The process itself.
    #[must_use]
    pub fn process(&self) -> &Process {
        match self {
            Self::Init(container) => &container.init,
            Self::Exec(exec) => &exec.process,
        }
    }
}

impl Container {
    pub(crate) fn new(context: &Context, new: NewContainer) -> Self {
        let io = ProcessIo::new(&context.streams, &new.id, "", &new.stdio);
        Self {
            id: new.id,
            bundle: new.bundle,
            namespace: new.namespace,
            init: Process::new(new.stdio, io),
            execs: Mutex::default(),
            gate: RwLock::default(),
            cgroup: OnceLock::new(),
            last_stats: Mutex::default(),
            oom_kills: AtomicU64::new(0),
            gone: AtomicBool::new(false),
            shares_pids: AtomicBool::new(false),
        }
    }

    /// Returns true if its PID namespace has processes of other containers, too.
    pub(crate) fn shares_pids(&self) -> bool {
        self.shares_pids.load(Ordering::Relaxed)
    }

    pub(crate) fn set_shares_pids(&self, shares: bool) {
        self.shares_pids.store(shares, Ordering::Relaxed);
    }

    pub(crate) fn execs(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Exec>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn check_exists(&self) -> Result<(), TaskError> {
        if self.gone.load(Ordering::Relaxed) { Err(no_container(&self.id)) } else { Ok(()) }
    }

    /// Ends what waits for its turn in vain.
    pub(crate) fn set_gone(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }

    /// All its processes; its own is there even when it has ended.
    #[must_use]
    pub fn pids(&self) -> Vec<i32> {
        let mut pids = self.cgroup.get().map(Cgroup::processes).unwrap_or_default();
        if pids.is_empty() {
            pids.push(self.init.pid());
        }
        pids
    }

    /// The exec id of each added process that runs, by pid.
    #[must_use]
    pub fn exec_pids(&self) -> BTreeMap<i32, String> {
        let execs = self.execs();
        let running =
            execs.iter().filter(|(_, exec)| exec.process.pid() > 0 && exec.process.exit().is_none());
        running.map(|(id, exec)| (exec.process.pid(), id.clone())).collect()
    }

    /// The kernel's counters of it. The last known values once it has ended; none before it began.
    #[must_use]
    pub fn stats(&self) -> Option<Stats> {
        let mut last = self.last_stats.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stats) = self.cgroup.get().and_then(Cgroup::stats) {
            *last = Some(stats);
        }
        last.clone()
    }

    /// Returns true if the kernel counts its memory still.
    pub(crate) fn has_memory(&self) -> bool {
        self.cgroup.get().and_then(Cgroup::oom_kills).is_some()
    }

    /// Publishes that the kernel killed something in it for want of memory, unless that is known already.
    /// All kills between two looks are one event.
    pub fn check_memory(&self, events: &Events) {
        let Some(kills) = self.cgroup.get().and_then(Cgroup::oom_kills) else { return };
        if self.oom_kills.fetch_max(kills, Ordering::Relaxed) < kills {
            events.out_of_memory(self);
        }
    }

    /// Kills a process, if it is one of its own: the number may be another's by now.
    pub(crate) fn kill_one(&self, pid: i32) {
        let own = self.cgroup.get().is_some_and(|cgroup| cgroup.processes().contains(&pid));
        if let Some(pid) = Pid::from_raw(pid).filter(|_| own) {
            let _ = signal_pid(pid, SIGKILL);
        }
    }

    /// Sends a signal to every process of it, also to what outlives its own in a PID namespace that it
    /// shares.
    ///
    /// # Errors
    /// When nothing of it lives, or the number is no signal's.
    pub fn kill_all(&self, signal: u32) -> Result<(), TaskError> {
        let pids = self.cgroup.get().map(Cgroup::processes).unwrap_or_default();
        if pids.is_empty() {
            return self.init.kill(signal);
        }
        if signal == SIGKILL && self.cgroup.get().is_some_and(Cgroup::kill) {
            return Ok(());
        }
        pids.into_iter().filter_map(Pid::from_raw).try_for_each(|pid| signal_pid(pid, signal))
    }
}
