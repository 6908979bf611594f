//! Port-forward: carries TCP connections of the host to the guest's own loopback (see
//! [`kuasar_common::forward`]). On the same port, connections of containers go to sockets of the host.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use kuasar_common::{
    constants::PORT_FORWARD,
    forward::{Hello, Side, carry},
};
use tokio::{io::AsyncWriteExt, net::TcpStream, sync::Semaphore, time::timeout};

use crate::{
    auth::Token,
    host_socket::HostSockets,
    stdio::{
        listener::{first_line, refuse},
        registry::{Connection, Transport},
    },
    strangers::{DEADLINE, Strangers},
};

/// Connections that may be open at the same time.
const MAX_OPEN: usize = 512;
/// Longest time that a server of the pod may take to accept a connection. Only one that accepts none any more
/// needs so long.
const DIAL_DEADLINE: Duration = Duration::from_secs(15);

/// Takes connections in and carries each to where its first line says.
pub struct Forwards {
    token: Arc<Token>,
    sockets: Arc<HostSockets>,
    open: Arc<Semaphore>,
    strangers: Arc<Strangers>,
}

impl Forwards {
    /// For connections that know `token`, to the pod's ports or to those who are connected to one of these
    /// sockets.
    #[must_use]
    pub fn new(token: Arc<Token>, sockets: Arc<HostSockets>) -> Self {
        Self {
            token,
            sockets,
            open: Arc::new(Semaphore::new(MAX_OPEN)),
            strangers: Strangers::new(PORT_FORWARD),
        }
    }

    /// Deals with one accepted connection, in a task of its own. One that knows the token waits there while
    /// too many are open.
    pub fn accept(&self, transport: Box<dyn Transport>) {
        let place = self.strangers.enter();
        let (token, sockets) = (Arc::clone(&self.token), Arc::clone(&self.sockets));
        let (open, strangers) = (Arc::clone(&self.open), Arc::clone(&self.strangers));
        tokio::spawn(async move {
            let mut connection = Connection::new(transport);
            match place.greet(greet(&mut connection, &token)).await {
                // It may wait for long, and its number is limited by who asks.
                Ok(Ok(hello)) if !hello.socket.is_empty() => sockets.serve(&hello.socket, connection).await,
                Ok(Ok(hello)) => {
                    let Ok(_permit) = open.acquire_owned().await else { return };
                    forward(&hello, connection).await;
                }
                Ok(Err(why)) => strangers.refused(&why),
                Err(refusal) => strangers.refused(&refusal.to_string()),
            }
        });
    }
}

async fn greet(connection: &mut Connection, token: &Token) -> Result<Hello, String> {
    let why = match first_line::<Hello>(connection).await {
        Ok(hello) if token.is(&hello.token) => return Ok(hello),
        Ok(_) => "wrong token".to_owned(),
        Err(why) => why,
    };
    refuse(connection, &why).await;
    Err(why)
}

async fn refused(connection: &mut Connection, why: &str) {
    log::info!("refused a forwarded connection: {why}");
    refuse(connection, why).await;
}

async fn forward(hello: &Hello, mut connection: Connection) {
    match connect(hello, &mut connection).await {
        Ok(tcp) => {
            if let Err(error) = carry(tcp, connection, Side::Agent).await {
                log::debug!("a forwarded connection broke: {error}");
            }
        }
        Err(why) => refused(&mut connection, &why).await,
    }
}

async fn connect(hello: &Hello, connection: &mut Connection) -> Result<TcpStream, String> {
    let [first, second] = hello.targets();
    let tcp = match dial(first).await {
        Ok(tcp) => tcp,
        Err(error) => dial(second)
            .await
            .map_err(|other| format!("connecting in the pod: to {first}: {error}; to {second}: {other}"))?,
    };
    let answer = async {
        connection.write_all(b"OK\n").await?;
        connection.flush().await
    };
    let answered = timeout(DEADLINE, answer).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()));
    answered.map_err(|error| error.to_string())?;
    Ok(tcp)
}

async fn dial(target: SocketAddr) -> io::Result<TcpStream> {
    timeout(DIAL_DEADLINE, TcpStream::connect(target)).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncBufReadExt, AsyncReadExt, BufReader, duplex},
        net::TcpListener,
    };

    use super::*;

    async fn answer(hello: &str) -> (String, BufReader<tokio::io::DuplexStream>) {
        let token = Token::new();
        token.set("ab".repeat(32));
        let (ours, theirs) = duplex(16 * 1024);
        let mut theirs = BufReader::new(theirs);
        Forwards::new(token, Arc::default()).accept(Box::new(ours));
        theirs.write_all(hello.as_bytes()).await.unwrap();
        let mut line = String::new();
        theirs.read_line(&mut line).await.unwrap();
        (line, theirs)
    }

    fn hello(port: u16, v6: bool) -> String {
        format!("{{\"token\":\"{}\",\"port\":{port},\"v6\":{v6}}}\n", "ab".repeat(32))
    }

    #[tokio::test]
    async fn a_server_is_found_by_either_address() {
        for v6 in [false, true] {
            let server = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
            let (line, mut conn) = answer(&hello(server.local_addr().unwrap().port(), v6)).await;
            assert_eq!(line, "OK\n");
            let (mut served, _) = server.accept().await.unwrap();
            served.write_all(b"hi").await.unwrap();
            let mut frame = [0; 6];
            conn.read_exact(&mut frame).await.unwrap();
            assert_eq!(&frame, b"\0\0\0\x02hi");
        }
    }

    #[tokio::test]
    async fn where_nobody_listens_and_who_may_not_is_said() {
        let free = TcpListener::bind(("127.0.0.1", 0)).await.unwrap().local_addr().unwrap().port();
        let (line, _) = answer(&hello(free, false)).await;
        assert!(
            line.starts_with(&format!("ERR connecting in the pod: to 127.0.0.1:{free}: Connection refused")),
            "{line}"
        );
        assert!(line.contains(&format!("to [::1]:{free}: ")), "{line}");
        let (line, _) = answer("{\"token\":\"x\",\"port\":1}\n").await;
        assert_eq!(line, "ERR wrong token\n");
        let (line, _) = answer("{\"port\":1}\n").await;
        assert!(line.starts_with("ERR parsing the first line: "), "{line}");
        let socket = format!("{{\"token\":\"{}\",\"socket\":\"/run/x\"}}\n", "ab".repeat(32));
        let (line, _) = answer(&socket).await;
        assert_eq!(line, "ERR gone\n");
    }
}
