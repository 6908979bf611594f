//! Sources of input.

use std::{io, time::Duration};

use kuasar_common::stdio::{HEADER, header, payload_len};
use tokio::{
    io::{AsyncReadExt, DuplexStream},
    net::unix::pipe,
    time::timeout,
};

use super::CHUNK;

/// Longest time that CloseIO, which comes on another connection, waits for bytes sent on the stream before
/// it.
const SETTLE: Duration = Duration::from_secs(1);

/// containerd's side of a process's input.
pub(crate) enum Source {
    Fifo(pipe::Receiver),
    /// One of containerd's streams, in frames.
    Stream {
        end: DuplexStream,
        raw: Vec<u8>,
    },
}

/// Content of a source right now.
pub(super) enum Next {
    /// Bytes, as a frame.
    Frame(Vec<u8>),
    /// Nothing yet.
    Nothing,
    /// Nothing, and nobody who could write.
    Gone,
}

impl Source {
    /// Waits until there may be something. Cancelling loses nothing.
    pub(super) async fn ready(&mut self) -> io::Result<()> {
        match self {
            Self::Fifo(pipe) => pipe.readable().await,
            Self::Stream { end, raw } => {
                while frame_len(raw)?.is_none() {
                    raw.reserve(CHUNK);
                    if end.read_buf(raw).await? == 0 {
                        // What ends without an end is at its end all the same.
                        raw.extend(header(0));
                    }
                }
                Ok(())
            }
        }
    }

    /// Before the end: what is on its way on a stream may still arrive.
    pub(super) async fn settle(&mut self) {
        if matches!(self, Self::Stream { .. }) {
            let _ = timeout(SETTLE, self.ready()).await;
        }
    }

    /// Returns the source's content right now. When `closing`, it asks a fifo itself: tokio's readiness may
    /// not yet know of bytes that were written before containerd closed.
    pub(super) fn next(&mut self, closing: bool) -> io::Result<Next> {
        match self {
            Self::Fifo(pipe) => next_of_fifo(pipe, closing),
            Self::Stream { raw, .. } => match frame_len(raw)? {
                None => Ok(Next::Nothing),
                Some(HEADER) => Ok(Next::Gone),
                Some(len) => {
                    let rest = raw.split_off(len);
                    Ok(Next::Frame(std::mem::replace(raw, rest)))
                }
            },
        }
    }
}

/// Bytes of the first frame, header included, if it is whole.
fn frame_len(raw: &[u8]) -> io::Result<Option<usize>> {
    let Some((head, rest)) = raw.split_first_chunk::<HEADER>() else { return Ok(None) };
    let len = payload_len(*head).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    Ok((rest.len() >= len).then_some(HEADER + len))
}

fn next_of_fifo(source: &pipe::Receiver, closing: bool) -> io::Result<Next> {
    let mut frame = vec![0; HEADER + CHUNK];
    let room = frame.get_mut(HEADER..).unwrap_or_default();
    let got = if closing {
        rustix::io::retry_on_intr(|| rustix::io::read(source, &mut *room)).map_err(io::Error::from)
    } else {
        source.try_read(room)
    };
    match got {
        Ok(0) => Ok(Next::Gone),
        Ok(got) => {
            frame.truncate(HEADER + got);
            frame.get_mut(..HEADER).unwrap_or_default().copy_from_slice(&header(got));
            Ok(Next::Frame(frame))
        }
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Next::Nothing),
        Err(e) => Err(e),
    }
}
