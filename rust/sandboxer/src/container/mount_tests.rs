//! With real mounts: these tests need root. Each works below a folder of its own that is a private mount.

use std::{fs, os::unix::fs::symlink, sync::mpsc, thread};

use nix::{
    mount::mount,
    sched::{CloneFlags, unshare},
};

use super::{
    super::{
        exports::{Exports, Wish},
        remove,
        spec::Bind,
        storage::StorageError,
    },
    *,
};

pub(in crate::container) struct Lab {
    dir: tempfile::TempDir,
}

pub(in crate::container) fn propagation(point: &Path, kind: MsFlags) {
    mount(None::<&str>, point, None::<&str>, kind | MsFlags::MS_REC, None::<&str>).unwrap();
}

pub(in crate::container) fn bound(source: &Path, target: &Path) {
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
}

pub(in crate::container) fn tmpfs(at: &Path) {
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
}

impl Lab {
    pub(in crate::container) fn new() -> Self {
        let lab = Self { dir: tempfile::tempdir().unwrap() };
        tmpfs(lab.dir.path());
        propagation(lab.dir.path(), MsFlags::MS_PRIVATE);
        for name in ["lower1", "lower2", "upper", "work-dir", "source"] {
            fs::create_dir(lab.path(name)).unwrap();
        }
        share(&lab.pod()).unwrap();
        lab
    }

    pub(in crate::container) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(in crate::container) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(in crate::container) fn pod(&self) -> Dir {
        Dir::open(self.dir.path()).unwrap()
    }

    fn work(&self) -> Dir {
        self.pod().at("work").unwrap()
    }

    fn stage(&self) -> Dir {
        self.pod().make("stage").unwrap()
    }

    pub(in crate::container) fn exports(&self) -> Exports {
        Exports::of(self.dir(), &self.work()).unwrap()
    }

    fn volume(&self, source: &str, read_only: bool) -> Result<(), StorageError> {
        self.exports().attach("c", &self.bind_of(source, read_only), Wish::default(), &[]).map(drop)
    }

    pub(in crate::container) fn rootfs(&self, mounts: &[RootfsMount]) -> Result<(), MountError> {
        rootfs(mounts, &self.work(), "rootfs", &self.stage())
    }

    pub(in crate::container) fn bind_of(&self, source: &str, read_only: bool) -> Bind {
        Bind {
            name: "0".into(),
            source: self.path(source),
            destination: "/data".into(),
            read_only,
            recursive: true,
            disk: None,
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        unmount_below(self.dir.path()).unwrap();
    }
}

fn overlay(layers: &[PathBuf], lab: &Lab) -> RootfsMount {
    let layers: Vec<&str> = layers.iter().map(|p| p.to_str().unwrap()).collect();
    RootfsMount {
        kind: "overlay".into(),
        source: "overlay".into(),
        target: String::new(),
        options: vec![
            format!("workdir={}", lab.path("work-dir").display()),
            format!("upperdir={}", lab.path("upper").display()),
            format!("lowerdir={}", layers.join(":")),
        ],
    }
}

#[test]
fn an_overlay_shows_its_layers_and_keeps_writes_in_the_upper() {
    let lab = Lab::new();
    fs::write(lab.path("lower1/a"), "1").unwrap();
    fs::write(lab.path("lower2/b"), "2").unwrap();
    let target = lab.path("shared/rootfs");
    lab.rootfs(&[overlay(&[lab.path("lower1"), lab.path("lower2")], &lab)]).unwrap();
    assert_eq!(
        fs::read_to_string(target.join("a")).unwrap() + &fs::read_to_string(target.join("b")).unwrap(),
        "12"
    );
    fs::write(target.join("new"), "n").unwrap();
    assert!(lab.path("upper/new").exists() && !lab.path("lower1/new").exists());
}

#[test]
fn an_overlay_with_more_layers_than_a_page_of_options_mounts() {
    let lab = Lab::new();
    let layers: Vec<PathBuf> =
        (0..120).map(|n| lab.path(&format!("snapshots-with-a-long-name/{n}/fs"))).collect();
    for (n, layer) in layers.iter().enumerate() {
        fs::create_dir_all(layer).unwrap();
        fs::write(layer.join(format!("file{n}")), "x").unwrap();
    }
    let one = overlay(&layers, &lab);
    assert!(one.options.join(",").len() > MAX_DATA, "the test needs more than a page");
    let target = lab.path("shared/rootfs");
    let before = std::env::current_dir().unwrap();
    lab.rootfs(&[one]).unwrap();
    assert_eq!(fs::read_dir(&target).unwrap().count(), 120);
    assert_eq!(std::env::current_dir().unwrap(), before);
}

#[test]
fn a_read_only_volume_is_so_in_the_namespace_of_a_file_server_too() {
    let lab = Lab::new();
    fs::write(lab.path("source/f"), "kept").unwrap();
    let (to_server, from_test) = mpsc::channel::<()>();
    let (to_test, from_server) = mpsc::channel();
    let shared = lab.path("shared");
    let seen = shared.join("volumes/1/f");
    let root = lab.dir.path().to_owned();
    // As virtiofsd does: a mount namespace of its own, in which it only receives.
    let server = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).unwrap();
        to_test.send(String::new()).unwrap();
        from_test.recv().unwrap();
        let read = fs::read_to_string(&seen);
        let write = fs::write(&seen, "broken").map_err(|e| e.raw_os_error());
        to_test.send(format!("{read:?} {write:?}")).unwrap();
        let _ = root;
    });
    from_server.recv().unwrap();
    lab.volume("source", true).unwrap();
    to_server.send(()).unwrap();
    assert_eq!(from_server.recv().unwrap(), format!("Ok(\"kept\") Err(Some({}))", nix::libc::EROFS));
    server.join().unwrap();
}

