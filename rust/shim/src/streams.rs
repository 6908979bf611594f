//! containerd's streams (`io_type = "streaming"`): which connection belongs to which stream of which process.
//!
//! containerd opens a stream before its process exists, opens it again after a restart, also when the process
//! is over, and may leave one for ever whose process never comes. One task a stream holds all of that
//! together.

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use kuasar_common::{
    stdio::{Stream, header},
    streaming::{
        bridge::{self, Policy},
        frame::Frame,
        wire::{Said, Wire, Writer},
    },
};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt, DuplexStream, duplex},
    net::{UnixStream, unix::OwnedWriteHalf},
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep_until},
};

use crate::{log::log, registry::lock};

/// Streams that may be open at the same time.
const MAX_STREAMS: usize = 4096;
/// Longest time that a stream waits for its process: it is opened when a container is created, which a person
/// may start later.
const PROCESS_DEADLINE: Duration = Duration::from_secs(3600);
/// The same, of an input that is at its end already.
const ENDED_DEADLINE: Duration = Duration::from_secs(300);
/// Clients of one stream that may queue up.
const QUEUE: usize = 2;
/// Bytes between a bridge and its process.
const BUFFER: usize = 8 * 1024;

/// A process's claim to a stream.
struct Claim {
    stream: Stream,
    process: DuplexStream,
    policy: Policy,
    /// Dropped when the stream's end has been read.
    open: Open,
}

struct Entry {
    clients: mpsc::Sender<Wire>,
    claim: Option<oneshot::Sender<Claim>>,
}

/// All streams of the pod, by their ids.
#[derive(Default)]
pub(crate) struct Streams(Mutex<HashMap<String, Entry>>);

/// Number of a process's outputs that containerd has not read to their ends.
#[derive(Clone)]
pub(crate) struct Outputs(watch::Sender<usize>);

impl Outputs {
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(0))
    }

    /// Counts one more, until what is returned is dropped.
    fn open(&self) -> Open {
        self.0.send_modify(|count| *count += 1);
        Open(self.0.clone())
    }

    /// Returns when there is none.
    pub(crate) async fn read(&self) {
        // The sender is in `self`, so this cannot end early.
        let _ = self.0.subscribe().wait_for(|count| *count == 0).await;
    }
}

struct Open(watch::Sender<usize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}

/// The streams of a process. They are forgotten when this is dropped: a client that has one open may read on,
/// nobody else comes.
#[derive(Default)]
pub(crate) struct Names(Vec<(Arc<Streams>, String)>);

impl Drop for Names {
    fn drop(&mut self) {
        for (streams, id) in self.0.drain(..) {
            lock(&streams.0).remove(&id);
        }
    }
}

impl Streams {
    /// Serves a connection whose first frame asks for a stream.
    pub(crate) async fn serve(self: &Arc<Self>, connection: UnixStream, request: &Frame) {
        let (reader, writer) = connection.into_split();
        // Whoever may open this socket is root, as for the calls on it.
        let opened = Wire::open(Box::new(reader), Box::new(Half(writer)), request, |_| Ok(())).await;
        if let Err(error) = opened.and_then(|(wire, id)| self.arrive(wire, id)) {
            log!("refused a stream: {error}");
        }
    }

    fn arrive(self: &Arc<Self>, wire: Wire, id: String) -> io::Result<()> {
        let mut streams = lock(&self.0);
        let wire = match streams.get(&id) {
            None => wire,
            Some(entry) => match entry.clients.try_send(wire) {
                Ok(()) => return Ok(()),
                Err(mpsc::error::TrySendError::Closed(wire)) => wire,
                Err(mpsc::error::TrySendError::Full(_)) => {
                    let why = format!("stream {id:?} has {QUEUE} clients waiting already");
                    return Err(io::Error::other(why));
                }
            },
        };
        if streams.len() >= MAX_STREAMS {
            return Err(io::Error::other(format!("{MAX_STREAMS} streams are open already")));
        }
        let (entry, clients, claim) = new_entry();
        streams.insert(id.clone(), entry);
        tokio::spawn(Arc::clone(self).hold(id, Some(wire), clients, claim));
        Ok(())
    }

