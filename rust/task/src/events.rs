//! Events of containers, in containerd's form, kept for the host to fetch.
//!
//! A publisher never waits: a full queue drops its oldest event. Events are numbered, so that the host sees
//! the gap and reads the state of all containers again.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use containerd_shim_protos::{
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused,
        TaskResumed, TaskStart,
    },
    topics::{
        TASK_CREATE_EVENT_TOPIC, TASK_DELETE_EVENT_TOPIC, TASK_EXEC_ADDED_EVENT_TOPIC,
        TASK_EXEC_STARTED_EVENT_TOPIC, TASK_EXIT_EVENT_TOPIC, TASK_OOM_EVENT_TOPIC, TASK_PAUSED_EVENT_TOPIC,
        TASK_RESUMED_EVENT_TOPIC, TASK_START_EVENT_TOPIC,
    },
};
use kuasar_common::api::sandbox::Envelope;
use protobuf::{Message, MessageField, well_known_types::any::Any};
use tokio::sync::watch;

use crate::{
    clock::now_ns,
    container::Container,
    error::TaskError,
    process::Process,
    reaper::{Exit, timestamp},
};

/// Most events that are kept: some minutes of a busy pod, and a few hundred KiB at most.
pub const KEPT: usize = 1024;

/// The queue.
pub struct Events {
    ring: Mutex<Ring>,
    last: watch::Sender<u64>,
}

#[derive(Default)]
struct Ring {
    kept: VecDeque<Envelope>,
    /// The last that a request without a number was answered with.
    handed_out: u64,
}

impl Default for Events {
    fn default() -> Self {
        Self { ring: Mutex::default(), last: watch::Sender::new(0) }
    }
}

impl Events {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event. The oldest goes if there are [`KEPT`] already.
    pub fn publish<M: Message>(&self, namespace: &str, topic: &str, event: &M) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => return log::warn!("event {topic} is lost: {error}"),
        };
        let mut ring = self.ring();
        let sequence = *self.last.borrow() + 1;
        let mut envelope = Envelope::new();
        envelope.timestamp_ns = now_ns();
        namespace.clone_into(&mut envelope.namespace);
        topic.clone_into(&mut envelope.topic);
        let type_url = format!("containerd.events.{}", M::NAME);
        envelope.event = MessageField::some(Any { type_url, value, ..Default::default() });
        envelope.sequence = sequence;
        if ring.kept.len() == KEPT {
            ring.kept.pop_front();
        }
        ring.kept.push_back(envelope);
        drop(ring);
        self.last.send_replace(sequence);
    }

    /// The first event after the one of this number that is still kept; waits for one if there is none.
    /// Without a number, the first that was not handed out so before.
    ///
    /// # Errors
    /// When the number is none that was given out yet.
    pub async fn next(&self, after: Option<u64>) -> Result<Envelope, TaskError> {
        let mut last = self.last.subscribe();
        loop {
            let newest = *last.borrow_and_update();
            if let Some(after) = after.filter(|after| *after > newest) {
                return Err(TaskError::InvalidArgument(format!(
                    "there was no event {after} yet, the last was {newest}; read the state of all containers and go on \
                     after that"
                )));
            }
            if let Some(event) = self.first_after(after) {
                return Ok(event);
            }
            // The sender lives in `self`.
            let _ = last.changed().await;
        }
    }

    fn first_after(&self, after: Option<u64>) -> Option<Envelope> {
        let mut ring = self.ring();
        let after_or = after.unwrap_or(ring.handed_out);
        let oldest = ring.kept.front()?.sequence;
        let skip = usize::try_from((after_or + 1).saturating_sub(oldest)).unwrap_or(usize::MAX);
        let event = ring.kept.get(skip)?.clone();
        if after.is_none() {
            ring.handed_out = event.sequence;
        }
        Some(event)
    }
}

/// One per kind of event.
impl Events {
    /// A container was created; `bundle` and streams are those of the request.
    pub fn created(&self, container: &Container) {
        let stdio = &container.init.stdio;
        let mut io = TaskIO::new();
        (io.stdin, io.stdout, io.stderr) = (stdio.stdin.clone(), stdio.stdout.clone(), stdio.stderr.clone());
        io.terminal = stdio.terminal;
        let mut event = TaskCreate::new();
        (event.container_id, event.bundle) = (container.id.clone(), container.bundle.clone());
        event.io = MessageField::some(io);
        event.pid = container.init.pid_u32();
        self.publish(&container.namespace, TASK_CREATE_EVENT_TOPIC, &event);
    }

    /// A container was started.
    pub fn started(&self, container: &Container) {
        let mut event = TaskStart::new();
        (event.container_id, event.pid) = (container.id.clone(), container.init.pid_u32());
        self.publish(&container.namespace, TASK_START_EVENT_TOPIC, &event);
    }

    /// A process was noted.
    pub fn exec_added(&self, container: &Container, exec_id: &str) {
        let mut event = TaskExecAdded::new();
        (event.container_id, event.exec_id) = (container.id.clone(), exec_id.to_owned());
        self.publish(&container.namespace, TASK_EXEC_ADDED_EVENT_TOPIC, &event);
    }

