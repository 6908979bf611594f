//! Calls of containerd's Task API besides those that run a container.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    cri::LinuxContainerResources,
    image::BUSYBOX,
    lab::{self, Lab, QEMU, run},
    suite::handler,
    trace::Spans,
};
use tokio::time::sleep;

use super::{IDLE, restart::SOON};

const COUNTER: &[&str] = &["/bin/sh", "-c", "i=0; while :; do i=$((i+1)); echo $i > /count; sleep 0.1; done"];

async fn ctr(lab: &Lab, words: &[&str]) -> Result<String> {
    Ok(String::from_utf8_lossy(&run(lab.ctr().args(words)).await?).into_owned())
}

pub(crate) async fn pause_resume_figures_pids_and_limits(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("task", handler()).await?;
    let id = pod.container("counts", BUSYBOX, COUNTER).await?;
    let idle = pod.container("idle", BUSYBOX, IDLE).await?;

    let pids = ctr(&lab, &["tasks", "ps", &id]).await?;
    ensure!(pids.lines().count() >= 2, "it has no processes: {pids}");
    let figures = ctr(&lab, &["tasks", "metrics", &id]).await?;
    ensure!(figures.contains("memory"), "its figures are {figures}");

    ctr(&lab, &["tasks", "pause", &id]).await?;
    let state = |list: &str| list.lines().find(|line| line.starts_with(&id)).map(str::to_owned);
    let line = state(&ctr(&lab, &["tasks", "ls"]).await?).context("it is not listed")?;
    ensure!(line.contains("PAUSED"), "a paused container is {line}");
    // What stands still takes no processor time.
    let stats = lab.cri.stats().await?;
    let cpu = |stats: &[kuasar_e2e::cri::ContainerStats]| {
        let of = stats.iter().find(|stats| stats.attributes.as_ref().is_some_and(|a| a.id == id));
        of.and_then(|stats| Some(stats.cpu.as_ref()?.usage_core_nano_seconds.as_ref()?.value))
    };
    let before = cpu(&stats).context("a paused container has no figures")?;
    sleep(Duration::from_secs(2)).await;
    let after = cpu(&lab.cri.stats().await?).context("a paused container has no figures")?;
    ensure!(before == after, "it went on by {} ns of processor time", after.saturating_sub(before));
    ctr(&lab, &["tasks", "resume", &id]).await?;
    sleep(Duration::from_secs(1)).await;
    let later = cpu(&lab.cri.stats().await?).context("it has no figures")?;
    ensure!(later > after, "it does not go on");

    let limit = 48 << 20;
    lab.cri
        .update(&idle, LinuxContainerResources { memory_limit_in_bytes: limit, ..Default::default() })
        .await?;
    let out = lab.cri.exec(&idle, &["cat", "/sys/fs/cgroup/memory.max"]).await?;
    ensure!(out.stdout.trim() == limit.to_string(), "its limit is {out:?}");

    lab.cri.stop(&id, 0).await?;
    lab.cri.stop(&id, 0).await.context("killing what has ended")?;
    pod.remove().await
}

pub(crate) async fn the_daemon_traces_where_time_goes(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("traced", QEMU).await?;
    pod.container("true", BUSYBOX, &["/bin/true"]).await?;
    let id = pod.id.clone();
    pod.remove().await?;
    let spans = Spans::read(&lab.trace(QEMU))?;
    for name in ["start", "prepare network", "start relay", "wait for guest", "prepare container", "stop"] {
        ensure!(spans.of(&id, name).next().is_some(), "it does not tell of {name:?}");
    }
    Ok(())
}

/// Steps that do not depend on each other go on at the same time, whichever is the faster.
pub(crate) async fn independent_steps_go_on_side_by_side(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("beside", QEMU).await?;
    let id = pod.id.clone();
    pod.remove().await?;
    let spans = Spans::read(&lab.trace(QEMU))?;
    let (network, folder) = (spans.only(&id, "prepare network")?, spans.only(&id, "prepare folder")?);
    ensure!(network.is_beside(folder), "one waits for the other: {network:?}, {folder:?}");
    // Over the kernel's vsock there is but one companion.
    if lab::vsock() == "vhost-user" {
        let (vsock, files) =
            (spans.only(&id, "start vhost-device-vsock")?, spans.only(&id, "start virtiofsd")?);
        ensure!(vsock.is_beside(files), "one waits for the other: {vsock:?}, {files:?}");
    }
    Ok(())
}

pub(crate) async fn limits_beyond_the_vm_are_refused(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("beyond", handler()).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    let way_out =
        "of its pod's VM, which cannot grow while it runs; create the pod anew with the limits that it needs";
    let memory =
        |memory_limit_in_bytes| LinuxContainerResources { memory_limit_in_bytes, ..Default::default() };
    let cpu = |cpu_quota| LinuxContainerResources { cpu_quota, cpu_period: 100_000, ..Default::default() };
    let unified = |file: &str, limit: &str| LinuxContainerResources {
        unified: [(file.into(), limit.into())].into(),
        ..Default::default()
    };
    for (limits, why) in [
        (memory(64 << 30), "its memory limit of 65536 MiB is more than the "),
        (unified("memory.max", "64G"), "its memory limit of 65536 MiB is more than the "),
        (unified("cpu.max", "6450000 100000"), "its CPU limit of 64.500 CPUs is more than the "),
        (cpu(6_450_000), "its CPU limit of 64.500 CPUs is more than the "),
    ] {
        let error = lab.cri.update(&id, limits).await.err().context("a limit beyond the VM was taken")?;
        let said = error.message();
        ensure!(said.contains(why) && said.contains(way_out), "it says {said}");
    }
    for limits in [memory(64 << 20), memory(-1), cpu(50_000), cpu(-1), unified("memory.max", "max")] {
        lab.cri.update(&id, limits.clone()).await.with_context(|| format!("setting {limits:?}"))?;
    }

    // What it was made with it keeps, whatever else is set.
    let mut config = lab::container("large", BUSYBOX, IDLE);
    config.linux.get_or_insert_default().resources = Some(memory(64 << 30));
    let large = pod.create(config).await?;
    lab.cri.start(&large).await?;
    let same = LinuxContainerResources { memory_limit_in_bytes: 64 << 30, ..cpu(50_000) };
    lab.cri.update(&large, same).await.context("setting what it was made with")?;
    ensure!(lab.cri.update(&large, memory(65 << 30)).await.is_err(), "it got more than that");
    pod.remove().await
}

/// SIGTERM does not reach what stands still; SIGKILL does.
pub(crate) async fn a_paused_container_can_be_ended(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("still", handler()).await?;
    let (killed, stopped) =
        (pod.container("killed", BUSYBOX, COUNTER).await?, pod.container("stopped", BUSYBOX, IDLE).await?);
    for id in [&killed, &stopped] {
        ctr(&lab, &["tasks", "pause", id]).await?;
    }
    ctr(&lab, &["tasks", "kill", "-s", "SIGKILL", &killed]).await?;
    lab.cri.stop(&stopped, 2).await.context("stopping a paused container")?;
    for id in [&killed, &stopped] {
        let code = lab.cri.ended(id, SOON).await.context("a paused container never ends")?.exit_code;
        ensure!(code == 137, "a paused container ended with {code}");
        lab.cri.remove(id).await?;
    }
    pod.remove().await
}
