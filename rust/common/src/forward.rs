//! Connections that are carried between host and guest, on the guest's port
//! [`crate::constants::PORT_FORWARD`]: TCP connections to the pod's loopback (port-forward), and those of
//! containers to sockets of the host that they have mounted (see [`crate::host_socket`]).
//!
//! One vsock connection each. The relay opens with a [`Hello`] line, answered by `OK\n` or `ERR <why>\n`.
//! Then both sides send frames as on the stdio port (see [`crate::stdio`]); length 0 is a half-close. When
//! both directions are at their end, the agent sends one more frame of length 0, and the relay closes:
//! nothing is in flight then, whichever of the ways to a vsock it is. A connection that ends before that was
//! reset, and so is the one that was carried.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream, tcp, unix},
    time::timeout,
};

use crate::stdio::{FrameReader, HEADER, header};

/// Bytes copied at once. A frame with its header is no more than every vsock takes in one piece.
const CHUNK: usize = 16 * 1024 - HEADER;
/// Longest time that the other side may take to agree that all is over.
const FAREWELL: Duration = Duration::from_secs(10);

/// The first line of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The pod's token.
    pub token: String,
    /// TCP port in the guest; 0 if it is about a socket.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub port: u16,
    /// True if the caller asked for `::1`. The agent only tries it first: containerd falls back from one
    /// address to the other when it is refused, and here it never is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub v6: bool,
    /// A socket of the host's in the guest, whose next connection is to be carried: its path there. Then `OK`
    /// comes when there is one, followed by its peer, a [`crate::host_socket::Peer`].
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub socket: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_zero(port: &u16) -> bool {
    *port == 0
}

impl Hello {
    /// Addresses in the guest, in the order in which they are to be tried.
    #[must_use]
    pub fn targets(&self) -> [SocketAddr; 2] {
        let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, self.port));
        if self.v6 { [v6, v4] } else { [v4, v6] }
    }
}

/// The side that carries a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// On the host; it closes.
    Relay,
    /// In the guest.
    Agent,
}

/// Carries a TCP connection over `conn` until both directions are at their end.
///
/// # Errors
/// When either connection breaks. The TCP connection is then set to be reset, as it would be without anything
/// between.
pub async fn carry(mut tcp: TcpStream, conn: impl AsyncRead + AsyncWrite, side: Side) -> io::Result<()> {
    // Who types a letter waits for its echo.
    let _ = tcp.set_nodelay(true);
    let (from, to) = tcp.split();
    let carried = both(from, to, conn, side).await;
    if carried.is_err() {
        reset(tcp);
    }
    carried
}

/// The same for a unix socket's connection.
///
/// # Errors
/// When either connection breaks.
pub async fn carry_unix(
    mut unix: UnixStream,
    conn: impl AsyncRead + AsyncWrite,
    side: Side,
) -> io::Result<()> {
    let (from, to) = unix.split();
    both(from, to, conn, side).await
}

/// The same, where bytes for the unix socket are written through `to`, which says whose they are.
///
/// # Errors
/// When either connection breaks.
pub async fn carry_unix_through(
    unix: &UnixStream,
    to: impl AsyncWrite + Unpin,
    conn: impl AsyncRead + AsyncWrite,
    side: Side,
) -> io::Result<()> {
    both(unix, to, conn, side).await
}

/// Ends a TCP connection so that its peer sees an error and not an orderly end.
pub fn reset(tcp: TcpStream) {
    let _ = tcp.set_zero_linger();
    drop(tcp);
}

/// Reading half of a connection, without a buffer that waits for bytes to come.
trait Source {
    fn readable(&self) -> impl Future<Output = io::Result<()>> + Send;
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize>;
}

impl Source for tcp::ReadHalf<'_> {
    fn readable(&self) -> impl Future<Output = io::Result<()>> + Send {
        self.readable()
    }

    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.try_read(buffer)
    }
}

impl Source for unix::ReadHalf<'_> {
    fn readable(&self) -> impl Future<Output = io::Result<()>> + Send {
        self.readable()
    }

    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.try_read(buffer)
    }
}

impl Source for &UnixStream {
    fn readable(&self) -> impl Future<Output = io::Result<()>> + Send {
        UnixStream::readable(self)
    }

    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        UnixStream::try_read(self, buffer)
    }
}

