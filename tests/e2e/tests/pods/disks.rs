//! Disks of the host in a container: as devices, as volumes, as its root.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    cri::{ContainerConfig, Device, Mount},
    image::BUSYBOX,
    lab::{self, Lab, Pod, QEMU_BLOCKFILE, QEMU_DEVMAPPER, run},
    services,
    suite::handler,
};
use nix::sys::signal::{Signal, kill};
use tokio::{process::Command, time::Instant};

use super::{
    IDLE,
    common::{sh, vmm_of},
    hung::hang,
};

const SOON: Duration = Duration::from_secs(30);

/// A disk of the host: a file behind a loop device.
struct Disk {
    file: PathBuf,
    device: String,
}

impl Disk {
    async fn new(lab: &Lab, name: &str, ext4: bool) -> Result<Self> {
        let file = lab.machine.root.join("tmp").join(name);
        fs::File::create(&file)?.set_len(16 << 20)?;
        if ext4 {
            run(Command::new("/sbin/mkfs.ext4").args(["-q", "-F"]).arg(&file)).await?;
        }
        let device = said(Command::new("/sbin/losetup").args(["--find", "--show"]).arg(&file)).await?;
        Ok(Self { file, device: device.trim().to_owned() })
    }

    /// Detaches the device, and fails if anybody has it open: a loop device in use is not given back, however
    /// often one asks.
    async fn free(&self) -> Result<()> {
        run(Command::new("/sbin/losetup").args(["--detach", &self.device])).await?;
        let left =
            said(Command::new("/sbin/losetup").args(["--list", "--noheadings", "--output", "BACK-FILE"]))
                .await?;
        ensure!(!left.contains(&*self.file.to_string_lossy()), "somebody still uses {}", self.device);
        Ok(())
    }

    async fn file(&self, path: &str) -> Result<String> {
        said(Command::new("/sbin/debugfs").args(["-R", &format!("cat {path}")]).arg(&self.file)).await
    }
}

async fn said(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&run(command).await?).into_owned())
}

fn with_device(name: &str, disk: &Disk, permissions: &str) -> ContainerConfig {
    let device = Device {
        container_path: "/dev/data".into(),
        host_path: disk.device.clone(),
        permissions: permissions.into(),
    };
    ContainerConfig { devices: vec![device], ..lab::container(name, BUSYBOX, IDLE) }
}

fn with_mount(name: &str, disk: &Disk, readonly: bool) -> ContainerConfig {
    let host_path = disk.device.clone();
    let mount = Mount { container_path: "/data".into(), host_path, readonly, ..Mount::default() };
    ContainerConfig { mounts: vec![mount], ..lab::container(name, BUSYBOX, IDLE) }
}

/// Mounts of disks are of their file systems; CRI itself can only ask for binds.
async fn started(lab: &Lab, pod: &Pod<'_>, config: ContainerConfig) -> Result<String> {
    let id = pod.create(config).await?;
    services::change_spec(&id, |spec| {
        for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
            if mount["source"].as_str().is_some_and(|source| source.starts_with("/dev/loop")) {
                let has_ro =
                    mount["options"].as_array().is_some_and(|options| options.contains(&"ro".into()));
                mount["type"] = "ext4".into();
                mount["options"] = serde_json::json!([if has_ro { "ro" } else { "rw" }]);
            }
        }
    })
    .await?;
    lab.cri.start(&id).await.map_err(|e| anyhow::anyhow!("starting: {}", e.message()))?;
    Ok(id)
}

async fn gone(lab: &Lab, id: &str) -> Result<()> {
    lab.cri.stop(id, 0).await?;
    lab.cri.ended(id, SOON).await?;
    Ok(lab.cri.remove(id).await?)
}

