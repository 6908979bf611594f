use super::*;

const TARGET: Target<'static> = Target { container: "c1", pod_pid: 1, shared_pids: false };

struct Bundle(tempfile::TempDir);

impl Bundle {
    fn new(spec: &Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), spec.to_string()).unwrap();
        Self(dir)
    }

    fn plan(&self, rootfs: RootfsMount, disks: bool) -> Result<Plan, StorageError> {
        Plan::new(&TARGET, self.0.path(), vec![rootfs], &Room::with(if disks { 31 } else { 0 }))
    }
}

fn image(options: &[&str]) -> RootfsMount {
    RootfsMount {
        kind: "ext4".into(),
        source: "/var/lib/snapshots/7".into(),
        target: String::new(),
        options: options.iter().map(|&option| option.to_owned()).collect(),
    }
}

#[test]
fn a_root_that_is_an_image_file_is_mounted_by_the_guest() {
    let mut plan = Bundle::new(&json!({})).plan(image(&["loop", "rw", "noatime"]), true).unwrap();
    assert!(plan.rootfs.is_empty());
    assert_eq!(plan.spec["root"]["path"], "/run/kuasar/storage/c1/rootfs");
    assert_eq!(plan.disks(), [Wanted::file("/var/lib/snapshots/7", false)]);
    plan.plugged_in(vec!["serial:disk-1".into()]);
    let storage = Storage {
        driver: "blk".into(),
        source: "serial:disk-1".into(),
        fstype: "ext4".into(),
        options: vec!["rw".into(), "noatime".into()],
        mount_point: "/run/kuasar/storage/c1/rootfs".into(),
        ..Storage::default()
    };
    assert_eq!(plan.storages, [storage]);
    let view = Bundle::new(&json!({})).plan(image(&["loop", "ro"]), true).unwrap();
    assert!(view.disks()[0].read_only);
}

#[test]
fn roots_of_other_kinds_and_of_other_machines_are_the_hosts_to_mount() {
    let bundle = Bundle::new(&json!({}));
    let overlay =
        RootfsMount { kind: "overlay".into(), source: "overlay".into(), ..image(&["lowerdir=/a:/b"]) };
    for rootfs in [overlay, image(&["rw"]), RootfsMount { target: "/usr".into(), ..image(&["loop"]) }] {
        let plan = bundle.plan(rootfs.clone(), true).unwrap();
        assert!(plan.rootfs == [rootfs] && plan.disks().is_empty());
    }
    let error = bundle.plan(image(&["loop"]), false).unwrap_err();
    assert!(
        error.is_refusal() && error.to_string().contains("/var/lib/snapshots/7, which can only be"),
        "{error}"
    );
}

#[test]
fn devices_that_are_not_there_are_named() {
    let device = json!({"path": "/dev/data", "type": "b", "major": 4095, "minor": 7});
    let error = Bundle::new(&json!({"linux": {"devices": [device]}})).plan(image(&["rw"]), true).unwrap_err();
    let said = error.to_string();
    assert!(
        error.is_refusal() && said.contains("/dev/data is the host's device 4095:7, which is not there"),
        "{said}"
    );
    let error =
        Plan::new(&Target { container: "../x", ..TARGET }, Path::new("/"), Vec::new(), &Room::with(31))
            .unwrap_err();
    assert!(error.to_string().starts_with("the container id \"../x\""), "{error}");
}

#[test]
fn read_only_goes_no_deeper_than_was_asked() {
    let mount = |source: &str, propagation: &str, access: &str| json!({"destination": "/m", "type": "bind", "source": source, "options": ["rbind", propagation, access]});
    let bare = tempfile::tempdir().unwrap();
    // Whatever machine this runs on, something is mounted below its root.
    for (source, propagation, access, expected) in [
        ("/", "rprivate", "ro", "rw"),
        ("/", "rprivate", "rro", "rro"),
        (bare.path().to_str().unwrap(), "rprivate", "ro", "ro"),
        (bare.path().to_str().unwrap(), "rslave", "ro", "rw"),
    ] {
        let spec = json!({"mounts": [mount(source, propagation, access)]});
        let plan = Bundle::new(&spec).plan(image(&["rw"]), false).unwrap();
        assert_eq!(plan.spec["mounts"][0]["options"][2], expected, "{source} {propagation} {access}");
        assert!(plan.binds[0].read_only, "the host's is read-only");
    }
}

