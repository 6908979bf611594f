//! Files and folders of the host in a container, and what becomes of them.

use std::{
    fs,
    os::unix::{fs::symlink, net::UnixDatagram},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    cri::{ContainerConfig, ImageSpec, Mount, MountPropagation, PodSandboxState},
    image::{BASH, BUSYBOX},
    lab::{self, Lab, Pod, run},
    services,
    suite::handler,
};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use tokio::process::Command;

use super::{
    IDLE,
    common::{folder, import_layers, mount, sh},
};

const SOON: Duration = Duration::from_secs(30);

fn config(name: &str, mounts: &[Mount]) -> ContainerConfig {
    ContainerConfig { mounts: mounts.to_vec(), ..lab::container(name, BUSYBOX, IDLE) }
}

async fn started(lab: &Lab, pod: &Pod<'_>, config: ContainerConfig) -> Result<String> {
    let id = pod.create(config).await?;
    lab.cri.start(&id).await.map_err(|e| anyhow::anyhow!("starting: {}", e.message()))?;
    Ok(id)
}

pub(crate) async fn volumes_are_what_was_asked_for(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("volumes", handler()).await?;
    let data = folder(&lab, "data")?;
    fs::create_dir(data.join("sub"))?;
    fs::write(data.join("sub/f"), "sub\n")?;
    fs::write(data.join("file"), "file\n")?;
    let read_only = |mount: Mount| Mount { readonly: true, ..mount };
    let mounts = [
        mount(&data, "/rw"),
        read_only(mount(&data, "/ro")),
        // What the kubelet gives for a subPath.
        mount(&data.join("sub"), "/sub"),
        read_only(mount(&data.join("file"), "/etc/one-file")),
        mount(Path::new("/dev/null"), "/null"),
        Mount {
            host_path: String::new(),
            image: Some(ImageSpec { image: BASH.into() }),
            ..read_only(mount(Path::new(""), "/image"))
        },
    ];
    let one = started(&lab, &pod, config("one", &mounts)).await?;
    let two = started(&lab, &pod, config("two", &[read_only(mount(&data, "/ro"))])).await?;
    for (id, script, expected) in [
        (&one, "cat /sub/f /etc/one-file; echo new > /rw/new; cat /ro/new", "0 sub\nfile\nnew"),
        (&one, "echo x > /null; echo $?; cat /null", "0 0"),
        (&one, "head -1 /image/etc/os-release", "0 ID=lab-bash"),
        (&two, "cat /ro/new", "0 new"),
    ] {
        let out = sh(&lab, id, script).await?;
        ensure!(out == expected, "`{script}` gave {out:?}");
    }
    // A mount that somebody else has for writing is as read-only as before.
    for (id, path) in [(&one, "/ro/x"), (&one, "/etc/one-file"), (&one, "/image/x"), (&two, "/ro/x")] {
        let out = sh(&lab, id, &format!("echo x > {path}")).await?;
        ensure!(out.contains("Read-only file system"), "writing {path} gave {out:?}");
    }
    ensure!(fs::read_to_string(data.join("new"))? == "new\n", "the host does not see what was written");
    pod.remove().await?;
    ensure!(fs::read_to_string(data.join("sub/f"))? == "sub\n", "the volume lost a file");
    Ok(())
}

/// The kubelet's way of changing a ConfigMap, a Secret or a token: a new folder, and one link that is
/// replaced.
fn publish(volume: &Path, version: u32) -> Result<()> {
    let (folder, temporary) = (format!("..{version}"), volume.join("..data_tmp"));
    fs::create_dir(volume.join(&folder))?;
    fs::write(volume.join(&folder).join("key"), format!("version {version}\n"))?;
    symlink(&folder, &temporary)?;
    Ok(fs::rename(temporary, volume.join("..data"))?)
}

