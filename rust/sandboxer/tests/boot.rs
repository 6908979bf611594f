//! Boots guests with QEMU. Needs `KUASAR_IMAGE`, a folder with `vmlinux`, `kuasar.img` and `kuasar.initrd`;
//! without it the tests say "skipped". Programs come from `PATH`; `KUASAR_ACCEL=kvm` uses KVM instead of
//! emulation, `KUASAR_VSOCK=vhost` the kernel's vsock instead of `vhost-device-vsock`.

#![allow(clippy::disallowed_methods, reason = "tests work in folders of their own")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where it fails")]

mod common;

use std::{
    fs,
    io::{self, ErrorKind},
    net::TcpStream,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use common::TOKEN;
use kuasar_common::{
    address::GuestAddress,
    api::{
        sandbox::{CheckRequest, SetupSandboxRequest},
        sandbox_ttrpc::SandboxServiceClient,
    },
    constants::{PORT_TTRPC, TOKEN_METADATA},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};
use tokio_vsock::{VsockAddr, VsockStream};
use ttrpc::r#async::transport::Socket;
use vmm_sandboxer::{
    network,
    vmm::{DeviceInfo, Hypervisor, Machine, Root, ShareFs, Vm, VmConfig, VmSpec, qemu::Qemu},
};

/// Emulation on a busy machine is slow.
const DEADLINE: Duration = Duration::from_secs(60);

/// A pod's folder and the configuration for the image under test.
struct Lab {
    dir: tempfile::TempDir,
    config: VmConfig,
}

impl Lab {
    fn new() -> Option<Self> {
        let Some(image) = std::env::var_os("KUASAR_IMAGE").map(PathBuf::from) else {
            eprintln!("skipped: KUASAR_IMAGE is not given");
            return None;
        };
        let file = |name: &str| image.join(name);
        let config = common::config(
            Machine::Q35,
            file("vmlinux"),
            file("kuasar.img"),
            file("kuasar.initrd"),
            Root::Pmem,
        );
        let (dir, config) = (common::pod_folder(), VmConfig { task_log_level: "debug".into(), ..config });
        Some(Self { dir, config })
    }

    fn spec(&self) -> VmSpec {
        common::spec(self.dir.path())
    }

    /// Starts a VM and takes its agent's call.
    async fn boot(&self, spec: VmSpec) -> (Arc<dyn Vm>, vmm_sandboxer::vmm::ReadyGuest) {
        let qemu = Qemu::new(self.config.clone());
        qemu.preflight().await.unwrap();
        let start = Instant::now();
        let vm = qemu.start(spec).await.unwrap();
        let spawned = start.elapsed();
        let mut guest = match vm.ready(DEADLINE).await {
            Ok(guest) => guest,
            Err(error) => {
                vm.stop(true, DEADLINE).await.unwrap();
                panic!("{error}");
            }
        };
        eprintln!("spawned in {spawned:?}, ready in {:?}: {:?}", start.elapsed(), guest.ready);
        guest.give_token(TOKEN).await.unwrap();
        (vm, guest)
    }
}

/// The agent's services.
async fn agent(vm: &Arc<dyn Vm>) -> SandboxServiceClient {
    let socket = match vm.address() {
        GuestAddress::Hybrid(path) => {
            let mut stream = BufReader::new(UnixStream::connect(path).await.unwrap());
            stream.write_all(format!("CONNECT {PORT_TTRPC}\n").as_bytes()).await.unwrap();
            let mut line = String::new();
            tokio::time::timeout(DEADLINE, stream.read_line(&mut line)).await.unwrap().unwrap();
            assert!(line.starts_with("OK"), "{line:?}");
            Socket::new(stream.into_inner())
        }
        GuestAddress::Vsock(cid) => {
            Socket::new(VsockStream::connect(VsockAddr::new(cid, PORT_TTRPC)).await.unwrap())
        }
    };
    SandboxServiceClient::new(ttrpc::r#async::Client::new(socket))
}

fn context() -> ttrpc::context::Context {
    let mut context = ttrpc::context::with_duration(DEADLINE);
    context.add(TOKEN_METADATA.into(), TOKEN.into());
    context
}

fn nothing_left(record: &vmm_sandboxer::vmm::VmRecord) {
    let all = std::iter::once(&record.vmm).chain(record.companions.values());
    for process in all {
        assert!(vmm_sandboxer::process::Process::adopt(*process).unwrap().is_none(), "{process:?} is left");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pmem_and_virtiofs() {
    let Some(lab) = Lab::new() else { return };
    fs::write(lab.dir.path().join("shared/hello"), "x").unwrap();
    let (vm, _guest) = lab.boot(lab.spec()).await;
    vm.ping().await.unwrap();
    let agent = agent(&vm).await;
    let check = CheckRequest { service: String::new(), ..CheckRequest::default() };
    agent.check(context(), &check).await.unwrap();
    let setup = SetupSandboxRequest { sandbox_id: "boot".into(), ..SetupSandboxRequest::default() };
    agent.setup_sandbox(context(), &setup).await.unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    assert!(status.contains("Seccomp:\t2"), "QEMU is in its sandbox");
    let record = vm.record();
    assert!(record.companions.contains_key("virtiofsd"));
    assert_eq!(record.companions.contains_key("vhost-device-vsock"), record.cid.is_none());
    vm.stop(false, Duration::from_secs(10)).await.unwrap();
    nothing_left(&record);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_roots_shares_and_machines() {
    for (machine, root, share_fs, vcpus) in [
        (Machine::Q35, Root::Blk, ShareFs::NineP, 2),
        (Machine::Pc, Root::Initrd, ShareFs::Virtiofs, 1),
        (Machine::Microvm, Root::Blk, ShareFs::Virtiofs, 1),
    ] {
        let Some(mut lab) = Lab::new() else { return };
        lab.config = VmConfig { machine, root, share_fs, ..lab.config };
        let (vm, _guest) = lab.boot(VmSpec { vcpus, ..lab.spec() }).await;
        let setup = SetupSandboxRequest { sandbox_id: "boot".into(), ..SetupSandboxRequest::default() };
        agent(&vm).await.setup_sandbox(context(), &setup).await.unwrap();
        let record = vm.record();
        vm.stop(true, Duration::from_secs(10)).await.unwrap();
        nothing_left(&record);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_comes_back_finds_its_vm() {
    let Some(lab) = Lab::new() else { return };
    let (vm, guest) = lab.boot(lab.spec()).await;
    let record = vm.record();
    drop((vm, guest));
    let qemu = Qemu::new(lab.config.clone());
    let vm = qemu.adopt(record.clone()).await.unwrap().unwrap();
    vm.ping().await.unwrap();
    let check = CheckRequest { service: String::new(), ..CheckRequest::default() };
    agent(&vm).await.check(context(), &check).await.unwrap();
    vm.stop(false, Duration::from_secs(10)).await.unwrap();
    nothing_left(&record);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_cannot_boot_is_explained() {
    let Some(mut lab) = Lab::new() else { return };
    lab.config.kernel_params = "init=/nonexistent".into();
    let vm = Qemu::new(lab.config.clone()).start(lab.spec()).await.unwrap();
    let error = vm.ready(DEADLINE).await.unwrap_err().to_string();
    eprintln!("{error}");
    assert!(error.contains("the VM has ended with status 0"), "{error}");
    assert!(error.contains("console.log: ") && error.contains("panic"), "{error}");
    nothing_left(&vm.record());
}

/// `ip` with words from a text.
fn ip(args: &str) {
    let output = Command::new("ip").args(args.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A namespace with a veth pair to another one, both removed when dropped.
struct Netns(String);

impl Netns {
    fn new() -> Self {
        let name = format!("kboot{}", std::process::id());
        ip(&format!("netns add {name}"));
        ip(&format!("netns add {name}h"));
        ip(&format!("-n {name} link add eth0 type veth peer name peer netns {name}h"));
        ip(&format!("-n {name} addr add 10.78.0.5/24 dev eth0"));
        ip(&format!("-n {name} link set eth0 up"));
        ip(&format!("-n {name} route add default via 10.78.0.1"));
        ip(&format!("-n {name}h addr add 10.78.0.1/24 dev peer"));
        ip(&format!("-n {name}h link set peer up"));
        Self(name)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        for name in [self.0.clone(), format!("{}h", self.0)] {
            drop(Command::new("ip").args(["netns", "del", &name]).status());
        }
    }
}

/// Asks for a port at which nobody listens: only the guest's own refusal proves that frames go there and
/// back.
fn knock(netns: &Path) -> io::Error {
    let netns = netns.to_owned();
    let knocking = std::thread::spawn(move || {
        let netns = fs::File::open(netns).unwrap();
        let kind = Some(rustix::thread::LinkNameSpaceType::Network);
        rustix::thread::move_into_link_name_space(netns.as_fd(), kind).unwrap();
        TcpStream::connect_timeout(&"10.78.0.5:9".parse().unwrap(), Duration::from_secs(20)).unwrap_err()
    });
    knocking.join().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pods_address_answers() {
    let Some(lab) = Lab::new() else { return };
    let netns = Netns::new();
    let path = PathBuf::from("/run/netns").join(&netns.0);
    let network = network::Plan::read(&path).await.unwrap().make(2).await.unwrap();
    let devices = network.nics.into_iter().map(DeviceInfo::Tap).collect();
    let spec = VmSpec { netns: Some(path), devices, vcpus: 2, ..lab.spec() };
    let (vm, _guest) = lab.boot(spec).await;
    let setup = SetupSandboxRequest {
        sandbox_id: "boot".into(),
        interfaces: network.interfaces,
        routes: network.routes,
        neighbours: network.neighbours,
        ..SetupSandboxRequest::default()
    };
    agent(&vm).await.setup_sandbox(context(), &setup).await.unwrap();
    let host = PathBuf::from("/run/netns").join(format!("{}h", netns.0));
    let answer = tokio::task::spawn_blocking(move || knock(&host)).await.unwrap();
    vm.stop(false, Duration::from_secs(10)).await.unwrap();
    network::remove(&network.record).await.unwrap();
    assert_eq!(answer.kind(), ErrorKind::ConnectionRefused, "{answer}");
    let links = Command::new("ip").args(["-n", &netns.0, "-o", "link"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&links.stdout).contains("kua"), "the tap is gone");
}
