//! One connection of containerd's streaming client: messages in, messages out.

use std::io;

use protobuf::{
    Message,
    well_known_types::{any::Any, empty::Empty},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    task::AbortHandle,
};
use ttrpc::{Code, Request, Response};

use super::frame::{DATA, Frame, NO_DATA, REMOTE_CLOSED, REQUEST, RESPONSE, read};
use crate::api::{
    streaming::StreamInit,
    transfer::{Data, WindowUpdate},
};

/// The service that containerd's clients ask for.
pub const SERVICE: &str = "containerd.services.streaming.v1.Streaming";
const METHOD: &str = "Stream";
/// Messages of the client that wait to be looked at.
const QUEUE: usize = 4;
/// Type names of messages, as containerd's typeurl has them: without a prefix.
const DATA_TYPE: &str = "containerd.types.transfer.Data";
const WINDOW_TYPE: &str = "containerd.types.transfer.WindowUpdate";
const INIT_TYPE: &str = "containerd.services.streaming.v1.StreamInit";
const EMPTY_TYPE: &str = "google.protobuf.Empty";

/// A client's message once its stream is open.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    /// Bytes of the stream.
    Data(Vec<u8>),
    /// So many more bytes may be sent to it.
    Window(usize),
    /// It sends no more.
    Closed,
}

/// The receiving half of a connection.
pub type Reader = Box<dyn AsyncRead + Send + Unpin>;

/// The sending half of a connection.
pub trait Writer: AsyncWrite + Send + Unpin {
    /// Returns true if the other side has taken everything out of the connection, as far as that can be seen.
    fn is_drained(&self) -> bool {
        true
    }
}

/// Nothing is seen behind a split connection's half.
impl<T: AsyncWrite + Send> Writer for tokio::io::WriteHalf<T> {}

/// The sending side of a connection, and the messages of the other side.
pub struct Wire {
    stream: u32,
    writer: Box<dyn Writer>,
    said: mpsc::Receiver<Said>,
    reading: AbortHandle,
    /// Bytes that the client lets be sent, said to somebody who could not send any yet.
    early: usize,
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

impl Wire {
    /// Opens the stream that `request`, the connection's first frame, asks for; its id is the second part of
    /// the result. `allow` says why a caller may not have it.
    ///
    /// # Errors
    /// When the client asks for something else, or breaks off.
    pub async fn open(
        mut reader: Reader,
        mut writer: Box<dyn Writer>,
        request: &Frame,
        allow: impl FnOnce(&Request) -> Result<(), String>,
    ) -> io::Result<(Self, String)> {
        if let Err((code, why)) = check(request, allow) {
            let mut response = Response::new();
            response.set_status(ttrpc::get_status(code, &why));
            let message = response.write_to_bytes()?;
            let refusal = Frame { stream: request.stream, kind: RESPONSE, flags: 0, message };
            writer.write_all(&refusal.encode()).await?;
            writer.flush().await?;
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        let id = init(&mut reader, request.stream).await?;
        let (sender, said) = mpsc::channel(QUEUE);
        let reading = tokio::spawn(listen(reader, request.stream, sender)).abort_handle();
        let mut wire = Self { stream: request.stream, writer, said, reading, early: 0 };
        wire.send(EMPTY_TYPE, &Empty::new()).await?;
        Ok((wire, id))
    }

    /// Sends bytes of the stream.
    ///
    /// # Errors
    /// When the connection is broken.
    pub async fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.send(DATA_TYPE, &Data { data: bytes.to_vec(), ..Default::default() }).await
    }

    /// Lets the client send so many more bytes.
    ///
    /// # Errors
    /// When the connection is broken.
    pub async fn window(&mut self, bytes: usize) -> io::Result<()> {
        let update = i32::try_from(bytes).unwrap_or(i32::MAX);
        self.send(WINDOW_TYPE, &WindowUpdate { update, ..Default::default() }).await
    }

