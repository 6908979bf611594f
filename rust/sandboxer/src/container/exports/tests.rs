//! With real mounts, as root. `shared/` is what a file server on the host goes through, and a process with a
//! mount namespace of its own one that has left it.

use std::{
    fs::OpenOptions,
    os::fd::AsFd,
    process::{Child, Command, Stdio},
};

use super::*;
use crate::container::{
    mount::tests::{Lab, bound, propagation, tmpfs},
    mountinfo,
    tree::mount_id,
};

const RO: bool = true;
const RW: bool = false;

fn attach(lab: &Lab, container: &str, source: &str, read_only: bool) -> Shown {
    lab.exports().attach(container, &lab.bind_of(source, read_only), Wish::default(), &[]).unwrap()
}

fn release(lab: &Lab, container: &str) {
    lab.exports().release(container, &[]).unwrap();
}

/// The error of opening a file to write to it.
fn writes(path: &Path) -> Result<(), i32> {
    OpenOptions::new().append(true).open(path).map(drop).map_err(|error| error.raw_os_error().unwrap())
}

fn mounted(lab: &Lab) -> usize {
    let folder = lab.path("work/volumes");
    mountinfo::read().unwrap().iter().filter(|entry| entry.point.starts_with(&folder)).count()
}

#[test]
fn what_containers_have_in_common_is_shared_once() {
    let lab = Lab::new();
    fs::write(lab.path("source/f"), "x").unwrap();
    let one = attach(&lab, "a", "source", RW);
    assert_eq!(one.whole().unwrap(), "/run/kuasar/state/volumes/1");
    for container in ["a", "b"] {
        assert_eq!(attach(&lab, container, "source", RW), one);
    }
    // By another name, and by another mount of it.
    std::os::unix::fs::symlink(lab.path("source"), lab.path("link")).unwrap();
    assert_eq!(attach(&lab, "c", "link", RW), one);
    fs::create_dir(lab.path("again")).unwrap();
    bound(&lab.path("source"), &lab.path("again"));
    assert_eq!(attach(&lab, "d", "again", RW), one);
    assert_eq!(mounted(&lab), 1);
    for container in ["a", "b", "c"] {
        release(&lab, container);
        assert!(lab.path("shared/volumes/1/f").exists());
    }
    release(&lab, "d");
    release(&lab, "d");
    assert!(!lab.path("work/volumes/1").exists() && mounted(&lab) == 0);
    // A guest may remember what was at a number.
    assert_eq!(attach(&lab, "e", "source", RW).whole().unwrap(), "/run/kuasar/state/volumes/2");
    fs::write(lab.path("source/g"), "").unwrap();
    assert_ne!(attach(&lab, "e", "source/g", RW).number, attach(&lab, "e", "lower1", RW).number);
}

/// A process that has left the mount namespace, as virtiofsd does.
struct Server(Child);

