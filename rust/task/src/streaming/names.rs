//! Meaning of streaming ids: a stream of a process. containerd opens streams before their process exists, and
//! an exec's streams are named without their container; the request that makes the process tells.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use crate::stdio::registry::Key;

type Known = HashMap<String, watch::Sender<Option<Key>>>;

/// All ids that somebody asked for or told.
#[derive(Default)]
pub struct Names(Mutex<Known>);

impl Names {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells what an id means.
    pub fn set(&self, id: &str, key: Key) {
        self.lock().entry(id.to_owned()).or_default().send_replace(Some(key));
    }

    /// Sees what an id means, now or later. The channel closes when the id is forgotten.
    pub fn meaning(&self, id: &str) -> watch::Receiver<Option<Key>> {
        self.lock().entry(id.to_owned()).or_default().subscribe()
    }

    /// Forgets what an id means.
    pub fn forget(&self, id: &str) {
        self.lock().remove(id);
    }

    /// Forgets an id that was asked for and never told.
    pub fn forget_unknown(&self, id: &str) {
        let mut known = self.lock();
        if known.get(id).is_some_and(|meaning| meaning.borrow().is_none()) {
            known.remove(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use kuasar_common::stdio::Stream;

    use super::*;

    #[test]
    fn an_id_may_be_asked_for_before_it_is_told() {
        let names = Names::default();
        let early = names.meaning("a-stdout");
        let key = Key { container: "a".into(), exec: String::new(), stream: Stream::Stdout };
        names.set("a-stdout", key.clone());
        assert_eq!(*early.borrow(), Some(key.clone()));
        names.forget_unknown("a-stdout");
        assert_eq!(*names.meaning("a-stdout").borrow(), Some(key));
        names.forget("a-stdout");
        assert!(early.has_changed().is_err(), "closed");
        let never = names.meaning("b");
        names.forget_unknown("b");
        assert!(never.has_changed().is_err(), "closed");
    }
}
