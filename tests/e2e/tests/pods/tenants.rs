//! Separation of tenants: each gets only what it may name, and one volume's trouble is its own.

use std::{
    fs,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use kuasar_e2e::{
    cri::{ContainerConfig, Mount},
    image::BUSYBOX,
    lab::{self, Lab, Pod, run},
    suite::{handler, patient},
};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use tokio::{
    process::Command,
    time::{Instant, sleep, timeout},
};

use super::{IDLE, common::sh};

fn folder(lab: &Lab, name: &str) -> Result<PathBuf> {
    let path = lab.machine.root.join("tmp").join(name);
    fs::create_dir_all(&path)?;
    Ok(path)
}

fn with(name: &str, host_path: &Path, container_path: &str) -> ContainerConfig {
    let host_path = host_path.to_string_lossy().into_owned();
    let mount = Mount { container_path: container_path.into(), host_path, ..Mount::default() };
    ContainerConfig { mounts: vec![mount], ..lab::container(name, BUSYBOX, IDLE) }
}

async fn started(lab: &Lab, pod: &Pod<'_>, config: ContainerConfig) -> Result<String> {
    let id = pod.create(config).await?;
    lab.cri.start(&id).await.map_err(|e| anyhow!("starting: {}", e.message()))?;
    Ok(id)
}

async fn refusal(lab: &Lab, pod: &Pod<'_>, config: ContainerConfig) -> Result<String> {
    match started(lab, pod, config).await {
        Ok(_) => bail!("the container was started"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

/// A container cannot make a disk of the host's its own by making a node of its number, nor can anybody for
/// it.
pub(crate) async fn a_node_in_a_volume_is_no_disk_of_the_host(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("no-disk", handler()).await?;
    let volume = folder(&lab, "no-disk")?;
    let id = started(&lab, &pod, with("makes", &volume, "/v")).await?;
    let out = sh(&lab, &id, "mknod /v/disk b 7 0").await?;
    ensure!(out.contains("Operation not permitted"), "making a node of a disk gave {out:?}");
    let script = "mkfifo /v/pipe && (echo through > /v/pipe & cat /v/pipe)";
    let out = sh(&lab, &id, script).await?;
    ensure!(out == "0 through", "a named pipe gave {out:?}");
    ensure!(
        fs::symlink_metadata(volume.join("pipe"))?.file_type().is_fifo(),
        "the pipe is not in the volume"
    );
    // As if the container had been let: whatever the node's number, it is not the one that the kernel made.
    let made = volume.join("made");
    mknod(&made, SFlag::S_IFBLK, Mode::S_IRUSR, makedev(7, 0))?;
    let error = refusal(&lab, &pod, with("names", &made, "/dev/mine")).await?;
    for part in ["/dev/mine is ", "a node of the host's disk 7:0", "name /dev/loop0 instead"] {
        ensure!(error.contains(part), "it is not said {part:?}: {error}");
    }
    let error = refusal(&lab, &pod, with("pipe", &volume.join("pipe"), "/p")).await?;
    ensure!(error.contains("it is a pipe of the host, which does not work inside a VM"), "{error}");
    pod.remove().await
}

/// Files that say that they are empty would be read as empty: who mounts them is told so.
pub(crate) async fn files_without_a_length_are_refused(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("lengths", handler()).await?;
    for (path, name) in
        [("/proc", "procfs"), ("/proc/meminfo", "procfs"), ("/sys/fs/cgroup/pids", "cgroupfs")]
    {
        if !Path::new(path).exists() && path != "/proc" {
            continue;
        }
        let name_of = format!("lengths-{}", path.replace('/', "-"));
        let error = refusal(&lab, &pod, with(&name_of, Path::new(path), "/host/x")).await?;
        let sentence = format!(
            "/host/x is {path} of the host, which is on {name}: its files do not say how long they are"
        );
        ensure!(error.contains(&sentence), "{path}: {error}");
    }
    pod.remove().await
}

/// Removes a pod that was stopped, asking again as the kubelet does.
async fn removed(pod: &Pod<'_>) -> Result<()> {
    let mut last = None;
    for _ in 0..50 {
        match pod.lab().cri.remove_pod(&pod.id).await {
            Ok(()) => return Ok(()),
            Err(error) => last = Some(error),
        }
        sleep(Duration::from_millis(500)).await;
    }
    bail!("removing the pod: {last:?}")
}

/// A volume whose host does not answer holds up who uses it. Another container answers, and the pod can be
/// stopped. Once the host answers, it can be removed.
pub(crate) async fn a_hung_volume_is_its_own_trouble(lab: Arc<Lab>) -> Result<()> {
    const WITHIN: Duration = Duration::from_secs(30);
    let pod = lab.pod("frozen", handler()).await?;
    let (volume, image) = (folder(&lab, "frozen")?, lab.machine.root.join("tmp/frozen.ext4"));
    fs::File::create(&image)?.set_len(32 << 20)?;
    run(Command::new("/sbin/mkfs.ext4").args(["-q", "-F"]).arg(&image)).await?;
    run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&volume)).await?;
    let writer = started(&lab, &pod, with("writer", &volume, "/v")).await?;
    let innocent = pod.container("innocent", BUSYBOX, IDLE).await?;
    let script = "(while :; do echo x >> /v/f; done) >/dev/null 2>&1 & sleep 1; test -s /v/f";
    let out = sh(&lab, &writer, script).await?;
    ensure!(out == "0 ", "writing gave {out:?}");
    run(Command::new("/sbin/fsfreeze").arg("--freeze").arg(&volume)).await?;
    let while_frozen = async {
        for round in 0..3 {
            let answer =
                timeout(patient(WITHIN), sh(&lab, &innocent, "cat /etc/os-release | grep -c ID")).await;
            let out =
                answer.with_context(|| format!("the innocent container does not answer, time {round}"))??;
            ensure!(out == "0 1", "the innocent container says {out:?}");
        }
        // As the kubelet ends a pod: its containers side by side, then the rest.
        let begun = Instant::now();
        let (one, other) = tokio::join!(lab.cri.stop(&writer, 1), lab.cri.stop(&innocent, 1));
        one.and(other).map_err(|e| anyhow!("stopping the containers: {}", e.message()))?;
        lab.cri.stop_pod(&pod.id).await.map_err(|e| anyhow!("stopping the pod: {}", e.message()))?;
        ensure!(begun.elapsed() < patient(Duration::from_secs(60)), "stopping it took {:?}", begun.elapsed());
        Ok(())
    };
    let done = while_frozen.await;
    run(Command::new("/sbin/fsfreeze").arg("--unfreeze").arg(&volume)).await?;
    done?;
    // The file server cannot end before the host answers, so the pod's cgroup stays until then.
    removed(&pod).await?;
    // What hung ends with it, and lets go of the volume.
    for _ in 0..100 {
        if run(Command::new("umount").arg(&volume)).await.is_ok() {
            return Ok(());
        }
        sleep(Duration::from_millis(200)).await;
    }
    bail!("somebody still uses the volume after its pod is gone")
}
