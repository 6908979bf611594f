//! All standard streams of one process, from before it starts until it is deleted.

use std::{
    io,
    os::fd::OwnedFd,
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use kuasar_common::{constants::STDIO_WANTED, stdio::Stream, streaming::id_of};
use rustix::{
    pipe::{PipeFlags, pipe_with},
    termios::{Winsize, tcsetwinsize},
};
use tokio::{io::Interest, sync::watch, time::timeout};

use super::{
    console::ConsoleSocket,
    fd::Fd,
    output::{Output, Readers, discard},
    registry::{Key, Registry, Slot},
    stdin::Input,
};
use crate::{reaper::Exit, runc::ChildStdio};

/// Longest time that an exit waits for a reader that takes nothing.
const READER_DEADLINE: Duration = Duration::from_secs(10);

/// Standard streams in a Create or Exec request; echoed by State.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StdioSpec {
    /// [`STDIO_WANTED`], a URL with a streaming id, or empty.
    pub stdin: String,
    /// As `stdin`.
    pub stdout: String,
    /// As `stdin`.
    pub stderr: String,
    /// The process has a terminal.
    pub terminal: bool,
}

/// The streams of one process that somebody wants, and the ends of them that the agent holds.
pub struct ProcessIo {
    registry: Arc<Registry>,
    keys: Vec<Key>,
    /// Streaming ids of the same streams.
    names: Vec<String>,
    slots: Mutex<Slots>,
    close_stdin: watch::Sender<bool>,
    readers: Readers,
    terminal: Mutex<Terminal>,
}

/// A process's terminal: wanted, and there once the process is.
#[derive(Default)]
struct Terminal {
    wanted: bool,
    master: Option<Fd>,
    size: Option<Winsize>,
}

impl Terminal {
    fn apply(&self) -> io::Result<()> {
        match (&self.master, self.size) {
            (Some(master), Some(size)) => Ok(tcsetwinsize(master.get(), size)?),
            _ => Ok(()),
        }
    }
}

#[derive(Default)]
struct Slots {
    stdin: Option<Slot>,
    stdout: Option<Slot>,
    stderr: Option<Slot>,
}

/// The agent's ends of the pipes of a process about to start.
#[derive(Default)]
pub struct Pipes {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

impl ProcessIo {
    /// Claims the wanted streams of a process.
    #[must_use]
    pub fn new(registry: &Arc<Registry>, container: &str, exec: &str, spec: &StdioSpec) -> Self {
        let (mut keys, mut names) = (Vec::new(), Vec::new());
        let mut claim = |mark: &str, stream| {
            let id = id_of(mark);
            (mark == STDIO_WANTED || id.is_some()).then(|| {
                let key = Key { container: container.to_owned(), exec: exec.to_owned(), stream };
                keys.push(key.clone());
                let slot = registry.claim(key.clone());
                if let Some(id) = id {
                    registry.names.set(id, key);
                    names.push(id.to_owned());
                }
                slot
            })
        };
        let slots = Slots {
            stdin: claim(&spec.stdin, Stream::Stdin),
            stdout: claim(&spec.stdout, Stream::Stdout),
            stderr: claim(&spec.stderr, Stream::Stderr),
        };
        Self {
            registry: Arc::clone(registry),
            keys,
            names,
            slots: Mutex::new(slots),
            close_stdin: watch::Sender::new(false),
            readers: Arc::default(),
            terminal: Mutex::new(Terminal { wanted: spec.terminal, ..Default::default() }),
        }
    }

    /// Makes the pipes of a process without a terminal: our ends, and what the runtime inherits.
    ///
    /// # Errors
    /// When a pipe cannot be made.
    pub fn pipes(&self) -> io::Result<(Pipes, ChildStdio)> {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut ours, mut theirs) = (Pipes::default(), ChildStdio::default());
        if slots.stdin.is_some() {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
            (theirs.stdin, ours.stdin) = (Stdio::from(read), Some(write));
        }
        if slots.stdout.is_some() {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
            (theirs.stdout, ours.stdout) = (Stdio::from(write), Some(read));
        }
        if slots.stderr.is_some() {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
            (theirs.stderr, ours.stderr) = (Stdio::from(write), Some(read));
        }
        Ok((ours, theirs))
    }

