//! The agent in a real guest, driven over vsock as the host does it.
//!
//! Run with `cargo test -p vmm-task --test guest -- --ignored --nocapture` and `KUASAR_IMAGE` set to a built image's
//! folder, or `KUASAR_KERNEL`, `KUASAR_AGENT` and `KUASAR_RUNC` to files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod vm;

use std::{
    io::Write,
    time::{Duration, Instant},
};

use containerd_shim_protos::{api, cgroups_v2::metrics::Metrics, shim_async::TaskClient};
use kuasar_common::{
    api::sandbox::{
        CheckRequest, IPAddress, Interface, Route, SetupSandboxRequest, ShutdownRequest, SyncClockPacket,
    },
    constants::STDIO_WANTED,
    stdio::Stream,
};
use protobuf::{
    EnumOrUnknown, Message, MessageField,
    well_known_types::{any::Any, empty::Empty},
};
use ttrpc::Code;
use vm::{Given, Kind, MAC, Vm, bundle, process, read_frame, write_frame};

fn given() -> Given {
    Given::from_env().unwrap_or_else(|missing| panic!("this test needs a guest: {missing}"))
}

/// One pod's worth of calls.
struct Pod {
    given: Given,
    vm: Vm,
    task: TaskClient,
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("{other}"),
    }
}

impl Pod {
    async fn create(&self, id: &str, args: &[&str], terminal: bool, stdin: bool) -> ttrpc::Result<u32> {
        let mut req = api::CreateTaskRequest::new();
        req.bundle = bundle(&self.given, &self.vm, id, args, terminal);
        req.id = id.to_owned();
        req.terminal = terminal;
        req.stdout = STDIO_WANTED.to_owned();
        if stdin {
            req.stdin = STDIO_WANTED.to_owned();
        }
        if !terminal {
            req.stderr = STDIO_WANTED.to_owned();
        }
        Ok(self.task.create(self.vm.context(), &req).await?.pid)
    }

    async fn start(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let req = api::StartRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        Ok(self.task.start(self.vm.context(), &req).await?.pid)
    }

    async fn wait(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let req = api::WaitRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        Ok(self.task.wait(self.vm.context(), &req).await?.exit_status)
    }

    async fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<api::DeleteResponse> {
        let req = api::DeleteRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.task.delete(self.vm.context(), &req).await
    }

    async fn state(&self, id: &str, exec: &str) -> ttrpc::Result<api::StateResponse> {
        let req = api::StateRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.task.state(self.vm.context(), &req).await
    }

    async fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> ttrpc::Result<api::Empty> {
        let req = api::KillRequest { id: id.into(), exec_id: exec.into(), signal, all, ..Default::default() };
        self.task.kill(self.vm.context(), &req).await
    }

    async fn exec(
        &self,
        id: &str,
        exec: &str,
        args: &[&str],
        tty: bool,
        stdin: bool,
    ) -> ttrpc::Result<api::Empty> {
        let mut req = api::ExecProcessRequest::new();
        (req.id, req.exec_id, req.terminal) = (id.into(), exec.into(), tty);
        req.stdout = STDIO_WANTED.to_owned();
        req.stderr = if tty { String::new() } else { STDIO_WANTED.to_owned() };
        req.stdin = if stdin { STDIO_WANTED.to_owned() } else { String::new() };
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process(args, tty).to_string().into_bytes(),
            ..Default::default()
        };
        req.spec = MessageField::some(spec);
        self.task.exec(self.vm.context(), &req).await
    }

    /// Runs a command in a container; its exit code and output.
    async fn run(&self, id: &str, exec: &str, args: &[&str]) -> (u32, String) {
        self.exec(id, exec, args, false, false).await.unwrap();
        let output = self.vm.output(id, exec, Stream::Stdout);
        self.start(id, exec).await.unwrap();
        let status = self.wait(id, exec).await.unwrap();
        let output = join(output).await;
        assert_eq!(self.delete(id, exec).await.unwrap().exit_status, status);
        (status, String::from_utf8(output).unwrap())
    }
}

async fn join(thread: std::thread::JoinHandle<Vec<u8>>) -> Vec<u8> {
    tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap()
}

fn step(name: &str, since: Instant) {
    println!("{name}: {:.2} s", since.elapsed().as_secs_f64());
}

#[tokio::test]
#[ignore = "needs a guest: set KUASAR_IMAGE"]
async fn a_pod_lives_on_an_initrd_with_9p() {
    a_pod_lives(Kind::InitrdNineP, "task.sharefs_type=9p").await;
}

