//! PID namespaces that containers share.

use containerd_shim_protos::shim_async::TaskClient;
use kuasar_common::{api::sandbox::SetupSandboxRequest, stdio::Stream};

use crate::{
    given,
    given::Kind,
    pod::{Pod, code},
    vm::{Vm, bundle, read_frame},
};

/// Makes and starts a container whose PID namespace has this path in its spec.
async fn start(pod: &Pod, id: &str, path: &str, script: &str) -> ttrpc::Result<u32> {
    let bundle = bundle(&pod.given, &pod.vm, id, &["sh", "-c", script], false);
    let file = pod.vm.shared(id).join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    if !path.is_empty() {
        spec["linux"]["namespaces"][0]["path"] = path.into();
    }
    std::fs::write(&file, spec.to_string()).unwrap();
    pod.create_from(id, bundle, false, false).await?;
    pod.start(id, "").await
}

const IDLE: &str = "echo ready; while true; do sleep 1; done";

#[tokio::test]
#[ignore = "needs a guest: set KUASAR_IMAGE"]
async fn containers_share_pid_namespaces() {
    let given = given();
    let vm = Vm::boot(&given, Kind::InitrdNineP, "task.sharefs_type=9p task.debug", true);
    let task = TaskClient::new(vm.client());
    let pod = Pod { given, vm, task };
    let early = code(start(&pod, "early", "pod", IDLE).await).1;
    assert!(early.contains("the pod was set up without a shared one"), "{early}");
    let setup = SetupSandboxRequest { shared_pid_namespace: true, ..Default::default() };
    pod.vm.sandbox().setup_sandbox(pod.vm.context(), &setup).await.unwrap();

    // Two in the pod's, one with the second one's, one alone. The first leaves an orphan behind, whose end
    // nobody awaits.
    start(&pod, "one", "pod", "(sleep 0.2 & echo ready); exec sleep 1001").await.unwrap();
    start(&pod, "two", "pod", "echo ready; sleep 1002 & exec sleep 1003").await.unwrap();
    start(&pod, "alone", "", "echo ready; exec sleep 1004").await.unwrap();
    for id in ["one", "two", "alone"] {
        assert_eq!(read_frame(&mut pod.vm.stream(id, "", Stream::Stdout)), b"ready\n");
    }
    start(&pod, "guest", "container:alone", "echo ready; exec sleep 1005").await.unwrap();
    assert_eq!(read_frame(&mut pod.vm.stream("guest", "", Stream::Stdout)), b"ready\n");

    let (_, seen) = pod.run("one", "ps", &["ps"]).await;
    for command in ["kuasar-pause", "sleep 1001", "sleep 1002", "sleep 1003"] {
        assert!(seen.contains(command), "{command} is not in\n{seen}");
    }
    assert!(!seen.contains("sleep 1004") && !seen.contains("sleep 1005"), "{seen}");
    let (_, seen) = pod.run("alone", "ps", &["ps"]).await;
    assert!(
        seen.contains("sleep 1004") && seen.contains("sleep 1005") && !seen.contains("sleep 1001"),
        "{seen}"
    );

    // All of a container ends with its first process, and nobody else.
    pod.kill("two", "", 9, false).await.unwrap();
    assert_eq!(pod.wait("two", "").await.unwrap(), 137);
    let mut seen = pod.run("one", "again0", &["ps"]).await.1;
    for n in 1..50 {
        if !seen.contains("sleep 1002") {
            break;
        }
        seen = pod.run("one", &format!("again{n}"), &["ps"]).await.1;
    }
    assert!(!seen.contains("sleep 1002") && seen.contains("sleep 1001"), "{seen}");
    pod.delete("two", "").await.unwrap();

    // The orphan was collected.
    let all = pod.vm.run("/run/kuasar/state/one/rootfs/bin/busybox ps -o stat,comm").await.unwrap().out;
    assert!(!all.lines().any(|line| line.starts_with('Z')), "{all}");
}
