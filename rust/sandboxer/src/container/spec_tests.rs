use super::*;

const TARGET: Target<'static> = Target { container: "c1", pod_pid: 4242, shared_pids: false };

/// As containerd's CRI plugin writes it on a Debian host: AppArmor on, cgroup v2, systemd cgroups.
fn cri() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
            "args": ["nginx"], "env": ["PATH=/bin", "HOSTNAME=web-0"], "cwd": "/",
            "capabilities": {"bounding": ["CAP_CHOWN"]},
            "apparmorProfile": "cri-containerd.apparmor.d",
            "selinuxLabel": "system_u:system_r:container_t:s0",
            "oomScoreAdj": 993,
            "somethingNew": {"kept": true}
        },
        "root": {"path": "rootfs"},
        "hostname": "web-0",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "gid=5"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
            {"destination": "/etc/hosts", "type": "bind", "source": "/var/lib/kubelet/pods/u/etc-hosts", "options": ["rbind", "rprivate", "rw"]},
            {"destination": "/dev/termination-log", "type": "bind", "source": "/var/lib/kubelet/pods/u/containers/web/1", "options": ["rbind", "rprivate", "rw"]},
            {"destination": "/secret", "type": "bind", "source": "/var/lib/kubelet/pods/u/volumes/s", "options": ["rbind", "rprivate", "ro"]}
        ],
        "annotations": {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p"},
        "linux": {
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}],
                "memory": {"limit": 134217728, "swap": 134217728},
                "cpu": {"shares": 102, "quota": 20000, "period": 100000, "cpus": "0-3", "mems": "0"},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
                "unified": {"memory.oom.group": "1"}
            },
            "cgroupsPath": "kubepods-burstable-podu.slice:cri-containerd:c1",
            "namespaces": [
                {"type": "pid"},
                {"type": "ipc", "path": "/proc/4242/ns/ipc"},
                {"type": "uts", "path": "/proc/4242/ns/uts"},
                {"type": "mount"},
                {"type": "network", "path": "/proc/4242/ns/net"},
                {"type": "cgroup"}
            ],
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": []},
            "maskedPaths": ["/proc/acpi"], "readonlyPaths": ["/proc/bus"]
        }
    })
}

fn rewritten(spec: Value) -> (Value, Vec<Bind>) {
    let mut spec = spec;
    let needs = rewrite(&mut spec, &TARGET).unwrap();
    (spec, needs.binds)
}

fn refusal(spec: Value) -> String {
    let mut spec = spec;
    rewrite(&mut spec, &TARGET).unwrap_err().to_string()
}

fn mount<'a>(spec: &'a Value, destination: &str) -> &'a Value {
    let all: Vec<&Value> =
        spec["mounts"].as_array().unwrap().iter().filter(|m| m["destination"] == destination).collect();
    assert_eq!(all.len(), 1, "{destination} is there exactly once");
    all[0]
}

#[test]
fn the_host_is_gone_from_the_spec() {
    let (spec, _) = rewritten(cri());
    let text = spec.to_string();
    for trace in ["4242", "/var/lib/kubelet", "apparmor", "selinux", "kubepods", "0-3", "web-0\"}"] {
        assert!(!text.contains(trace), "{trace} in {text}");
    }
    assert_eq!(spec["root"]["path"], "/run/kuasar/state/c1/rootfs");
    assert_eq!(spec["linux"]["cgroupsPath"], "/kuasar/c1");
    assert_eq!(spec["linux"]["namespaces"], json!([{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}]));
    assert_eq!(spec.get("hostname"), None);
}

