//! Everything that a file has beside its bytes: capabilities, attributes, access lists, what its mount
//! forbids.

use std::{
    ffi::CString,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, chown},
    },
    path::Path,
    sync::Arc,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use kuasar_e2e::{
    cri::{ContainerConfig, Int64Value, LinuxContainerSecurityContext, Mount},
    image::{BUSYBOX, Image, Layer},
    lab::{self, Lab, Pod, QEMU_INITRD, own_pids, run},
    services,
    suite::handler,
};
use tokio::process::Command;

use super::{
    IDLE,
    common::{folder, mount, privileged_pod, sh},
};

/// A container of a user.
fn of_user(name: &str, image: &str, (user, group): (i64, i64), mounts: &[Mount]) -> ContainerConfig {
    let mut config = lab::container(name, image, &["/bin/sleep", "1000"]);
    let id = |value| Some(Int64Value { value });
    config.linux.get_or_insert_default().security_context = Some(LinuxContainerSecurityContext {
        namespace_options: Some(own_pids()),
        run_as_user: id(user),
        run_as_group: id(group),
        ..Default::default()
    });
    ContainerConfig { mounts: mounts.to_vec(), ..config }
}

async fn started(lab: &Lab, pod: &Pod<'_>, config: ContainerConfig) -> Result<String> {
    let id = pod.create(config).await?;
    lab.cri.start(&id).await.map_err(|e| anyhow!("starting: {}", e.message()))?;
    Ok(id)
}

/// `security.capability`, version 2, effective: to use ports below 1024 and raw sockets.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Busybox, and a program of it with capabilities, on which `grep` of other images depends not at all.
async fn capable(lab: &Lab) -> Result<Image> {
    let busybox = fs::read(lab.paths.tool("busybox"))?;
    let mut base =
        Layer::new().dir("bin", 0o755)?.dir("caps", 0o755)?.file("bin/busybox", 0o755, &busybox)?;
    for applet in ["sh", "sleep", "grep", "cat", "chmod", "mkdir", "mount", "touch", "ls"] {
        base = base.link(&format!("bin/{applet}"), "busybox")?;
    }
    let program =
        Layer::new().file_with("caps/grep", 0o755, &busybox, ("security.capability", &CAPABILITY))?;
    let image = Image::new("kuasar.test/capable:1", &["/bin/sh"]).layer(base)?.layer(program)?;
    let file = lab.machine.root.join("images/capable.tar");
    image.write(&file)?;
    run(lab.ctr().args(["images", "import", "--local", "--no-unpack"]).arg(&file)).await?;
    Ok(image)
}

pub(crate) async fn capabilities_of_files_hold(lab: Arc<Lab>) -> Result<()> {
    let image = capable(&lab).await?;
    let pod = lab.pod("capable", handler()).await?;
    let id = started(&lab, &pod, of_user("capable", image.name(), (1000, 1000), &[])).await?;
    for (program, expected) in [("/caps/grep", "0000000000002400"), ("/bin/grep", "0000000000000000")] {
        let out = sh(&lab, &id, &format!("{program} CapEff /proc/self/status")).await?;
        ensure!(out == format!("0 CapEff:\t{expected}"), "{program} runs with {out:?}");
    }
    pod.remove().await
}

/// Works as a builder of images does in a pod: the upper folder of an overlay is in a volume, and all that a
/// file has goes there.
pub(crate) async fn an_overlay_has_its_upper_folder_in_a_volume(lab: Arc<Lab>) -> Result<()> {
    let image = capable(&lab).await?;
    let pod = privileged_pod(&lab, "overlay").await?;
    let volume = folder(&lab, "overlay")?;
    let id = pod.create(privileged("overlay", image.name(), &[mount(&volume, "/v")])).await?;
    lab.cri.start(&id).await.map_err(|e| anyhow!("starting: {}", e.message()))?;
    let script = "mkdir /v/upper /v/work /merged && mount -t overlay overlay -o \
        lowerdir=/caps:/bin,upperdir=/v/upper,workdir=/v/work /merged && chmod 700 /merged/grep && \
        rm=$(/bin/busybox rm /merged/sleep 2>&1); ls /merged/sleep; /merged/grep CapPrm /proc/self/status; \
        /bin/busybox ls -l /v/upper/sleep";
    let out = sh(&lab, &id, script).await?;
    ensure!(out.contains("ls: /merged/sleep: No such file"), "a file that was removed is there: {out:?}");
    ensure!(out.contains("/v/upper/sleep") && out.contains("0,   0"), "there is no white-out: {out:?}");
    // Its capabilities it loses: the file server sets the owner of a copy last (docs/storage.md).
    let mode = fs::metadata(volume.join("upper/grep"))?.permissions().mode() & 0o777;
    ensure!(mode == 0o700, "the copy has the mode {mode:o}");
    pod.remove().await
}

