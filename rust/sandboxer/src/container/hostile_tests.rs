//! A guest that means harm, and a daemon that is killed: what neither of them may do to the host. With real
//! mounts, as root.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use nix::{libc, mount::MsFlags};
use serde_json::json;

use super::{
    Plan, Room, Storage,
    mount::{
        MountError, RootfsMount,
        tests::{Lab, bound, propagation, tmpfs},
        unmount_below,
    },
    mountinfo, remove,
    spec::Target,
    tree::{Dir, Mount, tests::killed_after},
};

/// A pod in a folder of its own, a container of which has three volumes.
struct Pod {
    lab: Lab,
    storage: Storage,
}

fn write_bundle(at: &Path, volumes: &[PathBuf]) {
    let mount = |(n, source): (usize, &PathBuf)| {
        let access = if n % 2 == 0 { "rw" } else { "ro" };
        json!({"destination": format!("/v{n}"), "type": "bind", "source": source, "options": ["rbind", "rprivate", access]})
    };
    let mounts: Vec<_> = volumes.iter().enumerate().map(mount).collect();
    fs::create_dir_all(at).unwrap();
    fs::write(at.join("config.json"), json!({"ociVersion": "1.1.0", "mounts": mounts}).to_string()).unwrap();
}

fn plan(dir: &Path, container: &str) -> Plan {
    let image = RootfsMount {
        kind: "bind".into(),
        source: dir.join("lower1").to_str().unwrap().into(),
        options: vec!["rbind".into(), "rw".into()],
        ..RootfsMount::default()
    };
    let target = Target { container, pod_pid: 1, shared_pids: false };
    Plan::new(&target, &dir.join("bundle"), vec![image], &Room::default()).unwrap()
}

impl Pod {
    fn new() -> Self {
        let lab = Lab::new();
        fs::create_dir(lab.path("pod")).unwrap();
        let storage = Storage::new(&lab.path("pod"));
        storage.create().unwrap();
        Self { lab, storage }
    }

    fn prepare(&self, container: &str) {
        self.storage.prepare(container, &plan(&self.lab.path(""), container), &[]).unwrap();
    }
}

/// A guest that is root in its VM: it works on `shared/` as its file server gives it.
struct Guest {
    shared: PathBuf,
    file: PathBuf,
    folder: PathBuf,
    refused: Arc<AtomicU64>,
    got_through: Arc<AtomicU64>,
}

impl Guest {
    fn count(&self, what: &str, done: io::Result<()>) {
        match done {
            Ok(()) => {
                eprintln!("the guest could {what}");
                self.got_through.fetch_add(1, Ordering::SeqCst);
            }
            Err(error) if error.raw_os_error() == Some(libc::EROFS) => {
                self.refused.fetch_add(1, Ordering::SeqCst);
            }
            // It came too early or too late, or what it wants to make is there.
            Err(_) => {}
        }
    }

    fn attack(&self) {
        let top = self.shared.join("new");
        self.count("write into the share", fs::write(&top, "x"));
        self.count("make a folder in the share", fs::create_dir(&top));
        for entry in fs::read_dir(&self.shared).into_iter().flatten().flatten() {
            let folder = entry.path();
            if entry.file_name() == "files" {
                continue;
            }
            let file = |name: &str| folder.join(name);
            for name in ["config.json", ".config.json.new", "storages.json"] {
                self.count("link to a file", symlink(&self.file, file(name)));
            }
            for name in (0..500).map(|n| n.to_string()).chain(["rootfs", "mounts"].map(str::to_owned)) {
                self.count("link to a folder", symlink(&self.folder, file(&name)));
            }
            self.count("rename a folder", fs::rename(&folder, self.shared.join("away")));
            self.count("rename mounts", fs::rename(file("1"), file("away")));
            self.count("remove a spec", fs::remove_file(file("config.json")));
            self.count("change a spec", fs::write(file("config.json"), "{}"));
            self.count("hide the spec", fs::rename(file("config.json"), file("other")));
            self.count("link the spec", fs::hard_link(file("config.json"), file("other")));
        }
    }
}

fn points() -> Vec<String> {
    let all = mountinfo::read().unwrap();
    let of = |entry: mountinfo::Entry| format!("{} {}", entry.point.display(), entry.root.display());
    all.into_iter().map(of).collect()
}

