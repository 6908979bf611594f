//! The Task service: what containerd calls, and where each call goes.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CloseIORequest, ConnectRequest, ConnectResponse, KillRequest, StartResponse, StateRequest,
    UpdateTaskRequest, WaitResponse,
};
use kuasar_common::api::host::UpdateRequest;
use protobuf::MessageField;
use tokio::time::timeout;
use ttrpc::{
    Code,
    asynchronous::{MethodHandler, Service, TtrpcContext},
    get_status,
    proto::{KeyValue, Request, Response},
};

use crate::{
    answer::{Answer, decode, encode, guest_error, host_error, host_pid, not_found, response},
    caller::{Caller, Waiting},
    create::NAMESPACE_METADATA,
    figures::{self, figures},
    guest::{Call, CallError, Guest, PROBE_LIMIT, TASK_SERVICE},
    host::Host,
    log::log,
    pids::{self, pids},
    registry::{Container, Phase, Process, Registry, lock},
    streams::Streams,
};

/// Exit status of what was killed by a signal 9, as shells have it: also of everything in a VM that died.
pub(crate) const EXIT_KILLED: u32 = 137;
/// Limit of calls that change a container: containerd's own deadline does not end them half way.
pub(crate) const WORK_LIMIT: Duration = Duration::from_secs(120);
/// Limit of other calls that bring none.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// Longest time that a guest may take to send a signal before the relay asks it whether it is there at all.
const KILL_LIMIT: Duration = Duration::from_secs(10);
const SIGKILL: u32 = 9;
/// Longest time that an exit waits for containerd to read the process's streams to their ends.
const READ_LIMIT: Duration = Duration::from_secs(4);

/// Every method of the Task service.
const METHODS: [&str; 17] = [
    "State",
    "Create",
    "Start",
    "Delete",
    "Pids",
    "Pause",
    "Resume",
    "Checkpoint",
    "Kill",
    "Exec",
    "ResizePty",
    "CloseIO",
    "Update",
    "Wait",
    "Stats",
    "Connect",
    "Shutdown",
];

/// One pod's relay.
pub(crate) struct Relay {
    pub(crate) guest: Arc<Guest>,
    pub(crate) host: Host,
    pub(crate) containers: Registry,
    pub(crate) streams: Arc<Streams>,
    /// Containers that are gone but for the daemon, which has yet to be told.
    pub(crate) unreleased: Mutex<HashSet<String>>,
    /// One release at a time, so that a late one cannot hit a new container of the same id.
    pub(crate) releasing: tokio::sync::Mutex<()>,
}

impl Relay {
    pub(crate) fn new(guest: Guest, host: Host) -> Arc<Self> {
        let relay = Arc::new(Self {
            guest: Arc::new(guest),
            host,
            containers: Registry::default(),
            streams: Arc::default(),
            unreleased: Mutex::default(),
            releasing: tokio::sync::Mutex::default(),
        });
        tokio::spawn(end_with_vm(Arc::clone(&relay)));
        relay
    }

