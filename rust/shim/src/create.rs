//! Making and unmaking: Create, Exec and Delete, in which daemon, guest and stdio have to come together.

use std::{sync::Arc, time::Duration};

use containerd_shim_protos::{
    api::{
        CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, ExecProcessRequest,
        WaitRequest, WaitResponse,
    },
    protobuf::MessageField,
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
    answer::{Answer, decode, encode, guest_error, host_error, not_found, stdio_error},
    caller::Caller,
    guest::{Call, CallError, TASK_SERVICE},
    host::HostError,
    host_socket::{HostSocket, Served},
    life::Exit,
    log::log,
    registry::{Container, Process, lock},
    stdio::{Files, Opener, Stdio, StdioError, Wanted},
    streams::Names,
    task::{EXIT_KILLED, Relay, WORK_LIMIT, at_least, work},
};

/// Exit status of a process whose own is not known.
const EXIT_UNKNOWN: u32 = 255;
/// Limit of tidying up in the guest after a failed Create.
const TIDY_LIMIT: Duration = Duration::from_secs(5);
/// How often the daemon may fail to release before it is left to it.
const REFUSALS: u32 = 5;
/// Pause between attempts to wait for an exit, and to tell the daemon of a release.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));

impl Relay {
    pub(crate) async fn create(self: Arc<Self>, request: Request, caller: Caller) -> Answer {
        let create: CreateTaskRequest = decode(&request.payload)?;
        check_id("container id", &create.id)?;
        if !create.checkpoint.is_empty() {
            let why = "its microVM has no CRIU; create it without one";
            let text = format!("container {} cannot be restored from a checkpoint: {why}", create.id);
            return Err(get_status(Code::UNIMPLEMENTED, text));
        }
        let container = Arc::new(Container::new(&create, caller));
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
        let prepare = prepare_request(&create);
        let (prepared, stdio) = tokio::join!(
            self.host.prepare(&prepare),
            Stdio::connect(files, &self.guest, id, "", &process.life)
        );
        let (prepared, stdio) = match (prepared, stdio) {
            (Ok(prepared), Ok(stdio)) => (prepared, stdio),
            (Ok(_), Err(e)) => {
                self.release(id).await;
                return Err(stdio_error(&doing, &e));
            }
            (Err(e), _) => {
                if matches!(e, HostError::Absent { .. }) {
                    self.owe_release(id);
                }
                return Err(host_error(e));
            }
        };
        let sockets: Result<Vec<_>, _> = prepared.sockets.iter().map(HostSocket::open).collect();
        let sockets = match sockets {
            Ok(sockets) => sockets,
            Err(why) => {
                self.release(id).await;
                return Err(get_status(Code::FAILED_PRECONDITION, format!("{doing}: {why}")));
            }
        };
        match self.create_in_guest(container, &prepared.bundle, request).await {
            Ok(_) if container.is_abandoned() => {
                drop(stdio);
                self.undo_in_guest(id).await;
                self.release(id).await;
                let why = "whoever asked for it hung up before it was there, so it is taken back";
                Err(get_status(Code::ABORTED, format!("{doing}: {why}")))
            }
            // Nothing is waited for from here to the end, so that whoever asks next finds either all of it or none.
            Ok((pid, payload)) => {
                *lock(&container.sockets) = Served::start(sockets, &self.guest);
                let watcher =
                    tokio::spawn(watch(Arc::clone(self), id.to_owned(), String::new(), Arc::clone(process)));
                process.created(pid, stdio, names, watcher.abort_handle());
                self.end_if_dead(process);
                log!("container {id} is created, process {pid} in the guest");
                Ok(payload)
            }
            Err(status) => {
                drop(stdio);
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
    ) -> Result<(u32, Vec<u8>), Status> {
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
            Ok(payload) => match decode::<CreateTaskResponse>(&payload)?.pid {
                0 => get_status(Code::INTERNAL, format!("{doing}: the guest named no process id")),
                pid => return Ok((pid, payload)),
            },
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
        let payload = self.guest.call(call).await.map_err(|e| guest_error(doing, e))?;
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

    pub(crate) async fn delete(self: Arc<Self>, request: Request) -> Answer {
        let delete: DeleteRequest = decode(&request.payload)?;
        let missing = || not_found(&format!("container {}", delete.id));
        let container = self.containers.get(&delete.id).ok_or_else(missing)?;
        if !delete.exec_id.is_empty() {
            return self.delete_exec(&container, &delete.exec_id, request).await;
        }
        // Waits for a Create or another Delete that containerd did not wait for.
        let _gate = container.gate.lock().await;
        if !self.containers.holds(&container) {
            return Err(missing());
        }
        let answered = self.delete_in_guest(&format!("deleting container {}", container.id), request).await?;
        let response = deleted(&container.init, answered);
        drop(std::mem::take(&mut *lock(&container.sockets)));
        self.release(&container.id).await;
        self.containers.remove(&container);
        for process in container.processes() {
            process.deleted(EXIT_KILLED);
        }
        log!("container {} is deleted, exit status {}", container.id, response.exit_status);
        encode(&response)
    }

    async fn delete_exec(&self, container: &Container, exec_id: &str, request: Request) -> Answer {
        let what = format!("exec {exec_id} of container {}", container.id);
        let process = container.process(exec_id).ok_or_else(|| not_found(&what))?;
        let answered = self.delete_in_guest(&format!("deleting {what}"), request).await?;
        let response = deleted(&process, answered);
        container.remove_exec(exec_id);
        process.deleted(EXIT_KILLED);
        encode(&response)
    }

    /// Deletes in the guest; nothing if the guest has it no more.
    async fn delete_in_guest(&self, doing: &str, request: Request) -> Result<Option<DeleteResponse>, Status> {
        let limit = Some(at_least(WORK_LIMIT, &request));
        let call = Call { limit, repeatable: true, ..work("Delete", request) };
        match self.guest.call(call).await {
            Ok(payload) => decode(&payload).map(Some),
            Err(CallError::Dead) => Ok(None),
            Err(CallError::Status(status)) if status.code() == Code::NOT_FOUND => Ok(None),
            Err(e) => {
                let status = guest_error(doing, e);
                log!("{doing} in the guest: {}", status.message());
                Err(status)
            }
        }
    }

    /// Has the daemon undo what it prepared. If it cannot now, it is told later.
    async fn release(self: &Arc<Self>, id: &str) {
        let _one = self.releasing.lock().await;
        if let Err(e) = self.host.release(id).await {
            log!("{e}; trying again later");
            self.owe_release(id);
        }
    }

    /// Tells the daemon of a container's end as soon as it can be told.
    fn owe_release(self: &Arc<Self>, id: &str) {
        if !lock(&self.unreleased).insert(id.to_owned()) {
            return;
        }
        let (relay, id) = (Arc::clone(self), id.to_owned());
        tokio::spawn(async move {
            let (mut pause, mut refusals) = (RETRY.0, 0);
            // Then the daemon knows of it at least, and has its own recovery.
            while refusals < REFUSALS {
                sleep(pause).await;
                pause = (pause * 2).min(RETRY.1);
                match relay.pay_release(&id).await {
                    Ok(()) => return,
                    Err(HostError::Absent { .. }) => {}
                    Err(HostError::Refused(status)) => {
                        refusals += 1;
                        log!("releasing container {id}: {}", status.message());
                    }
                }
            }
            lock(&relay.unreleased).remove(&id);
        });
    }

    /// Releases an id if that is still owed.
    async fn pay_release(&self, id: &str) -> Result<(), HostError> {
        if !lock(&self.unreleased).contains(id) {
            return Ok(());
        }
        let _one = self.releasing.lock().await;
        if lock(&self.unreleased).contains(id) {
            self.host.release(id).await?;
            lock(&self.unreleased).remove(id);
        }
        Ok(())
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
                sleep(RETRY.0).await;
                continue;
            }
        };
        return process.life.end(status);
    }
}

/// The answer to Delete: what the relay knows of the exit comes first, then what the guest said.
fn deleted(process: &Process, answered: Option<DeleteResponse>) -> DeleteResponse {
    let status = answered.map_or(EXIT_KILLED, |response| response.exit_status);
    process.life.end(status);
    let Exit { status, .. } =
        process.life.exit().unwrap_or(Exit { status, at: std::time::SystemTime::now() });
    let exited_at =
        process.life.exit().map_or_else(MessageField::none, |exit| MessageField::some(exit.timestamp()));
    DeleteResponse { pid: process.pid(), exit_status: status, exited_at, ..Default::default() }
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
