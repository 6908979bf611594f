//! Tells systemd that the daemon is ready, and that it lives.

use std::time::Duration;

use sd_notify::NotifyState;

/// Ready to serve; nothing when nobody wants to know.
pub(crate) fn ready() {
    tell(&[NotifyState::Ready]);
}

/// About to leave.
pub(crate) fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Tells at half the interval that systemd asks for, for ever; never returns when it asks for none. A runtime
/// that does not get to its tasks any more says nothing, and systemd starts another daemon: pods go on
/// meanwhile.
pub(crate) async fn keep_alive() {
    let mut usec = 0;
    if !sd_notify::watchdog_enabled(false, &mut usec) || usec == 0 {
        return std::future::pending().await;
    }
    let mut half = tokio::time::interval(Duration::from_micros(usec) / 2);
    loop {
        half.tick().await;
        tell(&[NotifyState::Watchdog]);
    }
}

fn tell(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(false, state) {
        tracing::warn!(%error, ?state, "telling systemd");
    }
}
