//! From whichever connection the stream has to a process's standard input.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use kuasar_common::stdio::{HEADER, payload_len};
use tokio::{
    io::AsyncReadExt,
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{
    fd::Fd,
    registry::{Connection, Slot},
};

/// After CloseIO, how long input may be silent before it counts as ended. CloseIO and the bytes before it
/// come on different connections, so the bytes may arrive later.
const CLOSE_SILENCE: Duration = Duration::from_secs(1);

/// One input stream.
pub struct Input {
    sink: Option<Fd>,
    slot: Slot,
    close: watch::Receiver<bool>,
}

enum Ended {
    /// The sender said that there is no more.
    Eof,
    /// The connection broke, or talked nonsense: another may come.
    Lost,
}

/// When bytes last came; `None` while some are on their way to the process.
struct Activity(Mutex<Option<Instant>>);

impl Activity {
    fn set(&self, at: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = at;
    }

    fn last(&self) -> Instant {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or_else(Instant::now)
    }
}

impl Input {
    /// An input stream into `sink`, or into nothing; `close` becomes true when CloseIO is called.
    #[must_use]
    pub fn new(sink: Option<Fd>, slot: Slot, close: watch::Receiver<bool>) -> Self {
        Self { sink, slot, close }
    }

    /// Runs until the stream's claim is released.
    pub async fn run(mut self) {
        let mut connection: Option<Connection> = None;
        let activity = Activity(Mutex::new(Some(Instant::now())));
        loop {
            let open = self.sink.is_some();
            let transfer = async {
                match connection.as_mut() {
                    Some(connection) => copy(connection, self.sink.as_ref(), &activity).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                newer = self.slot.next() => match newer {
                    Some(newer) => {
                        connection = Some(newer);
                        // Whatever was on its way came with the one before.
                        activity.set(Some(Instant::now()));
                    }
                    None => return,
                },
                ended = transfer => {
                    if matches!(ended, Ended::Eof) {
                        self.sink = None;
                    }
                    activity.set(Some(Instant::now()));
                    connection = None;
                }
                () = silence(&mut self.close, &activity), if open => {
                    self.sink = None;
                    connection = None;
                }
            }
        }
    }
}

/// Moves frames until the end. What the process does not take any more is read and dropped, so that the
/// sender gets to its end.
async fn copy(connection: &mut Connection, sink: Option<&Fd>, activity: &Activity) -> Ended {
    let mut broken = sink.is_none();
    let mut payload = Vec::new();
    loop {
        let mut header = [0; HEADER];
        if connection.read_exact(&mut header).await.is_err() {
            return Ended::Lost;
        }
        let len = match payload_len(header) {
            Ok(0) => return Ended::Eof,
            Ok(len) => len,
            Err(error) => {
                log::warn!("dropping a stdin connection: {error}");
                return Ended::Lost;
            }
        };
        activity.set(None);
        payload.resize(len, 0);
        if connection.read_exact(&mut payload).await.is_err() {
            return Ended::Lost;
        }
        if let (Some(sink), false) = (sink, broken) {
            broken = sink.write_all(&payload).await.is_err();
        }
        activity.set(Some(Instant::now()));
    }
}

/// Ends when CloseIO was called and nothing has come for a while.
async fn silence(close: &mut watch::Receiver<bool>, activity: &Activity) {
    if close.wait_for(|close| *close).await.is_err() {
        // Nobody can call it any more.
        return std::future::pending().await;
    }
    let mut until = Instant::now() + CLOSE_SILENCE / 2;
    while until > Instant::now() {
        sleep_until(until).await;
        until = until.max(activity.last() + CLOSE_SILENCE);
    }
}
