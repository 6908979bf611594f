//! A guest and a daemon that are not: enough of both for a relay to serve a pod.

#![allow(dead_code, missing_docs, unreachable_pub, reason = "shared by programs that each use a part of it")]

pub mod events;
pub mod hostile;
pub mod stream;

use std::{
    collections::HashMap,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{net::UnixListener as StdListener, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use containerd_shim_protos::{api, cgroups_v2::metrics::Metrics, shim_async};
use kuasar_common::{
    api::{host, host_ttrpc, sandbox, sandbox_ttrpc},
    constants::GUEST_PID_BASE,
    forward,
    stdio::{Hello, Stream, header, payload_len},
};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::watch,
    time::{sleep, timeout},
};
use ttrpc::{
    Code,
    asynchronous::{Server, TtrpcContext},
    error::get_rpc_status,
};

pub const TOKEN: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
/// Offset of the ids that the relay tells containerd for the guest's processes 0, 100, 200 and so on.
pub const PID: u32 = GUEST_PID_BASE;
const PATIENCE: Duration = Duration::from_secs(30);

pub type Key = (String, String);

/// State of a fake guest, and a record of its calls.
#[derive(Default)]
pub struct Guest {
    pub processes: Mutex<HashMap<Key, watch::Sender<Option<u32>>>>,
    pub streams: Mutex<HashMap<(String, String, Stream), UnixStream>>,
    pub created: Mutex<Vec<api::CreateTaskRequest>>,
    pub execs: Mutex<Vec<api::ExecProcessRequest>>,
    pub kills: Mutex<Vec<api::KillRequest>>,
    pub deleted: Mutex<Vec<Key>>,
    /// Execs write their id to stdout and exit 0 by themselves.
    pub auto_execs: AtomicBool,
    pub create_delay_ms: AtomicU32,
    pub create_error: Mutex<Option<String>>,
    pub start_error: Mutex<Option<String>>,
    /// Connections that wait for one to a socket, and their first lines.
    pub waiting: Mutex<Vec<(forward::Hello, UnixStream)>>,
    /// Answer to stream connections instead of `OK`.
    pub stream_error: Mutex<Option<String>>,
    /// Stats, Pids, Kill and Check do not answer for as long as this is so.
    pub hangs: watch::Sender<bool>,
    /// Events of the guest; the number of each is its place, counted from 1, unless it brings one.
    pub events: watch::Sender<Vec<sandbox::Envelope>>,
    /// Answers instead of the truth.
    pub lies: Mutex<hostile::Lies>,
    /// Bytes that the guest sends first to each client of its port for calls.
    pub garbage: Mutex<Vec<u8>>,
    /// Ends with a change, and all connections with it.
    cut: watch::Sender<u32>,
    next_pid: AtomicU32,
}

impl Guest {
    /// Listens as a hybrid socket does.
    pub async fn serve(dir: &Path) -> Arc<Self> {
        let guest = Arc::new(Self::default());
        guest.listen(dir).await;
        guest
    }

    pub async fn listen(self: &Arc<Self>, dir: &Path) {
        let inner = dir.join("inner.sock");
        if !inner.exists() {
            let service = shim_async::create_task(Arc::new(TaskService(Arc::clone(self))));
            let mut server = Server::new().bind(&format!("unix://{}", inner.display())).unwrap();
            server = server.register_service(hostile::lying(self, service));
            let sandbox = sandbox_ttrpc::create_sandbox_service(Arc::new(SandboxService(Arc::clone(self))));
            server = server.register_service(hostile::lying(self, sandbox));
            server.start().await.unwrap();
            std::mem::forget(server);
        }
        let path = dir.join("vsock.sock");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(path).unwrap();
        let guest = Arc::clone(self);
        let mut cut = self.cut.subscribe();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    conn = listener.accept() => {
                        tokio::spawn(Arc::clone(&guest).connected(conn.unwrap().0, inner.clone()));
                    }
                    _ = cut.changed() => return,
                }
            }
        });
    }

    /// Breaks all connections and stops listening.
    pub fn cut(&self) {
        self.cut.send_modify(|n| *n += 1);
        self.streams.lock().unwrap().clear();
    }

    async fn connected(self: Arc<Self>, mut conn: UnixStream, inner: PathBuf) {
        let line = read_line(&mut conn).await;
        match line.as_str() {
            "CONNECT 1024" => {
                conn.write_all(b"OK 1073741824\n").await.unwrap();
                let garbage = self.garbage.lock().unwrap().clone();
                // It may be told off before it has said all.
                let _ = conn.write_all(&garbage).await;
                let mut server = UnixStream::connect(inner).await.unwrap();
                let mut cut = self.cut.subscribe();
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut conn, &mut server) => {}
                    _ = cut.changed() => {}
                }
            }
            "CONNECT 1026" => {
                conn.write_all(b"OK 1073741825\n").await.unwrap();
                let hello: Hello = serde_json::from_str(&read_line(&mut conn).await).unwrap();
                if hello.token != TOKEN {
                    conn.write_all(b"ERR wrong token\n").await.unwrap();
                    return;
                }
                let error = self.stream_error.lock().unwrap().clone();
                if let Some(error) = error {
                    conn.write_all(error.as_bytes()).await.unwrap();
                    return;
                }
                conn.write_all(b"OK\n").await.unwrap();
                self.streams.lock().unwrap().insert((hello.container, hello.exec, hello.stream), conn);
            }
            "CONNECT 1027" => {
                conn.write_all(b"OK 1073741826\n").await.unwrap();
                let hello = serde_json::from_str(&read_line(&mut conn).await).unwrap();
                self.waiting.lock().unwrap().push((hello, conn));
            }
            other => panic!("the fake guest was told {other:?}"),
        }
    }

    /// Takes a connection that waits for one to a socket.
    pub async fn waiting(&self) -> (forward::Hello, UnixStream) {
        for _ in 0..PATIENCE.as_millis() / 5 {
            if let Some(found) = self.waiting.lock().unwrap().pop() {
                return found;
            }
            sleep(Duration::from_millis(5)).await;
        }
        panic!("nobody waits for a connection to a socket");
    }

    /// Takes a stream's connection.
    pub async fn stream(&self, container: &str, exec: &str, stream: Stream) -> UnixStream {
        let key = (container.to_owned(), exec.to_owned(), stream);
        for _ in 0..PATIENCE.as_millis() / 5 {
            if let Some(conn) = self.streams.lock().unwrap().remove(&key) {
                return conn;
            }
            sleep(Duration::from_millis(5)).await;
        }
        panic!("no connection for {key:?}");
    }

    /// Something happens in it.
    pub fn happens(&self, event: sandbox::Envelope) {
        self.events.send_modify(|events| events.push(event));
    }

    /// Answers a method so from now on.
    pub fn lie(&self, method: &'static str, lie: hostile::Lie) {
        self.lies.lock().unwrap().insert(method, lie);
    }

    pub fn exit(&self, container: &str, exec: &str, status: u32) {
        let processes = self.processes.lock().unwrap();
        processes[&(container.to_owned(), exec.to_owned())].send_replace(Some(status));
    }

    fn add(&self, container: &str, exec: &str) {
        let key = (container.to_owned(), exec.to_owned());
        self.processes.lock().unwrap().insert(key, watch::Sender::new(None));
    }

    fn known(&self, container: &str, exec: &str) -> ttrpc::Result<watch::Sender<Option<u32>>> {
        let processes = self.processes.lock().unwrap();
        let found = processes.get(&(container.to_owned(), exec.to_owned()));
        found
            .cloned()
            .ok_or_else(|| get_rpc_status(Code::NOT_FOUND, format!("no {container} {exec} in the guest")))
    }
}

