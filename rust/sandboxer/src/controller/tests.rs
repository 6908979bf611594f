//! containerd's side of the protocol, over a real socket.

use std::{
    fs, os::unix::fs::PermissionsExt, os::unix::process::CommandExt, path::PathBuf, sync::atomic::Ordering,
    time::Duration,
};

use hyper_util::rt::TokioIo;
use kuasar_common::{
    api::{host::HostMount, host::PrepareRequest, host::ReleaseRequest, host_ttrpc::HostClient},
    constants::pod_files,
};
use prost::Message;
use tokio::{net::UnixStream, time::timeout};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{
    Code,
    transport::{Channel, Endpoint, Server},
};

use super::*;
use crate::{
    clock::{Occasion, Ticker},
    protos::{
        controller::controller_client::ControllerClient,
        cri::{
            LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption,
            PodSandboxConfig,
        },
        types::Sandbox,
    },
    testing::{Fault, Lab, eventually},
};

type Client = ControllerClient<Channel>;

async fn serve(lab: &Lab) -> (Client, Arc<Pods>) {
    let pods = Arc::new(Pods::new(lab.environment()));
    pods.recover().await.unwrap();
    let socket = lab.path("controller.sock");
    let _ = fs::remove_file(&socket);
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let server = Server::builder().add_service(Controller::new(pods.clone()).into_server());
    tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
    let connect = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { std::io::Result::Ok(TokioIo::new(UnixStream::connect(socket).await?)) }
    });
    let channel = Endpoint::from_static("http://unused").connect_with_connector(connect).await.unwrap();
    (ControllerClient::new(channel), pods)
}

fn config(network: NamespaceMode) -> PodSandboxConfig {
    let options = NamespaceOption {
        network: network.into(),
        pid: NamespaceMode::Container.into(),
        ..NamespaceOption::default()
    };
    let security_context =
        Some(LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() });
    PodSandboxConfig {
        hostname: "web-0".into(),
        linux: Some(LinuxPodSandboxConfig { security_context, ..Default::default() }),
        ..Default::default()
    }
}

fn create(lab: &Lab, config: &PodSandboxConfig) -> ControllerCreateRequest {
    ControllerCreateRequest {
        sandbox_id: "p1".into(),
        netns_path: lab.netns().to_str().unwrap().into(),
        options: Some(prost_types::Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: config.encode_to_vec(),
        }),
        sandbox: Some(Sandbox {
            labels: [("name".to_owned(), "web_prod_uid_0".to_owned())].into(),
            ..Sandbox::default()
        }),
        ..ControllerCreateRequest::default()
    }
}

fn pod_config() -> PodSandboxConfig {
    config(NamespaceMode::Pod)
}

fn id() -> String {
    "p1".to_owned()
}

async fn start(client: &mut Client) -> Result<ControllerStartResponse, Status> {
    let request = ControllerStartRequest { sandbox_id: id(), ..Default::default() };
    client.start(request).await.map(Response::into_inner)
}

async fn status(client: &mut Client) -> Result<ControllerStatusResponse, Status> {
    let request = ControllerStatusRequest { sandbox_id: id(), verbose: true, ..Default::default() };
    client.status(request).await.map(Response::into_inner)
}

async fn stop(client: &mut Client) -> Result<(), Status> {
    client.stop(ControllerStopRequest { sandbox_id: id(), ..Default::default() }).await.map(drop)
}

async fn shutdown(client: &mut Client) -> Result<(), Status> {
    client.shutdown(ControllerShutdownRequest { sandbox_id: id(), ..Default::default() }).await.map(drop)
}