pub(crate) async fn a_disk_is_a_device_of_the_container(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("block", handler()).await?;
    let (first, second) = (Disk::new(&lab, "first", false).await?, Disk::new(&lab, "second", false).await?);
    fs::write(&first.file, "from the host")?;
    fs::OpenOptions::new().write(true).open(&first.file)?.set_len(16 << 20)?;
    let writes = started(&lab, &pod, with_device("writes", &first, "rwm")).await?;
    let out = sh(&lab, &writes, "head -c 13 /dev/data; blockdev --getsize64 /dev/data").await?;
    ensure!(out == "0 from the host16777216", "the container reads {out:?}");
    let out = sh(&lab, &writes, "a=$(stat -c %t:%T /dev/data); for d in /sys/class/block/*; do \
        [ $(cat $d/serial 2>/dev/null || echo none) = disk-1 ] && IFS=: read M m < $d/dev && printf '%x:%x' $M $m; done; echo \" $a\"").await?;
    let numbers: Vec<&str> = out.trim_start_matches("0 ").split(' ').collect();
    ensure!(
        matches!(numbers[..], [guests, nodes] if guests == nodes && !guests.is_empty()),
        "its number is {out:?}"
    );
    let out =
        sh(&lab, &writes, "echo written | dd of=/dev/data bs=4096 seek=1 conv=sync 2>/dev/null && sync")
            .await?;
    ensure!(out == "0 ", "writing gave {out:?}");

    // The same disk for who may only read, while the daemon comes and goes.
    lab.kill_daemon(handler()).await?;
    lab.restart_daemon(handler()).await?;
    lab.ready_again(&pod.id).await?;
    let reads = started(&lab, &pod, with_device("reads", &first, "r")).await?;
    let out = sh(
        &lab,
        &reads,
        "dd if=/dev/data bs=4096 skip=1 count=1 2>/dev/null | head -c 7; echo x > /dev/data",
    )
    .await?;
    ensure!(out.starts_with("1 written") && out.contains("not permitted"), "who may only read gets {out:?}");
    let other = started(&lab, &pod, with_device("other", &second, "rwm")).await?;
    let out = sh(&lab, &other, "head -c 4 /dev/data | hexdump -e '\"%x\"'").await?;
    ensure!(out == "0 0", "the other disk has {out:?}");

    gone(&lab, &writes).await?;
    let out = sh(&lab, &reads, "dd if=/dev/data bs=4096 skip=1 count=1 2>/dev/null | head -c 7").await?;
    ensure!(out == "0 written", "after the other container's end it reads {out:?}");
    gone(&lab, &reads).await?;
    first.free().await.context("after the last that used it")?;
    ensure!(fs::read(&first.file)?.get(4096..4103) == Some(b"written"), "what was written did not arrive");
    // The slot is free again.
    let again = started(&lab, &pod, with_mount("none", &second, false)).await;
    let error = again.err().context("a disk without a file system was mounted")?.to_string();
    ensure!(error.contains("has no file system to mount"), "{error}");
    gone(&lab, &other).await?;
    pod.remove().await?;
    second.free().await
}

/// A `hostPath` of type `BlockDevice` is the node, which only a container with the right to it can use.
pub(crate) async fn a_disk_that_is_bound_is_a_node(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("node", handler()).await?;
    let disk = Disk::new(&lab, "node", true).await?;
    fs::OpenOptions::new().write(true).open(&disk.file)?.write_all(b"from the host")?;
    let bound = async |config: ContainerConfig| {
        let id = pod.create(config).await?;
        lab.cri.start(&id).await.map_err(|e| anyhow::anyhow!("starting: {}", e.message()))?;
        anyhow::Ok(id)
    };
    // Bound alone, it is there to be looked at.
    let alone = bound(with_mount("alone", &disk, false)).await?;
    let out = sh(&lab, &alone, "stat -c %F /data; head -c 13 /data").await?;
    ensure!(
        out.starts_with("1 block special file") && out.contains("not permitted"),
        "who is not allowed to use it gets {out:?}"
    );
    gone(&lab, &alone).await?;
    let mounts = with_mount("", &disk, false).mounts;
    let both = bound(ContainerConfig { mounts, ..with_device("both", &disk, "rw") }).await?;
    let script = "head -c 13 /data; [ $(stat -c %t:%T /data) = $(stat -c %t:%T /dev/data) ] && \
                  echo written | dd of=/data bs=4096 seek=1 conv=sync 2>/dev/null && sync";
    let out = sh(&lab, &both, script).await?;
    ensure!(out == "0 from the host", "who may use it gets {out:?}");
    gone(&lab, &both).await?;
    let mounts = with_mount("", &disk, true).mounts;
    let reads = bound(ContainerConfig { mounts, ..with_device("reads", &disk, "r") }).await?;
    let out = sh(&lab, &reads, "dd if=/data bs=4096 skip=1 count=1 2>/dev/null | head -c 7; echo x > /data")
        .await?;
    ensure!(out.starts_with("1 written") && out.contains("not permitted"), "who may read it gets {out:?}");
    pod.remove().await?;
    disk.free().await?;
    ensure!(fs::read(&disk.file)?.get(4096..4103) == Some(b"written"), "what was written did not arrive");
    Ok(())
}

pub(crate) async fn the_file_system_of_a_disk_is_a_volume(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("fs", handler()).await?;
    let disk = Disk::new(&lab, "ext4", true).await?;
    let one = started(&lab, &pod, with_mount("one", &disk, false)).await?;
    let two = started(&lab, &pod, with_mount("two", &disk, true)).await?;
    let out = sh(&lab, &one, "grep ' /data ' /proc/mounts | cut -d' ' -f3; echo kept > /data/f").await?;
    ensure!(out == "0 ext4", "the volume is {out:?}");
    let out = sh(&lab, &two, "cat /data/f; echo no > /data/f").await?;
    ensure!(
        out.starts_with("1 kept") && out.contains("Read-only file system"),
        "the read-only one gives {out:?}"
    );
    gone(&lab, &one).await?;
    gone(&lab, &two).await?;
    // One container that reads it here and writes to it there, and says so in this order.
    let mut both = with_mount("both", &disk, true);
    both.mounts.extend(
        with_mount("", &disk, false)
            .mounts
            .into_iter()
            .map(|mount| Mount { container_path: "/writable".into(), ..mount }),
    );
    let both = started(&lab, &pod, both).await?;
    let out = sh(&lab, &both, "echo more > /writable/g; cat /data/g; echo no > /data/g").await?;
    ensure!(
        out.starts_with("1 more") && out.contains("Read-only file system"),
        "who mounts it twice gets {out:?}"
    );
    pod.remove().await?;
    disk.free().await?;
    let kept = disk.file("/f").await?;
    ensure!(kept == "kept\n", "the disk has {kept:?}");
    Ok(())
}

