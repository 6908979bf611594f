//! Limits that the guest's kernel enforces on containers, and the host's knowledge of them.

use containerd_shim_protos::{
    api,
    cgroups_v2::metrics::Metrics,
    events::task::{TaskExit, TaskOOM},
    shim_async::TaskClient,
};
use kuasar_common::{
    api::sandbox::{Envelope, GetEventsRequest},
    stdio::Stream,
};
use protobuf::{EnumOrUnknown, Message};
use serde_json::{Value, json};
use ttrpc::Code;

use crate::{
    given,
    given::Kind,
    pod::{Pod, code, join},
    vm::{Vm, bundle, read_frame, write_frame},
};

/// Ends when it has all the memory there is.
const GREEDY: &str = "busybox tail /dev/zero";

#[tokio::test]
#[ignore = "needs a guest: set KUASAR_IMAGE"]
async fn containers_have_limits_and_the_host_hears_of_it() {
    let given = given();
    let vm = Vm::boot(&given, Kind::InitrdNineP, "task.sharefs_type=9p task.log_level=info", true);
    let task = TaskClient::new(vm.client());
    let pod = Pod { given, vm, task };
    killed_for_memory(&pod).await;
    killed_inside(&pod).await;
    reconnect(&pod).await;
    seccomp(&pod).await;
    hooks(&pod).await;
}

/// Creates a container whose spec was changed first.
pub(crate) async fn create_with(
    pod: &Pod,
    id: &str,
    args: &[&str],
    stdin: bool,
    change: impl FnOnce(&mut Value),
) -> ttrpc::Result<u32> {
    let path = bundle(&pod.given, &pod.vm, id, args, false);
    let file = pod.vm.shared(id).join("config.json");
    let mut spec: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    change(&mut spec);
    std::fs::write(&file, spec.to_string()).unwrap();
    pod.create_from(id, path, false, stdin).await
}

pub(crate) fn little_memory(spec: &mut Value) {
    spec["linux"]["resources"]["memory"]["limit"] = json!(16 << 20);
}

/// The next event, of whichever container, after one.
pub(crate) async fn event(pod: &Pod, after: u64) -> Envelope {
    let request = GetEventsRequest { after: Some(after), ..Default::default() };
    pod.vm.sandbox().get_events(pod.vm.context(), &request).await.unwrap()
}

async fn metrics(pod: &Pod, id: &str) -> Metrics {
    let stats = api::StatsRequest { id: id.into(), ..Default::default() };
    let stats = pod.task.stats(pod.vm.context(), &stats).await.unwrap().stats.unwrap();
    Metrics::parse_from_bytes(&stats.value).unwrap()
}

async fn killed_for_memory(pod: &Pod) {
    create_with(pod, "oom", &["busybox", "tail", "/dev/zero"], false, little_memory).await.unwrap();
    let pid = pod.start("oom", "").await.unwrap();
    let mut topics = Vec::new();
    let mut last = Envelope::new();
    while last.topic != "/tasks/exit" {
        last = event(pod, last.sequence).await;
        assert_eq!((last.sequence, last.namespace.as_str()), (topics.len() as u64 + 1, "k8s.io"));
        topics.push(last.topic.clone());
    }
    assert_eq!(topics, ["/tasks/create", "/tasks/start", "/tasks/oom", "/tasks/exit"]);
    let exit = TaskExit::parse_from_bytes(&last.event.value).unwrap();
    assert_eq!((exit.container_id.as_str(), exit.pid, exit.exit_status), ("oom", pid, 137));
    assert_eq!(pod.wait("oom", "").await.unwrap(), 137);
    let metrics = metrics(pod, "oom").await;
    assert_eq!((metrics.memory_events.oom_kill, metrics.memory.usage_limit), (1, 16 << 20));
    assert!(metrics.memory.max_usage > 8 << 20 && metrics.cpu.usage_usec > 0, "{metrics}");
    pod.delete("oom", "").await.unwrap();
    assert_eq!(event(pod, 4).await.topic, "/tasks/delete");
}

