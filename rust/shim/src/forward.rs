//! Port-forward: whatever is connected to in the pod's network namespace, on the loopback, is carried to the
//! guest's.
//!
//! containerd enters the namespace and dials `localhost`. The daemon has put a listener there that the kernel
//! gives every such connection, whatever its port, and handed it down together with what keeps the kernel
//! doing so: it ends with this process, and needs no daemon until then.

use std::{io, sync::Arc, time::Duration};

use kuasar_common::{
    constants::PORT_FORWARD,
    forward::{Hello, Side, carry, reset},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::sleep,
};

use crate::{
    guest::{Conn, DialError, Guest, ask},
    log::log,
};

/// Connections that may be open at the same time; more wait in the kernel's queue.
const MAX_OPEN: usize = 256;
/// Longest time that a guest may take to answer a connection's first line; it has to connect in the pod.
const HELLO_LIMIT: Duration = Duration::from_secs(40);
/// Pause after a connection could not be accepted, for want of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, thiserror::Error)]
enum ForwardError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("asking the guest: {0}")]
    Hello(#[from] io::Error),
    #[error("the guest answered {0:?}")]
    Refused(String),
}

/// Takes connections over until the VM is dead; then the kernel refuses new ones.
pub(crate) async fn serve(listener: TcpListener, guest: Arc<Guest>) {
    let open = Arc::new(Semaphore::new(MAX_OPEN));
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            let permit = Arc::clone(&open).acquire_owned().await;
            (permit, listener.accept().await)
        };
        tokio::select! {
            (permit, accepted) = next => match accepted {
                Ok((tcp, _)) => {
                    let guest = Arc::clone(&guest);
                    connections.spawn(async move {
                        let _permit = permit;
                        forward(tcp, &guest).await;
                    });
                }
                Err(e) => {
                    log!("port-forward: accepting: {e}");
                    sleep(PAUSE).await;
                }
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            () = guest.vm.dead() => return,
        }
    }
}

async fn forward(tcp: TcpStream, guest: &Guest) {
    let Ok(target) = tcp.local_addr() else { return reset(tcp) };
    match connect(guest, target.port(), target.ip().to_canonical().is_ipv6()).await {
        // How a connection ends is between its two ends.
        Ok(conn) => drop(carry(tcp, conn, Side::Relay).await),
        Err(e) => {
            log!("port-forward to {}: {e}", target.port());
            reset(tcp);
        }
    }
}

async fn connect(guest: &Guest, port: u16, v6: bool) -> Result<Conn, ForwardError> {
    let hello = Hello { token: guest.token.clone(), port, v6, socket: String::new() };
    let mut line = serde_json::to_vec(&hello).map_err(io::Error::from)?;
    line.push(b'\n');
    let mut conn = guest.dial(PORT_FORWARD).await?;
    let answer = ask(&mut conn, &line, HELLO_LIMIT).await?;
    if answer == b"OK" {
        Ok(conn)
    } else {
        Err(ForwardError::Refused(String::from_utf8_lossy(&answer).into_owned()))
    }
}
