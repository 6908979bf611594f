//! Tells containerd of events of containers in the guest: it learns of nothing by itself, and kubelet's
//! reason OOMKilled comes from an event alone. The guest keeps events until they are asked for by number, so
//! a containerd that restarts misses none. What is told is made anew (see [`filter`]).

pub(crate) mod filter;

use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::shim::{event::Envelope, events::ForwardRequest};
use kuasar_common::api::sandbox::{self, GetEventsRequest};
use protobuf::{Message, MessageField};
use tokio::{
    net::UnixStream,
    time::{sleep, sleep_until, timeout},
};
use ttrpc::{
    Code,
    asynchronous::{Client, transport::Socket},
    proto::Request,
};

use crate::{
    bucket::Bucket,
    guest::{Call, CallError, Guest, SANDBOX_SERVICE},
    log::log,
    task::Relay,
};

const EVENTS_SERVICE: &str = "containerd.services.events.ttrpc.v1.Events";
/// Longest wait for containerd's answer.
const FORWARD_LIMIT: Duration = Duration::from_secs(10);
/// Pauses between attempts to reach containerd, or a guest that refuses.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Rate at which the relay asks the guest for events: so many times at once, and once more in this time.
/// Nothing is lost behind it, as the guest keeps events that nobody has asked for.
const ASKING: (u32, Duration) = (500, Duration::from_millis(5));
/// More events than this are never between two that a guest kept, however long nobody asked.
const MAX_GAP: u64 = 1 << 32;

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
pub(crate) async fn forward(relay: &Relay, containerd: &Path) {
    let mut socket = containerd.as_os_str().to_owned();
    socket.push(".ttrpc");
    let mut containerd = Containerd { path: socket.into(), client: None };
    let mut asking = Bucket::new(ASKING.0, ASKING.1);
    let (mut refused, mut gaps) = (Seldom::default(), Seldom::default());
    let since = SystemTime::now();
    let (mut after, mut pause) = (0, RETRY.0);
    loop {
        while let Err(ready) = asking.take() {
            sleep_until(ready).await;
        }
        let failed = match next(&relay.guest, after).await {
            Ok(event) => match follows(after, event.sequence) {
                Some((sequence, lost)) => {
                    after = sequence;
                    pause = RETRY.0;
                    if lost > 0 && gaps.again() {
                        log!("{lost} events of the guest were lost, {} times now", gaps.0);
                    }
                    match filter::admit(&event, &relay.containers, since) {
                        Ok(envelope) => containerd.deliver(envelope).await,
                        Err(why) if refused.again() => {
                            log!(
                                "{} events of the guest were not passed on, the last because {why}",
                                refused.0
                            );
                        }
                        Err(_) => {}
                    }
                    continue;
                }
                None => format!("it answered with event {} after {after}", event.sequence),
            },
            Err(CallError::Dead) => return,
            // The numbers were never this high: a lie, or a life that this relay does not know of.
            Err(CallError::Status(status)) if after > 0 && status.code() == Code::INVALID_ARGUMENT => {
                after = 0;
                "it had no such number, so all that it kept is read again".to_owned()
            }
            Err(error) => error.to_string(),
        };
        log!("asking the guest for events: {failed}");
        sleep(pause).await;
        pause = (pause * 2).min(RETRY.1);
    }
}

/// Returns the number to go on after, and the number of events missing before it, if the event is newer than
/// the last. A relay that believed an impossible number would ask for nothing that comes after, for ever.
fn follows(after: u64, sequence: u64) -> Option<(u64, u64)> {
    match sequence.checked_sub(after)?.checked_sub(1)? {
        gap if gap > MAX_GAP => Some((after.checked_add(1)?, 0)),
        gap => Some((sequence, gap)),
    }
}

/// Counts what is said ever less often, as a guest decides how often it happens.
#[derive(Default)]
struct Seldom(u64);

impl Seldom {
    /// Counts one more; true if it is to be said.
    fn again(&mut self) -> bool {
        self.0 = self.0.saturating_add(1);
        self.0.is_power_of_two()
    }
}

/// The guest's next event: it answers when there is one.
async fn next(guest: &Guest, after: u64) -> Result<sandbox::Envelope, CallError> {
    let request = GetEventsRequest { after: Some(after), ..Default::default() };
    let call = Call {
        service: SANDBOX_SERVICE,
        method: "GetEvents",
        payload: request.write_to_bytes().map_err(|e| broken(&e.to_string()))?,
        metadata: Vec::new(),
        limit: None,
        repeatable: true,
    };
    sandbox::Envelope::parse_from_bytes(&guest.call(call).await?).map_err(|e| broken(&e.to_string()))
}

fn broken(why: &str) -> CallError {
    CallError::Broken(ttrpc::Error::Others(why.to_owned()))
}

/// containerd's service for events.
struct Containerd {
    path: PathBuf,
    client: Option<Client>,
}

impl Containerd {
    /// Delivers an event, however long containerd is away. One that it refuses is dropped: it would refuse it
    /// again.
    async fn deliver(&mut self, event: Envelope) {
        let topic = event.topic.clone();
        let request = ForwardRequest { envelope: MessageField::some(event), ..Default::default() };
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
    fn a_number_that_cannot_be_is_not_gone_on_after() {
        for (after, sequence, next) in [
            (0, 1, Some((1, 0))),
            (5, 1030, Some((1030, 1024))),
            (5, 5, None),
            (5, 0, None),
            (5, u64::MAX, Some((6, 0))),
            (u64::MAX - 1, u64::MAX, Some((u64::MAX, 0))),
            (u64::MAX, u64::MAX, None),
        ] {
            assert_eq!(follows(after, sequence), next, "{after} {sequence}");
        }
    }
}