pub(crate) async fn updates_of_a_projected_volume_arrive(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("projected", handler()).await?;
    let volume = folder(&lab, "projected")?;
    publish(&volume, 1)?;
    symlink("..data/key", volume.join("key"))?;
    let readonly = Mount { readonly: true, ..mount(&volume, "/etc/config") };
    let id = started(&lab, &pod, config("reads", &[readonly])).await?;
    ensure!(sh(&lab, &id, "cat /etc/config/key").await? == "0 version 1", "it begins with something else");
    for version in 2..5 {
        publish(&volume, version)?;
        fs::remove_dir_all(volume.join(format!("..{}", version - 1)))?;
        let wait = format!(
            "for i in $(seq 100); do grep -q 'version {version}' /etc/config/key && exit; sleep 0.1; done; exit 1"
        );
        let out = sh(&lab, &id, &wait).await?;
        ensure!(out.starts_with("0 "), "version {version} did not arrive in 10 s: {out:?}");
    }
    pod.remove().await
}

pub(crate) async fn mounts_of_the_host_arrive_later(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("propagation", handler()).await?;
    let volume = folder(&lab, "propagation")?;
    for name in ["early", "late"] {
        fs::create_dir(volume.join(name))?;
    }
    let tmpfs = |name: &str| {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "tmpfs"]).arg(volume.join(name));
        mount
    };
    run(&mut tmpfs("early")).await?;
    fs::write(volume.join("early/f"), "early\n")?;
    let slave = Mount {
        propagation: MountPropagation::PropagationHostToContainer.into(),
        ..mount(&volume, "/volume")
    };
    let id = started(&lab, &pod, config("slave", &[slave])).await?;
    ensure!(sh(&lab, &id, "cat /volume/early/f").await? == "0 early", "a mount below the volume is missing");
    run(&mut tmpfs("late")).await?;
    fs::write(volume.join("late/f"), "late\n")?;
    let out = sh(
        &lab,
        &id,
        "for i in $(seq 100); do cat /volume/late/f 2>/dev/null && exit; sleep 0.1; done; exit 1",
    )
    .await?;
    ensure!(out == "0 late", "a mount that came later is seen as {out:?}");
    // Read-only is what was asked to be, not what is mounted below it: as with containers on the host.
    let readonly = Mount { readonly: true, ..mount(&volume, "/volume") };
    let reads = started(&lab, &pod, config("reads", &[readonly])).await?;
    let out =
        sh(&lab, &reads, "cat /volume/early/f && echo x > /volume/early/x && echo x > /volume/x").await?;
    ensure!(
        out.starts_with("1 early") && out.contains("/volume/x: Read-only file system"),
        "below a read-only volume: {out:?}"
    );
    for name in ["early", "late"] {
        run(Command::new("umount").arg("--lazy").arg(volume.join(name))).await?;
    }
    pod.remove().await
}

/// The kubelet asks for `recursiveReadOnly` only where a runtime says that it can, and containerd lets only
/// runc say so: here, the spec says it.
pub(crate) async fn a_volume_can_be_read_only_with_all_below(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("recursive", handler()).await?;
    let volume = folder(&lab, "recursive")?;
    let below = volume.join("below");
    fs::create_dir(&below)?;
    run(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&below)).await?;
    fs::write(below.join("f"), "below\n")?;
    let readonly = Mount { readonly: true, ..mount(&volume, "/volume") };
    let write = "cat /volume/below/f; echo x > /volume/x; echo x > /volume/below/x";
    for (access, writes) in [("rro", false), ("ro", true)] {
        let id = pod.create(config(access, std::slice::from_ref(&readonly))).await?;
        services::change_spec(&id, |spec| {
            for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
                if mount["destination"] == "/volume" {
                    mount["options"] = serde_json::json!(["rbind", "rprivate", access]);
                }
            }
        })
        .await?;
        lab.cri.start(&id).await?;
        let out = sh(&lab, &id, write).await?;
        ensure!(out.contains(" below"), "with {access}, reading below gave {out:?}");
        ensure!(out.contains("/volume/x: Read-only file system"), "with {access}, writing gave {out:?}");
        let refused = out.contains("/volume/below/x: Read-only file system");
        ensure!(refused != writes && below.join("x").exists() == writes, "below, with {access}: {out:?}");
    }
    run(Command::new("umount").arg("--lazy").arg(&below)).await?;
    pod.remove().await
}

