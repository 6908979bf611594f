//! Connections that have not shown the pod's token yet. Every process that may open a vsock on the host can
//! open them, so each may take little, for a short time, and no number of them keeps out one that knows the
//! token.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::oneshot, time::timeout};

/// Longest time that a connection may take to show the token.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// Connections of one port that may be at it at the same time.
pub const MAX: usize = 64;

/// Why a connection did not get to show the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It was too slow.
    #[error("it did not show the pod's token within {} s", DEADLINE.as_secs())]
    Late,
    /// There were younger ones.
    #[error("it had not shown the pod's token when {MAX} others came")]
    Crowded,
}

/// The connections of one port that have not shown the token, the oldest first.
pub struct Strangers {
    port: u32,
    waiting: Mutex<VecDeque<(u64, oneshot::Sender<()>)>>,
    next: AtomicU64,
    refused: AtomicU64,
}

/// The place of one of them.
pub struct Place {
    strangers: Arc<Strangers>,
    number: u64,
    crowded: oneshot::Receiver<()>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.strangers.waiting().retain(|(number, _)| *number != self.number);
    }
}

impl Strangers {
    /// Nobody yet, at this port.
    #[must_use]
    pub fn new(port: u32) -> Arc<Self> {
        Arc::new(Self {
            port,
            waiting: Mutex::default(),
            next: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        })
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<(u64, oneshot::Sender<()>)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of connections.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting().len()
    }

    /// Returns true if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes one in; the oldest has to go if there are too many.
    pub fn enter(self: &Arc<Self>) -> Place {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, crowded) = oneshot::channel();
        let mut waiting = self.waiting();
        if waiting.len() >= MAX {
            // Dropping its sender tells it.
            waiting.pop_front();
        }
        waiting.push_back((number, sender));
        drop(waiting);
        Place { strangers: Arc::clone(self), number, crowded }
    }

    /// Says that a connection was refused before it had shown the token. The first ones have a line each,
    /// then fewer and fewer: the console is not a stranger's to fill.
    pub fn refused(&self, why: &str) {
        let count = self.refused.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        if count.is_power_of_two() {
            log::warn!("refused a connection to port {}, the {count}. in all: {why}", self.port);
        }
    }
}

impl Place {
    /// Does what is to be done until the token was shown, as long as there is time and room. The place is
    /// free again then.
    ///
    /// # Errors
    /// When there is none any more.
    pub async fn greet<T>(mut self, work: impl Future<Output = T>) -> Result<T, Refusal> {
        tokio::select! {
            // Who has shown it in time is not asked for room.
            biased;
            done = timeout(DEADLINE, work) => done.map_err(|_| Refusal::Late),
            _ = &mut self.crowded => Err(Refusal::Crowded),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_has_ten_seconds() {
        let strangers = Strangers::new(1);
        let began = tokio::time::Instant::now();
        assert_eq!(strangers.enter().greet(pending::<()>()).await, Err(Refusal::Late));
        assert_eq!(began.elapsed(), DEADLINE);
        assert!(strangers.is_empty());
    }

    #[tokio::test]
    async fn the_oldest_goes_and_a_fast_one_gets_through() {
        let strangers = Strangers::new(1);
        let mut places: VecDeque<_> = (0..MAX).map(|_| strangers.enter()).collect();
        assert_eq!(strangers.len(), MAX);
        let fast = strangers.enter();
        assert_eq!(strangers.len(), MAX);
        let oldest = places.pop_front().unwrap();
        assert_eq!(oldest.greet(pending::<()>()).await, Err(Refusal::Crowded));
        assert_eq!(fast.greet(ready(7)).await, Ok(7));
        assert_eq!(strangers.len(), MAX - 1);
        // One that was told to go and is done all the same.
        let second = places.pop_front().unwrap();
        let (_a, _b) = (strangers.enter(), strangers.enter());
        assert_eq!(second.greet(ready(8)).await, Ok(8));
        drop(places);
        assert_eq!(strangers.len(), 2);
    }
}
