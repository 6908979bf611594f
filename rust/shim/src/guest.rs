//! The way to the guest: dialling its ports, and the one ttrpc connection to its Task service.

mod dial;
pub mod link;

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use kuasar_common::{
    address::GuestAddress,
    constants::{PORT_TTRPC, TOKEN_METADATA},
    handshake::MAX_LINE,
    streaming::frame::MAX_FIRST,
};
use protobuf::Message;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::Mutex,
    time::{Instant, sleep, timeout},
};
use tokio_vsock::{VsockAddr, VsockStream};
use ttrpc::{
    asynchronous::Client,
    proto::{KeyValue, Request, Response, Status},
};

use self::{
    dial::Hybrid,
    link::{Gone, Link},
};
use crate::{answer::guest_status, log::log, vm::Vm};

/// The pod's own service in the guest.
pub(crate) const SANDBOX_SERVICE: &str = "grpc.SandboxService";
/// The service that the relay offers to containerd and uses in the guest.
pub(crate) const TASK_SERVICE: &str = "containerd.task.v3.Task";

/// Limit of what containerd asks in passing. It asks node-wide, one container after the other.
pub(crate) const PROBE_LIMIT: Duration = Duration::from_millis(1800);
/// Longest wait for one connection to a guest's port, handshake included.
const DIAL_LIMIT: Duration = Duration::from_secs(10);
/// Longest time that a guest whose VM nobody watches may be unreachable before it counts as dead.
const LOST_LIMIT: Duration = Duration::from_secs(5);
/// Pauses between attempts to connect again.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// A connection to a port of the guest.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Stream for T {}
/// A connection to a port of the guest, whatever carries it.
pub(crate) type Conn = Box<dyn Stream>;

/// Why a port of the guest could not be reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("connecting to the guest's port {port} through {path}: {source}")]
    Hybrid { path: PathBuf, port: u32, source: io::Error },
    #[error("connecting to the guest's port {port} at context id {cid}: {source}")]
    Vsock { cid: u32, port: u32, source: io::Error },
    #[error("connecting to the guest's port {port}: no answer within {} s", DIAL_LIMIT.as_secs())]
    Timeout { port: u32 },
}

/// Why a call to the guest has no answer of the guest's.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The guest answered with an error, which is of our own making (see [`guest_status`]).
    #[error("{}", .0.message())]
    Status(Status),
    #[error("the pod's VM has ended")]
    Dead,
    #[error("the guest did not answer within {} s", .0.as_secs_f32())]
    Timeout(Duration),
    #[error("the connection to the guest broke: {0}")]
    Broken(ttrpc::Error),
}

/// A call for the guest.
#[derive(Clone)]
pub(crate) struct Call {
    pub(crate) service: &'static str,
    pub(crate) method: &'static str,
    pub(crate) payload: Vec<u8>,
    /// The caller's metadata.
    pub(crate) metadata: Vec<KeyValue>,
    pub(crate) limit: Option<Duration>,
    /// True if the call may be sent once more after a broken connection.
    pub(crate) repeatable: bool,
}

/// The guest of this relay.
pub(crate) struct Guest {
    address: Address,
    pub(crate) token: String,
    pub(crate) vm: Arc<Vm>,
    link: Mutex<Link>,
    /// It left a probe unanswered, and has not answered since.
    silent: AtomicBool,
}

/// Address of the guest's ports.
enum Address {
    Hybrid(Hybrid),
    Vsock(u32),
}

impl Guest {
    pub(crate) fn new(address: GuestAddress, token: String, vm: Arc<Vm>) -> Self {
        let address = match address {
            GuestAddress::Hybrid(path) => Address::Hybrid(Hybrid::new(path)),
            GuestAddress::Vsock(cid) => Address::Vsock(cid),
        };
        Self { address, token, vm, link: Mutex::default(), silent: AtomicBool::new(false) }
    }

    /// Connects to a port of the guest.
    pub(crate) async fn dial(&self, port: u32) -> Result<Conn, DialError> {
        let dialled = async {
            match &self.address {
                Address::Hybrid(hybrid) => match hybrid.dial(port).await {
                    Ok(stream) => Ok(Box::new(stream) as Conn),
                    Err(source) => Err(DialError::Hybrid { path: hybrid.path().clone(), port, source }),
                },
                &Address::Vsock(cid) => match VsockStream::connect(VsockAddr::new(cid, port)).await {
                    Ok(stream) => Ok(Box::new(stream) as Conn),
                    Err(source) => Err(DialError::Vsock { cid, port, source }),
                },
            }
        };
        timeout(DIAL_LIMIT, dialled).await.unwrap_or(Err(DialError::Timeout { port }))
    }

    /// Calls a service of the guest's and returns the payload of its answer. Ends with the VM and at the
    /// call's limit; a connection that broke is made anew as long as the VM lives.
    pub(crate) async fn call(&self, call: Call) -> Result<Vec<u8>, CallError> {
        if self.vm.is_dead() {
            return Err(CallError::Dead);
        }
        let limit = call.limit;
        let work = self.call_until_answered(call);
        let bounded = async {
            match limit {
                Some(limit) => timeout(limit, work).await.unwrap_or(Err(CallError::Timeout(limit))),
                None => work.await,
            }
        };
        tokio::select! {
            biased;
            answer = bounded => answer,
            () = self.vm.dead() => Err(CallError::Dead),
        }
    }

