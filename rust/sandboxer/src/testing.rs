//! Doubles for tests: a VMM that is a sleeping process, and a guest that is a task.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    os::{fd::BorrowedFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use kuasar_common::{
    address::GuestAddress,
    api::{
        sandbox::{SetupSandboxRequest, ShutdownRequest, SyncClockPacket},
        sandbox_ttrpc::{SandboxService, create_sandbox_service},
    },
    constants::{PORT_READY, TOKEN_METADATA, pod_files},
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use protobuf::well_known_types::empty::Empty;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{Mutex as AsyncMutex, Notify, watch},
    time::timeout,
};
use ttrpc::{
    Code,
    asynchronous::{Server, TtrpcContext, transport::Listener},
};

use crate::{
    clock::epoch_ns,
    config::HypervisorConfig,
    container::mount::unmount_below,
    pod::{Annotation, Environment},
    process::{IdRange, Ids, Process, Spawn},
    vmm::{
        DeviceAddress, DeviceInfo, Hypervisor, PreflightError, ReadyGuest, ReadyListener, Vm, VmError,
        VmExit, VmRecord, VmSpec,
    },
};

/// A fault of the double.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    #[default]
    None,
    /// The guest never calls.
    Silent,
    /// The guest refuses SetupSandbox.
    RefusesSetup,
    /// The VMM cannot be started.
    NoVmm,
    /// The VM ends before its guest calls.
    Dies,
    /// Starting the VMM takes for ever, with nothing to show for it.
    SlowVmm,
    /// The guest never answers SetupSandbox.
    HangsSetup,
    /// The guest calls late, and its SetupSandbox ends after the start's own deadline, which is 5 s then.
    ComesLate,
    /// The VM cannot be found again after a restart: the attempt hangs.
    HangsAdopt,
}

/// Starts sleeping processes.
#[derive(Debug, Default)]
pub(crate) struct FakeHypervisor {
    fault: Fault,
    /// Processes of every VM ever started.
    pub(crate) started: Mutex<Vec<Arc<Process>>>,
    /// Requests that SetupSandbox got.
    pub(crate) setups: Arc<Mutex<Vec<SetupSandboxRequest>>>,
    /// Nanoseconds by which guests' clocks are behind.
    pub(crate) behind: Arc<AtomicI64>,
    /// Number of times that VMs went on after a pause.
    pub(crate) resumptions: watch::Sender<u64>,
    /// Guests hang up on every caller.
    pub(crate) hangs_up: Arc<AtomicBool>,
    /// Makes a guest give up.
    pub(crate) gives_up: Arc<Notify>,
    /// vCPUs, MiB and kernel parameters of every VM ever started.
    pub(crate) specs: Mutex<Vec<(u32, u64, String)>>,
    /// The slow start has begun.
    pub(crate) slow: Notify,
    /// A program that does nothing, by a name that the daemon knows as a VMM's.
    vmm: PathBuf,
}

#[derive(Debug)]
struct FakeVm {
    dir: PathBuf,
    process: Arc<Process>,
    ready: AsyncMutex<Option<ReadyListener>>,
    dies: bool,
    resumptions: watch::Receiver<u64>,
}

#[async_trait]
impl Hypervisor for FakeHypervisor {
    fn name(&self) -> &'static str {
        "fake"
    }

    async fn preflight(&self) -> Result<(), PreflightError> {
        Ok(())
    }

    async fn start(&self, spec: VmSpec) -> Result<Arc<dyn Vm>, VmError> {
        self.specs.lock().unwrap().push((spec.vcpus, spec.memory_mib, spec.kernel_params.clone()));
        if self.fault == Fault::SlowVmm {
            self.slow.notify_one();
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        if self.fault == Fault::NoVmm {
            return Err(VmError::Unsupported("no VMM today".into()));
        }
        let socket = spec.dir.join(pod_files::VSOCK_SOCKET);
        let listener = ReadyListener::hybrid(&socket, None).map_err(VmError::io("listening"))?;
        let mut spawn = Spawn::new(&self.vmm);
        spawn.args(["-f".as_ref(), "/dev/null".as_ref(), spec.dir.join("vmm").as_os_str()]);
        spawn.cgroup_procs(&spec.cgroup_procs);
        let process = Arc::new(spawn.spawn()?);
        if let Ok(mut started) = self.started.lock() {
            started.push(process.clone());
        }
        fs::write(spec.dir.join(pod_files::LOG).join("console.log"), "Kernel panic\n")
            .map_err(VmError::io("logging"))?;
        let guest = FakeGuest {
            fault: self.fault,
            setups: self.setups.clone(),
            token: Arc::default(),
            behind: self.behind.clone(),
            hangs_up: self.hangs_up.clone(),
            gives_up: self.gives_up.clone(),
        };
        if self.fault != Fault::Silent {
            tokio::spawn(guest.run(socket));
        }
        let dies = self.fault == Fault::Dies;
        let ready = AsyncMutex::new(Some(listener));
        let resumptions = self.resumptions.subscribe();
        Ok(Arc::new(FakeVm { dir: spec.dir, process, ready, dies, resumptions }))
    }

    async fn adopt(&self, record: VmRecord) -> Result<Option<Arc<dyn Vm>>, VmError> {
        // A VMM that does not answer, for as long as somebody wants it so.
        while self.fault == Fault::HangsAdopt || record.dir.join("hang").exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let Some(process) = Process::adopt(record.vmm)? else { return Ok(None) };
        Ok(Some(Arc::new(FakeVm {
            dir: record.dir,
            process: Arc::new(process),
            ready: AsyncMutex::new(None),
            dies: false,
            resumptions: self.resumptions.subscribe(),
        })))
    }
}

