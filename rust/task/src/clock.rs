//! The guest's clock: set when the pod is set up, kept in step by the host's corrections afterwards.
//!
//! A small correction is slewed: time never jumps and never goes back, it runs 0.05 % faster or slower until
//! the offset is gone. A large one, as after a suspended or restored VM, is a step, forward or back: a slew
//! of it would take hours.

use rustix::{
    fs::Timespec,
    time::{ClockId, clock_gettime, clock_settime},
};

use crate::error::TaskError;

const NANOS: i64 = 1_000_000_000;
const NANOS_PER_MICRO: i64 = 1_000;
/// Largest offset that is slewed, in nanoseconds, as ntpd has it. The kernel slews 500 us a second
/// (`MAX_TICKADJ` of `kernel/time/ntp.c`), so this much is gone after 256 s.
const MAX_SLEW: i64 = 128_000_000;

/// Treatment of an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Correction {
    /// Nothing: it is below what the kernel slews by.
    None,
    /// Let the clock run faster or slower until this many microseconds are gone.
    Slew(i64),
    /// Move it by this many nanoseconds at once.
    Step(i64),
}

fn correction(delta_ns: i64) -> Correction {
    match delta_ns.saturating_abs() {
        0..NANOS_PER_MICRO => Correction::None,
        NANOS_PER_MICRO..=MAX_SLEW => Correction::Slew(delta_ns / NANOS_PER_MICRO),
        _ => Correction::Step(delta_ns),
    }
}

/// Nanoseconds since 1970 by the guest's clock.
#[must_use]
pub fn now_ns() -> i64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec.saturating_mul(NANOS).saturating_add(now.tv_nsec)
}

/// Sets the guest's clock; 0 leaves it.
///
/// # Errors
/// When the time is before 1970, or the kernel's.
pub fn set(ns: i64) -> Result<(), TaskError> {
    if ns == 0 {
        return Ok(());
    }
    let time = timespec(ns)?;
    clock_settime(ClockId::Realtime, time).map_err(TaskError::io(format!("setting the clock to {ns} ns")))
}

/// Corrects the guest's clock by a number of nanoseconds, forward or back. Replaces what is left of an
/// earlier slew: the host has measured anew.
///
/// # Errors
/// When the result is before 1970, or the kernel's.
pub fn correct(delta_ns: i64) -> Result<(), TaskError> {
    match correction(delta_ns) {
        Correction::None => Ok(()),
        Correction::Slew(us) => {
            let left = slew(us)?;
            log::info!("slewing the clock by {us} us; {left} us of an earlier correction were left");
            Ok(())
        }
        Correction::Step(delta) => {
            // The kernel forgets about a slew that is under way.
            set(stepped(now_ns(), delta)?)?;
            log::info!("stepped the clock by {delta} ns");
            Ok(())
        }
    }
}

fn stepped(now_ns: i64, delta_ns: i64) -> Result<i64, TaskError> {
    let ns = now_ns
        .checked_add(delta_ns)
        .ok_or_else(|| TaskError::InvalidArgument(format!("clock delta {delta_ns} ns overflows")))?;
    timespec(ns).map(|_| ns)
}

fn timespec(ns: i64) -> Result<Timespec, TaskError> {
    if ns < 0 {
        return Err(TaskError::InvalidArgument(format!("clock {ns} ns is before 1970")));
    }
    Ok(Timespec { tv_sec: ns.div_euclid(NANOS), tv_nsec: ns.rem_euclid(NANOS) })
}

/// Starts a slew, as adjtime(3) does; returns how many microseconds of the one before were left.
fn slew(us: i64) -> Result<i64, TaskError> {
    // SAFETY: all of the structure's fields are integers, for which zero is a value.
    let mut adjustment: libc::timex = unsafe { std::mem::zeroed() };
    adjustment.modes = libc::ADJ_OFFSET_SINGLESHOT;
    adjustment.offset = us;
    // SAFETY: the pointer is to a structure of our own that lives through the call.
    if unsafe { libc::adjtimex(&raw mut adjustment) } < 0 {
        let error = std::io::Error::last_os_error();
        return Err(TaskError::io(format!("slewing the clock by {us} us"))(error));
    }
    Ok(adjustment.offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_offsets_are_slewed_and_large_ones_stepped() {
        for (delta, wanted) in [
            (0, Correction::None),
            (999, Correction::None),
            (-999, Correction::None),
            (1_000, Correction::Slew(1)),
            (-1_999, Correction::Slew(-1)),
            (128_000_000, Correction::Slew(128_000)),
            (-128_000_000, Correction::Slew(-128_000)),
            (128_000_001, Correction::Step(128_000_001)),
            (-3_600_000_000_000, Correction::Step(-3_600_000_000_000)),
            (i64::MIN, Correction::Step(i64::MIN)),
        ] {
            assert_eq!(correction(delta), wanted, "{delta}");
        }
    }

    #[test]
    fn a_clock_steps_both_ways_but_not_before_1970() {
        assert_eq!(stepped(5_000_000_000, -4_000_000_000).unwrap(), 1_000_000_000);
        assert_eq!(stepped(5_000_000_000, 4_000_000_000).unwrap(), 9_000_000_000);
        assert!(stepped(1, i64::MAX).unwrap_err().to_string().contains("overflows"));
        assert!(stepped(1, -2).unwrap_err().to_string().contains("before 1970"));
    }

    #[test]
    fn clocks_are_split_into_seconds_and_nanoseconds() {
        let time = timespec(1_700_000_000_123_456_789).unwrap();
        assert_eq!((time.tv_sec, time.tv_nsec), (1_700_000_000, 123_456_789));
    }
}