pub(crate) async fn a_vm_ends_with_its_disks(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("dies", handler()).await?;
    let disk = Disk::new(&lab, "dies", true).await?;
    let id = started(&lab, &pod, with_mount("one", &disk, false)).await?;
    sh(&lab, &id, "echo kept > /data/f; sync").await?;
    kill(vmm_of(&pod)?, Signal::SIGKILL)?;
    lab.cri.ended(&id, SOON).await?;
    gone(&lab, &id).await.context("removing a container with a disk of a dead VM")?;
    pod.remove().await?;
    disk.free().await?;
    ensure!(disk.file("/f").await? == "kept\n", "what was synced is lost");
    Ok(())
}

/// A VM that stands still and holds a disk of the host, which somebody else may want.
pub(crate) async fn a_hung_vm_gives_its_disks_back(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("hung", handler()).await?;
    let disk = Disk::new(&lab, "hung", true).await?;
    let id = started(&lab, &pod, with_mount("one", &disk, false)).await?;
    sh(&lab, &id, "echo kept > /data/f; sync").await?;
    hang(&pod)?;
    let begun = Instant::now();
    pod.remove().await.context("removing a pod whose VM hangs with a disk")?;
    ensure!(begun.elapsed() < Duration::from_secs(60), "it took {:?} to remove it", begun.elapsed());
    disk.free().await?;
    ensure!(disk.file("/f").await? == "kept\n", "what was synced is lost");
    Ok(())
}

/// The node swaps, or is too busy: a VMM that answers late is not a pod that has ended.
pub(crate) async fn a_vmm_that_stands_still_while_the_daemon_restarts_goes_on(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("still", handler()).await?;
    let (first, second) = (Disk::new(&lab, "early", false).await?, Disk::new(&lab, "late", false).await?);
    let id = started(&lab, &pod, with_device("early", &first, "rwm")).await?;
    let vmm = vmm_of(&pod)?;
    hang(&pod)?;
    lab.kill_daemon(handler()).await?;
    lab.restart_daemon(handler()).await?;
    let ready = lab.ready_again(&pod.id).await;
    kill(vmm, Signal::SIGCONT)?;
    ready.context("while its VMM stands still")?;
    lab.ready_again(&pod.id).await?;
    let out = sh(&lab, &id, "head -c 4 /dev/data | hexdump -e '\"%x\"'").await?;
    ensure!(out == "0 0", "the container from before gives {out:?}");
    let late = started(&lab, &pod, with_device("late", &second, "rwm")).await?;
    let out = sh(&lab, &late, "blockdev --getsize64 /dev/data").await?;
    ensure!(out == "0 16777216", "a disk that comes later is {out:?}");
    gone(&lab, &id).await?;
    first.free().await?;
    pod.remove().await?;
    second.free().await
}

pub(crate) async fn a_root_is_an_image_file(lab: Arc<Lab>) -> Result<()> {
    roots_are_disks(&lab, QEMU_BLOCKFILE).await
}

pub(crate) async fn a_root_is_a_device_of_the_mapper(lab: Arc<Lab>) -> Result<()> {
    roots_are_disks(&lab, QEMU_DEVMAPPER).await
}

async fn roots_are_disks(lab: &Lab, handler: &str) -> Result<()> {
    let pod = lab.pod("rootdisk", handler).await?;
    for name in ["one", "two"] {
        let id = pod.container(name, BUSYBOX, IDLE).await?;
        let out =
            sh(lab, &id, "grep ' / ' /proc/mounts | cut -d' ' -f3; cat /mine; echo mine > /mine").await?;
        ensure!(
            out.starts_with("0 ext4") && out.contains("can't open '/mine'"),
            "the root of {name} is {out:?}"
        );
        // Nothing of it went over the shared folder.
        let folder = lab::folder_of(lab::QEMU).join(&pod.id).join("shared").join(&id);
        ensure!(!folder.join("rootfs").exists() && folder.join("storages.json").exists(), "it is shared");
    }
    pod.remove().await
}

/// Says what these cases lack on this machine; they are then skipped by name.
pub(crate) fn missing() -> Option<String> {
    let tools = ["/sbin/losetup", "/sbin/mkfs.ext4", "/sbin/debugfs", "/dev/loop-control"];
    tools.iter().find(|tool| !Path::new(tool).exists()).map(|tool| format!("there is no {tool}"))
}