impl Server {
    fn new() -> Self {
        let mut command = Command::new("unshare");
        let command =
            command.args(["--mount", "--propagation", "slave", "sh", "-c", "echo; exec sleep 1000"]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        Self(child)
    }

    fn sees(&self, path: &Path) -> PathBuf {
        Path::new("/proc").join(self.0.id().to_string()).join("root").join(path.strip_prefix("/").unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_volume_is_writable_while_somebody_may_write_and_stays_the_same() {
    let lab = Lab::new();
    fs::write(lab.path("source/f"), "x").unwrap();
    let server = Server::new();
    let servers = [server.0.id(), std::process::id()];
    let attach = |container: &str, read_only| {
        let bind = lab.bind_of("source", read_only);
        lab.exports().attach(container, &bind, Wish::default(), &servers).unwrap()
    };
    let one = attach("reads", RO);
    let file = lab.path("shared/volumes/1/f");
    let views = [file.clone(), server.sees(&file), lab.path("work/volumes/1/f")];
    let ids = || views.each_ref().map(|view| mount_id(fs::File::open(view).unwrap().as_fd()).unwrap());
    let before = ids();
    assert_eq!(views.each_ref().map(|view| writes(view)), [Err(libc::EROFS); 3]);
    assert_eq!(attach("reads-too", RO), one);
    assert_eq!(views.each_ref().map(|view| writes(view)), [Err(libc::EROFS); 3]);
    assert_eq!(attach("writes", RW), one);
    assert_eq!(views.each_ref().map(|view| writes(view)), [Ok(()); 3]);
    assert_eq!(ids(), before, "it is another mount, and so another file");
    // An open file keeps the volume writable; the next release makes it read-only again.
    let open = OpenOptions::new().append(true).open(&views[1]).unwrap();
    lab.exports().release("writes", &servers).unwrap();
    assert_eq!(writes(&views[1]), Ok(()));
    drop(open);
    attach("writes", RW);
    lab.exports().release("writes", &servers).unwrap();
    assert_eq!(views.each_ref().map(|view| writes(view)), [Err(libc::EROFS); 3]);
    assert_eq!(writes(&lab.path("source/f")), Ok(()), "and the user's own is as it was");
}

#[test]
fn what_is_read_only_on_the_host_stays_so() {
    let lab = Lab::new();
    fs::write(lab.path("source/f"), "x").unwrap();
    fs::create_dir(lab.path("view")).unwrap();
    bound(&lab.path("source"), &lab.path("view"));
    let flags =
        nix::mount::MsFlags::MS_REMOUNT | nix::mount::MsFlags::MS_BIND | nix::mount::MsFlags::MS_RDONLY;
    nix::mount::mount(None::<&str>, &lab.path("view"), None::<&str>, flags, None::<&str>).unwrap();
    for read_only in [RO, RW] {
        assert_eq!(attach(&lab, "a", "view", read_only).number, 1);
    }
    assert_eq!(writes(&lab.path("shared/volumes/1/f")), Err(libc::EROFS));
    // The same folder by a way that lets one write.
    assert_eq!(attach(&lab, "b", "source", RW).number, 2);
    assert_eq!(writes(&lab.path("shared/volumes/2/f")), Ok(()));
    assert_eq!(writes(&lab.path("shared/volumes/1/f")), Err(libc::EROFS));
}

#[test]
fn a_server_that_is_gone_makes_it_two() {
    let lab = Lab::new();
    fs::write(lab.path("source/f"), "x").unwrap();
    attach(&lab, "a", "source", RO);
    let gone = Server::new().0.id();
    let bind = lab.bind_of("source", RW);
    let apart = lab.exports().attach("b", &bind, Wish::default(), &[gone]).unwrap();
    assert_eq!(apart.number, 2);
    assert_eq!(writes(&lab.path("shared/volumes/2/f")), Ok(()));
    assert_eq!(attach(&lab, "c", "source", RW), apart);
    release(&lab, "b");
    release(&lab, "c");
    assert!(!lab.path("work/volumes/2").exists() && lab.path("work/volumes/1/f").exists());
}

#[test]
fn a_part_of_a_volume_is_a_part_of_it() {
    let lab = Lab::new();
    fs::create_dir_all(lab.path("source/sub/deep")).unwrap();
    fs::write(lab.path("source/sub/f"), "x").unwrap();
    let whole = attach(&lab, "a", "source", RO);
    let part = attach(&lab, "b", "source/sub/deep", RW);
    assert_eq!((part.number, part.whole()), (whole.number, None));
    assert_eq!(part.in_share().unwrap(), "volumes/1/sub/deep");
    assert_eq!(attach(&lab, "b", "source/sub/f", RO).in_share().unwrap(), "volumes/1/sub/f");
    assert_eq!(writes(&lab.path("shared/volumes/1/sub/f")), Ok(()), "one that writes is there");
    release(&lab, "a");
    assert!(lab.path("shared/volumes/1/sub/deep").exists(), "its part is in use");
    release(&lab, "b");
    assert_eq!(mounted(&lab), 0);
    // What is behind another mount is no part of it.
    tmpfs(&lab.path("source/sub"));
    fs::create_dir(lab.path("source/sub/deep")).unwrap();
    attach(&lab, "a", "source", RO);
    assert!(attach(&lab, "b", "source/sub/deep", RO).whole().is_some());
}

/// As the kubelet lays it out.
fn kubelet(lab: &Lab, plugin: &str) -> (String, String) {
    let volume = format!("kubelet/pods/u-1/volumes/{plugin}/data");
    let part = format!("kubelet/pods/u-1/volume-subpaths/data/app-{plugin}/0");
    for path in [format!("{volume}/sub"), part.clone()] {
        fs::create_dir_all(lab.path(&path)).unwrap();
    }
    bound(&lab.path(&format!("{volume}/sub")), &lab.path(&part));
    (volume, part)
}

#[test]
fn a_part_of_the_pods_own_volume_may_come_first() {
    let lab = Lab::new();
    let (volume, part) = kubelet(&lab, "kubernetes.io~empty-dir");
    let shown = attach(&lab, "a", &part, RW);
    assert_eq!(shown.in_share().unwrap(), "volumes/1/sub");
    assert_eq!(attach(&lab, "b", &volume, RW).whole().unwrap(), "/run/kuasar/state/volumes/1");
    for container in ["a", "b"] {
        release(&lab, container);
    }
    assert_eq!(mounted(&lab), 0);
    // Of others, a pod gets what it asked for.
    let (volume, part) = kubelet(&lab, "kubernetes.io~csi");
    fs::write(lab.path(&volume).join("of-others"), "").unwrap();
    let shown = attach(&lab, "a", &part, RW);
    assert_eq!(shown.whole().unwrap(), "/run/kuasar/state/volumes/2");
    assert!(!lab.path("shared/volumes/2/of-others").exists());
    // A name that leads elsewhere is not believed.
    std::os::unix::fs::symlink(
        lab.path("source"),
        lab.path("kubelet/pods/u-1/volumes/kubernetes.io~empty-dir/x"),
    )
    .unwrap();
    fs::create_dir_all(lab.path("kubelet/pods/u-1/volume-subpaths/x/app/0")).unwrap();
    assert_eq!(attach(&lab, "a", "kubelet/pods/u-1/volume-subpaths/x/app/0", RW).number, 3);
    assert!(attach(&lab, "a", "source", RW).number > 3);
}

#[test]
fn mounts_below_a_volume_are_those_of_where_it_was_found() {
    let lab = Lab::new();
    bound(&lab.path("source"), &lab.path("source"));
    propagation(&lab.path("source"), nix::mount::MsFlags::MS_SHARED);
    fs::create_dir_all(lab.path("source/sub")).unwrap();
    fs::create_dir(lab.path("plain")).unwrap();
    bound(&lab.path("source"), &lab.path("plain"));
    propagation(&lab.path("plain"), nix::mount::MsFlags::MS_PRIVATE);
    tmpfs(&lab.path("source/sub"));
    fs::write(lab.path("source/sub/f"), "below").unwrap();
    assert_eq!(attach(&lab, "a", "plain", RW).number, 1);
    assert!(!lab.path("shared/volumes/1/sub/f").exists());
    assert_eq!(attach(&lab, "b", "source", RW).number, 2);
    assert_eq!(fs::read_to_string(lab.path("shared/volumes/2/sub/f")).unwrap(), "below");
    // One that the host has to keep read-only, as in the guest all of it is one mount.
    let wish = Wish { read_only_by_host: true, receives: false };
    let apart = lab.exports().attach("c", &lab.bind_of("source", RO), wish, &[]).unwrap();
    assert_eq!(apart.number, 3);
    fs::write(lab.path("source/f"), "x").unwrap();
    assert_eq!(writes(&lab.path("shared/volumes/3/f")), Err(libc::EROFS));
    assert_eq!(writes(&lab.path("shared/volumes/3/sub/f")), Ok(()));
    for container in ["a", "b", "c"] {
        release(&lab, container);
    }
    assert_eq!(mounted(&lab), 0);
    assert_eq!(fs::read_to_string(lab.path("source/sub/f")).unwrap(), "below");
}

#[test]
fn the_table_is_as_good_as_what_is_mounted() {
    let lab = Lab::new();
    attach(&lab, "a", "source", RW);
    // As after a kill between the table and the mount.
    crate::container::mount::unmount_below(&lab.path("work/volumes")).unwrap();
    assert_eq!(attach(&lab, "b", "source", RW).number, 2);
    release(&lab, "a");
    assert!(lab.path("shared/volumes/2").exists() && !lab.path("work/volumes/1").exists());
    fs::write(lab.path(FILE), "torn").unwrap();
    let work = lab.pod().at("work").unwrap();
    let error = Exports::of(&lab.path(""), &work).unwrap_err().to_string();
    assert!(error.contains("volumes.json: expected ident"), "{error}");
}
