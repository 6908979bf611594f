//! Runs a process of the VM itself, outside containers: what a person debugs a guest with.

use std::{
    os::{fd::OwnedFd, unix::process::CommandExt},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use rustix::{
    pipe::{PipeFlags, pipe_with},
    process::{Pid, Signal, kill_process_group},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    sync::watch,
    time::timeout,
};

use crate::{
    config::words,
    error::TaskError,
    reaper::{Exit, Reaper},
};

/// Longest time that it may run when the host asks for it.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// Longest time that descendants may go on writing once it has ended.
const GRACE: Duration = Duration::from_millis(200);
/// Most bytes of its output that are kept.
pub const MAX_OUTPUT: usize = 1 << 20;

/// Output and exit of a process.
#[derive(Debug)]
pub struct Output {
    /// Standard output and standard error, in the order in which they came.
    pub bytes: Vec<u8>,
    /// There was more.
    pub truncated: bool,
    /// Its exit.
    pub exit: Exit,
}

/// Runs a command line, program and arguments separated by white space.
///
/// # Errors
/// When it is empty, cannot be started, or does not end in time; it is killed then, with all that it started.
pub async fn run(
    reaper: &Arc<Reaper>,
    command: &str,
    stdin: &[u8],
    deadline: Duration,
) -> Result<Output, TaskError> {
    let words = words(command);
    let Some((program, args)) = words.split_first() else {
        return Err(TaskError::InvalidArgument("the command to run in the VM is empty".to_owned()));
    };
    let doing = || format!("running {program} in the VM");
    let (to_child, ours_in) = pipe_with(PipeFlags::CLOEXEC).map_err(TaskError::io(doing()))?;
    let (ours_out, from_child) = pipe_with(PipeFlags::CLOEXEC).map_err(TaskError::io(doing()))?;
    let mut input = pipe::Sender::from_owned_fd(ours_in).map_err(TaskError::io(doing()))?;
    let mut output = pipe::Receiver::from_owned_fd(ours_out).map_err(TaskError::io(doing()))?;
    let (pid, mut exited) =
        spawn(reaper, program, args, to_child, from_child).map_err(TaskError::io(doing()))?;
    let feed = async {
        // A program that does not read its input is no error.
        let _ = input.write_all(stdin).await;
        drop(input);
    };
    let mut kept = Kept::default();
    let ended = timeout(deadline, async {
        let talk = async {
            tokio::join!(feed, kept.collect(&mut output));
        };
        let exit = async { exited.wait_for(Option::is_some).await.map(|exit| *exit) };
        tokio::pin!(talk, exit);
        tokio::select! {
            () = &mut talk => exit.await,
            exit = &mut exit => {
                let _ = timeout(GRACE, talk).await;
                exit
            }
        }
    });
    let ended = ended.await;
    // Also of what it left in the background.
    let _ = kill_process_group(pid, Signal::KILL);
    match ended {
        Ok(Ok(Some(exit))) => Ok(Output { bytes: kept.bytes, truncated: kept.truncated, exit }),
        Ok(_) => Err(TaskError::Internal(format!("{}: its exit was lost", doing()))),
        Err(_) => {
            Err(TaskError::Deadline(format!("{}, which was killed after {} s,", doing(), deadline.as_secs())))
        }
    }
}

type Spawned = (Pid, watch::Receiver<Option<Exit>>);

fn spawn(
    reaper: &Arc<Reaper>,
    program: &str,
    args: &[String],
    stdin: OwnedFd,
    output: OwnedFd,
) -> std::io::Result<Spawned> {
    let mut command = Command::new(program);
    command
        .args(args)
        .current_dir("/")
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(stdin)
        .stdout(output.try_clone()?)
        .stderr(Stdio::from(output))
        .process_group(0);
    reaper.spawn(&mut command)
}

#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    truncated: bool,
}

impl Kept {
    /// Reads to the end; what does not fit is dropped, so that the writer never waits for us.
    async fn collect(&mut self, output: &mut pipe::Receiver) {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(read @ 1..) = output.read(&mut buffer).await {
            let fits = read.min(MAX_OUTPUT.saturating_sub(self.bytes.len()));
            self.bytes.extend(buffer.iter().take(fits));
            self.truncated |= fits < read;
        }
    }
}
