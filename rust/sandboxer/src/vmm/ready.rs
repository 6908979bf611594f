//! The agent's call that its VM is up, taken on the host (see `kuasar_common::handshake`).
//!
//! Everything read here was written by a guest: it is bounded, parsed without panic, and waited for with a
//! deadline.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kuasar_common::{
    constants::PORT_READY,
    handshake::{self, Fatal, MAX_LINE, Ready, ToGuest, ToHost},
    text::printable,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::UnixListener,
    sync::oneshot,
    task::AbortHandle,
    time::timeout,
};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

/// As many daemons as can take the calls of guests on one kernel's vsock: one for each hypervisor, and some.
const HUBS: u32 = 16;
/// The highest port that the kernel gives to privileged processes only (`LAST_RESERVED_PORT`): no user of the
/// host can take these before us.
const PRIVILEGED: u32 = 1023;

/// Longest time that the guest may take to read one line that we wrote.
const WRITE_DEADLINE: Duration = Duration::from_secs(5);

trait Stream: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Stream for T {}
type Connection = BufReader<Pin<Box<dyn Stream>>>;

/// Why the agent's call was not understood.
#[derive(Debug, thiserror::Error)]
pub enum ReadyError {
    /// The connection failed.
    #[error("talking to the guest's agent: {0}")]
    Io(#[from] io::Error),
    /// The guest spoke something else.
    #[error("talking to the guest's agent: {0}")]
    Line(String),
    /// The agent gave up.
    #[error("the guest's agent gave up: {0}")]
    Fatal(String),
    /// The guest closed the connection.
    #[error("the guest's agent closed the connection without a word")]
    Closed,
}

/// Waits for one guest's agent.
#[derive(Debug)]
pub struct ReadyListener(Source);

#[derive(Debug)]
enum Source {
    /// Behind a hybrid socket: the guest's calls to a port arrive at a socket of that name.
    Hybrid { path: PathBuf, listener: UnixListener },
    /// On the kernel's vsock: one listener for all guests.
    Hub { hub: VsockHub, cid: u32, connection: oneshot::Receiver<Pin<Box<dyn Stream>>> },
}

impl std::fmt::Debug for dyn Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stream")
    }
}

impl ReadyListener {
    /// Listens beside a hybrid socket, which need not exist yet, for what runs as `user`.
    ///
    /// # Errors
    /// When the socket cannot be bound.
    pub fn hybrid(vsock_socket: &Path, user: Option<u32>) -> io::Result<Self> {
        let mut path = vsock_socket.as_os_str().to_owned();
        path.push(format!("_{PORT_READY}"));
        let path = PathBuf::from(path);
        let listener = UnixListener::bind(&path)?;
        if user.is_some() {
            std::os::unix::fs::chown(&path, user, user)?;
        }
        Ok(Self(Source::Hybrid { path, listener }))
    }

    /// Waits for the call of the guest with this context id.
    #[must_use]
    pub fn vhost(hub: &VsockHub, cid: u32) -> Self {
        let (sender, connection) = oneshot::channel();
        lock(&hub.waiting).insert(cid, sender);
        Self(Source::Hub { hub: hub.clone(), cid, connection })
    }

    /// Waits for the agent's call, for ever: the caller has the deadline, because it also knows when the VM
    /// ended.
    ///
    /// # Errors
    /// When the guest says anything but that it is ready.
    pub async fn accept(mut self) -> Result<ReadyGuest, ReadyError> {
        let stream: Pin<Box<dyn Stream>> = match &mut self.0 {
            Source::Hybrid { listener, .. } => Box::pin(listener.accept().await?.0),
            Source::Hub { connection, .. } => connection.await.map_err(|_| ReadyError::Closed)?,
        };
        let mut connection = BufReader::with_capacity(MAX_LINE, stream);
        match read_message(&mut connection).await? {
            Some(ToHost::Ready(ready)) => Ok(ReadyGuest { ready, connection }),
            Some(ToHost::Fatal(fatal)) => Err(ReadyError::Fatal(fatal.reason)),
            None => Err(ReadyError::Closed),
        }
    }
}

impl Drop for ReadyListener {
    fn drop(&mut self) {
        match &self.0 {
            // Nobody else is to call once the agent has, least of all a container.
            Source::Hybrid { path, .. } => drop(fs::remove_file(path)),
            Source::Hub { hub, cid, .. } => drop(lock(&hub.waiting).remove(cid)),
        }
    }
}

/// A guest whose agent has called; the connection stays open as long as the VM lives.
#[derive(Debug)]
pub struct ReadyGuest {
    /// The agent's call.
    pub ready: Ready,
    connection: Connection,
}