#[tokio::test]
#[ignore = "needs a guest: set KUASAR_IMAGE"]
async fn a_pod_lives_on_a_disk_with_virtiofs() {
    a_pod_lives(Kind::DiskVirtiofs, "task.sharefs_type=virtiofs").await;
}

async fn a_pod_lives(kind: Kind, cmdline: &str) {
    let given = given();
    if let Some(missing) = kind.missing(&given) {
        println!("skipped: {missing}");
        return;
    }
    let vm = Vm::boot(&given, kind, &format!("{cmdline} task.log_level=info"), true);
    let task = TaskClient::new(vm.client());
    let pod = Pod { given, vm, task };
    let at = Instant::now();
    token(&pod).await;
    step("token", at);
    let at = Instant::now();
    sandbox(&pod).await;
    step("sandbox", at);
    let at = Instant::now();
    life(&pod).await;
    step("life", at);
    let at = Instant::now();
    execs(&pod).await;
    step("execs", at);
    let at = Instant::now();
    big_output(&pod).await;
    step("10 MiB", at);
    let at = Instant::now();
    stdin(&pod).await;
    step("stdin", at);
    let at = Instant::now();
    terminal(&pod).await;
    step("terminal", at);
    let at = Instant::now();
    failures(&pod).await;
    step("failures", at);
    let at = Instant::now();
    control(&pod).await;
    step("control", at);
    let at = Instant::now();
    takeover(&pod).await;
    step("take-over", at);
    let at = Instant::now();
    shutdown(&pod).await;
    step("shutdown", at);
}

async fn token(pod: &Pod) {
    let mut context = pod.vm.context();
    context.metadata.clear();
    let denied = code(pod.vm.sandbox().check(context.clone(), &CheckRequest::new()).await);
    assert_eq!(denied.0, Code::PERMISSION_DENIED);
    context.set("kuasar-token".into(), vec!["5b".repeat(32)]);
    let denied = code(pod.task.connect(context, &api::ConnectRequest::new()).await);
    assert_eq!(denied.0, Code::PERMISSION_DENIED);
    pod.vm.sandbox().check(pod.vm.context(), &CheckRequest::new()).await.unwrap();
}

async fn sandbox(pod: &Pod) {
    let client = pod.vm.sandbox();
    let mut req = SetupSandboxRequest::new();
    req.sandbox_id = "pod".into();
    req.hostname = "web-0".into();
    req.resolv_conf = "nameserver 10.0.2.3\n".into();
    req.clock_ns = 1_900_000_000_000_000_000;
    req.shm_size = 32 << 20;
    req.sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "0".into());
    let ip = IPAddress { address: "10.0.2.15".into(), mask: "24".into(), ..Default::default() };
    req.interfaces.push(Interface {
        name: "net0".into(),
        hwAddr: MAC.into(),
        mtu: 1400,
        IPAddresses: vec![ip],
        ..Default::default()
    });
    req.routes.push(Route { gateway: "10.0.2.2".into(), device: "net0".into(), ..Default::default() });
    client.setup_sandbox(pod.vm.context(), &req).await.unwrap();

    let now = client.sync_clock(pod.vm.context(), &SyncClockPacket::new()).await.unwrap();
    assert_eq!(now.ClientArriveTime / 1_000_000_000_000, 1_900_000);
    let back = SyncClockPacket { Delta: -400_000_000_000_000_000, ..Default::default() };
    let back = client.sync_clock(pod.vm.context(), &back).await.unwrap();
    assert_eq!(back.ServerSendTime / 1_000_000_000_000, 1_500_000);

    req.interfaces[0].hwAddr = "02:00:00:00:00:99".into();
    let missing = code(client.setup_sandbox(pod.vm.context(), &req).await);
    assert_eq!(missing.0, Code::NOT_FOUND);
    let events = client.get_events(pod.vm.context(), &Empty::new()).await;
    assert_eq!(code(events).0, Code::UNIMPLEMENTED);
    assert!(missing.1.contains("net0"), "{}", missing.1);
}

