//! containerd's own services, for what its CRI neither shows nor lets through.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tonic::{
    Code, Request,
    transport::{Channel, Endpoint},
};

use crate::lab::{NAMESPACE, SOCKET};

#[allow(clippy::all, clippy::pedantic, missing_docs, unreachable_pub)]
mod generated {
    tonic::include_proto!("containerd.services.sandbox.v1");
}

#[allow(clippy::all, clippy::pedantic, missing_docs, unreachable_pub)]
mod containers {
    tonic::include_proto!("containerd.services.containers.v1");
}

async fn channel() -> Result<Channel> {
    Ok(Endpoint::try_from(format!("unix://{SOCKET}"))?.connect().await?)
}

fn request<T>(message: T) -> Result<Request<T>> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", NAMESPACE.parse()?);
    Ok(request)
}

/// Makes containerd forget a sandbox without telling anybody, as some of its failures do.
///
/// # Errors
/// When it does not know it.
pub async fn forget(id: &str) -> Result<()> {
    let request = request(generated::StoreDeleteRequest { sandbox_id: id.to_owned() })?;
    generated::store_client::StoreClient::new(channel().await?).delete(request).await?;
    Ok(())
}

/// Returns true if containerd reaches a daemon: it asks it for a sandbox that nobody has.
///
/// # Errors
/// When containerd itself is not reached.
pub async fn reaches(sandboxer: &str) -> Result<bool> {
    let message =
        generated::ControllerStatusRequest { sandbox_id: "nobody".into(), sandboxer: sandboxer.into() };
    let mut client = generated::controller_client::ControllerClient::new(channel().await?);
    match client.status(request(message)?).await {
        Ok(_) => bail!("{sandboxer} has a sandbox \"nobody\""),
        Err(status) if status.code() == Code::Unavailable => Ok(false),
        Err(status) if status.code() == Code::NotFound => Ok(true),
        Err(status) => Err(status).context(format!("asking {sandboxer} through containerd")),
    }
}

/// Changes the OCI spec of a container that is created and not started: for what CRI does not let through.
///
/// # Errors
/// When containerd does not know it.
pub async fn change_spec(id: &str, change: impl FnOnce(&mut Value)) -> Result<()> {
    use containers::{GetContainerRequest, Mask, UpdateContainerRequest};
    let mut client = containers::containers_client::ContainersClient::new(channel().await?);
    let answer = client.get(request(GetContainerRequest { id: id.to_owned() })?).await?.into_inner();
    let mut container = answer.container.context("containerd answered without a container")?;
    let spec = container.spec.as_mut().context("the container has no spec")?;
    let mut json = serde_json::from_slice(&spec.value)?;
    change(&mut json);
    spec.value = serde_json::to_vec(&json)?;
    let update_mask = Some(Mask { paths: vec!["spec".into()] });
    client.update(request(UpdateContainerRequest { container: Some(container), update_mask })?).await?;
    Ok(())
}
