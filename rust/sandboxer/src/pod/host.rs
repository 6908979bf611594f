//! `kuasar.host.v1.Host` on the pod's `host.sock`: what the relay asks for when containers come and go.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use async_trait::async_trait;
use kuasar_common::{
    api::{
        host::{self, PrepareRequest, PrepareResponse, ReleaseRequest, UpdateRequest},
        host_ttrpc::{Host, create_host},
    },
    constants::pod_files,
};
use protobuf::well_known_types::empty::Empty;
use tokio::{net::UnixListener, sync::oneshot, task::JoinHandle};
use tracing::{Instrument, Span};
use ttrpc::{
    Code,
    asynchronous::{Server, TtrpcContext, transport::Listener},
};

use super::Pod;
use crate::{
    container::{HostSocket, StorageError, mount::RootfsMount},
    incoming::Incoming,
};

/// The server; ends when dropped.
#[derive(Debug)]
pub(super) struct HostServer {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl HostServer {
    /// Serves on the pod's socket, in place of one that an earlier daemon left.
    pub(super) async fn start(pod: &Arc<Pod>) -> io::Result<Self> {
        let listener = bind(&pod.dir().join(pod_files::HOST_SOCKET))?;
        let service = Arc::new(HostService { pod: Arc::downgrade(pod) });
        let mut server = Server::new()
            .add_listener(Listener::new(Incoming::new(listener)))
            .register_service(create_host(service));
        server.start().await.map_err(|e| io::Error::other(e.to_string()))?;
        let (stop, stopped) = oneshot::channel();
        let serving = async move {
            // Sent or dropped: both mean the end.
            let _ = stopped.await;
            if let Err(error) = server.shutdown().await {
                tracing::debug!(%error, "ending the host service");
            }
        };
        Ok(Self { stop, task: tokio::spawn(serving.instrument(pod.span())) })
    }

    /// Stops serving.
    pub(super) async fn stop(self) {
        drop(self.stop);
        // It has a deadline of its own.
        let _ = self.task.await;
    }
}

/// Binds a unix socket that only root may use, replacing what is left of an earlier one.
pub(super) fn bind(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

struct HostService {
    pod: Weak<Pod>,
}

#[async_trait]
impl Host for HostService {
    async fn prepare(&self, _: &TtrpcContext, request: PrepareRequest) -> ttrpc::Result<PrepareResponse> {
        let pod = self.pod()?;
        let span = pod.span();
        let work = async move {
            let rootfs = request.rootfs.into_iter().map(|mount| RootfsMount {
                kind: mount.type_,
                source: mount.source,
                target: mount.target,
                options: mount.options,
            });
            let bundle = PathBuf::from(request.bundle);
            pod.prepare(request.container_id, bundle, rootfs.collect()).await
        };
        let mut response = PrepareResponse::new();
        let (bundle, sockets) = apart(span, work).await?;
        response.bundle = bundle;
        let named = |socket: HostSocket| host::HostSocket {
            host: socket.host.to_string_lossy().into_owned(),
            guest: socket.guest,
            ..Default::default()
        };
        response.sockets = sockets.into_iter().map(named).collect();
        Ok(response)
    }

    async fn release(&self, _: &TtrpcContext, request: ReleaseRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod()?;
        apart(pod.span(), async move { pod.release(request.container_id).await }).await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod()?;
        let span = pod.span();
        let work = async move { pod.update_container(&request.container_id, &request.resources) };
        apart(span, work).await?;
        Ok(Empty::new())
    }
}

impl HostService {
    fn pod(&self) -> ttrpc::Result<Arc<Pod>> {
        self.pod.upgrade().ok_or_else(|| status(Code::NOT_FOUND, "the pod is gone"))
    }
}

/// Runs work in a task of its own: a relay that hangs up must not leave it half done.
async fn apart<T: Send + 'static>(
    span: Span,
    work: impl Future<Output = Result<T, StorageError>> + Send + 'static,
) -> ttrpc::Result<T> {
    let work = async move { work.await.inspect_err(|error| tracing::warn!(%error, "serving the relay")) };
    match tokio::spawn(work.instrument(span)).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => {
            let code = if error.is_refusal() { Code::FAILED_PRECONDITION } else { Code::INTERNAL };
            Err(status(code, error.to_string()))
        }
        Err(error) => Err(status(Code::INTERNAL, format!("the daemon failed: {error}"))),
    }
}

fn status(code: Code, message: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message.into()))
}
