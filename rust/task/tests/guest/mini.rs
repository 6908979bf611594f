//! Features that only the kernel "mini" has: SCSI disks, EROFS, cgroup v1, IPsec.

use std::{fs, path::Path, process::Command};

use containerd_shim_protos::{api, cgroups::metrics::Metrics, events::task::TaskOOM, shim_async::TaskClient};
use protobuf::Message;
use serde_json::{Value, json};

use crate::{
    given::{Given, Kind},
    limits::{create_with, event, little_memory},
    pod::{Pod, code},
    storages::{at, disk_with, end, guest_file, sh, start, storage},
    vm::{Vm, bundle},
};

/// A pod on that kernel.
fn pod(cmdline: &str, more: impl FnOnce(&Path) -> String) -> Pod {
    let given =
        Given::mini_from_env().unwrap_or_else(|missing| panic!("this test needs another guest: {missing}"));
    let cmdline = format!("task.sharefs_type=9p task.debug {cmdline}");
    let vm = Vm::boot_with(&given, Kind::InitrdNineP, &cmdline, true, more);
    let task = TaskClient::new(vm.client());
    let pod = Pod { given, vm, task };
    bundle(&pod.given, &pod.vm, "tools", &["true"], false);
    pod
}

fn scsi(dir: &Path) -> String {
    let disk = |name: &str| disk_with(dir, name, "file").display().to_string();
    format!(
        "-device virtio-scsi-pci,id=scsi \
         -drive if=none,id=one,file={},format=raw -device scsi-hd,bus=scsi.0,drive=one,channel=0,scsi-id=1,lun=0 \
         -drive if=none,id=two,file={},format=raw -device scsi-hd,bus=scsi.0,drive=two,channel=0,scsi-id=1,lun=2 \
         -drive if=none,id=late,file={},format=raw",
        disk("one"),
        disk("two"),
        disk("late"),
    )
}

/// The guest's kernel decides which of the devices that a spec may name there are: this one has tunnels.
#[tokio::test]
#[ignore = "needs a guest: set KUASAR_MINI_KERNEL"]
async fn a_container_has_the_devices_of_this_kernel() {
    let pod = pod("", |_| String::new());
    let bind = json!({"destination": "/tun", "type": "bind", "source": "/dev/net/tun", "options": ["rbind"]});
    let name = |spec: &mut Value, minor: u64| {
        spec["mounts"].as_array_mut().unwrap().push(bind.clone());
        spec["linux"]["devices"] = json!([{"path": "/dev/it", "type": "c", "major": 10, "minor": minor}]);
    };
    create_with(&pod, "c", &["sleep", "1000"], false, |spec| name(spec, 200)).await.unwrap();
    pod.start("c", "").await.unwrap();
    assert_eq!(
        sh(&pod, "c", "see", "ls -l /tun /dev/it | cut -c 1-10; ls -l /tun | grep -c '10, *200'").await,
        "0 crw-rw-rw-\ncrw-rw-rw-\n1"
    );
    end(&pod, "c").await;
    // KVM is the host's.
    let error = code(create_with(&pod, "none", &["true"], false, |spec| name(spec, 232)).await).1;
    assert!(
        error.contains("linux.devices of the container's spec: /dev/it is a device of the host"),
        "{error}"
    );
}