#[test]
fn layers_are_disks_while_there_is_room_and_shared_when_there_is_not() {
    use super::super::layers::tests::writable;
    let dir = tempfile::tempdir().unwrap();
    let in_dir = |mounts: Vec<RootfsMount>| -> Vec<RootfsMount> {
        let moved = |mount: RootfsMount| {
            let name = mount.source.replace('/', "-");
            let file = dir.path().join(name);
            fs::write(&file, "").unwrap();
            let source = if mount.kind.contains('/') { mount.source } else { file.display().to_string() };
            RootfsMount { source, ..mount }
        };
        mounts.into_iter().map(moved).collect()
    };
    let bundle = Bundle::new(&json!({}));
    let plan = |layers, room: usize| {
        Plan::new(&TARGET, bundle.0.path(), in_dir(writable(layers)), &Room::with(room)).unwrap()
    };
    let mut fits = plan(3, 4 + SPARE);
    assert!(fits.layers.is_none() && fits.rootfs.is_empty());
    assert_eq!(fits.spec["root"]["path"], "/run/kuasar/storage/c1/rootfs");
    assert_eq!((fits.disks().len(), fits.storages.len()), (4, 5));
    fits.plugged_in(vec!["serial:disk-7".into(); 4]);
    let drivers: Vec<_> =
        fits.storages.iter().map(|storage| (storage.driver.as_str(), storage.source.as_str())).collect();
    let disk = ("blk", "serial:disk-7");
    assert_eq!(drivers, [disk, disk, disk, disk, ("overlay", "")]);
    for plan in [plan(3, 3 + SPARE), plan(3, 0), plan(40, 31)] {
        assert!(plan.layers.is_some() && plan.disks().is_empty() && plan.storages.is_empty());
        assert_eq!(plan.spec["root"]["path"], "/run/kuasar/state/c1/rootfs");
    }
}

#[test]
fn a_socket_is_listened_at_by_the_agent_and_comes_after_the_disks() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _listens = std::os::unix::net::UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).unwrap();
    let mount = |destination: &str, source: &Path| json!({"destination": destination, "type": "bind", "source": source, "options": ["rbind", "rprivate", "ro"]});
    let spec = json!({"mounts": [mount("/d", dir.path()), mount("/s", &path)]});
    let plan = Bundle::new(&spec).plan(image(&["loop", "rw"]), true).unwrap();
    let guest = "/run/kuasar/storage/c1/sockets/1";
    assert_eq!(plan.spec["mounts"][1]["source"], guest);
    assert_eq!(plan.binds.iter().map(|bind| bind.destination.as_str()).collect::<Vec<_>>(), ["/d"]);
    let [socket] = plan.sockets() else { panic!("{:?}", plan.sockets()) };
    assert_eq!((socket.host.as_path(), socket.guest.as_str()), (path.as_path(), guest));
    let drivers: Vec<_> = plan.storages.iter().map(|storage| storage.driver.as_str()).collect();
    assert_eq!(drivers, ["blk", "socket"]);
    assert!(plan.storages[1].options.contains(&"mode=660".to_owned()));
    let _takes = std::os::unix::net::UnixDatagram::bind(dir.path().join("d")).unwrap();
    let spec = json!({"mounts": [mount("/d", &dir.path().join("d"))]});
    let error = Bundle::new(&spec).plan(image(&["rw"]), true).unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("takes datagrams"), "{error}");
}

#[test]
fn a_bind_of_a_device_node_is_the_guests_node_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    // Another name for one that is no other.
    std::os::unix::fs::symlink("/dev/null", dir.path().join("nothing")).unwrap();
    let mount = |source: &Path| json!({"destination": "/m", "type": "bind", "source": source, "options": ["rbind", "rprivate", "rw"]});
    let spec = json!({"mounts": [mount(Path::new("/dev/zero")), mount(&dir.path().join("nothing"))]});
    let plan = Bundle::new(&spec).plan(image(&["rw"]), true).unwrap();
    let source = |at: usize| plan.spec["mounts"][at]["source"].as_str().unwrap();
    assert_eq!((source(0), source(1)), ("/dev/zero", "/dev/null"));
    assert!(plan.binds.is_empty() && plan.storages.is_empty());
    // What is no disk has no file system to be mounted.
    let spec = json!({"mounts": [{"destination": "/m", "type": "ext4", "source": "/dev/zero"}]});
    let error = Bundle::new(&spec).plan(image(&["rw"]), true).unwrap_err();
    assert!(
        error.is_refusal() && error.to_string().contains("/m is of type \"ext4\", which the VM cannot mount"),
        "{error}"
    );
}

#[test]
fn a_bind_of_a_disks_node_is_plugged_in_as_the_rules_allow() {
    let bind = |read_only| Bind {
        name: "0".into(),
        source: "/dev/sdx".into(),
        destination: "/m".into(),
        read_only,
        recursive: true,
        disk: None,
    };
    let allowed = json!({"resources": {"devices": [{"allow": true, "type": "b", "major": 8, "minor": 16, "access": "rw"}]}});
    let spec = |linux: &Value| json!({"linux": linux, "mounts": [{"destination": "/m", "type": "bind", "source": "/run/kuasar/state/c1/mounts/0"}]});
    let planned = |linux: &Value, binds: &[bool]| {
        let mut plan = Bundle::new(&json!({})).plan(image(&["rw"]), true).unwrap();
        plan.spec = spec(linux);
        for read_only in binds {
            plan.add_node("c1", &bind(*read_only), HostDisk::double(8, 16));
        }
        assert_eq!(plan.spec["mounts"][0]["source"], "/dev/block/8:16");
        assert!(plan.storages.len() == 1 && plan.storages[0].device == "8:16");
        assert_eq!(plan.storages[0].options == ["ro"], plan.disks[0].read_only);
        plan.disks[0].read_only
    };
    assert!(planned(&json!({}), &[false]), "nobody may write to it");
    assert!(!planned(&allowed, &[false]));
    assert!(planned(&allowed, &[true]));
    assert!(!planned(&allowed, &[true, false, true]), "one of its names is for writing");
}
