//! As much of a WebSocket client as CRI's port-forward needs: `v4.channel.k8s.io`, where the first byte of a
//! message is its channel. Channel 0 carries data, channel 1 what went wrong; each begins with the port in
//! two bytes.

use anyhow::{Context, Result, bail, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

const DATA: u8 = 0;
const ERROR: u8 = 1;
const BINARY: u8 = 0x82;
const CLOSE: u8 = 0x88;

/// A forwarded connection.
#[derive(Debug)]
pub struct Forwarded {
    stream: BufReader<TcpStream>,
}

/// Data and messages that arrived on one connection.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Bytes from the pod.
    pub data: Vec<u8>,
    /// containerd's complaint.
    pub error: String,
}

impl Forwarded {
    /// Connects at a URL that CRI gave.
    ///
    /// # Errors
    /// When the server does not speak the protocol.
    pub async fn open(url: &str) -> Result<Self> {
        let rest = url.strip_prefix("http://").with_context(|| format!("{url} is not http"))?;
        let (host, path) = rest.split_once('/').context("the URL has no path")?;
        let stream = TcpStream::connect(host).await.with_context(|| format!("connecting to {host}"))?;
        let mut stream = BufReader::new(stream);
        let request = format!(
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io\r\nOrigin: http://{host}\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.context("reading the answer to the upgrade")?);
        }
        let head = String::from_utf8_lossy(&head);
        ensure!(head.starts_with("HTTP/1.1 101"), "the server answered {head}");
        Ok(Self { stream })
    }

    /// Sends bytes to the pod.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(0xf000) {
            let length = u16::try_from(chunk.len() + 1)?;
            // The mask, which clients must use, is 0: bytes stay what they are.
            let mut frame = vec![BINARY, 0x80 | 126];
            frame.extend(length.to_be_bytes());
            frame.extend([0, 0, 0, 0, DATA]);
            frame.extend(chunk);
            self.stream.write_all(&frame).await?;
        }
        Ok(())
    }

    /// Receives until `length` bytes are there, or containerd closes.
    ///
    /// # Errors
    /// When the connection breaks, or carries what it must not.
    pub async fn receive(&mut self, length: usize) -> Result<Received> {
        let mut received = Received::default();
        while received.data.len() < length {
            let Some(message) = self.message().await? else { break };
            match message.split_first() {
                // Two bytes are the port, which comes first.
                Some((&DATA | &ERROR, port)) if port.len() == 2 && received == Received::default() => {}
                Some((&DATA, data)) => received.data.extend(data),
                Some((&ERROR, text)) => received.error += &String::from_utf8_lossy(text),
                _ => bail!("a message of no channel: {message:?}"),
            }
        }
        Ok(received)
    }

    async fn message(&mut self) -> Result<Option<Vec<u8>>> {
        let Ok(kind) = self.stream.read_u8().await else { return Ok(None) };
        let length = match self.stream.read_u8().await? {
            126 => u64::from(self.stream.read_u16().await?),
            127 => self.stream.read_u64().await?,
            length => u64::from(length),
        };
        let mut message = vec![0; usize::try_from(length)?];
        self.stream.read_exact(&mut message).await?;
        match kind {
            BINARY => Ok(Some(message)),
            CLOSE => Ok(None),
            other => bail!("a frame of kind {other:#x}"),
        }
    }
}
