//! A guest that lies by script: answers that are none, silence, and garbage in place of a connection.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use ttrpc::{
    asynchronous::{MethodHandler, Service, TtrpcContext},
    proto::{Request, Response, Status},
};

use super::Guest;

/// Reply that a call gets in place of its answer.
#[derive(Clone, Debug)]
pub enum Lie {
    /// These bytes.
    Payload(Vec<u8>),
    /// This error, as it is.
    Error(Status),
    /// Nothing, ever.
    Silence,
}

/// Lies by the methods that they answer.
pub type Lies = HashMap<&'static str, Lie>;

/// Puts the script before every method of these services.
pub fn lying(guest: &Arc<Guest>, services: HashMap<String, Service>) -> HashMap<String, Service> {
    let lie = |(name, honest): (String, Box<dyn MethodHandler + Send + Sync>)| {
        let guest = Arc::clone(guest);
        let liar: Box<dyn MethodHandler + Send + Sync> = Box::new(Liar { guest, name: name.clone(), honest });
        (name, liar)
    };
    let service = |(name, service): (String, Service)| {
        let methods = service.methods.into_iter().map(lie).collect();
        (name, Service { methods, streams: service.streams })
    };
    services.into_iter().map(service).collect()
}

struct Liar {
    guest: Arc<Guest>,
    name: String,
    honest: Box<dyn MethodHandler + Send + Sync>,
}

#[async_trait]
impl MethodHandler for Liar {
    async fn handler(&self, ctx: TtrpcContext, req: Request) -> ttrpc::Result<Response> {
        let lie = self.guest.lies.lock().unwrap().get(self.name.as_str()).cloned();
        let mut response = Response::new();
        match lie {
            None => return self.honest.handler(ctx, req).await,
            Some(Lie::Silence) => std::future::pending().await,
            Some(Lie::Error(status)) => response.set_status(status),
            Some(Lie::Payload(payload)) => {
                response.set_status(ttrpc::get_status(ttrpc::Code::OK, ""));
                response.payload = payload;
            }
        }
        Ok(response)
    }
}