async fn read_line(conn: &mut UnixStream) -> String {
    let mut line = Vec::new();
    loop {
        match conn.read_u8().await.unwrap() {
            b'\n' => return String::from_utf8(line).unwrap(),
            byte => line.push(byte),
        }
    }
}

/// Sends one frame; an empty one is the end.
pub async fn send(conn: &mut UnixStream, bytes: &[u8]) {
    conn.write_all(&header(bytes.len())).await.unwrap();
    conn.write_all(bytes).await.unwrap();
}

/// Receives one frame.
pub async fn receive(conn: &mut UnixStream) -> Vec<u8> {
    let mut head = [0; 4];
    soon("a frame", conn.read_exact(&mut head)).await.unwrap();
    let mut bytes = vec![0; payload_len(head).unwrap()];
    soon("a frame's bytes", conn.read_exact(&mut bytes)).await.unwrap();
    bytes
}

/// Fails the test when something does not come.
pub async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("waited too long for {what}"))
}

struct TaskService(Arc<Guest>);

impl TaskService {
    fn allowed(&self, ctx: &TtrpcContext) -> ttrpc::Result<()> {
        if ctx.metadata.get("kuasar-token") == Some(&vec![TOKEN.to_owned()]) {
            return Ok(());
        }
        Err(get_rpc_status(Code::PERMISSION_DENIED, format!("wrong token in {:?}", ctx.metadata)))
    }