fn below(points: &[String], path: &Path) -> Vec<String> {
    points.iter().filter(|point| point.starts_with(path.to_str().unwrap())).cloned().collect()
}

#[test]
fn a_guest_with_links_and_renames_reaches_nothing_of_the_host() {
    let pod = Pod::new();
    let (file, folder) = (pod.lab.path("precious"), pod.lab.path("others"));
    fs::write(&file, "precious").unwrap();
    // As those of another pod are.
    for name in ["0", "1", "2"] {
        fs::create_dir_all(folder.join(name)).unwrap();
        tmpfs(&folder.join(name));
    }
    let volumes = ["a", "b", "c"].map(|name| pod.lab.path(&format!("source/{name}")));
    volumes.iter().for_each(|volume| fs::create_dir(volume).unwrap());
    write_bundle(&pod.lab.path("bundle"), &volumes);
    let before = below(&points(), &folder);
    let (refused, got_through, end) = <(Arc<AtomicU64>, Arc<AtomicU64>, Arc<AtomicBool>)>::default();
    let shared = pod.lab.path("pod/shared");
    let guest = Guest { shared, file: file.clone(), folder: folder.clone(), refused, got_through };
    let (refused, got_through) = (guest.refused.clone(), guest.got_through.clone());
    let ended = end.clone();
    let attacker = thread::spawn(move || {
        while !ended.load(Ordering::SeqCst) {
            guest.attack();
        }
    });
    for n in 0..100 {
        let container = format!("c{n}");
        pod.prepare(&container);
        let spec = fs::read_to_string(pod.lab.path(&format!("pod/shared/{container}/config.json"))).unwrap();
        assert!(spec.contains("/v2"), "{spec}");
        pod.storage.release(&container, &[]).unwrap();
        assert!(!pod.lab.path(&format!("pod/work/{container}")).exists());
    }
    end.store(true, Ordering::SeqCst);
    attacker.join().unwrap();
    assert!(refused.load(Ordering::SeqCst) > 1000, "the guest did not really try");
    assert_eq!(got_through.load(Ordering::SeqCst), 0);
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    assert_eq!(below(&points(), &folder), before, "mounts of another pod");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 3);
}

#[test]
fn what_a_guest_may_write_to_is_what_it_was_given() {
    let pod = Pod::new();
    fs::create_dir(pod.lab.path("source/a")).unwrap();
    fs::create_dir(pod.lab.path("source/b")).unwrap();
    write_bundle(&pod.lab.path("bundle"), &[pod.lab.path("source/a"), pod.lab.path("source/b")]);
    pod.prepare("c");
    let shared = pod.lab.path("pod/shared");
    fs::write(shared.join("c/rootfs/new"), "x").unwrap();
    assert!(pod.lab.path("lower1/new").exists());
    // A file for all, which has to have an end.
    pod.storage.write_pod_file("hosts", "one").unwrap();
    pod.storage.write_pod_file("hosts", "127.0.0.1 localhost").unwrap();
    assert_eq!(fs::read_to_string(shared.join("files/hosts")).unwrap(), "127.0.0.1 localhost");
    let full = fs::write(shared.join("files/hosts"), vec![b'x'; 1 << 20]).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    let many = (0..100).find_map(|n| fs::write(shared.join(format!("files/{n}")), "").err()).unwrap();
    assert_eq!(many.raw_os_error(), Some(libc::ENOSPC));
    pod.storage.unmount().unwrap();
    assert!(below(&points(), &pod.lab.path("pod")).is_empty());
}

/// A tree of a user's whose mounts pass on to one another what is mounted in them, as everything below / does
/// under systemd.
fn canary(lab: &Lab) -> PathBuf {
    let volume = lab.path("source");
    bound(&volume, &volume);
    propagation(&volume, MsFlags::MS_SHARED);
    for name in ["sub", "sub/deep", "bound"] {
        fs::create_dir(volume.join(name)).unwrap();
        if name != "bound" {
            tmpfs(&volume.join(name));
        }
        fs::write(volume.join(name).join("f"), "precious").unwrap();
    }
    bound(&volume.join("sub"), &volume.join("bound"));
    volume
}

