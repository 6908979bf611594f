//! Measures pods beside runc's, on the same containerd in the same run: their memory at a count, and the time of their
//! starts. It prints figures and passes no judgement.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Parser, Subcommand};
use kuasar_e2e::{
    image::BUSYBOX,
    lab::{Lab, QEMU, RUNC},
    machine::{self, Machine},
    paths::{Paths, RELAY},
    usage::{self, Usage},
};
use serde_json::Value;

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

const IDLE: &[&str] = &["/bin/sleep", "100000"];

fn main() -> ExitCode {
    let args = Args::parse();
    machine::run(|machine| run(args, machine))
}

async fn run(args: Args, machine: Machine) -> Result<ExitCode> {
    let lab = Lab::start(machine, Paths::find()?, &[QEMU]).await?;
    lab.import_images().await?;
    let done = match &args.what {
        What::Memory { count } => memory(&lab, *count).await,
        What::Time { runs, trace } => time(&lab, *runs, trace.as_deref()).await,
    };
    let wrong = lab.stop().await;
    done?;
    if !wrong.is_empty() {
        bail!("ending: {}", wrong.join("; "));
    }
    Ok(ExitCode::SUCCESS)
}

async fn memory(lab: &Lab, count: usize) -> Result<()> {
    println!("memory with {count} pods, a running container in each (Pss, KiB)");
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
        let mut pss = shims.iter().map(|pid| Ok(Usage::of(*pid)?.pss_kib)).collect::<Result<Vec<u64>>>()?;
        pss.sort_unstable();
        let sum: u64 = pss.iter().sum();
        let mean = sum / u64::try_from(pss.len().max(1))?;
        println!(
            "  {program}: {} of them, mean {mean}, least {}, most {}, together {sum}",
            pss.len(),
            pss.first().copied().unwrap_or_default(),
            pss.last().copied().unwrap_or_default()
        );
        for (name, usage) in usage::of_programs(lab).await? {
            println!("  {name}: {usage}");
        }
        for pod in pods {
            pod.remove().await?;
        }
    }
    Ok(())
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
    let spans = spans(&trace)?;
    let waits: Vec<f64> = ids.iter().map(|id| spans.total(id, "wait for guest")).collect::<Result<_>>()?;
    println!("medians of {runs} pods of each kind, alternating");
    let row = |what: &str, of: fn(&Times) -> Duration| {
        let seconds = |all: &[Times]| median(all.iter().map(|times| of(times).as_secs_f64()).collect());
        let (theirs, mine) = (seconds(&runc), seconds(&ours));
        println!("  {what:<34} runc {theirs:.3} s, {QEMU} {mine:.3} s: {:.2} times", mine / theirs);
    };
    row("pod sandbox start", |times| times.pod);
    row("container create and start", |times| times.container);
    let shares = ours.iter().zip(&waits).map(|(times, wait)| 1.0 - wait / times.pod.as_secs_f64());
    let share = median(shares.collect()) * 100.0;
    println!("  of the pod's start, the VM's boot up to READY: {:.3} s", median(waits));
    println!("  the rest (CNI, containerd, daemon):            {share:.0} %");
    println!("where the daemon's part goes (medians, ms; steps may run side by side):");
    for (name, times) in spans.by_name(&ids) {
        println!("  {name:<34} {:8.1}", median(times) * 1000.0);
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    values.get(middle).copied().unwrap_or(f64::NAN)
}

/// Spans of a trace: pod, name, seconds.
struct Spans(Vec<(String, String, f64)>);

impl Spans {
    fn total(&self, pod: &str, name: &str) -> Result<f64> {
        let found: Vec<f64> = self
            .0
            .iter()
            .filter(|(of, what, _)| of == pod && what == name)
            .map(|(_, _, time)| *time)
            .collect();
        if found.is_empty() {
            return Err(anyhow!("the trace has no {name:?} of pod {pod}"));
        }
        Ok(found.iter().sum())
    }

    fn by_name(&self, pods: &[String]) -> BTreeMap<&str, Vec<f64>> {
        let mut all: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for (pod, name, time) in &self.0 {
            if pods.contains(pod) && name != "pod" {
                all.entry(name).or_default().push(*time);
            }
        }
        all
    }
}

/// Reads the daemon's trace, whose last bracket is not there.
fn spans(path: &Path) -> Result<Spans> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let text = format!("{}]", text.trim_end().trim_end_matches(','));
    let events: Vec<Value> = serde_json::from_str(&text).context("parsing the trace")?;
    let mut open: BTreeMap<i64, Vec<(String, String, f64)>> = BTreeMap::new();
    let mut spans = Vec::new();
    for event in &events {
        let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
        let (lane, now) = (event["tid"].as_i64().unwrap_or(0), event["ts"].as_f64().unwrap_or(0.0) / 1e6);
        let stack = open.entry(lane).or_default();
        if text("ph") == "B" {
            let pod = event.pointer("/args/pod").and_then(Value::as_str).map(str::to_owned);
            let pod = pod.or_else(|| stack.last().map(|(pod, ..)| pod.clone())).unwrap_or_default();
            stack.push((pod, text("name"), now));
        } else if let Some(place) = stack.iter().rposition(|(_, name, _)| *name == text("name")) {
            let (pod, name, began) = stack.remove(place);
            spans.push((pod, name, now - began));
        }
    }
    Ok(Spans(spans))
}