    async fn maybe_hang(&self) {
        self.0.hangs.subscribe().wait_for(|hangs| !hangs).await.unwrap();
    }
}

#[async_trait]
impl shim_async::Task for TaskService {
    async fn create(
        &self,
        ctx: &TtrpcContext,
        req: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        self.allowed(ctx)?;
        sleep(Duration::from_millis(self.0.create_delay_ms.load(Ordering::SeqCst).into())).await;
        if let Some(error) = self.0.create_error.lock().unwrap().clone() {
            return Err(get_rpc_status(Code::INTERNAL, error));
        }
        self.0.add(&req.id, "");
        self.0.created.lock().unwrap().push(req);
        let pid = 100 + self.0.next_pid.fetch_add(1, Ordering::SeqCst);
        Ok(api::CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, ctx: &TtrpcContext, req: api::StartRequest) -> ttrpc::Result<api::StartResponse> {
        self.allowed(ctx)?;
        self.0.known(&req.id, &req.exec_id)?;
        if let Some(error) = self.0.start_error.lock().unwrap().clone() {
            return Err(get_rpc_status(Code::INTERNAL, error));
        }
        if !req.exec_id.is_empty() && self.0.auto_execs.load(Ordering::SeqCst) {
            let (guest, id, exec) = (Arc::clone(&self.0), req.id.clone(), req.exec_id.clone());
            tokio::spawn(async move {
                let mut conn = guest.stream(&id, &exec, Stream::Stdout).await;
                send(&mut conn, exec.as_bytes()).await;
                send(&mut conn, b"").await;
                guest.exit(&id, &exec, 0);
                assert_eq!(conn.read(&mut [0]).await.unwrap(), 0, "the receiver closes");
            });
        }
        let pid = if req.exec_id.is_empty() { 100 } else { 1000 };
        Ok(api::StartResponse { pid, ..Default::default() })
    }

    async fn exec(&self, ctx: &TtrpcContext, req: api::ExecProcessRequest) -> ttrpc::Result<api::Empty> {
        self.allowed(ctx)?;
        self.0.known(&req.id, "")?;
        self.0.add(&req.id, &req.exec_id);
        self.0.execs.lock().unwrap().push(req);
        Ok(api::Empty::new())
    }

    async fn wait(&self, ctx: &TtrpcContext, req: api::WaitRequest) -> ttrpc::Result<api::WaitResponse> {
        self.allowed(ctx)?;
        let exit = self.0.known(&req.id, &req.exec_id)?;
        let mut exit = exit.subscribe();
        let exit_status = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        Ok(api::WaitResponse { exit_status, ..Default::default() })
    }

    async fn delete(
        &self,
        ctx: &TtrpcContext,
        req: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        self.allowed(ctx)?;
        let exit = self.0.known(&req.id, &req.exec_id)?;
        let exit_status = exit.borrow().unwrap_or(0);
        self.0.processes.lock().unwrap().remove(&(req.id.clone(), req.exec_id.clone()));
        self.0.deleted.lock().unwrap().push((req.id, req.exec_id));
        Ok(api::DeleteResponse { exit_status, ..Default::default() })
    }

    async fn kill(&self, ctx: &TtrpcContext, req: api::KillRequest) -> ttrpc::Result<api::Empty> {
        self.allowed(ctx)?;
        self.maybe_hang().await;
        self.0.kills.lock().unwrap().push(req);
        Ok(api::Empty::new())
    }

    async fn pids(&self, ctx: &TtrpcContext, req: api::PidsRequest) -> ttrpc::Result<api::PidsResponse> {
        self.allowed(ctx)?;
        self.maybe_hang().await;
        self.0.known(&req.id, "")?;
        let process = |pid| api::ProcessInfo { pid, ..Default::default() };
        Ok(api::PidsResponse { processes: vec![process(100), process(200)], ..Default::default() })
    }

    async fn stats(&self, ctx: &TtrpcContext, _: api::StatsRequest) -> ttrpc::Result<api::StatsResponse> {
        self.allowed(ctx)?;
        self.maybe_hang().await;
        let any = Any {
            type_url: "io.containerd.cgroups.v2.Metrics".into(),
            value: figures().write_to_bytes().unwrap(),
            ..Default::default()
        };
        Ok(api::StatsResponse { stats: MessageField::some(any), ..Default::default() })
    }

    async fn pause(&self, ctx: &TtrpcContext, _: api::PauseRequest) -> ttrpc::Result<api::Empty> {
        self.allowed(ctx).map(|()| api::Empty::new())
    }

    async fn resume(&self, ctx: &TtrpcContext, _: api::ResumeRequest) -> ttrpc::Result<api::Empty> {
        self.allowed(ctx).map(|()| api::Empty::new())
    }

    async fn update(&self, ctx: &TtrpcContext, req: api::UpdateTaskRequest) -> ttrpc::Result<api::Empty> {
        self.allowed(ctx)?;
        Err(get_rpc_status(Code::INVALID_ARGUMENT, format!("update of {} refused", req.id)))
    }

    async fn resize_pty(&self, ctx: &TtrpcContext, req: api::ResizePtyRequest) -> ttrpc::Result<api::Empty> {
        self.allowed(ctx)?;
        self.0.known(&req.id, &req.exec_id).map(|_| api::Empty::new())
    }
}

/// The figures of every container.
pub fn figures() -> Metrics {
    let mut metrics = Metrics::new();
    metrics.pids.mut_or_insert_default().current = 3;
    metrics.memory.mut_or_insert_default().usage = 4096;
    metrics
}

struct SandboxService(Arc<Guest>);

#[async_trait]
impl sandbox_ttrpc::SandboxService for SandboxService {
    async fn check(
        &self,
        _: &TtrpcContext,
        _: sandbox::CheckRequest,
    ) -> ttrpc::Result<protobuf::well_known_types::empty::Empty> {
        TaskService(Arc::clone(&self.0)).maybe_hang().await;
        Ok(Default::default())
    }

