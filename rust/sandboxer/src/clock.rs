//! Keeps guests' clocks in step with the host's: when it is due, and by how much.
//!
//! A guest counts time by itself. It falls behind when its VM or the whole host is suspended, and drifts
//! while the host follows its time servers; and it knows of neither.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use kuasar_common::api::sandbox::SyncClockPacket;
use rustix::{
    fs::Timespec,
    io::Errno,
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime},
};
use tokio::io::{Interest, unix::AsyncFd};

/// Offsets below this are left alone, in nanoseconds: a busy host's readings are no better.
const TOLERANCE: i64 = 1_000_000;

/// Nanoseconds since the Unix epoch; 0 for a clock before it.
pub(crate) fn epoch_ns(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |past| i64::try_from(past.as_nanos()).unwrap_or(i64::MAX))
}

/// One question to a guest for its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    /// Nanoseconds by which the guest's clock is behind the host's.
    behind: i64,
    /// Largest part of that which the way there and back may account for, in nanoseconds.
    error: i64,
}

impl Sample {
    /// `sent` and `received` are the host's times of question and answer. The guest's answer need not make
    /// sense.
    pub(crate) fn new(sent: i64, answer: &SyncClockPacket, received: i64) -> Self {
        let there = sent.saturating_sub(answer.ClientArriveTime);
        let back = received.saturating_sub(answer.ServerSendTime);
        let behind = there.saturating_add(back.saturating_sub(there) / 2);
        let error = (back.saturating_sub(there) / 2).saturating_abs();
        Self { behind, error }
    }

    /// The one of two that is known better.
    pub(crate) fn better(self, other: Self) -> Self {
        if other.error < self.error { other } else { self }
    }

    /// Nanoseconds to add to the guest's clock; 0 if it may well be right.
    pub(crate) fn correction(self) -> i64 {
        if self.behind.saturating_abs() <= self.error.max(TOLERANCE) { 0 } else { self.behind }
    }
}

/// Why the daemon looks at guests' clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Occasion {
    /// It is time.
    Regular,
    /// The host's clock was set, or the host was suspended.
    HostClockSet,
}

/// Tells when guests' clocks are to be looked at.
#[derive(Debug)]
pub(crate) struct Ticker {
    timer: OwnedFd,
    interval: Duration,
}

impl Ticker {
    /// One that ticks every `interval`, and whenever the host's clock jumps.
    ///
    /// # Errors
    /// For want of descriptors.
    pub(crate) fn new(interval: Duration) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let ticker = Self { timer: timerfd_create(TimerfdClockId::Realtime, flags)?, interval };
        ticker.arm()?;
        Ok(ticker)
    }

    fn arm(&self) -> io::Result<()> {
        let due = epoch_ns(SystemTime::now())
            .saturating_add(i64::try_from(self.interval.as_nanos()).unwrap_or(i64::MAX / 2));
        let it_value = Timespec { tv_sec: due / 1_000_000_000, tv_nsec: due % 1_000_000_000 };
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        timerfd_settime(&self.timer, flags, &Itimerspec { it_interval, it_value })?;
        Ok(())
    }

    /// Waits for the next tick. What happens between two calls is not missed.
    ///
    /// # Errors
    /// When the timer cannot be watched.
    pub(crate) async fn tick(&self) -> io::Result<Occasion> {
        // SAFETY: the descriptor lives as long as `self`, which this registration does not outlive.
        let timer = unsafe { AsyncFd::register_with_interest(self.timer.as_fd(), Interest::READABLE) }?;
        loop {
            let mut ready = timer.readable().await?;
            let occasion = match rustix::io::read(&self.timer, &mut [0; 8]) {
                Ok(_) => Occasion::Regular,
                Err(Errno::CANCELED) => Occasion::HostClockSet,
                Err(Errno::AGAIN) => {
                    ready.clear_ready();
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            // Before anybody acts on it: a jump meanwhile makes the next tick.
            self.arm()?;
            return Ok(occasion);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    fn sample(sent: i64, arrived: i64, answered: i64, received: i64) -> Sample {
        let answer =
            SyncClockPacket { ClientArriveTime: arrived, ServerSendTime: answered, ..Default::default() };
        Sample::new(sent, &answer, received)
    }

    #[test]
    fn an_offset_is_told_from_the_time_that_telling_takes() {
        const MS: i64 = 1_000_000;
        // 4 ms there and 6 ms back, the guest 100 ms behind.
        let behind = sample(1000 * MS, 904 * MS, 905 * MS, 1011 * MS);
        assert_eq!(behind, Sample { behind: 101 * MS, error: 5 * MS });
        assert_eq!(behind.correction(), 101 * MS);
        let ahead = sample(1000 * MS, 5000 * MS, 5000 * MS, 1002 * MS);
        assert_eq!(ahead.correction(), -3_999 * MS);
        // Right, but slow to answer; and off by less than matters.
        assert_eq!(sample(0, 400 * MS, 400 * MS, 500 * MS).correction(), 0);
        assert_eq!(sample(0, MS / 2, MS / 2, 0).correction(), 0);
        assert_eq!(behind.better(ahead), ahead);
        assert_eq!(ahead.better(behind), ahead);
        // A guest may say anything.
        for nonsense in [i64::MIN, i64::MAX] {
            let _ = sample(0, nonsense, nonsense, 1).correction();
            let _ = sample(i64::MAX, nonsense, -nonsense.saturating_add(1), i64::MIN).correction();
        }
    }

    #[tokio::test]
    async fn it_ticks_again_and_again_and_when_the_clock_is_set() {
        let short = Ticker::new(Duration::from_millis(20)).unwrap();
        for _ in 0..2 {
            let tick = timeout(Duration::from_secs(10), short.tick()).await.expect("it ticks");
            assert_eq!(tick.unwrap(), Occasion::Regular);
        }
        let long = Ticker::new(Duration::from_secs(3600)).unwrap();
        assert!(timeout(Duration::from_millis(50), long.tick()).await.is_err(), "not before it is time");
        if !set_by_a_nanosecond() {
            eprintln!("skipped: the clock of this machine may not be set");
            return;
        }
        for _ in 0..2 {
            let tick = timeout(Duration::from_secs(10), long.tick()).await.expect("the clock was set");
            assert_eq!(tick.unwrap(), Occasion::HostClockSet);
            assert!(timeout(Duration::from_millis(50), long.tick()).await.is_err());
            assert!(set_by_a_nanosecond());
        }
    }

    /// Sets the clock, by 1 ns; false where that is not allowed.
    fn set_by_a_nanosecond() -> bool {
        // SAFETY: all of the structure's fields are integers, for which zero is a value.
        let mut change: nix::libc::timex = unsafe { std::mem::zeroed() };
        change.modes = nix::libc::ADJ_SETOFFSET | nix::libc::ADJ_NANO;
        change.time.tv_usec = 1;
        // SAFETY: the pointer is to a structure of our own that lives through the call.
        unsafe { nix::libc::adjtimex(&raw mut change) >= 0 }
    }
}
