//! `io_type = "streaming"`: containerd's streams on the relay's own socket, frame by frame.

use std::time::Duration;

use containerd_shim_protos::api::{self, Status};
use kuasar_common::stdio::Stream;
use tokio::time::sleep;
use ttrpc::context;

use crate::{
    fake::{
        receive, send, soon,
        stream::{Client, Heard, WINDOW},
    },
    pod::{CID, Pod},
};

fn url(pod: &Pod, id: &str) -> String {
    format!("ttrpc+unix://{}/task.sock?streaming_id={id}", pod.dir.path().display())
}

fn create_request(pod: &Pod, stdin: bool) -> api::CreateTaskRequest {
    api::CreateTaskRequest {
        stdin: if stdin { url(pod, "c1-stdin") } else { String::new() },
        stderr: url(pod, "c1-stderr"),
        ..pod.create_request(CID, &url(pod, "c1-stdout"))
    }
}

async fn create(pod: &Pod, stdin: bool) {
    let request = create_request(pod, stdin);
    soon("Create", pod.task.create(context::Context::default(), &request)).await.unwrap();
    pod.start(CID, "").await.unwrap();
}

fn waiting(pod: &Pod) -> tokio::task::JoinHandle<ttrpc::Result<api::WaitResponse>> {
    let task = pod.task.clone();
    tokio::spawn(async move {
        let request = api::WaitRequest { id: CID.into(), ..Default::default() };
        task.wait(context::Context::default(), &request).await
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_s_life_on_streams_opened_before_it() {
    let pod = Pod::new().await;
    let mut stdin = Client::open(pod.dir.path(), "c1-stdin").await;
    let mut stdout = Client::reader(pod.dir.path(), "c1-stdout").await;
    let mut stderr = Client::reader(pod.dir.path(), "c1-stderr").await;
    create(&pod, true).await;
    let created = pod.guest.created.lock().unwrap()[0].clone();
    assert_eq!([created.stdin.as_str(), &created.stdout, &created.stderr], ["vsock"; 3]);
    let state = pod.state(CID, "").await.unwrap();
    assert_eq!(state.stdout, url(&pod, "c1-stdout"), "echoed as it came");

    assert_eq!(stdin.hear().await, Heard::Window(65536), "nothing may be sent before");
    stdin.data(b"input").await;
    let mut into = pod.guest.stream(CID, "", Stream::Stdin).await;
    assert_eq!(receive(&mut into).await, b"input");
    assert_eq!(stdin.hear().await, Heard::Window(5));
    stdin.data(b" and more").await;
    stdin.close_send().await;
    // As containerd does, on another connection: it must not overtake what is on its way.
    let close = api::CloseIORequest { id: CID.into(), stdin: true, ..Default::default() };
    pod.task.close_io(context::Context::default(), &close).await.unwrap();
    assert_eq!(receive(&mut into).await, b" and more");
    assert!(receive(&mut into).await.is_empty(), "the end of the input");

    let mut out = pod.guest.stream(CID, "", Stream::Stdout).await;
    let mut err = pod.guest.stream(CID, "", Stream::Stderr).await;
    send(&mut out, b"said").await;
    assert_eq!(stdout.hear().await, Heard::Data(b"said".to_vec()));
    send(&mut err, b"an error").await;
    let wait = waiting(&pod);
    for conn in [&mut out, &mut err] {
        send(conn, b"").await;
    }
    pod.guest.exit(CID, "", 7);
    assert_eq!(stderr.hear().await, Heard::Data(b"an error".to_vec()));
    assert_eq!((stdout.hear().await, stderr.hear().await), (Heard::End, Heard::End));
    sleep(Duration::from_millis(300)).await;
    assert!(!wait.is_finished(), "an exit that is told before the end of the output cuts the log short");
    stdout.close_send().await;
    stderr.close_send().await;
    let waited = soon("Wait", wait).await.unwrap().unwrap();
    assert_eq!(waited.exit_status, 7);
    assert_eq!((stdout.hear().await, stderr.hear().await), (Heard::Gone, Heard::Gone), "the server closes");
    assert_eq!(pod.delete(CID, "").await.unwrap().exit_status, 7);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_mebibytes_go_to_a_slow_stream_in_its_windows() {
    let pod = Pod::new().await;
    let mut stdout = Client::reader(pod.dir.path(), "c1-stdout").await;
    let _stderr = Client::reader(pod.dir.path(), "c1-stderr").await;
    create(&pod, false).await;
    let data: Vec<u8> = (0..10u32 << 18).flat_map(u32::to_le_bytes).collect();
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    let sent = data.clone();
    let sender = tokio::spawn(async move {
        for frame in sent.chunks(65536) {
            send(&mut conn, frame).await;
        }
        send(&mut conn, b"").await;
        conn
    });
    sleep(Duration::from_millis(500)).await;
    assert!(!sender.is_finished(), "a reader that is absent holds the process up");
    let got = stdout.read_to_end(WINDOW, Duration::from_micros(100)).await;
    assert!(got == data, "{} of {} bytes, or others", got.len(), data.len());
    drop(sender.await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_client_takes_over_and_misses_nothing() {
    let pod = Pod::new().await;
    let mut first = Client::reader(pod.dir.path(), "c1-stdout").await;
    let _stderr = Client::reader(pod.dir.path(), "c1-stderr").await;
    create(&pod, false).await;
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"read long ago").await;
    assert_eq!(first.hear().await, Heard::Data(b"read long ago".to_vec()));
    // Read, and known to be: a restart does not repeat it.
    sleep(Duration::from_secs(3)).await;
    send(&mut conn, b"on its way").await;
    sleep(Duration::from_millis(300)).await;
    // containerd is killed with this in its socket.
    drop(first);
    send(&mut conn, b", said meanwhile").await;
    pod.guest.exit(CID, "", 0);
    send(&mut conn, b"").await;
    sleep(Duration::from_millis(300)).await;
    let mut second = Client::reader(pod.dir.path(), "c1-stdout").await;
    let got = second.read_to_end(WINDOW, Duration::ZERO).await;
    assert_eq!(String::from_utf8(got).unwrap(), "on its way, said meanwhile");
    second.close_send().await;
    assert_eq!(second.hear().await, Heard::Gone);
    // A containerd that is restarted once more opens what it finds, and waits for the end before it deletes.
    let mut third = Client::reader(pod.dir.path(), "c1-stdout").await;
    assert_eq!(third.hear().await, Heard::End);
    assert_eq!(pod.state(CID, "").await.unwrap().status.enum_value(), Ok(Status::STOPPED));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_never_closes_holds_an_exit_up_for_seconds_only() {
    let pod = Pod::new().await;
    let _stdout = Client::reader(pod.dir.path(), "c1-stdout").await;
    create(&pod, false).await;
    let wait = waiting(&pod);
    for stream in [Stream::Stdout, Stream::Stderr] {
        let mut conn = pod.guest.stream(CID, "", stream).await;
        send(&mut conn, b"").await;
    }
    pod.guest.exit(CID, "", 3);
    let begun = std::time::Instant::now();
    assert_eq!(soon("Wait", wait).await.unwrap().unwrap().exit_status, 3);
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_vm_ends_streams() {
    let mut pod = Pod::new().await;
    let mut stdout = Client::reader(pod.dir.path(), "c1-stdout").await;
    create(&pod, false).await;
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"last words").await;
    assert_eq!(stdout.hear().await, Heard::Data(b"last words".to_vec()));
    pod.end_vm();
    assert_eq!(stdout.hear().await, Heard::End);
    assert_eq!(pod.wait(CID, "").await.unwrap().exit_status, 137);
    let mut late = Client::reader(pod.dir.path(), "c1-stderr").await;
    assert_eq!(late.hear().await, Heard::End, "also when it is opened after the end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_what_never_was_are_closed_with_their_client() {
    let pod = Pod::new().await;
    let before = pod.open_fds();
    for _ in 0..50 {
        // As 2.1 does it for a container that is removed before it starts: it says so, and leaves the
        // connection open.
        let mut stdin = Client::open(pod.dir.path(), "x-stdin").await;
        let mut stdout = Client::reader(pod.dir.path(), "x-stdout").await;
        stdin.close_send().await;
        stdout.close_send().await;
        assert_eq!(stdout.hear().await, Heard::Gone);
        drop(stdin);
    }
    // The input of a process to come may be over already: one of these waits for that, for minutes.
    pod.fds_settle_at(before + 1).await;
    *pod.guest.create_error.lock().unwrap() = Some("no such runtime".into());
    let mut stdout = Client::reader(pod.dir.path(), "c1-stdout").await;
    let request = create_request(&pod, false);
    assert!(soon("Create", pod.task.create(context::Context::default(), &request)).await.is_err());
    assert_eq!(stdout.hear().await, Heard::End, "what could not be created says nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn execs_on_streams_leave_no_descriptor_behind() {
    let pod = Pod::running().await;
    pod.guest.auto_execs.store(true, std::sync::atomic::Ordering::SeqCst);
    let mut settled = 0;
    for round in 0..60 {
        let exec = format!("e{round}");
        let (input, output) = (format!("{exec}-stdin"), format!("{exec}-stdout"));
        let mut stdin = Client::open(pod.dir.path(), &input).await;
        let mut stdout = Client::reader(pod.dir.path(), &output).await;
        pod.exec(&pod.exec_request(&exec, &url(&pod, &input), &url(&pod, &output))).await.unwrap();
        pod.start(CID, &exec).await.unwrap();
        assert_eq!(stdin.hear().await, Heard::Window(65536));
        let said = stdout.read_to_end(WINDOW, Duration::ZERO).await;
        assert_eq!(said, exec.as_bytes());
        stdout.close_send().await;
        stdin.close_send().await;
        assert_eq!(pod.wait(CID, &exec).await.unwrap().exit_status, 0);
        pod.delete(CID, &exec).await.unwrap();
        assert_eq!(stdout.hear().await, Heard::Gone);
        if round == 9 {
            // Its own clients are gone by now.
            drop((stdin, stdout));
            sleep(Duration::from_millis(200)).await;
            settled = pod.open_fds();
        }
    }
    pod.fds_settle_at(settled).await;
}