#[async_trait]
impl Vm for FakeVm {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn pidfd(&self) -> BorrowedFd<'_> {
        self.process.pidfd()
    }

    fn address(&self) -> GuestAddress {
        GuestAddress::Hybrid(self.dir.join(pod_files::VSOCK_SOCKET))
    }

    fn record(&self) -> VmRecord {
        VmRecord {
            dir: self.dir.clone(),
            vmm: self.process.record(),
            companions: BTreeMap::new(),
            cid: None,
            buses: Vec::new(),
        }
    }

    async fn ready(&self, deadline: Duration) -> Result<ReadyGuest, VmError> {
        let listener = self.ready.lock().await.take().expect("once");
        if self.dies {
            let (step, why) = ("waiting for the guest's agent", "the VM has ended".to_owned());
            return Err(VmError::Start { step, why, log: "; console.log: Kernel panic".to_owned() });
        }
        timeout(deadline, listener.accept())
            .await
            .map_err(|_| VmError::Deadline { doing: "waiting for READY", deadline, log: String::new() })?
            .map_err(|e| VmError::Unsupported(e.to_string()))
    }

    fn resumptions(&self) -> Option<watch::Receiver<u64>> {
        Some(self.resumptions.clone())
    }

    async fn vcpu_threads(&self) -> Result<Vec<u32>, VmError> {
        Ok(vec![self.process.pid()])
    }

    async fn hot_attach(&self, _: DeviceInfo) -> Result<DeviceAddress, VmError> {
        Err(VmError::Unsupported("no hot-plug".into()))
    }

    async fn hot_detach(&self, _: &str) -> Result<(), VmError> {
        Ok(())
    }

    async fn ping(&self) -> Result<(), VmError> {
        Ok(())
    }

    async fn stop(&self, _: bool, _: Duration) -> Result<(), VmError> {
        Ok(self.process.end(Duration::ZERO).await?)
    }

    async fn wait(&self) -> VmExit {
        let code = self.process.wait().await.ok().flatten();
        VmExit { code, at: SystemTime::now() }
    }
}

#[derive(Clone)]
struct FakeGuest {
    fault: Fault,
    setups: Arc<Mutex<Vec<SetupSandboxRequest>>>,
    token: Arc<Mutex<String>>,
    behind: Arc<AtomicI64>,
    hangs_up: Arc<AtomicBool>,
    gives_up: Arc<Notify>,
}

