//! Images that dm-verity checks.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    image::BUSYBOX,
    lab::{self, Lab, QEMU_VERITY, daemon_config},
};

use super::{restart::SOON, sandbox::until};

/// Reason why there is no such image.
pub(crate) fn missing() -> Option<String> {
    guests().is_none().then(|| {
        "KUASAR_GUESTS (nix build .#guests-qemu), with an image that is checked, is not given".into()
    })
}

fn guests() -> Option<PathBuf> {
    std::env::var_os("KUASAR_GUESTS").map(PathBuf::from)
}

pub(crate) async fn a_damaged_image_is_the_reason_of_a_pods_end(lab: Arc<Lab>) -> Result<()> {
    let root = guests().context("KUASAR_GUESTS is not given")?.join("roots/verity");
    let image = lab.machine.root.join("verity.img");
    fs::copy(root.join("kuasar.img"), &image).context("copying the image")?;
    let path = image.to_string_lossy();
    let mut config = daemon_config(&lab.paths, &[("root", "blk"), ("image_path", &path)])?;
    let mut printed: toml::Table = fs::read_to_string(root.join("verity.toml"))?.parse()?;
    let verity = lab::table(&mut printed, "hypervisor")?.remove("verity");
    let verity = verity.context("there is no verity in what kuasar-image printed")?;
    lab::table(&mut config, "hypervisor")?.insert("verity".into(), verity);
    lab.start_daemon(QEMU_VERITY, &config).await?;

    flip(&image)?;
    let damaged = lab.cri.run_pod(&lab.pod_config("damaged")?, QEMU_VERITY).await;
    let error = damaged.err().context("a pod of a damaged image is ready")?;
    let said = error.message();
    for words in [
        "waiting for the guest's agent",
        "data block ",
        " is corrupted",
        "dm-verity device corrupted",
        "the guest image is damaged",
        "hypervisor.image_path",
    ] {
        ensure!(said.contains(words), "{words:?} is missing in: {said}");
    }
    let folder = lab::folder_of(QEMU_VERITY);
    let empty = || fs::read_dir(&folder).is_ok_and(|list| list.flatten().all(|entry| !entry.path().is_dir()));
    until("nothing of the pod is there", empty).await?;

    flip(&image)?;
    let pod = lab.pod("whole", QEMU_VERITY).await?;
    let id = pod.container("three", BUSYBOX, &["/bin/sh", "-c", "exit 3"]).await?;
    let code = lab.cri.ended(&id, SOON).await?.exit_code;
    ensure!(code == 3, "a container on the whole image ended with {code}");
    pod.remove().await
}

/// Changes one bit of the agent, or changes it back: in the padding of its ELF header, which nothing but the
/// hash tree knows. The files of the root lie in the order of their names, so the agent, `sbin/init`, is the
/// last program.
fn flip(image: &Path) -> Result<()> {
    const FS: u64 = 3 << 20;
    let file = File::options().read(true).write(true).open(image)?;
    let mut start = [0; 16];
    let mut agent = None;
    for at in (FS..file.metadata()?.len()).step_by(4096) {
        file.read_exact_at(&mut start, at)?;
        if start.starts_with(b"\x7fELF") {
            agent = Some((at + 15, start[15]));
        }
    }
    let (at, byte) = agent.context("there is no program in the image")?;
    Ok(file.write_all_at(&[byte ^ 1], at)?)
}