    async fn get_events(
        &self,
        ctx: &TtrpcContext,
        req: sandbox::GetEventsRequest,
    ) -> ttrpc::Result<sandbox::Envelope> {
        TaskService(Arc::clone(&self.0)).allowed(ctx)?;
        let after = usize::try_from(req.after.unwrap()).unwrap();
        let mut events = self.0.events.subscribe();
        let mut event = events.wait_for(|events| events.len() > after).await.unwrap()[after].clone();
        if event.sequence == 0 {
            event.sequence = after as u64 + 1;
        }
        Ok(event)
    }
}

/// Requests to a fake daemon, and its answers.
#[derive(Default)]
pub struct Daemon {
    pub prepared: Mutex<Vec<host::PrepareRequest>>,
    pub released: Mutex<Vec<String>>,
    pub updated: Mutex<Vec<host::UpdateRequest>>,
    pub prepare_error: Mutex<Option<String>>,
    /// Sockets of whatever is prepared.
    pub sockets: Mutex<Vec<host::HostSocket>>,
}

impl Daemon {
    /// Listens on the pod's host.sock. Dropping the server ends it.
    pub async fn serve(self: &Arc<Self>, dir: &Path) -> Server {
        let path = dir.join("host.sock");
        let _ = std::fs::remove_file(&path);
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(host_ttrpc::create_host(Arc::new(HostService(Arc::clone(self)))));
        server.start().await.unwrap();
        server
    }
}

struct HostService(Arc<Daemon>);

#[async_trait]
impl host_ttrpc::Host for HostService {
    async fn prepare(
        &self,
        _: &TtrpcContext,
        req: host::PrepareRequest,
    ) -> ttrpc::Result<host::PrepareResponse> {
        if let Some(error) = self.0.prepare_error.lock().unwrap().clone() {
            return Err(get_rpc_status(Code::FAILED_PRECONDITION, error));
        }
        let bundle = format!("/run/kuasar/state/{}", req.container_id);
        self.0.prepared.lock().unwrap().push(req);
        let sockets = self.0.sockets.lock().unwrap().clone();
        Ok(host::PrepareResponse { bundle, sockets, ..Default::default() })
    }

