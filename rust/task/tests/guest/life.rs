//! Steps about containers and what runs in them.

use std::time::{Duration, Instant};

use containerd_shim_protos::{api, cgroups_v2::metrics::Metrics, shim_async::TaskClient};
use kuasar_common::{constants::STDIO_WANTED, stdio::Stream};
use protobuf::{EnumOrUnknown, Message, MessageField, well_known_types::any::Any};
use ttrpc::Code;

use crate::{
    pod::{Pod, code, join, step},
    vm::bundle,
};

pub(crate) async fn life(pod: &Pod) {
    let script = "echo out; echo err >&2; hostname; cat /proc/sys/kernel/printk_devkmsg
        ip addr show net0; ip route; ulimit -n; cat /proc/1/cgroup; exit 42";
    let at = Instant::now();
    let pid = pod.create("c1", &["sh", "-c", script], false, false).await.unwrap();
    step("  create", at);
    assert!(pid > 1);
    let state = pod.state("c1", "").await.unwrap();
    assert_eq!((state.status, state.pid), (EnumOrUnknown::new(api::Status::CREATED), pid));
    assert_eq!((state.bundle.as_str(), state.stdout.as_str()), ("/run/kuasar/state/c1", STDIO_WANTED));
    let again = code(pod.create("c1", &["true"], false, false).await);
    assert_eq!(again.0, Code::ALREADY_EXISTS);

    // Wait must block before the start.
    let client = TaskClient::new(pod.vm.client());
    let context = pod.vm.context();
    let waiting = tokio::spawn(async move {
        client.wait(context, &api::WaitRequest { id: "c1".into(), ..Default::default() }).await
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!waiting.is_finished());
    let stdout = pod.vm.output("c1", "", Stream::Stdout);
    let at = Instant::now();
    assert_eq!(pod.start("c1", "").await.unwrap(), pid);
    step("  start", at);
    assert_eq!(waiting.await.unwrap().unwrap().exit_status, 42);
    assert_eq!(pod.wait("c1", "").await.unwrap(), 42);
    let out = String::from_utf8(join(stdout).await).unwrap();
    assert!(out.starts_with("out\nweb-0\non\n"), "and no line of the agent's log is left out: {out}");
    assert!(out.contains("inet 10.0.2.15/24") && out.contains("mtu 1400"), "{out}");
    assert!(out.contains("default via 10.0.2.2 dev net0"), "{out}");
    assert!(out.ends_with("\n1048576\n0::/\n"), "files, and its own cgroup namespace: {out}");
    // Connected only after the exit: what was written is kept.
    assert_eq!(join(pod.vm.output("c1", "", Stream::Stderr)).await, b"err\n");

    let state = pod.state("c1", "").await.unwrap();
    assert_eq!((state.status, state.exit_status), (EnumOrUnknown::new(api::Status::STOPPED), 42));
    let pids = api::PidsRequest { id: "c1".into(), ..Default::default() };
    let pids = pod.task.pids(pod.vm.context(), &pids).await.unwrap();
    assert_eq!(pids.processes[0].pid, pid);
    let stats = api::StatsRequest { id: "c1".into(), ..Default::default() };
    let stats = pod.task.stats(pod.vm.context(), &stats).await.unwrap().stats.unwrap();
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let metrics = Metrics::parse_from_bytes(&stats.value).unwrap();
    assert!(metrics.cpu.usage_usec > 0);
    assert_eq!((metrics.memory.usage_limit, metrics.pids.limit), (67_108_864, 64));
    assert_eq!(code(pod.kill("c1", "", 9, true).await).0, Code::NOT_FOUND);
    let at = Instant::now();
    let deleted = pod.delete("c1", "").await.unwrap();
    step("  delete", at);
    assert_eq!((deleted.pid, deleted.exit_status), (pid, 42));
    assert!(deleted.exited_at.seconds > 1_500_000_000);
    assert_eq!(code(pod.state("c1", "").await).0, Code::NOT_FOUND);
    assert_eq!(code(pod.delete("c1", "").await).0, Code::NOT_FOUND);
}

pub(crate) async fn execs(pod: &Pod) {
    pod.create("c2", &["sleep", "1000"], false, false).await.unwrap();
    let early = code(pod.delete("c2", "e0").await);
    assert_eq!(early.0, Code::NOT_FOUND);
    pod.start("c2", "").await.unwrap();
    assert_eq!(code(pod.start("c2", "").await).0, Code::FAILED_PRECONDITION);
    let at = Instant::now();
    assert_eq!(pod.run("c2", "e1", &["sh", "-c", "echo hello; exit 3"]).await, (3, "hello\n".into()));
    step("  exec", at);
    assert_eq!(pod.run("c2", "e2", &["true"]).await, (0, String::new()));
    // A signal's number counts from 128.
    assert_eq!(pod.run("c2", "e3", &["sh", "-c", "kill -9 $$"]).await.0, 137);
    // A descendant that keeps the output open holds nobody up.
    let at = Instant::now();
    let (status, output) = pod.run("c2", "e4", &["sh", "-c", "sleep 900 & echo started"]).await;
    assert_eq!((status, output.as_str()), (0, "started\n"));
    assert!(at.elapsed() < Duration::from_secs(60));
    // Not even one that goes on writing; it ends when nobody reads any more.
    assert_eq!(pod.run("c2", "e6", &["sh", "-c", "yes & sleep 0.3"]).await.0, 0);
    let missing = pod.exec("c2", "e5", &["nosuch"], false, false).await;
    missing.unwrap();
    let stdout = pod.vm.output("c2", "e5", Stream::Stdout);
    let error = code(pod.start("c2", "e5").await);
    assert!(error.1.contains("exec: \"nosuch\": executable file not found in $PATH"), "{error:?}");
    assert_eq!(join(stdout).await, b"");
    assert_eq!(pod.wait("c2", "e5").await.unwrap(), 255);
    pod.delete("c2", "e5").await.unwrap();
    let many: Vec<_> = (0..4).map(|n| format!("m{n}")).collect();
    let runs = many.iter().map(|exec| pod.run("c2", exec, &["sh", "-c", "exit 7"]));
    for run in futures(runs).await {
        assert_eq!(run.0, 7);
    }
    let pids = api::PidsRequest { id: "c2".into(), ..Default::default() };
    let pids = pod.task.pids(pod.vm.context(), &pids).await.unwrap().processes.len();
    assert_eq!(pids, 2, "sleep 1000 and sleep 900");
    pod.kill("c2", "", 9, true).await.unwrap();
    assert_eq!(pod.wait("c2", "").await.unwrap(), 137);
    assert_eq!(code(pod.exec("c2", "late", &["true"], false, false).await).0, Code::FAILED_PRECONDITION);
    pod.delete("c2", "").await.unwrap();
}

/// Drives futures side by side.
pub(crate) async fn futures<F: Future>(all: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut all: Vec<_> = all.map(|one| (Box::pin(one), None)).collect();
    std::future::poll_fn(|context| {
        for (future, done) in all.iter_mut().filter(|(_, done)| done.is_none()) {
            if let std::task::Poll::Ready(output) = future.as_mut().poll(context) {
                *done = Some(output);
            }
        }
        if all.iter().all(|(_, done)| done.is_some()) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    all.into_iter().filter_map(|(_, done)| done).collect()
}

pub(crate) async fn failures(pod: &Pod) {
    let error = code(pod.create("bad", &["nosuch"], false, false).await);
    assert!(error.1.contains("exec: \"nosuch\": executable file not found in $PATH"), "{error:?}");
    assert_eq!(code(pod.state("bad", "").await).0, Code::NOT_FOUND);
    assert_eq!(code(pod.delete("bad", "").await).0, Code::NOT_FOUND);
    let mut req = api::CreateTaskRequest { id: "none".into(), ..Default::default() };
    req.bundle = "/run/kuasar/state/none".into();
    let error = code(pod.task.create(pod.vm.context(), &req).await);
    assert!(error.1.contains("/run/kuasar/state/none/config.json"), "{error:?}");
    req.id = "../x".into();
    assert_eq!(code(pod.task.create(pod.vm.context(), &req).await).0, Code::INVALID_ARGUMENT);
    let shutdown = api::ShutdownRequest { id: "gone".into(), ..Default::default() };
    pod.task.shutdown(pod.vm.context(), &shutdown).await.unwrap();
    let checkpoint = pod.task.checkpoint(pod.vm.context(), &api::CheckpointTaskRequest::new()).await;
    assert_eq!(code(checkpoint).0, Code::UNIMPLEMENTED);
    assert_eq!(code(pod.wait("gone", "").await).0, Code::NOT_FOUND);
    // The id is free again, and a created container can be deleted without being started.
    pod.create("bad", &["sleep", "9"], false, false).await.unwrap();
    assert_eq!(pod.delete("bad", "").await.unwrap().exit_status, 137);
}

pub(crate) async fn control(pod: &Pod) {
    pod.create("ctl", &["sh", "-c", "trap 'exit 9' TERM; while true; do sleep 0.1; done"], false, false)
        .await
        .unwrap();
    pod.start("ctl", "").await.unwrap();
    let pause = api::PauseRequest { id: "ctl".into(), ..Default::default() };
    pod.task.pause(pod.vm.context(), &pause).await.unwrap();
    assert_eq!(pod.state("ctl", "").await.unwrap().status, EnumOrUnknown::new(api::Status::PAUSED));
    pod.exec("ctl", "late", &["sleep", "1000"], false, false).await.unwrap();
    assert!(code(pod.start("ctl", "late").await).1.contains("paused"));
    pod.delete("ctl", "late").await.unwrap();
    let resume = api::ResumeRequest { id: "ctl".into(), ..Default::default() };
    pod.task.resume(pod.vm.context(), &resume).await.unwrap();
    assert_eq!(pod.state("ctl", "").await.unwrap().status, EnumOrUnknown::new(api::Status::RUNNING));
    pod.exec("ctl", "named", &["sleep", "1000"], false, false).await.unwrap();
    let named = pod.start("ctl", "named").await.unwrap();
    let pids = api::PidsRequest { id: "ctl".into(), ..Default::default() };
    let pids = pod.task.pids(pod.vm.context(), &pids).await.unwrap().processes;
    let info = &pids.iter().find(|process| process.pid == named).unwrap().info;
    assert_eq!(
        (info.type_url.as_str(), &info.value[2..]),
        ("containerd.runc.v1.ProcessDetails", &b"named"[..])
    );
    let mut update = api::UpdateTaskRequest { id: "ctl".into(), ..Default::default() };
    // Processors that the host has and the guest has not.
    let resources = br#"{"memory":{"limit":33554432},"cpu":{"cpus":"30-31"}}"#.to_vec();
    update.resources = MessageField::some(Any { value: resources, ..Default::default() });
    pod.task.update(pod.vm.context(), &update).await.unwrap();
    let stats = api::StatsRequest { id: "ctl".into(), ..Default::default() };
    let stats = pod.task.stats(pod.vm.context(), &stats).await.unwrap().stats.unwrap();
    assert_eq!(Metrics::parse_from_bytes(&stats.value).unwrap().memory.usage_limit, 33_554_432);
    assert_eq!(code(pod.delete("ctl", "").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(code(pod.kill("ctl", "", 99, false).await).0, Code::INVALID_ARGUMENT);
    pod.kill("ctl", "", 15, false).await.unwrap();
    assert_eq!(pod.wait("ctl", "").await.unwrap(), 9);
    // A caller who gives up changes nothing: the work goes on, and the next one waits for it.
    let mut impatient = pod.vm.context();
    impatient.timeout_nano = 1_000_000;
    let delete = api::DeleteRequest { id: "ctl".into(), ..Default::default() };
    assert!(pod.task.delete(impatient, &delete).await.is_err());
    // Unless a busy machine let the time pass before anything was sent.
    if pod.delete("ctl", "").await.is_ok() {
        println!("the impatient caller was too impatient");
    }
    assert_eq!(code(pod.delete("ctl", "").await).0, Code::NOT_FOUND);
}

/// A container that is made anew under an id is the new one, also while the guest's kernel remembers the
/// folder of the old one.
pub(crate) async fn made_anew(pod: &Pod) {
    for code in [3, 4] {
        let command = format!("exit {code}");
        let bundle = bundle(&pod.given, &pod.vm, "anew", &["sh", "-c", &command], false);
        pod.create_from("anew", bundle, false, false).await.unwrap();
        if code == 4 {
            pod.start("anew", "").await.unwrap();
            assert_eq!(pod.wait("anew", "").await.unwrap(), code);
        }
        pod.delete("anew", "").await.unwrap();
        std::fs::remove_dir_all(pod.vm.shared("anew")).unwrap();
    }
}

/// The agent holds no more descriptors after many processes than after one.
pub(crate) async fn no_leaks(pod: &Pod) {
    let bundle = bundle(&pod.given, &pod.vm, "fds", &["sleep", "1000"], false);
    let file = pod.vm.shared("fds").join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let proc = serde_json::json!({"destination": "/tmp", "type": "bind", "source": "/proc", "options": ["bind", "ro"]});
    spec["mounts"].as_array_mut().unwrap().push(proc);
    spec["process"]["user"]["uid"] = 0.into();
    std::fs::write(&file, spec.to_string()).unwrap();
    pod.create_from("fds", bundle, false, false).await.unwrap();
    pod.start("fds", "").await.unwrap();
    let before = agent_descriptors(pod, "first").await;
    for n in 0..12 {
        let (id, tty) = (format!("n{n}"), n % 2 == 0);
        pod.exec("fds", &id, &["true"], tty, true).await.unwrap();
        let (output, input) =
            (pod.vm.output("fds", &id, Stream::Stdout), pod.vm.stream("fds", &id, Stream::Stdin));
        pod.start("fds", &id).await.unwrap();
        assert_eq!(pod.wait("fds", &id).await.unwrap(), 0);
        join(output).await;
        drop(input);
        pod.delete("fds", &id).await.unwrap();
    }
    // A connection that the other side closed may be noticed a moment later.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(agent_descriptors(pod, "last").await, before);
    pod.kill("fds", "", 9, true).await.unwrap();
    assert_eq!(pod.wait("fds", "").await.unwrap(), 137);
    pod.delete("fds", "").await.unwrap();
}

async fn agent_descriptors(pod: &Pod, exec: &str) -> usize {
    let (status, list) =
        pod.run_with("fds", exec, &["ls", "/tmp/1/fd"], &["CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"]).await;
    assert_eq!(status, 0);
    println!("  descriptors of the agent: {}", list.split_whitespace().collect::<Vec<_>>().join(" "));
    list.split_whitespace().count()
}
