//! Roots by snapshotter: layers that are image files, those of containerd's erofs snapshotter; and plain
//! folders.

use std::{fs, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    image::BUSYBOX,
    lab::{self, Lab, QEMU, QEMU_EROFS, QEMU_NATIVE, run},
};
use tokio::process::Command;

use super::{
    IDLE,
    common::{containerd_version, import_layers, sh},
};

const SOON: Duration = Duration::from_secs(30);

fn mounted(kind: &str, below: &Path) -> Result<usize> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let below = format!(" {}/", below.display());
    Ok(text.lines().filter(|line| line.contains(&below) && line.contains(&format!(" - {kind} "))).count())
}

/// One that all fits: the guest mounts it, and nothing of it goes over the shared folder.
pub(crate) async fn a_root_is_made_of_erofs_layers(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("erofs", QEMU_EROFS).await?;
    let folder = lab::folder_of(QEMU).join(&pod.id);
    for name in ["one", "two"] {
        let id = pod.container(name, BUSYBOX, IDLE).await?;
        let script = "set -- $(grep ' / ' /proc/mounts); echo $3; echo $4 | grep -c /run/kuasar/storage; stat -c %a /; \
            cat /mine; echo mine > /mine && cat /mine";
        let out = sh(&lab, &id, script).await?;
        ensure!(
            out.starts_with("0 overlay\n1\n755\nmine") && out.contains("can't open '/mine'"),
            "the root of {name} is {out:?}"
        );
        // The kernel's list of mounted EROFS, by disk; and a root no larger than its `default_size`.
        let script = "ls /sys/fs/erofs | grep -q vd && df -k / | tail -n 1 | awk '{print ($2 < 17000)}'";
        let out = sh(&lab, &id, script).await?;
        ensure!(out == "0 1", "the guest's file systems: {out:?}");
        let shared = folder.join("shared").join(&id);
        let storages = fs::read_to_string(shared.join("storages.json"))?;
        ensure!(
            !shared.join("rootfs").exists() && storages.contains("\"erofs\""),
            "it is shared: {storages}"
        );
    }
    ensure!(mounted("erofs", &folder)? == 0, "layers are mounted on the host");
    pod.remove().await
}

/// One with more layers than the VM has slots: mounted on the host and shared.
pub(crate) async fn a_root_of_more_erofs_layers_than_slots(lab: Arc<Lab>) -> Result<()> {
    const LAYERS: u32 = 28;
    let image = import_layers(&lab, "erofs-layers", LAYERS).await?;
    let pod = lab.pod("slots", QEMU_EROFS).await?;
    let folder = lab::folder_of(QEMU).join(&pod.id);
    let script =
        "cat /top /layer-1; echo x > /layer-1 && cat /layer-1; while [ ! -e /go ]; do busybox sleep 1; done";
    let id = pod.container("layers", image.name(), &["/bin/sh", "-c", script]).await?;
    ensure!(folder.join("shared").join(&id).join("rootfs/bin").exists(), "it is not shared");
    ensure!(mounted("erofs", &folder)? == usize::try_from(LAYERS)?, "its layers are not mounted on the host");
    // A daemon that comes back takes away what another has mounted.
    lab.kill_daemon(QEMU).await?;
    lab.restart_daemon(QEMU).await?;
    lab.ready_again(&pod.id).await?;
    sh(&lab, &id, "echo > /go").await?;
    let code = lab.cri.ended(&id, SOON).await?.exit_code;
    let (stdout, stderr) = pod.output("layers")?;
    ensure!(
        code == 0 && stdout == b"271x\n",
        "{code} {:?} {:?}",
        String::from_utf8_lossy(&stdout),
        String::from_utf8_lossy(&stderr)
    );
    lab.cri.remove(&id).await.map_err(|e| anyhow::anyhow!("removing: {}", e.message()))?;
    ensure!(mounted("erofs", &folder)? == 0, "layers stay mounted");
    pod.remove().await
}

/// Of the native snapshotter, which copies layers into a folder for each container: shared as they are.
pub(crate) async fn roots_that_are_folders(lab: Arc<Lab>) -> Result<()> {
    shared_roots(&lab, QEMU_NATIVE).await
}

/// Of a containerd that mounts EROFS layers itself and gives an overlay of them.
pub(crate) async fn roots_of_mounted_erofs_layers(lab: Arc<Lab>) -> Result<()> {
    shared_roots(&lab, QEMU_EROFS).await?;
    // containerd never unmounts the layers of an image, also when it ends.
    let snapshots = lab.machine.root.join("containerd/io.containerd.snapshotter.v1.erofs/snapshots");
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let points = text.lines().filter_map(|line| line.split(' ').nth(4));
    let layers: Vec<_> = points.filter(|point| Path::new(point).starts_with(&snapshots)).collect();
    ensure!(!layers.is_empty(), "containerd has mounted no layers");
    run(Command::new("umount").args(layers)).await.context("somebody still uses a layer").map(drop)
}

/// Two containers of one image: each has a root of its own over the shared folder, and on the host it is no
/// other than in it.
async fn shared_roots(lab: &Lab, handler: &str) -> Result<()> {
    let pod = lab.pod("roots", handler).await?;
    let folder = lab::folder_of(QEMU).join(&pod.id).join("shared");
    for name in ["one", "two"] {
        let id = pod.container(name, BUSYBOX, IDLE).await?;
        let script = "grep ' / ' /proc/mounts | cut -d' ' -f3; stat -c %a /; cat /mine; echo mine > /mine && cat /mine";
        let out = sh(lab, &id, script).await?;
        ensure!(
            out.starts_with("0 virtiofs\n755\nmine") && out.contains("can't open '/mine'"),
            "the root of {name} is {out:?}"
        );
        let root = folder.join(&id).join("rootfs");
        ensure!(fs::read_to_string(root.join("mine"))? == "mine\n", "{} is not its root", root.display());
        lab.cri.stop(&id, 0).await?;
        lab.cri.remove(&id).await.map_err(|e| anyhow::anyhow!("removing {name}: {}", e.message()))?;
        ensure!(!root.exists(), "the root of {name} stays");
    }
    pod.remove().await
}

/// Names the first missing tool of those that make EROFS layers.
fn missing_tool() -> Option<String> {
    let tools = ["/usr/bin/mkfs.erofs", "/sbin/mkfs.ext4", "/dev/loop-control"];
    tools.iter().find(|tool| !Path::new(tool).exists()).map(|tool| format!("there is no {tool}"))
}

/// Says what the cases of layers that are not mounted lack on this machine; they are then skipped by name.
pub(crate) fn missing() -> Option<String> {
    missing_tool().or_else(|| match containerd_version()? {
        version if version < (2, 2) => Some(format!(
            "containerd {}.{} mounts layers itself; KUASAR_CONTAINERD names a newer one",
            version.0, version.1
        )),
        _ => None,
    })
}

/// Says what the cases of mounted layers lack on this machine.
pub(crate) fn missing_mounted() -> Option<String> {
    missing_tool().or_else(|| match containerd_version()? {
        version if version >= (2, 2) => {
            Some(format!("containerd {}.{} does not mount layers; 2.1 does", version.0, version.1))
        }
        _ => None,
    })
}
