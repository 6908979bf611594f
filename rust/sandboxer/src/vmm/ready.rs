//! The agent's call that its VM is up, taken on the host.

use std::path::PathBuf;

use kuasar_common::handshake::Ready;
use tokio::{io::BufReader, net::UnixListener, net::UnixStream};

/// Waits for one guest's agent.
#[derive(Debug)]
pub struct ReadyListener {
    path: PathBuf,
    listener: UnixListener,
}

/// A guest whose agent has called; the connection stays open as long as the VM lives.
#[derive(Debug)]
pub struct ReadyGuest {
    /// What the agent said.
    pub ready: Ready,
    stream: BufReader<UnixStream>,
}
