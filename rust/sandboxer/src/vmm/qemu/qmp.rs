//! QEMU's control protocol. One connection per conversation: QEMU serves one client at a time, commands are
//! rare, and a daemon that was restarted needs nothing but the socket's path.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use qapi::{
    ExecuteError,
    futures::{QapiEvents, QapiService, QapiStream, QmpStreamTokio},
    qmp::{self, QmpCommand},
};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::{
    io::{AsyncRead, Interest, ReadBuf, ReadHalf, WriteHalf},
    net::UnixStream,
    time::{Instant, timeout, timeout_at},
};
use tokio_stream::StreamExt;

use crate::vmm::VmError;

/// Most bytes QEMU may say in one conversation. Some of them, such as device names, a guest can influence.
const MAX_CONVERSATION: usize = 1 << 20;

/// A descriptor that goes along with the next bytes that are sent.
type Parcel = Arc<Mutex<Option<OwnedFd>>>;

type Stream = QapiStream<QmpStreamTokio<ReadHalf<Bounded>>, QmpStreamTokio<WriteHalf<Bounded>>>;

/// Several commands, and the events that answer them, within one deadline.
pub(super) struct Conversation {
    service: QapiService<QmpStreamTokio<WriteHalf<Bounded>>>,
    events: QapiEvents<QmpStreamTokio<ReadHalf<Bounded>>>,
    parcel: Parcel,
    /// Devices that QEMU has said are gone.
    gone: Vec<String>,
    until: Instant,
    deadline: Duration,
}

impl Conversation {
    /// Begins one.
    ///
    /// # Errors
    /// When QEMU does not greet within the deadline.
    pub(super) async fn open(socket: &Path, deadline: Duration) -> Result<Self, VmError> {
        let until = Instant::now() + deadline;
        let why = match timeout_at(until, connect(socket)).await {
            Ok(Ok((stream, parcel))) => {
                let (service, events) = stream.into_parts();
                return Ok(Self { service, events, parcel, gone: Vec::new(), until, deadline });
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {deadline:?}"),
        };
        Err(VmError::Command { command: "begin a conversation", why })
    }

    /// Has QEMU execute a command.
    ///
    /// # Errors
    /// When QEMU does not answer before the conversation's deadline, or refuses.
    pub(super) async fn execute<C: QmpCommand>(&mut self, command: C) -> Result<C::Ok, VmError> {
        self.try_execute(command).await.map_err(|error| Self::failed::<C>(&error))
    }

    /// Gives QEMU an open file; returns the number of the set that QEMU keeps it in. `/dev/fdset/<number>` is
    /// then its path, for a reader that opens it in the way that it was opened here.
    ///
    /// # Errors
    /// When QEMU does not answer before the conversation's deadline, or refuses.
    pub(super) async fn give(&mut self, file: OwnedFd) -> Result<i64, VmError> {
        *self.parcel.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
        let given = self.execute(qmp::add_fd { fdset_id: None, opaque: None }).await;
        // A command that was never sent must not leave its file to the next one.
        self.parcel.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(given?.fdset_id)
    }

    /// The error of a command.
    pub(super) fn failed<C: QmpCommand>(error: &ExecuteError) -> VmError {
        VmError::Command { command: C::NAME, why: error.to_string() }
    }

    /// [`Self::execute`] for who wants to know how QEMU refuses.
    pub(super) async fn try_execute<C: QmpCommand>(&mut self, command: C) -> Result<C::Ok, ExecuteError> {
        let Self { service, events, gone, until, .. } = self;
        let mut answer = std::pin::pin!(service.execute(command));
        let conversation = async {
            loop {
                tokio::select! {
                    biased;
                    answer = &mut answer => return answer,
                    event = events.next() => note(event, gone)?,
                }
            }
        };
        let late =
            |_| io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {:?}", self.deadline));
        timeout_at(*until, conversation).await.map_err(late)?
    }

    /// Waits until QEMU has said that a device is gone.
    ///
    /// # Errors
    /// When it does not before the conversation's deadline.
    pub(super) async fn deleted(&mut self, device: &str) -> Result<(), VmError> {
        let Self { events, gone, until, .. } = self;
        let heard = async {
            while !gone.iter().any(|name| name == device) {
                note(events.next().await, gone)?;
            }
            Ok::<_, io::Error>(())
        };
        let why = match timeout_at(*until, heard).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("{device} is not gone within {:?}", self.deadline),
        };
        Err(VmError::Command { command: "device_del", why })
    }
}

fn note(event: Option<io::Result<qmp::Event>>, gone: &mut Vec<String>) -> io::Result<()> {
    match event {
        Some(Ok(qmp::Event::DEVICE_DELETED { data, .. })) => gone.extend(data.device),
        Some(event) => drop(event?),
        None => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "QEMU has hung up")),
    }
    Ok(())
}

