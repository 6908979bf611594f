//! containerd's Task API, version 3, for the containers of this VM.

use std::{future::Future, sync::Arc};

use async_trait::async_trait;
use containerd_shim_protos::{api, shim::oci::ProcessDetails, shim_async::Task};
use protobuf::{EnumOrUnknown, Message, MessageField, well_known_types::any::Any};
use tokio::time::{Duration, timeout};
use ttrpc::r#async::TtrpcContext;

use crate::{
    cgroup::Stats,
    container::{NewContainer, Target},
    error::TaskError,
    process::Phase,
    reaper::timestamp,
    stdio::process_io::StdioSpec,
    tasks::Tasks,
};

/// Type of what Stats answers; containerd knows this name only, without the usual prefix.
/// Type of what Pids says of an added process.
const PROCESS_TYPE: &str = "containerd.runc.v1.ProcessDetails";
/// Longest that a call may take that the OCI runtime works for: its turn at the container and two runs of the
/// runtime, each of which has a deadline of its own. The other calls, but Wait, never wait at all.
const DEADLINE: Duration = Duration::from_secs(110);

/// Metadata key in which containerd names its namespace of a call, and the namespace of Kubernetes'
/// containers.
const NAMESPACE_METADATA: &str = "containerd-namespace-ttrpc";
const DEFAULT_NAMESPACE: &str = "k8s.io";
const CHECKPOINT: &str =
    "checkpointing a container inside a microVM (its image has no CRIU; stop it and start another)";
const RESTORE: &str =
    "restoring a container from a checkpoint inside a microVM (its image has no CRIU; start it anew)";

/// The service.
#[derive(Clone)]
pub struct TaskService {
    tasks: Arc<Tasks>,
}

impl TaskService {
    /// A service for these containers.
    #[must_use]
    pub fn new(tasks: Arc<Tasks>) -> Self {
        Self { tasks }
    }

    /// Does the work in a task of its own, so that a caller who goes away, a deadline, or a panic leaves
    /// nothing half done: the work goes on to its own end.
    async fn run<T, F>(&self, work: impl FnOnce(Arc<Tasks>) -> F) -> Result<T, ttrpc::Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, TaskError>> + Send + 'static,
    {
        let work = tokio::spawn(work(Arc::clone(&self.tasks)));
        match timeout(DEADLINE, work).await {
            Ok(Ok(result)) => Ok(result?),
            Ok(Err(error)) => Err(TaskError::Internal(error.to_string()).into()),
            Err(_) => Err(TaskError::Deadline("the call".to_owned()).into()),
        }
    }

    fn target(&self, id: &str, exec_id: &str) -> ttrpc::Result<Target> {
        Ok(self.tasks.target(id, exec_id)?)
    }
}

/// containerd's namespace that a call is made in.
fn namespace(context: &TtrpcContext) -> String {
    let given = context.metadata.get(NAMESPACE_METADATA).and_then(|values| values.first());
    given.map_or(DEFAULT_NAMESPACE, String::as_str).to_owned()
}

/// Details in the answer to Pids of a process that Exec added.
fn process_details(exec_id: String) -> Result<Any, TaskError> {
    let details = ProcessDetails { exec_id, ..Default::default() };
    let value = details.write_to_bytes().map_err(|error| TaskError::Internal(error.to_string()))?;
    Ok(Any { type_url: PROCESS_TYPE.to_owned(), value, ..Default::default() })
}

