//! `containerd.services.sandbox.v1.Controller`: containerd's requests about pods.
//!
//! Bodies that change something run in tasks of their own, because tonic drops a handler whose client went
//! away.

mod info;
mod update;

use std::{collections::HashMap, sync::Arc};

use tonic::{Request, Response, Status};
use tracing::Instrument;

use crate::{
    pod::{Caller, Phase, PodError, PodSpec, Pods, namespace_of_cri},
    protos::{
        controller::{
            ControllerCreateRequest, ControllerCreateResponse, ControllerMetricsRequest,
            ControllerMetricsResponse, ControllerPlatformRequest, ControllerPlatformResponse,
            ControllerShutdownRequest, ControllerShutdownResponse, ControllerStartRequest,
            ControllerStartResponse, ControllerStatusRequest, ControllerStatusResponse,
            ControllerStopRequest, ControllerStopResponse, ControllerUpdateRequest, ControllerUpdateResponse,
            ControllerWaitRequest, ControllerWaitResponse, controller_server,
        },
        timestamp,
        types::Platform,
    },
};

/// containerd starts shim binaries for anything below 3.
const TASK_API_VERSION: u32 = 3;

/// The service.
#[derive(Clone, Debug)]
pub struct Controller {
    pods: Arc<Pods>,
}

impl Controller {
    /// Serves these pods.
    #[must_use]
    pub const fn new(pods: Arc<Pods>) -> Self {
        Self { pods }
    }

    /// For tonic's router.
    #[must_use]
    pub fn into_server(self) -> controller_server::ControllerServer<Self> {
        // As containerd's own limit.
        const MAX_MESSAGE: usize = 16 << 20;
        controller_server::ControllerServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }
}

impl From<PodError> for Status {
    fn from(error: PodError) -> Self {
        let text = error.to_string();
        match error {
            PodError::NotFound(_) => Self::not_found(text),
            PodError::Exists(_) => Self::already_exists(text),
            PodError::Invalid(_) => Self::invalid_argument(text),
            PodError::Refused(_) => Self::failed_precondition(text),
            PodError::Cancelled(_) => Self::cancelled(text),
            PodError::Start { .. } | PodError::StartVm(_) | PodError::End { .. } => Self::internal(text),
        }
    }
}

/// Runs `work` in a task that goes on when the client does not wait any more, and logs why it failed.
async fn apart<T: Send + 'static>(
    id: &str,
    work: impl Future<Output = Result<T, PodError>> + Send + 'static,
) -> Result<T, Status> {
    quietly_apart(id, async {
        work.await.inspect_err(|error| tracing::warn!(%error, "answering containerd"))
    })
    .await
}

/// As [`apart`], for work that logs its failures itself.
async fn quietly_apart<T: Send + 'static>(
    id: &str,
    work: impl Future<Output = Result<T, PodError>> + Send + 'static,
) -> Result<T, Status> {
    let task = tokio::spawn(work.instrument(tracing::info_span!("pod", id)));
    match task.await {
        Ok(done) => Ok(done?),
        Err(error) => Err(Status::internal(format!("the daemon failed: {error}"))),
    }
}

#[tonic::async_trait]
impl controller_server::Controller for Controller {
    async fn create(
        &self,
        request: Request<ControllerCreateRequest>,
    ) -> Result<Response<ControllerCreateResponse>, Status> {
        let namespace = namespace(&request);
        let request = request.into_inner();
        let (pods, id) = (self.pods.clone(), request.sandbox_id.clone());
        apart(&request.sandbox_id.clone(), async move {
            let mut spec = PodSpec::from_request(&request, pods.allowed_annotations())?;
            spec.namespace = namespace;
            tracing::info!(name = spec.name, "creating the sandbox");
            pods.create(&request.sandbox_id, spec).await
        })
        .await?;
        Ok(Response::new(ControllerCreateResponse { sandbox_id: id }))
    }

    async fn start(
        &self,
        request: Request<ControllerStartRequest>,
    ) -> Result<Response<ControllerStartResponse>, Status> {
        let id = request.into_inner().sandbox_id;
        let pod = self.pods.get(&id)?;
        let (guard, caller) = Caller::new();
        let (pods, starting) = (self.pods.clone(), pod.clone());
        let view = apart(&id, async move {
            let started = starting.start(caller).await;
            if started.is_err() && !starting.dir().exists() {
                pods.forget(&starting);
            }
            started
        })
        .await?;
        drop(guard);
        Ok(Response::new(ControllerStartResponse {
            sandbox_id: id,
            pid: view.pid,
            created_at: Some(timestamp(view.created)),
            labels: pod.labels().clone().into_iter().collect(),
            address: pod.address(),
            version: TASK_API_VERSION,
            spec: None,
        }))
    }