impl ReadyGuest {
    /// Hands the pod's token over; the agent serves calls that carry it from now on.
    ///
    /// # Errors
    /// When the guest does not take it in time.
    pub async fn give_token(&mut self, token: &str) -> Result<(), ReadyError> {
        let line = handshake::to_line(&ToGuest::Token(token.to_owned()));
        let line = line.map_err(|error| ReadyError::Line(error.to_string()))?;
        let write = self.connection.write_all(&line);
        Ok(timeout(WRITE_DEADLINE, write).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??)
    }

    /// Waits for the end of the connection; the reason if the agent gave one.
    pub async fn fatal(&mut self) -> Option<String> {
        match read_message(&mut self.connection).await {
            Ok(Some(ToHost::Fatal(fatal))) => Some(fatal.reason),
            _ => None,
        }
    }
}

/// Reads a line of at most [`MAX_LINE`] bytes; `None` at the end of the stream.
async fn read_message(connection: &mut Connection) -> Result<Option<ToHost>, ReadyError> {
    let mut line = Vec::new();
    let limit = u64::try_from(MAX_LINE).unwrap_or(u64::MAX).saturating_add(1);
    connection.take(limit).read_until(b'\n', &mut line).await?;
    if line.is_empty() { Ok(None) } else { understand(&line).map(Some) }
}

/// Parses a line of a guest. All texts in what it returns, the error's included, may be shown.
pub(crate) fn understand(line: &[u8]) -> Result<ToHost, ReadyError> {
    let said = handshake::from_line(line).map_err(|error| ReadyError::Line(printable(&error.to_string())))?;
    Ok(match said {
        ToHost::Ready(Ready { agent, uptime_ns, root }) => {
            ToHost::Ready(Ready { agent: printable(&agent), uptime_ns, root: printable(&root) })
        }
        ToHost::Fatal(Fatal { reason }) => ToHost::Fatal(Fatal { reason: printable(&reason) }),
    })
}

/// Ports of the host to listen on, the best first.
fn ports() -> impl Iterator<Item = u32> {
    [PRIVILEGED, PORT_READY].into_iter().flat_map(|first| (0..HUBS).map(move |n| first.saturating_sub(n)))
}

/// Tries ports one after another while they are taken or not for this process.
fn first_free<T>(ports: impl Iterator<Item = u32>, bind: impl Fn(u32) -> io::Result<T>) -> io::Result<T> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for port in ports {
        match bind(port) {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied) =>
            {
                last = error;
            }
            bound => return bound,
        }
    }
    Err(last)
}

type Waiters = HashMap<u32, oneshot::Sender<Pin<Box<dyn Stream>>>>;
type Waiting = Mutex<Waiters>;

fn lock(waiting: &Waiting) -> MutexGuard<'_, Waiters> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The host's side of the kernel's vsock: takes the calls of all guests and gives each to the task that waits
/// for it. It listens until the last clone is dropped.
#[derive(Clone, Debug)]
pub struct VsockHub {
    port: u32,
    waiting: Arc<Waiting>,
    _accepting: Arc<AbortOnDrop>,
}

#[derive(Debug)]
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl VsockHub {
    /// Listens on the first free port of the host that is for privileged processes, or, where this is none,
    /// of those that an agent calls by itself and anybody may take; needs a tokio runtime.
    ///
    /// # Errors
    /// When the kernel has no vsock, or all the ports are taken.
    pub fn listen() -> io::Result<Self> {
        let bind = |port| Ok((VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?, port));
        let (listener, port) = first_free(ports(), bind)?;
        let waiting = Arc::<Waiting>::default();
        let accepting = tokio::spawn(accept_all(listener, waiting.clone()));
        Ok(Self { port, waiting, _accepting: Arc::new(AbortOnDrop(accepting.abort_handle())) })
    }

    /// Kernel parameter that tells an agent the port to call; empty if it calls that port by itself.
    #[must_use]
    pub fn parameter(&self) -> String {
        if self.port == PORT_READY { String::new() } else { format!("task.ready_port={}", self.port) }
    }
}