    /// A noted process was started.
    pub fn exec_started(&self, container: &Container, exec_id: &str, process: &Process) {
        let mut event = TaskExecStarted::new();
        (event.container_id, event.exec_id) = (container.id.clone(), exec_id.to_owned());
        event.pid = process.pid_u32();
        self.publish(&container.namespace, TASK_EXEC_STARTED_EVENT_TOPIC, &event);
    }

    /// A process has ended; once for each, however often this is called. `exec_id` is empty for a container's
    /// own.
    pub fn exited(&self, container: &Container, exec_id: &str, process: &Process) {
        // One that could not be started never was, as in containerd's own shims.
        let Some(exit) = process.exit().filter(|_| process.pid() > 0 && process.announce()) else { return };
        let mut event = TaskExit::new();
        event.container_id.clone_from(&container.id);
        event.id = if exec_id.is_empty() { &container.id } else { exec_id }.to_owned();
        (event.pid, event.exit_status, event.exited_at) = (process.pid_u32(), exit.code, timestamp(&exit));
        self.publish(&container.namespace, TASK_EXIT_EVENT_TOPIC, &event);
    }

    /// A container was deleted.
    pub fn deleted(&self, container: &Container, exit: &Exit) {
        let mut event = TaskDelete::new();
        (event.container_id, event.pid) = (container.id.clone(), container.init.pid_u32());
        (event.exit_status, event.exited_at) = (exit.code, timestamp(exit));
        self.publish(&container.namespace, TASK_DELETE_EVENT_TOPIC, &event);
    }

    /// A container was frozen, or thawed.
    pub fn frozen(&self, container: &Container, freeze: bool) {
        let (id, namespace) = (container.id.clone(), &container.namespace);
        if freeze {
            let event = TaskPaused { container_id: id, ..Default::default() };
            self.publish(namespace, TASK_PAUSED_EVENT_TOPIC, &event);
        } else {
            let event = TaskResumed { container_id: id, ..Default::default() };
            self.publish(namespace, TASK_RESUMED_EVENT_TOPIC, &event);
        }
    }

    /// The kernel killed something in a container for want of memory.
    pub fn out_of_memory(&self, container: &Container) {
        let event = TaskOOM { container_id: container.id.clone(), ..Default::default() };
        self.publish(&container.namespace, TASK_OOM_EVENT_TOPIC, &event);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    fn publish(events: &Events, id: &str) {
        let event = TaskOOM { container_id: id.to_owned(), ..Default::default() };
        events.publish("k8s.io", TASK_OOM_EVENT_TOPIC, &event);
    }

    async fn nothing(events: &Events, after: Option<u64>) -> bool {
        timeout(Duration::from_millis(20), events.next(after)).await.is_err()
    }

    #[tokio::test]
    async fn a_host_that_names_the_last_it_has_misses_none() {
        let events = Events::default();
        assert!(nothing(&events, Some(0)).await);
        publish(&events, "a");
        publish(&events, "b");
        // However often it asks: an answer that got lost is given again.
        for _ in 0..2 {
            let first = events.next(Some(0)).await.unwrap();
            assert_eq!(
                (first.sequence, first.topic.as_str(), first.namespace.as_str()),
                (1, "/tasks/oom", "k8s.io")
            );
            assert!(first.timestamp_ns > 0);
            let event = first.event.unwrap();
            assert_eq!(event.type_url, "containerd.events.TaskOOM");
            assert_eq!(TaskOOM::parse_from_bytes(&event.value).unwrap().container_id, "a");
            assert_eq!(events.next(Some(1)).await.unwrap().sequence, 2);
        }
        assert!(nothing(&events, Some(2)).await);
    }

    #[tokio::test]
    async fn several_wait_and_all_get_it() {
        let events = Events::default();
        let (one, other, ()) = tokio::join!(events.next(Some(0)), events.next(Some(0)), async {
            tokio::task::yield_now().await;
            publish(&events, "a");
        });
        assert_eq!((one.unwrap().sequence, other.unwrap().sequence), (1, 1));
    }

    #[tokio::test]
    async fn a_full_queue_drops_the_oldest_and_the_gap_shows() {
        let events = Events::default();
        let published = KEPT as u64 + 5;
        for _ in 0..published {
            publish(&events, "a");
        }
        assert_eq!(events.ring().kept.len(), KEPT);
        assert_eq!(events.next(Some(0)).await.unwrap().sequence, 6, "1 to 5 are lost");
        assert_eq!(events.next(Some(5)).await.unwrap().sequence, 6);
        assert_eq!(events.next(Some(6)).await.unwrap().sequence, 7);
        assert_eq!(events.next(Some(published - 1)).await.unwrap().sequence, published);
        assert!(nothing(&events, Some(published)).await);
    }

    #[tokio::test]
    async fn a_number_from_another_life_is_refused() {
        let events = Events::default();
        publish(&events, "a");
        for after in [2, u64::MAX] {
            let error = events.next(Some(after)).await.unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("there was no event {after} yet, the last was 1;")),
                "{error}"
            );
        }
    }

    #[tokio::test]
    async fn without_a_number_each_comes_once() {
        let events = Events::default();
        publish(&events, "a");
        publish(&events, "b");
        assert_eq!(events.next(None).await.unwrap().sequence, 1);
        assert_eq!(events.next(None).await.unwrap().sequence, 2);
        assert!(nothing(&events, None).await);
        assert_eq!(events.next(Some(0)).await.unwrap().sequence, 1);
    }
}
