//! The daemon as a service: systemd as PID 1, cgroup v2 alone, pods in slices as a kubelet's systemd driver
//! makes them. It writes units, so it wants a machine that nobody else uses: `tests/lab/machine --systemd`
//! makes one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    future::Future,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use kuasar_e2e::{
    cri::{
        Cri, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, PodSandboxConfig, PodSandboxMetadata,
        PodSandboxState,
    },
    image::BUSYBOX,
    lab::{self, Containerd, QEMU, SOCKET},
    machine::Machine,
    paths::Paths,
};
use tokio::time::sleep;

const DAEMON: &str = "kuasar@qemu.service";
/// Of which the daemon is an instance.
const UNIT: &str = "kuasar@.service";
const CONTAINERD: &str = "containerd.service";
/// As kubelet names a pod's.
const SLICE: &str = "kubepods-besteffort-pod0123.slice";
const SLICE_PATH: &str = "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod0123.slice";
/// An emulated machine in which VMs run takes its time.
const PATIENCE: Duration = Duration::from_secs(180);
const IDLE: [&str; 3] = ["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done"];

#[tokio::test]
#[ignore = "needs systemd as PID 1 in a machine of its own: tests/lab/check machine"]
async fn the_daemon_is_a_service() {
    assert_eq!(fs::read_to_string("/proc/1/comm").unwrap().trim(), "systemd", "PID 1");
    let root = tempfile::tempdir().unwrap();
    let (machine, paths) = (Machine { root: root.path().to_owned() }, Paths::find().unwrap());
    write_units(&machine, &paths);
    systemctl(&["daemon-reload"]);
    systemctl(&["enable", DAEMON]);

    // Who starts containerd gets the daemon first, ready.
    systemctl(&["start", CONTAINERD]);
    assert!(since_boot(DAEMON) < since_boot(CONTAINERD), "containerd was up before the daemon");
    println!("both are up");
    let cri = ready().await;
    lab::import_images(&machine, &paths).await.unwrap();

    systemctl(&["start", SLICE]);
    let config = pod_config(root.path());
    let pod = cri.run_pod(&config, QEMU).await.unwrap_or_else(|e| panic!("{}", complaint(&e)));
    let idle = lab::container("idle", BUSYBOX, &IDLE);
    let idle = cri.create(&pod, &config, idle).await.unwrap();
    cri.start(&idle).await.unwrap();
    println!("a pod runs");
    is_in_its_slice(&pod);
    // systemd goes over its cgroups when something changes, and ours are not units of its own.
    systemctl(&["daemon-reload"]);
    systemctl(&["set-property", "--runtime", SLICE, "CPUWeight=50", "MemoryMax=1G"]);
    is_in_its_slice(&pod);
    goes_on(&cri, &pod, &idle).await;

    let first = main_pid(DAEMON);
    systemctl(&["restart", DAEMON]);
    assert_ne!(main_pid(DAEMON), first);
    goes_on(&cri, &pod, &idle).await;
    println!("the daemon was restarted");

    let second = main_pid(DAEMON);
    systemctl(&["kill", "--signal=KILL", "--kill-whom=main", DAEMON]);
    until("systemd has started the killed daemon again", async || {
        is_active(DAEMON) && main_pid(DAEMON) != second
    })
    .await;
    goes_on(&cri, &pod, &idle).await;
    println!("the daemon was killed");

    // One that hangs is found by the watchdog.
    let third = main_pid(DAEMON);
    systemctl(&["kill", "--signal=STOP", "--kill-whom=main", DAEMON]);
    until("the watchdog has replaced the hung daemon", async || {
        is_active(DAEMON) && main_pid(DAEMON) != third
    })
    .await;
    assert!(journal(DAEMON).contains("Watchdog timeout"), "{}", journal(DAEMON));
    goes_on(&cri, &pod, &idle).await;
    println!("the daemon hung");

    systemctl(&["restart", CONTAINERD]);
    let cri = ready().await;
    goes_on(&cri, &pod, &idle).await;
    // As when the node's software is replaced: nothing of ours is there for a while.
    systemctl(&["stop", CONTAINERD, DAEMON]);
    systemctl(&["start", CONTAINERD]);
    let cri = ready().await;
    goes_on(&cri, &pod, &idle).await;
    is_in_its_slice(&pod);
    println!("both were restarted");

    cri.stop_pod(&pod).await.unwrap();
    cri.remove_pod(&pod).await.unwrap();
    let left: Vec<_> =
        fs::read_dir(cgroup()).unwrap().flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect();
    assert!(left.is_empty(), "left: {left:?}");
    assert!(fs::read_to_string(cgroup().join("cgroup.procs")).unwrap().is_empty());
    systemctl(&["stop", CONTAINERD, DAEMON]);
    println!("{}", journal(DAEMON));
}

