//! Drives the OCI runtime: one call, one process, one log file, one deadline.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, timeout, timeout_at},
};

use crate::reaper::{Exit, Reaper};

/// Longest that one call of the runtime may take, once it runs; a hung one is killed. A container whose
/// `create` failed is deleted in the same call of the host, so both fit into the time of one.
#[derive(Debug, Clone, Copy)]
pub struct Deadlines {
    /// Of `create`, which does the most: twenty emulated guests on two processors take about 50 s for it,
    /// each.
    pub create: Duration,
    /// Of `delete`. Without it the agent removes the container itself.
    pub delete: Duration,
    /// Of every other.
    pub other: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        let [create, delete, other] = [80, 20, 50].map(Duration::from_secs);
        Self { create, delete, other }
    }
}

impl Deadlines {
    fn of(&self, command: &str) -> Duration {
        match command {
            "create" => self.create,
            "delete" => self.delete,
            _ => self.other,
        }
    }
}

/// Calls that run side by side. Each is two processes with memory and processor time of their own; as many as
/// probes may fall due in the same second would leave a small VM with neither.
const AT_ONCE: usize = 8;
/// After so long a call makes room for the next, ended or not: one that hangs holds up nobody else.
const TURN: Duration = Duration::from_secs(5);
/// Most of a log file that is looked at.
const MAX_LOG: u64 = 64 * 1024;

/// Why the runtime did not do it.
#[derive(Debug, thiserror::Error)]
pub enum RuncError {
    /// It could not be run at all.
    #[error("running {program} {command}: {source}")]
    Spawn {
        /// Its path.
        program: String,
        /// First word of what it was to do.
        command: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It ran and failed.
    #[error("OCI runtime {command} failed: {message}")]
    Failed {
        /// First word of what it was to do.
        command: &'static str,
        /// Its own last error.
        message: String,
    },
    /// It was killed at its deadline.
    #[error("OCI runtime {command} did not end within {} s and was killed", deadline.as_secs())]
    Timeout {
        /// First word of what it was to do.
        command: &'static str,
        /// The deadline that it missed.
        deadline: Duration,
    },
}

/// Standard streams that the container's process inherits from the runtime.
#[derive(Debug)]
pub struct ChildStdio {
    /// Standard input.
    pub stdin: Stdio,
    /// Standard output.
    pub stdout: Stdio,
    /// Standard error.
    pub stderr: Stdio,
}

impl Default for ChildStdio {
    fn default() -> Self {
        Self { stdin: Stdio::null(), stdout: Stdio::null(), stderr: Stdio::null() }
    }
}

/// The OCI runtime: its program, and the arguments of every call.
pub struct Runc {
    /// The executable.
    pub program: PathBuf,
    /// Its state folder.
    pub root: PathBuf,
    /// Folder for log files.
    pub logs: PathBuf,
    /// The root file system cannot be pivoted away from, as on an initramfs.
    pub no_pivot: bool,
    /// Sees the runtime's own processes end.
    pub reaper: Arc<Reaper>,
    /// Numbers the log files.
    pub calls: AtomicU64,
    /// Longest that one call may take.
    pub deadlines: Deadlines,
    /// Room for calls.
    pub turns: Turns,
}

/// Room for so many calls as may run side by side.
pub struct Turns(Semaphore);

impl Default for Turns {
    fn default() -> Self {
        Self(Semaphore::new(AT_ONCE))
    }
}

impl Runc {
    /// Makes a container and leaves its first process waiting for `start`.
    ///
    /// # Errors
    /// When the runtime fails; its message is in the error.
    pub async fn create(
        &self,
        id: &str,
        bundle: &Path,
        pid_file: &Path,
        console: Option<&Path>,
        stdio: ChildStdio,
    ) -> Result<(), RuncError> {
        self.call("create", self.create_args(id, bundle, pid_file, console), stdio).await
    }

