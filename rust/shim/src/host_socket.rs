//! Sockets of the host that containers have mounted: waits for connections in the guest, and carries each to
//! the host's socket (see [`kuasar_common::host_socket`]).

mod connect;
mod credentials;

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use kuasar_common::{
    api::host,
    constants::PORT_FORWARD,
    forward::{Hello, Side, carry_unix_through},
    handshake::MAX_LINE,
    host_socket::{GONE, Peer},
};
use tokio::{
    io::AsyncWriteExt,
    net::UnixStream,
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};

use self::credentials::AsUser;
use crate::{
    guest::{Conn, DialError, Guest, read_line},
    log::log,
};

/// Connections of one mount that may be open at the same time; more wait in the guest.
const MAX_OPEN: usize = 128;
/// Longest time that the guest may take to read a line.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// Pauses after the guest could not be asked.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Longest time that connections of a container that is gone may take for bytes that are still on their way.
const LAST_BYTES: Duration = Duration::from_secs(10);
/// `asm-generic/fcntl.h`: a descriptor of the file that does not open it.
const O_PATH: i32 = 0o10_000_000;

#[derive(Debug, thiserror::Error)]
enum WaitError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("asking the guest: {0}")]
    Io(#[from] io::Error),
    #[error("the guest answered {0:?}")]
    Refused(String),
    #[error("the container is gone")]
    Gone,
}

/// A socket of the host.
pub(crate) struct HostSocket {
    host: PathBuf,
    guest: String,
    /// Holds it as a mount would: what comes to its path later is another.
    inode: Arc<File>,
}

impl HostSocket {
    /// Takes hold of one.
    ///
    /// # Errors
    /// When there is none any more; the text is for whoever creates the container.
    pub(crate) fn open(named: &host::HostSocket) -> Result<Self, String> {
        let (host, guest) = (PathBuf::from(&named.host), named.guest.clone());
        let open = || {
            let inode = OpenOptions::new().read(true).custom_flags(O_PATH).open(&host)?;
            if inode.metadata()?.file_type().is_socket() {
                return Ok(inode);
            }
            Err(io::Error::new(io::ErrorKind::InvalidInput, "it is a socket no more"))
        };
        match open() {
            Ok(inode) => Ok(Self { host, guest, inode: Arc::new(inode) }),
            Err(error) => Err(format!("mounting the socket {}: {error}", host.display())),
        }
    }
}

/// The mounted sockets of a container, served until this is dropped.
#[derive(Default)]
pub(crate) struct Served {
    _until_dropped: Option<watch::Sender<()>>,
}

impl Served {
    /// Serves these sockets.
    pub(crate) fn start(sockets: Vec<HostSocket>, guest: &Arc<Guest>) -> Self {
        if sockets.is_empty() {
            return Self::default();
        }
        let sender = watch::Sender::new(());
        for socket in sockets {
            let (guest, mut ended) = (Arc::clone(guest), sender.subscribe());
            tokio::spawn(async move {
                let connections = ended.clone();
                tokio::select! {
                    () = serve(&socket, &guest, &connections) => {}
                    () = end_of(&mut ended) => {}
                    () = guest.vm.dead() => {}
                }
            });
        }
        Self { _until_dropped: Some(sender) }
    }
}

async fn end_of(container: &mut watch::Receiver<()>) {
    while container.changed().await.is_ok() {}
}

/// One connection after the other, from the guest to the host.
async fn serve(socket: &HostSocket, guest: &Guest, container: &watch::Receiver<()>) {
    let open = Arc::new(Semaphore::new(MAX_OPEN));
    let (mut pause, mut said) = (RETRY.0, String::new());
    loop {
        let Ok(permit) = Arc::clone(&open).acquire_owned().await else { return };
        let (conn, peer) = match wait(socket, guest).await {
            Ok(next) => next,
            Err(WaitError::Gone) => return,
            Err(error) => {
                // What the guest refuses is a connection, and there may be others.
                let next = if matches!(error, WaitError::Refused(_)) { RETRY.0 } else { pause * 2 };
                complain(socket, &mut said, error.to_string());
                sleep(pause).await;
                pause = next.min(RETRY.1);
                continue;
            }
        };
        pause = RETRY.0;
        // One at a time: a service that takes no more holds up its own clients, and costs one thread.
        let user = (peer.uid, peer.gid);
        match connect::connect(&socket.inode, peer).await {
            Ok(unix) => {
                said.clear();
                tokio::spawn(carry(unix, user, conn, container.clone(), permit));
            }
            Err(error) => complain(socket, &mut said, error.to_string()),
        }
    }
}

/// Whatever a container does again and again is said once.
fn complain(socket: &HostSocket, said: &mut String, why: String) {
    if *said != why {
        log!("a connection to the mounted socket {}: {why}", socket.host.display());
        *said = why;
    }
}

/// Waits in the guest for the next connection.
async fn wait(socket: &HostSocket, guest: &Guest) -> Result<(Conn, Peer), WaitError> {
    let hello = Hello { token: guest.token.clone(), port: 0, v6: false, socket: socket.guest.clone() };
    let mut line = serde_json::to_vec(&hello).map_err(io::Error::from)?;
    line.push(b'\n');
    let mut conn = guest.dial(PORT_FORWARD).await?;
    let told = timeout(HELLO_LIMIT, conn.write_all(&line)).await;
    told.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    let answer = read_line(&mut conn, MAX_LINE).await?;
    let peer = answer.strip_prefix(b"OK ").and_then(|peer| serde_json::from_slice(peer).ok());
    match peer {
        Some(peer) => Ok((conn, peer)),
        None if answer == GONE.as_bytes() => Err(WaitError::Gone),
        None => Err(WaitError::Refused(String::from_utf8_lossy(&answer).into_owned())),
    }
}

async fn carry(
    unix: UnixStream,
    (uid, gid): (u32, u32),
    conn: Conn,
    mut container: watch::Receiver<()>,
    _permit: tokio::sync::OwnedSemaphorePermit,
) {
    let last = async {
        end_of(&mut container).await;
        sleep(LAST_BYTES).await;
    };
    tokio::select! {
        // How a connection ends is between its two ends.
        _ = carry_unix_through(&unix, AsUser::new(&unix, uid, gid), conn, Side::Relay) => {}
        () = last => {}
    }
}
