//! The relay's requests to the daemon. The daemon may be down or restarting; nothing else of the relay
//! depends on it.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use kuasar_common::api::{
    host::{PrepareRequest, PrepareResponse, ReleaseRequest, UpdateRequest},
    host_ttrpc::HostClient,
};
use tokio::{
    net::UnixStream,
    time::{Instant, sleep, timeout_at},
};
use ttrpc::{
    asynchronous::{Client, transport::Socket},
    context,
    proto::Status,
};

/// Longest time that a new container waits for the daemon.
const PREPARE_LIMIT: Duration = Duration::from_secs(60);
/// Longest time that the end of a container waits for a daemon that answers.
const RELEASE_LIMIT: Duration = Duration::from_secs(30);
/// Longest time that the end of a container waits for a daemon that is down.
const RELEASE_CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Pauses between attempts to reach the daemon.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Why the daemon did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostError {
    /// It answered with an error.
    #[error("{}", .0.message())]
    Refused(Status),
    #[error(
        "{doing}: the daemon vmm-sandboxer did not answer on {socket} within {} s ({why}); containers that run are not \
         concerned, new ones need it: is it running?", limit.as_secs()
    )]
    Absent { doing: String, socket: PathBuf, limit: Duration, why: String },
}

/// The daemon, as seen from this relay.
pub(crate) struct Host {
    socket: PathBuf,
}

impl Host {
    pub(crate) fn new(pod_dir: &Path) -> Self {
        Self { socket: pod_dir.join(kuasar_common::constants::pod_files::HOST_SOCKET) }
    }

    /// Has a container's files made ready. Waits for a daemon that is down.
    pub(crate) async fn prepare(&self, request: &PrepareRequest) -> Result<PrepareResponse, HostError> {
        let deadline = Instant::now() + PREPARE_LIMIT;
        let mut why = String::from("it never took the call");
        let mut pause = RETRY.0;
        let work = async {
            loop {
                match self.connect().await {
                    Ok(client) => match client.prepare(until(deadline), request).await {
                        Ok(response) => return Ok(response),
                        Err(ttrpc::Error::RpcStatus(status)) => return Err(HostError::Refused(status)),
                        // It went down in the middle; Prepare is idempotent.
                        Err(e) => why = e.to_string(),
                    },
                    Err(e) => why = e.to_string(),
                }
                sleep(pause).await;
                pause = (pause * 2).min(RETRY.1);
            }
        };
        let result = timeout_at(deadline, work).await;
        result.unwrap_or_else(|_| {
            let doing = format!("preparing container {}", request.container_id);
            Err(HostError::Absent { doing, socket: self.socket.clone(), limit: PREPARE_LIMIT, why })
        })
    }

    /// Has a container's files undone. Unknown containers are no error of the daemon's.
    pub(crate) async fn release(&self, container_id: &str) -> Result<(), HostError> {
        let request = ReleaseRequest { container_id: container_id.to_owned(), ..Default::default() };
        let release = async |client: HostClient| {
            client.release(context::with_duration(RELEASE_LIMIT), &request).await.map(drop)
        };
        self.call(format!("releasing container {container_id}"), release).await
    }

    /// Has it set what of a container's new limits is the host's.
    pub(crate) async fn update(&self, request: &UpdateRequest) -> Result<(), HostError> {
        let update = async |client: HostClient| {
            client.update(context::with_duration(RELEASE_LIMIT), request).await.map(drop)
        };
        self.call(format!("updating container {}", request.container_id), update).await
    }

    async fn call(
        &self,
        doing: String,
        call: impl AsyncFnOnce(HostClient) -> ttrpc::Result<()>,
    ) -> Result<(), HostError> {
        let absent = |limit, why| HostError::Absent { doing, socket: self.socket.clone(), limit, why };
        match self.connect_within(RELEASE_CONNECT_LIMIT).await {
            Ok(client) => match call(client).await {
                Ok(()) => Ok(()),
                Err(ttrpc::Error::RpcStatus(status)) => Err(HostError::Refused(status)),
                Err(e) => Err(absent(RELEASE_LIMIT, e.to_string())),
            },
            Err(e) => Err(absent(RELEASE_CONNECT_LIMIT, e.to_string())),
        }
    }

    async fn connect(&self) -> std::io::Result<HostClient> {
        Ok(HostClient::new(Client::new(Socket::from(UnixStream::connect(&self.socket).await?))))
    }

    async fn connect_within(&self, limit: Duration) -> std::io::Result<HostClient> {
        let deadline = Instant::now() + limit;
        let mut pause = RETRY.0;
        loop {
            match timeout_at(deadline, self.connect()).await {
                Ok(Err(_)) if Instant::now() + pause < deadline => sleep(pause).await,
                Ok(result) => return result,
                Err(_) => return Err(std::io::ErrorKind::TimedOut.into()),
            }
            pause = (pause * 2).min(RETRY.1);
        }
    }
}

fn until(deadline: Instant) -> context::Context {
    context::with_duration(deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)))
}
