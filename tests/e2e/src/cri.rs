//! The container runtime interface, as the kubelet uses it.

#[allow(missing_docs, unreachable_pub, clippy::pedantic)]
mod generated {
    tonic::include_proto!("runtime.v1");
}

use std::{collections::HashMap, path::Path, time::Duration};

use anyhow::{Context, Result};
use tonic::transport::{Channel, Endpoint};

pub use generated::*;
use runtime_service_client::RuntimeServiceClient;

use crate::suite::patient;

/// Deadline of every call. A pod starts in seconds under emulation; this is for a call that hangs.
pub const DEADLINE: Duration = Duration::from_secs(120);
/// Time for a command in a container.
const EXEC: Duration = Duration::from_secs(60);

/// CRI's answer: a value, or containerd's error with its message.
pub type Answer<T> = Result<T, tonic::Status>;

/// A client of one containerd.
#[derive(Clone, Debug)]
pub struct Cri {
    client: RuntimeServiceClient<Channel>,
}

/// Result of an exec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Cri {
    /// Connects to containerd's socket.
    ///
    /// # Errors
    /// When nobody listens there.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let url = format!("unix://{}", socket.display());
        let channel = Endpoint::try_from(url)?
            .timeout(patient(DEADLINE))
            .connect()
            .await
            .with_context(|| format!("connecting to containerd at {}", socket.display()))?;
        // A log line of a container may come back in one exec answer.
        let client = RuntimeServiceClient::new(channel).max_decoding_message_size(16 << 20);
        Ok(Self { client })
    }

    fn client(&self) -> RuntimeServiceClient<Channel> {
        self.client.clone()
    }

    /// Name and version of the runtime.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn version(&self) -> Answer<VersionResponse> {
        let request = VersionRequest { version: "v1".into() };
        Ok(self.client().version(request).await?.into_inner())
    }

    /// Conditions that do not hold, such as a network that is not ready. That containerd finds the host's
    /// cgroups old is none.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn complaints(&self) -> Answer<Vec<String>> {
        let answer = self.client().status(StatusRequest { verbose: false }).await?.into_inner();
        let conditions = answer.status.unwrap_or_default().conditions.into_iter();
        Ok(conditions
            .filter(|c| !c.status && c.r#type != "ContainerdHasNoDeprecationWarnings")
            .map(|c| format!("{}: {} {}", c.r#type, c.reason, c.message))
            .collect())
    }

    /// Runs a pod, returns its id.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn run_pod(&self, config: &PodSandboxConfig, handler: &str) -> Answer<String> {
        let request =
            RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
        Ok(self.client().run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    }

    /// Stops a pod.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn stop_pod(&self, id: &str) -> Answer<()> {
        self.client().stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: id.to_owned() }).await?;
        Ok(())
    }

    /// Removes a pod.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn remove_pod(&self, id: &str) -> Answer<()> {
        self.client().remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() }).await?;
        Ok(())
    }

    /// A pod's status and what the runtime adds to it.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn pod_status(&self, id: &str) -> Answer<(PodSandboxStatus, HashMap<String, String>)> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: true };
        let answer = self.client().pod_sandbox_status(request).await?.into_inner();
        Ok((answer.status.unwrap_or_default(), answer.info))
    }

    /// All pods.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn pods(&self) -> Answer<Vec<PodSandbox>> {
        Ok(self.client().list_pod_sandbox(ListPodSandboxRequest {}).await?.into_inner().items)
    }

    /// Creates a container, returns its id.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn create(&self, pod: &str, of: &PodSandboxConfig, config: ContainerConfig) -> Answer<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config),
            sandbox_config: Some(of.clone()),
        };
        Ok(self.client().create_container(request).await?.into_inner().container_id)
    }

    /// Starts a container.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn start(&self, id: &str) -> Answer<()> {
        self.client().start_container(StartContainerRequest { container_id: id.to_owned() }).await?;
        Ok(())
    }

    /// Stops a container, with seconds between SIGTERM and SIGKILL.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn stop(&self, id: &str, timeout: i64) -> Answer<()> {
        self.client().stop_container(StopContainerRequest { container_id: id.to_owned(), timeout }).await?;
        Ok(())
    }

    /// Removes a container.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn remove(&self, id: &str) -> Answer<()> {
        self.client().remove_container(RemoveContainerRequest { container_id: id.to_owned() }).await?;
        Ok(())
    }

    /// A container's status.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn status(&self, id: &str) -> Answer<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        Ok(self.client().container_status(request).await?.into_inner().status.unwrap_or_default())
    }

    /// Containers of a pod.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn containers(&self, pod: &str) -> Answer<Vec<Container>> {
        let filter = Some(ContainerFilter { pod_sandbox_id: pod.to_owned(), ..Default::default() });
        Ok(self.client().list_containers(ListContainersRequest { filter }).await?.into_inner().containers)
    }

    /// Runs a command in a container to its end.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn exec(&self, id: &str, command: &[&str]) -> Answer<Output> {
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: i64::try_from(patient(EXEC).as_secs()).unwrap_or(i64::MAX),
        };
        let answer = self.client().exec_sync(request).await?.into_inner();
        Ok(Output {
            code: answer.exit_code,
            stdout: String::from_utf8_lossy(&answer.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&answer.stderr).into_owned(),
        })
    }

    /// Changes a running container's limits.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn update(&self, id: &str, linux: LinuxContainerResources) -> Answer<()> {
        let request = UpdateContainerResourcesRequest { container_id: id.to_owned(), linux: Some(linux) };
        self.client().update_container_resources(request).await?;
        Ok(())
    }

    /// Figures of all running containers of the node.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn stats(&self) -> Answer<Vec<ContainerStats>> {
        Ok(self.client().list_container_stats(ListContainerStatsRequest {}).await?.into_inner().stats)
    }

    /// Figures of a pod.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn pod_stats(&self, id: &str) -> Answer<PodSandboxStats> {
        let request = PodSandboxStatsRequest { pod_sandbox_id: id.to_owned() };
        Ok(self.client().pod_sandbox_stats(request).await?.into_inner().stats.unwrap_or_default())
    }

    /// Figures of all pods of the node, or of one.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn stats_of_pods(&self, id: Option<&str>) -> Answer<Vec<PodSandboxStats>> {
        let filter = id.map(|id| PodSandboxStatsFilter { id: id.to_owned() });
        let request = ListPodSandboxStatsRequest { filter };
        Ok(self.client().list_pod_sandbox_stats(request).await?.into_inner().stats)
    }

    /// Changes what a running pod may use.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn update_pod(&self, id: &str, resources: LinuxContainerResources) -> Answer<()> {
        let request = UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: id.to_owned(),
            overhead: Some(LinuxContainerResources::default()),
            resources: Some(resources),
        };
        self.client().update_pod_sandbox_resources(request).await?;
        Ok(())
    }

    /// Prepares connections to a port on the pod's loopback; returns the URL at which they are made.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn port_forward(&self, pod: &str, port: u16) -> Answer<String> {
        let request = PortForwardRequest { pod_sandbox_id: pod.to_owned(), port: vec![port.into()] };
        Ok(self.client().port_forward(request).await?.into_inner().url)
    }

    /// Waits until a container has ended and returns its last status.
    ///
    /// # Errors
    /// As containerd says, or when it is still running at the deadline.
    pub async fn ended(&self, id: &str, deadline: Duration) -> Answer<ContainerStatus> {
        let deadline = patient(deadline);
        let end = tokio::time::Instant::now() + deadline;
        loop {
            let status = self.status(id).await?;
            if status.state() == ContainerState::ContainerExited {
                return Ok(status);
            }
            if tokio::time::Instant::now() >= end {
                let why = format!("container {id} is still {:?} after {deadline:?}", status.state());
                return Err(tonic::Status::deadline_exceeded(why));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
