//! Character devices that every guest has as well.

use std::sync::Arc;

use anyhow::{Result, anyhow, ensure};
use kuasar_e2e::{
    cri::{ContainerConfig, Device, Mount},
    image::BUSYBOX,
    lab::{self, Lab},
    suite::handler,
};

use super::{IDLE, common::sh};

/// As kubelet asks for those of device plugins: the host's path, the container's, and what may be done with
/// it.
pub(crate) async fn devices_of_every_guest_are_passed(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("devices", handler()).await?;
    let device = |path: &str, at: &str, permissions: &str| Device {
        container_path: at.into(),
        host_path: path.into(),
        permissions: permissions.into(),
    };
    let devices = vec![device("/dev/fuse", "/dev/fuse", "rwm"), device("/dev/null", "/dev/nothing", "rw")];
    let config = ContainerConfig { devices, ..lab::container("devices", BUSYBOX, IDLE) };
    let id = pod.create(config).await?;
    lab.cri.start(&id).await.map_err(|e| anyhow!("starting it: {}", e.message()))?;
    let plain = pod.container("plain", BUSYBOX, IDLE).await?;
    let open = "exec 3<>/dev/fuse && echo open";
    for (what, container, script, expected) in [
        ("/dev/fuse", &id, "stat -c '%F %t:%T' /dev/fuse", "0 character special file a:e5"),
        (
            "/dev/null under another name",
            &id,
            "stat -c '%F %t:%T' /dev/nothing",
            "0 character special file 1:3",
        ),
        ("writing to it", &id, "echo x > /dev/nothing && cat /dev/nothing", "0 "),
        // The guest's kernel has the driver, and the container's cgroup lets it through.
        ("opening /dev/fuse", &id, open, "0 open"),
    ] {
        let out = sh(&lab, container, script).await?;
        ensure!(out == expected, "{what}: {out:?}");
    }
    let out = sh(&lab, &plain, "mknod /dev/made c 10 229 && exec 3<>/dev/made && echo open").await?;
    ensure!(out.contains("not permitted"), "who did not ask for /dev/fuse opens it: {out:?}");
    pod.remove().await
}

/// A `hostPath` of type `CharDevice` gives the guest's own node and, as on the host, no right to use it.
pub(crate) async fn devices_are_bound_from_the_guest(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("nodes", handler()).await?;
    let mount = |path: &str, at: &str| Mount {
        container_path: at.into(),
        host_path: path.into(),
        ..Mount::default()
    };
    let mounts =
        vec![mount("/dev/fuse", "/dev/fuse"), mount("/dev/zero", "/nothing"), mount("/dev/tty", "/tty")];
    let bound = ContainerConfig { mounts: mounts.clone(), ..lab::container("bound", BUSYBOX, IDLE) };
    let fuse = Device {
        container_path: "/dev/other".into(),
        host_path: "/dev/fuse".into(),
        permissions: "rwm".into(),
    };
    let allowed = ContainerConfig { mounts, devices: vec![fuse], ..lab::container("allowed", BUSYBOX, IDLE) };
    let start = async |config: ContainerConfig| {
        let id = pod.create(config).await?;
        lab.cri.start(&id).await.map_err(|e| anyhow!("starting it: {}", e.message()))?;
        anyhow::Ok(id)
    };
    let (bound, allowed) = (start(bound).await?, start(allowed).await?);
    let open = "exec 3<>/dev/fuse && echo open";
    for (container, script, expected) in [
        (&bound, "stat -c '%F %t:%T %a' /dev/fuse", "0 character special file a:e5 666"),
        (
            &bound,
            "stat -c '%F %t:%T' /nothing /tty",
            "0 character special file 1:5\ncharacter special file 5:0",
        ),
        (&bound, "head -c 2 /nothing | hexdump -e '\"%x\"'", "0 0"),
        (&allowed, open, "0 open"),
    ] {
        let out = sh(&lab, container, script).await?;
        ensure!(out == expected, "`{script}` gave {out:?}");
    }
    let out = sh(&lab, &bound, open).await?;
    ensure!(out.contains("not permitted"), "who did not ask for the device opens it: {out:?}");
    pod.remove().await
}