#[test]
#[ignore = "part of the test after it, which runs it and kills it"]
fn a_process_that_is_killed() {
    let dir = PathBuf::from(std::env::var("KUASAR_TEST_DIR").unwrap());
    let storage = Storage::new(&dir.join("pod"));
    storage.create().unwrap();
    storage.prepare("c", &plan(&dir, "c"), &[]).unwrap();
    storage.release("c", &[]).unwrap();
    storage.prepare("d", &plan(&dir, "d"), &[]).unwrap();
    storage.unmount().unwrap();
}

#[test]
fn a_users_mounts_survive_a_daemon_that_is_killed_between_any_two_calls() {
    let lab = Lab::new();
    let volume = canary(&lab);
    write_bundle(&lab.path("bundle"), &[volume.clone(), volume.join("sub"), volume.join("sub/f")]);
    let before = below(&points(), &volume);
    assert_eq!(before.len(), 4, "{before:?}");
    let test = "container::hostile_tests::a_process_that_is_killed";
    let mut steps = 0;
    loop {
        fs::create_dir(lab.path("pod")).unwrap();
        let killed = killed_after(steps, test, lab.dir());
        // The next daemon, once as it finds the pod and goes on with it, and then as it removes it.
        let storage = Storage::new(&lab.path("pod"));
        storage.create().unwrap();
        storage.prepare("c", &plan(lab.dir(), "c"), &[]).unwrap();
        let spec = fs::read_to_string(lab.path("pod/shared/c/config.json")).unwrap();
        let spec: serde_json::Value = serde_json::from_str(&spec).unwrap();
        let shown = spec["mounts"][0]["source"].as_str().unwrap();
        let shown = lab.path("pod/shared").join(shown.strip_prefix("/run/kuasar/state/").unwrap());
        assert_eq!(fs::read_to_string(shown.join("sub/deep/f")).unwrap(), "precious");
        assert_eq!(below(&points(), &volume), before, "after {steps} calls, in use");
        storage.release("c", &[]).unwrap();
        assert!(below(&points(), &lab.path("pod/work/c")).is_empty(), "after {steps} calls");
        storage.release("d", &[]).unwrap();
        assert!(below(&points(), &lab.path("pod/work/volumes")).is_empty(), "after {steps} calls");
        remove::remove(&lab.path("pod")).unwrap();
        assert_eq!(below(&points(), &volume), before, "after {steps} calls");
        for name in ["sub", "sub/deep", "bound"] {
            assert_eq!(fs::read_to_string(volume.join(name).join("f")).unwrap(), "precious");
        }
        if !killed {
            break;
        }
        steps += 1;
    }
    assert!(steps > 20, "it was killed {steps} times only");
}

/// Daemons until now made a bind mount first and said then what it passes on.
#[test]
fn unmounting_what_passes_unmounts_on_to_a_user_does_not() {
    let lab = Lab::new();
    let volume = canary(&lab);
    let before = below(&points(), &volume);
    fs::create_dir_all(lab.path("pod/stage/mount")).unwrap();
    nix::mount::mount(
        Some(&volume),
        &lab.path("pod/stage/mount"),
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        None::<&str>,
    )
    .unwrap();
    remove::remove(&lab.path("pod")).unwrap();
    assert!(!lab.path("pod").exists());
    assert_eq!(below(&points(), &volume), before);
    assert_eq!(fs::read_to_string(volume.join("bound/f")).unwrap(), "precious");
}

#[test]
fn links_of_an_image_stay_in_the_image() {
    let lab = Lab::new();
    fs::create_dir(lab.path("outside")).unwrap();
    let inner = lab.path("lower1").join(lab.path("outside").strip_prefix("/").unwrap());
    fs::create_dir_all(&inner).unwrap();
    symlink(lab.path("outside"), lab.path("lower1/to-elsewhere")).unwrap();
    fs::write(lab.path("lower2/two"), "").unwrap();
    let mount = |source: &str, target: &str| RootfsMount {
        kind: "bind".into(),
        source: lab.path(source).to_str().unwrap().into(),
        target: target.into(),
        options: vec!["rbind".into(), "ro".into()],
    };
    lab.rootfs(&[mount("lower1", ""), mount("lower2", "/to-elsewhere")]).unwrap();
    assert_eq!(fs::read_dir(lab.path("outside")).unwrap().count(), 0, "it was mounted outside of the image");
    let seen = lab.path("shared/rootfs").join(lab.path("outside").strip_prefix("/").unwrap());
    assert!(seen.join("two").exists());
    let missing = lab.rootfs(&[mount("lower1", ""), mount("lower2", "/none")]).unwrap_err().to_string();
    assert!(missing.contains("lower2") && missing.contains("No such file"), "{missing}");
}