fn status(phase: Phase) -> EnumOrUnknown<api::Status> {
    EnumOrUnknown::new(match phase {
        Phase::Created | Phase::Starting => api::Status::CREATED,
        Phase::Running => api::Status::RUNNING,
        Phase::Pausing => api::Status::PAUSING,
        Phase::Paused => api::Status::PAUSED,
        Phase::Stopped => api::Status::STOPPED,
    })
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, req: api::StateRequest) -> ttrpc::Result<api::StateResponse> {
        let container = self.tasks.container(&req.id)?;
        let target = self.target(&req.id, &req.exec_id)?;
        let process = target.process();
        let mut state = api::StateResponse::new();
        state.bundle.clone_from(&container.bundle);
        state.pid = process.pid_u32();
        state.status = status(process.phase());
        let stdio = &process.stdio;
        (state.stdin, state.stdout, state.stderr) =
            (stdio.stdin.clone(), stdio.stdout.clone(), stdio.stderr.clone());
        state.terminal = stdio.terminal;
        if let Some(exit) = process.exit() {
            state.exit_status = exit.code;
            state.exited_at = timestamp(&exit);
        }
        (state.id, state.exec_id) = (req.id, req.exec_id);
        Ok(state)
    }

    async fn create(
        &self,
        context: &TtrpcContext,
        req: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        if !req.checkpoint.is_empty() {
            return Err(TaskError::Unimplemented(RESTORE).into());
        }
        if !req.rootfs.is_empty() {
            let why =
                "rootfs: the host mounts it below the shared folder; mounts in the request are not done";
            return Err(TaskError::InvalidArgument(why.to_owned()).into());
        }
        let stdio =
            StdioSpec { stdin: req.stdin, stdout: req.stdout, stderr: req.stderr, terminal: req.terminal };
        let new = NewContainer { id: req.id, bundle: req.bundle, namespace: namespace(context), stdio };
        let pid = self.run(|tasks| async move { tasks.create(new).await }).await?;
        Ok(api::CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, req: api::StartRequest) -> ttrpc::Result<api::StartResponse> {
        let pid = self.run(|tasks| async move { tasks.start(&req.id, &req.exec_id).await }).await?;
        Ok(api::StartResponse { pid, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, req: api::DeleteRequest) -> ttrpc::Result<api::DeleteResponse> {
        let (pid, exit) = self.run(|tasks| async move { tasks.delete(&req.id, &req.exec_id).await }).await?;
        let mut response = api::DeleteResponse::new();
        (response.pid, response.exit_status, response.exited_at) = (pid, exit.code, timestamp(&exit));
        Ok(response)
    }

    async fn pids(&self, _: &TtrpcContext, req: api::PidsRequest) -> ttrpc::Result<api::PidsResponse> {
        let container = self.tasks.container(&req.id)?;
        let mut execs = container.exec_pids();
        let mut response = api::PidsResponse::new();
        for pid in container.pids() {
            let mut info = api::ProcessInfo { pid: u32::try_from(pid).unwrap_or(0), ..Default::default() };
            if let Some(exec_id) = execs.remove(&pid) {
                info.info = MessageField::some(process_details(exec_id)?);
            }
            response.processes.push(info);
        }
        Ok(response)
    }

    async fn pause(&self, _: &TtrpcContext, req: api::PauseRequest) -> ttrpc::Result<api::Empty> {
        self.run(|tasks| async move { tasks.freeze(&req.id, true).await }).await?;
        Ok(api::Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, req: api::ResumeRequest) -> ttrpc::Result<api::Empty> {
        self.run(|tasks| async move { tasks.freeze(&req.id, false).await }).await?;
        Ok(api::Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: api::CheckpointTaskRequest) -> ttrpc::Result<api::Empty> {
        Err(TaskError::Unimplemented(CHECKPOINT).into())
    }

    async fn kill(&self, _: &TtrpcContext, req: api::KillRequest) -> ttrpc::Result<api::Empty> {
        let target = self.target(&req.id, &req.exec_id)?;
        match &target {
            Target::Init(container) if req.all => container.kill_all(req.signal)?,
            target => target.process().kill(req.signal)?,
        }
        Ok(api::Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, req: api::ExecProcessRequest) -> ttrpc::Result<api::Empty> {
        let stdio =
            StdioSpec { stdin: req.stdin, stdout: req.stdout, stderr: req.stderr, terminal: req.terminal };
        self.tasks.add_exec(&req.id, &req.exec_id, stdio, &req.spec.value)?;
        Ok(api::Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: api::ResizePtyRequest) -> ttrpc::Result<api::Empty> {
        let target = self.target(&req.id, &req.exec_id)?;
        let limit = |size: u32| u16::try_from(size).unwrap_or(u16::MAX);
        let resized = target.process().io.resize(limit(req.width), limit(req.height));
        if !resized.map_err(TaskError::io("resizing the terminal"))? {
            return Err(TaskError::FailedPrecondition("the process has no terminal".to_owned()).into());
        }
        Ok(api::Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, req: api::CloseIORequest) -> ttrpc::Result<api::Empty> {
        let target = self.target(&req.id, &req.exec_id)?;
        if req.stdin {
            target.process().io.close_stdin();
        }
        Ok(api::Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, req: api::UpdateTaskRequest) -> ttrpc::Result<api::Empty> {
        let resources = req.resources.value.clone();
        self.run(|tasks| async move { tasks.update(&req.id, &resources).await }).await?;
        Ok(api::Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, req: api::WaitRequest) -> ttrpc::Result<api::WaitResponse> {
        // Only channels are kept: they close when the process is deleted without ever having run.
        let (mut exited, delivered) = {
            let target = self.target(&req.id, &req.exec_id)?;
            (target.process().exited(), target.process().io.delivered())
        };
        let exit = exited.wait_for(Option::is_some).await.map(|exit| *exit);
        delivered.await;
        let Ok(Some(exit)) = exit else {
            let name = if req.exec_id.is_empty() { req.id } else { req.exec_id };
            return Err(TaskError::NotFound(format!("{name} (it was deleted)")).into());
        };
        let mut response = api::WaitResponse::new();
        (response.exit_status, response.exited_at) = (exit.code, timestamp(&exit));
        Ok(response)
    }

    async fn stats(&self, _: &TtrpcContext, req: api::StatsRequest) -> ttrpc::Result<api::StatsResponse> {
        let none = || Stats::Unified(Box::default());
        let stats = self.tasks.container(&req.id)?.stats().unwrap_or_else(none);
        let (name, value) = stats.encode().map_err(|error| TaskError::Internal(error.to_string()))?;
        let mut response = api::StatsResponse::new();
        response.stats = MessageField::some(Any { type_url: name.to_owned(), value, ..Default::default() });
        Ok(response)
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        req: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        let mut response = api::ConnectResponse::new();
        response.shim_pid = std::process::id();
        response.task_pid = self.tasks.container(&req.id)?.init.pid_u32();
        env!("CARGO_PKG_VERSION").clone_into(&mut response.version);
        Ok(response)
    }

    /// Ends nothing: the VM belongs to the pod, and only the sandbox's own Shutdown ends that.
    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> ttrpc::Result<api::Empty> {
        Ok(api::Empty::new())
    }
}

#[cfg(test)]
mod tests {
    use super::DEADLINE;
    use crate::runc::Deadlines;

    #[test]
    fn a_call_has_time_to_delete_what_it_failed_to_create() {
        let Deadlines { create, delete, other } = Deadlines::default();
        assert!(create + delete < DEADLINE && other + delete < DEADLINE);
    }
}
