use std::fs;

use super::*;

fn words(options: &[&str]) -> Vec<String> {
    options.iter().map(|&option| option.to_owned()).collect()
}

fn image(kind: &str, source: &str, options: &[&str]) -> RootfsMount {
    RootfsMount { kind: kind.into(), source: source.into(), target: String::new(), options: words(options) }
}

fn layer(number: u32) -> RootfsMount {
    image("erofs", &format!("/snapshots/{number}/layer.erofs"), &["ro", "loop"])
}

/// As containerd's erofs snapshotter gives it with `default_size` set.
pub(in crate::container) fn writable(layers: u32) -> Vec<RootfsMount> {
    let mut mounts = vec![image("ext4", "/snapshots/9/rwlayer.img", &["rw", "loop"])];
    mounts.extend((1..=layers).rev().map(layer));
    let options = [
        "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
        "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
        "workdir={{ mount 0 }}/work",
        "upperdir={{ mount 0 }}/upper",
        &format!("lowerdir={{{{ overlay 1 {layers} }}}}"),
    ];
    mounts.push(image("format/mkdir/overlay", "overlay", &options));
    mounts
}

fn of(mounts: &[RootfsMount]) -> Layers {
    Layers::of(mounts).unwrap().expect("layers")
}

#[test]
fn templates_are_filled() {
    let points = words(&["/a", "/b", "/c"]);
    for (text, filled) in [
        ("noatime", "noatime"),
        ("upperdir={{ mount 0 }}/upper", "upperdir=/a/upper"),
        ("lowerdir={{ overlay 0 2 }}", "lowerdir=/a:/b:/c"),
        ("lowerdir={{ overlay 2 1 }}:{{mount 0}}", "lowerdir=/c:/b:/a"),
    ] {
        assert_eq!(fill(text, &points).unwrap(), filled);
    }
    for bad in
        ["{{ mount 3 }}", "{{ mount }}", "{{ source 0 }}", "{{ mount 0", "{{ mount -1 }}", "{{ overlay 0 }}"]
    {
        let error = fill(bad, &points).unwrap_err().to_string();
        assert_eq!(error, format!("the root file system's mount has {bad:?}, which is not known"));
    }
}

#[test]
fn a_guest_mounts_what_is_all_in_images() {
    let made = of(&writable(2)).in_guest("c1").unwrap();
    let disks: Vec<_> = made
        .disks
        .iter()
        .map(|(disk, storage)| {
            (
                disk.path().to_str().unwrap(),
                disk.read_only,
                storage.fstype.as_str(),
                storage.mount_point.as_str(),
            )
        })
        .collect();
    assert_eq!(
        disks,
        [
            ("/snapshots/9/rwlayer.img", false, "ext4", "/run/kuasar/storage/c1/layers/0"),
            ("/snapshots/2/layer.erofs", true, "erofs", "/run/kuasar/storage/c1/layers/1"),
            ("/snapshots/1/layer.erofs", true, "erofs", "/run/kuasar/storage/c1/layers/2"),
        ]
    );
    assert_eq!(made.disks[0].1.options, ["rw"]);
    let overlay = made.overlay.unwrap();
    assert_eq!(
        (overlay.driver.as_str(), &*overlay.mount_point),
        ("overlay", "/run/kuasar/storage/c1/rootfs")
    );
    assert_eq!(made.root, overlay.mount_point);
    assert_eq!(
        overlay.options,
        [
            "workdir=/run/kuasar/storage/c1/layers/0/work",
            "upperdir=/run/kuasar/storage/c1/layers/0/upper",
            "lowerdir=/run/kuasar/storage/c1/layers/1:/run/kuasar/storage/c1/layers/2",
        ]
    );
    // One that only reads.
    let view = of(&[layer(1)]).in_guest("c1").unwrap();
    assert_eq!((view.disks.len(), view.overlay, &*view.root), (1, None, "/run/kuasar/storage/c1/layers/0"));
}

