//! containerd's own list of sandboxes, over its gRPC socket.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use async_trait::async_trait;
use tonic::{
    Request, Status,
    metadata::AsciiMetadataValue,
    transport::{Endpoint, Error},
};

use crate::{
    pod::Known,
    protos::controller::{StoreListRequest, store_client::StoreClient},
};

/// containerd has this long to take the connection, and to answer.
const DEADLINE: Duration = Duration::from_secs(10);
/// As containerd's own limit.
const MAX_MESSAGE: usize = 16 << 20;

/// Why the list is not known.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// The socket, or what is behind it.
    #[error("connecting to containerd at {}: {source}", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: Error,
    },
    /// The answer.
    #[error("asking containerd for its sandboxes: {0}")]
    Answer(#[from] Status),
    /// A name that cannot be sent.
    #[error("containerd's namespace {0:?} is no plain text")]
    Namespace(String),
}

/// Asks containerd for its sandboxes.
#[derive(Clone, Debug)]
pub struct SandboxList {
    socket: PathBuf,
}

impl SandboxList {
    /// Over this socket. Connected anew for every question: they are rare, and containerd restarts.
    #[must_use]
    pub const fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    async fn ask(&self, namespace: &str) -> Result<BTreeSet<String>, ListError> {
        let failed = |source| ListError::Connect { socket: self.socket.clone(), source };
        let endpoint = Endpoint::from_shared(format!("unix://{}", self.socket.display())).map_err(failed)?;
        let channel = endpoint.connect_timeout(DEADLINE).timeout(DEADLINE).connect().await.map_err(failed)?;
        let mut client = StoreClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        let mut request = Request::new(StoreListRequest::default());
        let name = AsciiMetadataValue::try_from(namespace);
        let name = name.map_err(|_| ListError::Namespace(namespace.to_owned()))?;
        request.metadata_mut().insert("containerd-namespace", name);
        let list = client.list(request).await?.into_inner().list;
        Ok(list.into_iter().map(|sandbox| sandbox.sandbox_id).collect())
    }
}

#[async_trait]
impl Known for SandboxList {
    async fn known(&self, namespace: &str) -> Result<BTreeSet<String>, ListError> {
        self.ask(namespace).await
    }
}