async fn life(pod: &Pod) {
    let script = "echo out; echo err >&2; hostname; ip addr show net0; ip route; ulimit -n; cat /proc/1/cgroup; exit 42";
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
    assert!(out.starts_with("out\nweb-0\n"), "{out}");
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

async fn execs(pod: &Pod) {
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
async fn futures<F: Future>(all: impl Iterator<Item = F>) -> Vec<F::Output> {
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

async fn big_output(pod: &Pod) {
    // A counted pattern: a missing, doubled or moved piece shows.
    let script =
        "i=0; while [ $i -lt 640 ]; do dd if=/tmp/block bs=16384 count=1 2>/dev/null; i=$((i+1)); done";
    let id = "big";
    let pattern: Vec<u8> = (0..16_384u32).map(|n| (n % 251) as u8).collect();
    bundle(&pod.given, &pod.vm, id, &["true"], false);
    std::fs::write(pod.vm.dir.path().join("shared/big/rootfs/tmp/block"), &pattern).unwrap();
    pod.create(id, &["sh", "-c", script], false, false).await.unwrap();
    let at = Instant::now();
    pod.start(id, "").await.unwrap();
    // Late on purpose: the writer waits.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let output = join(pod.vm.output(id, "", Stream::Stdout)).await;
    println!("  10 MiB in {:.2} s", at.elapsed().as_secs_f64());
    assert_eq!(output.len(), 10 << 20);
    assert!(output.chunks(pattern.len()).all(|chunk| chunk == pattern));
    assert_eq!(pod.wait(id, "").await.unwrap(), 0);
    pod.delete(id, "").await.unwrap();
}

async fn stdin(pod: &Pod) {
    pod.create("in", &["cat"], false, true).await.unwrap();
    // Opened before the process starts.
    let mut input = pod.vm.stream("in", "", Stream::Stdin);
    let output = pod.vm.output("in", "", Stream::Stdout);
    write_frame(&mut input, b"hello ");
    pod.start("in", "").await.unwrap();
    let big = vec![b'x'; 64 * 1024];
    write_frame(&mut input, &big);
    write_frame(&mut input, b"world");
    write_frame(&mut input, b"");
    assert_eq!(pod.wait("in", "").await.unwrap(), 0);
    assert_eq!(join(output).await, [b"hello ", big.as_slice(), b"world"].concat());
    pod.delete("in", "").await.unwrap();

    // CloseIO ends it, too, and not before what was sent has arrived.
    pod.create("in2", &["cat"], false, true).await.unwrap();
    let mut input = pod.vm.stream("in2", "", Stream::Stdin);
    let output = pod.vm.output("in2", "", Stream::Stdout);
    pod.start("in2", "").await.unwrap();
    write_frame(&mut input, b"last");
    let close = api::CloseIORequest { id: "in2".into(), stdin: true, ..Default::default() };
    pod.task.close_io(pod.vm.context(), &close).await.unwrap();
    assert_eq!(pod.wait("in2", "").await.unwrap(), 0);
    assert_eq!(join(output).await, b"last");
    pod.delete("in2", "").await.unwrap();
}

async fn terminal(pod: &Pod) {
    pod.create("tty", &["sh"], true, true).await.unwrap();
    let mut input = pod.vm.stream("tty", "", Stream::Stdin);
    let output = pod.vm.output("tty", "", Stream::Stdout);
    pod.start("tty", "").await.unwrap();
    let size = api::ResizePtyRequest { id: "tty".into(), width: 132, height: 43, ..Default::default() };
    pod.task.resize_pty(pod.vm.context(), &size).await.unwrap();
    write_frame(&mut input, b"tty; stty size; exit 5\n");
    assert_eq!(pod.wait("tty", "").await.unwrap(), 5);
    let text = String::from_utf8(join(output).await).unwrap();
    assert!(text.contains("/dev/pts/0\r\n43 132\r\n"), "{text:?}");
    pod.delete("tty", "").await.unwrap();

    pod.create("c3", &["sleep", "1000"], false, false).await.unwrap();
    pod.start("c3", "").await.unwrap();
    pod.exec("c3", "sh", &["sh", "-c", "tty; read line; echo got $line"], true, true).await.unwrap();
    let mut input = pod.vm.stream("c3", "sh", Stream::Stdin);
    let output = pod.vm.output("c3", "sh", Stream::Stdout);
    pod.start("c3", "sh").await.unwrap();
    write_frame(&mut input, b"abc\n");
    assert_eq!(pod.wait("c3", "sh").await.unwrap(), 0);
    let text = String::from_utf8(join(output).await).unwrap();
    assert!(text.contains("/dev/pts/") && text.ends_with("got abc\r\n"), "{text:?}");
    pod.delete("c3", "sh").await.unwrap();
    pod.kill("c3", "", 9, false).await.unwrap();
    assert_eq!(pod.wait("c3", "").await.unwrap(), 137);
    pod.delete("c3", "").await.unwrap();
}

async fn failures(pod: &Pod) {
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

async fn control(pod: &Pod) {
    pod.create("ctl", &["sh", "-c", "trap 'exit 9' TERM; while true; do sleep 0.1; done"], false, false)
        .await
        .unwrap();
    pod.start("ctl", "").await.unwrap();
    let pause = api::PauseRequest { id: "ctl".into(), ..Default::default() };
    pod.task.pause(pod.vm.context(), &pause).await.unwrap();
    assert_eq!(pod.state("ctl", "").await.unwrap().status, EnumOrUnknown::new(api::Status::PAUSED));
    let resume = api::ResumeRequest { id: "ctl".into(), ..Default::default() };
    pod.task.resume(pod.vm.context(), &resume).await.unwrap();
    assert_eq!(pod.state("ctl", "").await.unwrap().status, EnumOrUnknown::new(api::Status::RUNNING));
    let mut update = api::UpdateTaskRequest { id: "ctl".into(), ..Default::default() };
    let resources = br#"{"memory":{"limit":33554432}}"#.to_vec();
    update.resources = MessageField::some(Any { value: resources, ..Default::default() });
    pod.task.update(pod.vm.context(), &update).await.unwrap();
    let stats = api::StatsRequest { id: "ctl".into(), ..Default::default() };
    let stats = pod.task.stats(pod.vm.context(), &stats).await.unwrap().stats.unwrap();
    assert_eq!(Metrics::parse_from_bytes(&stats.value).unwrap().memory.usage_limit, 33_554_432);
    assert_eq!(code(pod.delete("ctl", "").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(code(pod.kill("ctl", "", 99, false).await).0, Code::INVALID_ARGUMENT);
    pod.kill("ctl", "", 15, false).await.unwrap();
    assert_eq!(pod.wait("ctl", "").await.unwrap(), 9);
    pod.delete("ctl", "").await.unwrap();
}

async fn takeover(pod: &Pod) {
    let script = "echo one; read x; echo two; read x; echo three";
    pod.create("over", &["sh", "-c", script], false, true).await.unwrap();
    let mut input = pod.vm.stream("over", "", Stream::Stdin);
    let mut first = pod.vm.stream("over", "", Stream::Stdout);
    pod.start("over", "").await.unwrap();
    assert_eq!(read_frame(&mut first), b"one\n");
    // The reader dies; what is written meanwhile goes to the next one.
    drop(first);
    write_frame(&mut input, b"\n");
    drop(input);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut input = pod.vm.stream("over", "", Stream::Stdin);
    let mut second = pod.vm.stream("over", "", Stream::Stdout);
    assert_eq!(read_frame(&mut second), b"two\n");
    // A newer one takes over from a living one.
    let third = pod.vm.output("over", "", Stream::Stdout);
    tokio::time::sleep(Duration::from_millis(300)).await;
    write_frame(&mut input, b"\n");
    assert_eq!(pod.wait("over", "").await.unwrap(), 0);
    assert_eq!(join(third).await, b"three\n");
    // Whoever comes after the end is told that it is the end.
    assert_eq!(join(pod.vm.output("over", "", Stream::Stdout)).await, b"");
    pod.delete("over", "").await.unwrap();
}

async fn shutdown(pod: &Pod) {
    let script = "trap 'exit 0' TERM; echo ready; while true; do sleep 0.1; done";
    pod.create("last", &["sh", "-c", script], false, false).await.unwrap();
    pod.start("last", "").await.unwrap();
    assert_eq!(read_frame(&mut pod.vm.stream("last", "", Stream::Stdout)), b"ready\n");
    let shutdown = ShutdownRequest { timeout_ms: 20_000, ..Default::default() };
    pod.vm.sandbox().shutdown(pod.vm.context(), &shutdown).await.unwrap();
    assert_eq!(pod.wait("last", "").await.unwrap(), 0);
}

#[test]
#[ignore = "needs a guest: set KUASAR_IMAGE"]
fn a_guest_without_its_share_says_why_and_ends() {
    let given = given();
    let mut vm = Vm::boot(&given, Kind::InitrdNineP, "task.sharefs_type=virtiofs task.colour=red", false);
    let fatal = vm.line();
    assert!(
        fatal.starts_with("{\"fatal\":{\"reason\":\"mounting virtiofs at /run/kuasar/state: "),
        "{fatal}"
    );
    assert!(vm.ended(Duration::from_secs(10)), "QEMU goes on");
    let console = vm.console();
    assert!(console.contains("the agent gives up: mounting virtiofs"), "{console}");
}

#[test]
#[ignore = "needs a guest: set KUASAR_IMAGE"]
fn a_wrong_token_ends_the_guest() {
    let given = given();
    let mut vm = Vm::boot(&given, Kind::InitrdNineP, "task.sharefs_type=9p", false);
    vm.ready.get_mut().write_all(b"{\"token\":\"short\"}\n").unwrap();
    assert!(vm.line().contains("the token is not 64 hexadecimal digits"));
    assert!(vm.ended(Duration::from_secs(10)));
}
