//! Measures pods beside runc's, on the same containerd in the same run: their memory at a count, and the time of their
//! starts. It prints figures; with `--judge` it compares memory with its goals, too.

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
    /// Memory of relays, daemon and containerd with so many pods, each with a running container; and of runc's shims.
    Memory {
        /// Pods.
        #[arg(default_value_t = 50)]
        count: usize,
        /// Fail when a relay takes more than 512 KiB or the daemon more than 15 MB. They are goals of programs built for release.
        #[arg(long)]
        judge: bool,
    },
    /// Time of a pod's start and of its first container's.
    Time {
        /// Pods of each kind.
        #[arg(default_value_t = 10)]
        runs: usize,
        /// Where to copy the daemon's trace.
        #[arg(long)]
        trace: Option<PathBuf>,
    },
}

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
        let mut pss = shims.iter().map(|pid| Ok(Usage::of(*pid)?.pss_kib)).collect::<Result<Vec<u64>>>()?;
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

/// What takes more than it should.
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
    shares(&spans, &ours, &ids)?;
    println!("where the daemon's part goes (medians, ms; steps may run side by side):");
    for (name, times) in spans.by_name(&ids) {
        println!("  {name:<34} {:8.1}", median(times) * 1000.0);
    }
    Ok(())
}

/// Prints which part of the time is whose. Of a pod's start, ours is all but the VMM's and the guest kernel's; of a
/// container's, where neither is started, it is told from what runc needs in the guest, which is no program of ours.
fn shares(spans: &Spans, ours: &[Times], ids: &[String]) -> Result<()> {
    let line = |what: &str, parts: Vec<f64>, of: fn(&Times) -> Duration| {
        let shares = parts.iter().zip(ours).map(|(part, times)| part / of(times).as_secs_f64());
        let share = median(shares.collect()) * 100.0;
        println!("  {what:<72} {:.3} s, {share:.0} %", median(parts));
    };
    let totals = |name: &str| ids.iter().map(|id| spans.total(id, name)).collect::<Result<Vec<f64>>>();
    let left = |parts: &[&[f64]], of: fn(&Times) -> Duration| -> Vec<f64> {
        let known = |index: usize| parts.iter().filter_map(|part| part.get(index)).sum::<f64>();
        ours.iter().enumerate().map(|(index, times)| of(times).as_secs_f64() - known(index)).collect()
    };
    let (boot, setup) = (totals("wait for guest")?, totals("set guest up")?);
    println!("of the pod's start:");
    let host = left(&[&boot, &setup], |times| times.pod);
    line("not ours: VMM and guest kernel, up to READY (its agent's start in it)", boot.clone(), |times| {
        times.pod
    });
    line("ours, in the guest: what the agent sets up after READY", setup, |times| times.pod);
    line("ours, on the host: daemon and relay; containerd and CNI are in it", host, |times| times.pod);
    line("ours together: the start but for what is not ours", left(&[&boot], |times| times.pod), |times| {
        times.pod
    });
    let prepare = totals("prepare container")?;
    println!("of the container's create and start:");
    let rest = left(&[&prepare], |times| times.container);
    line("ours, on the host: the daemon's preparation of it", prepare, |times| times.container);
    line("the rest: containerd, relay, and in the guest agent and runc", rest, |times| times.container);
    Ok(())
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
    fn what_takes_more_than_its_goal_is_named() {
        assert!(beyond_goals(512, 14_648).is_empty());
        assert_eq!(beyond_goals(513, 1), ["a relay takes 513 KiB, more than its goal of 512"]);
        assert_eq!(beyond_goals(1, 14_649), ["the daemon takes 14649 KiB, more than its goal of 14648"]);
    }
}
