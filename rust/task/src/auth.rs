//! The pod's token, which every caller of the agent must know.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
};

use async_trait::async_trait;
use kuasar_common::{
    constants::TOKEN_METADATA,
    streaming::frame::{Frame, RESPONSE},
};
use protobuf::Message;
use ttrpc::{
    Code, Request, Response,
    r#async::{MethodHandler, Service, TtrpcContext},
};

use crate::limits::bounded;

/// The pod's secret, set once by the handshake.
#[derive(Default)]
pub struct Token {
    secret: OnceLock<String>,
}

impl Token {
    /// A token that nothing matches until it is set.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Sets the secret; later calls change nothing.
    pub fn set(&self, secret: String) {
        let _ = self.secret.set(secret);
    }

    /// Returns true if `presented` is the secret. Takes the same time wherever they differ.
    #[must_use]
    pub fn is(&self, presented: &str) -> bool {
        let Some(secret) = self.secret.get() else { return false };
        secret.len() == presented.len()
            && secret.bytes().zip(presented.bytes()).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
    }
}

/// Why a call without the token is refused.
const NO_TOKEN: &str = "the call does not carry the pod's token";

/// Returns true if a connection's first frame is a call that carries the token; if not, why not, as an answer
/// to it.
///
/// # Errors
/// When it does not.
pub fn first_call(frame: &Frame, token: &Token) -> Result<(), Frame> {
    let known = Request::parse_from_bytes(&frame.message)
        .is_ok_and(|call| call.metadata.iter().any(|p| p.key == TOKEN_METADATA && token.is(&p.value)));
    if known {
        return Ok(());
    }
    let why = format!("{NO_TOKEN} as {TOKEN_METADATA}");
    let mut response = Response::new();
    response.set_status(ttrpc::get_status(Code::PERMISSION_DENIED, why));
    let message = response.write_to_bytes().unwrap_or_default();
    Err(Frame { stream: frame.stream, kind: RESPONSE, flags: 0, message })
}

/// Puts the token's check before every method of the services, and what holds for all of them around it.
#[must_use]
pub fn guarded(services: HashMap<String, Service>, token: &Arc<Token>) -> HashMap<String, Service> {
    services.into_iter().map(|(name, service)| (name, guard(service, token))).collect()
}

fn guard(service: Service, token: &Arc<Token>) -> Service {
    let methods = service.methods.into_iter().map(|(name, inner)| {
        let guarded: Box<dyn MethodHandler + Send + Sync> =
            Box::new(Guarded { inner, token: Arc::clone(token) });
        (name, guarded)
    });
    // Streaming methods have no metadata to check; none may slip through unguarded.
    Service { methods: methods.collect(), streams: HashMap::new() }
}

struct Guarded {
    inner: Box<dyn MethodHandler + Send + Sync>,
    token: Arc<Token>,
}

#[async_trait]
impl MethodHandler for Guarded {
    async fn handler(&self, ctx: TtrpcContext, req: Request) -> ttrpc::Result<Response> {
        let known = ctx
            .metadata
            .get(TOKEN_METADATA)
            .is_some_and(|values| values.iter().any(|value| self.token.is(value)));
        if known {
            let method = req.method.clone();
            return bounded(&method, self.inner.handler(ctx, req)).await;
        }
        log::warn!("refused {}/{}: wrong or no token", req.service, req.method);
        let mut response = Response::new();
        response.set_status(ttrpc::get_status(
            Code::PERMISSION_DENIED,
            format!("{NO_TOKEN} as {TOKEN_METADATA}"),
        ));
        Ok(response)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_secret_matches_and_only_once_set() {
        let token = Token::new();
        assert!(!token.is(""));
        token.set("abc".into());
        token.set("other".into());
        assert!(token.is("abc"));
        for wrong in ["", "ab", "abd", "abcd", "other"] {
            assert!(!token.is(wrong), "{wrong}");
        }
    }
}
