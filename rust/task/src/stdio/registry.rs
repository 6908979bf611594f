//! Assigns connections to streams.
//!
//! The relay may open a stream's connection before the process exists, and again after it lost one. A
//! connection for a stream that nobody owns yet waits here, bounded in number and time.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::streaming::names::Names;
use kuasar_common::stdio::{Hello, Stream};
use tokio::{
    io::{AsyncRead, AsyncWrite, BufReader},
    sync::mpsc,
    time::{Instant, sleep_until},
};

/// Most connections that wait for their process.
pub const MAX_PENDING: usize = 256;
/// Longest time that a connection waits for its process.
pub const PENDING_FOR: Duration = Duration::from_secs(60);
/// Connections of one stream that may queue up before its owner looks.
const QUEUE: usize = 4;

/// Byte stream that a connection runs over.
pub trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

/// A connection after its first line. Buffered, because bytes behind that line may have come with it.
pub type Connection = BufReader<Box<dyn Transport>>;

/// Name of one stream of one process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Container id.
    pub container: String,
    /// Exec id; empty for the container's own process.
    pub exec: String,
    /// The stream.
    pub stream: Stream,
}

impl From<&Hello> for Key {
    fn from(hello: &Hello) -> Self {
        Self { container: hello.container.clone(), exec: hello.exec.clone(), stream: hello.stream }
    }
}

/// Why a connection was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// Too many connections wait already.
    #[error("{MAX_PENDING} streams wait for their process already")]
    TooManyPending,
    /// The stream's owner does not come to look.
    #[error("the stream has {QUEUE} connections waiting already")]
    Busy,
}

struct Pending {
    key: Key,
    connection: Connection,
    until: Instant,
}

#[derive(Default)]
struct Table {
    owners: HashMap<Key, mpsc::Sender<Connection>>,
    pending: Vec<Pending>,
}

/// Brings connections and streams together.
#[derive(Default)]
pub struct Registry {
    table: Mutex<Table>,
    /// Ids by which containerd's streaming clients ask for streams.
    pub names: Names,
}

/// A stream's end of the registry: new connections arrive here. Closed when it is dropped.
pub struct Slot {
    key: Key,
    registry: Arc<Registry>,
    connections: mpsc::Receiver<Connection>,
    sender: mpsc::WeakSender<Connection>,
}

impl Registry {
    /// Claims a stream: connections that wait for it, and later ones, go to the slot. A stream has one owner
    /// at a time; a new one displaces the old.
    pub fn claim(self: &Arc<Self>, key: Key) -> Slot {
        let (sender, connections) = mpsc::channel(QUEUE);
        let mut table = self.lock();
        let (mine, others) = std::mem::take(&mut table.pending).into_iter().partition(|p| p.key == key);
        table.pending = others;
        let mine: Vec<Pending> = mine;
        for pending in mine.into_iter().rev().take(1) {
            // Of several, only the newest is still wanted by the relay.
            let _ = sender.try_send(pending.connection);
        }
        let weak = sender.downgrade();
        table.owners.insert(key.clone(), sender);
        Slot { key, registry: Arc::clone(self), connections, sender: weak }
    }

    /// Ends a claim: its slot yields what it has and then ends.
    pub fn release(&self, key: &Key) {
        self.lock().owners.remove(key);
    }

    /// Returns true if a connection for this stream would be taken in now.
    ///
    /// # Errors
    /// When there are too many.
    pub fn check(&self, key: &Key) -> Result<(), AttachError> {
        let mut table = self.lock();
        table.drop_expired();
        match table.owners.get(key) {
            Some(owner) if owner.capacity() == 0 => Err(AttachError::Busy),
            None if table.pending.len() >= MAX_PENDING => Err(AttachError::TooManyPending),
            _ => Ok(()),
        }
    }

    /// Takes a connection in.
    ///
    /// # Errors
    /// When there are too many.
    pub fn attach(self: &Arc<Self>, key: Key, connection: Connection) -> Result<(), AttachError> {
        let mut table = self.lock();
        if let Some(owner) = table.owners.get(&key) {
            return owner.try_send(connection).map_err(|_| AttachError::Busy);
        }
        table.drop_expired();
        if table.pending.len() >= MAX_PENDING {
            return Err(AttachError::TooManyPending);
        }
        let until = Instant::now() + PENDING_FOR;
        table.pending.push(Pending { key, connection, until });
        drop(table);
        let registry = Arc::downgrade(self);
        tokio::spawn(async move {
            sleep_until(until).await;
            if let Some(registry) = registry.upgrade() {
                registry.lock().drop_expired();
            }
        });
        Ok(())
    }

    /// Connections that wait for their process.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.lock().pending.len()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn drop_expired(&mut self) {
        let now = Instant::now();
        self.pending.retain(|pending| pending.until > now);
    }
}

impl Slot {
    /// The next connection; `None` once the claim was released.
    pub async fn next(&mut self) -> Option<Connection> {
        self.connections.recv().await
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut table = self.registry.lock();
        let mine = self.sender.upgrade();
        let is_mine =
            |owner: &mpsc::Sender<Connection>| mine.as_ref().is_some_and(|mine| mine.same_channel(owner));
        if table.owners.get(&self.key).is_some_and(is_mine) {
            table.owners.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    fn key(container: &str) -> Key {
        Key { container: container.into(), exec: String::new(), stream: Stream::Stdout }
    }

    fn connection() -> (Connection, DuplexStream) {
        let (ours, theirs) = duplex(64);
        (BufReader::new(Box::new(ours)), theirs)
    }

    #[tokio::test]
    async fn a_connection_before_or_after_its_process_is_found() {
        let registry = Arc::new(Registry::default());
        let (early, mut early_peer) = connection();
        registry.attach(key("a"), early).unwrap();
        let mut slot = registry.claim(key("a"));
        slot.next().await.unwrap().write_all(b"x").await.unwrap();
        assert_eq!(early_peer.read_u8().await.unwrap(), b'x');

        let (late, _late_peer) = connection();
        registry.attach(key("a"), late).unwrap();
        assert!(slot.next().await.is_some());
        registry.release(&key("a"));
        assert!(slot.next().await.is_none());
        assert_eq!(registry.pending(), 0);
    }

    #[tokio::test]
    async fn a_dropped_slot_does_not_end_its_successor() {
        let registry = Arc::new(Registry::default());
        let first = registry.claim(key("a"));
        let mut second = registry.claim(key("a"));
        drop(first);
        let (later, _peer) = connection();
        registry.attach(key("a"), later).unwrap();
        assert!(second.next().await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_connections_are_bounded_in_number_and_time() {
        let registry = Arc::new(Registry::default());
        let mut peers = Vec::new();
        for n in 0..MAX_PENDING {
            let (connection, peer) = connection();
            registry.attach(key(&n.to_string()), connection).unwrap();
            peers.push(peer);
        }
        assert_eq!(registry.attach(key("x"), connection().0), Err(AttachError::TooManyPending));
        tokio::time::sleep(PENDING_FOR + Duration::from_secs(1)).await;
        assert_eq!(registry.pending(), 0);
        assert_eq!(peers[0].read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn an_owner_that_does_not_look_is_not_flooded() {
        let registry = Arc::new(Registry::default());
        let _slot = registry.claim(key("a"));
        for _ in 0..QUEUE {
            registry.attach(key("a"), connection().0).unwrap();
        }
        assert_eq!(registry.attach(key("a"), connection().0), Err(AttachError::Busy));
    }
}