    /// A call that is not worth waiting for a silent guest: of all such calls only the first one does, and
    /// then one that stays open until the guest answers.
    pub(crate) async fn probe(self: &Arc<Self>, call: Call) -> Result<Vec<u8>, CallError> {
        if self.silent.load(Ordering::Relaxed) {
            return Err(CallError::Timeout(call.limit.unwrap_or(PROBE_LIMIT)));
        }
        let answer = self.call(call).await;
        if matches!(answer, Err(CallError::Timeout(_))) && !self.silent.swap(true, Ordering::Relaxed) {
            log!("the guest is silent: until it answers, what it said last has to do");
            let guest = Arc::clone(self);
            tokio::spawn(async move {
                if !matches!(guest.call(check(None)).await, Err(CallError::Dead)) {
                    log!("the guest answers again");
                    guest.silent.store(false, Ordering::Relaxed);
                }
            });
        }
        answer
    }

    /// Returns true if the guest is hung.
    pub(crate) async fn is_silent(self: &Arc<Self>) -> bool {
        matches!(self.probe(check(Some(PROBE_LIMIT))).await, Err(CallError::Timeout(_)))
    }

    async fn call_until_answered(&self, call: Call) -> Result<Vec<u8>, CallError> {
        let repeatable = call.repeatable;
        let request = self.request(call);
        let mut pause = RETRY.0;
        loop {
            match self.send(&self.client().await?, &request).await {
                Ok(response) => return Ok(response.payload),
                Err(ttrpc::Error::RpcStatus(status)) => return Err(CallError::Status(guest_status(&status))),
                // `LocalClosed`: the connection was found closed before anything was sent.
                Err(e) if repeatable || e == ttrpc::Error::LocalClosed => {
                    sleep(pause).await;
                    // Who breaks each connection is not asked as often as it likes.
                    pause = (pause * 2).min(RETRY.1);
                }
                Err(e) => return Err(CallError::Broken(e)),
            }
        }
    }

    /// Sends a request. The first one of a connection shows the token, and the guest takes only a short one
    /// for that.
    async fn send(&self, client: &Client, request: &Request) -> ttrpc::Result<Response> {
        if usize::try_from(request.compute_size()).is_ok_and(|length| length > MAX_FIRST) {
            client.request(self.request(check(Some(DIAL_LIMIT)))).await?;
        }
        client.request(request.clone()).await
    }

    fn request(&self, call: Call) -> Request {
        let mut metadata = call.metadata;
        metadata.retain(|pair| pair.key != TOKEN_METADATA);
        let (key, value) = (TOKEN_METADATA.to_owned(), self.token.clone());
        metadata.push(KeyValue { key, value, ..Default::default() });
        // The guest gives up a little later than this side, so that it is always this side that words the
        // error.
        let limit = call.limit.map_or(0, |limit| (limit + Duration::from_secs(1)).as_nanos());
        Request {
            service: call.service.to_owned(),
            method: call.method.to_owned(),
            payload: call.payload,
            timeout_nano: i64::try_from(limit).unwrap_or(i64::MAX),
            metadata,
            ..Default::default()
        }
    }

    /// The connected client; connects if there is none, for as long as the VM lives.
    async fn client(&self) -> Result<Client, CallError> {
        let mut link = self.link.lock().await;
        let mut pause = RETRY.0;
        loop {
            match link.client() {
                Ok(Some(client)) => return Ok(client),
                Ok(None) => {}
                Err(Gone) => {
                    log!("the connection to the guest's port {PORT_TTRPC} is gone, making a new one")
                }
            }
            match self.dial(PORT_TTRPC).await {
                Ok(conn) => link.connect(conn),
                Err(e) => {
                    if link.lost_since.is_none() {
                        log!("{e}");
                    }
                    let lost_since = *link.lost_since.get_or_insert_with(Instant::now);
                    if !self.vm.watched && lost_since.elapsed() >= LOST_LIMIT {
                        self.vm.declare_dead("its guest cannot be reached any more");
                        return Err(CallError::Dead);
                    }
                    sleep(pause).await;
                    pause = (pause * 2).min(RETRY.1);
                }
            }
        }
    }
}

/// Asks the guest whether it is there.
fn check(limit: Option<Duration>) -> Call {
    let (payload, metadata) = (Vec::new(), Vec::new());
    Call { service: SANDBOX_SERVICE, method: "Check", payload, metadata, limit, repeatable: true }
}

/// Sends the line that a connection to one of the agent's ports begins with, and reads the one that answers
/// it.
pub(crate) async fn ask(conn: &mut Conn, first_line: &[u8], limit: Duration) -> io::Result<Vec<u8>> {
    let talk = async {
        conn.write_all(first_line).await?;
        read_line(conn, MAX_LINE).await
    };
    timeout(limit, talk).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Reads up to a newline, which is left out, and not a byte further: what follows is the connection's own.
///
/// # Errors
/// When the connection ends or breaks before there is one, or none comes within `limit` bytes.
pub async fn read_line(from: &mut (impl AsyncRead + Unpin), limit: usize) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        match from.read_u8().await {
            Ok(b'\n') => return Ok(line),
            Ok(_) if line.len() >= limit => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("a line of over {limit} bytes"),
                ));
            }
            Ok(byte) => line.push(byte),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::Error::new(e.kind(), "closed before an answer"));
            }
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::read_line;

    #[test]
    fn a_line_is_read_to_its_end_and_no_further() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut input = &b"OK 7\n\x00rest"[..];
            assert_eq!(read_line(&mut input, 64).await.unwrap(), b"OK 7");
            assert_eq!(input, b"\x00rest");
            assert!(read_line(&mut &b"no end"[..], 64).await.is_err());
            assert!(read_line(&mut &[b'x'; 100][..], 64).await.is_err());
        });
    }
}
