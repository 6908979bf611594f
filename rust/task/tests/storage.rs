//! Storages in a mount namespace of the test's own, with loop devices as disks. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Once},
};

use kuasar_common::{
    constants::GUEST_STATE_DIR,
    storage::{self, MOUNT_POINTS, Storage},
};
use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount},
    thread::{UnshareFlags, unshare_unsafe},
};
use vmm_task::storage::Storages;

/// Runs a test in a mount namespace with an empty `/run` that has the guest's folder of shared files.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce(Pod) -> F) {
    static SAID: Once = Once::new();
    // SAFETY: only the mount namespace of this thread, and of those that it starts, changes.
    if unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.is_err() {
        SAID.call_once(|| eprintln!("skipped: making a mount namespace needs root"));
        return;
    }
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), None).unwrap();
    fs::create_dir_all(GUEST_STATE_DIR).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(test(Pod { storages: Arc::default() }));
}

struct Pod {
    storages: Arc<Storages>,
}

impl Pod {
    /// Attaches a list for a container; the error's text if it is refused.
    async fn attach(&self, container: &str, list: &[Storage]) -> Result<(), String> {
        let bundle = Path::new("/run/bundles").join(container);
        fs::create_dir_all(&bundle).unwrap();
        fs::write(bundle.join(storage::FILE), serde_json::to_vec(list).unwrap()).unwrap();
        self.storages.attach(container, &bundle).await.map(drop).map_err(|error| error.to_string())
    }

    async fn release(&self, container: &str) {
        self.storages.release(container).await;
    }

    /// Why a single storage is refused; nothing may be left of it.
    async fn refused(&self, storage: Storage) -> String {
        let before = (self.storages.count(), mounts());
        let error = self.attach("refused", &[storage]).await.unwrap_err();
        self.release("refused").await;
        assert_eq!((self.storages.count(), mounts()), before, "something is left after: {error}");
        error
    }
}

fn mounts() -> Vec<String> {
    let info = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let points = info.lines().map(|line| line.split(' ').nth(4).unwrap().to_owned());
    points.filter(|point| point.starts_with("/run/kuasar/")).collect()
}

fn at(name: &str) -> PathBuf {
    Path::new(MOUNT_POINTS).join(name)
}

fn storage(driver: &str, source: &str, fstype: &str, options: &str, name: &str) -> Storage {
    Storage {
        driver: driver.into(),
        source: source.into(),
        fstype: fstype.into(),
        options: options.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect(),
        mount_point: at(name).to_string_lossy().into(),
        device: String::new(),
        pod: false,
    }
}

fn for_pod(storage: Storage) -> Storage {
    Storage { pod: true, ..storage }
}

fn share(source: &str, options: &str, name: &str) -> Storage {
    storage("share", source, "", options, name)
}

/// A disk with ext4 on it.
struct Disk {
    name: String,
    file: tempfile::NamedTempFile,
}

