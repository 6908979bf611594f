//! Connecting to the guest's ports through a hybrid vsock's socket.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use tokio::{io::AsyncWriteExt, net::UnixStream, sync::Semaphore, time::timeout};

use super::read_line;

/// Longest `OK …` line of a hybrid socket, in bytes.
const OK_LINE: usize = 64;
/// Longest time that an attempt waits for its answer, also after its caller gave up.
const ANSWER_LIMIT: Duration = Duration::from_secs(300);
/// Connections that may wait for an answer at the same time.
const MAX_WAITING: usize = 64;

/// A hybrid vsock's socket.
pub(super) struct Hybrid {
    path: PathBuf,
    waiting: Arc<Semaphore>,
    limit: Duration,
}

impl Hybrid {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, waiting: Arc::new(Semaphore::new(MAX_WAITING)), limit: ANSWER_LIMIT }
    }

    pub(super) fn path(&self) -> &PathBuf {
        &self.path
    }

    /// Connects to a port. A caller that gives up leaves the attempt to go on in a task of its own:
    /// `vhost-device-vsock` 0.3.0 panics, and no connection of the pod works any more, when a caller hangs up
    /// before it was answered. Attempts do not go on for ever, nor as many as a guest likes: a guest that
    /// answers nobody would have a task and a descriptor of each attempt.
    pub(super) async fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let permit = Arc::clone(&self.waiting).try_acquire_owned().map_err(|_| {
            io::Error::other(format!("{MAX_WAITING} connections wait for the guest's answer already"))
        })?;
        let mut stream = UnixStream::connect(&self.path).await?;
        let limit = self.limit;
        let answered = tokio::spawn(async move {
            let _permit = permit;
            let talk = async {
                stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
                read_line(&mut stream, OK_LINE).await
            };
            let line = timeout(limit, talk).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
            if line == b"OK" || line.starts_with(b"OK ") {
                return Ok(stream);
            }
            let line = String::from_utf8_lossy(&line).into_owned();
            Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                format!("the answer to CONNECT was {line:?}"),
            ))
        });
        answered.await?
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt, net::UnixListener};

    use super::*;

    fn on_one_thread(work: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work);
    }

    #[test]
    fn whoever_gives_up_dialling_does_not_hang_up_before_the_answer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        on_one_thread(async {
            let listener = UnixListener::bind(&path).unwrap();
            let hybrid = Hybrid::new(path.clone());
            assert!(timeout(Duration::from_millis(50), hybrid.dial(1026)).await.is_err(), "nobody answers");
            let (mut vsock, _) = listener.accept().await.unwrap();
            let mut asked = [0; 13];
            vsock.read_exact(&mut asked).await.unwrap();
            assert_eq!(&asked, b"CONNECT 1026\n");
            vsock.write_all(b"OK 1026\n").await.expect("the caller is still there");
            assert_eq!(vsock.read(&mut asked).await.unwrap(), 0, "and hangs up then");
        });
    }

    #[test]
    fn a_guest_that_never_answers_has_few_connections_and_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        on_one_thread(async {
            let listener = UnixListener::bind(&path).unwrap();
            let hybrid = Arc::new(Hybrid { limit: Duration::from_secs(3), ..Hybrid::new(path.clone()) });
            let dial = || {
                let hybrid = Arc::clone(&hybrid);
                tokio::spawn(async move { hybrid.dial(1024).await })
            };
            let (mut held, mut dials) = (Vec::new(), Vec::new());
            for _ in 0..MAX_WAITING {
                dials.push(dial());
                held.push(listener.accept().await.unwrap().0);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            // They give up, and that changes nothing.
            dials.iter().for_each(tokio::task::JoinHandle::abort);
            let error = dial().await.unwrap().unwrap_err().to_string();
            assert_eq!(error, "64 connections wait for the guest's answer already");
            for vsock in &mut held {
                let mut asked = Vec::new();
                vsock.read_to_end(&mut asked).await.unwrap();
                assert_eq!(asked, b"CONNECT 1024\n", "and nobody waits any more");
            }
            let again = dial();
            let (mut vsock, _) = listener.accept().await.unwrap();
            vsock.write_all(b"OK 1\n").await.unwrap();
            assert!(again.await.unwrap().is_ok(), "there is room again");
        });
    }
}