    /// Says that there is no more.
    ///
    /// # Errors
    /// When the connection is broken.
    pub async fn end(&mut self) -> io::Result<()> {
        let flags = REMOTE_CLOSED | NO_DATA;
        let frame = Frame { stream: self.stream, kind: DATA, flags, message: Vec::new() };
        self.writer.write_all(&frame.encode()).await?;
        self.writer.flush().await
    }

    /// Returns the client's next message; `None` when the connection is gone. Cancelling loses nothing.
    pub async fn said(&mut self) -> Option<Said> {
        self.said.recv().await
    }

    /// Remembers a window for the bridge that serves the client later.
    pub fn keep_window(&mut self, bytes: usize) {
        self.early = self.early.saturating_add(bytes);
    }

    /// The windows that were said before, together.
    pub(super) fn take_window(&mut self) -> usize {
        std::mem::take(&mut self.early)
    }

    /// Returns true if the client has taken everything that was sent out of the connection, as far as that
    /// can be seen.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.writer.is_drained()
    }

    async fn send(&mut self, kind: &str, message: &impl Message) -> io::Result<()> {
        let any = Any { type_url: kind.to_owned(), value: message.write_to_bytes()?, ..Default::default() };
        let frame = Frame { stream: self.stream, kind: DATA, flags: 0, message: any.write_to_bytes()? };
        self.writer.write_all(&frame.encode()).await?;
        self.writer.flush().await
    }
}

/// Returns true if a frame asks for the streaming service.
#[must_use]
pub fn asks_for_a_stream(frame: &Frame) -> bool {
    frame.kind == REQUEST
        && Request::parse_from_bytes(&frame.message).is_ok_and(|request| request.service == SERVICE)
}

fn check(frame: &Frame, allow: impl FnOnce(&Request) -> Result<(), String>) -> Result<(), (Code, String)> {
    let request = Request::parse_from_bytes(&frame.message)
        .map_err(|error| (Code::INVALID_ARGUMENT, format!("parsing the request for a stream: {error}")))?;
    if request.method != METHOD {
        return Err((Code::UNIMPLEMENTED, format!("{SERVICE} has no method {:?}", request.method)));
    }
    allow(&request).map_err(|why| (Code::PERMISSION_DENIED, why))
}

async fn init(reader: &mut Reader, stream: u32) -> io::Result<String> {
    let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, format!("opening a stream: {why}"));
    let frame = read(reader).await?.ok_or_else(|| invalid("the client left before it said which"))?;
    let any = Any::parse_from_bytes(&frame.message)?;
    if frame.kind != DATA || frame.stream != stream || type_name(&any) != INIT_TYPE {
        return Err(invalid("the client did not say which"));
    }
    Ok(StreamInit::parse_from_bytes(&any.value)?.id)
}

/// Reads until the client leaves, breaks off, or says what is not understood: all the same to the stream.
async fn listen(mut reader: Reader, stream: u32, said: mpsc::Sender<Said>) {
    while let Ok(Some(frame)) = read(&mut reader).await {
        let Some(messages) = understand(&frame, stream) else { return };
        for message in messages.into_iter().flatten() {
            if said.send(message).await.is_err() {
                return;
            }
        }
    }
}

/// Parses a frame's messages; `None` for nonsense.
#[must_use]
pub fn understand(frame: &Frame, stream: u32) -> Option<[Option<Said>; 2]> {
    if frame.stream != stream || frame.kind != DATA {
        return None;
    }
    let closed = (frame.flags & REMOTE_CLOSED != 0).then_some(Said::Closed);
    if frame.flags & NO_DATA != 0 {
        return Some([closed, None]);
    }
    let any = Any::parse_from_bytes(&frame.message).ok()?;
    let said = match type_name(&any) {
        DATA_TYPE => Said::Data(Data::parse_from_bytes(&any.value).ok()?.data),
        WINDOW_TYPE => {
            Said::Window(usize::try_from(WindowUpdate::parse_from_bytes(&any.value).ok()?.update).ok()?)
        }
        _ => return None,
    };
    Some([Some(said), closed])
}

fn type_name(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}
