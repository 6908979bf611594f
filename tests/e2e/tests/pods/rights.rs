//! The rights that a pod's processes have on the host, process by process: the table of
//! docs/security-model.md.

use std::{
    collections::BTreeMap, fs, os::unix::process::CommandExt, path::Path, process::Command, sync::Arc,
};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    image::BUSYBOX,
    lab::{Lab, Pod, QEMU, folder_of},
    suite::handler,
};

use crate::IDLE;

/// `CAP_CHOWN`, `DAC_OVERRIDE`, `FOWNER`, `FSETID`, `SETGID`, `SETUID` and `SETFCAP`, and `DAC_READ_SEARCH`,
/// which virtiofsd keeps where it opens files by handles.
const FILE_SERVER: u64 = 0x8000_00df;
/// Rights that virtiofsd begins with, and could not get back: besides, `SETPCAP`, `SYS_CHROOT`, `SYS_ADMIN`
/// and `SYS_RESOURCE`.
const FILE_SERVER_BOUND: u64 = FILE_SERVER | 1 << 8 | 1 << 18 | 1 << 21 | 1 << 24;
/// `CAP_DAC_OVERRIDE`, `KILL`, `SETGID` and `SETUID`.
const RELAY: u64 = 0xe2;

/// One row of the table.
struct Row {
    name: &'static str,
    pid: &'static str,
    /// It is the child of that process.
    child: bool,
    /// It is the pod's user, and not root.
    own_user: bool,
    effective: u64,
    bounding: u64,
    filtered: bool,
    namespaces: &'static [&'static str],
}

const TABLE: [Row; 5] = [
    Row {
        name: "QEMU",
        pid: "/vm/vmm/pid",
        child: false,
        own_user: true,
        effective: 0,
        bounding: 0,
        filtered: true,
        namespaces: &["mnt", "pid", "ipc", "uts", "net"],
    },
    Row {
        name: "vhost-device-vsock",
        pid: "/vm/companions/vhost-device-vsock/pid",
        child: false,
        own_user: true,
        effective: 0,
        bounding: 0,
        filtered: true,
        namespaces: &["mnt", "pid", "ipc", "uts", "net"],
    },
    Row {
        name: "virtiofsd",
        pid: "/vm/companions/virtiofsd/pid",
        child: true,
        own_user: false,
        effective: FILE_SERVER,
        bounding: FILE_SERVER_BOUND,
        filtered: true,
        namespaces: &["mnt", "pid", "ipc", "uts", "net"],
    },
    // It waits for the other one, and can do nothing.
    Row {
        name: "virtiofsd's parent",
        pid: "/vm/companions/virtiofsd/pid",
        child: false,
        own_user: false,
        effective: 0,
        bounding: FILE_SERVER_BOUND,
        filtered: false,
        namespaces: &["ipc", "uts"],
    },
    Row {
        name: "the relay",
        pid: "/relay/pid",
        child: false,
        own_user: false,
        effective: RELAY,
        bounding: RELAY,
        filtered: false,
        namespaces: &["ipc", "uts"],
    },
];

/// Each process of a pod has what the table gives it, and the user of one pod reaches nothing of another's.
pub(crate) async fn processes_have_only_what_they_need(lab: Arc<Lab>) -> Result<()> {
    let one = lab.pod("rights-one", handler()).await?;
    one.container("idle", BUSYBOX, IDLE).await?;
    let other = lab.pod("rights-other", handler()).await?;
    for row in &TABLE {
        check(&one, row)?;
    }
    let (user, others) = (user_of(&one)?, user_of(&other)?);
    ensure!(user != others, "both pods have the user {user}");
    let (own, of_other) = (folder_of(QEMU).join(&one.id), folder_of(QEMU).join(&other.id));
    for path in [of_other.clone(), of_other.join("vs"), of_other.join("vs/s"), own.join("token")] {
        ensure!(
            !may(user, &["ls", "-d"], &path.join("."))? && !may(user, &["cat"], &path)?,
            "{}",
            path.display()
        );
    }
    one.remove().await?;
    other.remove().await
}

fn user_of(pod: &Pod<'_>) -> Result<u32> {
    let user = pod.record()?.pointer("/user").and_then(serde_json::Value::as_u64);
    Ok(u32::try_from(user.context("no user is recorded")?)?)
}

/// Returns true if a user, and nobody more, can do something with a path.
fn may(user: u32, command: &[&str], path: &Path) -> Result<bool> {
    let (program, args) = command.split_first().context("no command")?;
    let mut command = Command::new(program);
    Ok(command.args(args).arg(path).uid(user).gid(user).output()?.status.success())
}

fn child_of(pid: i32) -> Result<i32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    Ok(children.split_whitespace().next().with_context(|| format!("process {pid} has no child"))?.parse()?)
}

fn check(pod: &Pod<'_>, row: &Row) -> Result<()> {
    let vsock = row.pid.contains("vhost-device-vsock");
    let pid = match pod.recorded_pid(row.pid) {
        // The kernel's own vsock has no process.
        Err(_) if vsock && Path::new("/dev/vhost-vsock").exists() => return Ok(()),
        pid => pid?,
    };
    let pid = if row.child { child_of(pid)? } else { pid };
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let status: BTreeMap<_, _> = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key, value.trim()))
        .collect();
    let name = row.name;
    let has = |key| status.get(key).copied().with_context(|| format!("{name} has no {key}"));
    let user = if row.own_user { user_of(pod)? } else { 0 };
    let ids = [user.to_string().as_str(); 4].join("\t");
    ensure!(has("Uid")? == ids && has("Gid")? == ids, "{name}: {} {}", has("Uid")?, has("Gid")?);
    if row.own_user {
        ensure!(has("Groups")?.is_empty(), "{name}: groups {}", has("Groups")?);
    }
    for (key, most) in [
        ("CapInh", 0),
        ("CapAmb", 0),
        ("CapPrm", row.effective),
        ("CapEff", row.effective),
        ("CapBnd", row.bounding),
    ] {
        let set = u64::from_str_radix(has(key)?, 16)?;
        ensure!(set & !most == 0, "{name}: {key} is {set:x}, and {most:x} is the most");
    }
    ensure!(has("NoNewPrivs")? == "1", "{name} may gain privileges");
    ensure!(!row.filtered || has("Seccomp")? == "2", "{name} has no filter of system calls");
    for namespace in row.namespaces {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}"));
        ensure!(of(&pid.to_string())? != of("self")?, "{name} is in the host's namespace {namespace}");
    }
    if row.own_user {
        let root = Path::new("/proc").join(pid.to_string()).join("root");
        for hidden in ["run/containerd", "var", "sys/kernel", "etc/passwd", "boot"] {
            ensure!(!root.join(hidden).exists(), "{name} sees /{hidden}");
        }
    }
    Ok(())
}