/// A container that may use all devices, as `privileged` with all of them allowed.
fn privileged(name: &str, image: &str, mounts: &[Mount]) -> ContainerConfig {
    let mut config = lab::container(name, image, &["/bin/sleep", "1000"]);
    config.linux.get_or_insert_default().security_context = Some(LinuxContainerSecurityContext {
        namespace_options: Some(own_pids()),
        privileged: true,
        ..Default::default()
    });
    ContainerConfig { mounts: mounts.to_vec(), ..config }
}

fn names(path: &Path, name: &str) -> Result<(CString, CString)> {
    Ok((CString::new(path.as_os_str().as_bytes())?, CString::new(name)?))
}

/// Gives a file an access list: tag, rights, id of each entry (`linux/posix_acl.h`).
fn set_acl(path: &Path, entries: &[(u16, u16, u32)]) -> Result<()> {
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        value.extend([tag.to_le_bytes(), rights.to_le_bytes()].concat());
        value.extend(id.to_le_bytes());
    }
    let (path, name) = names(path, "system.posix_acl_access")?;
    // SAFETY: both names end, and the kernel reads what the value has.
    let done =
        unsafe { nix::libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    if done == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error()).with_context(|| format!("giving {path:?} an access list"))
}

/// In both directions: who is named may, though the mode says no; who is denied may not, though the mode
/// seems to say yes. With volumes that are file systems of their own in the guest, and with one for all.
pub(crate) async fn access_lists_of_a_volume_hold(lab: Arc<Lab>) -> Result<()> {
    for handler in [handler(), QEMU_INITRD] {
        lists_hold(&lab, handler).await.with_context(|| format!("with the handler {handler}"))?;
    }
    Ok(())
}

async fn lists_hold(lab: &Lab, handler: &str) -> Result<()> {
    const NOBODY: u32 = u32::MAX;
    let (user_obj, user, group_obj, mask, other) = (1, 2, 4, 0x10, 0x20);
    let pod = lab.pod("lists", handler).await?;
    let volume = folder(lab, &format!("lists-{handler}"))?;
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o755))?;
    let secret = volume.join("secret");
    fs::write(&secret, "secret\n")?;
    chown(&secret, Some(0), Some(4242))?;
    // The bits of the group are the mask's from here on: rw-rw----.
    let list = [
        (user_obj, 6, NOBODY),
        (user, 6, 1000),
        (group_obj, 0, NOBODY),
        (mask, 6, NOBODY),
        (other, 0, NOBODY),
    ];
    set_acl(&secret, &list)?;
    let mounts = [mount(&volume, "/v")];
    let named = started(lab, &pod, of_user("named", BUSYBOX, (1000, 1000), &mounts)).await?;
    let denied = started(lab, &pod, of_user("denied", BUSYBOX, (1001, 4242), &mounts)).await?;
    let out = sh(lab, &named, "cat /v/secret && echo more >> /v/secret").await?;
    ensure!(out == "0 secret", "the user whom the list names gets {out:?}");
    let out = sh(lab, &denied, "cat /v/secret").await?;
    ensure!(out.contains("Permission denied"), "a member of the group that the list denies gets {out:?}");
    ensure!(fs::read_to_string(&secret)? == "secret\nmore\n", "the host does not see what was written");
    pod.remove().await
}

