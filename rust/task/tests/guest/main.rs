//! The agent in a real guest, driven over vsock as the host does it.
//!
//! Run with `cargo test -p vmm-task --test guest -- --ignored --nocapture` and `KUASAR_IMAGE` set to a built
//! image's folder, or `KUASAR_KERNEL`, `KUASAR_AGENT` and `KUASAR_RUNC` to files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod changes;
mod console;
mod given;
mod hard;
mod life;
mod limits;
mod load;
mod memory;
mod mini;
mod pids;
mod pod;
mod storages;
mod streams;
mod systemd;
mod vm;

use std::{
    io::Write,
    time::{Duration, Instant},
};

use containerd_shim_protos::{api, shim_async::TaskClient};
use given::{Given, Kind};
use kuasar_common::{
    api::sandbox::{
        CheckRequest, IPAddress, Interface, Route, SetupSandboxRequest, ShutdownRequest, SyncClockPacket,
    },
    constants::PORT_DEBUG,
    stdio::Stream,
};
use life::{control, execs, failures, life, made_anew, no_leaks};
use pod::{Pod, code, step};
use streams::{big_output, last_byte, stdin, takeover, terminal};
use ttrpc::Code;
use vm::{MAC, Vm, read_frame};

fn given() -> Given {
    Given::from_env().unwrap_or_else(|missing| panic!("this test needs a guest: {missing}"))
}

#[tokio::test]
#[ignore = "needs a guest: set KUASAR_IMAGE"]
async fn a_pod_lives_on_an_initrd_with_9p() {
    a_pod_lives(Kind::InitrdNineP, "task.sharefs_type=9p task.debug").await;
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
    vm_process(&pod, cmdline.contains("task.debug")).await;
    let at = Instant::now();
    sandbox(&pod).await;
    step("sandbox", at);
    let at = Instant::now();
    life(&pod).await;
    made_anew(&pod).await;
    step("life", at);
    let at = Instant::now();
    execs(&pod).await;
    step("execs", at);
    let at = Instant::now();
    no_leaks(&pod).await;
    step("no leaks", at);
    let at = Instant::now();
    big_output(&pod).await;
    step("10 MiB", at);
    let at = Instant::now();
    stdin(&pod).await;
    step("stdin", at);
    let at = Instant::now();
    last_byte(&pod).await;
    step("last byte", at);
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
    changes::network(&pod).await;
    step("network changes", at);
    let at = Instant::now();
    slew(&pod).await;
    step("slew", at);
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
    // A connection that has not shown the token is closed with the answer: this one is not the pod's.
    let stranger = TaskClient::new(pod.vm.client());
    let denied = code(stranger.connect(context, &api::ConnectRequest::new()).await);
    assert_eq!(denied.0, Code::PERMISSION_DENIED);
    pod.vm.sandbox().check(pod.vm.context(), &CheckRequest::new()).await.unwrap();
}

async fn vm_process(pod: &Pod, on: bool) {
    if !on {
        let off = code(pod.vm.run("/bin/runc --version").await);
        assert_eq!(off.0, Code::FAILED_PRECONDITION);
        assert!(off.1.contains("start the pod with task.debug"), "{}", off.1);
        assert_eq!(pod.vm.try_connect(PORT_DEBUG).1, "", "nor is there a debug console");
        return;
    }
    let output = pod.vm.run("/bin/runc --version").await.unwrap();
    assert!(output.out.starts_with("runc version") && output.exit_status == 0, "{output}");
    let output = pod.vm.run("/bin/runc nonsense").await.unwrap();
    assert!(output.exit_status != 0, "{output}");
    let missing = code(pod.vm.run("/bin/sh").await).1;
    assert!(missing.contains("running /bin/sh in the VM: No such file"), "{missing}");
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
    assert!(
        missing.1.contains("02:00:00:00:00:99") && missing.1.contains("net0 02:00:00:00:00:01"),
        "{}",
        missing.1
    );
}

/// A small correction does not move the clock at once: it is under way when the next one comes.
async fn slew(pod: &Pod) {
    // A kernel that finds a better clock soon after its start forgets corrections then. One that finds none,
    // as on a busy host, where it cannot measure any, stays with what it has and says nothing.
    pod.vm.console_says("Switched to clocksource", Duration::from_secs(30)).await;
    // A connection without a call is closed after ten seconds.
    let client = pod.vm.sandbox();
    let ahead = SyncClockPacket { Delta: 120_000_000, ..Default::default() };
    client.sync_clock(pod.vm.context(), &ahead).await.unwrap();
    // The kernel takes a bit of it at the end of each second.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let back = SyncClockPacket { Delta: -1_000_000, ..Default::default() };
    let done = client.sync_clock(pod.vm.context(), &back).await.unwrap();
    assert!(done.ServerSendTime - done.ClientArriveTime < 1_000_000_000, "the clock jumped: {done:?}");
    let console = pod.vm.console();
    assert!(console.contains("slewing the clock by 120000 us; 0 us of an earlier"), "{console}");
    let (_, line) = console.split_once("slewing the clock by -1000 us; ").expect(&console);
    let left: i64 = line.split(' ').next().unwrap().parse().unwrap();
    assert!((1..120_000).contains(&left), "{left} us are left of 120000");
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
    assert!(console.contains("task.colour: unknown parameter; known are task.cgroup, "), "{console}");
}

#[test]
#[ignore = "needs a guest: set KUASAR_IMAGE"]
fn a_kernel_without_cgroup_v1_is_told_apart() {
    let mut vm = Vm::boot(&given(), Kind::InitrdNineP, "task.sharefs_type=9p task.cgroup=v1", true);
    let fatal = vm.line();
    assert!(
        fatal.contains("task.cgroup=v1: this kernel has no cgroup v1 controller devices, freezer, memory;"),
        "{fatal}"
    );
    assert!(vm.ended(Duration::from_secs(10)), "QEMU goes on");
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
