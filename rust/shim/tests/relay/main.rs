//! The relay as containerd sees it, between a guest and a daemon that are not.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that cannot go on fails"
)]

#[path = "../fake/mod.rs"]
mod fake;
mod fifos;
mod streams;

use std::{
    fs::{self, File},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant, SystemTime},
};

use containerd_shim_protos::{
    api::{self, Status},
    shim_async::TaskClient,
};
use fake::{Daemon, Events, Guest, receive, send, soon};
use kuasar_common::stdio::Stream;
use protobuf::{MessageField, well_known_types::any::Any};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    time::sleep,
};
use ttrpc::{Code, asynchronous::Client, asynchronous::Server, context};

const CID: &str = "c1";

/// A pod with everything around it.
struct Pod {
    dir: TempDir,
    guest: Arc<Guest>,
    daemon: Arc<Daemon>,
    daemon_server: Option<Server>,
    relay: Child,
    vmm: Child,
    _pidfd: OwnedFd,
    task: TaskClient,
}

impl Pod {
    async fn new() -> Self {
        Self::with(true, true).await
    }

    async fn with(watched: bool, daemon_up: bool) -> Self {
        let dir = TempDir::new().unwrap();
        let guest = Guest::serve(dir.path()).await;
        let daemon = Arc::new(Daemon::default());
        let daemon_server = if daemon_up { Some(daemon.serve(dir.path()).await) } else { None };
        let (vmm, pidfd) = fake::vmm();
        let program = Path::new(env!("CARGO_BIN_EXE_containerd-shim-kuasar-vmm-v1"));
        let log = File::create(dir.path().join("relay.log")).unwrap();
        let relay = fake::spawn_relay(program, dir.path(), watched.then_some(&pidfd), log.into());
        let task = connect(dir.path()).await;
        // Answered by the relay alone: from here on it is up.
        soon("Shutdown", task.shutdown(context::Context::default(), &api::ShutdownRequest::new()))
            .await
            .unwrap();
        Self { dir, guest, daemon, daemon_server, relay, vmm, _pidfd: pidfd, task }
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.dir.path().join(name);
        if !path.exists() {
            rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o700.into(), 0).unwrap();
        }
        path.to_str().unwrap().to_owned()
    }

    fn create_request(&self, id: &str, stdout: &str) -> api::CreateTaskRequest {
        let mount = api::Mount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options: vec!["lowerdir=/a".into()],
            ..Default::default()
        };
        api::CreateTaskRequest {
            id: id.into(),
            bundle: format!("/run/containerd/{id}"),
            rootfs: vec![mount],
            stdout: stdout.into(),
            ..Default::default()
        }
    }

    async fn create(&self, id: &str, stdout: &str) -> u32 {
        let request = self.create_request(id, stdout);
        soon("Create", self.task.create(context::Context::default(), &request)).await.unwrap().pid
    }

    async fn start(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = api::StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        soon("Start", self.task.start(context::Context::default(), &request)).await.map(|r| r.pid)
    }

    async fn state(&self, id: &str, exec_id: &str) -> ttrpc::Result<api::StateResponse> {
        state(&self.task, id, exec_id).await
    }

    async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<api::WaitResponse> {
        let request = api::WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        soon("Wait", self.task.wait(context::Context::default(), &request)).await
    }

    async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<api::DeleteResponse> {
        let request = api::DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        soon("Delete", self.task.delete(context::Context::default(), &request)).await
    }

    async fn kill(&self, id: &str) -> ttrpc::Result<api::Empty> {
        let request = api::KillRequest { id: id.into(), signal: 9, all: true, ..Default::default() };
        soon("Kill", self.task.kill(context::Context::default(), &request)).await
    }

    async fn pids(&self, id: &str) -> Vec<u32> {
        let request = api::PidsRequest { id: id.into(), ..Default::default() };
        let response = soon("Pids", self.task.pids(context::Context::default(), &request)).await.unwrap();
        response.processes.iter().map(|process| process.pid).collect()
    }

    async fn stats(&self, id: &str) -> ttrpc::Result<api::StatsResponse> {
        let request = api::StatsRequest { id: id.into(), ..Default::default() };
        soon("Stats", self.task.stats(context::Context::default(), &request)).await
    }

    fn exec_request(&self, exec_id: &str, stdin: &str, stdout: &str) -> api::ExecProcessRequest {
        let spec =
            Any { type_url: "Process".into(), value: b"{\"args\":[\"x\"]}".to_vec(), ..Default::default() };
        api::ExecProcessRequest {
            id: CID.into(),
            exec_id: exec_id.into(),
            stdin: stdin.into(),
            stdout: stdout.into(),
            spec: MessageField::some(spec),
            ..Default::default()
        }
    }

    async fn exec(&self, request: &api::ExecProcessRequest) -> ttrpc::Result<api::Empty> {
        soon("Exec", self.task.exec(context::Context::default(), request)).await
    }

    fn open_fds(&self) -> usize {
        self.fds().len()
    }

    fn fds(&self) -> Vec<String> {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.relay.id())).unwrap();
        fds.filter_map(|fd| Some(fs::read_link(fd.unwrap().path()).ok()?.display().to_string())).collect()
    }

    async fn fds_settle_at(&self, count: usize) {
        for _ in 0..400 {
            if self.open_fds() <= count {
                return;
            }
            sleep(Duration::from_millis(25)).await;
        }
        panic!("{count} descriptors were expected: {:#?}", self.fds());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("relay.log")).unwrap()
    }

    fn end_vm(&mut self) {
        self.vmm.kill().unwrap();
        self.vmm.wait().unwrap();
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        for child in [&mut self.relay, &mut self.vmm] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

async fn connect(dir: &Path) -> TaskClient {
    TaskClient::new(Client::connect(&format!("unix://{}/task.sock", dir.display())).await.unwrap())
}

async fn state(task: &TaskClient, id: &str, exec_id: &str) -> ttrpc::Result<api::StateResponse> {
    let request = api::StateRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
    soon("State", task.state(context::Context::default(), &request)).await
}

fn reader(path: &str) -> pipe::Receiver {
    pipe::OpenOptions::new().open_receiver(path).unwrap()
}

async fn read_all(mut from: pipe::Receiver) -> Vec<u8> {
    let mut bytes = Vec::new();
    soon("the end of a fifo", from.read_to_end(&mut bytes)).await.unwrap();
    bytes
}

#[track_caller]
fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        other => panic!("an error of the relay's was expected: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn life_of_a_container() {
    let pod = Pod::new().await;
    let out = pod.fifo("out");
    let output = reader(&out);
    let pid = pod.create(CID, &out).await;
    assert_eq!(pid, 100);

    let prepared = pod.daemon.prepared.lock().unwrap()[0].clone();
    assert_eq!((prepared.container_id.as_str(), prepared.bundle.as_str()), (CID, "/run/containerd/c1"));
    assert_eq!(prepared.rootfs[0].type_, "overlay");
    assert_eq!(prepared.rootfs[0].options, ["lowerdir=/a"]);
    let created = pod.guest.created.lock().unwrap()[0].clone();
    assert_eq!(created.bundle, "/run/kuasar/state/c1");
    assert!(created.rootfs.is_empty() && created.stdin.is_empty() && created.stderr.is_empty());
    assert_eq!(created.stdout, "vsock");

    let state = pod.state(CID, "").await.unwrap();
    assert_eq!(state.status.enum_value(), Ok(Status::CREATED));
    assert_eq!((state.bundle.as_str(), &state.stdout, state.pid), ("/run/containerd/c1", &out, 100));
    let request = api::ConnectRequest { id: CID.into(), ..Default::default() };
    let connected = pod.task.connect(context::Context::default(), &request).await.unwrap();
    assert_eq!((connected.shim_pid, connected.task_pid), (pod.relay.id(), 100));

    pod.start(CID, "").await.unwrap();
    assert_eq!(pod.state(CID, "").await.unwrap().status.enum_value(), Ok(Status::RUNNING));
    assert_eq!(pod.pids(CID).await, [100, 200]);
    assert_eq!(pod.stats(CID).await.unwrap().stats.value, [1, 2, 3]);

    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"hello ").await;
    send(&mut conn, b"world\n").await;
    let before = SystemTime::now();
    pod.guest.exit(CID, "", 3);
    let waited = pod.wait(CID, "").await.unwrap();
    assert_eq!(waited.exit_status, 3);
    let at: SystemTime = waited.exited_at.unwrap().into();
    assert!(at >= before - Duration::from_millis(1) && at <= SystemTime::now(), "the host's clock");
    send(&mut conn, b"last words\n").await;
    send(&mut conn, b"").await;
    assert_eq!(read_all(output).await, b"hello world\nlast words\n");

    let state = pod.state(CID, "").await.unwrap();
    assert_eq!((state.status.enum_value(), state.exit_status), (Ok(Status::STOPPED), 3));
    assert_eq!(code(pod.kill(CID).await).0, Code::NOT_FOUND);
    assert_eq!(pod.pids(CID).await, [100], "a stopped task still has a process for containerd");
    let deleted = pod.delete(CID, "").await.unwrap();
    assert_eq!((deleted.exit_status, deleted.pid), (3, 100));
    assert_eq!(*pod.daemon.released.lock().unwrap(), [CID]);
    assert_eq!(code(pod.delete(CID, "").await).0, Code::NOT_FOUND);
    assert_eq!(code(pod.state(CID, "").await).0, Code::NOT_FOUND);
    let shutdown = api::ShutdownRequest { id: CID.into(), now: true, ..Default::default() };
    pod.task.shutdown(context::Context::default(), &shutdown).await.unwrap();
    assert_eq!(pod.create(CID, "").await, 101, "the relay lives on, and the id is free again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exec_with_stdin_to_its_end() {
    let pod = Pod::new().await;
    pod.create(CID, "").await;
    pod.start(CID, "").await.unwrap();
    let (input, out) = (pod.fifo("in"), pod.fifo("out"));
    let output = reader(&out);
    let request = pod.exec_request("e1", &input, &out);
    assert_eq!(code(pod.state(CID, "e1").await).0, Code::NOT_FOUND);
    pod.exec(&request).await.unwrap();
    assert_eq!(code(pod.exec(&request).await).0, Code::ALREADY_EXISTS);
    let seen = pod.guest.execs.lock().unwrap()[0].clone();
    assert_eq!((seen.stdin.as_str(), seen.stdout.as_str(), seen.stderr.as_str()), ("vsock", "vsock", ""));
    assert_eq!(seen.spec, request.spec, "the process is passed on untouched");

    let task = pod.task.clone();
    let early = tokio::spawn(async move {
        let request = api::WaitRequest { id: CID.into(), exec_id: "e1".into(), ..Default::default() };
        task.wait(context::Context::default(), &request).await
    });
    sleep(Duration::from_millis(50)).await;
    assert!(!early.is_finished(), "Wait before Start blocks");
    assert_eq!(pod.start(CID, "e1").await.unwrap(), 1000);
    let state = pod.state(CID, "e1").await.unwrap();
    assert_eq!((state.pid, state.stdin, state.stdout), (1000, input.clone(), out.clone()));

    // The end comes with the writer's, and CloseIO after it is no error.
    let mut stdin = pod.guest.stream(CID, "e1", Stream::Stdin).await;
    let data = vec![b'x'; 60_000];
    let mut writer = pipe::OpenOptions::new().open_sender(&input).unwrap();
    writer.write_all(&data).await.unwrap();
    drop(writer);
    let mut got = Vec::new();
    loop {
        match receive(&mut stdin).await {
            frame if frame.is_empty() => break,
            frame => got.extend(frame),
        }
    }
    assert!(got == data, "{} of {} bytes", got.len(), data.len());
    let close =
        api::CloseIORequest { id: CID.into(), exec_id: "e1".into(), stdin: true, ..Default::default() };
    pod.task.close_io(context::Context::default(), &close).await.unwrap();
    drop(stdin);

    let mut stdout = pod.guest.stream(CID, "e1", Stream::Stdout).await;
    send(&mut stdout, b"done").await;
    send(&mut stdout, b"").await;
    assert_eq!(read_all(output).await, b"done");
    pod.guest.exit(CID, "e1", 7);
    assert_eq!(soon("the early Wait", early).await.unwrap().unwrap().exit_status, 7);
    assert_eq!(pod.delete(CID, "e1").await.unwrap().exit_status, 7);
    assert_eq!(code(pod.delete(CID, "e1").await).0, Code::NOT_FOUND);
    assert_eq!(pod.state(CID, "").await.unwrap().status.enum_value(), Ok(Status::RUNNING));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stdin_of_a_container_outlives_its_writers_until_close_io() {
    let pod = Pod::new().await;
    let input = pod.fifo("in");
    let request = api::CreateTaskRequest { stdin: input.clone(), ..pod.create_request(CID, "") };
    soon("Create", pod.task.create(context::Context::default(), &request)).await.unwrap();
    pod.start(CID, "").await.unwrap();
    let mut stdin = pod.guest.stream(CID, "", Stream::Stdin).await;
    // As when containerd is restarted.
    for words in ["one", "two"] {
        let mut writer = pipe::OpenOptions::new().open_sender(&input).unwrap();
        writer.write_all(words.as_bytes()).await.unwrap();
        drop(writer);
        assert_eq!(receive(&mut stdin).await, words.as_bytes());
    }
    let mut writer = pipe::OpenOptions::new().open_sender(&input).unwrap();
    writer.write_all(b"last").await.unwrap();
    let close = api::CloseIORequest { id: CID.into(), stdin: true, ..Default::default() };
    pod.task.close_io(context::Context::default(), &close).await.unwrap();
    assert_eq!(receive(&mut stdin).await, b"last");
    assert!(receive(&mut stdin).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_mebibytes_reach_a_slow_reader_that_comes_and_goes() {
    let pod = Pod::new().await;
    let out = pod.fifo("out");
    pod.create(CID, &out).await;
    pod.start(CID, "").await.unwrap();
    let data: Vec<u8> = (0..10u32 << 18).flat_map(u32::to_le_bytes).collect();
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    let sent = data.clone();
    let guest = Arc::clone(&pod.guest);
    let sender = tokio::spawn(async move {
        for frame in sent.chunks(65536) {
            send(&mut conn, frame).await;
        }
        guest.exit(CID, "", 0);
        send(&mut conn, b"").await;
        assert_eq!(conn.read(&mut [0]).await.unwrap(), 0, "the receiver closes");
    });
    sleep(Duration::from_millis(300)).await;
    assert!(!sender.is_finished(), "nobody reads yet");
    let mut got = Vec::new();
    let mut first = reader(&out);
    let mut chunk = vec![0; 8192];
    while got.len() < 3 << 20 {
        let n = first.read(&mut chunk).await.unwrap();
        got.extend(&chunk[..n]);
        if got.len() % 11 == 0 {
            sleep(Duration::from_millis(1)).await;
        }
    }
    drop(first);
    sleep(Duration::from_millis(200)).await;
    got.extend(read_all(reader(&out)).await);
    assert!(got == data, "{} of {} bytes, or others", got.len(), data.len());
    soon("the sender", sender).await.unwrap();
    assert_eq!(pod.wait(CID, "").await.unwrap().exit_status, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_vm_ends_everything_in_it() {
    let mut pod = Pod::new().await;
    let out = pod.fifo("out");
    let output = reader(&out);
    pod.create(CID, &out).await;
    pod.start(CID, "").await.unwrap();
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"said before the end").await;
    let (task, before) = (pod.task.clone(), SystemTime::now());
    let pending = tokio::spawn(async move {
        let request = api::WaitRequest { id: CID.into(), ..Default::default() };
        task.wait(context::Context::default(), &request).await
    });
    sleep(Duration::from_millis(100)).await;
    assert!(!pending.is_finished());
    pod.end_vm();
    let waited = soon("Wait", pending).await.unwrap().unwrap();
    assert_eq!(waited.exit_status, 137);
    let at: SystemTime = waited.exited_at.unwrap().into();
    assert!(at >= before - Duration::from_millis(1));
    assert_eq!(read_all(output).await, b"said before the end", "and the fifo is closed");
    let state = pod.state(CID, "").await.unwrap();
    assert_eq!((state.status.enum_value(), state.exit_status), (Ok(Status::STOPPED), 137));
    assert_eq!(code(pod.kill(CID).await).0, Code::NOT_FOUND);
    assert_eq!(pod.pids(CID).await, [100]);
    assert_eq!(code(pod.exec(&pod.exec_request("e1", "", "")).await).0, Code::FAILED_PRECONDITION);
    let request = pod.create_request("c2", "");
    let (_, text) = code(pod.task.create(context::Context::default(), &request).await);
    assert_eq!(text, "creating container c2: the pod's VM has ended");
    assert_eq!(pod.delete(CID, "").await.unwrap().exit_status, 137);
    assert_eq!(*pod.daemon.released.lock().unwrap(), [CID]);
    assert_eq!(code(pod.delete(CID, "").await).0, Code::NOT_FOUND);
    assert!(pod.relay.try_wait().unwrap().is_none(), "the relay stays");
    assert!(pod.log().contains("the VM is gone: its process ended"), "{}", pod.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_connection_is_no_exit_while_the_vm_lives() {
    let pod = Pod::new().await;
    let out = pod.fifo("out");
    let output = reader(&out);
    pod.create(CID, &out).await;
    pod.start(CID, "").await.unwrap();
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"before, ").await;
    drop(conn);
    pod.guest.cut();
    sleep(Duration::from_millis(300)).await;
    pod.guest.listen(pod.dir.path()).await;
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"after").await;
    send(&mut conn, b"").await;
    assert_eq!(read_all(output).await, b"before, after");
    assert_eq!(pod.pids(CID).await, [100, 200]);
    assert_eq!(pod.state(CID, "").await.unwrap().status.enum_value(), Ok(Status::RUNNING));
    pod.guest.exit(CID, "", 5);
    assert_eq!(pod.wait(CID, "").await.unwrap().exit_status, 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unwatched_vm_is_dead_when_its_guest_is_gone() {
    let pod = Pod::with(false, true).await;
    pod.create(CID, "").await;
    pod.start(CID, "").await.unwrap();
    pod.guest.cut();
    assert_eq!(pod.wait(CID, "").await.unwrap().exit_status, 137);
    assert_eq!(pod.delete(CID, "").await.unwrap().exit_status, 137);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_containers_wait_for_the_daemon_and_nothing_else_does() {
    let mut pod = Pod::new().await;
    pod.create(CID, "").await;
    pod.start(CID, "").await.unwrap();
    let mut server = pod.daemon_server.take().unwrap();
    server.shutdown().await.unwrap();
    drop(server);
    // What runs goes on: exec, exit, and a Delete whose release is owed.
    pod.exec(&pod.exec_request("e1", "", "")).await.unwrap();
    pod.start(CID, "e1").await.unwrap();
    pod.guest.exit(CID, "", 0);
    let begun = Instant::now();
    assert_eq!(pod.delete(CID, "").await.unwrap().exit_status, 0);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    let (task, request) = (pod.task.clone(), pod.create_request("c2", ""));
    let pending = tokio::spawn(async move { task.create(context::Context::default(), &request).await });
    sleep(Duration::from_millis(700)).await;
    assert!(!pending.is_finished(), "it waits");
    let _server = pod.daemon.serve(pod.dir.path()).await;
    assert_eq!(soon("Create", pending).await.unwrap().unwrap().pid, 101);
    for _ in 0..500 {
        if *pod.daemon.released.lock().unwrap() == [CID] {
            return;
        }
        sleep(Duration::from_millis(20)).await;
    }
    panic!("the daemon was never told of the container's end: {:?}", pod.daemon.released.lock().unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_connection_does_not_cancel_create() {
    let pod = Pod::new().await;
    pod.guest.create_delay_ms.store(500, Ordering::SeqCst);
    let (out, request) = (pod.fifo("out"), pod.create_request(CID, &pod.fifo("out")));
    let impatient = connect(pod.dir.path()).await;
    let call = tokio::spawn(async move { impatient.create(context::Context::default(), &request).await });
    sleep(Duration::from_millis(200)).await;
    call.abort();
    let _ = call.await;
    // An expired deadline does not, either: containerd then deletes what it takes for failed.
    let late = pod.create_request("c2", "");
    let expired = pod.task.create(context::with_duration(Duration::from_millis(100)), &late).await;
    assert!(expired.is_err(), "{expired:?}");
    assert_eq!(pod.delete("c2", "").await.unwrap().pid, 101);
    let state = pod.state(CID, "").await.unwrap();
    assert_eq!((state.pid, state.stdout), (100, out));
    assert_eq!(*pod.daemon.released.lock().unwrap(), ["c2"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_leave_nothing_and_say_why() {
    let pod = Pod::new().await;
    let before = pod.open_fds();
    let out = pod.fifo("out");
    let create = async |request: &api::CreateTaskRequest| {
        code(soon("Create", pod.task.create(context::Context::default(), request)).await)
    };
    // The daemon refuses.
    *pod.daemon.prepare_error.lock().unwrap() = Some("process.user: no".into());
    assert_eq!(
        create(&pod.create_request(CID, &out)).await,
        (Code::FAILED_PRECONDITION, "process.user: no".into())
    );
    *pod.daemon.prepare_error.lock().unwrap() = None;
    assert!(pod.daemon.released.lock().unwrap().is_empty());
    // The guest refuses.
    *pod.guest.create_error.lock().unwrap() = Some("exec: \"nope\": not found in $PATH".into());
    let output = reader(&out);
    let (why, text) = create(&pod.create_request(CID, &out)).await;
    assert_eq!((why, text.as_str()), (Code::INTERNAL, "exec: \"nope\": not found in $PATH"));
    assert_eq!(read_all(output).await, b"", "the fifo is closed");
    assert_eq!(*pod.daemon.released.lock().unwrap(), [CID]);
    assert_eq!(code(pod.delete(CID, "").await).0, Code::NOT_FOUND);
    *pod.guest.create_error.lock().unwrap() = None;
    // Stdio that cannot be.
    let (why, text) = create(&pod.create_request(CID, "binary:///bin/logger?id=1")).await;
    assert_eq!(why, Code::INVALID_ARGUMENT);
    assert!(
        text.contains("binary:// is not supported by this runtime, it takes fifos, streams and file://"),
        "{text}"
    );
    let (_, text) = create(&pod.create_request(CID, "/nowhere/out")).await;
    assert_eq!(
        text,
        "creating container c1: opening Stdout /nowhere/out: No such file or directory (os error 2)"
    );
    assert!(
        !pod.daemon.prepared.lock().unwrap().iter().skip(1).any(|p| p.container_id == CID),
        "none was prepared for"
    );
    // Ids that would be other folders.
    for id in ["", "..", "a/b", ".x"] {
        assert_eq!(create(&pod.create_request(id, "")).await.0, Code::INVALID_ARGUMENT, "{id}");
    }
    // A start that fails: containerd waits for the end of the output before it deletes.
    pod.create(CID, &out).await;
    let output = reader(&out);
    *pod.guest.start_error.lock().unwrap() = Some("permission denied".into());
    assert_eq!(code(pod.start(CID, "").await), (Code::INTERNAL, "permission denied".into()));
    assert_eq!(read_all(output).await, b"");
    assert_eq!(
        code(pod.task.create(context::Context::default(), &pod.create_request(CID, "")).await).0,
        Code::ALREADY_EXISTS
    );
    pod.delete(CID, "").await.unwrap();
    // Errors of passed-on calls keep their code and text.
    pod.create(CID, "").await;
    let update = api::UpdateTaskRequest { id: CID.into(), ..Default::default() };
    let answer = pod.task.update(context::Context::default(), &update).await;
    assert_eq!(code(answer), (Code::INVALID_ARGUMENT, "update of c1 refused".into()));
    let checkpoint = api::CheckpointTaskRequest { id: CID.into(), ..Default::default() };
    assert_eq!(
        code(pod.task.checkpoint(context::Context::default(), &checkpoint).await).0,
        Code::UNIMPLEMENTED
    );
    // One more than at the start: the connection to the guest.
    pod.fds_settle_at(before + 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_hangs_holds_nobody_up() {
    let pod = Pod::new().await;
    pod.create(CID, "").await;
    pod.start(CID, "").await.unwrap();
    let stats = pod.stats(CID).await.unwrap();
    pod.guest.hangs.store(true, Ordering::SeqCst);
    let begun = Instant::now();
    let (again, pids, state) = tokio::join!(pod.stats(CID), pod.pids(CID), pod.state(CID, ""));
    assert!(begun.elapsed() < Duration::from_millis(2100), "{:?}", begun.elapsed());
    assert_eq!(again.unwrap(), stats);
    assert_eq!(pids, [100]);
    assert_eq!(state.unwrap().status.enum_value(), Ok(Status::RUNNING));
    let request = api::KillRequest { id: CID.into(), signal: 15, ..Default::default() };
    let kill = pod.task.kill(context::with_duration(Duration::from_millis(300)), &request);
    assert!(soon("Kill", kill).await.is_err(), "the caller's deadline is kept");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_in_a_guest_that_hangs_can_be_killed() {
    let mut pod = Pod::new().await;
    pod.create(CID, "").await;
    pod.start(CID, "").await.unwrap();
    pod.guest.hangs.store(true, Ordering::SeqCst);
    pod.kill(CID).await.unwrap();
    assert_eq!(pod.wait(CID, "").await.unwrap().exit_status, 137);
    assert!(!pod.vmm.wait().unwrap().success(), "nothing less than the VM's end can end it");
    assert!(pod.log().contains("nor does it answer anything else: killing the VM"), "{}", pod.log());
    assert_eq!(code(pod.kill(CID).await).0, Code::NOT_FOUND);
    assert_eq!(pod.delete(CID, "").await.unwrap().exit_status, 137);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_ends_at_exit_though_the_guest_forgets_to_say_so() {
    let pod = Pod::new().await;
    let out = pod.fifo("out");
    let output = reader(&out);
    pod.create(CID, &out).await;
    pod.start(CID, "").await.unwrap();
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"half").await;
    pod.guest.exit(CID, "", 0);
    let begun = Instant::now();
    assert_eq!(read_all(output).await, b"half");
    assert!(begun.elapsed() > Duration::from_secs(5), "it is given time first");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminal_has_no_stderr_and_all_is_echoed() {
    let pod = Pod::new().await;
    let (stdin, stdout, stderr) = (pod.fifo("in"), pod.fifo("out"), String::from("/not/there"));
    let request = api::CreateTaskRequest {
        stdin: stdin.clone(),
        stderr: stderr.clone(),
        terminal: true,
        ..pod.create_request(CID, &stdout)
    };
    soon("Create", pod.task.create(context::Context::default(), &request)).await.unwrap();
    let created = pod.guest.created.lock().unwrap()[0].clone();
    assert!(created.terminal);
    assert_eq!([created.stdin.as_str(), &created.stdout, &created.stderr], ["vsock", "vsock", ""]);
    let state = pod.state(CID, "").await.unwrap();
    assert_eq!((state.stdin, state.stdout, state.stderr, state.terminal), (stdin, stdout, stderr, true));
    let resize = api::ResizePtyRequest { id: CID.into(), width: 80, height: 25, ..Default::default() };
    pod.task.resize_pty(context::Context::default(), &resize).await.unwrap();
    let pause = api::PauseRequest { id: CID.into(), ..Default::default() };
    pod.start(CID, "").await.unwrap();
    pod.task.pause(context::Context::default(), &pause).await.unwrap();
    assert_eq!(pod.state(CID, "").await.unwrap().status.enum_value(), Ok(Status::PAUSED));
    let resume = api::ResumeRequest { id: CID.into(), ..Default::default() };
    pod.task.resume(context::Context::default(), &resume).await.unwrap();
    assert_eq!(pod.state(CID, "").await.unwrap().status.enum_value(), Ok(Status::RUNNING));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_from_the_guest_is_survived() {
    let pod = Pod::new().await;
    let out = pod.fifo("out");
    for (said, why) in [
        ("ERR too many\n", "it answered \"ERR too many\""),
        ("\n", "it answered \"\""),
        (&"x".repeat(10_000), "a line of over 4096 bytes"),
        ("", "closed before an answer"),
    ] {
        *pod.guest.stream_error.lock().unwrap() = Some(said.into());
        let (code, text) = code(
            soon("Create", pod.task.create(context::Context::default(), &pod.create_request(CID, &out)))
                .await,
        );
        assert_eq!(code, Code::UNAVAILABLE);
        assert!(
            text.starts_with("creating container c1: opening Stdout in the guest: ") && text.contains(why),
            "{text}"
        );
    }
    *pod.guest.stream_error.lock().unwrap() = None;
    let output = reader(&out);
    pod.create(CID, &out).await;
    // Frames that are none break the connection; the next one goes on.
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"good, ").await;
    conn.write_all(&[0xff; 64]).await.unwrap();
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"and good again").await;
    send(&mut conn, b"").await;
    assert_eq!(read_all(output).await, b"good, and good again");
    assert_eq!(pod.pids(CID).await, [100, 200]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_into_files() {
    let pod = Pod::new().await;
    let path = pod.dir.path().join("new.log");
    pod.create(CID, &format!("file://{}", path.display())).await;
    pod.start(CID, "").await.unwrap();
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"to a file").await;
    send(&mut conn, b"").await;
    assert_eq!(soon("the end", conn.read(&mut [0])).await.unwrap(), 0);
    assert_eq!(fs::read(path).unwrap(), b"to a file");
    pod.create("c2", "/dev/null").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn descriptors_do_not_grow_over_a_thousand_execs() {
    let pod = Pod::new().await;
    pod.guest.auto_execs.store(true, Ordering::SeqCst);
    pod.create(CID, "").await;
    pod.start(CID, "").await.unwrap();
    let before = pod.open_fds();
    for n in 0..1000 {
        let (id, out) = (format!("e{n}"), pod.fifo(&format!("out{}", n % 8)));
        let output = reader(&out);
        pod.exec(&pod.exec_request(&id, "", &out)).await.unwrap();
        pod.start(CID, &id).await.unwrap();
        assert_eq!(pod.wait(CID, &id).await.unwrap().exit_status, 0);
        assert_eq!(read_all(output).await, id.as_bytes());
        pod.delete(CID, &id).await.unwrap();
    }
    pod.fds_settle_at(before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_cannot_begin_says_why() {
    let program = env!("CARGO_BIN_EXE_containerd-shim-kuasar-vmm-v1");
    let dir = TempDir::new().unwrap();
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(program);
        let command = command.arg("serve").args(args).stdin(Stdio::null());
        let output = command.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let pod: PathBuf = dir.path().into();
    let pod = pod.to_str().unwrap();
    let args = ["--pod-dir", pod, "--guest", "vsock://5", "--listen-fd", "3"];
    let text = run(&args);
    assert!(text.contains(&format!("reading the pod's token {pod}/token: No such file")), "{text}");
    fs::write(dir.path().join("token"), "short").unwrap();
    assert!(run(&args).contains("it is not 64 hexadecimal digits"));
    fs::write(dir.path().join("token"), fake::TOKEN).unwrap();
    let text = run(&["--pod-dir", pod, "--guest", "vsock://5", "--listen-fd", "77"]);
    assert!(
        text.contains("taking over file descriptor 77 as the listening socket: it is not open"),
        "{text}"
    );
}

/// containerd may be away, and the guest's connection may break: each event arrives once, in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_reach_containerd_whatever_was_away() {
    let pod = Pod::new().await;
    let happens = |topic: &str| pod.guest.events.send_modify(|events| events.push(topic.to_owned()));
    happens("/tasks/create");
    happens("/bad");
    sleep(Duration::from_millis(300)).await;
    let socket = pod.dir.path().join("containerd.sock.ttrpc");
    let events = Arc::new(Events::default());
    let mut containerd = events.serve(&socket).await;
    happens("/tasks/oom");
    assert_eq!(events.wait_for(2).await, ["k8s.io /tasks/create", "k8s.io /tasks/oom"]);

    pod.guest.cut();
    happens("/tasks/exit");
    pod.guest.listen(pod.dir.path()).await;
    assert_eq!(events.wait_for(3).await[2], "k8s.io /tasks/exit");

    containerd.shutdown().await.unwrap();
    fs::remove_file(&socket).unwrap();
    happens("/tasks/delete");
    sleep(Duration::from_millis(300)).await;
    let _containerd = events.serve(&socket).await;
    assert_eq!(events.wait_for(4).await[3], "k8s.io /tasks/delete");
    let log = fs::read_to_string(pod.dir.path().join("relay.log")).unwrap();
    assert!(log.contains("connecting to containerd's "), "{log}");
    assert!(log.contains("containerd refuses the event /bad: no"), "{log}");
}
