//! Sizes, cgroups, metrics, updates.

use super::*;
use crate::protos::{cgroups_v2, cri::LinuxContainerResources};

const MIB: i64 = 1 << 20;

fn with_limits(memory_mib: i64, cpus: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        memory_limit_in_bytes: memory_mib * MIB,
        cpu_quota: cpus * 100_000,
        cpu_period: 100_000,
        ..Default::default()
    }
}

async fn create_with(
    lab: &Lab,
    client: &mut Client,
    change: impl FnOnce(&mut PodSandboxConfig),
) -> Result<(), Status> {
    let mut config = pod_config();
    change(&mut config);
    client.create(create(lab, &config)).await.map(drop)
}

async fn update(client: &mut Client, resources: &serde_json::Value) -> Result<(), Status> {
    let json = serde_json::json!({"Overhead": null, "Resources": resources}).to_string();
    let type_url = "io.containerd.cri.v1/UpdatedResources".to_owned();
    let extension = prost_types::Any { type_url, value: json.into_bytes() };
    let request = ControllerUpdateRequest {
        sandbox_id: id(),
        sandbox: Some(Sandbox {
            extensions: [("updated-resources".to_owned(), extension)].into(),
            ..Sandbox::default()
        }),
        fields: vec!["extensions".into()],
        ..Default::default()
    };
    client.update(request).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_vm_gets_what_limits_and_allowed_annotations_say() {
    let lab = Lab::new(Fault::None);
    let (mut client, _pods) = serve(&lab).await;
    create_with(&lab, &mut client, |config| {
        config.linux.as_mut().unwrap().resources = Some(with_limits(100, 1));
        config.annotations.insert("io.kuasar.vm.kernel_params".into(), "quiet".into());
    })
    .await
    .unwrap();
    start(&mut client).await.unwrap();
    let shapes: Vec<_> = lab.hypervisor.specs.lock().unwrap().clone();
    assert_eq!(shapes, [(1, 164, "quiet".to_owned())]);
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_at_create_and_leaves_nothing() {
    let lab = Lab::new(Fault::None);
    let (mut client, pods) = serve(&lab).await;
    kubelets_cgroup(&lab, &(60 * MIB).to_string(), "-1");
    let error = create_with(&lab, &mut client, |config| {
        let linux = config.linux.as_mut().unwrap();
        linux.cgroup_parent = "/kubepods/podu".into();
        linux.resources = Some(with_limits(60, 1));
    })
    .await
    .unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    let said =
        "the pod's cgroup may use 60 MiB of memory, and its VM needs 120 MiB: 48 MiB for the smallest guest";
    assert!(error.message().starts_with(said), "{error:?}");
    let error = create_with(&lab, &mut client, |config| {
        config.annotations.insert("io.kuasar.vm.vcpus".into(), "1".into());
    })
    .await
    .unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains("io.kuasar.vm.vcpus is not allowed on this node"), "{error:?}");
    assert!(pods.is_empty());
    lab.assert_clean();
}

/// The cgroup of a pod as kubelet makes it, in hierarchies of version 1.
fn kubelets_cgroup(lab: &Lab, memory: &str, quota: &str) {
    for (hierarchy, file, value) in [
        ("memory", "memory.limit_in_bytes", memory),
        ("cpu", "cpu.cfs_quota_us", quota),
        ("cpu", "cpu.cfs_period_us", "100000"),
        ("pids", "pids.max", "1024"),
    ] {
        let mount = lab.path("cgroup").join(hierarchy);
        fs::create_dir_all(mount.join("kubepods/podu")).unwrap();
        fs::write(mount.join("cgroup.procs"), "").unwrap();
        fs::write(mount.join("kubepods/podu").join(file), value).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_with_a_container_without_limits_is_not_sized_by_the_others() {
    let lab = Lab::new(Fault::None);
    let (mut client, _pods) = serve(&lab).await;
    kubelets_cgroup(&lab, "9223372036854771712", "-1");
    create_with(&lab, &mut client, |config| {
        let linux = config.linux.as_mut().unwrap();
        linux.cgroup_parent = "/kubepods/podu".into();
        // A sidecar's limits, and what it and another container request.
        let of_sidecar = LinuxContainerResources { cpu_quota: 20_000, ..with_limits(64, 0) };
        linux.resources = Some(LinuxContainerResources { cpu_shares: 1228, ..of_sidecar });
    })
    .await
    .unwrap();
    drop_cgroup(&lab);
    start(&mut client).await.unwrap();
    let cpus = u32::try_from(std::thread::available_parallelism().unwrap().get()).unwrap();
    let shapes: Vec<_> = lab.hypervisor.specs.lock().unwrap().clone();
    assert!(shapes[0].0 == cpus.min(2) && shapes[0].1 >= 512, "{shapes:?}");
    // Kubelet says nothing of what has no limit, and then nothing has to grow.
    update(&mut client, &serde_json::json!({"cpu_shares": 512})).await.unwrap();
    update(&mut client, &serde_json::json!({"memory_limit_in_bytes": 0, "cpu_quota": -1})).await.unwrap();
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

/// Plain files are no cgroups that a pod could be removed from.
fn drop_cgroup(lab: &Lab) {
    for hierarchy in ["memory", "cpu", "pids"] {
        fs::remove_dir_all(lab.path("cgroup").join(hierarchy)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_has_to_be_smaller_than_its_limit_says_so() {
    let lab = Lab::new(Fault::None);
    let (mut client, _pods) = serve(&lab).await;
    kubelets_cgroup(&lab, &(192 * MIB).to_string(), "100000");
    create_with(&lab, &mut client, |config| {
        let linux = config.linux.as_mut().unwrap();
        linux.cgroup_parent = "/kubepods/podu".into();
        linux.resources = Some(with_limits(192, 1));
    })
    .await
    .unwrap();
    drop_cgroup(&lab);
    start(&mut client).await.unwrap();
    assert_eq!(lab.hypervisor.specs.lock().unwrap()[0].1, 192 - 72);
    assert_eq!(lab.hypervisor.setups.lock().unwrap()[0].pids_limit, 1024);
    let request = ControllerStatusRequest { sandbox_id: id(), verbose: true, ..Default::default() };
    let status = client.status(request).await.unwrap().into_inner();
    let ours: serde_json::Value = serde_json::from_str(&status.info["kuasar"]).unwrap();
    let said = ours["memory"].as_str().unwrap();
    assert!(
        said.starts_with("the guest has 120 MiB instead of 256: the pod's cgroup may use 192 MiB"),
        "{said}"
    );
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_of_a_pod_have_its_oom_score() {
    let lab = Lab::new(Fault::None);
    let (mut client, _pods) = serve(&lab).await;
    let of = |pid: u32| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().to_owned();
    create_with(&lab, &mut client, |config| {
        let asked = LinuxContainerResources { oom_score_adj: 700, ..Default::default() };
        config.linux.as_mut().unwrap().resources = Some(asked);
    })
    .await
    .unwrap();
    let started = start(&mut client).await.unwrap();
    let relays = lab.relays();
    assert_eq!(relays.len(), 1);
    // The relay goes after its VM.
    for (pid, score) in [(started.pid, "700"), (relays[0], "699")] {
        assert_eq!(of(pid), score);
    }
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

/// A tree of plain files in which the kernel does nothing by itself.
fn cgroup_tree(lab: &Lab) -> PathBuf {
    for name in ["cpu", "cpuset", "memory"] {
        let pod = lab.path("cgroup").join(name).join("podu/kuasar-p1");
        fs::create_dir_all(pod.join("overhead")).unwrap();
        fs::create_dir_all(pod.join("vcpu")).unwrap();
        fs::write(lab.path("cgroup").join(name).join("cgroup.procs"), "").unwrap();
        for part in ["", "overhead", "vcpu"] {
            for file in ["cgroup.procs", "tasks"] {
                fs::write(pod.join(part).join(file), "").unwrap();
            }
            if name == "cpuset" {
                fs::write(pod.join(part).join("cpuset.cpus"), "").unwrap();
            }
        }
    }
    lab.path("cgroup")
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_of_a_pod_are_in_its_cgroup_and_its_cpus_apart() {
    let lab = Lab::new(Fault::None);
    let root = cgroup_tree(&lab);
    let (mut client, _pods) = serve(&lab).await;
    create_with(&lab, &mut client, |config| {
        let linux = config.linux.as_mut().unwrap();
        linux.cgroup_parent = "/podu".into();
        linux.resources = Some(LinuxContainerResources { cpuset_cpus: "0".into(), ..Default::default() });
    })
    .await
    .unwrap();
    let started = start(&mut client).await.unwrap();
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap();
    // VMM and relay have written themselves: the same "0" over and over into a file that is none of the
    // kernel's.
    assert_eq!(read("cpu/podu/kuasar-p1/overhead/cgroup.procs"), "0");
    assert_eq!(read("memory/podu/kuasar-p1/overhead/cgroup.procs"), "0");
    assert_eq!(read("cpu/podu/kuasar-p1/vcpu/tasks"), started.pid.to_string());
    assert_eq!(read("cpuset/podu/kuasar-p1/vcpu/cpuset.cpus"), "0");

    update(&mut client, &serde_json::json!({"cpuset_cpus": "0-1"})).await.unwrap();
    assert_eq!(read("cpuset/podu/kuasar-p1/vcpu/cpuset.cpus"), "0-1");
    // What fails in the middle changes nothing.
    let both =
        serde_json::json!({"cpuset_cpus": "1-1", "hugepage_limits": [{"page_size": "2MB", "limit": 1}]});
    let error = update(&mut client, &both).await.unwrap_err();
    assert!(error.message().contains("no hugetlb controller"), "{error:?}");
    assert_eq!(read("cpuset/podu/kuasar-p1/vcpu/cpuset.cpus"), "0-1");
    fs::remove_dir_all(&root).unwrap();
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_there_from_create_to_stop() {
    let lab = Lab::new(Fault::None);
    let (mut client, _pods) = serve(&lab).await;
    let request = || ControllerMetricsRequest { sandbox_id: id(), ..Default::default() };
    assert_eq!(client.metrics(request()).await.unwrap_err().code(), Code::NotFound);
    create_with(&lab, &mut client, |_| {}).await.unwrap();
    for step in ["created", "running", "stopped"] {
        match step {
            "running" => drop(start(&mut client).await.unwrap()),
            "stopped" => stop(&mut client).await.unwrap(),
            _ => {}
        }
        let metrics = client.metrics(request()).await.unwrap().into_inner().metrics.unwrap();
        let data = metrics.data.expect("never nil");
        assert_eq!((metrics.id.as_str(), data.type_url.as_str()), ("p1", "io.containerd.cgroups.v2.Metrics"));
        let metrics = cgroups_v2::Metrics::decode(data.value.as_slice()).unwrap();
        assert!(metrics.cpu.is_some());
        assert!(step != "running" || metrics.memory.unwrap().usage > 0);
    }
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_within_the_vm_is_done_and_one_beyond_it_refused() {
    let lab = Lab::new(Fault::None);
    let (mut client, pods) = serve(&lab).await;
    create_with(&lab, &mut client, |config| {
        config.linux.as_mut().unwrap().resources = Some(with_limits(200, 1));
    })
    .await
    .unwrap();
    start(&mut client).await.unwrap();
    let memory = |mib: i64| serde_json::json!({"memory_limit_in_bytes": mib * MIB});
    update(&mut client, &memory(100)).await.unwrap();
    update(&mut client, &memory(200)).await.unwrap();
    let error = update(&mut client, &memory(201)).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains("needs a VM of 265 MiB and it has 264"), "{error:?}");
    let cpus =
        serde_json::json!({"cpu_quota": 1_000_000, "cpu_period": 100_000, "memory_limit_in_bytes": MIB});
    if std::thread::available_parallelism().unwrap().get() > 1 {
        let error = update(&mut client, &cpus).await.unwrap_err();
        assert!(
            error.message().contains("vCPUs and its VM has 1, which a running VM cannot be given yet"),
            "{error:?}"
        );
    }
    // Too little to boot with, and nothing has to boot.
    update(&mut client, &memory(4)).await.unwrap();
    // The size is known to the next daemon, too.
    pods.leave();
    drop((client, pods));
    let (mut client, _pods) = serve(&lab).await;
    update(&mut client, &memory(201)).await.unwrap_err();
    update(&mut client, &memory(200)).await.unwrap();
    stop(&mut client).await.unwrap();
    update(&mut client, &memory(300)).await.unwrap();
    shutdown(&mut client).await.unwrap();
    assert_eq!(update(&mut client, &memory(1)).await.unwrap_err().code(), Code::NotFound);
    lab.assert_clean();
}