#[test]
fn unmounting_a_volume_leaves_the_mounts_below_its_source() {
    let lab = Lab::new();
    // The source is in a peer group, as everything below / on a systemd host is.
    bound(&lab.path("source"), &lab.path("source"));
    propagation(&lab.path("source"), MsFlags::MS_SHARED);
    fs::create_dir(lab.path("source/sub")).unwrap();
    tmpfs(&lab.path("source/sub"));
    fs::write(lab.path("source/sub/f"), "precious").unwrap();
    lab.volume("source", false).unwrap();
    assert!(lab.path("shared/volumes/1/sub/f").exists());
    remove::remove(&lab.path("work/volumes/1")).unwrap();
    assert!(!lab.path("shared/volumes/1").exists());
    assert_eq!(fs::read_to_string(lab.path("source/sub/f")).unwrap(), "precious");
}

#[test]
fn a_mount_that_comes_later_below_the_source_arrives() {
    let lab = Lab::new();
    bound(&lab.path("source"), &lab.path("source"));
    propagation(&lab.path("source"), MsFlags::MS_SHARED);
    fs::create_dir(lab.path("source/late")).unwrap();
    lab.volume("source", false).unwrap();
    tmpfs(&lab.path("source/late"));
    fs::write(lab.path("source/late/f"), "x").unwrap();
    assert!(lab.path("shared/volumes/1/late/f").exists());
}

#[test]
fn removal_never_deletes_behind_a_mount() {
    let lab = Lab::new();
    fs::create_dir_all(lab.path("pod/shared/c/mounts/0")).unwrap();
    fs::write(lab.path("source/f"), "precious").unwrap();
    // The same file system on both sides: a comparison of devices would not notice.
    bound(&lab.path("source"), &lab.path("pod/shared/c/mounts/0"));
    let error = remove::remove_tree(&lab.path("pod")).unwrap_err().to_string();
    assert!(error.contains("is something mounted there?"), "{error}");
    assert_eq!(fs::read_to_string(lab.path("source/f")).unwrap(), "precious");
    remove::remove(&lab.path("pod")).unwrap();
    assert!(!lab.path("pod").exists());
    assert_eq!(fs::read_to_string(lab.path("source/f")).unwrap(), "precious");
    remove::remove(&lab.path("pod")).unwrap();
}

#[test]
fn removal_does_not_follow_links() {
    let lab = Lab::new();
    fs::create_dir(lab.path("pod")).unwrap();
    fs::write(lab.path("source/f"), "precious").unwrap();
    symlink(lab.path("source"), lab.path("pod/link")).unwrap();
    remove::remove(&lab.path("pod")).unwrap();
    assert!(lab.path("source/f").exists());
}

#[test]
fn a_busy_mount_goes_away_all_the_same() {
    let lab = Lab::new();
    fs::write(lab.path("source/f"), "x").unwrap();
    lab.volume("source", false).unwrap();
    let open = fs::File::open(lab.path("shared/volumes/1/f")).unwrap();
    unmount_below(&lab.path("work/volumes/1")).unwrap();
    assert!(!lab.path("shared/volumes/1/f").exists());
    drop(open);
}

#[test]
fn a_single_file_is_a_volume_too() {
    let lab = Lab::new();
    fs::write(lab.path("source/hosts"), "127.0.0.1 localhost").unwrap();
    lab.volume("source/hosts", false).unwrap();
    assert_eq!(fs::read_to_string(lab.path("shared/volumes/1")).unwrap(), "127.0.0.1 localhost");
}

#[test]
fn what_cannot_be_mounted_says_why() {
    let lab = Lab::new();
    let socket = std::os::unix::net::UnixListener::bind(lab.path("source/s")).unwrap();
    let said = lab.volume("source/s", false).unwrap_err().to_string();
    assert!(said.contains("at /data: it is a socket of the host"), "{said}");
    drop(socket);
    let said = lab.volume("absent", false).unwrap_err().to_string();
    assert!(said.starts_with("mounting for /data ") && said.contains("No such file"), "{said}");
    let said = lab.rootfs(&[]).unwrap_err().to_string();
    assert!(said.contains("containerd sent no mounts"), "{said}");
    let image = RootfsMount { kind: "ext4".into(), options: vec!["loop".into()], ..RootfsMount::default() };
    let said = lab.rootfs(&[image]).unwrap_err().to_string();
    assert!(said.contains("use the overlayfs snapshotter"), "{said}");
    let escape = RootfsMount { kind: "bind".into(), target: "../x".into(), ..RootfsMount::default() };
    let said = lab.rootfs(&[escape]).unwrap_err().to_string();
    assert!(said.contains("leaves the root file system"), "{said}");
}
