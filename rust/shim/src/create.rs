//! Making: Create and Exec, in which daemon, guest and stdio have to come together.

use std::{sync::Arc, time::Duration};

use containerd_shim_protos::api::{
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, ExecProcessRequest, WaitRequest, WaitResponse,
};
use kuasar_common::{
    api::host::{HostMount, PrepareRequest},
    constants::STDIO_WANTED,
    stdio::Stream,
};
use tokio::time::sleep;
use ttrpc::{
    Code, get_status,
    proto::{Request, Status},
};

use crate::{
    answer::{Answer, decode, encode, guest_error, host_error, host_pid, stdio_error},
    caller::Caller,
    guest::{Call, CallError, TASK_SERVICE},
    host::HostError,
    host_socket::{HostSocket, Served},
    log::log,
    registry::{Container, Process, lock},
    stdio::{Files, Opener, Stdio, StdioError, Wanted},
    streams::Names,
    task::{EXIT_KILLED, Relay, WORK_LIMIT, at_least, done, work},
};

/// Metadata key under which containerd names its namespace of a call, and the namespace of Kubernetes'
/// containers.
pub(crate) const NAMESPACE_METADATA: &str = "containerd-namespace-ttrpc";
const DEFAULT_NAMESPACE: &str = "k8s.io";
/// Exit status of a process whose own is not known.
const EXIT_UNKNOWN: u32 = 255;
/// Limit of tidying up in the guest after a failed Create.
const TIDY_LIMIT: Duration = Duration::from_secs(5);
/// Pause between attempts to wait for an exit.
const RETRY: Duration = Duration::from_secs(1);

impl Relay {
    pub(crate) async fn create(self: Arc<Self>, request: Request, caller: Caller) -> Answer {
        let create: CreateTaskRequest = decode(&request.payload)?;
        check_id("container id", &create.id)?;
        if !create.checkpoint.is_empty() {
            let why = "its microVM has no CRIU; create it without one";
            let text = format!("container {} cannot be restored from a checkpoint: {why}", create.id);
            return Err(get_status(Code::UNIMPLEMENTED, text));
        }
        let namespace = request.metadata.iter().find(|pair| pair.key == NAMESPACE_METADATA);
        let namespace = namespace.map_or(DEFAULT_NAMESPACE, |pair| &pair.value).to_owned();
        let container = Arc::new(Container::new(&create, namespace, caller));
        let _gate = Arc::clone(&container.gate).lock_owned().await;
        while let Err(other) = self.containers.add(&container) {
            if !other.is_abandoned() {
                let text = format!("creating container {}: its id is taken: already exists", create.id);
                return Err(get_status(Code::ALREADY_EXISTS, text));
            }
            // It is being taken back.
            drop(other.gate.lock().await);
        }
        let result = self.create_all(&container, create, &request).await;
        if let Err(status) = &result {
            log!("container {} is not created: {}", container.id, status.message());
            self.containers.remove(&container);
            container.init.deleted(EXIT_KILLED);
        }
        result
    }

    async fn create_all(
        self: &Arc<Self>,
        container: &Arc<Container>,
        create: CreateTaskRequest,
        request: &Request,
    ) -> Answer {
        let id = container.id.as_str();
        let doing = format!("creating container {id}");
        if self.guest.vm.is_dead() {
            return Err(guest_error(&doing, CallError::Dead));
        }
        let process = &container.init;
        let mut names = Names::default();
        let files = self.open_files(process, &mut names, false).map_err(|e| stdio_error(&doing, &e))?;
        self.pay_release(id).await.map_err(host_error)?;
        let (bundle, sockets, stdio) =
            self.prepare(&doing, process, files, &prepare_request(&create)).await?;
        match self.create_in_guest(container, &bundle, request).await {
            Ok(_) if container.is_abandoned() => {
                drop(stdio);
                self.undo_in_guest(id).await;
                self.release(id).await;
                let why = "whoever asked for it hung up before it was there, so it is taken back";
                Err(get_status(Code::ABORTED, format!("{doing}: {why}")))
            }
            // Nothing is waited for from here to the end, so that whoever asks next finds either all of it or
            // none.
            Ok(pid) => {
                *lock(&container.sockets) = Served::start(sockets, &self.guest);
                let watcher =
                    tokio::spawn(watch(Arc::clone(self), id.to_owned(), String::new(), Arc::clone(process)));
                process.created(pid, stdio, names, watcher.abort_handle());
                self.end_if_dead(process);
                log!("container {id} is created, process {pid}");
                encode(&CreateTaskResponse { pid, ..Default::default() })
            }
            Err(status) => {
                drop(stdio);
                self.release(id).await;
                Err(status)
            }
        }
    }

