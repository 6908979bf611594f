//! The filter of a guest's events. The relay tells containerd of a few kinds, about this pod's own processes.
//! It makes each event anew from its own knowledge of the process: of the guest's event remain that it
//! happened, and an exit status.
//!
//! containerd acts on the payload's type and on the ids in it, whatever the topic and the sender: a guest
//! whose events the relay passed on unchanged could end any container of the node.

use std::time::{Duration, SystemTime};

use containerd_shim_protos::{
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused,
        TaskResumed, TaskStart,
    },
    shim::event::Envelope,
    topics::{
        TASK_CREATE_EVENT_TOPIC, TASK_DELETE_EVENT_TOPIC, TASK_EXEC_ADDED_EVENT_TOPIC,
        TASK_EXEC_STARTED_EVENT_TOPIC, TASK_EXIT_EVENT_TOPIC, TASK_OOM_EVENT_TOPIC, TASK_PAUSED_EVENT_TOPIC,
        TASK_RESUMED_EVENT_TOPIC, TASK_START_EVENT_TOPIC,
    },
};
use kuasar_common::api::sandbox;
use protobuf::{
    Message, MessageField,
    well_known_types::{any::Any, timestamp::Timestamp},
};

use crate::{
    answer::host_pid,
    registry::{Registry, Subject, lock},
};

/// Longest payload of an event that is looked at, in bytes.
pub const MAX_EVENT: usize = 64 * 1024;

/// Why an event goes no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// A payload, a topic or a type beyond what the table has.
    #[error("it is longer than {MAX_EVENT} bytes")]
    TooLong,
    /// No kind that is passed on, or a topic that does not belong to the payload's type.
    #[error("its topic and type are none that a pod has")]
    Kind,
    /// The payload is no message of its type.
    #[error("it cannot be decoded")]
    Nonsense,
    /// Of a process that this pod does not have, or that containerd has been told of already.
    #[error("it is about no process of this pod, or containerd knows of it already")]
    Unknown,
    /// There were too many of its kind.
    #[error("there were too many of its kind")]
    TooMany,
}

/// Kinds of events. Those with a bit happen once in a process's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Create,
    Start,
    Exit,
    Delete,
    ExecAdded,
    ExecStarted,
    Paused,
    Resumed,
    OutOfMemory,
}

impl Kind {
    /// Topic and type, as containerd's own shims have them.
    const TABLE: [(Self, &'static str, &'static str); 9] = [
        (Self::Create, TASK_CREATE_EVENT_TOPIC, TaskCreate::NAME),
        (Self::Start, TASK_START_EVENT_TOPIC, TaskStart::NAME),
        (Self::Exit, TASK_EXIT_EVENT_TOPIC, TaskExit::NAME),
        (Self::Delete, TASK_DELETE_EVENT_TOPIC, TaskDelete::NAME),
        (Self::ExecAdded, TASK_EXEC_ADDED_EVENT_TOPIC, TaskExecAdded::NAME),
        (Self::ExecStarted, TASK_EXEC_STARTED_EVENT_TOPIC, TaskExecStarted::NAME),
        (Self::Paused, TASK_PAUSED_EVENT_TOPIC, TaskPaused::NAME),
        (Self::Resumed, TASK_RESUMED_EVENT_TOPIC, TaskResumed::NAME),
        (Self::OutOfMemory, TASK_OOM_EVENT_TOPIC, TaskOOM::NAME),
    ];
    const PREFIX: &'static str = "containerd.events.";

    fn of(topic: &str, type_url: &str) -> Option<(Self, &'static str, &'static str)> {
        let name = type_url.strip_prefix(Self::PREFIX)?;
        Self::TABLE.into_iter().find(|row| (row.1, row.2) == (topic, name))
    }

    /// Its bit, or 0 if it may come again.
    const fn once(self) -> u8 {
        match self {
            Self::Create => 1,
            Self::Start => 2,
            Self::Exit => 4,
            Self::Delete => 8,
            Self::ExecAdded => 16,
            Self::ExecStarted => 32,
            Self::Paused | Self::Resumed | Self::OutOfMemory => 0,
        }
    }
}

/// Fields that the relay takes from the guest's payload.
#[derive(Default)]
struct Said {
    container: String,
    exec: String,
    pid: u32,
    exit_status: u32,
}

/// The event for containerd, if there is to be one. `since` is when the pod began.
pub(crate) fn admit(
    event: &sandbox::Envelope,
    pod: &Registry,
    since: SystemTime,
) -> Result<Envelope, Refused> {
    let any = event.event.as_ref().ok_or(Refused::Nonsense)?;
    if any.value.len() > MAX_EVENT {
        return Err(Refused::TooLong);
    }
    let (kind, topic, name) = Kind::of(&event.topic, &any.type_url).ok_or(Refused::Kind)?;
    let said = said(kind, &any.value).ok_or(Refused::Nonsense)?;
    let subject = pod.subject(&said.container, &said.exec, kind.once()).ok_or(Refused::Unknown)?;
    // What nothing else bounds costs a token of its container's; what happens once needs none.
    if kind.once() == 0 && lock(&subject.container.repeated).take().is_err() {
        return Err(Refused::TooMany);
    }
    if kind.once() != 0 && !subject.process.tell(kind.once()) {
        return Err(Refused::Unknown);
    }
    let value = payload(kind, &subject, &said).map_err(|_| Refused::Nonsense)?;
    let type_url = format!("{}{name}", Kind::PREFIX);
    Ok(Envelope {
        timestamp: MessageField::some(when(event.timestamp_ns, since)),
        namespace: subject.container.namespace.clone(),
        topic: topic.to_owned(),
        event: MessageField::some(Any { type_url, value, ..Default::default() }),
        ..Default::default()
    })
}