async fn accept_all(listener: VsockListener, waiting: Arc<Waiting>) {
    loop {
        match listener.accept().await {
            // A guest nobody waits for is hung up on.
            Ok((stream, peer)) => {
                if let Some(waiter) = lock(&waiting).remove(&peer.cid()) {
                    drop(waiter.send(Box::pin(stream)));
                }
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a guest's vsock connection");
                // Out of descriptors, most likely: give others the time to close some.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixStream;

    use super::*;

    async fn call(bytes: &[u8]) -> (Result<ReadyGuest, ReadyError>, UnixStream) {
        let dir = tempfile::tempdir().unwrap();
        let listener = ReadyListener::hybrid(&dir.path().join("vsock.sock"), None).unwrap();
        let socket = dir.path().join(format!("vsock.sock_{PORT_READY}"));
        let mut guest = UnixStream::connect(&socket).await.unwrap();
        guest.write_all(bytes).await.unwrap();
        if !bytes.ends_with(b"\n") {
            guest.shutdown().await.unwrap();
        }
        let accepted = listener.accept().await;
        assert!(!socket.exists(), "nobody else can call");
        (accepted, guest)
    }

    #[tokio::test]
    async fn a_ready_guest_gets_the_token_and_may_give_up_later() {
        let (host, mut guest) = call(b"{\"ready\":{\"agent\":\"0.1.0\",\"uptime_ns\":5}}\n").await;
        let mut host = host.unwrap();
        assert_eq!(host.ready, Ready { agent: "0.1.0".into(), uptime_ns: 5, root: String::new() });
        host.give_token("secret").await.unwrap();
        let mut line = vec![0; 19];
        guest.read_exact(&mut line).await.unwrap();
        assert_eq!(line, b"{\"token\":\"secret\"}\n");
        guest.write_all(b"{\"fatal\":{\"reason\":\"no cgroup v2\"}}\n").await.unwrap();
        assert_eq!(host.fatal().await.as_deref(), Some("no cgroup v2"));
        drop(guest);
        assert_eq!(host.fatal().await, None);
    }

    #[test]
    fn ports_that_no_user_can_take_come_first() {
        let all: Vec<u32> = ports().collect();
        assert_eq!((all.len(), all[0], all[15], all[16]), (32, 1023, 1008, PORT_READY));
        let bind = |taken: &'static [u32], privileged: bool| {
            first_free(ports(), move |port| match port {
                ..1024 if !privileged => Err(io::ErrorKind::PermissionDenied.into()),
                _ if taken.contains(&port) => Err(io::ErrorKind::AddrInUse.into()),
                _ => Ok(port),
            })
        };
        // A user of the host has all that anybody may have.
        assert_eq!(bind(&[], true).unwrap(), 1023);
        assert_eq!(bind(&[1023, 1022], true).unwrap(), 1021);
        assert_eq!(bind(&[PORT_READY], false).unwrap(), PORT_READY - 1);
        let none: io::Result<u32> = first_free(ports(), |_| Err(io::ErrorKind::AddrInUse.into()));
        assert_eq!(none.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let other =
            first_free(ports(), |_| Err::<u32, _>(io::Error::from_raw_os_error(nix::libc::EAFNOSUPPORT)));
        assert_eq!(other.unwrap_err().raw_os_error(), Some(nix::libc::EAFNOSUPPORT));
    }

    #[tokio::test]
    async fn a_hub_listens_as_long_as_it_is_held() {
        // Other daemons on this host may have ports.
        let hub = match VsockHub::listen() {
            Ok(hub) => hub,
            Err(error) if error.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) => {
                return println!("skipped: guests' calls over vsock: the kernel of this machine has none");
            }
            Err(error) => panic!("listening on the host's vsock: {error}"),
        };
        let (port, listener) = (hub.port, ReadyListener::vhost(&hub, 77));
        drop(hub);
        let next = VsockHub::listen().unwrap();
        assert!(next.port < port);
        assert_eq!(next.parameter(), format!("task.ready_port={}", next.port));
        drop((listener, next));
        tokio::task::yield_now().await;
        assert_eq!(VsockHub::listen().unwrap().port, port);
    }

    #[tokio::test]
    async fn what_hostile_guests_say_is_refused() {
        let endless = vec![b'a'; 1 << 16];
        for (bytes, expected) in [
            (&b""[..], "closed the connection"),
            (b"\xff\xfe\n", "parsing a handshake line"),
            (b"{\"token\":\"x\"}\n", "parsing a handshake line"),
            (b"{\"ready\"", "parsing a handshake line"),
            (b"{\"fatal\":{\"reason\":\"a\\u001b[2J\\u202e\"}}\n", "gave up: a\\u{1b}[2J\\u{202e}"),
            ("{\"\u{202e}\": 1}\n".as_bytes(), "unknown variant `\\u{202e}`"),
            (&endless, "longer than 4096"),
        ] {
            let error = call(bytes).await.0.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
