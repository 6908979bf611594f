//! Log lines: time, pod, text, on standard error (the daemon points it at the pod's `log/relay.log`).

use std::{
    fmt,
    io::Write,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use crate::answer::shows;

/// Most bytes that one relay logs in its life, about 30 000 containers: a guest must not be able to fill the
/// disk.
const LIMIT: usize = 4 << 20;
/// Longest text of a line, in bytes. Errors may quote a guest.
const LINE_LIMIT: usize = 1024;

static POD: OnceLock<String> = OnceLock::new();
static WRITTEN: AtomicUsize = AtomicUsize::new(0);

/// Names the pod that later lines belong to.
pub(crate) fn name_pod(pod: &str) {
    let _ = POD.set(pod.to_owned());
}

/// Writes one line. A log that cannot be written is no reason to stop relaying.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let pod = POD.get().map_or("-", String::as_str);
    let line = render(seconds, pod, &text.to_string());
    let before = WRITTEN.fetch_add(line.len(), Ordering::Relaxed);
    if before < LIMIT {
        let last = if before + line.len() < LIMIT { "" } else { "(this log is full)\n" };
        let _ = std::io::stderr().write_all(format!("{line}{last}").as_bytes());
    }
}

fn render(seconds: u64, pod: &str, text: &str) -> String {
    let text: String = text.chars().map(|c| if shows(c) { c } else { ' ' }).take(LINE_LIMIT).collect();
    format!("{} {pod}: {text}\n", utc(seconds))
}

/// Writes a log line.
macro_rules! log {
    ($($arg:tt)*) => { $crate::log::line(format_args!($($arg)*)) };
}
pub(crate) use log;

/// RFC 3339 text of a Unix time, by the usual day count from 1 March of year 0: a calendar crate would be
/// most of this program.
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest % 3600 / 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::{LINE_LIMIT, render, utc};

    #[test]
    fn a_line_stays_one_and_short() {
        assert_eq!(render(0, "p", "a\nb\x1b[31m\u{202e}c"), "1970-01-01T00:00:00Z p: a b [31m c\n");
        assert!(render(0, "p", &"x".repeat(1 << 20)).len() < LINE_LIMIT + 40);
    }

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_704_067_199, "2023-12-31T23:59:59Z"),
            (1_795_444_240, "2026-11-23T14:30:40Z"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }
}
