//! Pods as a real kubelet asks for them, on cgroup v2. It wants a machine of its own: `tests/lab/check
//! kubelet`.

#![allow(clippy::indexing_slicing)] // an index into JSON answers null

mod node;

use std::{process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Result, ensure};
use kuasar_e2e::{
    cases,
    image::BUSYBOX,
    suite::{self, patient},
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use node::{Node, container_of};

const IDLE: &str = "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done";

fn main() -> ExitCode {
    let cases = cases![
        a_guaranteed_pod_starts_and_its_limits_hold,
        containers_with_and_without_limits_share_a_volume,
        a_container_that_fails_its_probe_is_restarted,
    ];
    suite::with(suite::unless(node::missing(), cases), |runtime, machine| {
        runtime.block_on(Node::start(machine))
    })
}

fn container(name: &str, script: &str, more: Value) -> Value {
    let mut one = json!({
        "name": name, "image": BUSYBOX, "imagePullPolicy": "Never", "command": ["/bin/sh", "-c", script],
    });
    if let (Some(one), Value::Object(more)) = (one.as_object_mut(), more) {
        one.extend(more);
    }
    one
}

fn pod(containers: &[Value], more: Value) -> Value {
    let mut spec = json!({"terminationGracePeriodSeconds": 10, "containers": containers});
    if let (Some(spec), Value::Object(more)) = (spec.as_object_mut(), more) {
        spec.extend(more);
    }
    spec
}

/// The very first thing that a node asks, with everything that kubelet adds to it: swap, hugepage and OOM
/// fields.
async fn a_guaranteed_pod_starts_and_its_limits_hold(node: Arc<Node>) -> Result<()> {
    let limits = json!({"cpu": "500m", "memory": "96Mi"});
    let more = json!({
        "resources": {"limits": limits, "requests": limits},
        "readinessProbe": {"exec": {"command": ["/bin/true"]}, "periodSeconds": 2, "timeoutSeconds": 20},
    });
    let spec = pod(&[container("web", IDLE, more)], json!({"overhead": {"memory": "160Mi", "cpu": "250m"}}));
    node.put("guaranteed", &spec)?;
    let status = node.ready("guaranteed").await?;
    ensure!(container_of(&status, "web")?["restartCount"] == 0, "it was restarted: {status:#}");
    let web = Node::id_of(&status, "web")?;
    let memory = node.exec(&web, "cat /sys/fs/cgroup/memory.max").await?;
    ensure!(memory.trim() == (96u64 << 20).to_string(), "memory.max in the guest: {memory}");
    let cpu = node.exec(&web, "cat /sys/fs/cgroup/cpu.max").await?;
    ensure!(cpu.trim() == "50000 100000", "cpu.max in the guest: {cpu}");

    // As an upgrade of the node does it.
    node.restart_kubelet().await?;
    let status = node.ready("guaranteed").await?;
    ensure!(Node::id_of(&status, "web")? == web, "a new kubelet started another container");
    node.take("guaranteed").await
}

/// A sidecar with limits must not make the VM small for the application without any.
async fn containers_with_and_without_limits_share_a_volume(node: Arc<Node>) -> Result<()> {
    let mounts = json!([{"name": "data", "mountPath": "/data"}]);
    let side = json!({"resources": {"limits": {"cpu": "200m", "memory": "64Mi"}}, "volumeMounts": mounts});
    let app = json!({"volumeMounts": mounts});
    let containers = [container("side", IDLE, side), container("app", IDLE, app)];
    let init = container("init", "echo from init >/data/first", json!({"volumeMounts": mounts}));
    let spec =
        pod(&containers, json!({"initContainers": [init], "volumes": [{"name": "data", "emptyDir": {}}]}));
    node.put("mixed", &spec)?;
    let status = node.ready("mixed").await?;
    let (side, app) = (Node::id_of(&status, "side")?, Node::id_of(&status, "app")?);
    ensure!(
        node.exec(&app, "cat /data/first").await? == "from init\n",
        "the init container's file is missing"
    );
    node.exec(&side, "echo shared >/data/second").await?;
    ensure!(node.exec(&app, "cat /data/second").await? == "shared\n", "the sidecar's file is missing");
    // The sum of the limits is 64 MiB; the pod has none.
    let free = node.exec(&app, "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo").await?;
    let kib: u64 = free.trim().parse()?;
    ensure!(kib > 300 << 10, "the VM of a pod without a memory limit has {kib} KiB");
    node.take("mixed").await
}

/// Liveness probe, preStop hook, restart, message: the life of a container that went wrong.
async fn a_container_that_fails_its_probe_is_restarted(node: Arc<Node>) -> Result<()> {
    let script = "echo $$ >/state/starts.$$; touch /tmp/well; trap 'echo bye >/dev/termination-log; exit 3' TERM; \
                  while :; do sleep 1000 & wait; done";
    let more = json!({
        "livenessProbe": {
            "exec": {"command": ["/bin/cat", "/tmp/well"]},
            "periodSeconds": 2, "timeoutSeconds": 20, "failureThreshold": 1,
        },
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", "echo hook >/state/hook"]}}},
        "volumeMounts": [{"name": "state", "mountPath": "/state"}],
    });
    let spec =
        pod(&[container("frail", script, more)], json!({"volumes": [{"name": "state", "emptyDir": {}}]}));
    node.put("restarts", &spec)?;
    let status = node.ready("restarts").await?;
    node.exec(&Node::id_of(&status, "frail")?, "rm /tmp/well").await?;
    let status = node
        .until("restarts", "restarted", |status| {
            container_of(status, "frail").is_ok_and(|one| one["restartCount"] == 1 && one["ready"] == true)
        })
        .await?;
    let last = &container_of(&status, "frail")?["lastState"]["terminated"];
    ensure!(last["exitCode"] == 3 && last["message"] == "bye\n", "the first one ended with {last:#}");
    let again = Node::id_of(&status, "frail")?;
    ensure!(node.exec(&again, "cat /state/hook").await? == "hook\n", "the hook did not run");
    // Nothing restarts by itself.
    let end = Instant::now() + patient(Duration::from_secs(5));
    while Instant::now() < end {
        sleep(Duration::from_secs(1)).await;
    }
    let status = node.ready("restarts").await?;
    ensure!(container_of(&status, "frail")?["restartCount"] == 1, "it was restarted once more: {status:#}");
    node.take("restarts").await
}
