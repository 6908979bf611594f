//! containerd's own list of sandboxes, which it compares with nobody's.

use anyhow::Result;
use tonic::{Request, transport::Endpoint};

use crate::lab::{NAMESPACE, SOCKET};

#[allow(clippy::all, clippy::pedantic, missing_docs, unreachable_pub)]
mod generated {
    tonic::include_proto!("containerd.services.sandbox.v1");
}

/// Makes containerd forget a sandbox without telling anybody, as some of its failures do.
///
/// # Errors
/// When it does not know it.
pub async fn forget(id: &str) -> Result<()> {
    let channel = Endpoint::try_from(format!("unix://{SOCKET}"))?.connect().await?;
    let mut request = Request::new(generated::StoreDeleteRequest { sandbox_id: id.to_owned() });
    request.metadata_mut().insert("containerd-namespace", NAMESPACE.parse()?);
    generated::store_client::StoreClient::new(channel).delete(request).await?;
    Ok(())
}
