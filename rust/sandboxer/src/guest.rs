//! The daemon's calls to the agent in a guest.

use std::{
    io,
    time::{Duration, SystemTime},
};

use kuasar_common::{
    address::GuestAddress,
    api::{
        sandbox::{CheckRequest, SetupSandboxRequest, ShutdownRequest, SyncClockPacket},
        sandbox_ttrpc::SandboxServiceClient,
    },
    constants::{PORT_TTRPC, TOKEN_METADATA},
    streaming::frame::MAX_FIRST,
    text::printable,
};
use protobuf::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};
use tokio_vsock::{VsockAddr, VsockStream};
use ttrpc::{
    asynchronous::{Client, transport::Socket},
    context::{self, Context},
};

use crate::{
    clock::{Sample, epoch_ns},
    frugal::Frugal,
};

/// Number of times that the daemon asks a guest for its time before it corrects the guest's clock: the best
/// answer counts.
const CLOCK_SAMPLES: usize = 3;

/// Longest request that may be the first of a connection: what ttrpc puts around it has room beside it.
const SHORT: usize = MAX_FIRST / 2;

/// Longest wait for the answer to `CONNECT` when nobody needs it any more.
const CONNECT: Duration = Duration::from_secs(180);

/// Longest answer of a hybrid socket to `CONNECT`.
const MAX_ANSWER: u64 = 64;

/// Why a call to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// No connection.
    #[error("connecting to the guest's agent at {address}: {source}")]
    Connect {
        /// The guest.
        address: GuestAddress,
        /// Why.
        source: io::Error,
    },
    /// The agent said no.
    #[error("calling {method} of the guest's agent: {why}")]
    Refused {
        /// The method called.
        method: &'static str,
        /// The agent's answer.
        why: String,
    },
    /// The connection broke.
    #[error("calling {method} of the guest's agent: {why}")]
    Call {
        /// The method called.
        method: &'static str,
        /// The reason it failed.
        why: String,
    },
    /// It took too long.
    #[error("calling {method} of the guest's agent: no answer within {deadline:?}")]
    Deadline {
        /// The method called.
        method: &'static str,
        /// The time that it had.
        deadline: Duration,
    },
}