    /// Does the host's part and stdio's part of Create, which come before the guest's: the container's bundle
    /// on the host, the sockets of the host that it has mounted, and its stdio. On an error nothing of it
    /// stays.
    async fn prepare(
        self: &Arc<Self>,
        doing: &str,
        process: &Process,
        files: Files,
        request: &PrepareRequest,
    ) -> Result<(String, Vec<HostSocket>, Stdio), Status> {
        let id = request.container_id.as_str();
        let (prepared, stdio) = tokio::join!(
            self.host.prepare(request),
            Stdio::connect(files, &self.guest, id, "", &process.life)
        );
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(e) => {
                if matches!(e, HostError::Absent { .. }) {
                    self.owe_release(id);
                }
                return Err(host_error(e));
            }
        };
        let ready = stdio.map_err(|e| stdio_error(doing, &e)).and_then(|stdio| {
            let sockets: Result<Vec<_>, _> = prepared.sockets.iter().map(HostSocket::open).collect();
            let failed = |why| get_status(Code::FAILED_PRECONDITION, format!("{doing}: {why}"));
            Ok((sockets.map_err(failed)?, stdio))
        });
        match ready {
            Ok((sockets, stdio)) => Ok((prepared.bundle, sockets, stdio)),
            Err(status) => {
                self.release(id).await;
                Err(status)
            }
        }
    }

    async fn create_in_guest(
        &self,
        container: &Container,
        bundle: &str,
        request: &Request,
    ) -> Result<u32, Status> {
        let doing = format!("creating container {}", container.id);
        let (stdin, stdout, stderr) = marks(&container.init.wanted);
        let create = CreateTaskRequest {
            id: container.id.clone(),
            bundle: bundle.to_owned(),
            terminal: container.init.wanted.terminal,
            stdin,
            stdout,
            stderr,
            ..Default::default()
        };
        let call = Call {
            service: TASK_SERVICE,
            method: "Create",
            payload: encode(&create)?,
            metadata: request.metadata.clone(),
            limit: Some(at_least(WORK_LIMIT, request)),
            repeatable: false,
        };
        let error = match self.guest.call(call).await {
            Ok(payload) => {
                match host_pid(decode::<CreateTaskResponse>(&payload).map_or(0, |answer| answer.pid)) {
                    None => get_status(Code::INTERNAL, format!("{doing}: the guest named no process id")),
                    Some(pid) => return Ok(pid),
                }
            }
            Err(e @ (CallError::Status(_) | CallError::Dead)) => return Err(guest_error(&doing, e)),
            Err(e) => guest_error(&doing, e),
        };
        // Nobody knows how far the guest came.
        self.undo_in_guest(&container.id).await;
        Err(error)
    }

    /// Deletes in the guest what nobody was told of, if it is there.
    async fn undo_in_guest(&self, id: &str) {
        let delete = DeleteRequest { id: id.to_owned(), ..Default::default() };
        let Ok(payload) = encode(&delete) else { return };
        let call = Call {
            service: TASK_SERVICE,
            method: "Delete",
            payload,
            metadata: Vec::new(),
            limit: Some(TIDY_LIMIT),
            repeatable: true,
        };
        match self.guest.call(call).await {
            Err(CallError::Status(status)) if status.code() == Code::NOT_FOUND => {}
            Err(e) => log!("undoing container {id} in the guest: {e}"),
            Ok(_) => {}
        }
    }

    pub(crate) async fn exec(self: Arc<Self>, request: Request) -> Answer {
        let exec: ExecProcessRequest = decode(&request.payload)?;
        check_id("exec id", &exec.exec_id)?;
        let container = self.container(&exec.id)?;
        let doing = format!("exec {} in container {}", exec.exec_id, exec.id);
        if container.init.life.exit().is_some() {
            return Err(get_status(
                Code::FAILED_PRECONDITION,
                format!("{doing}: the container is not running"),
            ));
        }
        let Some(process) = container.add_exec(&exec) else {
            let text = format!("{doing}: its id is taken: already exists");
            return Err(get_status(Code::ALREADY_EXISTS, text));
        };
        let exec_id = exec.exec_id.clone();
        let result = self.exec_all(&container, &process, exec, &doing, request).await;
        if let Err(status) = &result {
            log!("exec {exec_id} in container {} is not made: {}", container.id, status.message());
            container.remove_exec(&exec_id);
            process.deleted(EXIT_KILLED);
        }
        result
    }

    async fn exec_all(
        self: &Arc<Self>,
        container: &Container,
        process: &Arc<Process>,
        mut exec: ExecProcessRequest,
        doing: &str,
        request: Request,
    ) -> Answer {
        let (id, exec_id) = (exec.id.clone(), exec.exec_id.clone());
        let failed = |e| stdio_error(doing, &e);
        let mut names = Names::default();
        let files = self.open_files(process, &mut names, true).map_err(failed)?;
        let stdio = Stdio::connect(files, &self.guest, &container.id, &exec_id, &process.life).await;
        let stdio = stdio.map_err(failed)?;
        (exec.stdin, exec.stdout, exec.stderr) = marks(&process.wanted);
        let limit = Some(at_least(WORK_LIMIT, &request));
        let call = Call { payload: encode(&exec)?, limit, ..work("Exec", request) };
        let payload = self.guest.call(call).await.map(done).map_err(|e| guest_error(doing, e))?;
        let watcher = tokio::spawn(watch(Arc::clone(self), id, exec_id, Arc::clone(process)));
        process.created(0, stdio, names, watcher.abort_handle());
        self.end_if_dead(process);
        Ok(payload)
    }

    fn open_files(&self, process: &Process, names: &mut Names, exec: bool) -> Result<Files, StdioError> {
        let opener = Opener { streams: &self.streams, outputs: &process.outputs, names, exec };
        Files::open(&process.wanted, opener)
    }

    /// The VM may have died between the guest's answer and the process's place in the registry.
    fn end_if_dead(&self, process: &Process) {
        if self.guest.vm.is_dead() {
            process.life.end(EXIT_KILLED);
            process.life.close();
        }
    }
}

