//! Figures of a pod: its usage by `crictl statsp`, and the resize of a running pod.

use std::{fs, path::PathBuf, sync::Arc};

use anyhow::{Context, Result, anyhow, bail, ensure};
use kuasar_e2e::{
    cri::{LinuxContainerResources, PodSandboxStats, UInt64Value},
    image::BUSYBOX,
    lab::{Lab, Pod},
    suite::handler,
};

use super::{
    IDLE,
    common::{containerd_version, sh},
};

const MIB: i64 = 1 << 20;

fn more_than_none(what: &str, value: Option<&UInt64Value>) -> Result<()> {
    let value = value.map(|value| value.value);
    ensure!(value.is_some_and(|value| value > 0), "the pod's {what} is {value:?}");
    Ok(())
}

fn has_figures(stats: &PodSandboxStats, container: &str) -> Result<()> {
    let linux = stats.linux.as_ref().context("a running pod has no figures")?;
    more_than_none("CPU time", linux.cpu.as_ref().and_then(|cpu| cpu.usage_core_nano_seconds.as_ref()))?;
    more_than_none("memory", linux.memory.as_ref().and_then(|memory| memory.working_set_bytes.as_ref()))?;
    let link = linux.network.as_ref().and_then(|network| network.default_interface.as_ref());
    let link = link.context("the pod has no figures of its network")?;
    ensure!(link.name == "eth0", "its link is {:?}", link.name);
    more_than_none("received bytes", link.rx_bytes.as_ref())?;
    more_than_none("sent bytes", link.tx_bytes.as_ref())?;
    let processes = linux.process.as_ref().and_then(|processes| processes.process_count.as_ref());
    more_than_none("number of processes", processes)?;
    let of_container = |stats: &&kuasar_e2e::cri::ContainerStats| {
        stats.attributes.as_ref().is_some_and(|a| a.id == container)
    };
    let stats = linux.containers.iter().find(of_container).context("its container has no figures")?;
    more_than_none(
        "container's CPU time",
        stats.cpu.as_ref().and_then(|cpu| cpu.usage_core_nano_seconds.as_ref()),
    )
}

fn id_of(stats: &PodSandboxStats) -> &str {
    stats.attributes.as_ref().map_or("", |attributes| &attributes.id)
}

/// `crictl statsp` asks for the list, of all or of one; a pod that has ended is none of it, and no error.
pub(crate) async fn figures_of_pods_never_fail(lab: Arc<Lab>) -> Result<()> {
    let (pod, ended) = (lab.pod("figures", handler()).await?, lab.pod("ended", handler()).await?);
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    ended.container("idle", BUSYBOX, IDLE).await?;
    let out = sh(&lab, &id, "ping -c 1 -W 5 10.88.77.1").await?;
    ensure!(out.starts_with("0 "), "the pod cannot reach its gateway: {out}");
    lab.cri.stop_pod(&ended.id).await?;

    has_figures(&lab.cri.pod_stats(&pod.id).await.map_err(|e| anyhow!("{}", e.message()))?, &id)?;
    for one in [None, Some(pod.id.as_str())] {
        let all = lab.cri.stats_of_pods(one).await;
        let all = all.map_err(|e| anyhow!("listing pods' figures ({one:?}): {}", e.message()))?;
        let found = all.iter().find(|stats| id_of(stats) == pod.id).context("the pod is not in the list")?;
        has_figures(found, &id)?;
        ensure!(all.iter().all(|stats| id_of(stats) != ended.id), "a pod that has ended has figures");
    }
    let of_ended = lab.cri.stats_of_pods(Some(&ended.id)).await;
    let of_ended = of_ended.map_err(|e| anyhow!("figures of a stopped pod: {}", e.message()))?;
    ensure!(of_ended.is_empty(), "a pod that has ended has figures");
    // `crictl stats`
    let all = lab.cri.stats().await.map_err(|e| anyhow!("listing containers' figures: {}", e.message()))?;
    ensure!(all.iter().any(|stats| stats.attributes.as_ref().is_some_and(|a| a.id == id)), "{all:?}");
    ended.remove().await?;
    pod.remove().await
}

/// The files with the CPUs that a pod may run on: those of its cgroup and of the parts of that, with cgroup
/// v1 or v2.
fn cpu_sets(pod: &Pod<'_>) -> Vec<PathBuf> {
    let folders =
        pod.cgroups().into_iter().flat_map(|own| [own.clone(), own.join("vcpu"), own.join("overhead")]);
    let files = folders
        .flat_map(|folder| ["cpuset.effective_cpus", "cpuset.cpus.effective"].map(|file| folder.join(file)));
    files.filter(|file| file.exists()).collect()
}

/// Does as kubelet does when the limits of a running pod's containers are changed.
pub(crate) async fn a_pod_is_resized(lab: Arc<Lab>) -> Result<()> {
    let limits = |mib: i64, cpus: i64, set: &str| LinuxContainerResources {
        memory_limit_in_bytes: mib * MIB,
        cpu_quota: cpus * 100_000,
        cpu_period: 100_000,
        cpuset_cpus: set.to_owned(),
        ..Default::default()
    };
    let mut config = lab.pod_config("resized")?;
    config.linux.get_or_insert_default().resources = Some(limits(128, 1, ""));
    let pod = lab.run(config, handler()).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    let sets = cpu_sets(&pod);
    ensure!(!sets.is_empty(), "the pod's cgroup has no CPU sets");
    lab.cri.update_pod(&pod.id, limits(100, 1, "0")).await.map_err(|e| anyhow!("{}", e.message()))?;
    for file in &sets {
        let set = fs::read_to_string(file)?;
        ensure!(set.trim() == "0", "{} has {set:?} after the resize", file.display());
    }
    let cpus = i64::try_from(std::thread::available_parallelism()?.get())?;
    for (what, wanted, parts) in [
        ("memory", limits(4096, 1, "0"), ["the pod's memory needs a VM of", "create the pod anew"]),
        (
            "CPUs",
            limits(100, 2, "0"),
            ["the pod's CPUs need 2 vCPUs and its VM has 1", "create the pod anew"],
        ),
    ] {
        // A VM has no more CPUs than the host, and so needs none more there.
        if what == "CPUs" && cpus < 2 {
            println!("skipped: a_pod_is_resized: more CPUs than the VM has: this machine has one");
            continue;
        }
        let Err(error) = lab.cri.update_pod(&pod.id, wanted).await else { bail!("more {what} were given") };
        let text = error.message();
        ensure!(parts.iter().all(|part| text.contains(part)), "of more {what} it is said: {text}");
    }
    let out = sh(&lab, &id, "echo here").await?;
    ensure!(out == "0 here", "after it the container says {out:?}");
    pod.remove().await
}

/// Says what [`a_pod_is_resized`] lacks on this machine; it is then skipped by name.
pub(crate) fn missing() -> Option<String> {
    match containerd_version()? {
        (major, minor) if (major, minor) < (2, 3) => Some(format!(
            "containerd {major}.{minor} has no UpdatePodSandboxResources; KUASAR_CONTAINERD names a newer one"
        )),
        _ => None,
    }
}
