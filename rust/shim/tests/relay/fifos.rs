//! Fifos whose reader is away.

use std::{fs, time::Duration};

use kuasar_common::stdio::Stream;
use tokio::time::sleep;

use crate::{
    fake::send,
    pod::{CID, Pod, read_all, reader},
};

fn threads(pod: &Pod) -> usize {
    fs::read_dir(format!("/proc/{}/task", pod.relay.id())).unwrap().count()
}

/// As containerd does that is started again and finds a container that ended meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn last_words_wait_for_a_reader_that_comes_back() {
    let pod = Pod::new().await;
    let out = pod.fifo("out");
    let first = reader(&out);
    pod.run(&out).await;
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    drop(first);
    send(&mut conn, b"last words\n").await;
    send(&mut conn, b"").await;
    pod.guest.exit(CID, "", 3);
    assert_eq!(pod.wait(CID, "").await.unwrap().exit_status, 3);
    sleep(Duration::from_millis(300)).await;
    assert_eq!(threads(&pod), 2, "one waits for the reader");
    assert_eq!(read_all(reader(&out)).await, b"last words\n");
    pod.delete(CID, "").await.unwrap();
}

/// Nobody reads what an exec said once its client is gone, and nothing waits for that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_execs_last_words_wait_for_nobody() {
    let pod = Pod::new().await;
    let out = pod.fifo("out");
    pod.run("").await;
    pod.exec(&pod.exec_request("e1", "", &out)).await.unwrap();
    pod.start(CID, "e1").await.unwrap();
    let mut conn = pod.guest.stream(CID, "e1", Stream::Stdout).await;
    send(&mut conn, b"last words\n").await;
    send(&mut conn, b"").await;
    pod.guest.exit(CID, "e1", 3);
    assert_eq!(pod.wait(CID, "e1").await.unwrap().exit_status, 3);
    sleep(Duration::from_millis(300)).await;
    assert_eq!(threads(&pod), 1);
}
