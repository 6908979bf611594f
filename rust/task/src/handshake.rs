//! Tells the host that the agent is ready, and learns the pod's token (see [`kuasar_common::handshake`]).

use std::{io, time::Duration};

use kuasar_common::handshake::{Fatal, LineError, MAX_LINE, Ready, ToGuest, ToHost, from_line, to_line};
use rustix::time::{ClockId, clock_gettime};
use tokio::{
    io::{
        AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf, WriteHalf,
    },
    time::timeout,
};

/// Longest time that the host may take to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);
/// Longest time that the host may take to receive the last message.
const FATAL_DEADLINE: Duration = Duration::from_secs(2);
/// Hexadecimal digits of a token.
const TOKEN_LEN: usize = 64;

/// Why the host and we did not get together.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection failed.
    #[error("{0}: {1}")]
    Io(&'static str, io::Error),
    /// The host said nothing.
    #[error("waiting for the host's answer to READY: nothing within {} s", ANSWER_DEADLINE.as_secs())]
    Silent,
    /// The host said something else.
    #[error("reading the host's answer to READY: {0}")]
    Line(#[from] LineError),
    /// The host sent something that is no token.
    #[error("reading the host's answer to READY: the token is not {TOKEN_LEN} hexadecimal digits")]
    Token,
}

/// The connection to the host that stays open for the life of the VM.
pub struct HostLink<S> {
    reader: BufReader<ReadHalf<S>>,
    writer: WriteHalf<S>,
}

impl<S: AsyncRead + AsyncWrite> HostLink<S> {
    /// Says READY on a new connection.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn ready(stream: S) -> Result<Self, HandshakeError> {
        let (reader, writer) = tokio::io::split(stream);
        let mut link = Self { reader: BufReader::with_capacity(MAX_LINE, reader), writer };
        let ready =
            Ready { agent: env!("CARGO_PKG_VERSION").to_owned(), uptime_ns: uptime_ns(), root: root() };
        link.say(&ToHost::Ready(ready)).await?;
        Ok(link)
    }

    /// Waits for the pod's token.
    ///
    /// # Errors
    /// When it does not come, or is none.
    pub async fn token(&mut self) -> Result<String, HandshakeError> {
        let mut line = Vec::new();
        let limit = u64::try_from(MAX_LINE).unwrap_or(u64::MAX);
        let mut reader = (&mut self.reader).take(limit);
        let read = timeout(ANSWER_DEADLINE, reader.read_until(b'\n', &mut line)).await;
        read.map_err(|_| HandshakeError::Silent)?
            .map_err(|error| HandshakeError::Io("reading the host's answer to READY", error))?;
        let ToGuest::Token(token) = from_line(&line)?;
        let is_hex = token.len() == TOKEN_LEN && token.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_hex { Ok(token) } else { Err(HandshakeError::Token) }
    }

    /// Tells the host why the VM is about to end. Best effort, bounded.
    pub async fn fatal(&mut self, reason: &str) {
        let short: String = reason.chars().take(MAX_LINE / 8).collect();
        let _ = timeout(FATAL_DEADLINE, self.say(&ToHost::Fatal(Fatal { reason: short }))).await;
    }

    async fn say(&mut self, message: &ToHost) -> Result<(), HandshakeError> {
        let line = to_line(message)?;
        self.writer.write_all(&line).await.map_err(|e| HandshakeError::Io("telling the host", e))?;
        self.writer.flush().await.map_err(|e| HandshakeError::Io("telling the host", e))
    }
}

/// Mount options of the root; nothing where they cannot be read. The last line counts: it hides those before.
fn root() -> String {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    root_of(&mounts).unwrap_or_default()
}

fn root_of(mounts: &str) -> Option<String> {
    mounts.lines().rev().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        (words.next() == Some("/")).then_some(())?;
        Some(format!("{} {}", words.next()?, words.next()?))
    })
}

fn uptime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    #[test]
    fn the_root_is_told_with_its_options() {
        let mounts = "rootfs / rootfs rw 0 0\n/dev/root / erofs ro,dax=always 0 0\nproc /proc proc rw 0 0\n";
        assert_eq!(root_of(mounts).as_deref(), Some("erofs ro,dax=always"));
        assert_eq!(root_of("proc /proc proc rw 0 0\n/dev/vda /"), None);
    }

    async fn answer(line: &[u8]) -> Result<String, HandshakeError> {
        let (ours, mut theirs) = duplex(2 * MAX_LINE);
        let mut link = HostLink::ready(ours).await.unwrap();
        let mut said = String::new();
        BufReader::new(&mut theirs).read_line(&mut said).await.unwrap();
        assert!(said.starts_with("{\"ready\":{\"agent\":\"0."), "{said}");
        theirs.write_all(line).await.unwrap();
        theirs.shutdown().await.unwrap();
        link.token().await
    }

    #[tokio::test]
    async fn the_token_is_taken_and_nonsense_refused() {
        let token = "0a".repeat(32);
        assert_eq!(answer(format!("{{\"token\":\"{token}\"}}\n").as_bytes()).await.unwrap(), token);
        for (bad, why) in [
            (&b"{\"token\":\"xyz\"}\n"[..], "not 64 hexadecimal digits"),
            (b"hello\n", "parsing a handshake line"),
            (b"", "parsing a handshake line"),
            (&[b'x'; MAX_LINE + 1], "parsing a handshake line"),
        ] {
            let error = answer(bad).await.unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_host_is_not_waited_for_for_ever() {
        let (ours, _theirs) = duplex(MAX_LINE);
        let mut link = HostLink::ready(ours).await.unwrap();
        assert!(matches!(link.token().await, Err(HandshakeError::Silent)));
    }

    #[tokio::test]
    async fn last_words_fit_a_line() {
        let (ours, theirs) = duplex(4 * MAX_LINE);
        let mut link = HostLink::ready(ours).await.unwrap();
        link.fatal(&"\u{1f4a5}\"\n".repeat(10_000)).await;
        drop(link);
        let mut lines = BufReader::new(theirs).lines();
        lines.next_line().await.unwrap().unwrap();
        let last = lines.next_line().await.unwrap().unwrap();
        assert!(matches!(from_line(last.as_bytes()).unwrap(), ToHost::Fatal(_)));
    }
}