    async fn platform(
        &self,
        _: Request<ControllerPlatformRequest>,
    ) -> Result<Response<ControllerPlatformResponse>, Status> {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let platform =
            Platform { os: "linux".to_owned(), architecture: architecture.to_owned(), ..Platform::default() };
        Ok(Response::new(ControllerPlatformResponse { platform: Some(platform) }))
    }

    async fn stop(
        &self,
        request: Request<ControllerStopRequest>,
    ) -> Result<Response<ControllerStopResponse>, Status> {
        let id = request.into_inner().sandbox_id;
        let pod = self.pods.get(&id)?;
        apart(&id, async move { pod.stop().await }).await?;
        Ok(Response::new(ControllerStopResponse {}))
    }

    async fn wait(
        &self,
        request: Request<ControllerWaitRequest>,
    ) -> Result<Response<ControllerWaitResponse>, Status> {
        let pod = self.pods.get(&request.into_inner().sandbox_id)?;
        let mut hung_up = HungUp(Some(self.pods.clone()));
        let exit = pod.wait().await;
        hung_up.0 = None;
        Ok(Response::new(ControllerWaitResponse {
            exit_status: exit.code,
            exited_at: Some(timestamp(exit.at)),
        }))
    }

    async fn status(
        &self,
        request: Request<ControllerStatusRequest>,
    ) -> Result<Response<ControllerStatusResponse>, Status> {
        let request = request.into_inner();
        let pod = self.pods.get(&request.sandbox_id)?;
        let view = pod.view();
        let state = if view.phase == Phase::Running { "SANDBOX_READY" } else { "SANDBOX_NOTREADY" };
        Ok(Response::new(ControllerStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: view.pid,
            state: state.to_owned(),
            info: if request.verbose { info::of(&pod, &view) } else { HashMap::new() },
            created_at: Some(timestamp(view.created)),
            exited_at: view.exit.map(|exit| timestamp(exit.at)),
            extra: None,
            address: pod.address(),
            version: TASK_API_VERSION,
        }))
    }

    async fn shutdown(
        &self,
        request: Request<ControllerShutdownRequest>,
    ) -> Result<Response<ControllerShutdownResponse>, Status> {
        let id = request.into_inner().sandbox_id;
        let (pods, removing) = (self.pods.clone(), id.clone());
        apart(&id, async move { pods.remove(&removing).await }).await?;
        Ok(Response::new(ControllerShutdownResponse {}))
    }

    async fn metrics(
        &self,
        request: Request<ControllerMetricsRequest>,
    ) -> Result<Response<ControllerMetricsResponse>, Status> {
        let pod = self.pods.get(&request.into_inner().sandbox_id)?;
        // Files of the kernel, read at once, but as many as there are controllers.
        let metrics = tokio::task::spawn_blocking(move || pod.metrics()).await;
        let metrics = metrics.map_err(|error| Status::internal(format!("the daemon failed: {error}")))?;
        Ok(Response::new(ControllerMetricsResponse { metrics: Some(metrics) }))
    }

    async fn update(
        &self,
        request: Request<ControllerUpdateRequest>,
    ) -> Result<Response<ControllerUpdateResponse>, Status> {
        let request = request.into_inner();
        let pod = self.pods.get(&request.sandbox_id)?;
        if let Some(resources) = update::resources(&request)? {
            quietly_apart(&request.sandbox_id, async move { pod.update(resources).await }).await?;
        }
        Ok(Response::new(ControllerUpdateResponse {}))
    }
}

/// containerd's namespace, which it says beside each request.
fn namespace<T>(request: &Request<T>) -> String {
    let said = request.metadata().get("containerd-namespace").and_then(|name| name.to_str().ok());
    said.map_or_else(namespace_of_cri, str::to_owned)
}

/// Notices a caller that waits for a pod and hangs up before the pod ends. Such a caller was ended itself,
/// and may know less when it comes back.
struct HungUp(Option<Arc<Pods>>);

impl Drop for HungUp {
    fn drop(&mut self) {
        if let Some(pods) = &self.0 {
            pods.suspect();
        }
    }
}

#[cfg(test)]
mod tests;