/// The mount that the kubelet makes of `emptyDir: {medium: Memory, sizeLimit: 8Mi}`.
pub(crate) async fn a_volume_in_memory_has_its_size(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("memory", handler()).await?;
    let volume = folder(&lab, "memory")?;
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=8388608,mode=0777", "tmpfs"]).arg(&volume))
        .await?;
    let one = started(&lab, &pod, config("one", &[mount(&volume, "/cache")])).await?;
    let out = sh(&lab, &one, "df -k /cache | tail -n 1 | awk '{print $2}'").await?;
    ensure!(out == "0 8192", "its size is {out:?} KiB");
    let out = sh(&lab, &one, "dd if=/dev/zero of=/cache/big bs=1M count=9 2>&1; wc -c < /cache/big").await?;
    ensure!(
        out.contains("No space left on device") && out.ends_with("8388608"),
        "more than it holds gave {out:?}"
    );
    let out = sh(&lab, &one, "rm /cache/big && echo kept > /cache/f").await?;
    ensure!(out == "0 ", "after that, writing gave {out:?}");
    let two = started(&lab, &pod, config("two", &[mount(&volume, "/cache")])).await?;
    let out = sh(&lab, &two, "cat /cache/f; echo too >> /cache/f").await?;
    ensure!(out == "0 kept", "another container reads {out:?}");
    for id in [&one, &two] {
        lab.cri.stop(id, 0).await?;
        lab.cri.remove(id).await.map_err(|e| anyhow::anyhow!("removing: {}", e.message()))?;
    }
    let next = started(&lab, &pod, config("next", &[mount(&volume, "/cache")])).await?;
    let out = sh(&lab, &next, "cat /cache/f").await?;
    ensure!(out == "0 kept\ntoo", "the next container reads {out:?}");
    pod.remove().await?;
    run(Command::new("umount").arg(&volume)).await.context("somebody still uses it").map(drop)
}

pub(crate) async fn what_cannot_be_mounted_is_refused_by_name(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("refused", handler()).await?;
    let volume = folder(&lab, "refused")?;
    let _socket = UnixDatagram::bind(volume.join("dev-log"))?;
    let kvm = volume.join("kvm");
    mknod(&kvm, SFlag::S_IFCHR, Mode::S_IRUSR, makedev(10, 232))?;
    let bidirectional =
        Mount { propagation: MountPropagation::PropagationBidirectional.into(), ..mount(&volume, "/both") };
    for (name, mount, parts) in [
        (
            "socket",
            mount(&volume.join("dev-log"), "/s"),
            ["dev-log, which takes datagrams", "listen on a stream socket or on a port"],
        ),
        ("device", mount(&kvm, "/k"), ["kvm at /k: it is a device of the host", "remove the mount"]),
        ("both", bidirectional, ["/both asks for mount propagation to the host", "HostToContainer or None"]),
    ] {
        let error = match started(&lab, &pod, config(name, &[mount])).await {
            Ok(_) => anyhow::bail!("{name} was mounted"),
            Err(error) => format!("{error:#}"),
        };
        ensure!(parts.iter().all(|part| error.contains(part)), "{name}: {error}");
    }
    pod.remove().await
}