#[tokio::test]
#[ignore = "needs a guest: set KUASAR_MINI_KERNEL"]
async fn storages_are_on_scsi_disks() {
    let pod = pod("", scsi);
    let disk = |source: &str, name: &str| storage("scsi", source, "ext4", &[], name);
    let list = [disk("scsi:*:0:1:0", "c/a"), disk("scsi:0:0:1:2", "c/b")];
    start(&pod, "c", &list).await.unwrap();
    assert_eq!(sh(&pod, "c", "see", "cat /a/file /b/file && echo x > /b/new").await, "0 onetwo");
    // One that comes while the pod runs.
    let said = pod.vm.monitor("device_add scsi-hd,bus=scsi.0,drive=late,channel=0,scsi-id=3,lun=1");
    assert!(!said.contains("Error"), "{said}");
    start(&pod, "late", &[disk("scsi:*:0:3:1", "late/c")]).await.unwrap();
    assert_eq!(sh(&pod, "late", "see", "cat /c/file").await, "0 late");
    for id in ["c", "late"] {
        end(&pod, id).await;
    }
    let left = guest_file(&pod, "/proc/mounts").await;
    assert!(!left.contains("/run/kuasar/storage") && !left.contains("/run/kuasar/devices"), "{left}");
}

/// Layers as containerd's erofs snapshotter has them: images, of which the guest makes one root file system.
fn layers(dir: &Path) -> String {
    let mut arguments = String::new();
    for (name, file) in [("lower", "from"), ("upper", "from")] {
        let content = dir.join(format!("content of {name}"));
        std::fs::create_dir_all(content.join("bin")).unwrap();
        std::fs::write(content.join(file), name).unwrap();
        std::fs::write(content.join(format!("only {name}")), "").unwrap();
        let image = dir.join(name);
        let made = Command::new("mkfs.erofs").arg("-Enoinline_data").arg(&image).arg(&content).output();
        let made = made.expect("this test needs mkfs.erofs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let image = image.display();
        arguments += &format!(
            " -drive if=none,id={name},file={image},format=raw,readonly=on -device virtio-blk-pci,drive={name},serial={name}"
        );
    }
    arguments
}

#[tokio::test]
#[ignore = "needs a guest: set KUASAR_MINI_KERNEL"]
async fn layers_that_are_images_become_a_root() {
    let pod = pod("", layers);
    let layer = |name: &str| storage("blk", &format!("serial:{name}"), "erofs", &[], &format!("c/{name}"));
    let lower = format!("lowerdir={}:{}:{}", at("c/upper"), at("c/lower"), at("c/tools"));
    let (upper, work) = (format!("upperdir={}/u", at("c/rw")), format!("workdir={}/w", at("c/rw")));
    let list = [
        layer("lower"),
        layer("upper"),
        storage("share", "tools/rootfs", "", &["ro"], "c/tools"),
        storage("ephemeral", "", "tmpfs", &["size=1M"], "c/rw"),
        storage("overlay", "", "", &[&lower, &upper, &work], "c/rootfs"),
    ];
    start(&pod, "c", &list).await.unwrap();
    let seen = sh(&pod, "c", "see", "cat /from; ls -d /only*; echo x > /from && cat /from").await;
    assert_eq!(seen, "0 upper/only lower\n/only upper\nx");
    end(&pod, "c").await;
    let left = guest_file(&pod, "/proc/mounts").await;
    assert!(!left.contains("/run/kuasar/storage") && !left.contains("/run/kuasar/devices"), "{left}");
}

#[tokio::test]
#[ignore = "needs a guest: set KUASAR_MINI_KERNEL"]
async fn containers_have_cgroup_v1_when_asked_for() {
    let pod = pod("task.cgroup=v1", |_| String::new());
    let script = "busybox tail /dev/zero; cat /proc/self/cgroup; sleep 1000 & sleep 1000";
    create_with(&pod, "c", &["sh", "-c", script], false, little_memory).await.unwrap();
    pod.start("c", "").await.unwrap();
    let oom = event(&pod, 2).await;
    assert_eq!(oom.topic, "/tasks/oom");
    assert_eq!(TaskOOM::parse_from_bytes(&oom.event.value).unwrap().container_id, "c");
    let (_, seen) = pod.run("c", "see", &["cat", "/proc/self/cgroup"]).await;
    assert!(seen.lines().any(|line| line.ends_with(":memory:/")), "{seen}");

    let stats = api::StatsRequest { id: "c".into(), ..Default::default() };
    let stats = pod.task.stats(pod.vm.context(), &stats).await.unwrap().stats.unwrap();
    assert_eq!(stats.type_url, "io.containerd.cgroups.v1.Metrics");
    let metrics = Metrics::parse_from_bytes(&stats.value).unwrap();
    assert_eq!((metrics.memory.usage.limit, metrics.memory_oom_control.oom_kill), (16 << 20, 1));
    assert!(metrics.cpu.usage.total > 0 && metrics.pids.current > 0 && metrics.pids.limit == 64, "{metrics}");

    let pids = api::PidsRequest { id: "c".into(), ..Default::default() };
    let pids = pod.task.pids(pod.vm.context(), &pids).await.unwrap().processes.len();
    assert!((2..=3).contains(&pids), "{pids} processes");
    let pause = api::PauseRequest { id: "c".into(), ..Default::default() };
    pod.task.pause(pod.vm.context(), &pause).await.unwrap();
    let resume = api::ResumeRequest { id: "c".into(), ..Default::default() };
    pod.task.resume(pod.vm.context(), &resume).await.unwrap();
    pod.kill("c", "", 9, true).await.unwrap();
    assert_eq!(pod.wait("c", "").await.unwrap(), 137);
    pod.delete("c", "").await.unwrap();
    let find = "/run/kuasar/state/tools/rootfs/bin/busybox find /sys/fs/cgroup -mindepth 2 -type d";
    let left = pod.vm.run(find).await.unwrap().out;
    assert!(left.contains("/memory/kuasar\n") && left.lines().all(|dir| dir.ends_with("/kuasar")), "{left}");
}

/// The host's `ip` with its libraries, as the words that run it in the guest: busybox's has no IPsec.
fn ip_of_the_host(pod: &Pod) -> String {
    let (ip, dir) = ("/usr/sbin/ip", pod.vm.shared("tools"));
    let said = Command::new("ldd").arg(ip).output().unwrap();
    assert!(said.status.success(), "no program {ip} of iproute2: run tests/lab/setup");
    let said = String::from_utf8(said.stdout).unwrap();
    for file in said.split_whitespace().filter(|word| word.starts_with('/')).chain([ip]) {
        fs::copy(file, dir.join(Path::new(file).file_name().unwrap())).unwrap();
    }
    let dir = "/run/kuasar/state/tools";
    format!("{dir}/ld-linux-x86-64.so.2 --library-path {dir} {dir}/ip")
}

/// Both kinds of ciphers want random numbers of the generator that jitterentropy's test would hold the boot
/// up for.
#[tokio::test]
#[ignore = "needs a guest: set KUASAR_MINI_KERNEL"]
async fn ipsec_is_there_and_no_boot_waits_for_its_random_numbers() {
    let pod = pod("", |_| String::new());
    let ip = ip_of_the_host(&pod);
    let run = async |words: &str| {
        let answer = pod.vm.run(&format!("{ip} {words}")).await.unwrap();
        assert_eq!(answer.exit_status, 0, "{words}: {}", answer.out);
        answer.out
    };
    let key = |bytes: usize| format!("0x{}", "5a".repeat(bytes));
    let ciphers = [
        format!("aead rfc4106(gcm(aes)) {} 128", key(20)),
        format!("auth-trunc hmac(sha256) {} 128 enc cbc(aes) {}", key(32), key(16)),
    ];
    for (spi, cipher) in ciphers.iter().enumerate() {
        let spi = 0x100 + spi;
        run(&format!("xfrm state add src fd00::1 dst fd00::2 proto esp spi {spi} mode tunnel {cipher}"))
            .await;
    }
    let states = run("xfrm state").await;
    assert!(states.contains("rfc4106(gcm(aes))") && states.contains("cbc(aes)"), "{states}");
    let known = guest_file(&pod, "/proc/crypto").await;
    assert!(known.contains("drbg") && !known.contains("jitterentropy"), "{known}");
}