async fn wait(mut client: Client) -> Result<ControllerWaitResponse, Status> {
    let request = ControllerWaitRequest { sandbox_id: id(), ..Default::default() };
    client.wait(request).await.map(Response::into_inner)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_life_and_every_call_twice() {
    let lab = Lab::new(Fault::None);
    let (mut client, _pods) = serve(&lab).await;
    let request = create(&lab, &pod_config());
    client.create(request.clone()).await.unwrap();
    client.create(request.clone()).await.unwrap();
    let created = status(&mut client).await.unwrap();
    assert_eq!((created.state.as_str(), created.version), ("SANDBOX_NOTREADY", 3));

    let started = start(&mut client).await.unwrap();
    assert_eq!(started, start(&mut client).await.unwrap());
    let socket = lab.path("pods/p1/task.sock");
    assert_eq!(started.address, format!("ttrpc+unix://{}", socket.display()));
    assert_eq!((started.version, started.pid), (3, lab.vmm().pid()));
    assert_eq!(started.labels["name"], "web_prod_uid_0");
    assert_eq!(started.created_at, created.created_at);
    UnixStream::connect(&socket).await.expect("the Task endpoint takes connections");
    assert_eq!(client.create(request).await.unwrap_err().code(), Code::AlreadyExists);

    let ready = status(&mut client).await.unwrap();
    assert_eq!((ready.state.as_str(), ready.pid), ("SANDBOX_READY", started.pid));
    assert_eq!((ready.address, ready.version), (started.address.clone(), 3));
    let info: serde_json::Value = serde_json::from_str(&ready.info["info"]).unwrap();
    assert_eq!(info["pid"], started.pid);
    let setup = lab.hypervisor.setups.lock().unwrap().first().cloned().unwrap();
    assert_eq!((setup.sandbox_id.as_str(), setup.hostname.as_str()), ("p1", "web-0"));
    assert!(setup.clock_ns > 0);

    let waiting = tokio::spawn(wait(client.clone()));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished());
    stop(&mut client).await.unwrap();
    timeout(Duration::from_secs(5), waiting).await.expect("Wait ends").unwrap().unwrap();
    assert!(!lab.survivors().contains(&started.pid), "Stop is synchronous");
    stop(&mut client).await.unwrap();
    let stopped = status(&mut client).await.unwrap();
    assert_eq!(stopped.state, "SANDBOX_NOTREADY");
    assert!(stopped.exited_at.is_some() && stopped.address == started.address);
    timeout(Duration::from_secs(5), wait(client.clone())).await.expect("at once").unwrap();
    assert_eq!(start(&mut client).await.unwrap_err().code(), Code::FailedPrecondition);

    shutdown(&mut client).await.unwrap();
    shutdown(&mut client).await.unwrap();
    assert_eq!(status(&mut client).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(stop(&mut client).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(wait(client.clone()).await.unwrap_err().code(), Code::NotFound);
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_without_stop_removes_everything() {
    let lab = Lab::new(Fault::None);
    let (mut client, _pods) = serve(&lab).await;
    client.create(create(&lab, &pod_config())).await.unwrap();
    start(&mut client).await.unwrap();
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_is_cancelled_leaves_nothing() {
    let lab = Lab::new(Fault::Silent);
    let (mut client, pods) = serve(&lab).await;
    client.create(create(&lab, &pod_config())).await.unwrap();
    let mut other = client.clone();
    let starting = tokio::spawn(async move { start(&mut other).await });
    eventually("the VMM starts", || !lab.survivors().is_empty()).await;
    assert_eq!(
        timeout(Duration::from_secs(1), status(&mut client))
            .await
            .expect("Status does not wait")
            .unwrap()
            .state,
        "SANDBOX_NOTREADY"
    );
    starting.abort();
    eventually("the pod goes", || pods.is_empty()).await;
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_fails_names_the_step_and_leaves_nothing() {
    for (fault, parts) in [
        (Fault::NoVmm, vec!["starting the sandbox: starting the VM: no VMM today"]),
        (
            Fault::Dies,
            vec![
                "starting the sandbox: starting the VM: waiting for the guest's agent: the VM has ended; console",
            ],
        ),
        (
            Fault::RefusesSetup,
            vec!["setting the guest up", "setting the sysctl x: no such file", "console.log: Kernel panic"],
        ),
    ] {
        let lab = Lab::new(fault);
        let (mut client, pods) = serve(&lab).await;
        client.create(create(&lab, &pod_config())).await.unwrap();
        let error = start(&mut client).await.unwrap_err();
        assert_eq!(error.code(), Code::Internal);
        for part in parts {
            assert!(error.message().contains(part), "{error:?}");
        }
        assert!(pods.is_empty());
        lab.assert_clean();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_relay_is_named() {
    let lab = Lab::new(Fault::None);
    fs::remove_file(lab.path("relay")).unwrap();
    let (mut client, _pods) = serve(&lab).await;
    client.create(create(&lab, &pod_config())).await.unwrap();
    let error = start(&mut client).await.unwrap_err();
    assert!(error.message().contains("starting the relay: starting "), "{error:?}");
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hosts_network_is_refused_at_create() {
    let lab = Lab::new(Fault::None);
    let (mut client, _pods) = serve(&lab).await;
    let mut request = create(&lab, &config(NamespaceMode::Node));
    request.netns_path.clear();
    let error = client.create(request).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(
        error.message().contains("hostNetwork: true") && error.message().contains("set hostNetwork: false")
    );
    let mut odd = create(&lab, &pod_config());
    odd.sandbox_id = "../x".into();
    assert_eq!(client.create(odd).await.unwrap_err().code(), Code::InvalidArgument);
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_the_vm_ends_wait_and_status() {
    let lab = Lab::new(Fault::None);
    let (mut client, _pods) = serve(&lab).await;
    client.create(create(&lab, &pod_config())).await.unwrap();
    start(&mut client).await.unwrap();
    lab.vmm().signal(rustix::process::Signal::KILL).unwrap();
    let exit = timeout(Duration::from_secs(5), wait(client.clone())).await.expect("Wait ends").unwrap();
    assert_eq!(exit.exit_status, 137);
    let status = status(&mut client).await.unwrap();
    assert_eq!(status.state, "SANDBOX_NOTREADY");
    // Not just a number.
    let ours: serde_json::Value = serde_json::from_str(&status.info["kuasar"]).unwrap();
    let reason = ours["reason"].as_str().unwrap();
    assert!(reason.starts_with("the VM ended with status 137 (signal 9)"), "{reason}");
    assert!(reason.ends_with("console.log: Kernel panic"), "{reason}");
    stop(&mut client).await.unwrap();
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn why_an_agent_gave_up_is_told_and_remembered() {
    let lab = Lab::new(Fault::None);
    let (mut client, pods) = serve(&lab).await;
    client.create(create(&lab, &pod_config())).await.unwrap();
    start(&mut client).await.unwrap();
    let reason = |status: ControllerStatusResponse| {
        let ours: serde_json::Value = serde_json::from_str(&status.info["kuasar"]).unwrap();
        ours["reason"].clone()
    };
    assert_eq!(reason(status(&mut client).await.unwrap()), serde_json::Value::Null);
    lab.hypervisor.gives_up.notify_one();
    lab.vmm().signal(rustix::process::Signal::KILL).unwrap();
    timeout(Duration::from_secs(5), wait(client.clone())).await.expect("Wait ends").unwrap();
    let told = "the guest's agent gave up: no cgroup v2";
    assert_eq!(reason(status(&mut client).await.unwrap()), told);
    // It is written right after it is told.
    let record = lab.path("pods/p1/pod.json");
    eventually("it is recorded", || fs::read_to_string(&record).unwrap().contains("gave up")).await;
    pods.leave();
    drop((client, pods));
    let (mut client, _pods) = serve(&lab).await;
    assert_eq!(reason(status(&mut client).await.unwrap()), told);
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guests_clock_is_put_right_at_the_start_after_a_pause_and_by_the_next_daemon() {
    const HOUR: i64 = 3_600_000_000_000;
    let lab = Lab::new(Fault::None);
    let behind = &lab.hypervisor.behind;
    let is_right = || behind.load(Ordering::Relaxed).abs() < 1_000_000_000;
    let (mut client, pods) = serve(&lab).await;
    client.create(create(&lab, &pod_config())).await.unwrap();
    behind.store(HOUR, Ordering::Relaxed);
    start(&mut client).await.unwrap();
    eventually("it is right at the start", is_right).await;
    // Nobody looks again at once, unless the clock of this machine is set meanwhile, as a test beside this
    // one does.
    loop {
        let jumps = Ticker::new(Duration::from_secs(3600)).unwrap();
        behind.store(-HOUR, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(100)).await;
        if !is_right() {
            break;
        }
        let jump = timeout(Duration::from_secs(5), jumps.tick()).await.expect("nobody had a reason to look");
        assert_eq!(jump.unwrap(), Occasion::HostClockSet);
    }
    lab.hypervisor.resumptions.send_modify(|count| *count += 1);
    eventually("it is right after a pause", is_right).await;
    pods.leave();
    drop((client, pods));
    behind.store(HOUR, Ordering::Relaxed);
    let (mut client, _pods) = serve(&lab).await;
    eventually("it is right after a restart of the daemon", is_right).await;
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_the_relay_ends_the_pod() {
    let lab = Lab::new(Fault::None);
    let (mut client, _pods) = serve(&lab).await;
    client.create(create(&lab, &pod_config())).await.unwrap();
    start(&mut client).await.unwrap();
    let relay = lab.relays();
    assert_eq!(relay.len(), 1);
    crate::process::Process::open(relay[0]).unwrap().signal(rustix::process::Signal::KILL).unwrap();
    timeout(Duration::from_secs(5), wait(client.clone())).await.expect("Wait ends").unwrap();
    let status = status(&mut client).await.unwrap();
    assert_eq!(status.state, "SANDBOX_NOTREADY");
    assert!(
        status.info["kuasar"].contains("its relay ended with status 137 (signal 9); relay.log: relay is up")
    );
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_platform_is_containerds_name_for_it() {
    let lab = Lab::new(Fault::None);
    let (mut client, _pods) = serve(&lab).await;
    let platform = client.platform(ControllerPlatformRequest::default()).await.unwrap().into_inner();
    let platform = platform.platform.unwrap();
    assert_eq!(platform.os, "linux");
    let expected = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    assert_eq!(platform.architecture, expected, "{platform:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_relay_gets_containers_prepared_and_released() {
    let lab = Lab::new(Fault::None);
    let (mut client, _pods) = serve(&lab).await;
    client.create(create(&lab, &pod_config())).await.unwrap();
    start(&mut client).await.unwrap();
    for name in ["bundle", "image"] {
        fs::create_dir(lab.path(name)).unwrap();
    }
    fs::write(lab.path("image/file"), "").unwrap();
    fs::write(lab.path("bundle/config.json"), r#"{"ociVersion":"1.1.0","hostname":"x"}"#).unwrap();
    let socket = lab.path("pods/p1").join(pod_files::HOST_SOCKET);
    let host = ttrpc::asynchronous::Client::connect(&format!("unix://{}", socket.display())).await.unwrap();
    let host = HostClient::new(host);
    let mut prepare = PrepareRequest::new();
    prepare.container_id = "c1".into();
    prepare.bundle = lab.path("bundle").to_str().unwrap().into();
    let context = || ttrpc::context::with_duration(Duration::from_secs(10));
    let error = host.prepare(context(), &prepare).await.unwrap_err().to_string();
    assert!(error.contains("containerd sent no mounts"), "{error}");
    prepare.rootfs = vec![HostMount {
        type_: "bind".into(),
        source: lab.path("image").to_str().unwrap().into(),
        options: vec!["rbind".into(), "ro".into()],
        ..HostMount::default()
    }];
    assert_eq!(host.prepare(context(), &prepare).await.unwrap().bundle, "/run/kuasar/state/c1");
    let container: PathBuf = lab.path("pods/p1/shared/c1");
    assert!(container.join("rootfs/file").exists() && container.join("config.json").exists());
    for name in ["hosts", "hostname", "resolv.conf"] {
        let mode = fs::metadata(lab.path("pods/p1/shared/files").join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644, "{name} is for all users of a container");
    }
    assert_eq!(fs::read_to_string(lab.path("pods/p1/shared/files/hostname")).unwrap(), "web-0\n");
    let mut release = ReleaseRequest::new();
    release.container_id = "c1".into();
    host.release(context(), &release).await.unwrap();
    host.release(context(), &release).await.unwrap();
    assert!(!container.exists());
    // A container that nobody releases does not keep its mounts, or its pod's folder.
    host.prepare(context(), &prepare).await.unwrap();
    stop(&mut client).await.unwrap();
    assert!(!container.join("rootfs/file").exists());
    shutdown(&mut client).await.unwrap();
    assert!(lab.path("image/file").exists());
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_daemon_takes_the_pods_over() {
    let lab = Lab::new(Fault::None);
    let (mut client, pods) = serve(&lab).await;
    client.create(create(&lab, &pod_config())).await.unwrap();
    let started = start(&mut client).await.unwrap();
    // Two daemons in one process, which the lock forbids two processes: the first must not write any more.
    pods.leave();
    drop((client, pods));

    let (mut client, pods) = serve(&lab).await;
    assert_eq!(pods.len(), 1);
    let status = status(&mut client).await.unwrap();
    assert_eq!((status.state.as_str(), status.pid, status.version), ("SANDBOX_READY", started.pid, 3));
    assert_eq!((status.address, status.created_at), (started.address, started.created_at));
    UnixStream::connect(lab.path("pods/p1/host.sock")).await.expect("the relay finds the daemon again");
    let waiting = tokio::spawn(wait(client.clone()));
    stop(&mut client).await.unwrap();
    timeout(Duration::from_secs(5), waiting).await.expect("Wait ends").unwrap().unwrap();
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_daemon_finds_dead_pods_not_ready_and_half_started_ones_gone() {
    let lab = Lab::new(Fault::None);
    let (mut client, pods) = serve(&lab).await;
    client.create(create(&lab, &pod_config())).await.unwrap();
    start(&mut client).await.unwrap();
    // Two daemons in one process, which the lock forbids two processes: the first must not write any more.
    pods.leave();
    drop((client, pods));
    lab.vmm().end(Duration::ZERO).await.unwrap();
    // Another one, as if the daemon had died in the middle of its start; and one without and one with a
    // broken record.
    let record = fs::read_to_string(lab.path("pods/p1/pod.json")).unwrap();
    for name in ["p2", "p3", "p4"] {
        fs::create_dir(lab.path("pods").join(name)).unwrap();
    }
    let starting = record.replace("\"running\"", "\"starting\"").replace("\"p1\"", "\"p2\"");
    fs::write(lab.path("pods/p2/pod.json"), starting).unwrap();
    fs::write(lab.path("pods/p4/pod.json"), "{torn").unwrap();
    fs::write(lab.path("pods/p3/.kuasar-pod"), "").unwrap();

    let (mut client, pods) = serve(&lab).await;
    assert_eq!(pods.len(), 1);
    let dead = status(&mut client).await.unwrap();
    assert_eq!(dead.state, "SANDBOX_NOTREADY");
    assert!(dead.info["kuasar"].contains("its VM ended while no daemon watched; console.log: Kernel panic"));
    timeout(Duration::from_secs(5), wait(client.clone())).await.expect("at once").unwrap();
    assert!(!lab.path("pods/p2").exists() && !lab.path("pods/p3").exists());
    assert!(lab.path("pods/p4/pod.json.unreadable").exists());
    shutdown(&mut client).await.unwrap();
    // A second restart leaves what was put aside alone, too.
    let _ = serve(&lab).await;
    assert!(lab.path("pods/p4/pod.json.unreadable").exists());
    // Until containerd has it removed: with it goes what is known to be its by its folder and its name.
    let cgroups = ["", "vcpu", "overhead"].map(|part| lab.path("cgroup/cpu/podu/kuasar-p4").join(part));
    cgroups.iter().for_each(|cgroup| fs::create_dir_all(cgroup).unwrap());
    let mut stray = std::process::Command::new("tail")
        .arg0(lab.environment().sizes.path)
        .arg("-f")
        .arg(lab.path("pods/p4/pod.json.unreadable"))
        .spawn()
        .unwrap();
    let other = ControllerShutdownRequest { sandbox_id: "p4".into(), ..Default::default() };
    client.shutdown(other.clone()).await.unwrap();
    client.shutdown(other).await.unwrap();
    assert!(!matches!(stray.try_wait(), Ok(None)), "the stray process runs");
    assert!(!cgroups.iter().any(|cgroup| cgroup.exists()), "cgroups are left");
    lab.assert_clean();
}

mod crash;
mod full;
mod hang;
mod resources;
mod robust;
mod silence;
