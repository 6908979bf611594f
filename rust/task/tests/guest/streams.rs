//! Steps about standard streams.

use std::time::{Duration, Instant};

use containerd_shim_protos::{api, api::Status};
use kuasar_common::stdio::Stream;
use protobuf::EnumOrUnknown;
use ttrpc::Code;

use crate::{
    pod::{Pod, code, join},
    vm::{bundle, read_frame, read_frames, write_frame},
};

pub(crate) async fn big_output(pod: &Pod) {
    // A counted pattern: a missing, doubled or moved piece shows.
    let script =
        "i=0; while [ $i -lt 640 ]; do dd if=/tmp/block bs=16384 count=1 2>/dev/null; i=$((i+1)); done";
    let id = "big";
    let pattern: Vec<u8> = (0..16_384u32).map(|n| (n % 251) as u8).collect();
    bundle(&pod.given, &pod.vm, id, &["true"], false);
    std::fs::write(pod.vm.shared(id).join("rootfs/tmp/block"), &pattern).unwrap();
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

pub(crate) async fn stdin(pod: &Pod) {
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

pub(crate) async fn terminal(pod: &Pod) {
    pod.create("tty", &["sh"], true, true).await.unwrap();
    let mut input = pod.vm.stream("tty", "", Stream::Stdin);
    let output = pod.vm.output("tty", "", Stream::Stdout);
    pod.start("tty", "").await.unwrap();
    let mut size = api::ResizePtyRequest { id: "tty".into(), width: 132, height: 43, ..Default::default() };
    pod.task.resize_pty(pod.vm.context(), &size).await.unwrap();
    write_frame(&mut input, b"tty; stty size; exit 5\n");
    assert_eq!(pod.wait("tty", "").await.unwrap(), 5);
    let text = String::from_utf8(join(output).await).unwrap();
    assert!(text.contains("/dev/pts/0\r\n43 132\r\n"), "{text:?}");
    pod.delete("tty", "").await.unwrap();

    pod.create("c3", &["sleep", "1000"], false, false).await.unwrap();
    pod.start("c3", "").await.unwrap();
    let script = "tty; stty size; read line; echo got $line";
    pod.exec("c3", "sh", &["sh", "-c", script], true, true).await.unwrap();
    // Known before the process is: it never sees another size.
    (size.id, size.exec_id, size.width) = ("c3".into(), "sh".into(), 99);
    pod.task.resize_pty(pod.vm.context(), &size).await.unwrap();
    let mut input = pod.vm.stream("c3", "sh", Stream::Stdin);
    let output = pod.vm.output("c3", "sh", Stream::Stdout);
    pod.start("c3", "sh").await.unwrap();
    write_frame(&mut input, b"abc\n");
    assert_eq!(pod.wait("c3", "sh").await.unwrap(), 0);
    let text = String::from_utf8(join(output).await).unwrap();
    assert!(text.contains("\r\n43 99\r\n") && text.ends_with("got abc\r\n"), "{text:?}");
    (size.id, size.exec_id) = ("c3".into(), String::new());
    assert_eq!(code(pod.task.resize_pty(pod.vm.context(), &size).await).0, Code::FAILED_PRECONDITION);
    pod.delete("c3", "sh").await.unwrap();
    pod.kill("c3", "", 9, false).await.unwrap();
    assert_eq!(pod.wait("c3", "").await.unwrap(), 137);
    pod.delete("c3", "").await.unwrap();
}

pub(crate) async fn takeover(pod: &Pod) {
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

/// Its end is told after its last byte, however slow its reader is; and nobody else waits for that reader.
pub(crate) async fn last_byte(pod: &Pod) {
    let script = "dd if=/dev/zero bs=1000 count=50 2>/dev/null; exit 3";
    pod.create("slow", &["sh", "-c", script], false, false).await.unwrap();
    let reader = pod.vm.stream("slow", "", Stream::Stdout);
    pod.start("slow", "").await.unwrap();
    let mut waiting = std::pin::pin!(pod.wait("slow", ""));
    pod.create("other", &["true"], false, false).await.unwrap();
    pod.start("other", "").await.unwrap();
    assert_eq!(pod.wait("other", "").await.unwrap(), 0);
    while pod.state("slow", "").await.unwrap().status != EnumOrUnknown::new(Status::STOPPED) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let early = tokio::time::timeout(Duration::from_secs(2), &mut waiting).await;
    assert!(early.is_err(), "its end was told before its last byte was read");
    let read = std::thread::spawn(move || read_frames(reader));
    assert_eq!(waiting.await.unwrap(), 3);
    assert_eq!(join(read).await.len(), 50_000);
    for id in ["slow", "other"] {
        pod.delete(id, "").await.unwrap();
    }
}