fn write_units(machine: &Machine, paths: &Paths) {
    lab::make_folders(machine).unwrap();
    fs::create_dir_all("/etc/kuasar").unwrap();
    let config = toml::to_string(&lab::daemon_config(paths, &[]).unwrap()).unwrap();
    fs::write("/etc/kuasar/qemu.toml", config).unwrap();
    // The unit as it is: of the package, or, with a program that cargo built, of the repository.
    let of_package =
        paths.sandboxer.parent().unwrap().parent().unwrap().join("lib/systemd/system").join(UNIT);
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../../rust/sandboxer/systemd/kuasar@.service");
    let text = fs::read_to_string(&of_package).unwrap_or_else(|_| {
        let text = fs::read_to_string(source).unwrap();
        text.replace("/usr/bin/vmm-sandboxer", paths.sandboxer.to_str().unwrap())
    });
    fs::write(Path::new("/etc/systemd/system").join(UNIT), text).unwrap();
    let config = lab::write_containerd_config(machine, paths, &Containerd::default()).unwrap();
    let unit = format!(
        "[Unit]\nAfter=local-fs.target\n[Service]\nType=notify\nExecStart={} --config {}\nEnvironment=PATH={}\n\
         Delegate=yes\nKillMode=process\nTasksMax=infinity\nOOMScoreAdjust=-999\n",
        paths.tool("containerd").display(),
        config.display(),
        lab::search_path(paths),
    );
    fs::write(Path::new("/etc/systemd/system").join(CONTAINERD), unit).unwrap();
    let slice = Path::new("/etc/systemd/system").join(SLICE);
    fs::write(slice, "[Slice]\nCPUAccounting=yes\nMemoryAccounting=yes\n").unwrap();
}

/// VMM, companions and relay, and the guest's processor, each where it belongs.
fn is_in_its_slice(pod: &str) {
    let record = fs::read(lab::folder_of(QEMU).join(pod).join("pod.json")).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    let companions = record.pointer("/vm/companions").and_then(|all| all.as_object()).unwrap();
    assert!(companions.contains_key("virtiofsd"), "{record}");
    let processes = ["/vm/vmm", "/relay"].map(|path| record.pointer(path).unwrap());
    for process in processes.into_iter().chain(companions.values()) {
        let own = fs::read_to_string(format!("/proc/{}/cgroup", process["pid"])).unwrap();
        assert_eq!(
            own.trim(),
            format!("0::{SLICE_PATH}/kuasar-{pod}.scope/overhead"),
            "{process} of {record}"
        );
    }
    let vcpu = cgroup().join(format!("kuasar-{pod}.scope/vcpu/cgroup.threads"));
    assert_eq!(fs::read_to_string(vcpu).unwrap().lines().count(), 1, "threads that are processors");
    // Counted for the pod, which needs the controllers to be there.
    let memory: u64 = fs::read_to_string(cgroup().join("memory.current")).unwrap().trim().parse().unwrap();
    assert!(memory > 20 << 20, "the slice has {memory} bytes");
}

fn cgroup() -> PathBuf {
    Path::new("/sys/fs/cgroup").join(SLICE_PATH.trim_start_matches('/'))
}

async fn goes_on(cri: &Cri, pod: &str, container: &str) {
    until("the pod is ready", async || {
        matches!(cri.pod_status(pod).await, Ok((status, _)) if status.state() == PodSandboxState::SandboxReady)
    })
    .await;
    let output =
        cri.exec(container, &["/bin/echo", "here"]).await.unwrap_or_else(|e| panic!("{}", complaint(&e)));
    assert_eq!((output.code, output.stdout.as_str()), (0, "here\n"));
}

/// Waits until CRI answers.
async fn ready() -> Cri {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Ok(cri) = Cri::connect(Path::new(SOCKET)).await
            && cri.complaints().await.is_ok_and(|list| list.is_empty())
        {
            return cri;
        }
        assert!(Instant::now() < end, "containerd is not ready: {}", journal(CONTAINERD));
        sleep(Duration::from_millis(200)).await;
    }
}

fn pod_config(root: &Path) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: "service".into(),
            uid: "0123".into(),
            namespace: "lab".into(),
            attempt: 0,
        }),
        log_directory: root.join("pods").to_string_lossy().into_owned(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: SLICE.into(),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(lab::own_pids()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

async fn until<F: Future<Output = bool>>(what: &str, holds: impl Fn() -> F) {
    let end = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}\n{}", journal(DAEMON));
        sleep(Duration::from_millis(200)).await;
    }
}

fn complaint(status: &impl std::fmt::Debug) -> String {
    format!("{status:?}\n{}\n{}", journal(DAEMON), journal(CONTAINERD))
}

fn systemctl(args: &[&str]) {
    let output = Command::new("systemctl").args(args).output().unwrap();
    let unit = args.last().copied().unwrap_or_default();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "systemctl {args:?}: {said}\n{}", journal(unit));
}

fn property(unit: &str, name: &str) -> String {
    let output =
        Command::new("systemctl").args(["show", "--value", "--property", name, unit]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn main_pid(unit: &str) -> String {
    property(unit, "MainPID")
}

fn is_active(unit: &str) -> bool {
    property(unit, "ActiveState") == "active"
}

/// When a unit was up, in microseconds.
fn since_boot(unit: &str) -> u64 {
    property(unit, "ActiveEnterTimestampMonotonic").parse().unwrap()
}

fn journal(unit: &str) -> String {
    let output = Command::new("journalctl")
        .args(["--no-pager", "--lines=60", "--output=short-monotonic", "--unit", unit])
        .output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}
