//! Follows the events that QEMU reports by itself, over a control connection of their own: the one for
//! commands belongs to the command that runs.

use std::path::PathBuf;

use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    sync::watch,
};

/// Longest line of QEMU's, in bytes. Some of what is in there a guest can influence.
const MAX_LINE: u64 = 64 * 1024;

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, default)]
    event: Option<std::borrow::Cow<'a, str>>,
}

/// Counts how often the VM went on after a pause, until QEMU ends.
pub(super) fn resumptions(socket: PathBuf) -> watch::Receiver<u64> {
    let (count, counted) = watch::channel(0);
    tokio::spawn(async move {
        if let Err(error) = follow(&socket, &count).await {
            tracing::warn!(socket = %socket.display(), %error, "following QEMU's events");
        }
    });
    counted
}

async fn follow(socket: &std::path::Path, count: &watch::Sender<u64>) -> std::io::Result<()> {
    let mut stream = BufReader::new(UnixStream::connect(socket).await?);
    // QEMU says nothing of its own accord before this.
    stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").await?;
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut stream).take(MAX_LINE).read_until(b'\n', &mut line).await?;
        if read == 0 {
            return Ok(());
        }
        // The pieces of a line that is too long are no messages.
        let Ok(message) = serde_json::from_slice::<Message<'_>>(&line) else { continue };
        if message.event.as_deref() == Some("RESUME") {
            count.send_modify(|count| *count = count.wrapping_add(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{net::UnixListener, time::timeout};

    use super::*;

    #[tokio::test]
    async fn only_going_on_after_a_pause_counts_whatever_else_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("events.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut counted = resumptions(socket);
        let mut qemu = BufReader::new(listener.accept().await.unwrap().0);
        qemu.write_all(b"{\"QMP\":{\"version\":{},\"capabilities\":[]}}\r\n").await.unwrap();
        let mut asked = String::new();
        qemu.read_line(&mut asked).await.unwrap();
        assert_eq!(asked, "{\"execute\":\"qmp_capabilities\"}\n");
        let long = format!("{{\"event\":\"RTC_CHANGE\",\"data\":\"{}\"}}\n", "x".repeat(200_000));
        let resume = "{\"timestamp\":{\"seconds\":1,\"microseconds\":2},\"event\":\"RESUME\"}\r\n";
        for said in ["{\"return\":{}}\r\n", "{\"event\":\"STOP\"}\r\n", "nonsense\n", "[]\n", &long, resume] {
            qemu.write_all(said.as_bytes()).await.unwrap();
        }
        timeout(Duration::from_secs(10), counted.changed()).await.expect("it is told").unwrap();
        assert_eq!(*counted.borrow_and_update(), 1);
        qemu.write_all(resume.as_bytes()).await.unwrap();
        timeout(Duration::from_secs(10), counted.changed()).await.expect("again").unwrap();
        assert_eq!(*counted.borrow_and_update(), 2);
        drop(qemu);
        assert!(timeout(Duration::from_secs(10), counted.changed()).await.expect("the end").is_err());
    }
}
