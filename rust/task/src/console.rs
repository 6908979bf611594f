//! The debug console: a shell of the VM on a terminal, for a caller that knows the pod's token (see
//! [`kuasar_common::console`]). It exists only if the kernel command line names the shell.

use std::{
    io,
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use kuasar_common::{
    console::{FromHost, Hello},
    constants::PORT_DEBUG,
    stdio::{HEADER, header, payload_len},
};
use rustix::{
    process::{Pid, Signal, ioctl_tiocsctty, kill_process_group, setsid},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    stdio::stdin,
    termios::{Winsize, tcsetwinsize},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest, ReadHalf, WriteHalf},
    sync::{Semaphore, watch},
    time::timeout,
};

use crate::{
    auth::Token,
    reaper::{Exit, Reaper},
    stdio::{
        fd::{Fd, Source},
        listener::{first_line, refuse},
        registry::{Connection, Transport},
    },
    strangers::Strangers,
    transport::MAX_WRITE,
};

/// Consoles that may be open at the same time.
const MAX_OPEN: usize = 8;
/// Longest time that a shell may take to end once its terminal was hung up.
const HANG_UP_DEADLINE: Duration = Duration::from_secs(2);

/// Takes connections in and gives each a shell.
pub struct Consoles {
    shell: PathBuf,
    token: Arc<Token>,
    reaper: Arc<Reaper>,
    open: Arc<Semaphore>,
    strangers: Arc<Strangers>,
}

impl Consoles {
    /// Consoles with this shell, for connections that know `token`.
    #[must_use]
    pub fn new(shell: &Path, token: Arc<Token>, reaper: Arc<Reaper>) -> Self {
        let (open, strangers) = (Arc::new(Semaphore::new(MAX_OPEN)), Strangers::new(PORT_DEBUG));
        Self { shell: shell.to_owned(), token, reaper, open, strangers }
    }

    /// Deals with one accepted connection, in a task of its own. One that knows the token waits there while
    /// too many are open.
    pub fn accept(&self, transport: Box<dyn Transport>) {
        let place = self.strangers.enter();
        let (shell, token, reaper) = (self.shell.clone(), Arc::clone(&self.token), Arc::clone(&self.reaper));
        let (open, strangers) = (Arc::clone(&self.open), Arc::clone(&self.strangers));
        tokio::spawn(async move {
            let mut connection = Connection::new(transport);
            let hello = match place.greet(greet(&mut connection, &token)).await {
                Ok(Ok(hello)) => hello,
                Ok(Err(why)) => return strangers.refused(&why),
                Err(refusal) => return strangers.refused(&refusal.to_string()),
            };
            let Ok(_permit) = open.acquire_owned().await else { return };
            match begin(&mut connection, &hello, &shell, &reaper).await {
                Ok(session) => session.run(connection).await,
                Err(why) => {
                    log::warn!("refused a debug console: {why}");
                    refuse(&mut connection, &why).await;
                }
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

async fn begin(
    connection: &mut Connection,
    hello: &Hello,
    shell: &Path,
    reaper: &Arc<Reaper>,
) -> Result<Session, String> {
    let session = Session::start(shell, hello, reaper)
        .map_err(|error| format!("starting the shell {} of task.debug_shell: {error}", shell.display()))?;
    connection.write_all(b"OK\n").await.map_err(|error| error.to_string())?;
    connection.flush().await.map_err(|error| error.to_string())?;
    Ok(session)
}

/// A shell and our side of its terminal.
struct Session {
    terminal: Fd,
    pid: Pid,
    exited: watch::Receiver<Option<Exit>>,
}

impl Session {
    fn start(shell: &Path, hello: &Hello, reaper: &Arc<Reaper>) -> io::Result<Self> {
        let (master, slave) = pair()?;
        resize(&master, hello.rows, hello.columns)?;
        let mut command = Command::new(shell);
        command
            .current_dir("/")
            .env_clear()
            .envs([("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("HOME", "/root"), ("TERM", "xterm")])
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(Stdio::from(slave));
        let own_terminal = || {
            setsid()?;
            Ok(ioctl_tiocsctty(stdin())?)
        };
        // SAFETY: between fork and exec it makes two system calls, and neither allocates nor locks.
        unsafe { command.pre_exec(own_terminal) };
        let (pid, exited) = reaper.spawn(&mut command)?;
        let terminal = Fd::new(master, Interest::READABLE | Interest::WRITABLE, true)?;
        Ok(Self { terminal, pid, exited })
    }

    /// Until the shell ends or the host hangs up; no process of it is left then.
    async fn run(self, connection: Connection) {
        let Self { terminal, pid, mut exited } = self;
        let (from_host, to_host) = tokio::io::split(connection);
        let (output, mut until) = (Source::new(terminal.clone()), exited.clone());
        tokio::select! {
            () = show(output, &mut until, to_host) => {}
            () = take(from_host, &terminal) => {}
        }
        // The terminal's last descriptor of ours: the kernel hangs up, which ends a shell.
        drop(terminal);
        let _ = timeout(HANG_UP_DEADLINE, exited.wait_for(Option::is_some)).await;
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let slave = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty())?;
    Ok((master, slave))
}

fn resize(terminal: &OwnedFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(terminal, size)?)
}

/// From the terminal to the host, with the end of it.
async fn show(
    mut output: Source,
    exited: &mut watch::Receiver<Option<Exit>>,
    mut to_host: WriteHalf<Connection>,
) {
    let mut frame = vec![0; MAX_WRITE];
    loop {
        let Some((head, payload)) = frame.split_first_chunk_mut::<HEADER>() else { return };
        let read = output.read(payload, exited).await;
        *head = header(read);
        let bytes = frame.get(..HEADER + read).unwrap_or_default();
        if to_host.write_all(bytes).await.is_err() || to_host.flush().await.is_err() || read == 0 {
            return;
        }
    }
}

/// From the host to the terminal, until the host hangs up.
async fn take(mut from_host: ReadHalf<Connection>, terminal: &Fd) {
    let mut payload = Vec::new();
    loop {
        let mut head = [0; HEADER];
        if from_host.read_exact(&mut head).await.is_err() {
            return;
        }
        let Ok(len @ 1..) = payload_len(head) else { return };
        payload.resize(len, 0);
        if from_host.read_exact(&mut payload).await.is_err() {
            return;
        }
        let done = match FromHost::parse(&payload) {
            Some(FromHost::Input(input)) => terminal.write_all(input).await,
            Some(FromHost::Resize { rows, columns }) => resize(terminal.get(), rows, columns),
            None => Ok(()),
        };
        if let Err(error) = done {
            log::info!("debug console: {error}");
            return;
        }
    }
}
