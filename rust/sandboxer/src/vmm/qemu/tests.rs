//! With programs that play QEMU and its companions.

use std::{fs, os::unix::fs::PermissionsExt, time::Instant};

use kuasar_common::constants::PORT_READY;

use super::*;
use crate::{
    process::ProcessRecord,
    vmm::{Accel, FileServer, FileServerSandbox, InodeFileHandles, Machine, Nic, Root, ShareFs, VsockKind},
};

/// A pod's folder, and a QEMU and a virtiofsd that are shell scripts.
struct Lab(tempfile::TempDir);

impl Lab {
    fn new(qemu: &str, virtiofsd: &str) -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        for folder in ["pod/shared", "pod/log"] {
            fs::create_dir_all(this.0.path().join(folder)).unwrap();
        }
        for file in ["vmlinux", "initrd"] {
            fs::write(this.0.path().join(file), "").unwrap();
        }
        this.script("qemu", qemu);
        this.script("virtiofsd", virtiofsd);
        let exe = std::env::current_exe().unwrap();
        let double = "--exact vmm::qemu::tests::vsock_double --ignored";
        this.script("vsock", &format!("VSOCK_DOUBLE=\"$2\" exec {} {double} >/dev/null 2>&1", exe.display()));
        this
    }

    fn script(&self, name: &str, body: &str) {
        let path = self.0.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn pod(&self) -> PathBuf {
        self.0.path().join("pod")
    }

    fn qemu(&self) -> Qemu {
        Qemu::new(VmConfig {
            path: self.0.path().join("qemu"),
            accel: Accel::Tcg,
            machine: Machine::Q35,
            cpu: None,
            kernel: self.0.path().join("vmlinux"),
            image: None,
            initrd: Some(self.0.path().join("initrd")),
            root: Root::Initrd,
            verity: None,
            kernel_params: String::new(),
            share_fs: ShareFs::Virtiofs,
            virtiofsd: self.0.path().join("virtiofsd"),
            file_server: crate::vmm::FileServer::default(),
            vsock: VsockKind::VhostUser,
            vhost_device_vsock: self.0.path().join("vsock"),
            free_page_reporting: true,
            task_log_level: "info".into(),
            debug: false,
        })
    }

    fn spec(&self) -> VmSpec {
        VmSpec {
            pod: "p1".into(),
            dir: self.pod(),
            netns: None,
            cgroup_procs: Vec::new(),
            vcpus: 1,
            memory_mib: 64,
            devices: Vec::new(),
            kernel_params: String::new(),
            user: None,
            oom_score_adj: 0,
        }
    }
}

/// Plays `vhost-device-vsock`, in a process of its own: listens, and serves nobody.
#[test]
#[ignore = "run by other tests, as a program"]
fn vsock_double() {
    let Ok(arguments) = std::env::var("VSOCK_DOUBLE") else { return };
    let (_, socket) = arguments.split_once(",socket=").unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
    std::thread::sleep(Duration::from_secs(60));
}

fn gone(record: ProcessRecord) -> bool {
    Process::adopt(record).unwrap().is_none()
}

fn all(record: &VmRecord) -> Vec<ProcessRecord> {
    std::iter::once(record.vmm).chain(record.companions.values().copied()).collect()
}

#[tokio::test]
async fn a_vm_that_dies_is_explained_by_its_log() {
    let lab = Lab::new("echo 'qemu: no such machine' >&2; exit 1", "exec sleep 60");
    let vm = lab.qemu().start(lab.spec()).await.unwrap();
    let record = vm.record();
    let error = vm.ready(Duration::from_secs(10)).await.unwrap_err().to_string();
    assert_eq!(
        error,
        "starting the VM: waiting for the guest's agent: the VM has ended with status 1; vmm.log: qemu: no such machine"
    );
    assert_eq!(vm.wait().await.code, Some(1));
    assert!(all(&record).into_iter().all(gone));
    let error = vm.ping().await.unwrap_err().to_string();
    assert!(error.starts_with("the VM has ended with status 1"), "{error}");
    vm.stop(true, Duration::from_secs(1)).await.unwrap();
}

#[tokio::test]
async fn a_silent_guest_is_a_deadline_and_a_lost_companion_an_end() {
    let lab = Lab::new("exec sleep 60", "sleep 1; echo 'no space' >&2; exit 9");
    let vm = lab.qemu().start(lab.spec()).await.unwrap();
    let error = vm.ready(Duration::from_millis(100)).await.unwrap_err().to_string();
    assert_eq!(error, "waiting for the guest's agent: nothing within 100ms");
    let record = vm.record();
    let exit = vm.wait().await;
    assert_eq!(exit.code, Some(137));
    assert!(all(&record).into_iter().all(gone));
    let error = vm.ping().await.unwrap_err().to_string();
    assert_eq!(error, "the VM has ended because virtiofsd ended with status 9; virtiofsd.log: no space");
}

