//! Copying bytes between containerd's side of a stream and the guest's, frame by frame, until the stream's
//! end.

mod source;

use std::{io, sync::Arc, time::Duration};

use kuasar_common::stdio::{FrameReader, HEADER, header};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Notify,
    time::sleep,
};

use self::source::Next;
pub(crate) use self::source::Source;

use crate::{
    fifo,
    guest::Conn,
    life::Life,
    log::log,
    stdio::{Port, Sink, StdioError},
};

/// Bytes copied at once. Allocated when there is something to copy, and freed after: most streams are quiet
/// most of the time, and there are many.
const CHUNK: usize = 16 * 1024;
/// Pauses between attempts to connect again.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// Why copying stopped.
enum Stop {
    /// The stream is at its end.
    End,
    /// containerd's side is broken.
    Host(io::Error),
    /// The guest's side is broken.
    Guest(io::Error),
    /// The process is over and the guest silent.
    Silent,
}

/// Copies a process's output until its end, and until somebody has it whose reader may come back.
pub(crate) async fn output(mut sink: Sink, port: Port, conn: Conn, life: Life) {
    output_to_end(&mut sink, &port, conn, &life).await;
    // No client comes back to an exec.
    if let (Sink::Pipe(pipe), true) = (sink, port.exec.is_empty())
        && let Err(e) = fifo::until_read(pipe).await
    {
        log!("{}: keeping its end for a reader: {e}", port.name());
    }
}

async fn output_to_end(sink: &mut Sink, port: &Port, mut conn: Conn, life: &Life) {
    loop {
        let why = match output_frames(sink, &mut conn, life).await {
            Stop::End => return,
            Stop::Silent => return log!("{}: closed, the process is over and its guest silent", port.name()),
            Stop::Host(e) | Stop::Guest(e) => e,
        };
        match again(port, life, &why).await {
            Some(new) => conn = new,
            None => return,
        }
    }
}

/// Copies until the end of the output or of the connection.
pub(crate) async fn until_broken(sink: &mut Sink, conn: &mut Conn, life: &Life) {
    output_frames(sink, conn, life).await;
}

/// Many short frames are written as one piece: what a guest can make the relay do depends on its bytes alone.
async fn output_frames(sink: &mut Sink, conn: &mut Conn, life: &Life) -> Stop {
    let mut frames = FrameReader::default();
    loop {
        let batch = match patiently(life, frames.next(conn)).await {
            Ok(batch) => batch,
            Err(stop) => return stop,
        };
        if !batch.payload.is_empty() {
            sink.write_all(&batch.payload).await;
        }
        if batch.end.is_some() {
            return Stop::End;
        }
    }
}

/// Waits for the guest, but not for ever once the process is over.
async fn patiently<T>(life: &Life, io: impl Future<Output = io::Result<T>>) -> Result<T, Stop> {
    tokio::select! {
        biased;
        result = io => result.map_err(Stop::Guest),
        () = life.silent_too_long() => Err(Stop::Silent),
    }
}

/// Copies a process's input until `close`, until nobody can write any more, or until the process is over.
pub(crate) async fn input(mut source: Source, port: Port, mut conn: Conn, close: Arc<Notify>, life: Life) {
    let mut unsent = Vec::new();
    loop {
        let stop = tokio::select! {
            stop = input_frames(&mut source, &mut conn, &close, &mut unsent) => stop,
            _ = life.ended() => return,
        };
        let why = match stop {
            Stop::End => break,
            Stop::Silent => return,
            Stop::Host(e) => return log!("{}: reading: {e}", port.name()),
            Stop::Guest(e) => e,
        };
        match again(&port, &life, &why).await {
            Some(new) => conn = new,
            None => return,
        }
    }
    // Whoever receives the data closes the connection: closing it here could overtake what is in flight.
    let mut byte = [0];
    tokio::select! {
        _ = conn.read(&mut byte) => {}
        () = life.silent_too_long() => {}
    }
}

/// Sends frames; `unsent` keeps the frame that a broken connection did not take.
async fn input_frames(source: &mut Source, conn: &mut Conn, close: &Notify, unsent: &mut Vec<u8>) -> Stop {
    let mut closing = false;
    loop {
        if !unsent.is_empty() {
            if let Err(e) = conn.write_all(unsent).await {
                if closing {
                    close.notify_one();
                }
                return Stop::Guest(e);
            }
            let end = unsent.len() == HEADER;
            *unsent = Vec::new();
            if end {
                return Stop::End;
            }
        }
        if !closing {
            tokio::select! {
                ready = source.ready() => if let Err(e) = ready {
                    return Stop::Host(e);
                },
                () = close.notified() => closing = true,
            }
        }
        if closing {
            source.settle().await;
        }
        match source.next(closing) {
            Ok(Next::Frame(frame)) => *unsent = frame,
            Ok(_) if closing => *unsent = header(0).to_vec(),
            Ok(Next::Gone) => closing = true,
            Ok(Next::Nothing) => {}
            Err(e) => return Stop::Host(e),
        }
    }
}

/// Connects a broken stream again (the guest kept what it has not sent), until nothing is to be expected any
/// more.
async fn again(port: &Port, life: &Life, why: &io::Error) -> Option<Conn> {
    if life.is_closing() {
        return None;
    }
    log!("{}: the connection to the guest broke ({why}), connecting again", port.name());
    let mut pause = RETRY.0;
    let work = async {
        loop {
            sleep(pause).await;
            match port.connect().await {
                Ok(conn) => return Some(conn),
                Err(e @ StdioError::Refused { .. }) => {
                    log!("{}: {e}", port.name());
                    return None;
                }
                Err(_) => pause = (pause * 2).min(RETRY.1),
            }
        }
    };
    tokio::select! {
        conn = work => conn,
        () = life.silent_too_long() => None,
    }
}