/// The killed process is not always the one that ends the container.
async fn killed_inside(pod: &Pod) {
    let script = format!("{GREEDY}; echo one; read x; {GREEDY}; echo two; sleep 1000");
    create_with(pod, "some", &["sh", "-c", &script], true, little_memory).await.unwrap();
    let mut stdout = pod.vm.stream("some", "", Stream::Stdout);
    let mut stdin = pod.vm.stream("some", "", Stream::Stdin);
    pod.start("some", "").await.unwrap();
    for (line, sequence) in [(&b"one\n"[..], 8), (b"two\n", 9)] {
        let oom = event(pod, sequence - 1).await;
        assert_eq!((oom.topic.as_str(), oom.sequence), ("/tasks/oom", sequence));
        assert_eq!(TaskOOM::parse_from_bytes(&oom.event.value).unwrap().container_id, "some");
        assert_eq!(read_frame(&mut stdout), line);
        write_frame(&mut stdin, b"\n");
    }
    let state = pod.state("some", "").await.unwrap();
    assert_eq!(state.status, EnumOrUnknown::new(api::Status::RUNNING));
    assert_eq!(metrics(pod, "some").await.memory_events.oom_kill, 2);
    let pause = api::PauseRequest { id: "some".into(), ..Default::default() };
    pod.task.pause(pod.vm.context(), &pause).await.unwrap();
    let resume = api::ResumeRequest { id: "some".into(), ..Default::default() };
    pod.task.resume(pod.vm.context(), &resume).await.unwrap();
    pod.kill("some", "", 9, true).await.unwrap();
    assert_eq!(pod.wait("some", "").await.unwrap(), 137);
    pod.delete("some", "").await.unwrap();
    let mut topics = Vec::new();
    for sequence in 10..14 {
        topics.push(event(pod, sequence - 1).await.topic);
    }
    assert_eq!(topics, ["/tasks/paused", "/tasks/resumed", "/tasks/exit", "/tasks/delete"]);
}

/// A host that comes back gets what it missed, on whichever connection, and nothing that did not happen.
async fn reconnect(pod: &Pod) {
    let again = event(pod, 9).await;
    assert_eq!((again.sequence, again.topic.as_str()), (10, "/tasks/paused"));
    let mut context = pod.vm.context();
    context.timeout_nano = 300_000_000;
    let last = GetEventsRequest { after: Some(13), ..Default::default() };
    assert!(pod.vm.sandbox().get_events(context, &last).await.is_err(), "there is none yet");
    let ahead = GetEventsRequest { after: Some(14), ..Default::default() };
    let refused = code(pod.vm.sandbox().get_events(pod.vm.context(), &ahead).await);
    assert_eq!(refused.0, Code::INVALID_ARGUMENT, "{}", refused.1);
}

async fn seccomp(pod: &Pod) {
    let script = "busybox mkdir /tmp/folder; echo $?; echo file > /tmp/file; cat /tmp/file";
    let forbid = json!([{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]);
    for (id, calls, out, err) in [
        (
            "strict",
            forbid,
            "1\nfile\n",
            "mkdir: can't create directory '/tmp/folder': Operation not permitted\n",
        ),
        ("lax", json!([]), "0\nfile\n", ""),
    ] {
        let change = |spec: &mut Value| spec["linux"]["seccomp"]["syscalls"] = calls;
        create_with(pod, id, &["sh", "-c", script], false, change).await.unwrap();
        let (stdout, stderr) = (pod.vm.output(id, "", Stream::Stdout), pod.vm.output(id, "", Stream::Stderr));
        pod.start(id, "").await.unwrap();
        assert_eq!(pod.wait(id, "").await.unwrap(), 0);
        assert_eq!(String::from_utf8(join(stdout).await).unwrap(), out, "{id}");
        assert_eq!(String::from_utf8(join(stderr).await).unwrap(), err, "{id}");
        pod.delete(id, "").await.unwrap();
    }
}

async fn hooks(pod: &Pod) {
    let hook = |list: &'static str, path: &'static str, args: &'static [&'static str]| {
        move |spec: &mut Value| spec["hooks"] = json!({list: [{"path": path, "args": args}]})
    };
    let nvidia = hook("prestart", "/usr/bin/nvidia-container-runtime-hook", &[]);
    let missing = code(create_with(pod, "gpu", &["true"], false, nvidia).await);
    assert_eq!(missing.0, Code::INVALID_ARGUMENT);
    assert!(
        missing.1.starts_with(
            "hooks.prestart[0] of the container's spec cannot run: /usr/bin/nvidia-container-runtime-hook does not exist"
        ),
        "{}",
        missing.1
    );
    // The one program that every guest has.
    let fails = hook("createRuntime", "/bin/runc", &["runc", "state", "nobody"]);
    let failed = code(create_with(pod, "gpu", &["true"], false, fails).await);
    assert!(
        failed.1.contains("createRuntime hook #0") && failed.1.contains("does not exist"),
        "{}",
        failed.1
    );
    let runs = hook("createRuntime", "/bin/runc", &["runc", "--version"]);
    create_with(pod, "gpu", &["true"], false, runs).await.unwrap();
    pod.start("gpu", "").await.unwrap();
    assert_eq!(pod.wait("gpu", "").await.unwrap(), 0);
    pod.delete("gpu", "").await.unwrap();
}