    /// The ttrpc service over it.
    pub(crate) fn service(self: &Arc<Self>) -> HashMap<String, Service> {
        let method = |method: &'static str| {
            let handler: Box<dyn MethodHandler + Send + Sync> =
                Box::new(Method { relay: Arc::clone(self), method });
            (method.to_owned(), handler)
        };
        let methods = METHODS.into_iter().map(method).collect();
        HashMap::from([(TASK_SERVICE.to_owned(), Service { methods, streams: HashMap::new() })])
    }

    /// A container that was created and is not deleted.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, ttrpc::proto::Status> {
        let found = self.containers.get(id).filter(|found| found.init.phase() != Phase::Creating);
        found.ok_or_else(|| not_found(&format!("container {id}")))
    }

    /// The container and process that a request names in its fields 1 and 2.
    fn process(
        &self,
        payload: &[u8],
    ) -> Result<(Arc<Container>, Arc<Process>, String), ttrpc::proto::Status> {
        let named: StateRequest = decode(payload)?;
        let container = self.container(&named.id)?;
        let process = container.process(&named.exec_id);
        let process =
            process.ok_or_else(|| not_found(&format!("exec {} of container {}", named.exec_id, named.id)))?;
        Ok((container, process, named.exec_id))
    }

    /// The container that a request names in its field 1.
    fn named(&self, payload: &[u8]) -> Result<Arc<Container>, ttrpc::proto::Status> {
        let named: ConnectRequest = decode(payload)?;
        self.container(&named.id)
    }

    async fn handle(self: Arc<Self>, method: &'static str, request: Request, caller: Caller) -> Answer {
        match method {
            "Create" => Box::pin(self.create(request, caller)).await,
            "Exec" => Box::pin(self.exec(request)).await,
            "Delete" => Box::pin(self.delete(request)).await,
            "Start" => Box::pin(self.start(request)).await,
            "State" => self.process(&request.payload).and_then(|(c, p, exec)| encode(&p.describe(&c, &exec))),
            "Connect" => self.named(&request.payload).and_then(|container| {
                let (shim_pid, task_pid) = (std::process::id(), container.init.pid());
                encode(&ConnectResponse { shim_pid, task_pid, ..Default::default() })
            }),
            // containerd sends it after failed creates, at restarts and, some day, after each Delete. Only
            // the sandbox's end ends a relay.
            "Shutdown" => Ok(Vec::new()),
            "Checkpoint" => self.named(&request.payload).and_then(|container| {
                let why = "its microVM has no CRIU; stop it and start another";
                let text = format!("container {} cannot be checkpointed: {why}", container.id);
                Err(get_status(Code::UNIMPLEMENTED, text))
            }),
            "CloseIO" => {
                let (_, process, _) = self.process(&request.payload)?;
                if decode::<CloseIORequest>(&request.payload)?.stdin {
                    process.close_stdin();
                }
                Ok(Vec::new())
            }
            "Kill" => self.kill(request).await,
            "Update" => self.update(request).await,
            "Pids" => self.pids(request).await,
            "Stats" => self.stats(request).await,
            "Pause" => self.pause(method, request, Phase::Paused).await,
            "Resume" => self.pause(method, request, Phase::Running).await,
            "ResizePty" => {
                self.process(&request.payload)?;
                self.forward(method, request).await
            }
            _ => {
                self.named(&request.payload)?;
                self.forward(method, request).await
            }
        }
    }

    /// Passes a call on as it is, within the caller's time. Such calls have no answer but that they were
    /// done.
    async fn forward(&self, method: &'static str, request: Request) -> Answer {
        let limit = caller_s(&request).unwrap_or(CALL_LIMIT);
        let Request { payload, metadata, .. } = request;
        let call =
            Call { service: TASK_SERVICE, method, payload, metadata, limit: Some(limit), repeatable: false };
        self.guest.call(call).await.map(done).map_err(|e| guest_error(method, e))
    }

    /// CPUs and memory nodes are the host's: the daemon sets them. All else the guest does.
    async fn update(&self, request: Request) -> Answer {
        let container = self.named(&request.payload)?;
        let resources = decode::<UpdateTaskRequest>(&request.payload)?.resources.unwrap_or_default().value;
        if [br#""cpus""#, br#""mems""#]
            .iter()
            .any(|key| resources.windows(key.len()).any(|part| part == *key))
        {
            let update =
                UpdateRequest { container_id: container.id.clone(), resources, ..Default::default() };
            self.host.update(&update).await.map_err(host_error)?;
        }
        self.forward("Update", request).await
    }

    async fn wait(self: Arc<Self>, request: Request) -> Answer {
        let (_, process, _) = self.process(&request.payload)?;
        let exit = process.life.ended().await;
        // containerd gives up its streams when it learns of the exit, and the end of a log with them.
        let _ = timeout(READ_LIMIT, process.outputs.read()).await;
        let exited_at = MessageField::some(exit.timestamp());
        encode(&WaitResponse { exit_status: exit.status, exited_at, ..Default::default() })
    }

    /// Starts a process. If the guest cannot, containerd waits for the end of its streams before it deletes
    /// it.
    async fn start(&self, request: Request) -> Answer {
        let (container, process, exec) = self.process(&request.payload)?;
        let what = name(&container, &exec);
        let call = Call { limit: Some(at_least(WORK_LIMIT, &request)), ..work("Start", request) };
        let started = match self.guest.call(call).await {
            Ok(payload) => host_pid(decode::<StartResponse>(&payload).map_or(0, |response| response.pid))
                .ok_or_else(|| {
                    get_status(Code::INTERNAL, format!("starting {what}: the guest named no process id"))
                }),
            Err(e) => Err(guest_error(&format!("starting {what}"), e)),
        };
        match started {
            Ok(pid) => {
                process.started(pid);
                encode(&StartResponse { pid: process.pid(), ..Default::default() })
            }
            Err(status) => {
                log!("{what} does not start: {}", status.message());
                process.close();
                Err(status)
            }
        }
    }

    async fn kill(self: &Arc<Self>, request: Request) -> Answer {
        let (container, process, exec) = self.process(&request.payload)?;
        let doing = format!("killing {}", name(&container, &exec));
        let finished = || not_found(&format!("{doing}: process already finished"));
        if process.life.exit().is_some() {
            return Err(finished());
        }
        if !exec.is_empty() {
            return self.forward("Kill", request).await;
        }
        let last = decode::<KillRequest>(&request.payload)?.signal == SIGKILL;
        let call = Call { limit: Some(KILL_LIMIT), repeatable: last, ..work("Kill", request) };
        match self.guest.call(call).await {
            Err(CallError::Dead) => Err(finished()),
            Err(e @ CallError::Timeout(_)) if self.guest.is_silent().await => {
                if !last {
                    // An error would end containerd's StopContainer; without one, SIGKILL follows after the
                    // grace period.
                    log!("{doing}: {e}, nor does it answer anything else: SIGKILL will end its VM");
                    return Ok(Vec::new());
                }
                log!("{doing}: {e}, nor does it answer anything else: killing the VM");
                self.guest.vm.kill().map_err(|e| get_status(Code::INTERNAL, format!("{doing}: {e}")))?;
                let gone = timeout(KILL_LIMIT, process.life.ended()).await;
                gone.map(|_| Vec::new()).map_err(|_| guest_error(&doing, e))
            }
            answer => {
                if last && answer.is_ok() {
                    self.look_after_killed(&container);
                }
                answer.map(done).map_err(|e| guest_error(&doing, e))
            }
        }
    }

    /// Never empty: containerd forgets a task without processes when it restarts, exit code and all.
    async fn pids(&self, request: Request) -> Answer {
        let container = self.named(&request.payload)?;
        if container.init.life.exit().is_none() {
            let call = Call { limit: Some(probe(&request)), repeatable: true, ..work("Pids", request) };
            match self.guest.probe(call).await {
                Ok(payload) => match pids(&payload, |exec| container.process(exec).is_some()) {
                    Some(answer) => return Ok(answer),
                    None => log!("Pids of container {}: the guest answered with nonsense", container.id),
                },
                Err(CallError::Status(_)) => {}
                Err(e) => log!("Pids of container {}: {e}", container.id),
            }
        }
        encode(&pids::one(container.init.pid()))
    }

    /// The guest's figures, or the last good ones, or none: an error would cost containerd the figures of the
    /// whole node.
    async fn stats(&self, request: Request) -> Answer {
        let container = self.named(&request.payload)?;
        let call = Call { limit: Some(probe(&request)), repeatable: true, ..work("Stats", request) };
        let answered = match self.guest.probe(call).await {
            Ok(payload) => figures(&payload).ok_or_else(|| "they are nonsense".to_owned()),
            Err(e) => Err(e.to_string()),
        };
        let mut last = lock(&container.stats);
        if let Ok(figures) = answered {
            return Ok(last.insert(figures).clone());
        }
        Ok(last.clone().unwrap_or_else(figures::none))
    }

    async fn pause(&self, method: &'static str, request: Request, phase: Phase) -> Answer {
        let container = self.named(&request.payload)?;
        let answer = self.forward(method, request).await?;
        container.init.set_phase(phase);
        Ok(answer)
    }
}

