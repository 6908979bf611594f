//! The pod's containers and what can be done with them.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{RwLockReadGuard, RwLockWriteGuard},
    time::timeout,
};

use crate::{
    cgroup::Hierarchies,
    container::{Container, Exec, NewContainer, Target},
    error::TaskError,
    events::Events,
    launch,
    oom::OomWatch,
    pid_namespace::PodPidNamespace,
    process::{Phase, Process},
    reaper::{Exit, Reaper},
    runc::Runc,
    spec,
    stdio::{
        process_io::{ProcessIo, StdioSpec},
        registry::Registry,
    },
    storage::Storages,
    vm_size::VmSize,
};

/// Longest time that a killed process may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// Longest time that a call waits for its turn at a container. The call before it may have a hung runtime,
/// which is killed first.
const GATE_DEADLINE: Duration = Duration::from_secs(55);
/// Longest id of a container or exec; containerd allows 76.
const MAX_ID: usize = 128;
/// Exit status of a process that could not be started, as containerd's own shims report it.
pub const NEVER_RAN: u32 = 255;

/// Services that all containers of the VM share.
pub struct Context {
    /// The OCI runtime.
    pub runc: Runc,
    /// Sees processes end.
    pub reaper: Arc<Reaper>,
    /// Their events, for the host.
    pub events: Arc<Events>,
    /// Sees the kernel kill for want of memory.
    pub oom: Arc<OomWatch>,
    /// The PID namespace that some of them share.
    pub pids: PodPidNamespace,
    /// Knows the connections of their streams.
    pub streams: Arc<Registry>,
    /// Their mounts.
    pub storages: Arc<Storages>,
    /// A folder for small files of ours, on a tmpfs.
    pub work: PathBuf,
    /// Hierarchies of their cgroups.
    pub cgroups: Hierarchies,
}

/// All containers.
pub struct Tasks {
    /// Services that they share.
    pub context: Arc<Context>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
}

impl Tasks {
    /// No containers yet.
    #[must_use]
    pub fn new(context: Arc<Context>) -> Self {
        Self { context, containers: Mutex::default() }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All containers, in no order.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Container>> {
        self.table().values().cloned().collect()
    }

    /// A container by its id.
    ///
    /// # Errors
    /// When there is none.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        self.table().get(id).cloned().ok_or_else(|| no_container(id))
    }

    /// A process by its container's id and its exec id, empty for the container's own.
    ///
    /// # Errors
    /// When there is none.
    pub fn target(&self, id: &str, exec_id: &str) -> Result<Target, TaskError> {
        let container = self.container(id)?;
        if exec_id.is_empty() {
            return Ok(Target::Init(container));
        }
        let exec = container.execs().get(exec_id).cloned();
        exec.map(Target::Exec)
            .ok_or_else(|| TaskError::NotFound(format!("process {exec_id} of container {id}")))
    }

    /// Makes a container, up to its first process waiting for [`Self::start`]; returns that process's pid.
    ///
    /// # Errors
    /// When the id is taken or the runtime fails; nothing is left then.
    pub async fn create(&self, new: NewContainer) -> Result<u32, TaskError> {
        check_id(&new.id)?;
        let container = {
            let mut table = self.table();
            if table.contains_key(&new.id) {
                return Err(TaskError::AlreadyExists(format!("container {}", new.id)));
            }
            let container = Arc::new(Container::new(&self.context, new));
            table.insert(container.id.clone(), Arc::clone(&container));
            container
        };
        let _gate = changing(&container).await?;
        match launch::create(&self.context, &container).await {
            Ok(()) => {
                self.context.events.created(&container);
                tokio::spawn(watch_init(Arc::clone(&self.context), Arc::clone(&container)));
                Ok(container.init.pid_u32())
            }
            Err(error) => {
                container.init.io.start_nothing(&container.init.exited());
                if let Err(error) = launch::remove(&self.context, &container).await {
                    log::warn!("container {} was not created, and: {error}", container.id);
                }
                self.forget(&container);
                Err(error)
            }
        }
    }

    /// Starts a created process; returns its pid.
    ///
    /// # Errors
    /// When it was started before, or the runtime fails.
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<u32, TaskError> {
        let container = self.container(id)?;
        match self.target(id, exec_id)? {
            Target::Init(_) => self.start_init(&container).await,
            Target::Exec(exec) => self.start_exec(&container, exec_id, &exec).await,
        }
    }

    async fn start_init(&self, container: &Arc<Container>) -> Result<u32, TaskError> {
        let _gate = changing(container).await?;
        begin(&container.init, &container.id)?;
        let started = self.context.runc.start(&container.id).await;
        if started.is_ok() {
            self.context.events.started(container);
        }
        let next = if started.is_ok() { Phase::Running } else { Phase::Created };
        // It may have ended already, which is as good.
        let _ = container.init.advance(Phase::Starting, next);
        if container.init.exit().is_some() {
            tokio::spawn(tell_exit(Arc::clone(&self.context), Arc::clone(container)));
        }
        started?;
        Ok(container.init.pid_u32())
    }

