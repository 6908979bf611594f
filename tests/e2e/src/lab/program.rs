//! Programs beside the tests: started with a log, waited for, ended.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

use crate::{machine::Machine, suite::patient};

/// Time for a program of the lab to listen, and to end. In an emulated machine four of them load at once.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

pub(super) fn log_of(machine: &Machine, program: &str) -> PathBuf {
    machine.root.join("log").join(format!("{program}.log"))
}

pub(super) fn tail(path: &Path) -> String {
    let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    let last = lines.get(lines.len().saturating_sub(15)..).unwrap_or_default();
    format!("the end of {}:\n{}", path.display(), last.join("\n"))
}

/// Starts a program of the lab with its output in its log. It dies with this process.
pub(super) fn spawn(machine: &Machine, name: &str, command: &mut Command) -> Result<Child> {
    let path = log_of(machine, name);
    // What it wrote before it was started again stays.
    let log = File::options().append(true).create(true).open(&path);
    let log = log.with_context(|| format!("opening {}", path.display()))?;
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .env("TMPDIR", machine.root.join("tmp"))
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("starting {name}"))
}

/// Waits until a program listens; fails early when it ends instead.
///
/// # Errors
/// With the end of its log.
pub async fn listening(child: &mut Child, socket: &Path, log: &Path) -> Result<()> {
    let end = Instant::now() + patient(PATIENCE);
    loop {
        if tokio::net::UnixStream::connect(socket).await.is_ok() {
            return Ok(());
        }
        if let Some(status) = child.try_wait()? {
            bail!("it ended with {status} before it listened at {}; {}", socket.display(), tail(log));
        }
        if Instant::now() >= end {
            bail!("nothing listens at {} after {PATIENCE:?}; {}", socket.display(), tail(log));
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Asks a program to end, and waits for it.
///
/// # Errors
/// When it had to be killed.
pub async fn end(name: &str, child: &mut Child) -> Result<()> {
    let Some(id) = child.id() else { return Ok(()) };
    let _ = kill(Pid::from_raw(i32::try_from(id)?), Signal::SIGTERM);
    if timeout(patient(PATIENCE), child.wait()).await.is_ok() {
        return Ok(());
    }
    child.kill().await.with_context(|| format!("killing {name}"))?;
    bail!("{name} did not end within {PATIENCE:?} of SIGTERM")
}

/// Runs a command to its end and returns what it wrote.
///
/// # Errors
/// When it fails, with what it wrote to standard error.
pub async fn run(command: &mut Command) -> Result<Vec<u8>> {
    let output =
        command.stdin(Stdio::null()).kill_on_drop(true).output().await.context("running a command")?;
    if !output.status.success() {
        let words = format!("{:?}", command.as_std());
        bail!("{words} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}
