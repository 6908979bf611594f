//! Cgroups of a pod's processes on the host, their limits, and the CPUs on which the guest's run.

use std::{collections::BTreeSet, fs, path::Path, sync::Arc};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    cri::{ContainerConfig, LinuxContainerResources},
    image::BUSYBOX,
    lab::{Lab, Pod, container},
    suite::handler,
};
use serde_json::Value;

use super::{
    IDLE,
    sandbox::{until, until_ready},
};

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

/// CPUs on which a thread may run, as the kernel lists them.
fn allowed(thread: &str) -> Result<String> {
    let status = read(&Path::new("/proc").join(thread).join("status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    Ok(line.context("no such line")?.trim().to_owned())
}

/// CPUs of the host on which the guest's may run.
pub(crate) fn allowed_for_the_guest(pod: &Pod<'_>) -> Result<String> {
    let mut found = BTreeSet::new();
    for part in pod.cgroups().iter().map(|own| own.join("vcpu")).filter(|part| part.is_dir()) {
        let threads = read(&part.join("tasks")).or_else(|_| read(&part.join("cgroup.threads")))?;
        for thread in threads.lines() {
            found.insert(allowed(thread)?);
        }
    }
    ensure!(found.len() == 1, "the guest's CPUs may run on {found:?}");
    found.pop_first().context("it has none")
}

/// All that the daemon has written down as the pod's: VMM, companions, relay.
fn recorded(pod: &Pod<'_>) -> Result<Vec<(String, i32)>> {
    let record = pod.record()?;
    let mut all = vec![
        ("VMM".to_owned(), pod.recorded_pid("/vm/vmm/pid")?),
        ("relay".to_owned(), pod.recorded_pid("/relay/pid")?),
    ];
    let companions = record.pointer("/vm/companions").and_then(Value::as_object).context("no companions")?;
    for name in companions.keys() {
        all.push((name.clone(), pod.recorded_pid(&format!("/vm/companions/{name}/pid"))?));
    }
    Ok(all)
}

pub(crate) async fn a_pod_is_below_its_cgroup_and_unlimited_stays_unlimited(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("unlimited", handler()).await?;
    let (own, mut limits) = (pod.cgroups(), 0);
    for (file, unlimited) in [
        ("memory.max", "max"),
        ("cpu.max", "max 100000"),
        // The largest number of whole pages.
        ("memory.limit_in_bytes", "9223372036854771712"),
        ("cpu.cfs_quota_us", "-1"),
    ] {
        for path in own.iter().map(|own| own.join(file)).filter(|path| path.exists()) {
            limits += 1;
            let limit = read(&path)?;
            ensure!(limit.trim() == unlimited, "{} is {limit:?}", path.display());
        }
    }
    ensure!(limits >= 2, "{limits} limits are there");
    let recorded = recorded(&pod)?;
    for name in ["virtiofsd", "relay", "VMM"] {
        ensure!(recorded.iter().any(|(known, _)| known == name), "no {name} in {recorded:?}");
    }
    for (name, pid) in recorded {
        let of = read(&Path::new("/proc").join(pid.to_string()).join("cgroup"))?;
        let below = of.lines().filter(|line| line.contains(&format!("/kuasar-{}", pod.id))).count();
        ensure!(below == own.len(), "{name} is below the pod's cgroup {below} times: {of}");
    }
    pod.remove().await
}

fn on(name: &str, cpus: &str) -> ContainerConfig {
    let mut config = container(name, BUSYBOX, IDLE);
    let resources = LinuxContainerResources { cpuset_cpus: cpus.into(), ..Default::default() };
    config.linux.get_or_insert_default().resources = Some(resources);
    config
}

/// As kubelet's static policy gives them: to containers, at their start and while they run.
pub(crate) async fn a_guest_runs_on_the_cpus_of_its_containers(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("cpusets", handler()).await?;
    let all = allowed_for_the_guest(&pod)?;
    let first = pod.create(on("first", "0")).await?;
    lab.cri.start(&first).await?;
    ensure!(allowed_for_the_guest(&pod)? == "0", "not only on the first container's");
    let second = pod.container("second", BUSYBOX, IDLE).await?;
    ensure!(allowed_for_the_guest(&pod)? == all, "a container without a set may not use all");
    lab.kill_daemon(handler()).await?;
    lab.restart_daemon(handler()).await?;
    until_ready(&lab, &pod.id, true).await?;
    lab.cri.remove(&second).await?;
    until("the second container has given its CPUs back", || {
        allowed_for_the_guest(&pod).is_ok_and(|set| set == "0")
    })
    .await?;
    let third = pod.create(on("third", "4096")).await?;
    let refused = lab.cri.start(&third).await.err().context("there are 4097 CPUs")?.message().to_owned();
    ensure!(refused.contains("linux.resources.cpu.cpus is \"0,4096\""), "it is refused with {refused}");
    // What is only the first one's again, others can be given while it runs.
    if all != "0" {
        let other = LinuxContainerResources { cpuset_cpus: "1".into(), ..Default::default() };
        lab.cri.update(&first, other).await?;
        ensure!(allowed_for_the_guest(&pod)? == "1", "an update of a container's CPUs comes to nothing");
    }
    pod.remove().await
}
