//! A guest's events: whatever it says, containerd hears of this pod's container and exec, in their namespace,
//! and of nothing else.

use containerd_shim_protos::{
    events::task::{TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused},
    shim::event::Envelope,
};
use kuasar_common::{api::sandbox, constants::GUEST_PID_BASE};
use kuasar_relay::probe::{Events, MAX_EVENT};
use protobuf::{Message, MessageField, well_known_types::any::Any};

const NAMESPACE: &str = "k8s.io";
const CONTAINER: &str = "c1";
const EXEC: &str = "e1";

fn event(topic: &str, message: &impl Message, name: &str) -> Vec<u8> {
    let value = message.write_to_bytes().unwrap_or_default();
    let any = Any { type_url: format!("containerd.events.{name}"), value, ..Default::default() };
    let envelope = sandbox::Envelope {
        namespace: NAMESPACE.into(),
        topic: topic.into(),
        event: MessageField::some(any),
        sequence: 7,
        timestamp_ns: 1_900_000_000_000_000_000,
        ..Default::default()
    };
    envelope.write_to_bytes().unwrap_or_default()
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let (container_id, exec_id, pid) = (CONTAINER.to_owned(), EXEC.to_owned(), 42);
    let (id, exit_status) = (EXEC.to_owned(), 137);
    let exit = TaskExit { container_id, id, pid, exit_status, ..Default::default() };
    let container_id = || CONTAINER.to_owned();
    let create = TaskCreate { container_id: container_id(), bundle: "/etc".into(), pid, ..Default::default() };
    let added = TaskExecAdded { container_id: container_id(), exec_id, ..Default::default() };
    let exec_id = EXEC.to_owned();
    let started = TaskExecStarted { container_id: container_id(), exec_id, pid, ..Default::default() };
    let delete = TaskDelete { container_id: container_id(), pid, ..Default::default() };
    let oom = TaskOOM { container_id: container_id(), ..Default::default() };
    let paused = TaskPaused { container_id: container_id(), ..Default::default() };
    vec![
        event("/tasks/create", &create, "TaskCreate"),
        event("/tasks/exit", &exit, "TaskExit"),
        event("/tasks/oom", &exit, "TaskExit"),
        event("/tasks/oom", &oom, "TaskOOM"),
        event("/tasks/delete", &delete, "TaskDelete"),
        event("/tasks/exec-added", &added, "TaskExecAdded"),
        event("/tasks/exec-started", &started, "TaskExecStarted"),
        event("/tasks/paused", &paused, "TaskPaused"),
    ]
}

pub(crate) fn run(input: &[u8]) {
    let pod = Events::new(NAMESPACE, CONTAINER, EXEC);
    let Some(Ok(passed)) = pod.pass(input) else { return };
    assert!(passed.len() < MAX_EVENT);
    let envelope = Envelope::parse_from_bytes(&passed).unwrap_or_default();
    assert_eq!(envelope.namespace, NAMESPACE);
    assert!(envelope.timestamp.is_some() && envelope.event.is_some());
    let value = envelope.event.value.as_slice();
    // Field 1 of each kind is the container's id.
    let named = TaskOOM::parse_from_bytes(value).unwrap_or_default();
    assert_eq!(named.container_id, CONTAINER);
    let kind = (envelope.topic.as_str(), envelope.event.type_url.as_str());
    let (pid, exec) = match kind {
        ("/tasks/create", "containerd.events.TaskCreate") => {
            let event = TaskCreate::parse_from_bytes(value).unwrap_or_default();
            assert_eq!((event.bundle.as_str(), event.rootfs.len(), event.checkpoint.as_str()), ("/b", 0, ""));
            (event.pid, String::new())
        }
        ("/tasks/start", "containerd.events.TaskStart") => (0, String::new()),
        ("/tasks/exit", "containerd.events.TaskExit") => {
            let event = TaskExit::parse_from_bytes(value).unwrap_or_default();
            (event.pid, if event.id == CONTAINER { String::new() } else { event.id })
        }
        ("/tasks/delete", "containerd.events.TaskDelete") => {
            let event = TaskDelete::parse_from_bytes(value).unwrap_or_default();
            (event.pid, event.id)
        }
        ("/tasks/exec-added", "containerd.events.TaskExecAdded")
        | ("/tasks/exec-started", "containerd.events.TaskExecStarted") => {
            let event = TaskExecStarted::parse_from_bytes(value).unwrap_or_default();
            assert_eq!(event.exec_id, EXEC);
            (event.pid, event.exec_id)
        }
        ("/tasks/paused", "containerd.events.TaskPaused")
        | ("/tasks/resumed", "containerd.events.TaskResumed")
        | ("/tasks/oom", "containerd.events.TaskOOM") => (0, String::new()),
        other => (u32::MAX, format!("{other:?} is in no table")),
    };
    assert!(pid == 0 || pid >= GUEST_PID_BASE, "{pid} may be a process of the host's");
    assert!(exec.is_empty() || exec == EXEC, "{exec:?} is none of this pod's");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_pass_but_for_the_forged_one() {
        for (number, seed) in seeds().iter().enumerate() {
            let passed = Events::new(NAMESPACE, CONTAINER, EXEC).pass(seed).unwrap();
            assert_eq!(passed.is_ok(), number != 2, "{number}: {passed:?}");
            run(seed);
        }
    }
}