#[tokio::test]
async fn a_failed_start_leaves_nothing_running() {
    let lab = Lab::new("exec sleep 60", "echo $$ > $0.pid; exec sleep 60");
    fs::remove_file(lab.0.path().join("qemu")).unwrap();
    let error = lab.qemu().start(lab.spec()).await.unwrap_err().to_string();
    assert!(error.starts_with("starting ") && error.contains("No such file or directory"), "{error}");
    let pid = fs::read_to_string(lab.0.path().join("virtiofsd.pid")).unwrap_or_default();
    assert!(pid.is_empty() || !Path::new("/proc").join(pid.trim()).exists());
}

#[tokio::test]
async fn the_agents_call_arrives_and_the_vm_is_found_again_after_a_restart() {
    let lab = Lab::new("exec sleep 60", "exec sleep 60");
    let qemu = lab.qemu();
    let vm = qemu.start(lab.spec()).await.unwrap();
    assert_eq!(vm.address(), GuestAddress::Hybrid(lab.pod().join("vsock")));
    let socket = lab.pod().join(format!("vs/s_{PORT_READY}"));
    let agent = tokio::spawn(async move {
        let mut agent = UnixStream::connect(socket).await.unwrap();
        let line = b"{\"ready\":{\"agent\":\"1\",\"uptime_ns\":1}}\n";
        tokio::io::AsyncWriteExt::write_all(&mut agent, line).await.unwrap();
        agent
    });
    assert_eq!(vm.ready(Duration::from_secs(5)).await.unwrap().ready.agent, "1");
    drop(agent.await.unwrap());

    let record = vm.record();
    let text = serde_json::to_string(&record).unwrap();
    drop(vm);
    let record: VmRecord = serde_json::from_str(&text).unwrap();
    assert!(!all(&record).into_iter().any(gone), "dropping changes nothing");
    let vm = qemu.adopt(record.clone()).await.unwrap().unwrap();
    assert_eq!(vm.record(), record);
    let start = Instant::now();
    vm.stop(false, Duration::from_secs(5)).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    assert!(all(&record).into_iter().all(gone));
    assert!(qemu.adopt(record).await.unwrap().is_none());
}

#[tokio::test]
async fn companions_of_a_vm_that_ended_while_nobody_looked_are_ended() {
    let lab = Lab::new("exec sleep 60", "exec sleep 60");
    let qemu = lab.qemu();
    let record = {
        let vm = qemu.start(lab.spec()).await.unwrap();
        let mut record = vm.record();
        // As if QEMU's pid had been given to another process since.
        record.vmm.start_time += 1;
        record
    };
    assert!(qemu.adopt(record.clone()).await.unwrap().is_none());
    assert!(record.companions.values().copied().all(gone));
}