#[test]
fn limits_seccomp_and_unknown_fields_stay() {
    let (spec, _) = rewritten(cri());
    assert_eq!(spec["process"]["somethingNew"]["kept"], true);
    assert_eq!(spec["process"]["oomScoreAdj"], 993);
    assert_eq!(spec["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
    assert_eq!(
        spec["linux"]["resources"],
        json!({
            "devices": [{"allow": false, "access": "rwm"}],
            "memory": {"limit": 134217728},
            "cpu": {"shares": 102, "quota": 20000, "period": 100000},
            "unified": {"memory.oom.group": "1"}
        })
    );
    assert_eq!(spec["annotations"]["io.kubernetes.cri.sandbox-id"], "p");
}

#[test]
fn the_hosts_cpus_are_told_apart() {
    let cpuset = |mut spec: Value| rewrite(&mut spec, &TARGET).unwrap().cpuset;
    assert_eq!(cpuset(cri()), CpuSet { cpus: "0-3".into(), mems: "0".into() });
    let mut without = cri();
    without["linux"]["resources"].as_object_mut().unwrap().remove("cpu");
    assert_eq!(cpuset(without), CpuSet::default());
}

#[test]
fn bind_mounts_become_paths_of_the_share() {
    let (spec, binds) = rewritten(cri());
    let sources: Vec<&str> = binds.iter().map(|b| b.source.to_str().unwrap()).collect();
    assert_eq!(
        sources,
        [
            "/var/lib/kubelet/pods/u/etc-hosts",
            "/var/lib/kubelet/pods/u/containers/web/1",
            "/var/lib/kubelet/pods/u/volumes/s"
        ]
    );
    assert_eq!(binds.iter().map(|b| b.read_only).collect::<Vec<_>>(), [false, false, true]);
    assert!(binds.iter().all(|b| b.recursive));
    assert_eq!(mount(&spec, "/etc/hosts")["source"], "/run/kuasar/state/c1/mounts/0");
    assert_eq!(mount(&spec, "/secret")["source"], "/run/kuasar/state/c1/mounts/2");
    assert_eq!(mount(&spec, "/secret")["options"], json!(["rbind", "rprivate", "ro"]));
}

#[test]
fn the_pods_files_are_added_where_cri_gave_none() {
    let (spec, _) = rewritten(cri());
    assert_eq!(mount(&spec, "/etc/resolv.conf")["source"], "/run/kuasar/state/files/resolv.conf");
    assert_eq!(mount(&spec, "/etc/hostname")["options"], json!(["rbind", "rprivate", "rw"]));
    let mut read_only = cri();
    read_only["root"]["readonly"] = json!(true);
    let (spec, _) = rewritten(read_only);
    assert_eq!(mount(&spec, "/etc/hostname")["options"], json!(["rbind", "rprivate", "ro"]));
}

#[test]
fn shm_is_the_pods() {
    let (spec, _) = rewritten(cri());
    assert_eq!(
        mount(&spec, "/dev/shm"),
        &json!({"destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["rbind", "nosuid", "noexec", "nodev"]})
    );
}

#[test]
fn a_volume_at_shm_is_the_users() {
    let at_shm = |source: &str| {
        let mut spec = cri();
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.retain(|mount| mount["destination"] != "/dev/shm");
        mounts.push(json!({"destination": "/dev/shm", "type": "bind", "source": source, "options": ["rbind", "rprivate", "rw"]}));
        rewritten(spec)
    };
    let volume = "/var/lib/kubelet/pods/1/volumes/kubernetes.io~empty-dir/shm";
    let (spec, binds) = at_shm(volume);
    assert_eq!(binds.last().unwrap().source, std::path::Path::new(volume));
    assert_eq!(mount(&spec, "/dev/shm")["source"], "/run/kuasar/state/c1/mounts/3");
    let (spec, _) = at_shm("/run/containerd/io.containerd.grpc.v1.cri/sandboxes/5/shm");
    assert_eq!(mount(&spec, "/dev/shm")["source"], "/dev/shm");
}

#[test]
fn a_minimal_spec_is_completed() {
    let (spec, binds) = rewritten(json!({"ociVersion": "1.0.2"}));
    assert_eq!(spec["root"]["path"], "/run/kuasar/state/c1/rootfs");
    assert_eq!(spec["mounts"].as_array().unwrap().len(), 3);
    assert!(binds.is_empty());
}

#[test]
fn a_pid_namespace_of_the_pod_is_private_unless_the_pod_shares_it() {
    let mut spec = cri();
    spec["linux"]["namespaces"][0] = json!({"type": "pid", "path": "/proc/4242/ns/pid"});
    let mut shared = spec.clone();
    let (spec, _) = rewritten(spec);
    assert_eq!(spec["linux"]["namespaces"][0], json!({"type": "pid"}));
    let target = Target { container: "c1", pod_pid: 4242, shared_pids: true };
    rewrite(&mut shared, &target).unwrap();
    assert_eq!(shared["linux"]["namespaces"][0], json!({"type": "pid", "path": "pod"}));
    // That of another container, as for kubectl debug --target.
    let mut of_other = cri();
    let reported = format!("/proc/{}/ns/pid", GUEST_PID_BASE + 77);
    of_other["linux"]["namespaces"][0] = json!({"type": "pid", "path": reported});
    let (of_other, _) = rewritten(of_other);
    assert_eq!(of_other["linux"]["namespaces"][0], json!({"type": "pid", "path": "process:77"}));
    let mut own = cri();
    rewrite(&mut own, &target).unwrap();
    assert_eq!(own["linux"]["namespaces"][0], json!({"type": "pid"}));
}

#[test]
fn hooks_are_left_to_the_guest_which_knows_its_programs() {
    let mut hooks = cri();
    hooks["hooks"] = json!({"prestart": [{"path": "/usr/bin/nvidia-container-runtime-hook"}]});
    assert_eq!(rewritten(hooks.clone()).0["hooks"], hooks["hooks"]);
}

#[test]
fn what_a_vm_cannot_give_is_refused_by_name() {
    let with = |pointer: &str, value: Value| {
        let mut spec = cri();
        *spec.pointer_mut(pointer).unwrap() = value;
        refusal(spec)
    };
    let mut devices = cri();
    devices["linux"]["devices"] = json!([{"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
                                         {"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]);
    for (said, part) in [
        (with("/linux/namespaces/0", json!({"type": "user"})), "set hostUsers: true"),
        (
            with("/linux/namespaces/0", json!({"type": "pid", "path": "/run/ns"})),
            "/run/ns is one of the host",
        ),
        (
            with("/linux/namespaces/0", json!({"type": "pid", "path": "/proc/77/ns/pid"})),
            "/proc/77/ns/pid is one of the host",
        ),
        (with("/process/apparmorProfile", json!("mine")), "mine is a profile of the host"),
        (
            with("/linux/resources/hugepageLimits", json!([{"pageSize": "2MB", "limit": 2097152}])),
            "no huge pages of 2MB",
        ),
        (with("/mounts/9/options", json!(["rbind", "rshared"])), "/secret asks for mount propagation"),
        (with("/mounts/9/source", json!("relative")), "/secret has the source \"relative\""),
        (with("/mounts/0/type", json!("nfs")), "/proc is of type \"nfs\""),
        (refusal(devices), "/dev/kvm is a device of the host"),
        (refusal(json!([])), "it is not a JSON object"),
        (refusal(json!({"mounts": 3})), "mounts is not a list"),
    ] {
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn disks_are_plugged_in_as_the_last_rule_about_them_allows() {
    let mut spec = cri();
    spec["linux"]["devices"] = json!([{"path": "/dev/xvda", "type": "b", "major": 8, "minor": 16},
                                      {"path": "/dev/xvdb", "type": "b", "major": 8, "minor": 32},
                                      {"path": "/dev/xvdc", "type": "b", "major": 8, "minor": 48}]);
    spec["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"},
        {"allow": true, "type": "b", "major": 8, "minor": 16, "access": "rwm"},
        {"allow": true, "type": "c", "major": 8, "minor": 32, "access": "rw"},
        {"allow": true, "type": "b", "major": 8, "minor": 32, "access": "r"}]);
    let devices = rewrite(&mut spec, &TARGET).unwrap().devices;
    let found: Vec<_> = devices.iter().map(|d| (d.path.as_str(), d.minor, d.read_only)).collect();
    assert_eq!(found, [("/dev/xvda", 16, false), ("/dev/xvdb", 32, true), ("/dev/xvdc", 48, true)]);
    // As containerd says it of a privileged container.
    spec["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    assert!(rewrite(&mut spec, &TARGET).unwrap().devices.iter().all(|device| !device.read_only));
}

#[test]
fn a_mount_with_a_file_system_of_its_own_may_be_a_disks() {
    let mut spec = cri();
    spec["mounts"][9] =
        json!({"destination": "/d", "type": "ext4", "source": "/dev/sdx", "options": ["ro", "noatime"]});
    let (spec, binds) = rewritten(spec);
    let disk = Some(("ext4".to_owned(), vec!["ro".to_owned(), "noatime".to_owned()]));
    assert!(binds[2].disk == disk && binds[2].read_only && !binds[0].read_only, "{binds:?}");
    let mounted = mount(&spec, "/d");
    assert_eq!((&mounted["type"], &mounted["options"]), (&json!("bind"), &json!(["bind", "ro"])));
}
