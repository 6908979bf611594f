//! A pod as its host sees it: killed at any time, forgotten, counted.

use std::{fs, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    cri::PodSandboxState,
    image::BUSYBOX,
    lab::{Lab, Pod, folder_of},
    services,
    suite::{handler, patient},
};
use nix::sys::signal::{Signal, kill};
use tokio::time::{Instant, sleep};

use super::{IDLE, cgroups::allowed_for_the_guest, common::vmm_of};

/// containerd tries again to reach a daemon after at most 3 s, and forgotten pods go after twice that.
const SOON: Duration = Duration::from_secs(30);

/// Pods of which the daemon has a folder.
pub(crate) fn folders() -> Vec<String> {
    let entries = fs::read_dir(folder_of(handler())).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.path().is_dir());
    let mut folders: Vec<_> = folders.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    folders.sort_unstable();
    folders
}

pub(crate) async fn until(what: &str, is: impl Fn() -> bool) -> Result<()> {
    let soon = patient(SOON);
    let end = Instant::now() + soon;
    while !is() {
        ensure!(Instant::now() < end, "{what}: not within {soon:?}");
        sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

async fn is_ready(lab: &Lab, id: &str) -> bool {
    let status = lab.cri.pod_status(id).await;
    status.is_ok_and(|(status, _)| status.state() == PodSandboxState::SandboxReady)
}

pub(crate) async fn until_ready(lab: &Lab, id: &str, ready: bool) -> Result<()> {
    let soon = patient(SOON);
    let end = Instant::now() + soon;
    while is_ready(lab, id).await != ready {
        let wanted = if ready { "ready" } else { "ended" };
        ensure!(Instant::now() < end, "the pod is not {wanted} within {soon:?}");
        sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// A start takes about 1.5 s here; the daemon dies in every part of it.
pub(crate) async fn a_daemon_killed_while_a_pod_starts(lab: Arc<Lab>) -> Result<()> {
    // Nobody touches it, and each daemon finds it again.
    let witness = lab.pod("witness", handler()).await?;
    let others = folders();
    for millis in [20, 60, 120, 250, 500, 900, 1400] {
        let config = lab.pod_config("torn")?;
        let end = async {
            sleep(Duration::from_millis(millis)).await;
            lab.kill_daemon(handler()).await
        };
        let (started, killed) = tokio::join!(lab.cri.run_pod(&config, handler()), end);
        killed?;
        lab.restart_daemon(handler()).await?;
        lab.ready_again(&witness.id).await?;
        if let Ok(id) = started {
            until_ready(&lab, &id, true).await?;
            lab.cri.stop_pod(&id).await?;
            lab.cri.remove_pod(&id).await?;
        }
        let gone = format!("everything of the pod that was starting for {millis} ms is gone");
        until(&gone, || folders() == others).await?;
    }
    witness.remove().await
}

pub(crate) async fn a_daemon_killed_while_a_container_is_made(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("work", handler()).await?;
    // By its end the guest's clock has been looked at: `vhost-device-vsock` 0.3.0 does not outlive a caller
    // that dies while it is being connected.
    let first = pod.container("first", BUSYBOX, &["/bin/true"]).await?;
    lab.cri.ended(&first, SOON).await?;
    for (number, millis) in [10, 40, 100, 200].into_iter().enumerate() {
        let (name, after) = (format!("torn-{number}"), format!("after-{number}"));
        let end = async {
            sleep(Duration::from_millis(millis)).await;
            lab.kill_daemon(handler()).await?;
            sleep(Duration::from_millis(200)).await;
            lab.restart_daemon(handler()).await
        };
        let command = ["/bin/sh", "-c", "exit 4"];
        let (made, restarted) = tokio::join!(pod.container(&name, BUSYBOX, &command), end);
        restarted?;
        until_ready(&lab, &pod.id, true).await?;
        // It may have failed, and then it says so; if it runs, it runs to its end.
        if let Ok(id) = made {
            let code = lab.cri.ended(&id, SOON).await?.exit_code;
            ensure!(code == 4, "the container made during the restart ended with {code}");
        }
        let id = pod.container(&after, BUSYBOX, &["/bin/sh", "-c", "exit 3"]).await?;
        let code = lab.cri.ended(&id, SOON).await?.exit_code;
        ensure!(code == 3, "a container made after the restart ended with {code}");
    }
    pod.remove().await
}

pub(crate) async fn a_killed_vm_is_a_pod_that_is_not_ready_and_says_why(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("killed", handler()).await?;
    let talks = ["/bin/sh", "-c", "echo kept; touch /up; while :; do sleep 1000; done"];
    let id = pod.container("talks", BUSYBOX, &talks).await?;
    let end = Instant::now() + patient(SOON);
    while pod.output("talks").map_or(true, |(stdout, _)| stdout.is_empty()) {
        ensure!(Instant::now() < end, "the container says nothing");
        sleep(Duration::from_millis(100)).await;
    }
    kill(vmm_of(&pod)?, Signal::SIGKILL)?;
    let code = lab.cri.ended(&id, SOON).await?.exit_code;
    ensure!(code == 137, "its container ended with {code}");
    until_ready(&lab, &pod.id, false).await?;
    let (_, info) = lab.cri.pod_status(&pod.id).await?;
    let ours = info.get("kuasar").context("nothing of ours in the status")?;
    ensure!(ours.contains("the VM has ended with status 137 (signal 9)"), "it says {ours}");
    let (stdout, _) = pod.output("talks")?;
    ensure!(stdout == b"kept\n", "its container's log is {:?}", String::from_utf8_lossy(&stdout));
    pod.remove().await
}

pub(crate) async fn a_pod_that_containerd_forgot_is_collected(lab: Arc<Lab>) -> Result<()> {
    let (pod, known) = (lab.pod("forgotten", handler()).await?, lab.pod("known", handler()).await?);
    ensure!(folders().contains(&pod.id) && folders().contains(&known.id), "{:?}", folders());
    services::forget(&pod.id).await?;
    until("the forgotten pod's folder is gone", || !folders().contains(&pod.id)).await?;
    // The machine is looked over at the end: VM, relay, tap, mounts and cgroups are gone as well, or the run
    // fails.
    ensure!(is_ready(&lab, &known.id).await, "a pod that is known was collected, too");

    // Whether their records can be read or not.
    let (lost, vmm) = (lab.pod("lost", handler()).await?, vmm_of(&known)?);
    return_to_an_older_daemon(&lab, &[&lost, &known]).await?;
    services::forget(&lost.id).await?;
    until("the folder of the one without a record is gone", || !folders().contains(&lost.id)).await?;
    ensure!(kill(vmm, None).is_ok(), "a pod that is known was collected for its record");
    known.remove().await?;
    lost.remove().await?;
    pod.remove().await
}

/// It finds records of a later version.
async fn return_to_an_older_daemon(lab: &Lab, pods: &[&Pod<'_>]) -> Result<()> {
    let mut records = Vec::new();
    for pod in pods {
        let mut record = pod.record()?;
        *record.get_mut("version").context("no version")? = 99.into();
        records.push((folder_of(handler()).join(&pod.id).join("pod.json"), record.to_string()));
    }
    lab.kill_daemon(handler()).await?;
    for (file, text) in records {
        fs::write(file, text)?;
    }
    lab.restart_daemon(handler()).await
}

/// As after the return to an older daemon: it cannot know what lives, so it ends nothing, until the pod is to
/// be removed.
pub(crate) async fn a_pod_whose_record_cannot_be_read_is_removed(lab: Arc<Lab>) -> Result<()> {
    let (pod, other) = (lab.pod("alien", handler()).await?, lab.pod("other", handler()).await?);
    pod.container("idle", BUSYBOX, IDLE).await?;
    let (vmm, folder) = (vmm_of(&pod)?, folder_of(handler()).join(&pod.id));
    return_to_an_older_daemon(&lab, &[&pod]).await?;
    lab.ready_again(&other.id).await?;
    until_ready(&lab, &pod.id, false).await?;
    ensure!(kill(vmm, None).is_ok(), "its VM was ended on no evidence");
    let cgroups = pod.cgroups();
    pod.remove().await?;
    ensure!(!folder.exists(), "its folder is left");
    until("its VM is gone", || kill(vmm, None).is_err()).await?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains(&*folder.to_string_lossy()), "mounts of it are left: {mounts}");
    for own in cgroups {
        ensure!(!own.exists(), "{} is left", own.display());
    }
    ensure!(is_ready(&lab, &other.id).await, "another pod has ended, too");
    other.remove().await
}

pub(crate) async fn a_pods_cpus_are_counted_apart(lab: Arc<Lab>) -> Result<()> {
    let mut config = lab.pod_config("apart")?;
    config.linux.get_or_insert_default().resources.get_or_insert_default().cpuset_cpus = "0".into();
    let pod = lab.run(config, handler()).await?;
    let mut parts = 0;
    for own in pod.cgroups() {
        ensure!(own.is_dir(), "{} is not there", own.display());
        let members = |folder: &str| {
            let folder = own.join(folder);
            let read = |name| fs::read_to_string(folder.join(name));
            read("tasks").or_else(|_| read("cgroup.threads")).map_or(0, |text| text.lines().count())
        };
        if own.join("vcpu").is_dir() {
            parts += 1;
            let (vcpus, others) = (members("vcpu"), members("overhead"));
            ensure!(vcpus == 1, "{vcpus} threads are CPUs in {}", own.display());
            ensure!(others > 3, "{others} other threads in {}", own.display());
        }
    }
    ensure!(parts > 0, "no hierarchy tells the CPUs from the rest");
    let allowed = allowed_for_the_guest(&pod)?;
    ensure!(allowed == "0", "the pod may run on CPU 0 alone, and its guest runs on {allowed}");
    pod.remove().await
}
