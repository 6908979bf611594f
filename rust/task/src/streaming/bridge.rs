//! One stream between whichever client has it open and the process whose it is.
//!
//! The bridge outlives its clients: when one breaks off, what it may not have read is kept for the next. containerd's
//! reader grants 64 KiB whenever less than that is left to it, so what is more than two grants back has been read; the
//! rest is sent again, since a repeated byte can be seen and a lost one cannot.

use std::{io, time::Duration};

use kuasar_common::stdio::{HEADER, MAX_FRAME, Stream, header, payload_len};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    sync::mpsc,
    time::timeout,
};

use super::wire::{Said, Wire};

/// Bytes that a receiver grants at a time, as containerd has it (`windowSize`).
pub const WINDOW: usize = 64 * 1024;
/// Most bytes of one message: containerd counts no more of a longer one, and waits for ever then.
const MAX_DATA: usize = 32 * 1024;
/// How long an ended stream waits for a client to read the rest of it, and a client for closing.
const END_DEADLINE: Duration = Duration::from_secs(10);

/// Runs one stream until it has ended. `process` speaks the frames of the stdio port.
pub async fn run(stream: Stream, process: DuplexStream, clients: mpsc::Receiver<Wire>) {
    match stream {
        Stream::Stdin => Input { process, clients }.run().await,
        Stream::Stdout | Stream::Stderr => Output::new(process, clients).run().await,
    }
}

enum Next {
    /// Another client has opened the stream.
    Client(Wire),
    /// The client is gone; another may come.
    Lost,
    /// There is nothing more to do.
    Done,
}

/// From the process to the client.
struct Output {
    process: DuplexStream,
    clients: mpsc::Receiver<Wire>,
    /// Bytes as they come from the process, frames with their headers.
    raw: Vec<u8>,
    /// Bytes that no client is known to have read.
    kept: Vec<u8>,
    ended: bool,
}

impl Output {
    fn new(process: DuplexStream, clients: mpsc::Receiver<Wire>) -> Self {
        Self { process, clients, raw: Vec::with_capacity(MAX_DATA), kept: Vec::new(), ended: false }
    }

    async fn run(mut self) {
        let mut client: Option<Wire> = None;
        loop {
            let next = match client.take() {
                Some(wire) => self.serve(wire).await,
                None => self.await_client().await,
            };
            match next {
                Next::Client(wire) => client = Some(wire),
                Next::Lost => {}
                Next::Done => return,
            }
        }
    }

    /// Without a client nothing is read: the process is held up, and nobody else.
    async fn await_client(&mut self) -> Next {
        let next = if self.ended {
            timeout(END_DEADLINE, self.clients.recv()).await.ok().flatten()
        } else {
            self.clients.recv().await
        };
        next.map_or(Next::Done, Next::Client)
    }

    async fn serve(&mut self, mut wire: Wire) -> Next {
        let (mut sent, mut granted, mut forgotten) = (0_usize, 0_usize, 0_usize);
        loop {
            // Of `kept`, what this client has not been sent, as far as it lets us.
            let from = sent.saturating_sub(forgotten);
            let most = MAX_DATA.min(granted.saturating_sub(sent));
            let to = self.kept.len().min(from.saturating_add(most));
            if let Some(bytes) = self.kept.get(from..to).filter(|bytes| !bytes.is_empty()) {
                if wire.data(bytes).await.is_err() {
                    return Next::Lost;
                }
                sent = sent.saturating_add(to.saturating_sub(from));
                continue;
            }
            if self.ended && from >= self.kept.len() {
                return finish(wire).await;
            }
            // No more than a client may be sent is read ahead.
            let wants = !self.ended && granted > sent;
            tokio::select! {
                biased;
                newer = self.clients.recv() => return newer.map_or(Next::Done, Next::Client),
                said = wire.said() => match said {
                    Some(Said::Window(more)) => {
                        granted = granted.saturating_add(more);
                        let read = granted.saturating_sub(2 * WINDOW).min(sent);
                        self.kept.drain(..read.saturating_sub(forgotten).min(self.kept.len()));
                        forgotten = forgotten.max(read);
                    }
                    Some(_) => {}
                    None => return Next::Lost,
                },
                more = self.process.read_buf(&mut self.raw), if wants => {
                    self.ended = !matches!(more, Ok(1..)) | !unpack(&mut self.raw, &mut self.kept);
                }
            }
        }
    }
}

/// Moves the payload of whole frames over; false at the end of the stream.
fn unpack(raw: &mut Vec<u8>, payload: &mut Vec<u8>) -> bool {
    loop {
        let Some((head, rest)) = raw.split_first_chunk::<HEADER>() else { return true };
        let Ok(length @ 1..=MAX_FRAME) = payload_len(*head) else { return false };
        let Some(bytes) = rest.get(..length) else { return true };
        payload.extend(bytes);
        raw.drain(..HEADER + length);
    }
}

/// Says that the stream has ended, and lets the client say so, too, before the connection closes.
async fn finish(mut wire: Wire) -> Next {
    if wire.end().await.is_err() {
        return Next::Lost;
    }
    let closed = async {
        loop {
            match wire.said().await {
                Some(Said::Closed) => return Next::Done,
                Some(_) => {}
                // Whether it has read everything is not known.
                None => return Next::Lost,
            }
        }
    };
    timeout(END_DEADLINE, closed).await.unwrap_or(Next::Done)
}

/// From the client to the process.
struct Input {
    process: DuplexStream,
    clients: mpsc::Receiver<Wire>,
}

impl Input {
    async fn run(mut self) {
        let mut client = None;
        loop {
            let next = match client.take() {
                Some(wire) => self.serve(wire).await,
                None => self.clients.recv().await.map_or(Next::Done, Next::Client),
            };
            match next {
                Next::Client(wire) => client = Some(wire),
                Next::Lost => {}
                Next::Done => return,
            }
        }
    }

    async fn serve(&mut self, mut wire: Wire) -> Next {
        if wire.window(WINDOW).await.is_err() {
            return Next::Lost;
        }
        loop {
            let said = tokio::select! {
                biased;
                said = wire.said() => said,
                newer = self.clients.recv() => return newer.map_or(Next::Done, Next::Client),
            };
            let taken = match said {
                None => return Next::Lost,
                Some(Said::Window(_)) => continue,
                Some(Said::Closed) => {
                    // The end, which is an empty frame; then the other side has nothing to wait for.
                    let _ = self.process.write_all(&header(0)).await;
                    let _ = wire.end().await;
                    return Next::Done;
                }
                Some(Said::Data(bytes)) => {
                    if self.give(&bytes).await.is_err() {
                        return Next::Done;
                    }
                    bytes.len()
                }
            };
            if wire.window(taken).await.is_err() {
                return Next::Lost;
            }
        }
    }

    async fn give(&mut self, bytes: &[u8]) -> io::Result<()> {
        for part in bytes.chunks(MAX_FRAME) {
            self.process.write_all(&header(part.len())).await?;
            self.process.write_all(part).await?;
        }
        Ok(())
    }
}