    fn create_args(&self, id: &str, bundle: &Path, pid_file: &Path, console: Option<&Path>) -> Vec<OsString> {
        let mut args = vec!["--bundle".into(), bundle.into(), "--pid-file".into(), pid_file.into()];
        if self.no_pivot {
            args.push("--no-pivot".into());
        }
        push_console(&mut args, console);
        args.push(id.into());
        args
    }

    /// Lets the container's first process go on.
    ///
    /// # Errors
    /// When the runtime fails.
    pub async fn start(&self, id: &str) -> Result<(), RuncError> {
        self.call("start", vec![id.into()], ChildStdio::default()).await
    }

    /// Runs one more process in a container.
    ///
    /// # Errors
    /// When the runtime fails, for instance because the program does not exist.
    pub async fn exec(
        &self,
        id: &str,
        process: &Path,
        pid_file: &Path,
        console: Option<&Path>,
        stdio: ChildStdio,
    ) -> Result<(), RuncError> {
        let mut args =
            vec!["--process".into(), process.into(), "--pid-file".into(), pid_file.into(), "--detach".into()];
        push_console(&mut args, console);
        args.push(id.into());
        self.call("exec", args, stdio).await
    }

    /// Removes what the runtime keeps of a container. No error if it keeps nothing.
    ///
    /// # Errors
    /// When the runtime fails.
    pub async fn delete(&self, id: &str, force: bool) -> Result<(), RuncError> {
        let mut args: Vec<OsString> = Vec::new();
        if force {
            args.push("--force".into());
        }
        args.push(id.into());
        match self.call("delete", args, ChildStdio::default()).await {
            Err(RuncError::Failed { message, .. }) if message.contains("does not exist") => Ok(()),
            done => done,
        }
    }

    /// Freezes (`pause`) or thaws (`resume`) a container.
    ///
    /// # Errors
    /// When the runtime fails.
    pub async fn freeze(&self, id: &str, freeze: bool) -> Result<(), RuncError> {
        let command = if freeze { "pause" } else { "resume" };
        self.call(command, vec![id.into()], ChildStdio::default()).await
    }

    /// Changes a container's limits to those of a file with OCI `LinuxResources`.
    ///
    /// # Errors
    /// When the runtime fails.
    pub async fn update(&self, id: &str, resources: &Path) -> Result<(), RuncError> {
        let args = vec!["--resources".into(), resources.into(), id.into()];
        self.call("update", args, ChildStdio::default()).await
    }

    async fn call(
        &self,
        command: &'static str,
        args: Vec<OsString>,
        stdio: ChildStdio,
    ) -> Result<(), RuncError> {
        let log = self.logs.join(format!("runc-{}.json", self.calls.fetch_add(1, Ordering::Relaxed)));
        let result = self.call_logged(command, args, stdio, &log).await;
        // It exists only if the runtime had something to say.
        let _ = fs::remove_file(&log);
        result
    }

    async fn call_logged(
        &self,
        command: &'static str,
        args: Vec<OsString>,
        stdio: ChildStdio,
        log: &Path,
    ) -> Result<(), RuncError> {
        // Never closed.
        let mut turn = self.turns.0.acquire().await.ok();
        let (pid, mut exited) = self.spawn(command, args, stdio, log)?;
        let deadline = Instant::now() + self.deadlines.of(command);
        if timeout(TURN, exited.wait_for(Option::is_some)).await.is_err() {
            turn = None;
        }
        let exit = self.finish(command, pid, exited, deadline).await?;
        drop(turn);
        if exit.code == 0 {
            return Ok(());
        }
        // What it may have started, hooks for instance, has nobody who waits for it.
        let _ = kill_process_group(pid, Signal::KILL);
        let message = last_error(log).unwrap_or_else(|| match exit.code.checked_sub(128) {
            Some(signal @ 1..) => format!("it was killed by signal {signal}"),
            _ => format!("exit status {}", exit.code),
        });
        Err(RuncError::Failed { command, message })
    }

