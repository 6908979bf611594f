//! Tells whether the caller of a call is still there.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// Precision to which the end of a caller's time is known.
const ROUNDING: Duration = Duration::from_millis(50);

/// Waits for a call's answer. ttrpc's server drops it early for one of two reasons: the caller's time is
/// over, or its connection.
pub(crate) struct Waiting {
    hung_up: Arc<AtomicBool>,
    end: Option<Instant>,
    answered: bool,
}

/// View of a call's caller, for the work that serves the call.
pub(crate) struct Caller(Arc<AtomicBool>);

impl Waiting {
    /// Of a caller that has this long.
    pub(crate) fn new(limit: Option<Duration>) -> (Self, Caller) {
        let hung_up = Arc::new(AtomicBool::new(false));
        let end = limit.and_then(|limit| Instant::now().checked_add(limit.saturating_sub(ROUNDING)));
        (Self { hung_up: Arc::clone(&hung_up), end, answered: false }, Caller(hung_up))
    }

    /// There is an answer.
    pub(crate) fn answered(mut self) {
        self.answered = true;
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let in_time = self.end.is_none_or(|end| Instant::now() < end);
        if !self.answered && in_time {
            self.hung_up.store(true, Ordering::Relaxed);
        }
    }
}

impl Caller {
    /// Returns true if the caller's connection ended before there was an answer. A caller whose time was over
    /// is still there: containerd then says what is to become of its request.
    pub(crate) fn hung_up(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_hung_up() {
        let hour = Duration::from_secs(3600);
        for (limit, answered, hung_up) in [
            (None, false, true),
            (None, true, false),
            (Some(hour), false, true),
            (Some(hour), true, false),
            (Some(Duration::ZERO), false, false),
            (Some(Duration::MAX), false, true),
        ] {
            let (waiting, caller) = Waiting::new(limit);
            assert!(!caller.hung_up());
            if answered {
                waiting.answered();
            } else {
                drop(waiting);
            }
            assert_eq!(caller.hung_up(), hung_up, "{limit:?} {answered}");
        }
    }
}
