//! Doors for the fuzz targets: the parts that meet a guest's bytes, set up as they are in a pod.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest};
use kuasar_common::api::sandbox;
use protobuf::Message;
use tokio::io::{AsyncReadExt, DuplexStream, duplex};

pub use crate::{
    answer::{guest_status, quote},
    events::filter::{MAX_EVENT, Refused},
    pids::pids,
};
use crate::{
    caller::Waiting,
    events::filter::admit,
    life::Life,
    pump,
    registry::{Container, Registry},
    stdio::Sink,
};

/// Filter of a guest's events, in a pod with one container and one exec.
pub struct Events {
    pod: Registry,
    since: SystemTime,
}

impl Events {
    /// Knows a container that was created in a namespace of containerd's, and an exec of it.
    #[must_use]
    pub fn new(namespace: &str, container: &str, exec: &str) -> Self {
        let request =
            CreateTaskRequest { id: container.to_owned(), bundle: "/b".into(), ..Default::default() };
        let container = Container::new(&request, namespace.to_owned(), Waiting::new(None).1);
        let container = Arc::new(container);
        let exec = ExecProcessRequest { exec_id: exec.to_owned(), ..Default::default() };
        container.add_exec(&exec);
        let pod = Registry::default();
        let _ = pod.add(&container);
        Self { pod, since: SystemTime::now() - Duration::from_secs(60) }
    }

    /// Filters a guest's answer to `GetEvents` and returns the event for containerd, encoded; nothing if that
    /// answer makes no sense.
    ///
    /// # Errors
    /// Why containerd would get nothing.
    pub fn pass(&self, answer: &[u8]) -> Option<Result<Vec<u8>, Refused>> {
        let event = sandbox::Envelope::parse_from_bytes(answer).ok()?;
        let passed = admit(&event, &self.pod, self.since);
        Some(passed.map(|envelope| envelope.write_to_bytes().unwrap_or_default()))
    }
}

/// Everything that a process's output is after it went through the relay, as frames; the guest says `raw` and
/// hangs up.
pub async fn output(raw: &[u8]) -> Vec<u8> {
    let (ours, mut theirs): (DuplexStream, DuplexStream) = duplex(64 * 1024);
    let copy = async {
        let mut conn: crate::guest::Conn = Box::new(std::io::Cursor::new(raw.to_vec()));
        pump::until_broken(&mut Sink::Stream(ours), &mut conn, &Life::new()).await;
    };
    let mut frames = Vec::new();
    let read = async { theirs.read_to_end(&mut frames).await };
    let _ = tokio::join!(copy, read);
    frames
}
