//! From a list of cases to an exit status: one machine, one lab, all cases, an orderly end.

use std::{future::Future, pin::Pin, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow};
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::runtime::Runtime;

use crate::{
    lab::{self, Containerd, Lab},
    machine::{self, Machine},
    paths::Paths,
};

/// Longest time of one case. Emulation is slow; a hang is longer.
const DEADLINE: Duration = Duration::from_secs(240);

type Body<T> = fn(Arc<T>) -> Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// One test.
pub struct Case<T> {
    /// Its name.
    pub name: &'static str,
    /// The case itself.
    pub body: Body<T>,
    /// Reason why it cannot run here.
    pub skip: Option<String>,
}

/// Makes a [`Case`] of an `async fn(Arc<T>) -> Result<()>`, named like it.
#[macro_export]
macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        vec![$($crate::suite::Case { name: stringify!($name), body: |of| Box::pin($name(of)), skip: None }),*]
    };
}

/// Cases that are left out where something is missing, and say what.
#[must_use]
pub fn unless<T>(missing: Option<String>, cases: Vec<Case<T>>) -> Vec<Case<T>> {
    cases.into_iter().map(|case| Case { skip: missing.clone(), ..case }).collect()
}

/// The runtime handler under test. `KUASAR_HANDLER=runc` is for the lab's own sake: it runs what makes sense
/// without a VM, and tells a fault of the lab from one of ours.
#[must_use]
pub fn handler() -> &'static str {
    if for_runc() { lab::RUNC } else { lab::QEMU }
}

fn for_runc() -> bool {
    std::env::var("KUASAR_HANDLER").is_ok_and(|name| name == lab::RUNC)
}

/// Returns true if there is time for what takes long.
#[must_use]
pub fn is_full() -> bool {
    std::env::var("KUASAR_ENDURANCE").is_ok_and(|value| value == "full")
}

/// Runs cases that share a lab. Returns what `main` returns.
#[must_use]
pub fn with_lab(handlers: &'static [&'static str], cases: Vec<Case<Lab>>) -> ExitCode {
    in_lab(deadline(), Containerd::given(), handlers, cases)
}

/// A usual wait, longer where the cases are given longer: what is slow there is every single answer.
#[must_use]
pub fn patient(usual: Duration) -> Duration {
    stretched(usual, deadline())
}

fn stretched(usual: Duration, given: Duration) -> Duration {
    usual.mul_f64(given.as_secs_f64() / DEADLINE.as_secs_f64()).max(usual)
}

/// [`DEADLINE`], or what a machine that is slower or busier than most is given.
#[must_use]
pub fn deadline() -> Duration {
    let given = std::env::var("KUASAR_CASE_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    given.map_or(DEADLINE, Duration::from_secs)
}

/// [`with_lab`], with so much time for each case, and with this containerd.
#[must_use]
pub fn in_lab(
    deadline: Duration,
    containerd: Containerd,
    handlers: &'static [&'static str],
    cases: Vec<Case<Lab>>,
) -> ExitCode {
    run(deadline, cases, move |runtime, machine| {
        let paths = Paths::find()?;
        runtime.block_on(async {
            let handlers = if for_runc() { &[] } else { handlers };
            let lab = Lab::start_with(machine, paths, handlers, &containerd).await?;
            lab.import_images().await?;
            Ok(lab)
        })
    })
}

/// Runs cases that need programs, but no lab.
#[must_use]
pub fn without_lab<T, F>(cases: Vec<Case<T>>, make: F) -> ExitCode
where
    T: Shared,
    F: FnOnce(Machine) -> Result<T>,
{
    run(self::deadline(), cases, |_, machine| make(machine))
}

/// Runs cases that share something that needs the async runtime to come up.
#[must_use]
pub fn with<T, F>(cases: Vec<Case<T>>, make: F) -> ExitCode
where
    T: Shared,
    F: FnOnce(&Runtime, Machine) -> Result<T>,
{
    run(self::deadline(), cases, make)
}