/// In little stack, which is what threads of the daemon have.
fn in_little_stack(work: impl FnOnce() -> Result<(), MountError> + Send + 'static) {
    thread::Builder::new().stack_size(128 << 10).spawn(work).unwrap().join().unwrap().unwrap();
}

fn deep(top: &Dir, depth: u32) {
    let mut at = top.make("0").unwrap();
    for _ in 0..depth {
        at = at.make("a-name-that-is-not-short").unwrap();
        at.write("f", b"x", 0o600).unwrap();
    }
}

#[test]
fn a_tree_of_any_depth_is_removed() {
    let lab = Lab::new();
    fs::create_dir_all(lab.path("pod/x")).unwrap();
    deep(&Dir::open(&lab.path("pod/x")).unwrap(), 8000);
    let pod = lab.path("pod");
    // What an earlier attempt moved up, in the way of the next.
    fs::create_dir(pod.join(".removing-1")).unwrap();
    fs::write(pod.join(".removing-1/f"), "x").unwrap();
    in_little_stack(move || remove::remove(&pod));
    assert!(!lab.path("pod").exists());
}

#[test]
fn a_folder_of_any_width_is_removed() {
    let lab = Lab::new();
    fs::create_dir_all(lab.path("pod/wide")).unwrap();
    for n in 0..200_000 {
        if n % 100 == 0 {
            fs::create_dir_all(lab.path(&format!("pod/wide/{n}/x"))).unwrap();
        } else {
            fs::File::create(lab.path(&format!("pod/wide/{n}"))).unwrap();
        }
    }
    let pod = lab.path("pod");
    in_little_stack(move || remove::remove(&pod));
    assert!(!lab.path("pod").exists());
}

#[test]
fn a_removal_stops_at_a_mount_however_deep() {
    let lab = Lab::new();
    fs::create_dir_all(lab.path("pod/a/b/c/d")).unwrap();
    fs::write(lab.path("source/f"), "precious").unwrap();
    bound(&lab.path("source"), &lab.path("pod/a/b/c/d"));
    let error = remove::remove_tree(&lab.path("pod")).unwrap_err().to_string();
    assert!(error.contains("is something mounted there?"), "{error}");
    remove::remove(&lab.path("pod")).unwrap();
    assert_eq!(fs::read_to_string(lab.path("source/f")).unwrap(), "precious");
}

#[test]
fn names_lead_nowhere_else() {
    let lab = Lab::new();
    fs::write(lab.path("precious"), "precious").unwrap();
    fs::create_dir(lab.path("top")).unwrap();
    symlink(lab.path("source"), lab.path("top/link")).unwrap();
    symlink(lab.path("precious"), lab.path("top/file")).unwrap();
    let top = Dir::open(&lab.path("top")).unwrap();
    for bad in ["link", "../source", "link/x", "/etc"] {
        assert!(top.at(bad).is_err(), "{bad}");
    }
    assert!(top.make("link").is_err());
    // A file is put in the place of the link.
    top.write("file", b"mine", 0o600).unwrap();
    assert_eq!(fs::read_to_string(lab.path("precious")).unwrap(), "precious");
    symlink(lab.path("precious"), lab.path("top/.next.new")).unwrap();
    top.write("next", b"mine", 0o600).unwrap();
    assert_eq!(fs::read_to_string(lab.path("precious")).unwrap(), "precious");
    assert!(Dir::open(&lab.path("top/link")).is_err());
    // And a mount that nobody attached ends with its descriptor.
    let before = below(&points(), lab.dir());
    drop(Mount::copy(std::os::fd::AsFd::as_fd(&top), true).unwrap());
    assert_eq!(below(&points(), lab.dir()), before);
    unmount_below(&lab.path("top")).unwrap();
}