    /// Claims a stream for a process and notes it in `names`. Returned is the process's end of it, which
    /// speaks the frames of the stdio port; when that is dropped, an output is at its end. `lasting` streams
    /// are opened again after a restart of containerd's, which those of an exec never are.
    pub(crate) fn claim(
        self: &Arc<Self>,
        id: &str,
        stream: Stream,
        lasting: bool,
        outputs: &Outputs,
        names: &mut Names,
    ) -> DuplexStream {
        let (ours, theirs) = duplex(BUFFER);
        let policy = Policy { rest: None, ends_with_client: !lasting };
        let open = if stream == Stream::Stdin { Outputs::new().open() } else { outputs.open() };
        let claim = Claim { stream, process: theirs, policy, open };
        let mut streams = lock(&self.0);
        let known = streams.get_mut(id).and_then(|entry| entry.claim.take());
        let rejected = match known {
            Some(waiting) => waiting.send(claim).err(),
            None => Some(claim),
        };
        if let Some(claim) = rejected {
            let (mut entry, clients, claimed) = new_entry();
            if let Some(waiting) = entry.claim.take() {
                let _ = waiting.send(claim);
            }
            streams.insert(id.to_owned(), entry);
            tokio::spawn(Arc::clone(self).hold(id.to_owned(), None, clients, claimed));
        }
        names.0.push((Arc::clone(self), id.to_owned()));
        ours
    }

    /// A stream's life.
    async fn hold(
        self: Arc<Self>,
        id: String,
        first: Option<Wire>,
        mut clients: mpsc::Receiver<Wire>,
        mut claimed: oneshot::Receiver<Claim>,
    ) {
        let waited = unclaimed(&id, first, &mut clients, &mut claimed).await;
        let Some((claim, client, said_end)) = waited else {
            drop(clients);
            return self.sweep(&id);
        };
        let Claim { stream, mut process, policy, open } = claim;
        if said_end {
            let _ = process.write_all(&header(0)).await;
        } else {
            bridge::run(stream, process, client, &mut clients, policy).await;
        }
        drop(open);
        // containerd opens the streams of what it finds after a restart, and waits for their ends before it
        // deletes.
        while let Some(late) = clients.recv().await {
            bridge::end(late).await;
        }
    }

    /// Removes an entry that nobody serves any more, and no newer one.
    fn sweep(&self, id: &str) {
        let mut streams = lock(&self.0);
        if streams.get(id).is_some_and(|entry| entry.clients.is_closed()) {
            streams.remove(id);
        }
    }
}

fn new_entry() -> (Entry, mpsc::Receiver<Wire>, oneshot::Receiver<Claim>) {
    let (clients, incoming) = mpsc::channel(QUEUE);
    let (claim, claimed) = oneshot::channel();
    (Entry { clients, claim: Some(claim) }, incoming, claimed)
}

/// Waits for a stream's process. Nothing if it never comes: its client is gone, or has waited too long.
/// Otherwise also the client, and whether that has ended its input already.
async fn unclaimed(
    id: &str,
    mut client: Option<Wire>,
    clients: &mut mpsc::Receiver<Wire>,
    claimed: &mut oneshot::Receiver<Claim>,
) -> Option<(Claim, Option<Wire>, bool)> {
    let mut deadline = Instant::now() + PROCESS_DEADLINE;
    let mut said_end = false;
    loop {
        let said = async {
            match &mut client {
                Some(wire) if !said_end => wire.said().await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            claim = &mut *claimed => return claim.ok().map(|claim| (claim, client, said_end)),
            newer = clients.recv() => client = Some(newer?),
            said = said => match (said, &mut client) {
                // All of the input of a process to come, or a container that is removed before it starts.
                (Some(Said::Closed), _) if id.ends_with("-stdin") => {
                    said_end = true;
                    deadline = Instant::now() + ENDED_DEADLINE;
                }
                (Some(Said::Window(bytes)), Some(wire)) => wire.keep_window(bytes),
                // No input is let in before there is a process.
                (Some(Said::Window(_) | Said::Data(_) | Said::Closed) | None, _) => return None,
            },
            () = sleep_until(deadline) => {
                log!("stream {id:?}: its process never came");
                return None;
            }
        }
    }
}

/// The sending half of a connection, which can tell how much of it containerd has read.
struct Half(OwnedWriteHalf);

impl Writer for Half {
    fn is_drained(&self) -> bool {
        let socket: &UnixStream = self.0.as_ref();
        // SAFETY: `TIOCOUTQ` (the same number as `SIOCOUTQ`) writes one `int`.
        let unread = unsafe {
            let get = rustix::ioctl::Getter::<{ linux_tiocoutq() }, std::ffi::c_int>::new();
            rustix::ioctl::ioctl(socket, get)
        };
        unread.is_ok_and(|unread| unread == 0)
    }
}

/// `SIOCOUTQ` of `linux/sockios.h`.
const fn linux_tiocoutq() -> rustix::ioctl::Opcode {
    0x5411
}

impl AsyncWrite for Half {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
