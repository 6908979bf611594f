//! Conditions that make agents hang: many processes at once, input and output that nobody takes, memory that
//! runs out while a process starts, processes that do not want to end. Every call has a deadline, so that a
//! hang is a failure.

use std::time::{Duration, Instant};

use containerd_shim_protos::{api, api::Status, shim_async::TaskClient};
use kuasar_common::{api::sandbox::ShutdownRequest, stdio::Stream};
use protobuf::{EnumOrUnknown, MessageField, well_known_types::any::Any};

use crate::{
    given,
    given::Kind,
    life::futures,
    limits::{create_with, little_memory},
    pod::{Pod, code, join, step},
    vm::{Vm, read_frame, write_frame},
};

/// Processes that are started in one container at the same time: more than runtimes run side by side.
const MANY: u32 = 12;
/// As many with `KUASAR_LOAD`, which a busy machine's emulated processor does not do within a call's
/// deadline.
const VERY_MANY: u32 = 64;
/// More than the pipes and buffers on the way to a process hold.
const MUCH: usize = 1 << 20;

#[tokio::test]
#[ignore = "needs a guest: set KUASAR_IMAGE"]
async fn nothing_hangs() {
    let given = given();
    let vm = Vm::boot(&given, Kind::InitrdNineP, "task.sharefs_type=9p task.log_level=info", true);
    let task = TaskClient::new(vm.client());
    let pod = Pod { given, vm, task };
    let at = Instant::now();
    unread_input(&pod).await;
    step("unread input", at);
    let at = Instant::now();
    broken_input(&pod).await;
    step("broken input", at);
    let at = Instant::now();
    unread_terminal(&pod).await;
    step("unread terminal", at);
    let at = Instant::now();
    no_memory(&pod).await;
    step("no memory", at);
    let at = Instant::now();
    many_at_once(&pod).await;
    step("many execs at once", at);
    let at = Instant::now();
    stubborn(&pod).await;
    step("stubborn", at);
}

async fn running(pod: &Pod, id: &str) -> bool {
    pod.state(id, "").await.unwrap().status == EnumOrUnknown::new(Status::RUNNING)
}

async fn end(pod: &Pod, id: &str) {
    pod.kill(id, "", 9, true).await.unwrap();
    assert_eq!(pod.wait(id, "").await.unwrap(), 137, "{id}");
    pod.delete(id, "").await.unwrap();
}

async fn many_at_once(pod: &Pod) {
    pod.create("many", &["sleep", "1000"], false, false).await.unwrap();
    pod.start("many", "").await.unwrap();
    let many = if std::env::var_os("KUASAR_LOAD").is_some() { VERY_MANY } else { MANY };
    let runs = (0..many).map(|n| async move {
        let script = format!("echo {n}; exit {n}");
        let ended = pod.run("many", &format!("x{n}"), &["sh", "-c", &script]).await;
        assert_eq!(ended, (n, format!("{n}\n")));
    });
    futures(runs).await;
    end(pod, "many").await;
}

/// A process that reads nothing holds up who writes to it, until it is gone; and nobody else.
async fn unread_input(pod: &Pod) {
    pod.create("deaf", &["sleep", "1000"], false, true).await.unwrap();
    let mut input = pod.vm.stream("deaf", "", Stream::Stdin);
    pod.start("deaf", "").await.unwrap();
    let writing = std::thread::spawn(move || {
        for _ in 0..MUCH / 4096 {
            write_frame(&mut input, &[b'x'; 4096]);
        }
        write_frame(&mut input, b"");
        Vec::new()
    });
    assert_eq!(pod.run("deaf", "beside", &["sh", "-c", "echo here"]).await, (0, "here\n".into()));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!writing.is_finished(), "somebody took all of it");
    pod.kill("deaf", "", 9, true).await.unwrap();
    assert_eq!(pod.wait("deaf", "").await.unwrap(), 137);
    join(writing).await;
    pod.delete("deaf", "").await.unwrap();
}

