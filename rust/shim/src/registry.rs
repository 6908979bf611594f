//! The pod's containers and their processes, as this relay created them.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use containerd_shim_protos::{
    api::{CreateTaskRequest, ExecProcessRequest, StateResponse, Status as TaskStatus},
    protobuf::MessageField,
};
use tokio::{task::AbortHandle, time::Instant};

use crate::{
    bucket::Bucket,
    caller::Caller,
    host_socket::Served,
    life::Life,
    stdio::{Stdio, Wanted},
    streams::{Names, Outputs},
};

/// Processes that are deleted and still remembered, for events of theirs that are on the way.
const PAST: usize = 32;
/// Events of a container that may come as often as the guest has them: so many at once, and one more in so
/// many seconds.
const REPEATED: (u32, Duration) = (16, Duration::from_secs(1));

/// Locks; what a panicking holder left behind is still the best there is.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Phase of a process's life, exit aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Not there yet for anyone but its creator.
    Creating,
    Created,
    Running,
    Paused,
}

/// A container's first process, or one that was added.
pub(crate) struct Process {
    /// As received from containerd, and echoed to it.
    pub(crate) wanted: Wanted,
    pub(crate) life: Life,
    /// Its outputs among containerd's streams.
    pub(crate) outputs: Outputs,
    state: Mutex<State>,
    /// Kinds of events that containerd was told of it, a bit each.
    told: AtomicU8,
    /// The first SIGKILL that the guest has taken for it.
    killed: OnceLock<Instant>,
}

struct State {
    phase: Phase,
    pid: u32,
    stdio: Stdio,
    /// Its streams; containerd may open them as long as it knows the process.
    names: Names,
    /// Waits for the exit in the guest.
    watcher: Option<AbortHandle>,
}

impl Process {
    fn new(wanted: Wanted) -> Self {
        let (stdio, names) = (Stdio::default(), Names::default());
        let state = State { phase: Phase::Creating, pid: 0, stdio, names, watcher: None };
        let (life, outputs, state) = (Life::new(), Outputs::new(), Mutex::new(state));
        Self { wanted, life, outputs, state, told: AtomicU8::new(0), killed: OnceLock::new() }
    }

    /// Notes that containerd is told of it what can happen once; false if it was told before.
    pub(crate) fn tell(&self, kind: u8) -> bool {
        self.told.fetch_or(kind, Ordering::Relaxed) & kind == 0
    }

    /// Returns true if containerd was told.
    pub(crate) fn was_told(&self, kind: u8) -> bool {
        self.told.load(Ordering::Relaxed) & kind != 0
    }

    /// Notes a SIGKILL that the guest has taken.
    pub(crate) fn kill_sent(&self) {
        let _first = self.killed.get_or_init(Instant::now);
    }

    /// Time of the first SIGKILL.
    pub(crate) fn killed_at(&self) -> Option<Instant> {
        self.killed.get().copied()
    }

    pub(crate) fn phase(&self) -> Phase {
        lock(&self.state).phase
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        lock(&self.state).phase = phase;
    }

    /// Its id as containerd is told; 0 as long as there is none.
    pub(crate) fn pid(&self) -> u32 {
        lock(&self.state).pid
    }

    /// It exists in the guest now.
    pub(crate) fn created(&self, pid: u32, stdio: Stdio, names: Names, watcher: AbortHandle) {
        *lock(&self.state) = State { phase: Phase::Created, pid, stdio, names, watcher: Some(watcher) };
    }

    /// It runs now. What Create named stays its pid.
    pub(crate) fn started(&self, pid: u32) {
        let mut state = lock(&self.state);
        state.phase = Phase::Running;
        if state.pid == 0 {
            state.pid = pid;
        }
    }

    pub(crate) fn close_stdin(&self) {
        lock(&self.state).stdio.close_stdin();
    }

    /// The guest says no more about it: its streams come to their end within limits.
    pub(crate) fn close(&self) {
        self.life.close();
        std::mem::take(&mut lock(&self.state).stdio).finish();
    }

    /// Marks the process as deleted; a caller that still waits for it is told that it was killed.
    pub(crate) fn deleted(&self, status: u32) {
        self.life.end(status);
        self.close();
        let mut state = lock(&self.state);
        state.names = Names::default();
        if let Some(watcher) = state.watcher.take() {
            watcher.abort();
        }
    }

    /// containerd's view of it.
    pub(crate) fn describe(&self, container: &Container, exec_id: &str) -> StateResponse {
        let exit = self.life.exit();
        let state = lock(&self.state);
        let status = match (exit, state.phase) {
            (Some(_), _) => TaskStatus::STOPPED,
            (None, Phase::Creating | Phase::Created) => TaskStatus::CREATED,
            (None, Phase::Running) => TaskStatus::RUNNING,
            (None, Phase::Paused) => TaskStatus::PAUSED,
        };
        StateResponse {
            id: if exec_id.is_empty() { container.id.clone() } else { exec_id.to_owned() },
            exec_id: exec_id.to_owned(),
            bundle: container.bundle.clone(),
            pid: state.pid,
            status: status.into(),
            stdin: self.wanted.stdin.clone(),
            stdout: self.wanted.stdout.clone(),
            stderr: self.wanted.stderr.clone(),
            terminal: self.wanted.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map_or_else(MessageField::none, |exit| MessageField::some(exit.timestamp())),
            ..Default::default()
        }
    }
}