/// Has QEMU execute one command.
///
/// # Errors
/// When QEMU does not answer within the deadline, or refuses.
pub(super) async fn execute<C: QmpCommand>(
    socket: &Path,
    command: C,
    deadline: Duration,
) -> Result<C::Ok, VmError> {
    let conversation = async {
        let (mut stream, _) = connect(socket).await.map_err(ExecuteError::from)?;
        stream.execute(command).await
    };
    let why = match timeout(deadline, conversation).await {
        Ok(Ok(answer)) => return Ok(answer),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {deadline:?}"),
    };
    Err(VmError::Command { command: C::NAME, why })
}

/// Checks that the VM runs.
///
/// # Errors
/// When QEMU does not answer, or the VM is in another state.
#[tracing::instrument(name = "ping QMP", level = "trace", skip_all)]
pub(super) async fn ping(socket: &Path, deadline: Duration) -> Result<(), VmError> {
    let status = execute(socket, qmp::query_status {}, deadline).await?;
    if status.running {
        return Ok(());
    }
    Err(VmError::Command { command: "query-status", why: format!("the VM is {:?}", status.status) })
}

async fn connect(socket: &Path) -> io::Result<(Stream, Parcel)> {
    let (stream, parcel) = (UnixStream::connect(socket).await?, Parcel::default());
    let stream = Bounded { stream, parcel: parcel.clone(), left: MAX_CONVERSATION };
    let (read, write) = tokio::io::split(stream);
    Ok((QmpStreamTokio::open_split(read, write).await?.negotiate().await?, parcel))
}

/// A stream that ends with an error when too much came.
struct Bounded {
    stream: UnixStream,
    parcel: Parcel,
    left: usize,
}

/// Sends bytes together with a descriptor.
fn send(stream: &UnixStream, bytes: &[u8], file: &OwnedFd) -> io::Result<usize> {
    let files = [file.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut along = SendAncillaryBuffer::new(&mut space);
    if !along.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(io::Error::other("there is no room for a descriptor"));
    }
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut along, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
}

impl AsyncRead for Bounded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let done = Pin::new(&mut self.stream).poll_read(context, buffer);
        match self.left.checked_sub(buffer.filled().len().saturating_sub(before)) {
            Some(left) => self.left = left,
            None => return Poll::Ready(Err(io::Error::other("QEMU said too much"))),
        }
        done
    }
}

impl tokio::io::AsyncWrite for Bounded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let Self { stream, parcel, .. } = &mut *self;
        let mut parcel = parcel.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = parcel.as_ref() else { return Pin::new(stream).poll_write(context, bytes) };
        loop {
            ready!(stream.poll_write_ready(context))?;
            match stream.try_io(Interest::WRITABLE, || send(stream, bytes, file)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => {
                    *parcel = None;
                    return Poll::Ready(sent);
                }
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
        net::UnixListener,
    };

    use super::*;

    const GREETING: &str = r#"{"QMP":{"version":{"qemu":{"micro":0,"minor":0,"major":10},"package":""},"capabilities":["oob"]}}"#;

    /// A QEMU that greets, answers each command with the next line, and then says nothing more.
    async fn talk(answers: Vec<String>) -> Result<(), VmError> {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let qemu = tokio::spawn(async move {
            let mut stream = BufReader::new(listener.accept().await.unwrap().0);
            for answer in answers {
                stream.write_all(answer.as_bytes()).await.unwrap();
                stream.write_all(b"\r\n").await.unwrap();
                let mut line = String::new();
                if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
                    return;
                }
            }
            std::future::pending::<()>().await;
        });
        let done = ping(&socket, Duration::from_millis(300)).await;
        qemu.abort();
        done
    }

    fn answers(status: &str) -> Vec<String> {
        vec![GREETING.into(), r#"{"return":{}}"#.into(), status.into()]
    }

    #[tokio::test]
    async fn a_running_vm_answers() {
        let running = r#"{"return":{"status":"running","singlestep":false,"running":true}}"#;
        talk(answers(running)).await.unwrap();
    }

    #[tokio::test]
    async fn everything_else_is_an_error_with_the_command() {
        let panicked = r#"{"return":{"status":"guest-panicked","singlestep":false,"running":false}}"#;
        let refused = r#"{"error":{"class":"GenericError","desc":"no"}}"#;
        let endless = format!("{{\"return\":\"{}", "x".repeat(2 << 20));
        for (answers, expected) in [
            (answers(panicked), "asking the VMM to query-status: the VM is guest_panicked"),
            (answers(refused), "asking the VMM to query-status: "),
            (vec![GREETING.into()], "asking the VMM to query-status: no answer within 300ms"),
            (vec!["SSH-2.0".into()], "asking the VMM to query-status: "),
            (vec![endless], "asking the VMM to query-status: "),
        ] {
            let error = talk(answers).await.unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        let error = ping(Path::new("/nonexistent"), Duration::from_secs(1)).await.unwrap_err().to_string();
        assert!(error.starts_with("asking the VMM to query-status: "), "{error}");
    }
}
