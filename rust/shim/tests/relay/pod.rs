//! A pod with everything around it that a relay talks to.

use std::{
    fs::{self, File},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::Child,
    sync::Arc,
    time::Duration,
};

use containerd_shim_protos::{api, shim_async::TaskClient};
use protobuf::{MessageField, well_known_types::any::Any};
use tempfile::TempDir;
use tokio::{io::AsyncReadExt, net::unix::pipe, time::sleep};
use ttrpc::{
    Code,
    asynchronous::{Client, Server, transport::Socket},
    context,
};

use crate::fake::{self, Daemon, Guest, soon};

pub(crate) const CID: &str = "c1";

/// A pod with everything around it.
pub(crate) struct Pod {
    pub(crate) dir: TempDir,
    pub(crate) guest: Arc<Guest>,
    pub(crate) daemon: Arc<Daemon>,
    pub(crate) daemon_server: Option<Server>,
    pub(crate) relay: Child,
    pub(crate) vmm: Child,
    _pidfd: OwnedFd,
    pub(crate) task: TaskClient,
}

impl Pod {
    pub(crate) async fn new() -> Self {
        Self::with(true, true).await
    }

    /// One in which a container without streams runs.
    pub(crate) async fn running() -> Self {
        let pod = Self::new().await;
        pod.run("").await;
        pod
    }

    pub(crate) async fn with(watched: bool, daemon_up: bool) -> Self {
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

    pub(crate) fn fifo(&self, name: &str) -> String {
        let path = self.dir.path().join(name);
        if !path.exists() {
            rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o700.into(), 0).unwrap();
        }
        path.to_str().unwrap().to_owned()
    }

    pub(crate) fn create_request(&self, id: &str, stdout: &str) -> api::CreateTaskRequest {
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

    pub(crate) async fn create(&self, id: &str, stdout: &str) -> u32 {
        let request = self.create_request(id, stdout);
        soon("Create", self.task.create(context::Context::default(), &request)).await.unwrap().pid
    }

    pub(crate) async fn start(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = api::StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        soon("Start", self.task.start(context::Context::default(), &request)).await.map(|r| r.pid)
    }

    /// Creates and starts its container.
    pub(crate) async fn run(&self, stdout: &str) {
        self.create(CID, stdout).await;
        self.start(CID, "").await.unwrap();
    }

    pub(crate) async fn state(&self, id: &str, exec_id: &str) -> ttrpc::Result<api::StateResponse> {
        state(&self.task, id, exec_id).await
    }

    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<api::WaitResponse> {
        let request = api::WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        soon("Wait", self.task.wait(context::Context::default(), &request)).await
    }

    pub(crate) async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<api::DeleteResponse> {
        let request = api::DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        soon("Delete", self.task.delete(context::Context::default(), &request)).await
    }

    pub(crate) async fn kill(&self, id: &str) -> ttrpc::Result<api::Empty> {
        let request = api::KillRequest { id: id.into(), signal: 9, all: true, ..Default::default() };
        soon("Kill", self.task.kill(context::Context::default(), &request)).await
    }

    pub(crate) async fn pids(&self, id: &str) -> Vec<u32> {
        let request = api::PidsRequest { id: id.into(), ..Default::default() };
        let response = soon("Pids", self.task.pids(context::Context::default(), &request)).await.unwrap();
        response.processes.iter().map(|process| process.pid).collect()
    }

    pub(crate) async fn stats(&self, id: &str) -> ttrpc::Result<api::StatsResponse> {
        let request = api::StatsRequest { id: id.into(), ..Default::default() };
        soon("Stats", self.task.stats(context::Context::default(), &request)).await
    }

    pub(crate) fn exec_request(&self, exec_id: &str, stdin: &str, stdout: &str) -> api::ExecProcessRequest {
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

    pub(crate) async fn exec(&self, request: &api::ExecProcessRequest) -> ttrpc::Result<api::Empty> {
        soon("Exec", self.task.exec(context::Context::default(), request)).await
    }

    pub(crate) fn open_fds(&self) -> usize {
        self.fds().len()
    }

    pub(crate) fn fds(&self) -> Vec<String> {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.relay.id())).unwrap();
        fds.filter_map(|fd| Some(fs::read_link(fd.unwrap().path()).ok()?.display().to_string())).collect()
    }

    pub(crate) async fn fds_settle_at(&self, count: usize) {
        for _ in 0..400 {
            if self.open_fds() <= count {
                return;
            }
            sleep(Duration::from_millis(25)).await;
        }
        panic!("{count} descriptors were expected: {:#?}", self.fds());
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("relay.log")).unwrap()
    }

    pub(crate) fn end_vm(&mut self) {
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

pub(crate) async fn connect(dir: &Path) -> TaskClient {
    TaskClient::new(Client::connect(&format!("unix://{}/task.sock", dir.display())).await.unwrap())
}

/// A connection that can end at once, as that of a process that is killed.
pub(crate) fn connect_mortal(dir: &Path) -> (TaskClient, UnixStream) {
    let socket = UnixStream::connect(dir.join("task.sock")).unwrap();
    socket.set_nonblocking(true).unwrap();
    let end = socket.try_clone().unwrap();
    let socket = tokio::net::UnixStream::from_std(socket).unwrap();
    (TaskClient::new(Client::new(Socket::from(socket))), end)
}

pub(crate) async fn state(task: &TaskClient, id: &str, exec_id: &str) -> ttrpc::Result<api::StateResponse> {
    let request = api::StateRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
    soon("State", task.state(context::Context::default(), &request)).await
}

pub(crate) fn reader(path: &str) -> pipe::Receiver {
    pipe::OpenOptions::new().open_receiver(path).unwrap()
}

pub(crate) async fn read_all(mut from: pipe::Receiver) -> Vec<u8> {
    let mut bytes = Vec::new();
    soon("the end of a fifo", from.read_to_end(&mut bytes)).await.unwrap();
    bytes
}

#[track_caller]
pub(crate) fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        other => panic!("an error of the relay's was expected: {other:?}"),
    }
}
