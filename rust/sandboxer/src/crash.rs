//! Steps of the daemon's work at which tests end it, or make it fail; in releases, nothing.
//!
//! A build for tests, or with the feature `failpoints`, reads `KUASAR_FAILPOINT`: `STEP=kill` ends the
//! process there by SIGKILL, `STEP=NUMBER` makes the step fail with this number of an error (28: no space
//! left), and `STEP#N=…` does so the Nth time.

#[cfg(any(test, feature = "failpoints"))]
pub(crate) use self::armed::step;

/// The daemon has got as far as this step.
///
/// # Errors
/// Never.
#[cfg(not(any(test, feature = "failpoints")))]
pub(crate) const fn step(_: &str) -> std::io::Result<()> {
    Ok(())
}

#[cfg(any(test, feature = "failpoints"))]
pub(crate) mod armed {
    use std::{
        io,
        sync::{
            OnceLock,
            atomic::{AtomicU32, Ordering},
        },
    };

    use rustix::process::{Signal, getpid, kill_process};

    /// Environment variable that names a step, and the failure to make there.
    pub(crate) const VARIABLE: &str = "KUASAR_FAILPOINT";

    #[derive(Debug, PartialEq, Eq)]
    struct Point {
        step: String,
        /// Number of the step's visit that fails, from 1 on.
        time: u32,
        /// The error; `None`: the end.
        errno: Option<i32>,
    }

    static POINT: OnceLock<Option<Point>> = OnceLock::new();
    static TIMES: AtomicU32 = AtomicU32::new(0);

    fn parse(text: &str) -> Option<Point> {
        let (step, what) = text.split_once('=')?;
        let (step, time) = match step.split_once('#') {
            Some((step, time)) => (step, time.parse().ok()?),
            None => (step, 1),
        };
        let errno = if what == "kill" { None } else { Some(what.parse().ok()?) };
        Some(Point { step: step.to_owned(), time, errno })
    }

    /// The daemon has got as far as this step.
    ///
    /// # Errors
    /// When that is wanted.
    pub(crate) fn step(name: &str) -> io::Result<()> {
        let point = POINT.get_or_init(|| parse(&std::env::var(VARIABLE).ok()?));
        let Some(point) = point.as_ref().filter(|point| point.step == name) else { return Ok(()) };
        if TIMES.fetch_add(1, Ordering::Relaxed).saturating_add(1) != point.time {
            return Ok(());
        }
        match point.errno {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => {
                // It does not return: the signal is for this process, and cannot be caught.
                let _ = kill_process(getpid(), Signal::KILL);
                Err(io::Error::other("the process outlives its end"))
            }
        }
    }

    /// Returns true if the daemon has reached that visit of the step.
    #[cfg(test)]
    pub(crate) fn was_reached() -> bool {
        let times = TIMES.load(Ordering::Relaxed);
        POINT.get().is_some_and(|point| point.as_ref().is_some_and(|point| times >= point.time))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn points_are_named_with_what_happens_there() {
            let point = |step: &str, time, errno| Some(Point { step: step.into(), time, errno });
            assert_eq!(parse("start: VM=kill"), point("start: VM", 1, None));
            assert_eq!(parse("record#3=28"), point("record", 3, Some(28)));
            for nonsense in ["", "step", "step=maybe", "step#x=kill"] {
                assert_eq!(parse(nonsense), None);
            }
        }
    }
}
