//! Notes that a pod's guest does not answer, for `crictl inspectp`.
//!
//! The daemon asks no guest only to know that: each call that it makes anyway notes how it went. A pod stays
//! ready with a guest that does not answer. It may only be starved or paused, and its containers may serve
//! all the same; the kubelet kills all of them as soon as a pod is not ready, and has probes for what a
//! container has to answer.

use std::{sync::PoisonError, time::SystemTime};

use super::Pod;
use crate::{guest::GuestError, vmm::Vm};

/// A guest that does not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Silence {
    /// When it was first asked in vain.
    pub since: SystemTime,
    /// Error of the last question.
    pub why: String,
}

impl Pod {
    /// Since when and why the guest does not answer; `None` if it did when it was last asked.
    #[must_use]
    pub fn silence(&self) -> Option<Silence> {
        self.silence.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The guest has answered.
    pub(super) fn heard(&self) {
        let was = self.silence.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(silence) = was {
            let after = silence.since.elapsed().unwrap_or_default();
            tracing::info!(?after, "the guest answers again");
        }
    }

    /// The guest was asked at `since` and has not answered.
    pub(super) fn unheard(&self, since: SystemTime, why: String) {
        let mut silence = self.silence.lock().unwrap_or_else(PoisonError::into_inner);
        let since = silence.as_ref().map_or(since, |silence| silence.since);
        let now = Silence { since, why };
        if silence.as_ref() != Some(&now) {
            tracing::warn!(why = now.why, "the guest does not answer");
        }
        *silence = Some(now);
    }

    /// Notes how a call to the guest went that began at `asked`.
    pub(super) async fn note<T>(&self, vm: &dyn Vm, asked: SystemTime, answer: &Result<T, GuestError>) {
        match answer {
            Err(error) if !error.is_answer() => {
                // A guest cannot answer when its VM is paused, or its VMM stands still.
                let vmm = vm.ping().await.err().map_or_else(String::new, |error| format!("; {error}"));
                self.unheard(asked, format!("{error}{vmm}"));
            }
            _ => self.heard(),
        }
    }
}
