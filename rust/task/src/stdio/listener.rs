//! The first line of a stream's connection: who is it, and may it.

use std::sync::Arc;

use kuasar_common::{constants::PORT_STDIO, handshake::MAX_LINE, stdio::Hello};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

use super::registry::{Connection, Key, Registry, Transport};
use crate::{auth::Token, strangers::Strangers};

/// Takes connections in, checks them, and hands them to the registry.
pub struct StdioListener {
    registry: Arc<Registry>,
    token: Arc<Token>,
    strangers: Arc<Strangers>,
}

impl StdioListener {
    /// A listener that feeds `registry` with connections that know `token`.
    #[must_use]
    pub fn new(registry: Arc<Registry>, token: Arc<Token>) -> Self {
        Self { registry, token, strangers: Strangers::new(PORT_STDIO) }
    }

    /// Deals with one accepted connection, in a task of its own.
    pub fn accept(&self, transport: Box<dyn Transport>) {
        let place = self.strangers.enter();
        let (registry, token) = (Arc::clone(&self.registry), Arc::clone(&self.token));
        let strangers = Arc::clone(&self.strangers);
        tokio::spawn(async move {
            match place.greet(greet(transport, &registry, &token)).await {
                Ok(Ok(())) => {}
                Ok(Err(why)) => strangers.refused(&why),
                Err(refusal) => strangers.refused(&refusal.to_string()),
            }
        });
    }
}

async fn greet(transport: Box<dyn Transport>, registry: &Arc<Registry>, token: &Token) -> Result<(), String> {
    let mut connection: Connection = BufReader::new(transport);
    let key = read_hello(&mut connection, token).await.and_then(|hello| {
        let key = Key::from(&hello);
        registry.check(&key).map_err(|error| error.to_string())?;
        Ok(key)
    });
    let key = match key {
        Ok(key) => key,
        Err(why) => {
            refuse(&mut connection, &why).await;
            return Err(why);
        }
    };
    // The answer goes first: once attached, the connection belongs to the stream's owner.
    connection.write_all(b"OK\n").await.map_err(|error| error.to_string())?;
    connection.flush().await.map_err(|error| error.to_string())?;
    registry.attach(key, connection).map_err(|error| error.to_string())
}

async fn read_hello(connection: &mut Connection, token: &Token) -> Result<Hello, String> {
    let hello: Hello = first_line(connection).await?;
    if token.is(&hello.token) { Ok(hello) } else { Err("wrong token".to_owned()) }
}

/// Reads a connection's first line, which is JSON.
pub(crate) async fn first_line<T: DeserializeOwned>(connection: &mut Connection) -> Result<T, String> {
    let mut line = Vec::new();
    let limit = u64::try_from(MAX_LINE).unwrap_or(u64::MAX);
    let read = (&mut *connection).take(limit).read_until(b'\n', &mut line).await;
    read.map_err(|error| format!("reading the first line: {error}"))?;
    if line.last() != Some(&b'\n') {
        return Err(format!("the first line did not end within {MAX_LINE} bytes"));
    }
    serde_json::from_slice(&line).map_err(|error| format!("parsing the first line: {error}"))
}

/// Answers a first line that is not accepted.
pub(crate) async fn refuse(connection: &mut Connection, why: &str) {
    let _ = connection.write_all(format!("ERR {why}\n").as_bytes()).await;
    let _ = connection.flush().await;
}

#[cfg(test)]
mod tests {
    use kuasar_common::stdio::Stream;
    use tokio::io::duplex;

    use super::*;

    async fn say(line: &[u8]) -> (String, Arc<Registry>) {
        let registry = Arc::new(Registry::default());
        let token = Token::new();
        token.set("ab".repeat(32));
        let listener = StdioListener::new(Arc::clone(&registry), token);
        let (ours, mut theirs) = duplex(16 * 1024);
        listener.accept(Box::new(ours));
        theirs.write_all(line).await.unwrap();
        let mut answer = String::new();
        BufReader::new(&mut theirs).read_line(&mut answer).await.unwrap();
        tokio::task::yield_now().await;
        (answer, registry)
    }

    #[tokio::test]
    async fn a_connection_with_the_token_waits_for_its_process() {
        let hello = Hello {
            token: "ab".repeat(32),
            container: "c".into(),
            exec: String::new(),
            stream: Stream::Stdout,
        };
        let line = serde_json::to_string(&hello).unwrap() + "\n";
        let (answer, registry) = say(line.as_bytes()).await;
        assert_eq!(answer, "OK\n");
        assert_eq!(registry.pending(), 1);
    }

    #[tokio::test]
    async fn others_are_told_why_not() {
        let wrong = br#"{"token":"x","container":"c","stream":"stdout"}"#;
        let (answer, registry) = say(&[wrong.as_slice(), b"\n"].concat()).await;
        assert_eq!(answer, "ERR wrong token\n");
        assert_eq!(registry.pending(), 0);
        let (answer, _) = say(b"{\"token\":1}\n").await;
        assert!(answer.starts_with("ERR parsing the first line: "), "{answer}");
        let (answer, _) = say(&[b'x'; MAX_LINE + 1]).await;
        assert_eq!(answer, "ERR the first line did not end within 4096 bytes\n");
    }
}