pub(crate) async fn a_root_has_any_number_of_layers(lab: Arc<Lab>) -> Result<()> {
    const LAYERS: u32 = 126;
    let image = import_layers(&lab, "layers", LAYERS).await?;
    let pod = lab.pod("layers", handler()).await?;
    let script = "cat /top /layer-1; echo x > /layer-1 && cat /layer-1";
    let id = pod.container("layers", image.name(), &["/bin/sh", "-c", script]).await?;
    let code = lab.cri.ended(&id, SOON).await?.exit_code;
    let (stdout, stderr) = pod.output("layers")?;
    ensure!(
        code == 0 && stdout == b"1251x\n",
        "{code} {:?} {:?}",
        String::from_utf8_lossy(&stdout),
        String::from_utf8_lossy(&stderr)
    );
    pod.remove().await
}

pub(crate) async fn shared_memory_is_the_pods(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("shm", handler()).await?;
    let (one, two) = (pod.container("one", BUSYBOX, IDLE).await?, pod.container("two", BUSYBOX, IDLE).await?);
    let out = sh(&lab, &one, "echo shared > /dev/shm/f; hostname").await?;
    ensure!(out == format!("0 {}", pod.config.hostname), "the host's name is {out:?}");
    let out = sh(
        &lab,
        &two,
        "cat /dev/shm/f; cat /etc/hostname; grep -c $(hostname) /etc/hosts; test -f /etc/resolv.conf",
    )
    .await?;
    ensure!(out == format!("0 shared\n{}\n1", pod.config.hostname), "the other container sees {out:?}");
    pod.remove().await
}

pub(crate) async fn users_files_survive_a_busy_mount_and_a_killed_daemon(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("busy", handler()).await?;
    let volume = folder(&lab, "precious")?;
    fs::write(volume.join("f"), "precious\n")?;
    let id = started(&lab, &pod, config("one", &[mount(&volume, "/data")])).await?;
    // Somebody on the host who looks, and somebody who has a copy of all mounts.
    let there = lab::folder_of(handler()).join(&pod.id).join("shared/volumes/1");
    ensure!(there.join("f").exists(), "the volume is not where this test looks for it: {}", there.display());
    let mut sits = Command::new("sleep").arg("1000").current_dir(&there).kill_on_drop(true).spawn()?;
    let mut copies = Command::new("unshare").args(["--mount", "sleep", "1000"]).kill_on_drop(true).spawn()?;
    lab.cri.stop(&id, 0).await?;
    lab.cri.remove(&id).await.map_err(|e| anyhow::anyhow!("removing: {}", e.message()))?;
    ensure!(fs::read_to_string(volume.join("f"))? == "precious\n", "it is lost with the container");
    let id = started(&lab, &pod, config("two", &[mount(&volume, "/data")])).await?;
    lab.kill_daemon(handler()).await?;
    lab.restart_daemon(handler()).await?;
    lab.ready_again(&pod.id).await?;
    lab.cri.stop(&id, 0).await?;
    pod.remove().await?;
    ensure!(fs::read_to_string(volume.join("f"))? == "precious\n", "it is lost with the pod");
    sits.kill().await?;
    Ok(copies.kill().await?)
}

pub(crate) async fn a_vm_without_its_file_server_ends(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("virtiofsd", handler()).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    let folder = lab::folder_of(handler()).join(&pod.id);
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(folder.join("shared"))?.permissions());
    ensure!(mode & 0o7777 == 0o700, "others may look into the shared folder: {mode:o}");
    let pid = pod.recorded_pid("/vm/companions/virtiofsd/pid")?.to_string();
    run(Command::new("kill").args(["-9", &pid])).await.context("killing virtiofsd")?;
    let code = lab.cri.ended(&id, SOON).await?.exit_code;
    ensure!(code == 137, "the container's exit code is {code}");
    let (status, info) = lab.cri.pod_status(&pod.id).await?;
    ensure!(status.state() == PodSandboxState::SandboxNotready, "the pod is {:?}", status.state());
    let said = info.get("kuasar").context("the pod's status tells nothing")?;
    ensure!(
        said.contains("because virtiofsd ended with status 137"),
        "the pod's status does not say why: {said}"
    );
    pod.remove().await
}