    fn spawn(
        &self,
        command: &'static str,
        args: Vec<OsString>,
        stdio: ChildStdio,
        log: &Path,
    ) -> Result<(Pid, watch::Receiver<Option<Exit>>), RuncError> {
        let mut process = Command::new(&self.program);
        process
            .arg("--root")
            .arg(&self.root)
            .arg("--log")
            .arg(log)
            .args(["--log-format", "json", command])
            .args(args)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(stdio.stdin)
            .stdout(stdio.stdout)
            .stderr(stdio.stderr)
            // So that what it started, hooks for instance, can be killed with it.
            .process_group(0);
        self.reaper.spawn(&mut process).map_err(|source| RuncError::Spawn {
            program: self.program.display().to_string(),
            command,
            source,
        })
    }

    async fn finish(
        &self,
        command: &'static str,
        pid: Pid,
        mut exited: watch::Receiver<Option<Exit>>,
        deadline: Instant,
    ) -> Result<Exit, RuncError> {
        let ended = timeout_at(deadline, exited.wait_for(Option::is_some)).await;
        if let Ok(Ok(exit)) = ended
            && let Some(exit) = *exit
        {
            return Ok(exit);
        }
        let _ = kill_process_group(pid, Signal::KILL);
        Err(RuncError::Timeout { command, deadline: self.deadlines.of(command) })
    }
}

fn push_console(args: &mut Vec<OsString>, console: Option<&Path>) {
    if let Some(console) = console {
        args.push("--console-socket".into());
        args.push(console.into());
    }
}

#[derive(Deserialize)]
struct LogLine {
    level: String,
    msg: String,
}

/// The last error in a log of the runtime.
fn last_error(log: &Path) -> Option<String> {
    let mut log = File::open(log).ok()?;
    let length = log.metadata().ok()?.len();
    log.seek(SeekFrom::Start(length.saturating_sub(MAX_LOG))).ok()?;
    let mut tail = Vec::new();
    log.take(MAX_LOG).read_to_end(&mut tail).ok()?;
    tail.split(|byte| *byte == b'\n')
        .rev()
        .filter_map(|line| serde_json::from_slice::<LogLine>(line).ok())
        .find(|line| line.level == "error" || line.level == "fatal")
        .map(|line| line.msg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_initramfs_is_not_pivoted_away_from() {
        let path = Path::new("/x");
        let mut runc = Runc {
            program: path.into(),
            root: path.into(),
            logs: path.into(),
            no_pivot: false,
            reaper: Reaper::new(),
            calls: AtomicU64::new(0),
            deadlines: Deadlines::default(),
            turns: Turns::default(),
        };
        assert_eq!(runc.create_args("c", path, path, None), ["--bundle", "/x", "--pid-file", "/x", "c"]);
        runc.no_pivot = true;
        let args = runc.create_args("c", path, path, Some(path));
        assert_eq!(args[4..], ["--no-pivot", "--console-socket", "/x", "c"]);
    }

    #[test]
    fn the_last_error_is_found_among_other_lines() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        assert_eq!(last_error(&log), None);
        fs::write(
            &log,
            concat!(
                "{\"level\":\"warning\",\"msg\":\"w\",\"time\":\"t\"}\n",
                "{\"level\":\"error\",\"msg\":\"first\",\"time\":\"t\"}\nnot json\n",
                "{\"level\":\"error\",\"msg\":\"exec: \\\"nosuch\\\": executable file not found in $PATH\",\"time\":\"t\"}\n",
                "{\"level\":\"warning\",\"msg\":\"later\",\"time\":\"t\"}\n",
            ),
        )
        .unwrap();
        let found = last_error(&log).unwrap();
        assert_eq!(found, "exec: \"nosuch\": executable file not found in $PATH");
        // However much was written before.
        let noise = "{\"level\":\"warning\",\"msg\":\"w\"}\n".repeat(5000);
        fs::write(&log, noise + "{\"level\":\"fatal\",\"msg\":\"the end\"}\n").unwrap();
        assert_eq!(last_error(&log).unwrap(), "the end");
    }
}
