//! Storages with real devices: there from the start, plugged in while a container waits for them, gone, and
//! others in their place.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use containerd_shim_protos::shim_async::TaskClient;
use kuasar_common::storage::{self, MOUNT_POINTS, Storage};
use serde_json::json;

use crate::{
    given,
    given::Kind,
    pod::{Pod, code},
    vm::{Vm, bundle},
};

/// A disk image with ext4 on it and this folder in it.
fn disk(path: &Path, content: &Path) {
    fs::File::create(path).unwrap().set_len(16 << 20).unwrap();
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(["-q", "-F", "-b", "4096", "-d"])
        .arg(content)
        .arg(path);
    let made = mkfs.output().expect("this test needs mkfs.ext4");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// A disk with one file in it.
pub(crate) fn disk_with(dir: &Path, name: &str, file: &str) -> PathBuf {
    let content = dir.join(format!("content of {name}"));
    fs::create_dir(&content).unwrap();
    fs::write(content.join(file), name).unwrap();
    let path = dir.join(name);
    disk(&path, &content);
    path
}

pub(crate) fn at(name: &str) -> String {
    format!("{MOUNT_POINTS}/{name}")
}

pub(crate) fn storage(driver: &str, source: &str, fstype: &str, options: &[&str], name: &str) -> Storage {
    Storage {
        driver: driver.into(),
        source: source.into(),
        fstype: fstype.into(),
        options: options.iter().map(|&word| word.to_owned()).collect(),
        mount_point: at(name),
        device: String::new(),
        pod: false,
    }
}

/// Makes and starts a container that has each storage at `/<last part of its mount point>`, and one called
/// `rootfs` as its root.
pub(crate) async fn start(pod: &Pod, id: &str, list: &[Storage]) -> ttrpc::Result<u32> {
    let bundle = bundle(&pod.given, &pod.vm, id, &["sleep", "1000"], false);
    let dir = pod.vm.shared(id);
    let file = dir.join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    for storage in list {
        let name = Path::new(&storage.mount_point).file_name().unwrap().to_str().unwrap();
        if name == "rootfs" {
            spec["root"]["path"] = storage.mount_point.clone().into();
            continue;
        }
        let mount = json!({"destination": format!("/{name}"), "type": "bind", "source": storage.mount_point,
            "options": ["rbind"]});
        spec["mounts"].as_array_mut().unwrap().push(mount);
    }
    fs::write(&file, spec.to_string()).unwrap();
    fs::write(dir.join(storage::FILE), serde_json::to_vec(list).unwrap()).unwrap();
    pod.create_from(id, bundle, false, false).await?;
    pod.start(id, "").await
}

pub(crate) async fn end(pod: &Pod, id: &str) {
    pod.kill(id, "", 9, false).await.unwrap();
    pod.wait(id, "").await.unwrap();
    pod.delete(id, "").await.unwrap();
}

pub(crate) async fn sh(pod: &Pod, id: &str, exec: &str, script: &str) -> String {
    let (code, out) = pod.run(id, exec, &["sh", "-c", script]).await;
    format!("{code} {}", out.trim_end())
}

/// A file of the guest, outside of containers.
pub(crate) async fn guest_file(pod: &Pod, path: &str) -> String {
    pod.vm.run(&format!("/run/kuasar/state/tools/rootfs/bin/busybox cat {path}")).await.unwrap().out
}

fn devices(dir: &Path) -> String {
    for name in ["data", "pmem", "first", "second"] {
        disk_with(dir, name, &format!("file of {name}"));
    }
    let path = |name: &str| dir.join(name).display().to_string();
    // Without this, q35 leaves announcing to ACPI's tables, even if it is told to make none.
    format!(
        "-global ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off \
         -drive if=none,id=data,file={},format=raw -device virtio-blk-pci,drive=data,serial=data \
         -object memory-backend-file,id=pm,mem-path={},size=16M,share=on -device virtio-pmem-pci,memdev=pm,addr=0x11 \
         -device pcie-root-port,id=slots,chassis=1,addr=0x10 \
         -drive if=none,id=first,file={},format=raw -drive if=none,id=second,file={},format=raw",
        path("data"),
        path("pmem"),
        path("first"),
        path("second"),
    )
}

#[tokio::test]
#[ignore = "needs a guest: set KUASAR_IMAGE"]
async fn containers_have_storages() {
    let given = given();
    let vm = Vm::boot_with(&given, Kind::InitrdNineP, "task.sharefs_type=9p task.debug", true, devices);
    let task = TaskClient::new(vm.client());
    let pod = Pod { given, vm, task };
    bundle(&pod.given, &pod.vm, "tools", &["true"], false);
    volumes(&pod).await;
    assembled_root(&pod).await;
    hot_plug(&pod).await;
    refused(&pod).await;
    let left = guest_file(&pod, "/proc/mounts").await;
    assert!(!left.contains("/run/kuasar/storage") && !left.contains("/run/kuasar/devices"), "{left}");
}

/// A disk by its serial for two containers, memory, huge pages, persistent memory past the page cache.
async fn volumes(pod: &Pod) {
    fs::create_dir_all(pod.vm.shared("volumes/conf")).unwrap();
    fs::write(pod.vm.shared("volumes/conf/key"), "value").unwrap();
    let disk =
        |id: &str, options: &[&str]| storage("blk", "serial:data", "ext4", options, &format!("{id}/data"));
    let list = [
        disk("writer", &[]),
        storage("share", "volumes/conf", "", &["ro"], "writer/conf"),
        Storage { pod: true, ..storage("ephemeral", "", "tmpfs", &["size=1M"], "pod/both") },
        storage("ephemeral", "", "hugetlbfs", &["size=4M", "pagesize=2Mi"], "writer/huge"),
        storage("pmem", "pmem:0000:00:11.0", "ext4", &["dax"], "writer/pmem"),
    ];
    start(pod, "writer", &list).await.unwrap();
    start(pod, "reader", &[disk("reader", &["ro"]), list[2].clone()]).await.unwrap();
    assert_eq!(
        sh(pod, "writer", "w", "echo new > /data/new; cat /data/*; echo x > /both/x").await,
        "0 datanew"
    );
    assert_eq!(sh(pod, "reader", "r", "cat /data/new /both/x").await, "0 new\nx");
    assert!(sh(pod, "reader", "ro", "echo y > /data/y").await.starts_with("1"));
    assert!(sh(pod, "writer", "conf", "cat /conf/key && echo y > /conf/y").await.starts_with("1 value"));
    let mounts = sh(pod, "writer", "mounts", "cat /proc/mounts /pmem/*; ls /data").await;
    for line in [
        "/data ext4 rw",
        "/conf 9p ro",
        "/both tmpfs rw",
        "/huge hugetlbfs rw",
        "/pmem ext4 rw,relatime,dax=always",
    ] {
        assert!(mounts.contains(line), "{line} is not in\n{mounts}");
    }
    assert!(guest_file(pod, "/proc/meminfo").await.contains("HugePages_Total:       2"));
    for id in ["writer", "reader"] {
        end(pod, id).await;
    }
    assert!(guest_file(pod, "/proc/meminfo").await.contains("HugePages_Total:       0"));
}

/// A root file system of a layer on the share and one on a disk, with memory on top.
async fn assembled_root(pod: &Pod) {
    let lower = format!("lowerdir={}:{}", at("root/disk"), at("root/tools"));
    let (upper, work) = (format!("upperdir={}/u", at("root/rw")), format!("workdir={}/w", at("root/rw")));
    let list = [
        storage("share", "tools/rootfs", "", &["ro"], "root/tools"),
        storage("blk", "serial:data", "ext4", &["ro"], "root/disk"),
        storage("ephemeral", "", "tmpfs", &["size=1M"], "root/rw"),
        storage("overlay", "", "", &[&lower, &upper, &work], "root/rootfs"),
    ];
    start(pod, "root", &list).await.unwrap();
    let seen = sh(pod, "root", "see", "cat '/file of data' && echo x > /new && ls /rw/u").await;
    assert!(seen.starts_with("0 data") && seen.contains("new"), "{seen}");
    end(pod, "root").await;
}

/// A disk that comes while its container is being made; then another one in the same slot.
async fn hot_plug(pod: &Pod) {
    for name in ["first", "second"] {
        let list = [storage("blk", "pci:0000:00:10.0", "ext4", &[], &format!("{name}/slot"))];
        let plugged = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let command = format!("device_add virtio-blk-pci,drive={name},bus=slots,id=slot");
            let said = pod.vm.monitor(&command);
            assert!(!said.contains("Error"), "{said}");
        };
        let (started, ()) = tokio::join!(start(pod, name, &list), plugged);
        started.unwrap();
        assert_eq!(sh(pod, name, "see", "cat /slot/file*").await, format!("0 {name}"));
        end(pod, name).await;
        pod.vm.monitor("device_del slot");
        while pod.vm.monitor("info qtree").contains("id \"slot\"") {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Refusals as a user sees them.
async fn refused(pod: &Pod) {
    let error = |list: [Storage; 1]| async move { code(start(pod, "bad", &list).await).1 };
    let missing = error([storage("blk", "serial:nope", "ext4", &[], "bad/data")]).await;
    assert!(
        missing.contains(
            "storage at \"/run/kuasar/storage/bad/data\": no device serial:nope came within 10 s; there are: "
        ) && missing.contains("vda (serial:data) (pci:0000:00:"),
        "{missing}"
    );
    let wrong = error([storage("blk", "serial:data", "ext2", &[], "bad/data")]).await;
    assert!(
        wrong.contains("mounting ext2 of /dev/vda (EXT4-fs (vda): couldn't mount as ext2 due to feature"),
        "{wrong}"
    );
    // What ext4 has against it stands in the kernel's log only.
    let no_dax = error([storage("blk", "serial:data", "ext4", &["dax"], "bad/data")]).await;
    assert!(
        no_dax.contains(
            "mounting ext4 of /dev/vda (EXT4-fs (vda): DAX unsupported by block device.): Invalid argument"
        ),
        "{no_dax}"
    );
    let greedy = error([storage("ephemeral", "", "hugetlbfs", &["size=4G"], "bad/huge")]).await;
    assert!(greedy.contains("of 2048 huge pages of 2097152 bytes: give the pod more memory"), "{greedy}");
    assert!(
        guest_file(pod, "/proc/meminfo").await.contains("HugePages_Total:       0"),
        "they were given back"
    );
}