/// Waits in the guest for a process's exit, across broken connections.
async fn watch(relay: Arc<Relay>, id: String, exec_id: String, process: Arc<Process>) {
    let what = if exec_id.is_empty() {
        format!("container {id}")
    } else {
        format!("exec {exec_id} of container {id}")
    };
    let wait = WaitRequest { id, exec_id, ..Default::default() };
    let Ok(payload) = encode(&wait) else { return };
    loop {
        let call = Call {
            service: TASK_SERVICE,
            method: "Wait",
            payload: payload.clone(),
            metadata: Vec::new(),
            limit: None,
            repeatable: true,
        };
        let status = match relay.guest.call(call).await {
            Ok(payload) => {
                decode::<WaitResponse>(&payload).map_or(EXIT_UNKNOWN, |response| response.exit_status)
            }
            Err(CallError::Dead) => {
                process.life.close();
                EXIT_KILLED
            }
            Err(CallError::Status(status)) if status.code() == Code::NOT_FOUND => EXIT_UNKNOWN,
            Err(e) => {
                log!("waiting for {what}: {e}");
                sleep(RETRY).await;
                continue;
            }
        };
        return process.life.end(status);
    }
}

/// Marks, for the guest, of the streams that are wanted.
fn marks(wanted: &Wanted) -> (String, String, String) {
    let mark = |stream| wanted.path(stream).map_or_else(String::new, |_| STDIO_WANTED.to_owned());
    (mark(Stream::Stdin), mark(Stream::Stdout), mark(Stream::Stderr))
}

fn prepare_request(create: &CreateTaskRequest) -> PrepareRequest {
    let mounts = create.rootfs.iter().map(|mount| HostMount {
        type_: mount.type_.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
        ..Default::default()
    });
    PrepareRequest {
        container_id: create.id.clone(),
        bundle: create.bundle.clone(),
        rootfs: mounts.collect(),
        terminal: create.terminal,
        ..Default::default()
    }
}

/// Ids become names of folders.
fn check_id(what: &str, id: &str) -> Result<(), Status> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if !id.is_empty() && id.len() <= 128 && id.bytes().all(fine) && !id.starts_with('.') {
        return Ok(());
    }
    let text = format!("{what} {id:?}: it takes 1 to 128 letters, digits and -_. and starts with no dot");
    Err(get_status(Code::INVALID_ARGUMENT, text))
}