/// State that cases share, and its end.
pub trait Shared: Send + Sync + Sized + 'static {
    /// Ends it; returns what went wrong.
    fn end(self) -> impl Future<Output = Vec<String>>;
    /// Text that helps to understand a failure.
    fn hints(&self) -> Vec<String> {
        Vec::new()
    }
}

impl Shared for Lab {
    async fn end(self) -> Vec<String> {
        self.stop().await
    }

    fn hints(&self) -> Vec<String> {
        let logs = std::fs::read_dir(self.logs()).into_iter().flatten().flatten();
        logs.filter_map(|entry| Some(self.log(entry.path().file_stem()?.to_str()?))).collect()
    }
}

fn run<T, F>(deadline: Duration, cases: Vec<Case<T>>, make: F) -> ExitCode
where
    T: Shared,
    F: FnOnce(&Runtime, Machine) -> Result<T>,
{
    match try_run(deadline, cases, make) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn try_run<T, F>(deadline: Duration, cases: Vec<Case<T>>, make: F) -> Result<ExitCode>
where
    T: Shared,
    F: FnOnce(&Runtime, Machine) -> Result<T>,
{
    let mut args = Arguments::from_args();
    if args.list {
        let trials = cases.iter().map(|case| Trial::test(case.name, || Ok(()))).collect();
        return Ok(libtest_mimic::run(&args, trials).exit_code());
    }
    // Pods under emulation share two cores; more at once only makes every one of them slow.
    args.test_threads.get_or_insert(1);
    let machine = match machine::enter()? {
        Ok(machine) => machine,
        Err(code) => return Ok(code),
    };
    let runtime = Arc::new(Runtime::new().context("starting the async runtime")?);
    let shared = Arc::new(make(&runtime, machine)?);
    for case in &cases {
        if let Some(why) = &case.skip {
            println!("skipped: {}: {why}", case.name);
        }
    }
    let trials = cases.into_iter().map(|case| trial(case, deadline, &runtime, &shared)).collect();
    let conclusion = libtest_mimic::run(&args, trials);
    if conclusion.has_failed() {
        for hint in shared.hints() {
            eprintln!("{hint}\n");
        }
    }
    let shared = Arc::into_inner(shared).context("a case kept the lab after its end")?;
    let wrong = runtime.block_on(shared.end());
    for line in &wrong {
        eprintln!("while ending: {line}");
    }
    if conclusion.has_failed() || !wrong.is_empty() { Ok(ExitCode::from(101)) } else { Ok(ExitCode::SUCCESS) }
}

fn trial<T: Shared>(case: Case<T>, deadline: Duration, runtime: &Arc<Runtime>, shared: &Arc<T>) -> Trial {
    let (runtime, shared) = (Arc::clone(runtime), Arc::clone(shared));
    let (name, body) = (case.name, case.body);
    Trial::test(case.name, move || {
        let outcome =
            runtime.block_on(async { tokio::time::timeout(deadline, tokio::spawn(body(shared))).await });
        let outcome = outcome.map_err(|_| anyhow!("not done after {deadline:?}"));
        match outcome.and_then(|joined| joined.map_err(|e| anyhow!("it panicked: {e}"))?) {
            Ok(()) => Ok(()),
            Err(e) => {
                // At once: the last of the cases may be an hour away.
                eprintln!("\n{name}: {e:#}");
                Err(Failed::from(format!("{e:#}")))
            }
        }
    })
    .with_ignored_flag(case.skip.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_longer_by_as_much_as_cases_and_never_shorter() {
        let usual = Duration::from_secs(30);
        assert_eq!(stretched(usual, DEADLINE), usual);
        assert_eq!(stretched(usual, DEADLINE * 4), Duration::from_secs(120));
        assert_eq!(stretched(usual, Duration::from_secs(60)), usual);
    }
}