/// A container of the pod.
pub(crate) struct Container {
    pub(crate) id: String,
    /// The host's path, as received.
    pub(crate) bundle: String,
    pub(crate) init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    /// The last good answer to Stats.
    pub(crate) stats: Mutex<Option<Vec<u8>>>,
    /// containerd's namespace that it was created in.
    pub(crate) namespace: String,
    /// Pays for events that may come more than once.
    pub(crate) repeated: Mutex<Bucket>,
    /// Sockets of the host that it has mounted.
    pub(crate) sockets: Mutex<Served>,
    /// Held while the container is made and while it is deleted.
    pub(crate) gate: Arc<tokio::sync::Mutex<()>>,
    creator: Caller,
}

impl Container {
    pub(crate) fn new(request: &CreateTaskRequest, namespace: String, creator: Caller) -> Self {
        let wanted = Wanted {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        Self {
            id: request.id.clone(),
            bundle: request.bundle.clone(),
            init: Arc::new(Process::new(wanted)),
            execs: Mutex::default(),
            stats: Mutex::default(),
            namespace,
            repeated: Mutex::new(Bucket::new(REPEATED.0, REPEATED.1)),
            sockets: Mutex::default(),
            gate: Arc::default(),
            creator,
        }
    }

    /// Returns true if nobody will ever know of the container: containerd, which writes down a task when it
    /// is created, hung up before. If it looked at its tasks meanwhile, this one was not there.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.init.phase() == Phase::Creating && self.creator.hung_up()
    }

    /// Reserves an exec id; nothing if it is taken.
    pub(crate) fn add_exec(&self, request: &ExecProcessRequest) -> Option<Arc<Process>> {
        let mut execs = lock(&self.execs);
        if execs.contains_key(&request.exec_id) {
            return None;
        }
        let wanted = Wanted {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let process = Arc::new(Process::new(wanted));
        execs.insert(request.exec_id.clone(), Arc::clone(&process));
        Some(process)
    }

    pub(crate) fn remove_exec(&self, exec_id: &str) {
        lock(&self.execs).remove(exec_id);
    }

    /// The process of an exec id; empty for the first one.
    pub(crate) fn process(&self, exec_id: &str) -> Option<Arc<Process>> {
        self.any_process(exec_id).filter(|process| process.phase() != Phase::Creating)
    }

    /// The same, also while it is being made.
    fn any_process(&self, exec_id: &str) -> Option<Arc<Process>> {
        if exec_id.is_empty() {
            Some(Arc::clone(&self.init))
        } else {
            lock(&self.execs).get(exec_id).cloned()
        }
    }

    /// All processes, the first one included.
    pub(crate) fn processes(&self) -> Vec<Arc<Process>> {
        lock(&self.execs).values().cloned().chain([Arc::clone(&self.init)]).collect()
    }
}

/// A process that an event is about.
#[derive(Clone)]
pub(crate) struct Subject {
    pub(crate) container: Arc<Container>,
    pub(crate) exec: String,
    pub(crate) process: Arc<Process>,
}

/// All containers of the pod.
#[derive(Default)]
pub(crate) struct Registry {
    live: Mutex<HashMap<String, Arc<Container>>>,
    /// Processes deleted last, the newest behind.
    past: Mutex<VecDeque<Subject>>,
}

impl Registry {
    /// Adds a container, unless another has its id.
    pub(crate) fn add(&self, container: &Arc<Container>) -> Result<(), Arc<Container>> {
        match lock(&self.live).entry(container.id.clone()) {
            Entry::Occupied(other) => Err(Arc::clone(other.get())),
            Entry::Vacant(free) => {
                free.insert(Arc::clone(container));
                Ok(())
            }
        }
    }

    pub(crate) fn get(&self, id: &str) -> Option<Arc<Container>> {
        lock(&self.live).get(id).cloned()
    }

    /// Removes this very container.
    pub(crate) fn remove(&self, container: &Arc<Container>) {
        let mut map = lock(&self.live);
        if map.get(&container.id).is_some_and(|found| Arc::ptr_eq(found, container)) {
            map.remove(&container.id);
        }
    }

    /// Remembers a process that is deleted for a while.
    pub(crate) fn remember(&self, container: &Arc<Container>, exec: &str, process: &Arc<Process>) {
        let (container, process) = (Arc::clone(container), Arc::clone(process));
        let mut past = lock(&self.past);
        if past.len() >= PAST {
            past.pop_front();
        }
        past.push_back(Subject { container, exec: exec.to_owned(), process });
    }

    /// The process that an event of a kind is about, if this pod has it or had it lately: of several with
    /// these ids the oldest of which that has not been told.
    pub(crate) fn subject(&self, id: &str, exec: &str, kind: u8) -> Option<Subject> {
        let untold = |subject: &&Subject| {
            subject.container.id == id && subject.exec == exec && !subject.process.was_told(kind)
        };
        if let Some(found) = lock(&self.past).iter().find(untold) {
            return Some(found.clone());
        }
        let container = self.get(id)?;
        let process = container.any_process(exec).filter(|process| !process.was_told(kind))?;
        Some(Subject { container, exec: exec.to_owned(), process })
    }

    /// Returns true if it is still this very container.
    pub(crate) fn holds(&self, container: &Arc<Container>) -> bool {
        self.get(&container.id).is_some_and(|found| Arc::ptr_eq(&found, container))
    }

    pub(crate) fn all(&self) -> Vec<Arc<Container>> {
        lock(&self.live).values().cloned().collect()
    }
}
