//! One stream between whichever client has it open and the process whose it is.
//!
//! The bridge outlives its clients: when one breaks off, what it may not have read is kept for the next.
//! containerd's reader grants 64 KiB whenever less than that is left to it, so what is more than two grants
//! back has been read; and so has what left the connection some time ago. The rest is sent again, since a
//! repeated byte can be seen and a lost one cannot.

use std::{collections::VecDeque, io, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::wire::{Said, Wire};
use crate::stdio::{Frames, MAX_FRAME, Stream, header};

/// Bytes that a receiver grants at a time, as containerd has it (`windowSize`).
pub const WINDOW: usize = 64 * 1024;
/// Most bytes of one message: containerd counts no more of a longer one, and waits for ever then.
const MAX_DATA: usize = 32 * 1024;
/// Bytes read from a process at a time.
const CHUNK: usize = 16 * 1024;
/// Longest time that a client may take to close an ended stream.
pub const END_DEADLINE: Duration = Duration::from_secs(10);
/// Time after which the last byte that a client took out of its connection counts as read. containerd hands
/// bytes on at once; without this, every restart of it would repeat the last lines of every log.
const SETTLE: Duration = Duration::from_secs(2);
/// Longest silence of a client whose place another takes, before the bytes that it sent count as complete.
const LEAVING: Duration = Duration::from_millis(500);
/// Longest time that a stream which nobody can open any more still serves the client that has it open.
const LINGER: Duration = Duration::from_secs(30);

/// Choices in which the users of bridges differ.
#[derive(Clone, Copy, Debug, Default)]
pub struct Policy {
    /// Longest time that an ended output waits for a client to read the rest of it; for ever unless given.
    pub rest: Option<Duration>,
    /// True if the input ends when its client leaves without closing it.
    pub ends_with_client: bool,
}

/// Runs one stream until it has ended, or until no more clients can come. `process` speaks the frames of the
/// stdio port.
pub async fn run<P: AsyncRead + AsyncWrite + Unpin>(
    stream: Stream,
    process: P,
    first: Option<Wire>,
    clients: &mut mpsc::Receiver<Wire>,
    policy: Policy,
) {
    match stream {
        Stream::Stdin => Input { process, clients, policy }.run(first).await,
        Stream::Stdout | Stream::Stderr => Output::new(process, clients, policy).run(first).await,
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
struct Output<'a, P> {
    process: P,
    clients: &'a mut mpsc::Receiver<Wire>,
    policy: Policy,
    /// Room for what comes from the process, frames with their headers.
    raw: Vec<u8>,
    frames: Frames,
    /// Bytes that no client is known to have read. They go at its front, which costs the same however much is
    /// behind.
    kept: VecDeque<u8>,
    ended: bool,
    /// When a client is given up, once no other can come.
    until: Option<Instant>,
}

impl<'a, P: AsyncRead + Unpin> Output<'a, P> {
    fn new(process: P, clients: &'a mut mpsc::Receiver<Wire>, policy: Policy) -> Self {
        let (raw, frames, kept) = (Vec::new(), Frames::default(), VecDeque::new());
        Self { process, clients, policy, raw, frames, kept, ended: false, until: None }
    }

    async fn run(mut self, mut client: Option<Wire>) {
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
        if self.until.is_some() {
            return Next::Done;
        }
        let next = match self.policy.rest.filter(|_| self.ended) {
            Some(rest) => timeout(rest, self.clients.recv()).await.ok().flatten(),
            None => self.clients.recv().await,
        };
        next.map_or(Next::Done, Next::Client)
    }

    async fn serve(&mut self, mut wire: Wire) -> Next {
        let (mut sent, mut granted, mut forgotten) = (0_usize, wire.take_window(), 0_usize);
        loop {
            // Of `kept`, what this client has not been sent, as far as it lets us.
            let from = sent.saturating_sub(forgotten);
            let most = MAX_DATA.min(granted.saturating_sub(sent));
            let bytes = piece(&self.kept, from, most);
            if !bytes.is_empty() {
                if wire.data(bytes).await.is_err() {
                    return Next::Lost;
                }
                sent = sent.saturating_add(bytes.len());
                continue;
            }
            let all_sent = from >= self.kept.len();
            if self.ended && all_sent {
                let next = finish(wire).await;
                if matches!(next, Next::Done) {
                    self.kept = VecDeque::new();
                }
                return next;
            }
            // No more than a client may be sent is read ahead.
            let wants = !self.ended && granted > sent;
            if wants {
                self.raw.reserve(CHUNK);
            }
            let give_up = async {
                match self.until {
                    Some(until) => sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                newer = self.clients.recv(), if self.until.is_none() => match newer {
                    Some(newer) => return Next::Client(newer),
                    None => self.until = Some(Instant::now() + LINGER),
                },
                () = give_up => return Next::Done,
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
                    let end = self.frames.unpack(&self.raw, |payload| self.kept.extend(payload));
                    self.ended = !matches!((more, end), (Ok(1..), Ok(None)));
                    self.raw.clear();
                }
                () = sleep(SETTLE), if all_sent && !self.kept.is_empty() => if wire.is_drained() {
                    forgotten = sent;
                    // Room is given back, too: most streams are quiet most of the time, and there are many.
                    self.kept = VecDeque::new();
                    self.raw = Vec::new();
                },
            }
        }
    }
}

/// Up to `most` bytes from a place on, as far as they lie together.
fn piece(kept: &VecDeque<u8>, from: usize, most: usize) -> &[u8] {
    let (front, back) = kept.as_slices();
    let (part, from) = match from.checked_sub(front.len()) {
        Some(from) => (back, from),
        None => (front, from),
    };
    let part = part.get(from..).unwrap_or_default();
    part.get(..most).unwrap_or(part)
}

/// Says that the stream has ended, and lets the client say so, too, before the connection closes.
async fn finish(wire: Wire) -> Next {
    // If the client left without a word, whether it has read everything is not known.
    if end(wire).await { Next::Done } else { Next::Lost }
}

/// Ends a client's stream: the end is said, and the connection closed when the client has said so, too, or
/// does not for long. False if it broke off instead.
pub async fn end(mut wire: Wire) -> bool {
    if wire.end().await.is_err() {
        return false;
    }
    let closed = async {
        loop {
            match wire.said().await {
                Some(Said::Closed) => return true,
                Some(_) => {}
                None => return false,
            }
        }
    };
    timeout(END_DEADLINE, closed).await.unwrap_or(true)
}

/// From the client to the process.
struct Input<'a, P> {
    process: P,
    clients: &'a mut mpsc::Receiver<Wire>,
    policy: Policy,
}

impl<P: AsyncWrite + Unpin> Input<'_, P> {
    async fn run(mut self, mut client: Option<Wire>) {
        loop {
            let next = match client.take() {
                Some(wire) => self.serve(wire).await,
                None => self.clients.recv().await.map_or(Next::Done, Next::Client),
            };
            match next {
                Next::Client(wire) => client = Some(wire),
                Next::Lost if self.policy.ends_with_client => {
                    let _ = self.process.write_all(&header(0)).await;
                    return;
                }
                Next::Lost => {}
                Next::Done => return,
            }
        }
    }

    async fn serve(&mut self, mut wire: Wire) -> Next {
        // That a client is gone shows in what it says, never in what it does not take: it may send all it has
        // and its last word, as far as its window reaches, and leave.
        let _ = wire.window(WINDOW).await;
        let mut newer = None;
        loop {
            let said = if newer.is_some() {
                timeout(LEAVING, wire.said()).await.ok().flatten()
            } else {
                tokio::select! {
                    biased;
                    said = wire.said() => said,
                    client = self.clients.recv() => {
                        // What the one before it sent may still be on its way here.
                        newer = client;
                        if newer.is_none() {
                            return Next::Done;
                        }
                        continue;
                    }
                }
            };
            match said {
                None => return newer.map_or(Next::Lost, Next::Client),
                Some(Said::Window(_)) => {}
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
                    if newer.is_none() {
                        let _ = wire.window(bytes.len()).await;
                    }
                }
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