/// A process, for people.
fn name(container: &Container, exec_id: &str) -> String {
    if exec_id.is_empty() {
        format!("container {}", container.id)
    } else {
        format!("exec {exec_id} of container {}", container.id)
    }
}

/// When the VM dies, every process in it does. The relay stays to say so.
async fn end_with_vm(relay: Arc<Relay>) {
    relay.guest.vm.dead().await;
    for process in relay.containers.all().iter().flat_map(|container| container.processes()) {
        process.life.end(EXIT_KILLED);
        process.life.close();
    }
}

/// The answer to calls that have nothing to say: of the guest's bytes none is taken.
pub(crate) fn done(_: Vec<u8>) -> Vec<u8> {
    Vec::new()
}

/// A call that passes a request on, without a limit.
pub(crate) fn work(method: &'static str, request: Request) -> Call {
    let Request { payload, metadata, .. } = request;
    Call { service: TASK_SERVICE, method, payload, metadata, limit: None, repeatable: false }
}

/// The caller's limit, or `least` if that is longer.
pub(crate) fn at_least(least: Duration, request: &Request) -> Duration {
    caller_s(request).map_or(least, |limit| limit.max(least))
}

fn probe(request: &Request) -> Duration {
    caller_s(request).map_or(PROBE_LIMIT, |limit| limit.min(PROBE_LIMIT))
}

fn caller_s(request: &Request) -> Option<Duration> {
    u64::try_from(request.timeout_nano).ok().filter(|nanos| *nanos > 0).map(Duration::from_nanos)
}

/// One method of the service.
struct Method {
    relay: Arc<Relay>,
    method: &'static str,
}

#[async_trait]
impl MethodHandler for Method {
    async fn handler(&self, _: TtrpcContext, mut request: Request) -> ttrpc::Result<Response> {
        let relay = Arc::clone(&self.relay);
        // Values that are none of the guest's business, or that it could take for ours, stay here.
        request.metadata.retain(|pair: &KeyValue| pair.key == NAMESPACE_METADATA);
        let answer = if self.method == "Wait" {
            relay.wait(request).await
        } else {
            // A task of its own: neither a dropped connection nor an expired deadline leaves work half done.
            let (waiting, caller) = Waiting::new(caller_s(&request));
            let work = tokio::spawn(relay.handle(self.method, request, caller));
            let answer = work
                .await
                .unwrap_or_else(|e| Err(get_status(Code::INTERNAL, format!("{}: {e}", self.method))));
            waiting.answered();
            answer
        };
        Ok(response(answer))
    }
}
