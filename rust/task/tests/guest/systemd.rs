//! The agent as a service of systemd: a root made of this machine's own systemd, the image's agent and runc,
//! and the unit.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use containerd_shim_protos::shim_async::TaskClient;
use kuasar_common::stdio::Stream;
use tempfile::TempDir;

use crate::{
    execs, failures,
    given::{Given, Kind},
    life,
    pod::Pod,
    sandbox, shutdown, step,
    vm::{Vm, read_frame},
};

const UNIT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/systemd/vmm-task.service");

/// Parts of systemd: its programs, and the units that any system has.
const PROGRAMS: [&str; 4] = ["systemd", "systemd-journald", "systemd-shutdown", "systemd-cgroups-agent"];
const UNITS: [&str; 19] = [
    "basic.target",
    "dev-mqueue.mount",
    "final.target",
    "local-fs-pre.target",
    "local-fs.target",
    "multi-user.target",
    "paths.target",
    "reboot.target",
    "shutdown.target",
    "slices.target",
    "sockets.target",
    "swap.target",
    "sysinit.target",
    "systemd-journald-dev-log.socket",
    "systemd-journald.service",
    "systemd-journald.socket",
    "systemd-reboot.service",
    "timers.target",
    "umount.target",
];

/// Another service, with limits of its own: systemd passes controllers on for it, and would take them back
/// with its end.
const OTHER: &str = "[Service]\nType=forking\nExecStart=/bin/busybox sh -c '/bin/busybox sleep 1000 &'\nMemoryMax=20M\n\
                     TasksMax=9\nCPUWeight=50\nIOWeight=50\nAllowedCPUs=0\n";

/// A disk with a root whose process 1 is systemd.
fn disk(given: &Given, dir: &Path) -> PathBuf {
    let root = dir.join("root");
    for folder in [
        "dev",
        "etc/systemd/system",
        "proc",
        "run",
        "sys",
        "tmp",
        "usr/bin",
        "usr/lib64",
        "usr/lib/systemd/system",
        "var/log",
    ] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    for (link, target) in
        [("bin", "usr/bin"), ("sbin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")]
    {
        symlink(target, root.join(link)).unwrap();
    }
    let from = Path::new("/lib/systemd");
    assert!(from.join("systemd").exists(), "no systemd here to make a root of: run tests/lab/setup --check");
    for name in PROGRAMS {
        install(&root, &from.join(name));
    }
    install(&root, Path::new("/bin/systemctl"));
    copy(&given.busybox, &root.join("usr/bin/busybox"));
    for (name, target) in [("init", "/lib/systemd/systemd"), ("mount", "busybox"), ("umount", "busybox")] {
        symlink(target, root.join("usr/bin").join(name)).unwrap();
    }
    for name in UNITS {
        copy(&from.join("system").join(name), &root.join("usr/lib/systemd/system").join(name));
    }
    let units = root.join("etc/systemd/system");
    let enable = |target: &str, unit: &str| {
        let wants = units.join(format!("{target}.target.wants"));
        fs::create_dir_all(&wants).unwrap();
        let at = if units.join(unit).exists() { "/etc/systemd/system" } else { "/lib/systemd/system" };
        symlink(format!("{at}/{unit}"), wants.join(unit)).unwrap();
    };
    symlink("/lib/systemd/system/multi-user.target", units.join("default.target")).unwrap();
    copy(Path::new(UNIT), &units.join("vmm-task.service"));
    fs::write(units.join("other.service"), OTHER).unwrap();
    enable("multi-user", "vmm-task.service");
    enable("sysinit", "dev-mqueue.mount");
    enable("sysinit", "systemd-journald.service");
    enable("sockets", "systemd-journald.socket");
    enable("sockets", "systemd-journald-dev-log.socket");
    given.program("/sbin/init", &root.join("usr/bin/vmm-task"));
    given.program("/bin/runc", &root.join("usr/bin/runc"));
    for (name, text) in [
        ("machine-id", ""),
        ("os-release", "ID=test\n"),
        ("passwd", "root:x:0:0::/:\n"),
        ("group", "root:x:0:\n"),
    ] {
        fs::write(root.join("etc").join(name), text).unwrap();
    }
    symlink("/run/kuasar/resolv.conf", root.join("etc/resolv.conf")).unwrap();
    let disk = dir.join("systemd.img");
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-qF", "-t", "ext4", "-E", "root_owner=0:0", "-d"]).arg(&root).arg(&disk).arg("96M");
    assert!(mke2fs.status().unwrap().success());
    disk
}