/// A volume whose mount forbids to execute programs, and to take on a file's owner, forbids it in the pod as
/// well.
pub(crate) async fn what_a_mount_forbids_is_forbidden(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("forbids", handler()).await?;
    // busybox gives up what it was not made for; this keeps it.
    let (busybox, bash) = (lab.paths.tool("busybox"), lab.paths.tool("bash-static"));
    for (options, executes, becomes_root) in
        [("exec", true, true), ("noexec,nosuid", false, false), ("nosuid", true, false)]
    {
        let name = format!("forbids-{}", options.replace(',', "-"));
        let volume = folder(&lab, &name)?;
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("mode=0777,{options}"), "tmpfs"])
            .arg(&volume))
        .await?;
        for (program, from, mode) in [("id", &busybox, 0o755), ("su-bash", &bash, 0o4755)] {
            fs::copy(from, volume.join(program))?;
            fs::set_permissions(volume.join(program), fs::Permissions::from_mode(mode))?;
        }
        let id = started(&lab, &pod, of_user(&name, BUSYBOX, (1000, 1000), &[mount(&volume, "/v")])).await?;
        let out = sh(&lab, &id, "/v/id -u").await?;
        ensure!((out == "0 1000") == executes, "on {options}, a program says {out:?}");
        ensure!(executes || out.contains("Permission denied"), "on {options}, a program says {out:?}");
        let who = "/v/su-bash -p -c 'while read -r l; do case $l in Uid:*) echo \"$l\";; esac; done </proc/self/status'";
        let out = sh(&lab, &id, who).await?;
        ensure!(
            out.contains("Uid:\t1000\t0\t") == becomes_root,
            "on {options}, a program of root's says {out:?}"
        );
        lab.cri.stop(&id, 0).await?;
        lab.cri.remove(&id).await?;
        run(Command::new("umount").arg("--lazy").arg(&volume)).await?;
    }
    pod.remove().await
}

/// A file that the guest remembers is no open file of the host: all are found, and the pod goes on.
pub(crate) async fn many_files_are_all_found(lab: Arc<Lab>) -> Result<()> {
    const FILES: u32 = 20_000;
    let pod = lab.pod("many", handler()).await?;
    let volume = folder(&lab, "many")?;
    for number in 0..FILES {
        fs::File::create(volume.join(format!("f{number}")))?;
    }
    let walks =
        ContainerConfig { mounts: vec![mount(&volume, "/d")], ..lab::container("walks", BUSYBOX, IDLE) };
    let walks = started(&lab, &pod, walks).await?;
    let other = pod.container("other", BUSYBOX, IDLE).await?;
    let out = sh(&lab, &walks, "find /d -type f | wc -l").await?;
    ensure!(out == format!("0 {FILES}"), "of {FILES} files, there are {out:?}");
    let out = sh(&lab, &other, "echo lives").await?;
    ensure!(out == "0 lives", "then another container says {out:?}");
    let server = pod.recorded_pid("/vm/companions/virtiofsd/pid")?;
    let children = fs::read_to_string(format!("/proc/{server}/task/{server}/children"))?;
    let serving = children.split_whitespace().next().context("virtiofsd is no process with a child")?;
    let open = fs::read_dir(format!("/proc/{serving}/fd"))?.count();
    ensure!(open < 1000, "virtiofsd has {open} open files");
    pod.remove().await
}

/// Looks for the devices that privileged programs look for: the guest's own, and none of the host's.
pub(crate) async fn privileged_containers_have_the_guests_devices(lab: Arc<Lab>) -> Result<()> {
    let pod = privileged_pod(&lab, "privileged").await?;
    let id = pod.create(privileged("all", BUSYBOX, &[])).await?;
    services::change_spec(&id, |spec| {
        if let Some(devices) = spec.pointer_mut("/linux/resources/devices") {
            *devices = serde_json::json!([{"allow": true, "access": "rwm"}]);
        }
    })
    .await?;
    lab.cri.start(&id).await.map_err(|e| anyhow!("starting: {}", e.message()))?;
    let script = "stat -c '%F %t:%T' /dev/fuse; exec 3<>/dev/fuse && echo open; ls /dev";
    let out = sh(&lab, &id, script).await?;
    ensure!(out.starts_with("0 character special file a:e5\nopen"), "a privileged container has {out:?}");
    let Some(disk) = fs::read_dir("/sys/block")?.next() else {
        bail!("this machine has no disk to look for")
    };
    let disk = disk?.file_name().into_string().map_err(|name| anyhow!("{name:?}"))?;
    ensure!(!out.lines().any(|line| line == disk), "it has the host's {disk}: {out:?}");
    pod.remove().await
}