fn run(command: &str, args: &[&str]) -> String {
    let output =
        Command::new(command).args(args).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").output().unwrap();
    assert!(output.status.success(), "{command} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

impl Disk {
    fn new(read_only: bool) -> Self {
        let file = tempfile::NamedTempFile::new_in("/tmp").unwrap();
        file.as_file().set_len(16 << 20).unwrap();
        let path = file.path().to_str().unwrap().to_owned();
        run("mkfs.ext4", &["-q", "-F", &path]);
        let flags: &[&str] = if read_only { &["-r"] } else { &[] };
        let node = run("losetup", &[&["--find", "--show"], flags, &[&path]].concat());
        Self { name: node.trim_start_matches("/dev/").to_owned(), file }
    }

    fn storage(&self, options: &str, name: &str) -> Storage {
        storage("blk", &format!("name:{}", self.name), "ext4", options, name)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("/sbin/losetup").args(["-d", &format!("/dev/{}", self.name)]).status();
        let _ = self.file.path();
    }
}

fn is_read_only(result: io::Result<()>) -> bool {
    result.is_err_and(|error| error.kind() == io::ErrorKind::ReadOnlyFilesystem)
}

#[test]
fn parts_of_the_share_are_shown_as_asked() {
    in_namespace(|pod| async move {
        let shared = Path::new(GUEST_STATE_DIR);
        fs::create_dir_all(shared.join("vol/sub")).unwrap();
        fs::write(shared.join("vol/sub/file"), "text").unwrap();
        symlink("/etc", shared.join("vol/out")).unwrap();
        mount("tmpfs", shared.join("vol/sub").join("..").join("sub"), "tmpfs", MountFlags::empty(), None)
            .unwrap();
        fs::write(shared.join("vol/sub/inner"), "inner").unwrap();
        let list = [
            share("vol", "", "c/plain"),
            share("vol", "rbind ro", "c/top"),
            share("vol", "rro", "c/all"),
            share("vol/sub/inner", "ro", "c/file"),
        ];
        pod.attach("c", &list).await.unwrap();
        assert_eq!(fs::read(at("c/plain/sub/file")).unwrap(), b"text", "without what is mounted below");
        assert_eq!(fs::read(at("c/top/sub/inner")).unwrap(), b"inner");
        assert!(is_read_only(fs::write(at("c/top/new"), "")));
        fs::write(at("c/top/sub/new"), "").unwrap();
        assert!(is_read_only(fs::write(at("c/all/sub/new"), "")), "all that is below, too");
        assert_eq!(fs::read(at("c/file")).unwrap(), b"inner");
        assert!(is_read_only(fs::write(at("c/file"), "")));
        pod.release("c").await;
        assert_eq!(pod.storages.count(), (0, 0));
        assert!(!at("c/top").exists() && !at("c/file").exists(), "the mount points are gone");
        assert_eq!(fs::read(shared.join("vol/sub/inner")).unwrap(), b"inner", "and nothing that was shown");

        assert!(pod.refused(share("../run", "", "x")).await.ends_with("is no path in the shared folder"));
        assert!(pod.refused(share("vol/out", "", "x")).await.contains("Too many levels of symbolic links"));
        assert!(pod.refused(share("gone", "", "x")).await.starts_with("mounting share \"gone\" at"));
        let unknown = pod.refused(share("vol", "uid=1", "x")).await;
        assert!(unknown.ends_with("driver share knows no option uid"), "{unknown}");
    });
}

#[test]
fn memory_has_its_size_and_is_the_pods_or_the_containers() {
    in_namespace(|pod| async move {
        let tmpfs = |options: &str, name: &str| storage("ephemeral", "", "tmpfs", options, name);
        let list = [for_pod(tmpfs("size=64k mode=0777 noexec", "both")), tmpfs("size=64k", "a")];
        pod.attach("a", &list).await.unwrap();
        pod.attach("b", &list[..1]).await.unwrap();
        assert_eq!(pod.storages.count(), (2, 0));
        fs::write(at("both/seen"), "x").unwrap();
        assert_eq!(fs::metadata(at("both")).unwrap().mode() & 0o7777, 0o777);
        let full = fs::write(at("both/large"), vec![0; 65 << 10]).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        let info = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        assert!(info.lines().any(|line| line.contains("/both rw,noexec")), "{info}");

        let other = pod.attach("c", &[tmpfs("size=1M", "a")]).await.unwrap_err();
        assert!(other.contains("that of another storage of container a"), "{other}");
        let other = pod.attach("d", &[tmpfs("size=64k mode=0777 noexec", "both")]).await.unwrap_err();
        assert!(other.contains("that of another storage of the pod (ephemeral)"), "{other}");
        for container in ["a", "c", "d"] {
            pod.release(container).await;
        }
        assert!(at("both/seen").exists(), "b still uses it");
        pod.release("b").await;
        assert_eq!((pod.storages.count(), mounts().len()), ((0, 0), 0));

        let bad = pod.refused(storage("ephemeral", "", "ext4", "", "x")).await;
        assert!(bad.ends_with("driver ephemeral makes tmpfs and hugetlbfs, not ext4"), "{bad}");
        let bad = pod.refused(storage("ephemeral", "", "hugetlbfs", "", "x")).await;
        assert!(bad.contains("the options do not say size="), "{bad}");
        let bad = pod.refused(tmpfs("colour=red", "x")).await;
        assert!(
            bad.contains("with option \"colour\" (tmpfs: Unknown parameter 'colour'): Invalid arg"),
            "{bad}"
        );
    });
}

#[test]
fn a_disk_is_mounted_once_and_shown_as_each_asks() {
    in_namespace(|pod| async move {
        let disk = Disk::new(false);
        pod.attach("reader", &[disk.storage("ro", "reader/data")]).await.unwrap();
        let superblock = || {
            let info = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            let line = info
                .lines()
                .find(|line| line.contains("/run/kuasar/devices/"))
                .unwrap_or_default()
                .to_owned();
            line.rsplit(' ').next().unwrap().split(',').next().unwrap().to_owned()
        };
        assert_eq!(superblock(), "ro", "nobody writes to a disk that is only read");
        pod.attach("writer", &[disk.storage("", "writer/data")]).await.unwrap();
        assert_eq!(superblock(), "rw");
        fs::write(at("writer/data/file"), "text").unwrap();
        assert_eq!(fs::read(at("reader/data/file")).unwrap(), b"text");
        assert!(is_read_only(fs::write(at("reader/data/file"), "")), "it did not become writable");
        assert_eq!(pod.storages.count(), (2, 1));

        let error = pod.attach("other", &[disk.storage("data=journal", "other")]).await.unwrap_err();
        assert!(error.contains("is mounted as ext4 with other options already"), "{error}");
        for container in ["writer", "other", "reader"] {
            pod.release(container).await;
        }
        assert_eq!((pod.storages.count(), mounts().len()), ((0, 0), 0));
        pod.attach("again", &[disk.storage("", "again")]).await.unwrap();
        assert_eq!(fs::read(at("again/file")).unwrap(), b"text", "what was written is there");
        pod.release("again").await;

        let wrong = pod.refused(Storage { fstype: "vfat".into(), ..disk.storage("", "x") }).await;
        assert!(wrong.starts_with("mounting vfat of /dev/loop"), "{wrong}");
        let none = pod.refused(Storage { fstype: "nosuchfs".into(), ..disk.storage("", "x") }).await;
        assert!(none.ends_with("the guest's kernel does not have this file system"), "{none}");
        let none = pod.refused(Storage { fstype: String::new(), ..disk.storage("", "x") }).await;
        assert!(none.ends_with("driver blk needs the file system's type"), "{none}");
        let other = pod.refused(Storage { driver: "scsi".into(), ..disk.storage("", "x") }).await;
        assert!(other.contains("driver scsi has no devices like name:loop"), "{other}");
    });
}

#[test]
fn a_read_only_disk_is_not_promised_to_be_writable() {
    in_namespace(|pod| async move {
        let disk = Disk::new(true);
        let error = pod.refused(disk.storage("", "x")).await;
        assert!(error.ends_with("is read-only; list the storage with option ro"), "{error}");
        pod.attach("c", &[disk.storage("ro", "c")]).await.unwrap();
        assert!(is_read_only(fs::write(at("c/new"), "")));
        pod.release("c").await;
    });
}

#[test]
fn layers_make_an_overlay() {
    in_namespace(|pod| async move {
        let layers = 200;
        let mut list = Vec::new();
        for n in 0..layers {
            let dir = Path::new(GUEST_STATE_DIR).join(format!("layer{n}"));
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join(format!("from{n}")), "").unwrap();
            fs::write(dir.join("top"), n.to_string()).unwrap();
            list.push(share(&format!("layer{n}"), "ro", &format!("c/a layer of some length/{n}")));
        }
        let lower: Vec<String> = list.iter().map(|layer| layer.mount_point.clone()).collect();
        list.push(storage("ephemeral", "", "tmpfs", "size=1M", "c/rw"));
        let rw = at("c/rw");
        let words = vec![
            format!("lowerdir={}", lower.join(":")),
            format!("upperdir={}/upper", rw.display()),
            format!("workdir={}/work", rw.display()),
        ];
        assert!(words[0].len() > 4096, "more than fits a page");
        list.push(Storage { options: words, ..storage("overlay", "", "", "", "c/rootfs") });
        pod.attach("c", &list).await.unwrap();
        let root = at("c/rootfs");
        assert_eq!(fs::read(root.join("top")).unwrap(), b"0", "the first one is on top");
        assert!(root.join(format!("from{}", layers - 1)).exists());
        fs::write(root.join("top"), "changed").unwrap();
        assert_eq!(fs::read(rw.join("upper/top")).unwrap(), b"changed");
        assert_eq!(fs::read(Path::new(GUEST_STATE_DIR).join("layer0/top")).unwrap(), b"0");
        pod.release("c").await;
        assert_eq!((pod.storages.count(), mounts().len()), ((0, 0), 0));

        let none = pod.refused(storage("overlay", "", "", "upperdir=/run/x workdir=/run/y", "x")).await;
        assert!(none.ends_with("an overlay needs lowerdir=<path>[:<path>...]"), "{none}");
    });
}

#[test]
fn mounts_propagate_as_asked() {
    in_namespace(|pod| async move {
        fs::create_dir_all(Path::new(GUEST_STATE_DIR).join("vol/sub")).unwrap();
        let list = [share("vol", "rshared", "shared"), share("vol", "rprivate", "private")];
        pod.attach("c", &list).await.unwrap();
        for (name, seen) in [("shared", true), ("private", false)] {
            let copy = Path::new("/run").join(format!("copy of {name}"));
            fs::create_dir(&copy).unwrap();
            mount_bind(at(name), &copy).unwrap();
            mount("tmpfs", copy.join("sub"), "tmpfs", MountFlags::empty(), None).unwrap();
            fs::write(copy.join("sub/file"), "").unwrap();
            assert_eq!(at(name).join("sub/file").exists(), seen, "{name}");
            unmount(copy.join("sub"), UnmountFlags::empty()).unwrap();
            unmount(&copy, UnmountFlags::empty()).unwrap();
        }
        pod.release("c").await;
        assert_eq!(mounts().len(), 0);
    });
}

#[test]
fn what_cannot_be_unmounted_is_kept_with_all_that_is_in_it() {
    in_namespace(|pod| async move {
        let disk = Disk::new(false);
        pod.attach("c", &[disk.storage("", "c/data")]).await.unwrap();
        fs::write(at("c/data/file"), "text").unwrap();
        fs::create_dir(at("c/data/below")).unwrap();
        mount("tmpfs", at("c/data/below"), "tmpfs", MountFlags::empty(), None).unwrap();
        pod.release("c").await;
        assert_eq!(pod.storages.count(), (1, 1), "it is known");
        assert_eq!(fs::read(at("c/data/file")).unwrap(), b"text");
        // The end of the VM takes all away, from the innermost.
        pod.storages.leave();
        assert_eq!(mounts().len(), 0);
    });
}

#[test]
fn a_container_without_a_list_and_one_with_a_broken_one() {
    in_namespace(|pod| async move {
        fs::create_dir("/run/bundle").unwrap();
        pod.storages.attach("c", Path::new("/run/bundle")).await.unwrap();
        fs::write(
            "/run/bundle/storages.json",
            "[{\"driver\":\"nfs\",\"mount_point\":\"/run/kuasar/storage/x\"}]",
        )
        .unwrap();
        let error = pod.storages.attach("c", Path::new("/run/bundle")).await.unwrap_err().to_string();
        assert!(error.contains("there is no driver \"nfs\"; known are blk, scsi"), "{error}");
        fs::write("/run/bundle/storages.json", "{").unwrap();
        let error = pod.storages.attach("c", Path::new("/run/bundle")).await.unwrap_err().to_string();
        assert!(error.starts_with("reading storages.json: "), "{error}");
    });
}

#[test]
fn two_containers_at_once_make_one_mount() {
    in_namespace(|pod| async move {
        let disk = Disk::new(false);
        let pod = Arc::new(pod);
        let tasks: Vec<_> = (0..8)
            .map(|n| {
                let (pod, storage) = (Arc::clone(&pod), for_pod(disk.storage("", "volume")));
                tokio::spawn(async move {
                    let container = format!("c{n}");
                    pod.attach(&container, &[storage]).await.unwrap();
                    fs::write(at("volume").join(&container), "").unwrap();
                    pod.release(&container).await;
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!((pod.storages.count(), mounts().len()), ((0, 0), 0));
        pod.attach("last", &[disk.storage("ro", "last")]).await.unwrap();
        assert_eq!((0..8).filter(|n| at("last").join(format!("c{n}")).exists()).count(), 8);
        pod.release("last").await;
    });
}