/// The guest's time of an event, if it can be: events wait in the guest while containerd is away.
fn when(nanos: i64, since: SystemTime) -> Timestamp {
    let now = SystemTime::now();
    let given = u64::try_from(nanos).ok().map(Duration::from_nanos);
    let given = given.and_then(|since_epoch| SystemTime::UNIX_EPOCH.checked_add(since_epoch));
    Timestamp::from(given.filter(|time| (since..=now).contains(time)).unwrap_or(now))
}

fn said(kind: Kind, payload: &[u8]) -> Option<Said> {
    fn parse<M: Message>(payload: &[u8]) -> Option<M> {
        M::parse_from_bytes(payload).ok()
    }
    let of = |container: String| Said { container, ..Default::default() };
    let said = match kind {
        Kind::Create => {
            let event: TaskCreate = parse(payload)?;
            Said { pid: event.pid, ..of(event.container_id) }
        }
        Kind::Start => {
            let event: TaskStart = parse(payload)?;
            Said { pid: event.pid, ..of(event.container_id) }
        }
        Kind::Exit => {
            let event: TaskExit = parse(payload)?;
            // A container's own process has its id.
            let exec = if event.id == event.container_id { String::new() } else { event.id };
            let (pid, exit_status) = (event.pid, event.exit_status);
            Said { exec, pid, exit_status, ..of(event.container_id) }
        }
        Kind::Delete => {
            let event: TaskDelete = parse(payload)?;
            Said { pid: event.pid, exit_status: event.exit_status, ..of(event.container_id) }
        }
        Kind::ExecAdded => {
            let event: TaskExecAdded = parse(payload)?;
            Said { exec: event.exec_id, ..of(event.container_id) }
        }
        Kind::ExecStarted => {
            let event: TaskExecStarted = parse(payload)?;
            Said { exec: event.exec_id, pid: event.pid, ..of(event.container_id) }
        }
        Kind::Paused => of(parse::<TaskPaused>(payload)?.container_id),
        Kind::Resumed => of(parse::<TaskResumed>(payload)?.container_id),
        Kind::OutOfMemory => of(parse::<TaskOOM>(payload)?.container_id),
    };
    // An exec's event that names none would be taken for the container's own.
    let of_exec = matches!(kind, Kind::ExecAdded | Kind::ExecStarted);
    (!of_exec || !said.exec.is_empty()).then_some(said)
}

/// The payload as containerd's own shims would send it.
fn payload(kind: Kind, subject: &Subject, said: &Said) -> protobuf::Result<Vec<u8>> {
    let Subject { container, exec, process } = subject;
    let (container_id, exec_id) = (container.id.clone(), exec.clone());
    // The event may be faster than the answer that names the process.
    let pid = match process.pid() {
        0 => host_pid(said.pid).unwrap_or(0),
        pid => pid,
    };
    let exit = process.life.exit();
    let exit_status = exit.map_or(said.exit_status, |exit| exit.status);
    let exited_at =
        MessageField::some(exit.map_or_else(|| Timestamp::from(SystemTime::now()), |exit| exit.timestamp()));
    match kind {
        Kind::Create => {
            let (wanted, bundle) = (&process.wanted, container.bundle.clone());
            let io = TaskIO {
                stdin: wanted.stdin.clone(),
                stdout: wanted.stdout.clone(),
                stderr: wanted.stderr.clone(),
                terminal: wanted.terminal,
                ..Default::default()
            };
            let io = MessageField::some(io);
            TaskCreate { container_id, bundle, io, pid, ..Default::default() }.write_to_bytes()
        }
        Kind::Start => TaskStart { container_id, pid, ..Default::default() }.write_to_bytes(),
        Kind::Exit => {
            let id = if exec.is_empty() { container_id.clone() } else { exec_id };
            TaskExit { container_id, id, pid, exit_status, exited_at, ..Default::default() }.write_to_bytes()
        }
        Kind::Delete => {
            TaskDelete { container_id, pid, exit_status, exited_at, ..Default::default() }.write_to_bytes()
        }
        Kind::ExecAdded => TaskExecAdded { container_id, exec_id, ..Default::default() }.write_to_bytes(),
        Kind::ExecStarted => {
            TaskExecStarted { container_id, exec_id, pid, ..Default::default() }.write_to_bytes()
        }
        Kind::Paused => TaskPaused { container_id, ..Default::default() }.write_to_bytes(),
        Kind::Resumed => TaskResumed { container_id, ..Default::default() }.write_to_bytes(),
        Kind::OutOfMemory => TaskOOM { container_id, ..Default::default() }.write_to_bytes(),
    }
}
