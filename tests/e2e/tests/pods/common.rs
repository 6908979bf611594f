//! Steps that cases of several kinds share.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;
use kuasar_e2e::{
    cri::Mount,
    image::{Image, Layer},
    lab::{Containerd, Lab, Pod, run},
    paths::Paths,
    suite::handler,
};
use nix::unistd::Pid;

/// Runs a script in a container; its code, a space, and what it said.
pub(crate) async fn sh(lab: &Lab, id: &str, script: &str) -> Result<String> {
    let out = lab.cri.exec(id, &["/bin/sh", "-c", script]).await?;
    Ok(format!("{} {}{}", out.code, out.stdout.trim_end(), out.stderr.trim_end()))
}

/// Runs a pod that may have privileged containers.
pub(crate) async fn privileged_pod<'a>(lab: &'a Lab, name: &str) -> Result<Pod<'a>> {
    let mut config = lab.pod_config(name)?;
    config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
    lab.run(config, handler()).await
}

/// Makes a folder of the host that is to be a volume.
pub(crate) fn folder(lab: &Lab, name: &str) -> Result<PathBuf> {
    let path = lab.machine.root.join("tmp").join(name);
    fs::create_dir_all(&path)?;
    Ok(path)
}

/// A mount of a file or folder of the host, writable.
pub(crate) fn mount(host_path: &Path, container_path: &str) -> Mount {
    let host_path = host_path.to_string_lossy().into_owned();
    Mount { container_path: container_path.into(), host_path, ..Mount::default() }
}

/// The process of a pod's VMM, as it is recorded.
pub(crate) fn vmm_of(pod: &Pod<'_>) -> Result<Pid> {
    pod.recorded_pid("/vm/vmm/pid").map(Pid::from_raw)
}

/// Imports busybox with so many layers; above the first, number N has `/layer-N` and another `/top`.
pub(crate) async fn import_layers(lab: &Lab, name: &str, layers: u32) -> Result<Image> {
    let mut image = Image::new(&format!("kuasar.test/{name}:1"), &["/bin/sh"]).layer(
        Layer::new()
            .dir("bin", 0o755)?
            .file("bin/busybox", 0o755, &fs::read(lab.paths.tool("busybox"))?)?
            .link("bin/sh", "busybox")?
            .link("bin/cat", "busybox")?,
    )?;
    for number in 1..layers {
        let text = number.to_string();
        let layer = Layer::new().file("top", 0o644, text.as_bytes())?;
        image = image.layer(layer.file(&format!("layer-{number}"), 0o644, text.as_bytes())?)?;
    }
    let file = lab.machine.root.join("images").join(name).with_extension("tar");
    image.write(&file)?;
    let mut ctr = lab.ctr();
    run(ctr.args(["images", "import", "--local", "--no-unpack"]).arg(&file)).await?;
    Ok(image)
}

/// Of the containerd that is given. What is missing without one is told when the lab starts.
pub(crate) fn containerd_version() -> Option<(u32, u32)> {
    Paths::find().and_then(|paths| Containerd::given().version(&paths)).ok()
}