/// A writer that breaks off has not ended the input; CloseIO does.
async fn broken_input(pod: &Pod) {
    pod.create("cut", &["cat"], false, true).await.unwrap();
    let mut input = pod.vm.stream("cut", "", Stream::Stdin);
    let output = pod.vm.output("cut", "", Stream::Stdout);
    pod.start("cut", "").await.unwrap();
    write_frame(&mut input, b"whole");
    // Half a frame.
    std::io::Write::write_all(&mut input, &[0, 0, 0, 9, b'h']).unwrap();
    drop(input);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(running(pod, "cut").await);
    let close = api::CloseIORequest { id: "cut".into(), stdin: true, ..Default::default() };
    pod.task.close_io(pod.vm.context(), &close).await.unwrap();
    assert_eq!(pod.wait("cut", "").await.unwrap(), 0);
    assert_eq!(join(output).await, b"whole");
    pod.delete("cut", "").await.unwrap();
}

/// The reader of a terminal is gone, or reads no more: the process that writes to it waits, and ends when it
/// is told to.
async fn unread_terminal(pod: &Pod) {
    for stays in [false, true] {
        pod.create("tty", &["yes"], true, true).await.unwrap();
        let mut reader = pod.vm.stream("tty", "", Stream::Stdout);
        pod.start("tty", "").await.unwrap();
        assert!(read_frame(&mut reader).starts_with(b"y"));
        let reader = stays.then_some(reader);
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(running(pod, "tty").await);
        let size = api::ResizePtyRequest { id: "tty".into(), width: 80, height: 25, ..Default::default() };
        pod.task.resize_pty(pod.vm.context(), &size).await.unwrap();
        end(pod, "tty").await;
        drop(reader);
    }
}

/// A container at its limit: what is started in it is killed, which is told, and the container lives on.
async fn no_memory(pod: &Pod) {
    let script = "dd if=/dev/zero of=/dev/fill bs=1M count=15 2>/dev/null; echo full; sleep 1000";
    create_with(pod, "full", &["sh", "-c", script], false, little_memory).await.unwrap();
    let mut output = pod.vm.stream("full", "", Stream::Stdout);
    pod.start("full", "").await.unwrap();
    assert_eq!(read_frame(&mut output), b"full\n");
    pod.exec("full", "x", &["busybox", "tail", "/dev/zero"], false, false).await.unwrap();
    match pod.start("full", "x").await {
        // It was let in, and killed then.
        Ok(_) => assert_eq!(pod.wait("full", "x").await.unwrap(), 137),
        Err(error) => {
            println!("  {}", code::<()>(Err(error)).1);
            assert_eq!(pod.wait("full", "x").await.unwrap(), 255);
        }
    }
    pod.delete("full", "x").await.unwrap();
    assert!(running(pod, "full").await);
    let mut update = api::UpdateTaskRequest { id: "full".into(), ..Default::default() };
    let resources = br#"{"memory":{"limit":67108864}}"#.to_vec();
    update.resources = MessageField::some(Any { value: resources, ..Default::default() });
    pod.task.update(pod.vm.context(), &update).await.unwrap();
    assert_eq!(pod.run("full", "y", &["sh", "-c", "exit 5"]).await.0, 5, "there is room again");
    end(pod, "full").await;
}

/// One that ignores the signal to end is killed when its time is up; the VM does not wait for it any longer.
async fn stubborn(pod: &Pod) {
    let script = "trap '' TERM; echo ready; while true; do sleep 0.1; done";
    pod.create("stubborn", &["sh", "-c", script], false, false).await.unwrap();
    pod.start("stubborn", "").await.unwrap();
    assert_eq!(read_frame(&mut pod.vm.stream("stubborn", "", Stream::Stdout)), b"ready\n");
    pod.kill("stubborn", "", 15, false).await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(running(pod, "stubborn").await);
    let at = Instant::now();
    let shutdown = ShutdownRequest { timeout_ms: 2000, ..Default::default() };
    pod.vm.sandbox().shutdown(pod.vm.context(), &shutdown).await.unwrap();
    assert!(at.elapsed() >= Duration::from_secs(2), "it had its time");
    assert_eq!(pod.wait("stubborn", "").await.unwrap(), 137);
}
