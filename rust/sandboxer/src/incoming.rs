//! Connections to the daemon's own sockets.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    net::{UnixListener, UnixStream},
    time::{Sleep, sleep},
};
use tokio_stream::Stream;

/// Out of descriptors, most likely: others have this long to close some.
const PAUSE: Duration = Duration::from_millis(100);

/// Endless stream of the connections that a listener accepts. It pauses when it cannot accept: the servers
/// that take these connections would ask again at once and without end.
#[derive(Debug)]
pub(crate) struct Incoming {
    listener: UnixListener,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Incoming {
    pub(crate) const fn new(listener: UnixListener) -> Self {
        Self { listener, pause: None }
    }
}

impl Stream for Incoming {
    type Item = io::Result<UnixStream>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(pause) = &mut self.pause {
                std::task::ready!(pause.as_mut().poll(context));
                self.pause = None;
            }
            match std::task::ready!(self.listener.poll_accept(context)) {
                Ok((stream, _)) => return Poll::Ready(Some(Ok(stream))),
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection; trying again in {PAUSE:?}");
                    self.pause = Some(Box::pin(sleep(PAUSE)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, time::Instant};

    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    use tokio_stream::StreamExt;

    use super::*;

    /// In a process of its own, as the limit is one of the process.
    #[test]
    fn without_descriptors_it_pauses_and_then_goes_on() {
        const CHILD: &str = "KUASAR_TEST_INCOMING";
        if std::env::var_os(CHILD).is_none() {
            let name = "incoming::tests::without_descriptors_it_pauses_and_then_goes_on";
            let child = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", name, "--nocapture"])
                .env(CHILD, "1")
                .output()
                .unwrap();
            assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("socket");
            let mut incoming = Incoming::new(UnixListener::bind(&path).unwrap());
            let _caller = UnixStream::connect(&path).await.unwrap();
            let limit = getrlimit(Resource::Nofile);
            setrlimit(Resource::Nofile, Rlimit { current: Some(64), ..limit }).unwrap();
            let mut all: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
            let cpu = cpu_time();
            let began = Instant::now();
            let freed = async {
                sleep(Duration::from_millis(500)).await;
                all.truncate(10);
                std::future::pending::<()>().await
            };
            let accepted = tokio::select! { next = incoming.next() => next, () = freed => None };
            accepted.expect("it goes on").expect("errors are not passed on");
            assert!(began.elapsed() >= Duration::from_millis(500));
            assert!(cpu_time() - cpu < Duration::from_millis(200), "it was busy: {:?}", cpu_time() - cpu);
        });
    }

    fn cpu_time() -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Duration::new(u64::try_from(time.tv_sec).unwrap(), u32::try_from(time.tv_nsec).unwrap())
    }
}
