//! User ids for pods: each pod's processes have one that nobody else on the host has.

use std::{
    collections::BTreeSet,
    fmt,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Ids below are the host's own: its users, its services, and `nobody`.
const LEAST: u32 = 65_536;
/// The last id but one means "no change" to system calls, and the last nothing at all to some programs.
const MOST: u32 = i32::MAX as u32;
/// Fewer are not enough for a node's pods: kubelet has 110 unless told otherwise, and some end while others
/// begin.
const FEWEST: u32 = 256;

/// User ids that are given to pods; the group ids are the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    first: u32,
    last: u32,
}

/// Why ids were refused, as the end of a sentence that begins with the key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Not two numbers.
    #[error(
        "is {0:?} and not FIRST-LAST, for example \"1900000000-1900065535\"; set it so, or to \"\" for none"
    )]
    Form(String),
    /// Ids that others have.
    #[error("begins with {0}, and ids below {LEAST} are the host's own users; begin with {LEAST} or more")]
    Low(u32),
    /// Ids that some programs take for something else.
    #[error("ends with {0}, and ids above {MOST} are not safe to use; end with {MOST} or less")]
    High(u32),
    /// Not enough.
    #[error("has {0} ids, and each pod needs one; give it {FEWEST} or more")]
    Few(u32),
    /// All in use.
    #[error("all {0} ids of sandbox.uid_range are in use by pods; give it more")]
    Exhausted(u32),
}

impl Default for IdRange {
    /// A part of the numbers that systemd's list of ids calls unused, far from what users and their
    /// containers are given.
    fn default() -> Self {
        Self { first: 1_900_000_000, last: 1_900_065_535 }
    }
}

impl FromStr for IdRange {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let numbers = text.split_once('-').map(|(first, last)| (first.trim().parse(), last.trim().parse()));
        let Some((Ok(first), Ok(last))) = numbers else { return Err(IdError::Form(text.into())) };
        let count = Self { first, last }.count();
        match () {
            () if first < LEAST => Err(IdError::Low(first)),
            () if last > MOST => Err(IdError::High(last)),
            () if count < FEWEST => Err(IdError::Few(count)),
            () => Ok(Self { first, last }),
        }
    }
}

impl fmt::Display for IdRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl IdRange {
    const fn count(self) -> u32 {
        match self.last.checked_sub(self.first) {
            Some(more) => more.saturating_add(1),
            None => 0,
        }
    }
}

/// The ids of a daemon's pods.
#[derive(Clone, Debug)]
pub struct Ids(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    range: Option<IdRange>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    used: BTreeSet<u32>,
    /// Index in the range of the id to try next: an id is given out again as late as can be.
    next: u32,
}

impl Ids {
    /// All of the range is free. Without one, pods have none.
    #[must_use]
    pub fn new(range: Option<IdRange>) -> Self {
        Self(Arc::new(Shared { range, state: Mutex::default() }))
    }

    /// Takes a free id, if pods have any.
    ///
    /// # Errors
    /// When none is left.
    pub fn take(&self) -> Result<Option<IdLease>, IdError> {
        let Some(range) = self.0.range else { return Ok(None) };
        let mut state = self.0.state();
        let count = range.count();
        for _ in 0..count {
            let id = range.first.saturating_add(state.next);
            state.next = state.next.saturating_add(1).checked_rem(count).unwrap_or(0);
            if state.used.insert(id) {
                return Ok(Some(IdLease { id, of: self.0.clone() }));
            }
        }
        Err(IdError::Exhausted(count))
    }

    /// Keeps the id of a pod that an earlier daemon gave it, whatever the range is now.
    #[must_use]
    pub fn keep(&self, id: u32) -> IdLease {
        let mut state = self.0.state();
        state.used.insert(id);
        if let Some(range) = self.0.range
            && let Some(passed) = id.checked_sub(range.first).map(|passed| passed.saturating_add(1))
            && passed < range.count()
        {
            state.next = state.next.max(passed);
        }
        IdLease { id, of: self.0.clone() }
    }

    /// Keeps an id for as long as the daemon lives: whose it is, is not known.
    pub fn reserve(&self, id: u32) {
        self.0.state().used.insert(id);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An id that is given to nobody else until this is dropped.
#[derive(Debug)]
pub struct IdLease {
    id: u32,
    of: Arc<Shared>,
}

impl IdLease {
    /// The number.
    #[must_use]
    pub const fn id(&self) -> u32 {
        self.id
    }
}

impl Drop for IdLease {
    fn drop(&mut self) {
        self.of.state().used.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_would_be_somebody_elses_are_refused() {
        let why = |text: &str| text.parse::<IdRange>().unwrap_err().to_string();
        assert_eq!(
            why("0-65535"),
            "begins with 0, and ids below 65536 are the host's own users; begin with 65536 or more"
        );
        assert_eq!(why("100000-100099"), "has 100 ids, and each pod needs one; give it 256 or more");
        assert!(why("100099-100000").starts_with("has 0 ids"), "{}", why("100099-100000"));
        assert!(why("100000-4294967295").starts_with("ends with 4294967295, and"));
        for text in ["many", "1", "5-x", "-5", "100000"] {
            assert!(why(text).contains("and not FIRST-LAST"), "{text}");
        }
        let range = "100000-165535".parse::<IdRange>().unwrap();
        assert_eq!((range.count(), range.to_string().as_str()), (65_536, "100000-165535"));
        assert_eq!(IdRange::default().to_string().parse(), Ok(IdRange::default()));
    }

    #[test]
    fn no_id_is_given_out_twice_nor_soon_again() {
        let ids = Ids::new("100000-100255".parse().ok());
        let recovered = ids.keep(100_004);
        let first = ids.take().unwrap().unwrap();
        assert_eq!(first.id(), 100_005, "not one that was in use a moment ago");
        drop(first);
        let all: Vec<_> = (0..255).map(|_| ids.take().unwrap().unwrap()).collect();
        let mut numbers: BTreeSet<u32> = all.iter().map(IdLease::id).collect();
        assert!(numbers.insert(recovered.id()) && numbers.len() == 256, "{numbers:?}");
        let error = ids.take().unwrap_err().to_string();
        assert_eq!(error, "all 256 ids of sandbox.uid_range are in use by pods; give it more");
        drop(recovered);
        assert_eq!(ids.take().unwrap().unwrap().id(), 100_004);
        assert!(Ids::new(None).take().unwrap().is_none());
        // Of a range that was configured before.
        assert_eq!(ids.keep(7).id(), 7);
    }
}
