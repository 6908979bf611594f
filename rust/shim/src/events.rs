//! Passes on to containerd what happens to containers in the guest: it learns of nothing by itself, and kubelet's reason
//! OOMKilled comes from an event alone. The guest keeps events until they are asked for by number, so a containerd that
//! restarts misses none.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_shim_protos::shim::{event::Envelope, events::ForwardRequest};
use kuasar_common::api::sandbox::{self, GetEventsRequest};
use protobuf::{Message, MessageField, well_known_types::timestamp::Timestamp};
use tokio::{
    net::UnixStream,
    time::{sleep, timeout},
};
use ttrpc::{
    asynchronous::{Client, transport::Socket},
    proto::Request,
};

use crate::{
    guest::{Call, CallError, Guest, SANDBOX_SERVICE},
    log::log,
};

const EVENTS_SERVICE: &str = "containerd.services.events.ttrpc.v1.Events";
/// Longest wait for containerd's answer.
const FORWARD_LIMIT: Duration = Duration::from_secs(10);
/// Pauses between attempts to reach containerd, or a guest that refuses.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Why an event did not reach containerd.
#[derive(Debug, thiserror::Error)]
enum ForwardError {
    #[error("connecting to containerd's {path}: {source}")]
    Connect { path: PathBuf, source: io::Error },
    #[error("containerd did not take the event: {0}")]
    Call(#[from] ttrpc::Error),
    #[error("containerd did not answer within {} s", FORWARD_LIMIT.as_secs())]
    Timeout,
}

/// Forwards events until the VM has ended. `containerd` is its gRPC socket.
pub(crate) async fn forward(guest: &Guest, containerd: &Path) {
    let mut socket = containerd.as_os_str().to_owned();
    socket.push(".ttrpc");
    let mut containerd = Containerd { path: socket.into(), client: None };
    let (mut after, mut pause) = (0, RETRY.0);
    loop {
        match next(guest, after).await {
            Ok(event) => {
                pause = RETRY.0;
                if event.sequence > after.saturating_add(1) {
                    log!(
                        "{} events of the guest were lost",
                        event.sequence.saturating_sub(after).saturating_sub(1)
                    );
                }
                after = event.sequence.max(after.saturating_add(1));
                containerd.deliver(event).await;
            }
            Err(CallError::Dead) => return,
            Err(error) => {
                log!("asking the guest for events: {error}");
                sleep(pause).await;
                pause = (pause * 2).min(RETRY.1);
            }
        }
    }
}

/// The guest's next event: it answers when there is one.
async fn next(guest: &Guest, after: u64) -> Result<sandbox::Envelope, CallError> {
    let request = GetEventsRequest { after: Some(after), ..Default::default() };
    let call = Call {
        service: SANDBOX_SERVICE,
        method: "GetEvents",
        payload: request.write_to_bytes().map_err(broken)?,
        metadata: Vec::new(),
        limit: None,
        repeatable: true,
    };
    sandbox::Envelope::parse_from_bytes(&guest.call(call).await?).map_err(broken)
}

fn broken(error: protobuf::Error) -> CallError {
    CallError::Broken(ttrpc::Error::Others(error.to_string()))
}

/// The event as containerd's own shims send it.
fn envelope(event: sandbox::Envelope) -> Envelope {
    let (seconds, nanos) =
        (event.timestamp_ns.div_euclid(1_000_000_000), event.timestamp_ns.rem_euclid(1_000_000_000));
    let nanos = i32::try_from(nanos).unwrap_or(0);
    Envelope {
        timestamp: MessageField::some(Timestamp { seconds, nanos, ..Default::default() }),
        namespace: event.namespace,
        topic: event.topic,
        event: event.event,
        ..Default::default()
    }
}

/// containerd's service for events.
struct Containerd {
    path: PathBuf,
    client: Option<Client>,
}

impl Containerd {
    /// Delivers an event, however long containerd is away. One that it refuses is dropped: it would refuse it again.
    async fn deliver(&mut self, event: sandbox::Envelope) {
        let topic = event.topic.clone();
        let request = ForwardRequest { envelope: MessageField::some(envelope(event)), ..Default::default() };
        let Ok(payload) = request.write_to_bytes() else { return };
        let (mut pause, mut said) = (RETRY.0, false);
        loop {
            match self.call(payload.clone()).await {
                Ok(()) => return,
                Err(ForwardError::Call(ttrpc::Error::RpcStatus(status))) => {
                    log!("containerd refuses the event {topic}: {}", status.message());
                    return;
                }
                Err(error) => {
                    if !said {
                        log!("{error}; trying again until it is there");
                        said = true;
                    }
                    self.client = None;
                    sleep(pause).await;
                    pause = (pause * 2).min(RETRY.1);
                }
            }
        }
    }

    async fn call(&mut self, payload: Vec<u8>) -> Result<(), ForwardError> {
        let client = match &self.client {
            Some(client) => client.clone(),
            None => {
                let stream = UnixStream::connect(&self.path)
                    .await
                    .map_err(|source| ForwardError::Connect { path: self.path.clone(), source })?;
                self.client.insert(Client::new(Socket::new(stream))).clone()
            }
        };
        let request = Request {
            service: EVENTS_SERVICE.to_owned(),
            method: "Forward".to_owned(),
            payload,
            timeout_nano: i64::try_from(FORWARD_LIMIT.as_nanos()).unwrap_or(i64::MAX),
            ..Default::default()
        };
        timeout(FORWARD_LIMIT, client.request(request)).await.map_err(|_| ForwardError::Timeout)??;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_keeps_its_time_and_name() {
        let event = sandbox::Envelope {
            timestamp_ns: 1_900_000_000_000_000_007,
            namespace: "k8s.io".into(),
            topic: "/tasks/oom".into(),
            sequence: 3,
            ..Default::default()
        };
        let sent = envelope(event);
        assert_eq!((sent.timestamp.seconds, sent.timestamp.nanos), (1_900_000_000, 7));
        assert_eq!((sent.namespace.as_str(), sent.topic.as_str()), ("k8s.io", "/tasks/oom"));
    }
}