#[test]
fn what_needs_the_host_is_mounted_there() {
    let overlay = |options: &[&str]| image("format/mkdir/overlay", "overlay", options);
    let lower = "lowerdir={{ mount 0 }}";
    let merged = image("erofs", "/fsmeta.erofs", &["ro", "loop", "device=/blob"]);
    for (mounts, why) in [
        (
            vec![layer(1), overlay(&["upperdir=/snapshots/9/fs", lower])],
            "its upperdir is /snapshots/9/fs on the host",
        ),
        (vec![layer(1), overlay(&["lowerdir={{ mount 0 }}:/host"])], "its lowerdir is /host on the host"),
        (vec![merged, overlay(&[lower])], "/fsmeta.erofs has its data elsewhere (device=/blob)"),
        (vec![image("btrfs", "/b", &["loop"]), overlay(&[lower])], "/b is a mount of type btrfs"),
        (vec![layer(1), image("format/bind", "/host", &["rbind"])], "it is a folder in an image"),
        (
            vec![
                image("ext4", "/rw", &["rw", "loop"]),
                image("format/mkdir/bind", "{{ mount 0 }}/upper", &["rw"]),
            ],
            "it is a folder in an image",
        ),
    ] {
        assert_eq!(of(&mounts).in_guest("c1").unwrap_err(), why);
    }
}

#[test]
fn others_are_no_layers_and_what_cannot_be_is_named() {
    assert_eq!(Layers::of(&[]).unwrap(), None);
    assert_eq!(Layers::of(&[image("overlay", "overlay", &["lowerdir=/a:/b"])]).unwrap(), None);
    assert_eq!(Layers::of(&[image("ext4", "/image", &["loop"])]).unwrap(), None);
    let mut checked = layer(1);
    checked.options.push("X-containerd.dmverity=/snapshots/1/layer.erofs.dmverity".into());
    for (mounts, part) in [
        (
            vec![checked],
            "is to be checked by dm-verity, which is not done for layers; set dmverity_mode = \"off\"",
        ),
        (
            vec![layer(1), image("mkfs/format/overlay", "overlay", &[])],
            "\"mkfs/format/overlay\", and mkfs is not known",
        ),
        (
            vec![image("mkfs/ext4", "/rw", &[]), image("format/overlay", "overlay", &[])],
            "of type \"mkfs/ext4\" at \"\"",
        ),
    ] {
        let error = Layers::of(&mounts).unwrap_err();
        assert!(matches!(error, MountError::Refused(_)) && error.to_string().contains(part), "{error}");
    }
}

#[test]
fn the_host_mounts_layers_and_makes_their_folders() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    for name in ["a", "b", "point"] {
        fs::create_dir(path(name)).unwrap();
    }
    for (name, file) in [("a", "one"), ("b", "two")] {
        fs::write(dir.path().join(name).join(file), name).unwrap();
        let made = Command::new("mkfs.erofs")
            .args(["-Enoinline_data", &path(&format!("{name}.erofs")), &path(name)])
            .output();
        let Ok(made) = made else {
            eprintln!("skipped: there is no mkfs.erofs");
            return;
        };
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
    let layer = |name: &str| image("erofs", &path(name), &["ro", "loop"]);
    let (upper, work) = (path("layers/0/upper"), path("layers/0/work"));
    // In the place of the image to write to: a folder, for not every machine has a loop device to spare.
    let mounts = [
        image("bind", &path("point"), &["rbind", "rw"]),
        layer("b.erofs"),
        layer("a.erofs"),
        writable(2).pop().unwrap(),
    ];
    let pod = Dir::open(dir.path()).unwrap();
    let target = dir.path().join("rootfs");
    let (stage, images) = (pod.make("stage").unwrap(), pod.make("layers").unwrap());
    of(&mounts).on_host(&pod, &stage, &images).unwrap();
    assert_eq!(
        (fs::read_to_string(target.join("one")).unwrap(), fs::read_to_string(target.join("two")).unwrap()),
        ("a".into(), "b".into())
    );
    fs::write(target.join("new"), "").unwrap();
    assert!(Path::new(&upper).join("new").exists() && Path::new(&work).is_dir(), "it writes to its own");
    mount::unmount_below(dir.path()).unwrap();
    // Not outside of itself.
    let outside = |folder: &str| make(folder, &images).unwrap_err().to_string();
    for folder in
        ["/etc/x:0755", &format!("{}/../../x", path("layers/0")), &format!("{}/x:rwx", path("layers/0"))]
    {
        assert!(outside(folder).contains("is not one of its own"), "{folder}");
    }
    let missing = of(&[image("erofs", &path("nowhere"), &["ro", "loop"])]).on_host(&pod, &stage, &images);
    let error = missing.unwrap_err().to_string();
    assert!(error.starts_with("mounting erofs ") && error.contains("nowhere"), "{error}");
    mount::unmount_below(dir.path()).unwrap();
}