    /// Makes the socket on which the runtime delivers the terminal of a process.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn console(dir: &Path) -> io::Result<ConsoleSocket> {
        ConsoleSocket::new(dir)
    }

    /// Starts moving the bytes of a process that runs with `pipes`.
    ///
    /// # Errors
    /// When a pipe cannot be polled.
    pub fn start_pipes(&self, pipes: Pipes, exited: &watch::Receiver<Option<Exit>>) -> io::Result<()> {
        let readable = |fd: OwnedFd| Fd::new(fd, Interest::READABLE, false);
        let stdin = pipes.stdin.map(|fd| Fd::new(fd, Interest::WRITABLE, false)).transpose()?;
        let stdout = pipes.stdout.map(readable).transpose()?;
        let stderr = pipes.stderr.map(readable).transpose()?;
        self.run(stdin, stdout, stderr, exited);
        Ok(())
    }

    /// Starts moving the bytes of a process on a terminal, whose master side is given.
    ///
    /// # Errors
    /// When the terminal cannot be polled.
    pub fn start_terminal(&self, master: OwnedFd, exited: &watch::Receiver<Option<Exit>>) -> io::Result<()> {
        let master = Fd::new(master, Interest::READABLE | Interest::WRITABLE, true)?;
        let mut terminal = self.terminal.lock().unwrap_or_else(PoisonError::into_inner);
        terminal.master = Some(master.clone());
        terminal.apply()?;
        // A terminal has one output: whoever asked for standard error gets its end at once.
        self.run(Some(master.clone()), Some(master), None, exited);
        Ok(())
    }

    /// Ends the wanted streams of a process that will never run.
    pub fn start_nothing(&self, exited: &watch::Receiver<Option<Exit>>) {
        self.run(None, None, None, exited);
    }

    fn run(
        &self,
        stdin: Option<Fd>,
        stdout: Option<Fd>,
        stderr: Option<Fd>,
        exited: &watch::Receiver<Option<Exit>>,
    ) {
        let slots = std::mem::take(&mut *self.slots.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(slot) = slots.stdin {
            tokio::spawn(Input::new(stdin, slot, self.close_stdin.subscribe()).run());
        }
        match (slots.stdout, stdout) {
            (Some(slot), stdout) => {
                tokio::spawn(Output::new(stdout, slot, exited.clone(), &self.readers).run());
            }
            // Only a terminal is there without being asked for.
            (None, Some(terminal)) => {
                tokio::spawn(discard(terminal, exited.clone()));
            }
            (None, None) => {}
        }
        if let Some(slot) = slots.stderr {
            tokio::spawn(Output::new(stderr, slot, exited.clone(), &self.readers).run());
        }
    }

    /// Waits until the reader of an ended process's output has all of it: the agent tells of the end after
    /// its last byte. It does not wait long for a reader that takes nothing, and not at all for one that is
    /// not there.
    pub fn delivered(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut readers = self.readers.subscribe();
        async move {
            let _ = timeout(READER_DEADLINE, readers.wait_for(|count| *count == 0)).await;
        }
    }

    /// Ends the process's standard input, once what is on its way has arrived.
    pub fn close_stdin(&self) {
        self.close_stdin.send_replace(true);
    }

    /// Sets the terminal's size in characters, now or when the process starts. False if it has no terminal.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn resize(&self, width: u16, height: u16) -> io::Result<bool> {
        let mut terminal = self.terminal.lock().unwrap_or_else(PoisonError::into_inner);
        terminal.size = Some(Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 });
        terminal.apply()?;
        Ok(terminal.wanted)
    }
}

impl Drop for ProcessIo {
    fn drop(&mut self) {
        for key in &self.keys {
            self.registry.release(key);
        }
        for name in &self.names {
            self.registry.names.forget(name);
        }
    }
}
