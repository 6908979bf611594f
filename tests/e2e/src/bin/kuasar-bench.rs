//! Measures pods beside runc's, on the same containerd in the same run: their memory at a count, and the time
//! of their starts. It prints figures; with `--judge` it compares memory with its goals, too.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand};
use kuasar_e2e::{
    image::BUSYBOX,
    lab::{Lab, QEMU, RUNC},
    machine::{self, Machine},
    paths::{Paths, RELAY},
    trace::Spans,
    usage::{self, Usage},
};

/// Measures pods beside runc's.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Memory of relays, daemon and containerd with so many pods, each with a running container; and of
    /// runc's shims.
    Memory {
        /// Pods.
        #[arg(default_value_t = 50)]
        count: usize,
        /// Fail when a relay takes more than 512 KiB or the daemon more than 15 MB. The goals are of programs
        /// built for release, and of 50 pods: with fewer, of a relay's own program no more is counted than
        /// would be its share of 50.
        #[arg(long)]
        judge: bool,
    },
    /// Time of a pod's start and of its first container's.
    Time {
        /// Pods of each kind.
        #[arg(default_value_t = 10)]
        runs: usize,
        /// Path to which to copy the daemon's trace.
        #[arg(long)]
        trace: Option<PathBuf>,
    },
}

/// Pods for which the goals are meant.
const GOALS_OF: usize = 50;
/// Goals, in KiB of Pss: of each relay, and of the daemon (15 MB).
const RELAY_GOAL: u64 = 512;
const DAEMON_GOAL: u64 = 15_000_000 / 1024;

const IDLE: &[&str] = &["/bin/sleep", "100000"];

fn main() -> ExitCode {
    let args = Args::parse();
    machine::run(|machine| run(args, machine))
}

async fn run(args: Args, machine: Machine) -> Result<ExitCode> {
    let lab = Lab::start(machine, Paths::find()?, &[QEMU]).await?;
    lab.import_images().await?;
    let done = match &args.what {
        What::Memory { count, judge } => memory(&lab, *count, *judge).await,
        What::Time { runs, trace } => time(&lab, *runs, trace.as_deref()).await,
    };
    let wrong = lab.stop().await;
    done?;
    if !wrong.is_empty() {
        bail!("ending: {}", wrong.join("; "));
    }
    Ok(ExitCode::SUCCESS)
}

async fn memory(lab: &Lab, count: usize, judge: bool) -> Result<()> {
    println!("memory with {count} pods, a running container in each (Pss, KiB)");
    let mut wrong = Vec::new();
    for (handler, program, words) in
        [(QEMU, RELAY, &["serve"][..]), (RUNC, "containerd-shim-runc-v2", &["-id"][..])]
    {
        let mut pods = Vec::new();
        let begun = Instant::now();
        for number in 0..count {
            let pod = lab.pod("memory", handler).await.with_context(|| format!("pod {number} of {count}"))?;
            pod.container("idle", BUSYBOX, IDLE).await?;
            pods.push(pod);
        }
        println!("\n{handler}: {count} pods in {:.1?}", begun.elapsed());
        tokio::time::sleep(Duration::from_secs(5)).await;
        let shims = usage::processes(program, words)?;
        ensure!(shims.len() == count, "{count} pods have {} of {program}", shims.len());
        let usages = shims.iter().map(|pid| Usage::of(*pid)).collect::<Result<Vec<_>>>()?;
        let mut pss: Vec<u64> = usages.iter().map(|usage| usage.pss_kib).collect();
        pss.sort_unstable();
        let (sum, most) = (pss.iter().sum::<u64>(), pss.last().copied().unwrap_or_default());
        let mean = sum / u64::try_from(pss.len().max(1))?;
        println!(
            "  {program}: {} of them, mean {mean}, least {}, most {most}, together {sum}",
            pss.len(),
            pss.first().copied().unwrap_or_default(),
        );
        let programs = usage::of_programs(lab).await?;
        for (name, usage) in &programs {
            println!("  {name}: {usage}");
        }
        if handler == QEMU {
            let daemon = programs.get(QEMU).context("the daemon is not running")?.pss_kib;
            let most = usages.iter().map(|usage| among_fifty(usage, count)).max().unwrap_or_default();
            println!("  of {GOALS_OF} relays, one would take at most {most}");
            wrong = beyond_goals(most, daemon);
        }
        for pod in pods {
            pod.remove().await?;
        }
    }
    for line in &wrong {
        println!("{line}");
    }
    ensure!(!judge || wrong.is_empty(), "with {count} pods: {}", wrong.join("; "));
    Ok(())
}

/// Memory of a relay whose program fifty share, computed from that of one whose program fewer share: pages of
/// no file are its own, and of the program's it has its part.
fn among_fifty(usage: &Usage, count: usize) -> u64 {
    let fifty = u64::try_from(GOALS_OF).unwrap_or(u64::MAX);
    let sharing = u64::try_from(count).unwrap_or(fifty).min(fifty);
    usage.anonymous_kib + usage.pss_kib.saturating_sub(usage.anonymous_kib) * sharing / fifty
}

/// Returns a line for each program that takes more than its goal.
fn beyond_goals(relay: u64, daemon: u64) -> Vec<String> {
    let judged = [("a relay", relay, RELAY_GOAL), ("the daemon", daemon, DAEMON_GOAL)];
    let beyond = judged.into_iter().filter(|(_, has, goal)| has > goal);
    beyond.map(|(what, has, goal)| format!("{what} takes {has} KiB, more than its goal of {goal}")).collect()
}

