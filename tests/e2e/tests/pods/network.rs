//! The pod's network, its kernel, and the other ways to give the guest its root and its files.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow, ensure};
use kuasar_e2e::{
    image::BUSYBOX,
    lab::{Lab, QEMU, QEMU_9P, QEMU_INITRD},
    suite::{handler, patient},
};
use tokio::{
    io::AsyncReadExt,
    net::TcpStream,
    time::{Instant, sleep},
};

use super::IDLE;

async fn fetch(address: &str) -> Result<String> {
    let end = Instant::now() + patient(Duration::from_secs(20));
    loop {
        let attempt = async {
            let mut stream = TcpStream::connect(address).await?;
            let mut text = String::new();
            stream.read_to_string(&mut text).await.map(|_| text)
        };
        // The server needs a moment to listen.
        match attempt.await {
            Ok(text) => return Ok(text),
            Err(e) if Instant::now() >= end => return Err(e).with_context(|| format!("reaching {address}")),
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}

pub(crate) async fn pod_answers_at_its_ip(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("net", handler()).await?;
    let ip = lab.cri.pod_status(&pod.id).await?.0.network.unwrap_or_default().ip;
    let script = "while :; do echo hello from $(hostname) | nc -l -p 8080; done";
    let id = pod.container("server", BUSYBOX, &["/bin/sh", "-c", script]).await?;
    let name = &pod.config.hostname;
    let text = fetch(&format!("{ip}:8080")).await?;
    ensure!(text == format!("hello from {name}\n"), "it said {text:?}");
    // And out of the pod: the bridge is its gateway.
    let out = lab.cri.exec(&id, &["ping", "-c", "1", "-W", "5", "10.88.77.1"]).await?;
    ensure!(out.code == 0, "the gateway does not answer: {out:?}");
    // Containers of a pod share its network: another one sees the same address.
    let other = pod.container("other", BUSYBOX, IDLE).await?;
    let out = lab.cri.exec(&other, &["ip", "addr", "show", "eth0"]).await?;
    ensure!(out.stdout.contains(&ip), "another container of the pod has {out:?}");
    let out = lab.cri.exec(&other, &["nc", "127.0.0.1", "8080"]).await?;
    ensure!(out.stdout.contains("hello from"), "localhost is not the pod's: {out:?}");
    pod.remove().await
}

/// The kernel's release, its command line and its mounts, as a container sees them.
async fn guest_facts(lab: &Lab, handler: &str) -> Result<[String; 3]> {
    let pod = lab.pod("facts", handler).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    let mut facts = Vec::new();
    for command in [&["uname", "-r"][..], &["cat", "/proc/cmdline"], &["cat", "/proc/mounts"]] {
        let out = lab.cri.exec(&id, command).await?;
        ensure!(out.code == 0, "{command:?} gave {out:?}");
        facts.push(out.stdout.trim().to_owned());
    }
    // The rootfs can be written, whatever it came through.
    let out = lab
        .cri
        .exec(&id, &["/bin/sh", "-c", "echo 1 > /file && cat /file && mv /file /other && rm /other"])
        .await?;
    ensure!(out.code == 0 && out.stdout == "1\n", "writing to the rootfs gave {out:?}");
    pod.remove().await?;
    facts.try_into().map_err(|_| anyhow!("three facts were asked for"))
}

pub(crate) async fn guest_kernel_is_not_the_hosts(lab: Arc<Lab>) -> Result<()> {
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let [release, cmdline, mounts] = guest_facts(&lab, QEMU).await?;
    ensure!(release != host.trim(), "both are {release}: the container runs on the host's kernel");
    ensure!(cmdline.contains("root=/dev/pmem0p1"), "the root is not on pmem: {cmdline}");
    ensure!(root_of(&mounts).contains("virtiofs"), "the rootfs is not on virtiofs: {}", root_of(&mounts));
    Ok(())
}

pub(crate) async fn guest_runs_without_virtiofsd(lab: Arc<Lab>) -> Result<()> {
    let [_, cmdline, mounts] = guest_facts(&lab, QEMU_9P).await?;
    ensure!(cmdline.contains("root=/dev/vda1"), "the root is not on virtio-blk: {cmdline}");
    ensure!(root_of(&mounts).contains("9p"), "the rootfs is not on 9p: {}", root_of(&mounts));
    Ok(())
}

pub(crate) async fn guest_runs_from_the_initrd(lab: Arc<Lab>) -> Result<()> {
    let [_, cmdline, _] = guest_facts(&lab, QEMU_INITRD).await?;
    ensure!(!cmdline.contains("root=/dev/"), "there is a disk all the same: {cmdline}");
    Ok(())
}

fn root_of(mounts: &str) -> &str {
    mounts.lines().find(|line| line.split(' ').nth(1) == Some("/")).unwrap_or("no mount of / is listed")
}