#[tokio::test]
async fn virtiofsd_has_what_a_file_has_and_no_more_rights_than_that_takes() {
    let lab = Lab::new("exec sleep 60", "printf '%s ' \"$@\" >&2; exec sleep 60");
    let said = async |qemu: Qemu| {
        let vm = qemu.start(lab.spec()).await.unwrap();
        let log = lab.pod().join("log/virtiofsd.log");
        let begun = Instant::now();
        let said = loop {
            let said = fs::read_to_string(&log).unwrap();
            if said.contains("--log-level=") || begun.elapsed() > Duration::from_secs(20) {
                break said;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        vm.stop(true, Duration::ZERO).await.unwrap();
        fs::remove_file(log).unwrap();
        said
    };
    let usual = said(lab.qemu()).await;
    for option in [
        "--sandbox=namespace",
        "--thread-pool-size=32",
        "--inode-file-handles=prefer",
        "--xattr",
        "--posix-acl=auto",
        "--xattrmap=:map:trusted.:user.virtiofs.:",
        "--modcaps=-mknod",
    ] {
        assert!(usual.contains(&format!("{option} ")), "{option} is not in {usual}");
    }
    assert!(!usual.contains("submounts"), "{usual}");
    let mut qemu = lab.qemu();
    qemu.config.file_server = FileServer {
        threads: 1,
        inode_file_handles: InodeFileHandles::Never,
        sandbox: FileServerSandbox::Chroot,
        device_nodes: true,
        announce_submounts: false,
    };
    let other = said(qemu).await;
    for option in
        ["--sandbox=chroot", "--thread-pool-size=1", "--inode-file-handles=never", "--no-announce-submounts"]
    {
        assert!(other.contains(&format!("{option} ")), "{option} is not in {other}");
    }
    assert!(!other.contains("modcaps"), "{other}");
}

#[tokio::test]
async fn what_this_driver_cannot_do_says_so() {
    let lab = Lab::new("exec sleep 60", "exec sleep 60");
    let mut qemu = lab.qemu();
    qemu.config.machine = Machine::Microvm;
    let vm = qemu.start(lab.spec()).await.unwrap();
    assert!(!vm.can_hot_attach());
    let disk = |id: &str| disk(id, Path::new("/dev/null"));
    let error = vm.hot_attach(disk("d0")).await.unwrap_err().to_string();
    assert!(
        error.starts_with("plugging d0 into a running VM: its machine type has no bus for that"),
        "{error}"
    );
    let error = vm.hot_attach(disk("a-name-of-21-bytes-it")).await.unwrap_err().to_string();
    assert!(error.ends_with("a disk's id has 1 to 20 bytes"), "{error}");
    let tap = Nic {
        id: "net2".into(),
        tap: "t".into(),
        mac: String::new(),
        mtu: 1500,
        queues: Vec::new(),
        vhost: Vec::new(),
    };
    let error = vm.hot_attach(DeviceInfo::Tap(tap)).await.unwrap_err().to_string();
    assert!(error.starts_with("plugging net2 into a running VM: only disks"), "{error}");
    vm.hot_detach("d0").await.unwrap();
    vm.stop(true, Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn an_old_qemu_is_refused() {
    for (says, expected) in [
        (
            "echo 'QEMU emulator version 7.2.9 (Debian 1:7.2)'",
            "is version 7.2.9 and QEMU 8.2 or later is needed",
        ),
        ("echo 'QEMU emulator version 8.1.5'", "is version 8.1.5 and QEMU 8.2 or later is needed"),
        ("echo 'hello'", "does not say its version but \"hello\""),
        ("exit 1", "does not say its version but \"\""),
    ] {
        let lab = Lab::new(says, "");
        let error = version(&lab.0.path().join("qemu")).await.unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("set hypervisor.path to it"), "{error}");
    }
    for says in ["echo 'QEMU emulator version 10.0.2'", "echo 'QEMU emulator version 8.2.0 (v8.2.0)'"] {
        let lab = Lab::new(says, "");
        version(&lab.0.path().join("qemu")).await.unwrap();
    }
}

#[tokio::test]
async fn a_vsock_device_that_dies_at_once_is_explained_at_once() {
    let lab = Lab::new("exec sleep 60", "exec sleep 60");
    lab.script("vsock", "echo 'bad option' >&2; exit 2");
    let start = Instant::now();
    let error = lab.qemu().start(lab.spec()).await.unwrap_err().to_string();
    assert_eq!(
        error,
        "starting the VM: waiting for vhost-device-vsock to listen: it ended with status 2; vsock.log: bad option"
    );
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_folder_too_deep_for_sockets_is_named() {
    let lab = Lab::new("exec sleep 60", "exec sleep 60");
    let dir = lab.pod().join("d".repeat(100));
    for folder in ["shared", "log"] {
        fs::create_dir_all(dir.join(folder)).unwrap();
    }
    let error = lab.qemu().start(VmSpec { dir: dir.clone(), ..lab.spec() }).await.unwrap_err().to_string();
    assert!(
        error.starts_with(&format!("starting the VM: starting virtiofsd: binding {}", dir.display())),
        "{error}"
    );
    assert!(error.contains("SUN_LEN"), "{error}");
}

fn disk(id: &str, path: &Path) -> DeviceInfo {
    let file = fs::File::open(path).unwrap().into();
    DeviceInfo::Block { id: id.into(), path: path.into(), file, read_only: true }
}

/// A QEMU that stands still, on a node that swaps: its pod is taken over, and it is asked when it is needed.
#[tokio::test]
async fn a_vmm_that_does_not_answer_is_adopted_and_asked_before_the_next_disk() {
    let lab = Lab::new("exec sleep 60", "exec sleep 60");
    let qemu = lab.qemu();
    let vm = qemu.start(lab.spec()).await.unwrap();
    assert!(vm.can_hot_attach());
    let record = vm.record();
    drop(vm);
    let start = Instant::now();
    let vm = qemu.adopt(record).await.unwrap().expect("it lives");
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    let socket = lab.pod().join(QMP_SOCKET);
    fs::remove_file(&socket).unwrap();
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let answering = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (lines, mut answers) = stream.into_split();
            let greeting = b"{\"QMP\":{\"version\":{\"qemu\":{\"micro\":0,\"minor\":0,\"major\":10},\"package\":\"\"},\"capabilities\":[]}}\n";
            drop(tokio::io::AsyncWriteExt::write_all(&mut answers, greeting).await);
            let mut lines = tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(lines));
            while let Ok(Some(line)) = lines.next_line().await {
                let command: serde_json::Value = serde_json::from_str(&line).unwrap();
                let answer = match command["execute"].as_str().unwrap() {
                    "qmp_capabilities" => serde_json::json!({"return": {}, "id": command["id"]}),
                    asked => {
                        serde_json::json!({"error": {"class": "GenericError", "desc": asked}, "id": command["id"]})
                    }
                };
                drop(
                    tokio::io::AsyncWriteExt::write_all(&mut answers, format!("{answer}\n").as_bytes()).await,
                );
            }
        }
    });
    let error = vm.hot_attach(disk("disk-1", Path::new("/dev/null"))).await.unwrap_err().to_string();
    assert!(error.contains("qom-list"), "{error}");
    answering.abort();
    vm.stop(true, Duration::ZERO).await.unwrap();
}
