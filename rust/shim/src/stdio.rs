//! Stdio of one process: containerd's fifos, streams or files on one side, stream connections to the guest on
//! the other.
//!
//! A fifo is opened for reading *and* writing, which on Linux is the same as holding both ends: an absent or
//! restarted reader gives no EPIPE, a writer that went away no EOF, and what nobody reads waits in the pipe
//! and then in the guest. Only an exec's input ends with its writer, too: no client comes back to an exec,
//! and `ctr` may never say CloseIO. Streams (see [`crate::streams`]) behave the same.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileTypeExt,
    sync::Arc,
    time::Duration,
};

use kuasar_common::{
    constants::PORT_STDIO,
    stdio::{Hello, Stream, header},
    streaming::id_of,
};
use tokio::{
    io::{AsyncWriteExt, DuplexStream},
    net::unix::pipe,
    sync::Notify,
    task::JoinSet,
    time::timeout,
};

use crate::{
    answer::quote,
    guest::{Conn, DialError, Guest, ask},
    life::Life,
    log::log,
    pump::{self, Source},
    streams::{Names, Outputs, Streams},
};

/// Longest time that the streams of a deleted process may still take, whatever their reader does.
const LINGER: Duration = Duration::from_secs(30);
/// Longest time that a guest may take to answer a stream's first line.
const HELLO_LIMIT: Duration = Duration::from_secs(10);

/// Why stdio could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    #[error("opening {stream:?} {path}: {source}")]
    Open { stream: Stream, path: String, source: io::Error },
    #[error(
        "opening {stream:?} {uri}: {scheme}:// is not supported by this runtime, it takes fifos, streams and file:// (a \
         logging program would need containerd's shim on the host)"
    )]
    Scheme { stream: Stream, uri: String, scheme: String },
    #[error("opening {stream:?}: {source}")]
    Dial { stream: Stream, source: DialError },
    #[error("opening {stream:?} in the guest: {source}")]
    Hello { stream: Stream, source: io::Error },
    #[error("opening {stream:?} in the guest: it answered {why:?}")]
    Refused { stream: Stream, why: String },
}

/// Streams that containerd wants connected, as received.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

impl Wanted {
    /// Path of a stream; a terminal has no stderr of its own.
    pub(crate) fn path(&self, stream: Stream) -> Option<&str> {
        let path = match stream {
            Stream::Stdin => &self.stdin,
            Stream::Stdout => &self.stdout,
            Stream::Stderr if self.terminal => return None,
            Stream::Stderr => &self.stderr,
        };
        Some(path.as_str()).filter(|path| !path.is_empty())
    }
}

/// Opens containerd's side of stdio.
pub(crate) struct Opener<'a> {
    pub(crate) streams: &'a Arc<Streams>,
    pub(crate) outputs: &'a Outputs,
    /// The streams that were claimed.
    pub(crate) names: &'a mut Names,
    /// True if the stdio is an exec's, and not that of a container's own process.
    pub(crate) exec: bool,
}

impl Opener<'_> {
    fn claim(&mut self, stream: Stream, uri: &str) -> Option<DuplexStream> {
        let id = id_of(uri)?;
        Some(self.streams.claim(id, stream, !self.exec, self.outputs, self.names))
    }

    fn sink(&mut self, stream: Stream, uri: &str) -> Result<Sink, StdioError> {
        self.claim(stream, uri).map_or_else(|| Sink::open(stream, uri), |end| Ok(Sink::Stream(end)))
    }

    /// A fifo that ends when its writer goes away, unless that may come back.
    fn source(&mut self, path: &str) -> Result<Source, StdioError> {
        if let Some(end) = self.claim(Stream::Stdin, path) {
            return Ok(Source::Stream { end, raw: Vec::new() });
        }
        let open = pipe::OpenOptions::new().read_write(!self.exec).open_receiver(path);
        open.map(Source::Fifo).map_err(|source| StdioError::Open {
            stream: Stream::Stdin,
            path: path.to_owned(),
            source,
        })
    }
}

/// Destination of output.
pub(crate) enum Sink {
    Pipe(pipe::Sender),
    /// One of containerd's streams; takes frames.
    Stream(DuplexStream),
    /// Regular files and devices, which epoll does not know; writing to them does not wait for anyone.
    File(File),
    /// A sink that failed. What follows is dropped, so that a full disk does not stop the container.
    Broken,
}

impl Sink {
    fn open(stream: Stream, uri: &str) -> Result<Self, StdioError> {
        let open = |path: &str, create| {
            let fifo = std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo());
            if fifo {
                return pipe::OpenOptions::new().read_write(true).open_sender(path).map(Self::Pipe);
            }
            OpenOptions::new().append(true).create(create).open(path).map(Self::File)
        };
        let result = match uri.split_once("://") {
            None => open(uri, false),
            Some(("fifo", path)) => open(path, false),
            Some(("file", path)) => open(path.split('?').next().unwrap_or(path), true),
            Some((scheme, _)) => {
                return Err(StdioError::Scheme { stream, uri: uri.to_owned(), scheme: scheme.to_owned() });
            }
        };
        result.map_err(|source| StdioError::Open { stream, path: uri.to_owned(), source })
    }

    /// Writes all of it, for as long as that takes.
    pub(crate) async fn write_all(&mut self, bytes: &[u8]) {
        let result = match self {
            Self::Pipe(pipe) => pipe.write_all(bytes).await,
            Self::Stream(end) => match end.write_all(&header(bytes.len())).await {
                Ok(()) => end.write_all(bytes).await,
                Err(e) => Err(e),
            },
            Self::File(file) => io::Write::write_all(file, bytes),
            Self::Broken => Ok(()),
        };
        if let Err(e) = result {
            log!("writing a container's output, which is lost from here on: {e}");
            *self = Self::Broken;
        }
    }
}

