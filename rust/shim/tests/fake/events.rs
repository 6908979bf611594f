//! Events: a guest's, and containerd's service for them.

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api,
    events::task::{TaskCreate, TaskDelete, TaskExit, TaskOOM, TaskPaused, TaskResumed},
    shim::event::Envelope,
    shim_async,
};
use kuasar_common::api::sandbox;
use protobuf::{Message, MessageField, well_known_types::any::Any};
use tokio::time::sleep;
use ttrpc::{
    Code,
    asynchronous::{Server, TtrpcContext},
    error::get_rpc_status,
};

use super::PATIENCE;

/// An event as the agent has it. The number of each is its place, counted from 1, unless it brings one.
pub fn event<M: Message>(topic: &str, message: &M) -> sandbox::Envelope {
    let value = message.write_to_bytes().unwrap();
    let any = Any { type_url: format!("containerd.events.{}", M::NAME), value, ..Default::default() };
    sandbox::Envelope {
        namespace: "k8s.io".into(),
        topic: topic.into(),
        event: MessageField::some(any),
        ..Default::default()
    }
}

/// Events of a container of its own words.
pub fn created(id: &str) -> sandbox::Envelope {
    event("/tasks/create", &TaskCreate { container_id: id.into(), pid: 100, ..Default::default() })
}

pub fn out_of_memory(id: &str) -> sandbox::Envelope {
    event("/tasks/oom", &TaskOOM { container_id: id.into(), ..Default::default() })
}

pub fn paused(id: &str) -> sandbox::Envelope {
    event("/tasks/paused", &TaskPaused { container_id: id.into(), ..Default::default() })
}

pub fn resumed(id: &str) -> sandbox::Envelope {
    event("/tasks/resumed", &TaskResumed { container_id: id.into(), ..Default::default() })
}

/// An exec's end, or the container's if `exec` is its id.
pub fn exited(id: &str, exec: &str) -> sandbox::Envelope {
    let (container_id, id) = (id.to_owned(), exec.to_owned());
    event("/tasks/exit", &TaskExit { container_id, id, pid: 100, exit_status: 7, ..Default::default() })
}

pub fn deleted(id: &str) -> sandbox::Envelope {
    event("/tasks/delete", &TaskDelete { container_id: id.into(), pid: 100, ..Default::default() })
}

/// containerd's service for events, which refuses those of resumed containers.
#[derive(Default)]
pub struct Events(pub Mutex<Vec<Envelope>>);

impl Events {
    pub async fn serve(self: &Arc<Self>, socket: &Path) -> Server {
        let events: Arc<dyn shim_async::Events + Send + Sync> = Arc::clone(self) as _;
        let service = shim_async::create_events(events);
        let mut server = Server::new().bind(&format!("unix://{}", socket.display())).unwrap();
        server = server.register_service(service);
        server.start().await.unwrap();
        server
    }

    /// Waits for so many, and names their topics.
    pub async fn wait_for(&self, count: usize) -> Vec<String> {
        for _ in 0..PATIENCE.as_millis() / 5 {
            let topics = self.topics();
            if topics.len() >= count {
                return topics;
            }
            sleep(Duration::from_millis(5)).await;
        }
        panic!("{:?} are not {count} events", self.topics());
    }

    pub fn topics(&self) -> Vec<String> {
        let all = self.0.lock().unwrap();
        all.iter().map(|envelope| format!("{} {}", envelope.namespace, envelope.topic)).collect()
    }

    /// The last one's payload.
    pub fn last<M: Message>(&self) -> M {
        M::parse_from_bytes(&self.0.lock().unwrap().last().unwrap().event.value).unwrap()
    }
}

#[async_trait]
impl shim_async::Events for Events {
    async fn forward(&self, _: &TtrpcContext, req: api::ForwardRequest) -> ttrpc::Result<api::Empty> {
        let envelope = req.envelope.unwrap();
        if envelope.topic == "/tasks/resumed" {
            return Err(get_rpc_status(Code::INVALID_ARGUMENT, "no"));
        }
        self.0.lock().unwrap().push(envelope);
        Ok(api::Empty::new())
    }
}
