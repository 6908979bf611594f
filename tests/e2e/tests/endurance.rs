//! Use without end: many execs, many pods one after another and many at once, and nothing of it may stay: no
//! descriptors, memory, processes, mounts, links, cgroups.
//!
//! `KUASAR_ENDURANCE=full` takes the numbers that are meant; without it, they are for every day.

use std::{collections::BTreeMap, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    cases,
    image::BUSYBOX,
    lab::{Containerd, Lab, QEMU, QEMU_STREAM},
    leaks::Snapshot,
    paths::RELAY,
    suite::{self, patient},
    usage::{self, Usage},
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

const IDLE: &[&str] = &["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done"];
const SOON: Duration = Duration::from_secs(60);
/// Memory that a program may take more of without being a leak: caches, and what an allocator keeps. Counted
/// is what is of no file: the share of a program's own pages grows when another process of the same program
/// ends.
const RELAY_ROOM_KIB: u64 = 128;
const DAEMON_ROOM_KIB: u64 = 1024;
/// containerd is written in Go, whose heap takes its time to reach its size: what it takes in the first half
/// of many execs is printed only, and in the second half it may take this, or a half of that. A leak takes as
/// much in both.
const CONTAINERD_ROOM_KIB: u64 = 4096;
/// Threads likewise: those of a runtime's pool come with work, and end without it; Go's never end. A relay
/// has one thread.
const DAEMON_THREAD_ROOM: usize = 4;
const CONTAINERD_THREAD_ROOM: usize = 8;
/// Descriptors likewise: a connection that is just being closed.
const DESCRIPTOR_ROOM: usize = 4;
/// Execs between two prints of what is held.
const SHOWN_EVERY: usize = 100;

fn main() -> ExitCode {
    let deadline = Duration::from_secs(if suite::is_full() { 2 * 3600 } else { 900 });
    suite::in_lab(
        deadline,
        Containerd::given(),
        &[QEMU],
        cases![
            many_execs_in_one_container,
            many_execs_over_streams,
            many_pods_one_after_another,
            many_pods_at_once,
        ],
    )
}

fn number(every_day: usize, full: usize) -> usize {
    if suite::is_full() { full } else { every_day }
}

async fn many_execs_in_one_container(lab: Arc<Lab>) -> Result<()> {
    execs(&lab, QEMU, number(50, 1000)).await
}

async fn many_execs_over_streams(lab: Arc<Lab>) -> Result<()> {
    execs(&lab, QEMU_STREAM, number(30, 1000)).await
}

async fn execs(lab: &Lab, handler: &str, count: usize) -> Result<()> {
    let pod = lab.pod("execs", handler).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    let relays = usage::processes(RELAY, &["serve", &pod.id])?;
    let relay = *relays.first().context("there is no relay")?;
    let round = async |from: usize, to: usize| -> Result<()> {
        for number in from..to {
            let word = number.to_string();
            let out = lab.cri.exec(&id, &["echo", &word]).await?;
            ensure!(out.code == 0 && out.stdout.trim() == word, "exec {number} gave {out:?}");
            if number % SHOWN_EVERY == 0 {
                show(lab, relay, number).await?;
            }
        }
        Ok(())
    };
    round(0, 20).await?;
    let before = Held::now(lab, Some(relay)).await?;
    let begun = Instant::now();
    round(20, 20 + count / 2).await?;
    let half = Held::now(lab, Some(relay)).await?;
    round(20 + count / 2, 20 + count).await?;
    let took = begun.elapsed();
    println!("{count} execs with {handler} took {took:.1?}");
    let of_containerd = half.grown_since(&before, "containerd");
    let after = before.compare(lab, Some(relay)).await?;
    second_half(of_containerd, after.grown_since(&half, "containerd"))?;
    pod.remove().await
}

/// Fails if containerd took as much memory (KiB) for the second half of the execs as for the first.
fn second_half(first: u64, second: u64) -> Result<()> {
    println!("  containerd took {first} KiB for the first half, {second} KiB for the second");
    let room = CONTAINERD_ROOM_KIB.max(first / 2);
    ensure!(
        second <= room,
        "containerd takes {second} KiB more after the second half, of {room} that it may"
    );
    Ok(())
}

/// Prints what everything holds, so that growth can be told from a step.
async fn show(lab: &Lab, relay: u32, number: usize) -> Result<()> {
    for (name, usage) in usage::of_programs(lab).await? {
        println!("  exec {number}: {name}: {usage}");
    }
    println!("  exec {number}: relay: {}", Usage::of(relay)?);
    Ok(())
}

/// One pod's whole life.
async fn live(lab: &Lab, name: &str) -> Result<()> {
    let pod = lab.pod(name, QEMU).await?;
    let id = pod.container("says", BUSYBOX, &["/bin/sh", "-c", "echo hello; exit 3"]).await?;
    let code = lab.cri.ended(&id, SOON).await?.exit_code;
    ensure!(code == 3, "the container ended with {code}");
    let stdout = pod.output("says")?.0;
    ensure!(stdout == b"hello\n", "it logged {:?}", String::from_utf8_lossy(&stdout));
    lab.forget(pod).await
}

async fn many_pods_one_after_another(lab: Arc<Lab>) -> Result<()> {
    let count = number(5, 100);
    for _ in 0..2 {
        live(&lab, "warm").await?;
    }
    let before = Held::now(&lab, None).await?;
    let said = complaints(&lab)?.len();
    let begun = Instant::now();
    for number in 0..count {
        live(&lab, "one").await.with_context(|| format!("pod {number}"))?;
    }
    println!("{count} pods one after another took {:.1?}", begun.elapsed());
    let complaints = complaints(&lab)?.split_off(said);
    ensure!(complaints.is_empty(), "the daemon complains of orderly pods:\n{}", complaints.join("\n"));
    before.compare(&lab, None).await.map(drop)
}

/// Warnings and errors of the daemon.
fn complaints(lab: &Lab) -> Result<Vec<String>> {
    let path = lab.logs().join(format!("{QEMU}.log"));
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let is_complaint = |line: &&str| line.contains("WARN") || line.contains("ERROR");
    Ok(text.lines().filter(is_complaint).map(str::to_owned).collect())
}

async fn many_pods_at_once(lab: Arc<Lab>) -> Result<()> {
    let count = number(4, 20);
    // An allocator keeps much of the most that it ever gave: as many once before, then what stays is a leak.
    at_once(&lab, count).await?;
    let before = Held::now(&lab, None).await?;
    let begun = Instant::now();
    at_once(&lab, count).await?;
    println!("{count} pods at once took {:.1?}", begun.elapsed());
    before.compare(&lab, None).await.map(drop)
}

async fn at_once(lab: &Arc<Lab>, count: usize) -> Result<()> {
    let mut all = JoinSet::new();
    for number in 0..count {
        let lab = Arc::clone(lab);
        all.spawn(async move { live(&lab, "many").await.with_context(|| format!("pod {number}")) });
    }
    while let Some(done) = all.join_next().await {
        done??;
    }
    Ok(())
}

/// Things that programs and machine hold.
struct Held {
    machine: Snapshot,
    programs: BTreeMap<String, Usage>,
}

impl Held {
    async fn now(lab: &Lab, relay: Option<u32>) -> Result<Self> {
        // What was just closed is gone a moment later.
        sleep(Duration::from_secs(2)).await;
        let mut programs = usage::of_programs(lab).await?;
        if let Some(relay) = relay {
            programs.insert("relay".to_owned(), Usage::of(relay)?);
        }
        Ok(Self { machine: Snapshot::take(&lab.machine.root)?, programs })
    }

    /// Memory, in KiB, that a program has more of than it had.
    fn grown_since(&self, before: &Self, program: &str) -> u64 {
        let of = |held: &Self| held.programs.get(program).map_or(0, |usage| usage.anonymous_kib);
        of(self).saturating_sub(of(before))
    }

    /// Fails if there is more of anything; returns what there is.
    async fn compare(self, lab: &Lab, relay: Option<u32>) -> Result<Self> {
        // The end of a process takes its time to be seen everywhere.
        let end = Instant::now() + patient(Duration::from_secs(15));
        let after = loop {
            let after = Self::now(lab, relay).await?;
            if after.machine.since(&self.machine).is_empty() || Instant::now() > end {
                break after;
            }
        };
        for (name, after) in &after.programs {
            let before = self.programs.get(name).copied().unwrap_or_default();
            println!("  {name}: {before} before, {after} after");
            let more = after.descriptors.saturating_sub(before.descriptors);
            ensure!(more <= DESCRIPTOR_ROOM, "{name} holds {more} descriptors more");
            let more = after.anonymous_kib.saturating_sub(before.anonymous_kib);
            let (room, threads) = match name.as_str() {
                "relay" => (RELAY_ROOM_KIB, 0),
                // Of its memory: see `second_half`.
                "containerd" => (u64::MAX, CONTAINERD_THREAD_ROOM),
                _ => (DAEMON_ROOM_KIB, DAEMON_THREAD_ROOM),
            };
            ensure!(more <= room, "{name} takes {more} KiB more that are of no file");
            let more = after.threads.saturating_sub(before.threads);
            ensure!(more <= threads, "{name} has {more} threads more");
        }
        let left = after.machine.since(&self.machine);
        ensure!(left.is_empty(), "left behind:\n{}", left.join("\n"));
        Ok(after)
    }
}