    async fn start_exec(
        &self,
        container: &Arc<Container>,
        exec_id: &str,
        exec: &Arc<Exec>,
    ) -> Result<u32, TaskError> {
        let _gate = joining(container).await?;
        let process = &exec.process;
        begin(process, exec_id)?;
        if let Err(error) = launch::exec(&self.context, container, exec_id, exec).await {
            // It may run, and without streams: nobody would know it.
            let _ = process.kill(9);
            process.io.start_nothing(&process.exited());
            let exit = Exit { code: NEVER_RAN, at: SystemTime::now() };
            process.exit_sender().send_replace(Some(exit));
            return Err(error);
        }
        let _ = process.advance(Phase::Starting, Phase::Running);
        self.context.events.exec_started(container, exec_id, process);
        let (context, container) = (Arc::clone(&self.context), Arc::clone(container));
        tokio::spawn(watch_exec(context, container, exec_id.to_owned(), Arc::clone(exec)));
        Ok(process.pid_u32())
    }

    /// Notes a process to be started in a container.
    ///
    /// # Errors
    /// When the id is taken, the description is no OCI process, or the container has ended.
    pub fn add_exec(&self, id: &str, exec_id: &str, stdio: StdioSpec, spec: &[u8]) -> Result<(), TaskError> {
        check_id(exec_id)?;
        let container = self.container(id)?;
        if container.init.phase() == Phase::Stopped {
            return Err(TaskError::FailedPrecondition(format!("container {id} is not running")));
        }
        let spec = spec::process(spec, stdio.terminal)?;
        let mut execs = container.execs();
        if execs.contains_key(exec_id) {
            return Err(TaskError::AlreadyExists(format!("process {exec_id} of container {id}")));
        }
        let io = ProcessIo::new(&self.context.streams, id, exec_id, &stdio);
        execs.insert(exec_id.to_owned(), Arc::new(Exec { process: Process::new(stdio, io), spec }));
        drop(execs);
        self.context.events.exec_added(&container, exec_id);
        Ok(())
    }

    /// Forgets a process that has ended or never started, and with a container's own process the container.
    /// Returns its pid and how it ended.
    ///
    /// # Errors
    /// When it runs, or the runtime fails.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(u32, Exit), TaskError> {
        let container = self.container(id)?;
        if let Target::Exec(exec) = self.target(id, exec_id)? {
            if matches!(exec.process.phase(), Phase::Starting | Phase::Running) {
                return Err(TaskError::FailedPrecondition(format!("process {exec_id} is running")));
            }
            self.context.events.exited(&container, exec_id, &exec.process);
            container.execs().remove(exec_id);
            return Ok((exec.process.pid_u32(), ended(&exec.process)));
        }
        let _gate = changing(&container).await?;
        match container.init.phase() {
            Phase::Stopped => {}
            Phase::Created => self.kill_created(&container).await?,
            _ => return Err(TaskError::FailedPrecondition(format!("container {id} is running"))),
        }
        settle(&self.context, &container);
        self.context.events.exited(&container, "", &container.init);
        launch::remove(&self.context, &container).await?;
        self.forget(&container);
        let exit = ended(&container.init);
        self.context.events.deleted(&container, &exit);
        Ok((container.init.pid_u32(), exit))
    }

    async fn kill_created(&self, container: &Container) -> Result<(), TaskError> {
        container.init.kill(9)?;
        let mut exited = container.init.exited();
        let gone = timeout(KILL_DEADLINE, exited.wait_for(Option::is_some)).await;
        match gone {
            Ok(_) => Ok(()),
            Err(_) => Err(TaskError::Deadline(format!("killing container {}", container.id))),
        }
    }

    /// Freezes or thaws a container.
    ///
    /// # Errors
    /// When it does not run, or the runtime fails.
    pub async fn freeze(&self, id: &str, freeze: bool) -> Result<(), TaskError> {
        let container = self.container(id)?;
        let _gate = changing(&container).await?;
        let (from, meanwhile, to) = if freeze {
            (Phase::Running, Phase::Pausing, Phase::Paused)
        } else {
            (Phase::Paused, Phase::Paused, Phase::Running)
        };
        if !container.init.advance(from, meanwhile) {
            let state = if freeze { "running" } else { "paused" };
            return Err(TaskError::FailedPrecondition(format!("container {id} is not {state}")));
        }
        let done = self.context.runc.freeze(id, freeze).await;
        let _ = container.init.advance(meanwhile, if done.is_ok() { to } else { from });
        done?;
        self.context.events.frozen(&container, freeze);
        Ok(())
    }

    /// Changes a container's limits to OCI `LinuxResources`, as JSON.
    ///
    /// # Errors
    /// When it has ended, the VM has not so much, or the runtime fails.
    pub async fn update(&self, id: &str, resources: &[u8]) -> Result<(), TaskError> {
        let resources = spec::resources(resources, &self.context.cgroups)?;
        let container = self.container(id)?;
        let _gate = changing(&container).await?;
        if container.init.phase() == Phase::Stopped {
            return Err(TaskError::FailedPrecondition(format!("container {id} is not running")));
        }
        let made_with = launch::resources(&self.context, &container);
        if let Some(why) = VmSize::now().refusal(&resources, &made_with) {
            return Err(TaskError::FailedPrecondition(format!("updating container {id}: {why}")));
        }
        let file = self.context.work.join(format!("{id}.resources.json"));
        write(&file, resources.to_string().as_bytes())?;
        let updated = self.context.runc.update(id, &file).await;
        let _ = fs::remove_file(&file);
        Ok(updated?)
    }

    fn forget(&self, container: &Container) {
        container.set_gone();
        self.table().remove(&container.id);
    }
}