impl GuestError {
    /// Returns true if the guest has answered at all.
    #[must_use]
    pub const fn is_answer(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

/// One guest's agent. Every call opens a connection of its own: they are rare.
#[derive(Clone, Debug)]
pub struct Guest {
    address: GuestAddress,
    token: String,
}

impl Guest {
    /// The agent at this address, which knows this token.
    #[must_use]
    pub const fn new(address: GuestAddress, token: String) -> Self {
        Self { address, token }
    }

    /// Tells the agent what the pod is like.
    ///
    /// # Errors
    /// When the agent cannot be reached, refuses, or takes longer than `deadline`.
    #[tracing::instrument(name = "set guest up", level = "trace", skip_all)]
    pub async fn setup(&self, request: &SetupSandboxRequest, deadline: Duration) -> Result<(), GuestError> {
        let call = async {
            let client = self.client().await?;
            // The first call of a connection shows the token, and the agent takes only a short one for that.
            if usize::try_from(request.compute_size()).is_ok_and(|length| length > SHORT) {
                let check = client.check(self.context(deadline), &CheckRequest::new()).await;
                check.map_err(failed("Check"))?;
            }
            client.setup_sandbox(self.context(deadline), request).await.map_err(failed("SetupSandbox"))
        };
        within("SetupSandbox", deadline, call).await.map(drop)
    }

    /// Ends all containers; they have `grace` between SIGTERM and SIGKILL.
    ///
    /// # Errors
    /// When the agent cannot be reached, refuses, or takes longer than `deadline`.
    #[tracing::instrument(name = "shut guest down", level = "trace", skip_all)]
    pub async fn shutdown(&self, grace: Duration, deadline: Duration) -> Result<(), GuestError> {
        let mut request = ShutdownRequest::new();
        request.timeout_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let call = async {
            self.client().await?.shutdown(self.context(deadline), &request).await.map_err(failed("Shutdown"))
        };
        within("Shutdown", deadline, call).await.map(drop)
    }

    /// Puts the guest's clock right by the host's; returns by how many nanoseconds, 0 if it was right.
    ///
    /// # Errors
    /// When the agent cannot be reached, refuses, or takes longer than `deadline`.
    pub async fn sync_clock(&self, deadline: Duration) -> Result<i64, GuestError> {
        const METHOD: &str = "SyncClock";
        let now = || epoch_ns(SystemTime::now());
        let call = async {
            let client = self.client().await?;
            let mut best: Option<Sample> = None;
            for _ in 0..CLOCK_SAMPLES {
                let packet = SyncClockPacket { ClientSendTime: now(), ..Default::default() };
                let answer = client.sync_clock(self.context(deadline), &packet).await;
                let sample = Sample::new(packet.ClientSendTime, &answer.map_err(failed(METHOD))?, now());
                best = Some(best.map_or(sample, |best| best.better(sample)));
            }
            let delta = best.map_or(0, Sample::correction);
            if delta != 0 {
                let packet = SyncClockPacket { Delta: delta, ClientSendTime: now(), ..Default::default() };
                client.sync_clock(self.context(deadline), &packet).await.map_err(failed(METHOD))?;
            }
            Ok(delta)
        };
        within(METHOD, deadline, call).await
    }

    fn context(&self, deadline: Duration) -> Context {
        let mut context = context::with_duration(deadline);
        context.add(TOKEN_METADATA.to_owned(), self.token.clone());
        context
    }

    async fn client(&self) -> Result<SandboxServiceClient, GuestError> {
        let socket = match &self.address {
            GuestAddress::Hybrid(path) => hybrid(path).await,
            GuestAddress::Vsock(cid) => vsock(*cid).await,
        };
        let socket =
            socket.map_err(|source| GuestError::Connect { address: self.address.clone(), source })?;
        Ok(SandboxServiceClient::new(Client::new(socket)))
    }
}

/// Connects through a hybrid socket: it wants the port in a line, and confirms with one.
///
/// A caller that gives up on this leaves it to go on in a task of its own: `vhost-device-vsock` 0.3.0 panics,
/// and no connection of the pod works any more, when a caller hangs up before it was answered.
async fn hybrid(path: &std::path::Path) -> io::Result<Socket> {
    let mut stream = UnixStream::connect(path).await?;
    let answer = async move {
        stream.write_all(format!("CONNECT {PORT_TTRPC}\n").as_bytes()).await?;
        let mut answer = Vec::new();
        // Byte by byte: what follows the line belongs to the guest's protocol.
        while !answer.ends_with(b"\n") {
            let byte = stream.read_u8().await?;
            answer.push(byte);
            if answer.len() as u64 > MAX_ANSWER {
                return Err(io::Error::other("the hybrid socket answers with an endless line"));
            }
        }
        if !answer.starts_with(b"OK") {
            let answer = String::from_utf8_lossy(&answer).trim_end().to_owned();
            return Err(io::Error::other(format!("the hybrid socket answers {answer:?}")));
        }
        Ok(stream)
    };
    // Nor does it wait for ever: each attempt at a guest that never answers would leave a task and a
    // descriptor.
    let answered =
        tokio::spawn(async { timeout(CONNECT, answer).await.unwrap_or(Err(io::ErrorKind::TimedOut.into())) });
    answered.await?.map(|stream| Socket::new(Frugal::new(stream)))
}

async fn vsock(cid: u32) -> io::Result<Socket> {
    let stream = VsockStream::connect(VsockAddr::new(cid, PORT_TTRPC)).await?;
    Ok(Socket::new(Frugal::new(stream)))
}

fn failed(method: &'static str) -> impl Fn(ttrpc::Error) -> GuestError {
    move |error| match error {
        ttrpc::Error::RpcStatus(status) => GuestError::Refused { method, why: printable(&status.message) },
        other => GuestError::Call { method, why: printable(&other.to_string()) },
    }
}

async fn within<T>(
    method: &'static str,
    deadline: Duration,
    call: impl Future<Output = Result<T, GuestError>>,
) -> Result<T, GuestError> {
    timeout(deadline, call).await.unwrap_or(Err(GuestError::Deadline { method, deadline }))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;
    use kuasar_common::api::sandbox_ttrpc::{SandboxService, create_sandbox_service};
    use protobuf::well_known_types::empty::Empty;
    use tokio::net::UnixListener;
    use ttrpc::r#async::{Server, TtrpcContext, transport::Listener};

    use super::*;

    /// An agent that remembers what it was asked, connection by connection.
    #[derive(Clone, Default)]
    struct Asked(Arc<Mutex<Vec<&'static str>>>);

    #[async_trait]
    impl SandboxService for Asked {
        async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<Empty> {
            self.0.lock().unwrap().push("Check");
            Ok(Empty::new())
        }

        async fn setup_sandbox(&self, _: &TtrpcContext, _: SetupSandboxRequest) -> ttrpc::Result<Empty> {
            self.0.lock().unwrap().push("SetupSandbox");
            Ok(Empty::new())
        }
    }

    #[tokio::test]
    async fn a_long_first_call_comes_after_a_short_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (sender, receiver) = tokio::sync::mpsc::channel::<io::Result<UnixStream>>(4);
        let asked = Asked::default();
        let connections = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let mut server = Server::new()
            .add_listener(Listener::new(connections))
            .register_service(create_sandbox_service(Arc::new(asked.clone())));
        server.start().await.unwrap();
        let connected = asked.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                stream.read_exact(&mut [0; 13]).await.unwrap();
                connected.0.lock().unwrap().push("CONNECT");
                stream.write_all(b"OK 1024\n").await.unwrap();
                sender.send(Ok(stream)).await.unwrap();
            }
        });
        let guest = Guest::new(GuestAddress::Hybrid(path), "t".into());
        let mut request = SetupSandboxRequest::new();
        guest.setup(&request, Duration::from_secs(10)).await.unwrap();
        request.resolv_conf = "x".repeat(SHORT);
        guest.setup(&request, Duration::from_secs(10)).await.unwrap();
        let asked = asked.0.lock().unwrap();
        assert_eq!(*asked, ["CONNECT", "SetupSandbox", "CONNECT", "Check", "SetupSandbox"]);
    }

    #[tokio::test]
    async fn whoever_gives_up_does_not_hang_up_before_the_answer() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        assert!(timeout(Duration::from_millis(50), hybrid(&path)).await.is_err(), "nobody answers");
        let (mut vsock, _) = listener.accept().await.unwrap();
        let mut asked = [0; 13];
        vsock.read_exact(&mut asked).await.unwrap();
        vsock.write_all(b"OK 1024\n").await.expect("the caller is still there");
        assert_eq!(vsock.read(&mut asked).await.unwrap(), 0, "and hangs up then");
    }

    #[tokio::test]
    async fn a_socket_that_refuses_or_hangs_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let guest = Guest::new(GuestAddress::Hybrid(path.clone()), "t".into());
        let call = || guest.shutdown(Duration::ZERO, Duration::from_millis(200));
        let absent = call().await.unwrap_err().to_string();
        assert!(absent.starts_with("connecting to the guest's agent at hvsock:///"), "{absent}");
        let listener = UnixListener::bind(&path).unwrap();
        let hanging = call().await.unwrap_err().to_string();
        assert_eq!(hanging, "calling Shutdown of the guest's agent: no answer within 200ms");
        drop(listener.accept().await.unwrap());
        let (refused, ()) = tokio::join!(call(), async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 13];
            stream.read_exact(&mut asked).await.unwrap();
            assert_eq!(&asked, b"CONNECT 1024\n");
            stream.write_all(b"NO such port\n").await.unwrap();
        });
        let refused = refused.unwrap_err().to_string();
        assert!(refused.ends_with("the hybrid socket answers \"NO such port\""), "{refused}");
    }
}