/// A stream's connection to the guest, able to be made again.
pub(crate) struct Port {
    pub(crate) guest: Arc<Guest>,
    pub(crate) container: String,
    pub(crate) exec: String,
    pub(crate) stream: Stream,
}

impl Port {
    /// Connects and says which stream this is.
    pub(crate) async fn connect(&self) -> Result<Conn, StdioError> {
        let stream = self.stream;
        let failed = |source| StdioError::Hello { stream, source };
        let hello = Hello {
            token: self.guest.token.clone(),
            container: self.container.clone(),
            exec: self.exec.clone(),
            stream,
        };
        let mut line = serde_json::to_vec(&hello).map_err(|e| failed(e.into()))?;
        line.push(b'\n');
        let mut conn =
            self.guest.dial(PORT_STDIO).await.map_err(|source| StdioError::Dial { stream, source })?;
        match ask(&mut conn, &line, HELLO_LIMIT).await {
            Ok(line) if line == b"OK" => Ok(conn),
            Ok(line) => Err(StdioError::Refused { stream, why: quote(&String::from_utf8_lossy(&line)) }),
            Err(e) => Err(failed(e)),
        }
    }

    /// For log lines.
    pub(crate) fn name(&self) -> String {
        let exec = if self.exec.is_empty() { String::new() } else { format!(" exec {}", self.exec) };
        format!("container {}{exec} {:?}", self.container, self.stream)
    }
}

/// containerd's side of a process's stdio, open.
pub(crate) struct Files {
    stdin: Option<Source>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
}

impl Files {
    /// Opens what is wanted. Nobody is waited for.
    pub(crate) fn open(wanted: &Wanted, mut opener: Opener<'_>) -> Result<Self, StdioError> {
        Ok(Self {
            stdin: wanted.path(Stream::Stdin).map(|path| opener.source(path)).transpose()?,
            stdout: wanted.path(Stream::Stdout).map(|path| opener.sink(Stream::Stdout, path)).transpose()?,
            stderr: wanted.path(Stream::Stderr).map(|path| opener.sink(Stream::Stderr, path)).transpose()?,
        })
    }
}

/// The streams of a process, copied by tasks of their own. Dropping it closes them at once.
#[derive(Default)]
pub(crate) struct Stdio {
    tasks: JoinSet<()>,
    close_stdin: Option<Arc<Notify>>,
}

impl Stdio {
    /// Connects what is open with the guest, and starts copying.
    pub(crate) async fn connect(
        files: Files,
        guest: &Arc<Guest>,
        container: &str,
        exec: &str,
        life: &Life,
    ) -> Result<Self, StdioError> {
        let Files { stdin, stdout, stderr } = files;
        let port = |stream| Port {
            guest: Arc::clone(guest),
            container: container.to_owned(),
            exec: exec.to_owned(),
            stream,
        };
        let connect = |wanted: bool, stream| async move {
            if !wanted {
                return Ok(None);
            }
            let port = port(stream);
            let conn = port.connect().await?;
            Ok::<_, StdioError>(Some((port, conn)))
        };
        let (input, output, errors) = tokio::try_join!(
            connect(stdin.is_some(), Stream::Stdin),
            connect(stdout.is_some(), Stream::Stdout),
            connect(stderr.is_some(), Stream::Stderr),
        )?;
        let mut stdio = Self::default();
        if let (Some(source), Some((port, conn))) = (stdin, input) {
            let close = Arc::new(Notify::new());
            stdio.close_stdin = Some(Arc::clone(&close));
            stdio.tasks.spawn(pump::input(source, port, conn, close, life.clone()));
        }
        for (sink, connected) in [(stdout, output), (stderr, errors)] {
            if let (Some(sink), Some((port, conn))) = (sink, connected) {
                stdio.tasks.spawn(pump::output(sink, port, conn, life.clone()));
            }
        }
        Ok(stdio)
    }

    /// No more input will come: what is in the fifo is still passed on, then its end.
    pub(crate) fn close_stdin(&self) {
        if let Some(close) = &self.close_stdin {
            close.notify_one();
        }
    }

    /// Lets what is under way reach its reader, within limits. The process's life is to be over before.
    pub(crate) fn finish(mut self) {
        if !self.tasks.is_empty() {
            tokio::spawn(async move {
                timeout(LINGER, async { while self.tasks.join_next().await.is_some() {} }).await
            });
        }
    }
}