/// Sees a container's own process end.
async fn watch_init(context: Arc<Context>, container: Arc<Container>) {
    if container.init.exited().wait_for(Option::is_some).await.is_ok() && !container.init.is_starting() {
        tell_exit(context, container).await;
    }
}

/// Does what there is to do once a container's own process has ended, and tells that when its output is
/// delivered.
async fn tell_exit(context: Arc<Context>, container: Arc<Container>) {
    settle(&context, &container);
    container.init.io.delivered().await;
    context.events.exited(&container, "", &container.init);
}

/// Does what there is to do once a container's own process has ended, and tells why it did, if it was for
/// want of memory. That it ended is told after that; and whoever is at [`Phase::Starting`] does both when the
/// start has been told.
fn settle(context: &Context, container: &Container) {
    if container.init.exit().is_none() {
        return;
    }
    // Kept for as long as the container is: its cgroup goes before.
    let _ = container.stats();
    container.check_memory(&context.events);
    if container.shares_pids() {
        // The kernel ends the rest of a container only with a PID namespace of its own.
        let _ = container.kill_all(9);
    }
}

/// Sees an added process end.
async fn watch_exec(context: Arc<Context>, container: Arc<Container>, exec_id: String, exec: Arc<Exec>) {
    if exec.process.exited().wait_for(Option::is_some).await.is_ok() {
        container.check_memory(&context.events);
        exec.process.io.delivered().await;
        context.events.exited(&container, &exec_id, &exec.process);
    }
}

/// A call's turn at a container that it changes.
async fn changing(container: &Container) -> Result<RwLockWriteGuard<'_, ()>, TaskError> {
    let gate = timeout(GATE_DEADLINE, container.gate.write()).await.map_err(|_| busy(container))?;
    container.check_exists()?;
    Ok(gate)
}

/// A call's turn at a container that it starts a process in.
async fn joining(container: &Container) -> Result<RwLockReadGuard<'_, ()>, TaskError> {
    let gate = timeout(GATE_DEADLINE, container.gate.read()).await.map_err(|_| busy(container))?;
    container.check_exists()?;
    Ok(gate)
}

fn busy(container: &Container) -> TaskError {
    TaskError::Deadline(format!("what is being done to container {}", container.id))
}

fn begin(process: &Process, name: &str) -> Result<(), TaskError> {
    if process.advance(Phase::Created, Phase::Starting) {
        return Ok(());
    }
    let why = match process.phase() {
        Phase::Stopped => "has ended",
        _ => "was started before",
    };
    Err(TaskError::FailedPrecondition(format!("{name} {why}")))
}

/// Exit of a process, or that of one that never ran.
fn ended(process: &Process) -> Exit {
    process.exit().unwrap_or(Exit { code: NEVER_RAN, at: SystemTime::now() })
}

pub(crate) fn no_container(id: &str) -> TaskError {
    TaskError::NotFound(format!("container {id}"))
}

/// Ids become names of files and cgroups.
fn check_id(id: &str) -> Result<(), TaskError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
    if id.is_empty() || id.len() > MAX_ID || id.starts_with('.') || !id.chars().all(allowed) {
        return Err(TaskError::InvalidArgument(format!(
            "id {id:?}: 1 to {MAX_ID} letters, digits, - _ . + are allowed, no dot first"
        )));
    }
    Ok(())
}

/// Writes a small file of ours.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), TaskError> {
    fs::write(path, bytes).map_err(TaskError::io(format!("writing {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_could_escape_are_refused() {
        for good in ["a", "0f3e-x_y.z+1", &"a".repeat(MAX_ID)] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "ü", &"a".repeat(MAX_ID + 1)] {
            let error = check_id(bad).unwrap_err().to_string();
            assert!(error.contains("are allowed"), "{error}");
        }
    }
}
