//! containerd's `Streaming` service, on the same port as the other services of the agent.
//!
//! As on every call from the host, the request carries the pod's token as metadata; the program that
//! passes containerd's streams on adds it.

pub mod names;

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kuasar_common::{
    constants::TOKEN_METADATA,
    streaming::{
        bridge::{self, END_DEADLINE, Policy},
        frame::Frame,
        wire::Wire,
    },
};
use tokio::{
    io::duplex,
    sync::{mpsc, watch},
    time::timeout,
};

use crate::{
    auth::Token,
    stdio::registry::{Connection, Key, Registry, Transport},
};

/// Streams that may be open at the same time.
const MAX_STREAMS: usize = 4096;
/// Longest time that a stream waits for its process: containerd opens it when a container is created, a
/// person may start it later.
const PROCESS_DEADLINE: Duration = Duration::from_secs(3600);
/// Clients of one stream that may queue up.
const QUEUE: usize = 2;
/// Bytes between a bridge and its process.
const BUFFER: usize = 16 * 1024;

type Bridges = HashMap<String, mpsc::Sender<Wire>>;

/// The service.
pub struct Streaming {
    registry: Arc<Registry>,
    token: Arc<Token>,
    bridges: Mutex<Bridges>,
}

impl Streaming {
    /// Streams of the processes that `registry` knows, for clients that know `token`.
    #[must_use]
    pub fn new(registry: Arc<Registry>, token: Arc<Token>) -> Arc<Self> {
        Arc::new(Self { registry, token, bridges: Mutex::default() })
    }

    fn bridges(&self) -> MutexGuard<'_, Bridges> {
        self.bridges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a connection whose first frame asks for a stream.
    pub async fn serve(self: &Arc<Self>, transport: Box<dyn Transport>, request: &Frame) {
        let (reader, writer) = tokio::io::split(transport);
        let allow = |request: &ttrpc::Request| {
            let known = request.metadata.iter().any(|p| p.key == TOKEN_METADATA && self.token.is(&p.value));
            known
                .then_some(())
                .ok_or_else(|| format!("the call does not carry the pod's token as {TOKEN_METADATA}"))
        };
        let opened = Wire::open(Box::new(reader), Box::new(writer), request, allow).await;
        if let Err(error) = opened.and_then(|(wire, id)| self.attach(wire, id)) {
            log::warn!("refused a stream: {error}");
        }
    }

    fn attach(self: &Arc<Self>, wire: Wire, id: String) -> io::Result<()> {
        let mut bridges = self.bridges();
        bridges.retain(|_, bridge| !bridge.is_closed());
        let wire = match bridges.get(&id) {
            None => wire,
            Some(bridge) => match bridge.try_send(wire) {
                Ok(()) => return Ok(()),
                Err(mpsc::error::TrySendError::Closed(wire)) => wire,
                Err(mpsc::error::TrySendError::Full(_)) => {
                    return Err(io::Error::other(format!(
                        "stream {id:?} has {QUEUE} clients waiting already"
                    )));
                }
            },
        };
        if bridges.len() >= MAX_STREAMS {
            return Err(io::Error::other(format!("{MAX_STREAMS} streams are open already")));
        }
        let (sender, clients) = mpsc::channel(QUEUE);
        // There is room: it is new.
        let _ = sender.try_send(wire);
        bridges.insert(id.clone(), sender);
        tokio::spawn(connect(Arc::clone(&self.registry), id, clients));
        Ok(())
    }
}

/// Waits until the stream's process is known, and joins the two.
async fn connect(registry: Arc<Registry>, id: String, mut clients: mpsc::Receiver<Wire>) {
    let meaning = registry.names.meaning(&id);
    let Some(key) = timeout(PROCESS_DEADLINE, known(meaning)).await.ok().flatten() else {
        registry.names.forget_unknown(&id);
        return log::info!("stream {id:?}: its process never came");
    };
    let stream = key.stream;
    let (ours, theirs) = duplex(BUFFER);
    let theirs: Box<dyn Transport> = Box::new(theirs);
    match registry.attach(key, Connection::new(theirs)) {
        Ok(()) => {
            let policy = Policy { rest: Some(END_DEADLINE), ends_with_client: false };
            bridge::run(stream, ours, None, &mut clients, policy).await;
        }
        Err(error) => log::warn!("stream {id:?}: {error}"),
    }
}

async fn known(mut meaning: watch::Receiver<Option<Key>>) -> Option<Key> {
    let key = meaning.wait_for(Option::is_some).await.ok()?;
    key.clone()
}
