//! The pod's network namespace, as containerd and CNI see it.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use kuasar_e2e::lab::{Pod, run};
use nix::sched::{CloneFlags, setns};
use tokio::process::Command;

/// Its network namespace, held open: it stays when its name is gone.
pub(crate) struct Netns {
    file: File,
}

impl Netns {
    pub(crate) fn of(pod: &Pod<'_>) -> Result<Self> {
        let record = pod.record()?;
        let netns = record.pointer("/spec/netns").and_then(serde_json::Value::as_str);
        let path = PathBuf::from(netns.context("the record names no namespace")?);
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        Ok(Self { file })
    }

    /// Runs a command in it; what it wrote.
    pub(crate) async fn run(&self, command: &[&str]) -> Result<String> {
        use std::os::fd::AsRawFd;
        let mut nsenter = Command::new("nsenter");
        nsenter.arg(format!("--net=/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()));
        nsenter.arg("--").args(command);
        Ok(String::from_utf8(run(&mut nsenter).await?)?)
    }

    /// Connects in it, as containerd does.
    pub(crate) async fn dial(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let file = self.file.try_clone()?;
        let dialled = thread::spawn(move || {
            setns(file, CloneFlags::CLONE_NEWNET)?;
            let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
            stream.set_read_timeout(Some(Duration::from_secs(60)))?;
            Ok(stream)
        });
        tokio::task::spawn_blocking(move || dialled.join().map_err(|_| io::Error::other("it panicked")))
            .await??
    }

    /// Connects, sends, says that that was all, and returns what comes until the end.
    pub(crate) async fn ask(&self, address: SocketAddr, question: Vec<u8>) -> io::Result<Vec<u8>> {
        let stream = self.dial(address).await?;
        let mut sender = stream.try_clone()?;
        let sent = tokio::task::spawn_blocking(move || {
            sender.write_all(&question)?;
            sender.shutdown(Shutdown::Write)
        });
        let answer = tokio::task::spawn_blocking(move || {
            let mut answer = Vec::new();
            let mut stream = stream;
            stream.read_to_end(&mut answer).map(|_| answer)
        });
        let answer = answer.await??;
        sent.await??;
        Ok(answer)
    }
}