    async fn release(
        &self,
        _: &TtrpcContext,
        req: host::ReleaseRequest,
    ) -> ttrpc::Result<protobuf::well_known_types::empty::Empty> {
        self.0.released.lock().unwrap().push(req.container_id);
        Ok(Default::default())
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        req: host::UpdateRequest,
    ) -> ttrpc::Result<protobuf::well_known_types::empty::Empty> {
        self.0.updated.lock().unwrap().push(req);
        Ok(Default::default())
    }
}

/// A process that stands for the VM.
pub fn vmm() -> (Child, OwnedFd) {
    let child = Command::new("sleep").arg("100000").stdin(Stdio::null()).spawn().unwrap();
    let pid = rustix::process::Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    (child, pidfd)
}

/// Starts a relay as the daemon does.
pub fn spawn_relay(program: &Path, dir: &Path, pidfd: Option<&OwnedFd>, log: Stdio) -> Child {
    std::fs::write(dir.join("token"), format!("{TOKEN}\n")).unwrap();
    let listener = StdListener::bind(dir.join("task.sock")).unwrap();
    let mut command = Command::new(program);
    command.arg("serve").arg("--pod-dir").arg(dir);
    command.arg("--address").arg(dir.join("containerd.sock"));
    command.arg("--guest").arg(format!("hvsock://{}/vsock.sock", dir.display())).args(["--listen-fd", "3"]);
    if pidfd.is_some() {
        command.args(["--vmm-pidfd", "4"]);
    }
    // Above the numbers that they get in the child, so that neither overwrites the other.
    let high = |fd: i32| {
        // SAFETY: duplicates a descriptor that is open; the result is a new one.
        unsafe { OwnedFd::from_raw_fd(libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 100)) }
    };
    let handed: Vec<OwnedFd> =
        [Some(listener.as_raw_fd()), pidfd.map(AsRawFd::as_raw_fd)].into_iter().flatten().map(high).collect();
    let numbers: Vec<i32> = handed.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: only dup2 is called between fork and exec.
    unsafe {
        command.pre_exec(move || {
            for (number, target) in numbers.iter().zip(3..) {
                if libc::dup2(*number, target) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

/// Lines of a child's output, as they come.
pub async fn first_line(child: &mut tokio::process::Child) -> String {
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).await.unwrap();
    line
}
