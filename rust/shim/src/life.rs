//! Progress of a process towards its end, for its waiters and its streams.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use protobuf::well_known_types::timestamp::Timestamp;
use tokio::{sync::watch, time::sleep};

/// Longest time that a stream of an exited process waits for a guest that says nothing: the relay reports the
/// exit independently of the output.
const SILENT_AFTER_EXIT: Duration = Duration::from_secs(10);
/// The same, of a process that was deleted or whose VM is gone.
const SILENT_AT_END: Duration = Duration::from_secs(2);

/// Exit of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) status: u32,
    /// By the host's clock, which is the one that containerd's other times come from.
    pub(crate) at: SystemTime,
}

impl Exit {
    /// As protobuf has it.
    pub(crate) fn timestamp(&self) -> Timestamp {
        Timestamp::from(self.at)
    }
}

#[derive(Clone, Copy, Default)]
struct Stage {
    exit: Option<Exit>,
    closing: bool,
}

/// The life of one process; clones are the same life.
#[derive(Clone)]
pub(crate) struct Life(Arc<watch::Sender<Stage>>);

impl Life {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(Stage::default())))
    }

    /// The process exited now. The first to say so is right.
    pub(crate) fn end(&self, status: u32) {
        self.0.send_if_modified(|stage| {
            let first = stage.exit.is_none();
            if first {
                stage.exit = Some(Exit { status, at: SystemTime::now() });
            }
            first
        });
    }

    /// Nothing more is to be expected from the guest for this process.
    pub(crate) fn close(&self) {
        self.0.send_modify(|stage| stage.closing = true);
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.0.borrow().closing
    }

    /// Returns the exit of the process, if it ended.
    pub(crate) fn exit(&self) -> Option<Exit> {
        self.0.borrow().exit
    }

    /// Waits for the process's exit.
    pub(crate) async fn ended(&self) -> Exit {
        let mut stage = self.0.subscribe();
        loop {
            if let Some(exit) = stage.borrow_and_update().exit {
                return exit;
            }
            // The sender is in `self`, so there always is another change to wait for.
            if stage.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Returns when a stream on which the guest says nothing from now on is to be given up.
    pub(crate) async fn silent_too_long(&self) {
        let mut stage = self.0.subscribe();
        loop {
            let now = *stage.borrow_and_update();
            let patience = match now {
                Stage { closing: true, .. } => return sleep(SILENT_AT_END).await,
                Stage { exit: Some(_), .. } => Some(SILENT_AFTER_EXIT),
                Stage { .. } => None,
            };
            tokio::select! {
                _ = stage.changed() => {}
                () = sleep(patience.unwrap_or_default()), if patience.is_some() => return,
            }
        }
    }
}