async fn both(
    from: impl Source,
    to: impl AsyncWrite + Unpin,
    conn: impl AsyncRead + AsyncWrite,
    side: Side,
) -> io::Result<()> {
    let (from_conn, to_conn) = tokio::io::split(conn);
    let (mut from_conn, mut to_conn) = (Box::pin(from_conn), Box::pin(to_conn));
    let ((), behind) = tokio::try_join!(send(from, &mut to_conn), receive(&mut from_conn, to))?;
    let farewell = async {
        let mut head = [0; HEADER];
        match side {
            // The agent's may have come together with its end.
            Side::Relay => from_conn.read_exact(head.get_mut(behind..).unwrap_or_default()).await.map(drop),
            Side::Agent => {
                to_conn.write_all(&header(0)).await?;
                to_conn.flush().await?;
                from_conn.read(&mut head).await.map(drop)
            }
        }
    };
    // All bytes have arrived, so whatever goes wrong now harms nobody.
    let _ = timeout(FAREWELL, farewell).await;
    Ok(())
}

async fn send(from: impl Source, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    loop {
        from.readable().await?;
        // Made when there is something to read, and freed after: most connections are idle most of the time.
        let mut frame = vec![0; HEADER + CHUNK];
        let Some((head, payload)) = frame.split_first_chunk_mut::<HEADER>() else { return Ok(()) };
        let read = match from.try_read(payload) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            read => read?,
        };
        *head = header(read);
        to.write_all(frame.get(..HEADER + read).unwrap_or_default()).await?;
        to.flush().await?;
        if read == 0 {
            return Ok(());
        }
    }
}

/// Returns how many bytes were read behind the end.
async fn receive(from: &mut (impl AsyncRead + Unpin), mut to: impl AsyncWrite + Unpin) -> io::Result<usize> {
    let mut frames = FrameReader::default();
    loop {
        let batch = frames.next(from).await?;
        if !batch.payload.is_empty() {
            to.write_all(&batch.payload).await?;
        }
        if let Some(behind) = batch.end {
            to.shutdown().await?;
            return Ok(behind);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{DuplexStream, duplex},
        net::TcpListener,
        task::JoinHandle,
    };

    use super::*;

    async fn tcp() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    /// A client and a server, as if they were connected.
    async fn carried() -> (TcpStream, TcpStream, [JoinHandle<io::Result<()>>; 2]) {
        let (client, relay) = tcp().await;
        let (agent, server) = tcp().await;
        let (one, other) = duplex(1024);
        let relay = tokio::spawn(carry(relay, one, Side::Relay));
        let agent = tokio::spawn(carry(agent, other, Side::Agent));
        (client, server, [relay, agent])
    }

    async fn broken() -> (TcpStream, DuplexStream, JoinHandle<io::Result<()>>) {
        let (client, relay) = tcp().await;
        let (one, other) = duplex(1024);
        (client, other, tokio::spawn(carry(relay, one, Side::Relay)))
    }

    #[tokio::test]
    async fn a_half_close_is_carried_and_the_answer_to_it_arrives_whole() {
        let (mut client, mut server, tasks) = carried().await;
        let question: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_be_bytes).collect();
        let expected = question.clone();
        let answer = tokio::spawn(async move {
            let mut all = Vec::new();
            server.read_to_end(&mut all).await.unwrap();
            server.write_all(&all).await.unwrap();
        });
        client.write_all(&question).await.unwrap();
        client.shutdown().await.unwrap();
        let mut all = Vec::new();
        client.read_to_end(&mut all).await.unwrap();
        assert!(all == expected, "{} bytes came back", all.len());
        answer.await.unwrap();
        for task in tasks {
            task.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_reset_arrives_as_a_reset() {
        let (client, mut server, tasks) = carried().await;
        reset(client);
        let error = server.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        for task in tasks {
            task.await.unwrap().unwrap_err();
        }
    }

    #[tokio::test]
    async fn a_vsock_that_breaks_or_lies_resets() {
        for lie in [&b""[..], b"\0", b"\0\0\0\x05abc", b"\xff\xff\xff\xff"] {
            let (mut client, mut conn, task) = broken().await;
            conn.write_all(lie).await.unwrap();
            drop(conn);
            let mut all = Vec::new();
            let error = client.read_to_end(&mut all).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{lie:?}");
            task.await.unwrap().unwrap_err();
        }
    }

    #[test]
    fn hello_has_the_documented_shape_and_order() {
        let hello: Hello = serde_json::from_str(r#"{"token":"t","port":80}"#).unwrap();
        assert_eq!(hello.targets().map(|target| target.to_string()), ["127.0.0.1:80", "[::1]:80"]);
        let hello = Hello { v6: true, ..hello };
        assert_eq!(hello.targets().map(|target| target.to_string()), ["[::1]:80", "127.0.0.1:80"]);
        assert!(serde_json::from_str::<Hello>(r#"{"token":"t","port":65536}"#).is_err());
    }
}
