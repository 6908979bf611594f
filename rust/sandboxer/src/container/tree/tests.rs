//! With real mounts, as root.

use std::{
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

/// Names the call after which a process of a test ends, as if it were killed.
const END_AFTER: &str = "KUASAR_TEST_END_AFTER_STEP";

/// Counts calls that change mounts.
pub(super) fn step() {
    static STEPS: AtomicU32 = AtomicU32::new(0);
    let Some(last) = std::env::var(END_AFTER).ok().and_then(|last| last.parse::<u32>().ok()) else { return };
    if STEPS.fetch_add(1, Ordering::SeqCst) >= last {
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    }
}

/// Runs a test of this binary that is ignored otherwise, killed after so many calls. Whether it was.
pub(in crate::container) fn killed_after(steps: u32, test: &str, dir: &std::path::Path) -> bool {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture"]).env(END_AFTER, steps.to_string());
    let output = command.env("KUASAR_TEST_DIR", dir).output().unwrap();
    assert!(
        output.status.success() || output.status.code().is_none(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    !output.status.success()
}
