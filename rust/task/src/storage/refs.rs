//! Things that several want and one makes: made at the first reference, undone at the last, never both at a
//! time.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// Object under a key: None before it is made and after it is undone. The holder of the lock makes or undoes
/// it.
type Slot<T> = Arc<AsyncMutex<Option<T>>>;

struct Entry<I, T> {
    identity: I,
    references: usize,
    slot: Slot<T>,
}

/// Reference counts by key. `I` says what exactly is meant by a key, `T` is what is there.
pub(super) struct References<K, I, T> {
    table: Mutex<HashMap<K, Entry<I, T>>>,
}

impl<K, I, T> Default for References<K, I, T> {
    fn default() -> Self {
        Self { table: Mutex::default() }
    }
}

impl<K: Clone + Eq + Hash, I: Clone + PartialEq, T> References<K, I, T> {
    fn table(&self) -> MutexGuard<'_, HashMap<K, Entry<I, T>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a reference; the slot is for [`Self::locked`].
    ///
    /// # Errors
    /// The identity that the key stands for already, if that is another. Nothing was counted then.
    pub(super) fn add(&self, key: K, identity: I) -> Result<Slot<T>, I> {
        let mut table = self.table();
        let entry = table.entry(key).or_insert_with(|| Entry {
            identity: identity.clone(),
            references: 0,
            slot: Arc::default(),
        });
        if entry.identity != identity {
            return Err(entry.identity.clone());
        }
        entry.references += 1;
        Ok(Arc::clone(&entry.slot))
    }

    /// Takes a reference back. If it was the last, what is there is for the caller to undo, and then to
    /// [`Self::forget`]. Waits for whoever is making it.
    pub(super) async fn drop_one(&self, key: &K) -> Option<OwnedMutexGuard<Option<T>>> {
        let slot = {
            let mut table = self.table();
            let entry = table.get_mut(key)?;
            entry.references = entry.references.saturating_sub(1);
            Arc::clone(&entry.slot)
        };
        let there = slot.lock_owned().await;
        // Somebody may have come while we waited.
        let unused = self.table().get(key).is_some_and(|entry| entry.references == 0);
        unused.then_some(there)
    }

    /// Forgets a key that nothing is left of. One that could not be undone, or is wanted again, stays.
    pub(super) fn forget(&self, key: &K, there: &Option<T>) {
        let mut table = self.table();
        if there.is_none() && table.get(key).is_some_and(|entry| entry.references == 0) {
            table.remove(key);
        }
    }

    /// Number of known keys.
    pub(super) fn len(&self) -> usize {
        self.table().len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn made_once_and_undone_at_the_last() {
        let (refs, made, undone) =
            (Arc::new(References::default()), AtomicUsize::new(0), AtomicUsize::new(0));
        for _ in 0..3 {
            let slot = refs.add("a", 1).unwrap();
            let mut there = slot.lock_owned().await;
            if there.is_none() {
                made.fetch_add(1, Ordering::Relaxed);
                *there = Some(());
            }
        }
        assert_eq!(refs.add("a", 2).unwrap_err(), 1, "the same key for something else");
        for _ in 0..3 {
            if let Some(mut there) = refs.drop_one(&"a").await {
                undone.fetch_add(1, Ordering::Relaxed);
                *there = None;
                refs.forget(&"a", &there);
            }
        }
        assert_eq!((made.into_inner(), undone.into_inner(), refs.len()), (1, 1, 0));
        refs.add("a", 2).unwrap();
        assert!(refs.drop_one(&"b").await.is_none());
    }

    #[tokio::test]
    async fn who_comes_while_it_is_undone_makes_it_again() {
        let refs = Arc::new(References::default());
        *refs.add("a", ()).unwrap().lock().await = Some(1);
        let mut there = refs.drop_one(&"a").await.unwrap();
        let slot = refs.add("a", ()).unwrap();
        let newcomer = tokio::spawn(async move { slot.lock().await.replace(2) });
        tokio::task::yield_now().await;
        *there = None;
        refs.forget(&"a", &there);
        drop(there);
        assert_eq!(newcomer.await.unwrap(), None, "it finds nothing");
        assert_eq!(*refs.drop_one(&"a").await.unwrap(), Some(2), "and what it made is known");
    }

    #[tokio::test]
    async fn who_comes_before_it_is_undone_keeps_it() {
        let refs = Arc::new(References::default());
        let slot = refs.add("a", ()).unwrap();
        let mut making = Arc::clone(&slot).lock_owned().await;
        let leaving = {
            let refs = Arc::clone(&refs);
            tokio::spawn(async move { refs.drop_one(&"a").await.is_some() })
        };
        tokio::task::yield_now().await;
        let _ = refs.add("a", ()).unwrap();
        *making = Some(1);
        drop(making);
        assert!(!leaving.await.unwrap(), "it is not the last");
    }

    #[tokio::test]
    async fn what_cannot_be_undone_stays_known() {
        let refs = References::default();
        *refs.add("a", ()).unwrap().lock().await = Some(1);
        let there = refs.drop_one(&"a").await.unwrap();
        refs.forget(&"a", &there);
        assert_eq!(refs.len(), 1);
    }
}