impl FakeGuest {
    /// Says READY, takes the token, then serves the agent's port behind the hybrid socket.
    async fn run(self, socket: PathBuf) {
        let listener = UnixListener::bind(&socket).unwrap();
        let (sender, receiver) = tokio::sync::mpsc::channel::<io::Result<UnixStream>>(4);
        let connections = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let mut server = Server::new()
            .add_listener(Listener::new(connections))
            .register_service(create_sandbox_service(Arc::new(self.clone())));
        server.start().await.unwrap();
        if self.fault == Fault::ComesLate {
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
        let mut name = socket.into_os_string();
        name.push(format!("_{PORT_READY}"));
        let mut ready = BufReader::new(UnixStream::connect(name).await.unwrap());
        ready.write_all(b"{\"ready\":{\"agent\":\"fake\",\"uptime_ns\":1}}\n").await.unwrap();
        let mut line = String::new();
        ready.read_line(&mut line).await.unwrap();
        let token: serde_json::Value = serde_json::from_str(&line).unwrap();
        token["token"].as_str().unwrap().clone_into(&mut self.token.lock().unwrap());
        let gives_up = self.gives_up.clone();
        tokio::spawn(async move {
            gives_up.notified().await;
            ready.write_all(b"{\"fatal\":{\"reason\":\"no cgroup v2\"}}\n").await.unwrap();
        });
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut asked = [0; 13];
            stream.read_exact(&mut asked).await.unwrap();
            assert_eq!(&asked, b"CONNECT 1024\n");
            if self.hangs_up.load(Ordering::Relaxed) {
                continue;
            }
            stream.write_all(b"OK 1024\n").await.unwrap();
            sender.send(Ok(stream)).await.unwrap();
        }
    }

    fn check(&self, context: &TtrpcContext) -> ttrpc::Result<()> {
        let given = context.metadata.get(TOKEN_METADATA).and_then(|values| values.first());
        if given == Some(&*self.token.lock().unwrap()) && given.is_some_and(|token| token.len() == 64) {
            return Ok(());
        }
        Err(refusal(Code::PERMISSION_DENIED, "the token is wrong"))
    }
}

fn refusal(code: Code, why: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, why.to_owned()))
}

#[async_trait]
impl SandboxService for FakeGuest {
    async fn setup_sandbox(
        &self,
        context: &TtrpcContext,
        request: SetupSandboxRequest,
    ) -> ttrpc::Result<Empty> {
        self.check(context)?;
        if self.fault == Fault::RefusesSetup {
            return Err(refusal(Code::INTERNAL, "setting the sysctl x: no such file"));
        }
        self.setups.lock().unwrap().push(request);
        if self.fault == Fault::HangsSetup {
            std::future::pending::<()>().await;
        }
        if self.fault == Fault::ComesLate {
            tokio::time::sleep(Duration::from_secs(4)).await;
        }
        Ok(Empty::new())
    }

    async fn sync_clock(
        &self,
        context: &TtrpcContext,
        packet: SyncClockPacket,
    ) -> ttrpc::Result<SyncClockPacket> {
        self.check(context)?;
        self.behind.fetch_sub(packet.Delta, Ordering::Relaxed);
        let now = epoch_ns(SystemTime::now()) - self.behind.load(Ordering::Relaxed);
        Ok(SyncClockPacket { ClientArriveTime: now, ServerSendTime: now, ..packet })
    }

    async fn shutdown(&self, context: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.check(context)?;
        Ok(Empty::new())
    }
}

/// A folder, and who made it for the time of a test.
pub(crate) struct Place {
    path: PathBuf,
    _made: Option<tempfile::TempDir>,
}