/// Times of one pod.
struct Times {
    pod: Duration,
    container: Duration,
}

async fn one(lab: &Lab, handler: &str) -> Result<(String, Times)> {
    let begun = Instant::now();
    let pod = lab.pod("time", handler).await?;
    let pod_time = begun.elapsed();
    let begun = Instant::now();
    pod.container("idle", BUSYBOX, IDLE).await?;
    let container = begun.elapsed();
    let id = pod.id.clone();
    pod.remove().await?;
    Ok((id, Times { pod: pod_time, container }))
}

async fn time(lab: &Lab, runs: usize, copy: Option<&Path>) -> Result<()> {
    // The first of each finds cold caches.
    for handler in [RUNC, QEMU] {
        one(lab, handler).await?;
    }
    let (mut runc, mut ours, mut ids) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        // Alternating, so that what else the machine does hits both.
        runc.push(one(lab, RUNC).await?.1);
        let (id, times) = one(lab, QEMU).await?;
        ours.push(times);
        ids.push(id);
    }
    let trace = lab.trace(QEMU);
    if let Some(copy) = copy {
        std::fs::copy(&trace, copy).with_context(|| format!("copying the trace to {}", copy.display()))?;
    }
    let spans = Spans::read(&trace)?;
    println!("medians of {runs} pods of each kind, alternating");
    let row = |what: &str, of: fn(&Times) -> Duration| {
        let seconds = |all: &[Times]| median(all.iter().map(|times| of(times).as_secs_f64()).collect());
        let (theirs, mine) = (seconds(&runc), seconds(&ours));
        println!("  {what:<34} runc {theirs:.3} s, {QEMU} {mine:.3} s: {:.2} times", mine / theirs);
    };
    row("pod sandbox start", |times| times.pod);
    row("container create and start", |times| times.container);
    shares(&spans, &ours, &runc, &ids)?;
    println!("where the daemon's part goes (medians, ms; steps may run side by side):");
    for (name, times) in spans.by_name(&ids) {
        println!("  {name:<34} {:8.1}", median(times) * 1000.0);
    }
    Ok(())
}

/// Prints which part of the time is whose. Of a pod's start, ours is all but the VMM's and the guest
/// kernel's: all outside of the wait for READY. In a container's, where neither is started, what is not ours
/// is containerd, which cannot take more than it takes with runc, and the guest's runc, which no trace tells
/// from the agent.
fn shares(spans: &Spans, ours: &[Times], theirs: &[Times], ids: &[String]) -> Result<()> {
    let seconds = |all: &[Times], of: fn(&Times) -> Duration| -> Vec<f64> {
        all.iter().map(|times| of(times).as_secs_f64()).collect()
    };
    let (pods, containers) = (seconds(ours, |times| times.pod), seconds(ours, |times| times.container));
    let totals = |name: &str| ids.iter().map(|id| spans.total(id, name)).collect::<Result<Vec<f64>>>();
    let (boot, setup, prepare) =
        (totals("wait for guest")?, totals("set guest up")?, totals("prepare container")?);
    let together = without(&pods, &boot);
    println!("of the pod's start:");
    line("not ours: VMM and guest kernel up to READY (its agent's start in it)", &boot, &pods);
    line("ours: the rest (with it the start of the VMM's processes)", &together, &pods);
    line("  of it in the guest: what the agent sets up after READY", &setup, &pods);
    line("  of it on the host: daemon, relay, and CNI and containerd", &without(&together, &setup), &pods);
    println!("of the container's create and start:");
    let with_runc = vec![median(seconds(theirs, |times| times.container)); containers.len()];
    let rest = without(&without(&containers, &prepare), &with_runc);
    line("not ours: containerd, at most what it takes with runc and its shim", &with_runc, &containers);
    line("ours, on the host: the daemon's preparation of it", &prepare, &containers);
    line("the rest: relay, and in the guest the agent (ours) and runc (not ours)", &rest, &containers);
    Ok(())
}

/// Prints a part's median, and its share of the whole.
fn line(what: &str, parts: &[f64], whole: &[f64]) {
    let shares = parts.iter().zip(whole).map(|(part, whole)| part / whole * 100.0);
    println!("  {what:<70} {:.3} s, {:.0} %", median(parts.to_vec()), median(shares.collect()));
}

fn without(whole: &[f64], parts: &[f64]) -> Vec<f64> {
    whole.iter().zip(parts).map(|(whole, part)| whole - part).collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    values.get(middle).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_shared_by_as_many_as_there_are() {
        let usage = Usage { pss_kib: 600, anonymous_kib: 200, ..Usage::default() };
        let at = |count| among_fifty(&usage, count);
        assert_eq!((at(5), at(50), at(100)), (240, 600, 600));
    }

    #[test]
    fn what_takes_more_than_its_goal_is_named() {
        assert!(beyond_goals(512, 14_648).is_empty());
        assert_eq!(beyond_goals(513, 1), ["a relay takes 513 KiB, more than its goal of 512"]);
        assert_eq!(beyond_goals(1, 14_649), ["the daemon takes 14649 KiB, more than its goal of 14648"]);
    }
}
