//! Stdio over fifos and files.

use std::{
    fs,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use containerd_shim_protos::api::{self, Status};
use kuasar_common::stdio::Stream;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    time::sleep,
};
use ttrpc::{Code, context};

use crate::{
    fake::{PID, receive, send, soon},
    pod::{CID, Pod, code, read_all, reader},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exec_with_stdin_to_its_end() {
    let pod = Pod::running().await;
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
    assert_eq!(pod.start(CID, "e1").await.unwrap(), PID + 1000);
    let state = pod.state(CID, "e1").await.unwrap();
    assert_eq!((state.pid, state.stdin, state.stdout), (PID + 1000, input.clone(), out.clone()));

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
    pod.run(&out).await;
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
async fn output_into_files() {
    let pod = Pod::new().await;
    let path = pod.dir.path().join("new.log");
    pod.run(&format!("file://{}", path.display())).await;
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"to a file").await;
    send(&mut conn, b"").await;
    assert_eq!(soon("the end", conn.read(&mut [0])).await.unwrap(), 0);
    assert_eq!(fs::read(path).unwrap(), b"to a file");
    pod.create("c2", "/dev/null").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_ends_at_exit_though_the_guest_forgets_to_say_so() {
    let pod = Pod::new().await;
    let out = pod.fifo("out");
    let output = reader(&out);
    pod.run(&out).await;
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"half").await;
    pod.guest.exit(CID, "", 0);
    let begun = Instant::now();
    assert_eq!(read_all(output).await, b"half");
    assert!(begun.elapsed() > Duration::from_secs(5), "it is given time first");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn descriptors_do_not_grow_over_a_thousand_execs() {
    let pod = Pod::new().await;
    pod.guest.auto_execs.store(true, Ordering::SeqCst);
    pod.run("").await;
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