impl Place {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// A place for pods: folders, a network namespace, a relay that sleeps.
pub(crate) struct Lab {
    pub(crate) dir: Place,
    pub(crate) hypervisor: Arc<FakeHypervisor>,
    /// The folder of the pods, if it is not in the lab's.
    pub(crate) pods: Option<PathBuf>,
    kept: AtomicBool,
}

impl Lab {
    pub(crate) fn new(fault: Fault) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("pods")).unwrap();
        let relay = dir.path().join("relay");
        // Known by its name and the folder, as the relay is.
        let script =
            "#!/bin/bash\necho relay is up\nexec -a relay tail -f /dev/null \"$3/relay\" 2>/dev/null\n";
        fs::write(&relay, script).unwrap();
        fs::set_permissions(&relay, fs::Permissions::from_mode(0o755)).unwrap();
        let lab = Self::in_folder(Place { path: dir.path().to_owned(), _made: Some(dir) }, fault);
        std::os::unix::fs::symlink("/usr/bin/tail", &lab.hypervisor.vmm).unwrap();
        lab.make_netns();
        lab
    }

    fn in_folder(dir: Place, fault: Fault) -> Self {
        // As the daemon begins.
        crate::daemon::keep_files_private();
        let vmm = dir.path().join(HypervisorConfig::default().path);
        let hypervisor = Arc::new(FakeHypervisor { fault, vmm, ..FakeHypervisor::default() });
        Self { dir, hypervisor, pods: None, kept: AtomicBool::new(false) }
    }

    /// The lab of another process, which keeps it: not to be dropped.
    pub(crate) fn attach(dir: &Path) -> Self {
        Self::in_folder(Place { path: dir.to_owned(), _made: None }, Fault::None)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn pods(&self) -> PathBuf {
        self.pods.clone().unwrap_or_else(|| self.path("pods"))
    }

    /// The folder of a pod.
    pub(crate) fn pod(&self, id: &str) -> PathBuf {
        self.pods().join(id)
    }

    pub(crate) fn netns(&self) -> PathBuf {
        self.path("netns")
    }

    /// An empty network namespace, as a file, as CNI does it.
    fn make_netns(&self) {
        let path = self.netns();
        fs::File::create(&path).unwrap();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let none = None::<&str>;
            mount(Some(Path::new("/proc/thread-self/ns/net")), &path, none, MsFlags::MS_BIND, none).unwrap();
        })
        .join()
        .unwrap();
    }

    pub(crate) fn environment(&self) -> Environment {
        Environment {
            dir: self.pods(),
            hypervisor: self.hypervisor.clone(),
            sizes: HypervisorConfig {
                allowed_annotations: vec![Annotation::KernelParams],
                ..HypervisorConfig::default()
            },
            relay: self.path("relay"),
            containerd: "/run/containerd/containerd.sock".into(),
            start_timeout: Duration::from_secs(if self.hypervisor.fault == Fault::ComesLate {
                5
            } else {
                20
            }),
            stop_timeout: Duration::from_secs(1),
            mount_timeout: Duration::from_secs(1),
            recover_timeout: Duration::from_secs(3),
            cgroup_root: self.path("cgroup"),
            ids: Ids::new(Some(IdRange::default())),
        }
    }

    pub(crate) fn vmm(&self) -> Arc<Process> {
        self.hypervisor.started.lock().unwrap().last().cloned().unwrap()
    }

    /// Processes that were started for this lab and run.
    pub(crate) fn survivors(&self) -> Vec<u32> {
        let vmms = self.hypervisor.started.lock().unwrap();
        let mut pids: Vec<u32> = vmms.iter().map(|vmm| vmm.pid()).filter(|pid| runs(*pid)).collect();
        pids.extend(self.relays());
        pids
    }

    /// The relays: they have the task socket's listener as descriptor 3, whatever they execute.
    pub(crate) fn relays(&self) -> Vec<u32> {
        let pods = self.pods();
        let wanted = pods.to_str().unwrap();
        fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
            .filter(|pid| {
                let log = fs::read_link(format!("/proc/{pid}/fd/1")).unwrap_or_default();
                log.ends_with("log/relay.log") && log.starts_with(wanted) && runs(*pid)
            })
            .collect()
    }

    /// Nothing is left but the empty folder of the pods.
    pub(crate) fn assert_clean(&self) {
        self.kept.store(true, Ordering::Relaxed);
        assert_eq!(self.survivors(), Vec::<u32>::new(), "processes");
        let left: Vec<_> = fs::read_dir(self.pods()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// Returns true if a process is there and not only waits to be collected.
fn runs(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
}

impl Drop for Lab {
    fn drop(&mut self) {
        for pid in self.survivors() {
            let _ = Process::open(pid).map(|process| process.signal(rustix::process::Signal::KILL));
        }
        let _ = unmount_below(self.dir.path());
    }
}

/// A file system of its own, of little room.
pub(crate) struct SmallDisk {
    dir: tempfile::TempDir,
}

impl SmallDisk {
    /// One of so many bytes; `None`, said so, where this process may not mount.
    pub(crate) fn new(size: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={size},mode=0700");
        match mount(Some("small"), dir.path(), Some("tmpfs"), MsFlags::empty(), Some(options.as_str())) {
            Ok(()) => Some(Self { dir }),
            Err(error) => {
                eprintln!("skipped: a full disk: mounting a tmpfs: {error}");
                None
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Takes what is free, to the last byte.
    pub(crate) fn fill(&self) {
        let path = self.path().join("filler");
        let mut filler = fs::File::options().append(true).create(true).open(path).unwrap();
        for chunk in [vec![b'x'; 64 << 10], vec![b'x'; 1 << 10], vec![b'x'; 1]] {
            while filler.write(&chunk).is_ok_and(|length| length > 0) {}
        }
    }

    /// Gives back what was taken.
    pub(crate) fn empty(&self) {
        let _ = fs::remove_file(self.path().join("filler"));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = unmount_below(self.path());
    }
}

/// Waits for something that has no event of its own.
pub(crate) async fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    for _ in 0..400 {
        if is() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("{what}: not within 10 s");
}
