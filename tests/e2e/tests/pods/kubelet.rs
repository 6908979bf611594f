//! Requests of kubelet itself: resources as it sends them, in a cgroup with the limits that it sets.

use std::{fs, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    cri::{ContainerConfig, HugepageLimit, LinuxContainerResources, PodSandboxConfig},
    image::BUSYBOX,
    lab::{Lab, Pod, container},
    leaks,
    suite::handler,
};
use serde_json::Value;

use super::{
    IDLE,
    common::{sh, vmm_of},
    sandbox::until,
};

const MIB: i64 = 1 << 20;

/// MiB of a pod's cgroup that are not for the guest, unless the daemon's configuration says something else.
pub(crate) fn vmm_memory() -> i64 {
    if std::env::var("KUASAR_ACCEL").is_ok_and(|accel| accel == "kvm") { 72 } else { 160 }
}

/// Gives a pod the limits of its containers and of its RuntimeClass's overhead, and its cgroup all that it
/// may use, in MiB, as kubelet does before it asks for the pod.
pub(crate) fn kubelets_limits(
    config: &mut PodSandboxConfig,
    limit: i64,
    overhead: i64,
    cgroup: i64,
) -> Result<()> {
    let linux = config.linux.get_or_insert_default();
    let resources = |mib: i64, thousandths: i64| LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: thousandths * 100,
        cpu_shares: thousandths * 1024 / 1000,
        memory_limit_in_bytes: mib * MIB,
        ..Default::default()
    };
    (linux.resources, linux.overhead) = (Some(resources(limit, 1000)), Some(resources(overhead, 250)));
    let mut limited = false;
    for hierarchy in leaks::hierarchies() {
        hand_memory_down(&hierarchy, &linux.cgroup_parent);
        let path = hierarchy.join(linux.cgroup_parent.trim_start_matches('/'));
        for file in ["memory.max", "memory.limit_in_bytes"].map(|name| path.join(name)) {
            if file.exists() {
                fs::write(&file, (cgroup * MIB).to_string())
                    .with_context(|| format!("writing {}", file.display()))?;
                limited = true;
            }
        }
    }
    ensure!(limited, "no cgroup of this host limits memory");
    Ok(())
}

/// cgroup v2 only: each level has what the one above hands down.
fn hand_memory_down(hierarchy: &Path, below: &str) {
    let mut path = hierarchy.to_owned();
    for part in Path::new(below.trim_start_matches('/')) {
        // Where it is handed down already, or this is version 1, there is nothing to be done.
        let _ = fs::write(path.join("cgroup.subtree_control"), "+memory");
        path.push(part);
    }
}

/// All that kubelet 1.36 says of a container of a Burstable pod, on a node with cgroup v2.
fn kubelets(limit: i64, swap: &str) -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 256,
        memory_limit_in_bytes: limit * MIB,
        oom_score_adj: 994,
        hugepage_limits: ["2MB", "1GB"].map(|size| HugepageLimit { page_size: size.into(), limit: 0 }).into(),
        // The second with singleProcessOOMKill: false.
        unified: [("memory.swap.max", swap), ("memory.oom.group", "1")]
            .map(|(file, value)| (file.into(), value.into()))
            .into(),
        ..Default::default()
    }
}

fn of_kubelet(name: &str, swap: &str) -> ContainerConfig {
    let mut config = container(name, BUSYBOX, IDLE);
    config.linux.get_or_insert_default().resources = Some(kubelets(128, swap));
    config
}