fn copy(from: &Path, to: &Path) {
    fs::copy(from, to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
    fs::set_permissions(to, fs::metadata(from).unwrap().permissions()).unwrap();
}

/// Copies a program, and its libraries to where it looks for them.
fn install(root: &Path, program: &Path) {
    let ldd = Command::new("ldd").arg(program).output().unwrap();
    let said = String::from_utf8(ldd.stdout).unwrap();
    let libraries =
        said.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    for file in libraries.map(Path::new).chain([program]) {
        let below = file.strip_prefix("/").unwrap();
        let to = root.join(below.strip_prefix("usr").unwrap_or(below));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        if !to.exists() {
            copy(file, &to);
        }
    }
}

/// Boots it; the folder has the disk.
fn boot(cmdline: &str) -> (Given, Vm, TempDir) {
    let mut given = crate::given();
    let dir = TempDir::new().unwrap();
    given.disk = Some(disk(&given, dir.path()));
    let vm = Vm::boot(&given, Kind::PlainDisk, &format!("{cmdline} task.log_level=info"), true);
    (given, vm, dir)
}

fn pod() -> (Pod, TempDir) {
    let (given, vm, dir) = boot("task.debug");
    let task = TaskClient::new(vm.client());
    (Pod { given, vm, task }, dir)
}

#[tokio::test]
#[ignore = "needs a guest: set KUASAR_IMAGE"]
async fn a_pod_lives_with_systemd_as_process_1() {
    let (pod, _dir) = pod();
    assert_eq!(file(&pod, "/proc/1/comm").await, "systemd\n");
    let active = in_vm(&pod, "/bin/systemctl is-active vmm-task.service").await;
    assert_eq!(active, "active\n");
    let mounts = file(&pod, "/proc/mounts").await;
    for target in ["/proc", "/sys", "/dev", "/run", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys/fs/cgroup"] {
        let times = mounts.lines().filter(|line| line.split(' ').nth(1) == Some(target)).count();
        assert_eq!(times, 1, "mounts of {target}: {mounts}");
    }
    // systemd's own would be half of the memory.
    let shm = mounts.lines().find(|line| line.contains(" /dev/shm ")).unwrap();
    assert!(shm.ends_with(",size=65536k 0 0"), "{shm}");
    as_in_any_guest(&pod).await;
    beside_other_services(&pod).await;
    // A second one finds its ports taken, and ends nothing but itself.
    let second = in_vm(&pod, "/bin/vmm-task").await;
    assert!(second.starts_with("vmm-task: the agent gives up: listening on vsock port 1024: "), "{second}");
    shutdown(&pod).await;
}

/// Takes a pod through the steps that work in any guest.
async fn as_in_any_guest(pod: &Pod) {
    let at = Instant::now();
    sandbox(pod).await;
    life(pod).await;
    execs(pod).await;
    failures(pod).await;
    step("as with the agent as process 1", at);
}

/// systemd starts, stops and forgets services of its own; a container beside them keeps its limits, and is
/// the agent's child.
async fn beside_other_services(pod: &Pod) {
    let agent = in_vm(pod, "/bin/systemctl show --property=MainPID --value vmm-task.service").await;
    let init = pod.create("beside", &["sleep", "1000"], false, false).await.unwrap();
    pod.start("beside", "").await.unwrap();
    let status = file(pod, &format!("/proc/{init}/status")).await;
    assert!(status.contains(&format!("PPid:\t{}\n", agent.trim())), "the agent is {agent}: {status}");
    assert_eq!(file(pod, &format!("/proc/{init}/cgroup")).await, "0::/kuasar/beside\n");
    let limits = async || {
        let mut limits = String::new();
        for name in ["memory.max", "pids.max", "cgroup.controllers"] {
            limits += &file(pod, &format!("/sys/fs/cgroup/kuasar/beside/{name}")).await;
        }
        limits
    };
    let before = limits().await;
    assert!(before.starts_with("67108864\n64\n") && before.contains("cpuset cpu io memory"), "{before}");
    for words in ["start other.service", "stop other.service", "daemon-reload", "start other.service"] {
        assert_eq!(in_vm(pod, &format!("/bin/systemctl {words}")).await, "", "{words}");
        assert_eq!(limits().await, before, "after {words}");
    }
    // Its orphan is process 1's, not the agent's.
    let orphan = file(pod, "/sys/fs/cgroup/system.slice/other.service/cgroup.procs").await;
    let status = file(pod, &format!("/proc/{}/status", orphan.trim())).await;
    assert!(status.contains("PPid:\t1\n"), "{status}");
    pod.kill("beside", "", 9, true).await.unwrap();
    assert_eq!(pod.wait("beside", "").await.unwrap(), 137);
    pod.delete("beside", "").await.unwrap();
}

#[tokio::test]
#[ignore = "needs a guest: set KUASAR_IMAGE"]
async fn a_service_that_is_stopped_takes_its_pod_and_the_guest_along() {
    let (mut pod, _dir) = pod();
    let script = "trap 'echo told; exit 0' TERM; echo ready; while true; do sleep 0.1; done";
    pod.create("end", &["sh", "-c", script], false, false).await.unwrap();
    pod.start("end", "").await.unwrap();
    let mut output = pod.vm.stream("end", "", Stream::Stdout);
    assert_eq!(read_frame(&mut output), b"ready\n");
    // The agent may be told to end before systemctl has ended, and its answer is lost with it.
    match pod.vm.run("/bin/systemctl stop --no-block vmm-task.service").await {
        Ok(answer) => assert_eq!(answer.out, ""),
        Err(error) => assert!(matches!(error, ttrpc::Error::Socket(_)), "{error}"),
    }
    assert_eq!(read_frame(&mut output), b"told\n");
    assert!(pod.vm.ended(Duration::from_secs(60)), "QEMU goes on: {}", pod.vm.console());
    let console = pod.vm.console();
    assert!(console.contains("vmm-task: told to end by a signal"), "{console}");
    assert!(
        console.contains("All filesystems unmounted") && console.contains("reboot: Restarting system"),
        "{console}"
    );
}

async fn file(pod: &Pod, path: &str) -> String {
    in_vm(pod, &format!("/bin/busybox cat {path}")).await
}

async fn in_vm(pod: &Pod, command: &str) -> String {
    pod.vm.run(command).await.unwrap().out
}

#[test]
#[ignore = "needs a guest: set KUASAR_IMAGE"]
fn a_service_that_gives_up_ends_the_guest() {
    let (_given, mut vm, _dir) = boot("task.cgroup=v1");
    let fatal = vm.line();
    assert!(
        fatal.contains("task.cgroup=v1: process 1 of this guest is systemd, which has cgroups of version 2;"),
        "{fatal}"
    );
    assert!(vm.ended(Duration::from_secs(60)), "QEMU goes on: {}", vm.console());
    let console = vm.console();
    assert!(console.contains("the agent gives up: task.cgroup=v1"), "{console}");
}
