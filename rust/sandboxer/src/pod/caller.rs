//! Tells a pod's start if its caller still waits for the answer.

use std::convert::Infallible;

use tokio::sync::oneshot;

use super::PodError;

/// The caller's end; dropping it says that nobody waits for the answer any more.
#[derive(Debug)]
pub struct CallerGuard(#[allow(dead_code, reason = "its drop is the message")] oneshot::Sender<Infallible>);

/// The worker's end; tells it whether to go on.
#[derive(Debug)]
pub struct Caller(oneshot::Receiver<Infallible>);

impl Caller {
    /// Both ends.
    #[must_use]
    pub fn new() -> (CallerGuard, Self) {
        let (sender, receiver) = oneshot::channel();
        (CallerGuard(sender), Self(receiver))
    }

    /// Between two steps that must not be interrupted.
    pub(super) fn check(&mut self, doing: &'static str) -> Result<(), PodError> {
        match self.0.try_recv() {
            Err(oneshot::error::TryRecvError::Empty) => Ok(()),
            _ => Err(PodError::Cancelled(doing)),
        }
    }

    /// Waits for something that may be given up at any point.
    pub(super) async fn unless_gone<T>(
        &mut self,
        doing: &'static str,
        waiting: impl Future<Output = T>,
    ) -> Result<T, PodError> {
        tokio::select! {
            done = waiting => Ok(done),
            _ = &mut self.0 => Err(PodError::Cancelled(doing)),
        }
    }
}
