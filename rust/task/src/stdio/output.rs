//! From a process's standard output or error to whichever connection the stream has.

use std::{sync::Arc, time::Duration};

use kuasar_common::stdio::{HEADER, header};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::watch,
    time::timeout,
};

use super::{
    fd::{Fd, Source},
    registry::{Connection, Slot},
};
use crate::{reaper::Exit, transport::MAX_WRITE};

/// Bytes of a frame, header included: one write, one packet.
const FRAME: usize = MAX_WRITE;
/// Longest time that the receiver may take to close after the end of the stream.
const CLOSE_DEADLINE: Duration = Duration::from_secs(10);
/// Time that the rest of a deleted process's output is still delivered to a connection that takes it.
const DELETED_DEADLINE: Duration = Duration::from_secs(30);

/// One output stream. Holds at most one frame; a slow or absent receiver leaves the rest in the pipe, where
/// it holds up the process that writes, and nobody else.
pub struct Output {
    source: Option<Source>,
    slot: Slot,
    exited: watch::Receiver<Option<Exit>>,
    frame: Frame,
    reader: Option<Reader>,
    readers: Readers,
}

/// Number of a process's outputs whose reader has not got all of it.
pub type Readers = Arc<watch::Sender<usize>>;

/// A connection that is counted among the readers for as long as it is there.
struct Reader {
    connection: Connection,
    readers: Readers,
}

impl Reader {
    fn new(connection: Connection, readers: &Readers) -> Self {
        readers.send_modify(|count| *count = count.saturating_add(1));
        Self { connection, readers: Arc::clone(readers) }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.readers.send_modify(|count| *count = count.saturating_sub(1));
    }
}

/// The frame that is not delivered yet.
#[derive(Default)]
struct Frame {
    /// Room for header and payload, made when it is first needed.
    buffer: Vec<u8>,
    /// Bytes of the header and payload in it; 0: there is no frame.
    len: usize,
}

impl Frame {
    /// Reads the next frame, header first. Cancelling loses nothing: the frame is only there when the read is
    /// done.
    async fn fill(&mut self, source: &mut Source, exited: &mut watch::Receiver<Option<Exit>>) -> usize {
        self.buffer.resize(FRAME, 0);
        let Some((head, payload)) = self.buffer.split_first_chunk_mut::<HEADER>() else { return 0 };
        let read = source.read(payload, exited).await;
        *head = header(read);
        self.len = if read == 0 { 0 } else { HEADER + read };
        read
    }

    fn bytes(&self) -> &[u8] {
        self.buffer.get(..self.len).unwrap_or_default()
    }
}

impl Output {
    /// An output stream that reads `source`, or is at its end already if that is `None`.
    #[must_use]
    pub fn new(
        source: Option<Fd>,
        slot: Slot,
        exited: watch::Receiver<Option<Exit>>,
        readers: &Readers,
    ) -> Self {
        let (source, readers) = (source.map(Source::new), Arc::clone(readers));
        Self { source, slot, exited, frame: Frame::default(), reader: None, readers }
    }

    /// Runs until the stream's claim is released.
    pub async fn run(mut self) {
        while self.step().await {}
        if self.reader.is_some() {
            // Deleted while somebody still reads: they get the rest, if they take it.
            let _ = timeout(DELETED_DEADLINE, self.deliver_rest()).await;
        }
    }

    /// Moves one thing on; false once the claim was released.
    async fn step(&mut self) -> bool {
        let Some(mut reader) = self.reader.take() else {
            self.reader = self.slot.next().await.map(|connection| Reader::new(connection, &self.readers));
            return self.reader.is_some();
        };
        tokio::select! {
            biased;
            newer = self.slot.next() => {
                // A new connection takes over; what the old one may not have got is sent again.
                let released = newer.is_none();
                if let Some(newer) = newer {
                    reader.connection = newer;
                }
                self.reader = Some(reader);
                !released
            }
            keep = deliver(&mut self.source, &mut self.frame, &mut self.exited, &mut reader.connection) => {
                self.reader = keep.then_some(reader);
                true
            }
        }
    }

    async fn deliver_rest(&mut self) {
        while let Some(reader) = &mut self.reader {
            if !deliver(&mut self.source, &mut self.frame, &mut self.exited, &mut reader.connection).await {
                return;
            }
        }
    }
}

/// Reads what nobody asked for, so that the process can go on writing it.
pub async fn discard(source: Fd, mut exited: watch::Receiver<Option<Exit>>) {
    let (mut source, mut buffer) = (Source::new(source), vec![0; 4096]);
    while source.read(&mut buffer, &mut exited).await > 0 {}
}

/// Reads one frame and sends it, or sends the end. False when the connection is done with.
async fn deliver(
    source: &mut Option<Source>,
    frame: &mut Frame,
    exited: &mut watch::Receiver<Option<Exit>>,
    connection: &mut Connection,
) -> bool {
    if frame.len == 0 {
        match source {
            None => return finish(connection).await,
            Some(open) => {
                tokio::select! {
                    biased;
                    read = frame.fill(open, exited) => if read == 0 { *source = None; return true },
                    () = closed(connection) => return false,
                }
            }
        }
    }
    if connection.write_all(frame.bytes()).await.is_err() || connection.flush().await.is_err() {
        return false;
    }
    frame.len = 0;
    true
}

/// Ends when the receiver goes away; it has nothing to say.
async fn closed(connection: &mut Connection) {
    let mut byte = [0; 64];
    while matches!(connection.read(&mut byte).await, Ok(1..)) {}
}

/// Sends the end of the stream and waits for the receiver to close.
async fn finish(connection: &mut Connection) -> bool {
    if connection.write_all(&header(0)).await.is_ok() && connection.flush().await.is_ok() {
        let _ = timeout(CLOSE_DEADLINE, closed(connection)).await;
    }
    false
}

#[cfg(test)]
mod tests {
    use rustix::pipe::pipe;
    use tokio::io::Interest;

    use super::*;

    #[tokio::test]
    async fn what_nobody_asked_for_does_not_hold_the_writer_up() {
        let (read, write) = pipe().unwrap();
        let writer = std::thread::spawn(move || {
            for _ in 0..100 {
                rustix::io::write(&write, &[b'x'; 4096]).unwrap();
            }
        });
        let (_sender, exited) = watch::channel(None);
        let source = Fd::new(read, Interest::READABLE, false).unwrap();
        timeout(Duration::from_secs(20), discard(source, exited)).await.unwrap();
        writer.join().unwrap();
    }
}
