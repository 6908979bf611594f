//! Tells an emulated guest about the host's clock.

use std::time::{Duration, Instant};

/// Time for which the daemon watches the counter. 50 ms keep the error of two readings far below what a
/// guest's clock tolerates.
const WATCHED: Duration = Duration::from_millis(50);

/// Kernel parameter with the speed of the time stamp counter, which QEMU's emulation shows guests as the host
/// has it.
///
/// Without it a guest measures the counter against an emulated timer, which fails on a busy host; the guest
/// then counts ticks of 4 ms instead. Empty on machines without such a counter.
pub(super) async fn parameter() -> String {
    let first = counter();
    let start = Instant::now();
    tokio::time::sleep(WATCHED).await;
    match (first, counter(), start.elapsed().as_micros()) {
        (Some(first), Some(last), micros) if micros > 0 => {
            let khz = u128::from(last.wrapping_sub(first)).saturating_mul(1000) / micros;
            format!("tsc_early_khz={khz}")
        }
        _ => String::new(),
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::unnecessary_wraps, reason = "other architectures have none")]
fn counter() -> Option<u64> {
    // SAFETY: reads a counter that every x86_64 processor has; no memory is touched.
    Some(unsafe { core::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> Option<u64> {
    None
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    #[tokio::test]
    async fn names_a_speed_that_processors_have() {
        let text = super::parameter().await;
        let khz: u64 = text.strip_prefix("tsc_early_khz=").unwrap().parse().unwrap();
        assert!((500_000..10_000_000).contains(&khz), "{khz} kHz");
    }
}