/// On a node with cgroup v2 it says `memory.swap.max` of every container, and the guest has no swap.
pub(crate) async fn what_kubelet_sends_starts_and_is_resized(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("kubelets", handler()).await?;
    let id = pod.create(of_kubelet("kubelets", "0")).await?;
    lab.cri.start(&id).await?;
    let limits = "cd /sys/fs/cgroup; echo $(cat memory.max cpu.max memory.oom.group /proc/1/oom_score_adj)";
    let out = sh(&lab, &id, limits).await?;
    ensure!(out == "0 134217728 50000 100000 1 994", "its limits are {out}");
    lab.cri.update(&id, kubelets(96, "0")).await.context("an in-place resize")?;
    let out = sh(&lab, &id, "cat /sys/fs/cgroup/memory.max").await?;
    ensure!(out == "0 100663296", "after the resize its limit is {out}");

    // And for the node the pod's memory is the VM's.
    let score = fs::read_to_string(format!("/proc/{}/oom_score_adj", vmm_of(&pod)?))?;
    ensure!(score.trim() == "994", "the VM's OOM score is {score}");

    // What it wants and cannot have is told.
    let why = "memory.swap.max=1G: the VM's kernel has no swap; ask for 0";
    let swapping = pod.create(of_kubelet("swapping", "1G")).await?;
    let error = lab.cri.start(&swapping).await.err().context("it has swap")?;
    ensure!(error.message().contains(why), "it is refused with {}", error.message());
    let error = lab.cri.update(&id, kubelets(96, "1G")).await.err().context("it got swap")?;
    ensure!(error.message().contains(why), "the resize is refused with {}", error.message());
    pod.remove().await
}

/// A process that fills 90 MB, and files of 60.
const GREEDY: &str = "head -c 90000000 /dev/zero | tail -c 90000000 | wc -c; dd if=/dev/zero of=/file bs=1M count=60 2>/dev/null";

fn memory_note(info: &std::collections::HashMap<String, String>) -> Result<Option<String>> {
    let ours: Value = serde_json::from_str(info.get("kuasar").context("the daemon says nothing of it")?)?;
    Ok(ours.get("memory").and_then(Value::as_str).map(str::to_owned))
}

/// With an overhead that has room for guest and VMM, containers can use all of their limit; without any, the
/// guest is smaller than it, and its own kernel says when that is used up. In neither does the host's kill
/// the VM.
pub(crate) async fn a_pod_lives_in_the_cgroup_that_kubelet_made(lab: Arc<Lab>) -> Result<()> {
    for (name, overhead) in [("roomy", 64 + vmm_memory()), ("tight", 0)] {
        let mut config = lab.pod_config(name)?;
        let limit = if overhead > 0 { 128 } else { 128 + vmm_memory() };
        kubelets_limits(&mut config, limit, overhead, limit + overhead)?;
        let pod = lab.run(config, handler()).await?;
        let mut config = container("greedy", BUSYBOX, IDLE);
        config.linux.get_or_insert_default().resources =
            Some(LinuxContainerResources { memory_limit_in_bytes: limit * MIB, ..Default::default() });
        let id = pod.create(config).await?;
        lab.cri.start(&id).await?;
        let out = sh(&lab, &id, GREEDY).await?;
        ensure!(overhead == 0 || out == "0 90000000", "{name}: {out}");
        let out = sh(&lab, &id, "echo alive").await?;
        ensure!(out == "0 alive", "{name}: after that the container says {out}");
        let (_, info) = lab.cri.pod_status(&pod.id).await?;
        let said = memory_note(&info)?;
        match said {
            Some(said) => {
                let guest = limit - vmm_memory();
                let start = format!("the guest has {guest} MiB instead of {}: ", limit + 64);
                ensure!(overhead == 0 && said.starts_with(&start), "{name}: it says {said}");
            }
            None => ensure!(overhead > 0, "{name}: it does not say that the guest is smaller"),
        }
        pod.remove().await?;
    }
    Ok(())
}

/// Memory of the guest that is the host's, in KiB.
fn held(pod: &Pod<'_>) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", vmm_of(pod)?))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).context("no RssShmem")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// A large guest costs what it uses.
pub(crate) async fn memory_that_a_guest_frees_is_the_hosts_again(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("lender", handler()).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    let before = held(&pod)?;
    let eat = sh(&lab, &id, "head -c 150m /dev/zero | tail -c 150m | wc -c");
    tokio::pin!(eat);
    let mut most = before;
    let out = loop {
        tokio::select! {
            out = &mut eat => break out?,
            () = tokio::time::sleep(Duration::from_millis(50)) => most = most.max(held(&pod)?),
        }
    };
    ensure!(out == "0 157286400", "it ate {out}");
    most = most.max(held(&pod)?);
    ensure!(most - before > 140 << 10, "it has taken only {} KiB", most - before);
    until("three quarters of it are the host's again", || {
        held(&pod).is_ok_and(|now| now <= before + (most - before) / 4)
    })
    .await?;
    println!("host memory of a guest: {before} KiB before, {most} while, {} after", held(&pod)?);
    pod.remove().await
}
