//! The port of calls and streams: nothing of a connection goes further before its first frame has shown the
//! pod's token.

use std::{io, sync::Arc};

use kuasar_common::{
    constants::PORT_TTRPC,
    streaming::{
        frame::{self, MAX_FIRST},
        route::{Purpose, Rewound, of_first},
    },
};
use tokio::{io::AsyncWriteExt, sync::mpsc};

use crate::{
    auth::{Token, first_call},
    stdio::registry::Transport,
    strangers::Strangers,
    streaming::Streaming,
};

/// Hands connections to the streaming service, or else to ttrpc's own server: their first frame tells.
pub struct Calls<S> {
    token: Arc<Token>,
    server: mpsc::Sender<Rewound<S>>,
    streaming: Arc<Streaming>,
    strangers: Arc<Strangers>,
}

impl<S: Transport + 'static> Calls<S> {
    /// For connections that know `token`: calls go to `server`.
    #[must_use]
    pub fn new(token: Arc<Token>, server: mpsc::Sender<Rewound<S>>, streaming: Arc<Streaming>) -> Self {
        Self { token, server, streaming, strangers: Strangers::new(PORT_TTRPC) }
    }

    /// Deals with one accepted connection, in a task of its own.
    pub fn accept(&self, connection: S) {
        let place = self.strangers.enter();
        let (token, server) = (Arc::clone(&self.token), self.server.clone());
        let (streaming, strangers) = (Arc::clone(&self.streaming), Arc::clone(&self.strangers));
        tokio::spawn(async move {
            match place.greet(greet(connection, &token)).await {
                Ok(Ok(Purpose::Stream(connection, first))) => {
                    streaming.serve(Box::new(connection), &first).await;
                }
                Ok(Ok(Purpose::Calls(connection))) => drop(server.send(connection).await),
                Ok(Ok(Purpose::Nothing)) => {}
                Ok(Err(error)) => strangers.refused(&error.to_string()),
                Err(refusal) => strangers.refused(&refusal.to_string()),
            }
        });
    }
}

async fn greet<S: Transport>(mut connection: S, token: &Token) -> io::Result<Purpose<S>> {
    let Some(first) = frame::read_at_most(&mut connection, MAX_FIRST).await? else {
        return Ok(Purpose::Nothing);
    };
    match first_call(&first, token) {
        Ok(()) => Ok(of_first(connection, first)),
        Err(answer) => {
            connection.write_all(&answer.encode()).await?;
            connection.flush().await?;
            Err(io::Error::new(io::ErrorKind::PermissionDenied, "its first call has a wrong token, or none"))
        }
    }
}
