//! The judge: the CRI validation suite against a runtime handler, and its verdict against
//! `docs/cri-conformance.md`. One case a spec. `KUASAR_BLESS=1` writes what came out into the table instead
//! of comparing.

mod suite;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use kuasar_e2e::{
    conformance::{Outcome, State, Table, Verdict},
    lab::{self, Containerd, Lab},
    machine::{self, Machine},
    paths::Paths,
};
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::runtime::Runtime;

use suite::{Programs, Registry, handler};

fn main() -> ExitCode {
    match judge() {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// More specs than these that fail have a common reason, which running each again would not find.
const AGAIN: usize = 10;
/// Times that each of them is. A fault of the runtime fails every time.
const ALONE: usize = 3;

fn document() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/cri-conformance.md")
}

fn judge() -> Result<ExitCode> {
    let args = Arguments::from_args();
    if args.list {
        let specs = Table::read(&document())?;
        let trials = specs.specs().map(|spec| Trial::test(spec, || Ok(()))).collect();
        return Ok(libtest_mimic::run(&args, trials).exit_code());
    }
    let machine = match machine::enter()? {
        Ok(machine) => machine,
        Err(code) => return Ok(code),
    };
    let runtime = Runtime::new().context("starting the async runtime")?;
    let paths = Paths::find()?;
    let programs = Programs::find(&paths)?;
    let column = programs.column(handler());
    let judged = (Table::read(&document())?, column.as_str());
    let (outcomes, wrong) =
        runtime.block_on(run(machine, paths, &programs, args.filter.as_deref(), judged))?;
    let all = args.filter.is_none() && suite::focus().is_none();
    if std::env::var_os("KUASAR_BLESS").is_some() {
        let mut table = Table::read(&document())?;
        table.bless(&column, &outcomes, all);
        table.write(&document())?;
    }
    let table = Table::read(&document())?;
    let mut trials: Vec<_> = outcomes.iter().map(|outcome| trial(&table, &column, outcome)).collect();
    if all {
        let missing = table.missing(&column, &outcomes);
        trials.extend(missing.into_iter().map(|spec| failed(&spec, "the table has it, the suite has not")));
    }
    let args = Arguments { filter: None, ..args };
    let conclusion = libtest_mimic::run(&args, trials);
    say_times(&outcomes);
    for line in &wrong {
        eprintln!("while ending: {line}");
    }
    let good = !conclusion.has_failed() && wrong.is_empty();
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::from(101) })
}

/// Starts everything, runs the suite, ends everything. Returns the outcomes, and what went wrong at the end.
async fn run(
    machine: Machine,
    paths: Paths,
    programs: &Programs,
    filter: Option<&str>,
    judged: (Table, &str),
) -> Result<(Vec<Outcome>, Vec<String>)> {
    let (registries, tmp) = (machine.root.join("registries"), machine.root.join("tmp"));
    suite::write_registries(&registries)?;
    let registry = Registry::start(programs, &machine).await?;
    let program = programs.containerd.clone();
    let settings = Containerd { program, registries: Some(registries), nri: true, ..Containerd::default() };
    let handlers: &[&str] = if handler() == lab::RUNC { &[] } else { &[lab::QEMU] };
    let lab = Lab::start_with(machine, paths, handlers, &settings).await?;
    lab.import_images().await?;
    let outcomes = match suite::run(&lab, programs, &registry, filter).await {
        Ok(outcomes) => again(&lab, programs, &registry, outcomes, &judged).await,
        Err(e) => Err(e),
    };
    let forgotten = if handler() == lab::RUNC { suite::forget_containers(&lab).await } else { Ok(()) };
    let mut wrong = lab.stop().await;
    wrong.extend(forgotten.err().map(|e| format!("{e:#}")));
    wrong.extend(registry.end().await.err().map(|e| format!("{e:#}")));
    suite::clean_up(&tmp);
    let outcomes = outcomes?;
    if outcomes.is_empty() {
        bail!("no spec was run: nothing matches");
    }
    Ok((outcomes, wrong))
}

/// Runs what came out wrong again, alone, and takes that for the result: some specs of the suite give the
/// machine less time than a busy one needs (why: in the document).
async fn again(
    lab: &Lab,
    programs: &Programs,
    registry: &Registry,
    mut outcomes: Vec<Outcome>,
    (table, column): &(Table, &str),
) -> Result<Vec<Outcome>> {
    let doubtful: Vec<_> = outcomes.iter_mut().filter(|outcome| table.doubts(column, outcome)).collect();
    if doubtful.len() > AGAIN {
        println!("{} specs fail, too many to run each again alone", doubtful.len());
        return Ok(outcomes);
    }
    for outcome in doubtful {
        for times in 1..=ALONE {
            let Some(alone) = suite::run_alone(lab, programs, registry, &outcome.spec).await? else {
                println!("failed {times} times, then not found when run alone: {}", outcome.spec);
                break;
            };
            let past = past(&alone);
            let said = std::mem::replace(outcome, alone).message;
            if !table.doubts(column, outcome) {
                println!("failed {times} times, then {past} alone: {}\n  it had said: {said}", outcome.spec);
                break;
            }
            if times == ALONE {
                println!("failed {} times, the last {ALONE} alone: {}", ALONE + 1, outcome.spec);
            }
        }
    }
    Ok(outcomes)
}

fn past(outcome: &Outcome) -> &'static str {
    match outcome.state {
        State::Passes => "passed",
        State::Fails => "failed as expected",
        State::Skipped => "was skipped",
    }
}

fn trial(table: &Table, column: &str, outcome: &Outcome) -> Trial {
    let verdict = table.judge(column, outcome);
    let spec = outcome.spec.clone();
    match verdict {
        Verdict::AsExpected => Trial::test(spec, || Ok(())),
        Verdict::Wrong(why) => {
            let why = format!("{why}\n{}", outcome.message);
            Trial::test(spec, move || Err(Failed::from(why)))
        }
    }
}

fn failed(spec: &str, why: &'static str) -> Trial {
    Trial::test(spec, move || Err(Failed::from(why)))
}

fn say_times(outcomes: &[Outcome]) {
    let mut states = BTreeMap::<&str, usize>::new();
    for outcome in outcomes {
        *states.entry(outcome.state.word()).or_default() += 1;
    }
    let seconds: f64 = outcomes.iter().map(|outcome| outcome.seconds).sum();
    println!("{} specs in {seconds:.0} s: {states:?}", outcomes.len());
    let mut slowest: Vec<_> = outcomes.iter().collect();
    slowest.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    for outcome in slowest.iter().take(5) {
        println!("  {:5.1} s  {}", outcome.seconds, outcome.spec);
    }
}
