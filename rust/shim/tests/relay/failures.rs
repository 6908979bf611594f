//! Errors, guests that hang or lie, and VMs that die.

use std::{
    fs,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant, SystemTime},
};

use containerd_shim_protos::api::{self, Status};
use kuasar_common::stdio::Stream;
use tempfile::TempDir;
use tokio::{io::AsyncWriteExt, time::sleep};
use ttrpc::{Code, context};

use crate::{
    fake::{self, PID, send, soon},
    pod::{CID, Pod, code, read_all, reader},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_vm_ends_everything_in_it() {
    let mut pod = Pod::new().await;
    let out = pod.fifo("out");
    let output = reader(&out);
    pod.run(&out).await;
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"said before the end").await;
    let (task, before) = (pod.task.clone(), SystemTime::now());
    let pending = tokio::spawn(async move {
        let request = api::WaitRequest { id: CID.into(), ..Default::default() };
        task.wait(context::Context::default(), &request).await
    });
    sleep(Duration::from_millis(100)).await;
    assert!(!pending.is_finished());
    pod.end_vm();
    let waited = soon("Wait", pending).await.unwrap().unwrap();
    assert_eq!(waited.exit_status, 137);
    let at: SystemTime = waited.exited_at.unwrap().into();
    assert!(at >= before - Duration::from_millis(1));
    assert_eq!(read_all(output).await, b"said before the end", "and the fifo is closed");
    let state = pod.state(CID, "").await.unwrap();
    assert_eq!((state.status.enum_value(), state.exit_status), (Ok(Status::STOPPED), 137));
    assert_eq!(code(pod.kill(CID).await).0, Code::NOT_FOUND);
    assert_eq!(pod.pids(CID).await, [PID + 100]);
    assert_eq!(code(pod.exec(&pod.exec_request("e1", "", "")).await).0, Code::FAILED_PRECONDITION);
    let request = pod.create_request("c2", "");
    let (_, text) = code(pod.task.create(context::Context::default(), &request).await);
    assert_eq!(text, "creating container c2: the pod's VM has ended");
    assert_eq!(pod.delete(CID, "").await.unwrap().exit_status, 137);
    assert_eq!(*pod.daemon.released.lock().unwrap(), [CID]);
    assert_eq!(code(pod.delete(CID, "").await).0, Code::NOT_FOUND);
    assert!(pod.relay.try_wait().unwrap().is_none(), "the relay stays");
    assert!(pod.log().contains("the VM is gone: its process ended"), "{}", pod.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_connection_is_no_exit_while_the_vm_lives() {
    let pod = Pod::new().await;
    let out = pod.fifo("out");
    let output = reader(&out);
    pod.run(&out).await;
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"before, ").await;
    drop(conn);
    pod.guest.cut();
    sleep(Duration::from_millis(300)).await;
    pod.guest.listen(pod.dir.path()).await;
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"after").await;
    send(&mut conn, b"").await;
    assert_eq!(read_all(output).await, b"before, after");
    assert_eq!(pod.pids(CID).await, [PID + 100, PID + 200]);
    assert_eq!(pod.state(CID, "").await.unwrap().status.enum_value(), Ok(Status::RUNNING));
    pod.guest.exit(CID, "", 5);
    assert_eq!(pod.wait(CID, "").await.unwrap().exit_status, 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unwatched_vm_is_dead_when_its_guest_is_gone() {
    let pod = Pod::with(false, true).await;
    pod.run("").await;
    pod.guest.cut();
    assert_eq!(pod.wait(CID, "").await.unwrap().exit_status, 137);
    assert_eq!(pod.delete(CID, "").await.unwrap().exit_status, 137);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_leave_nothing_and_say_why() {
    let pod = Pod::new().await;
    let before = pod.open_fds();
    let out = pod.fifo("out");
    let create = async |request: &api::CreateTaskRequest| {
        code(soon("Create", pod.task.create(context::Context::default(), request)).await)
    };
    // The daemon refuses.
    *pod.daemon.prepare_error.lock().unwrap() = Some("process.user: no".into());
    assert_eq!(
        create(&pod.create_request(CID, &out)).await,
        (Code::FAILED_PRECONDITION, "process.user: no".into())
    );
    *pod.daemon.prepare_error.lock().unwrap() = None;
    assert!(pod.daemon.released.lock().unwrap().is_empty());
    // The guest refuses.
    *pod.guest.create_error.lock().unwrap() = Some("exec: \"nope\": not found in $PATH".into());
    let output = reader(&out);
    let (why, text) = create(&pod.create_request(CID, &out)).await;
    assert_eq!((why, text.as_str()), (Code::INTERNAL, "exec: \"nope\": not found in $PATH"));
    assert_eq!(read_all(output).await, b"", "the fifo is closed");
    assert_eq!(*pod.daemon.released.lock().unwrap(), [CID]);
    assert_eq!(code(pod.delete(CID, "").await).0, Code::NOT_FOUND);
    *pod.guest.create_error.lock().unwrap() = None;
    // Stdio that cannot be.
    let (why, text) = create(&pod.create_request(CID, "binary:///bin/logger?id=1")).await;
    assert_eq!(why, Code::INVALID_ARGUMENT);
    assert!(
        text.contains("binary:// is not supported by this runtime, it takes fifos, streams and file://"),
        "{text}"
    );
    let (_, text) = create(&pod.create_request(CID, "/nowhere/out")).await;
    assert_eq!(
        text,
        "creating container c1: opening Stdout /nowhere/out: No such file or directory (os error 2)"
    );
    assert!(
        !pod.daemon.prepared.lock().unwrap().iter().skip(1).any(|p| p.container_id == CID),
        "none was prepared for"
    );
    // Ids that would be other folders.
    for id in ["", "..", "a/b", ".x"] {
        assert_eq!(create(&pod.create_request(id, "")).await.0, Code::INVALID_ARGUMENT, "{id}");
    }
    // A start that fails: containerd waits for the end of the output before it deletes.
    pod.create(CID, &out).await;
    let output = reader(&out);
    *pod.guest.start_error.lock().unwrap() = Some("permission denied".into());
    assert_eq!(code(pod.start(CID, "").await), (Code::INTERNAL, "permission denied".into()));
    assert_eq!(read_all(output).await, b"");
    assert_eq!(
        code(pod.task.create(context::Context::default(), &pod.create_request(CID, "")).await).0,
        Code::ALREADY_EXISTS
    );
    pod.delete(CID, "").await.unwrap();
    // Errors of passed-on calls keep their code and text.
    pod.create(CID, "").await;
    let mut update = api::UpdateTaskRequest { id: CID.into(), ..Default::default() };
    let answer = pod.task.update(context::Context::default(), &update).await;
    assert_eq!(code(answer), (Code::INVALID_ARGUMENT, "update of c1 refused".into()));
    // What is the host's of it, the daemon gets, and nothing else.
    for (resources, asked) in [(r#"{"cpu":{"quota":1}}"#, 0), (r#"{"cpu":{"cpus":"0"}}"#, 1)] {
        update.resources.mut_or_insert_default().value = resources.into();
        let answer = pod.task.update(context::Context::default(), &update).await;
        assert_eq!(code(answer), (Code::INVALID_ARGUMENT, "update of c1 refused".into()));
        let updated = pod.daemon.updated.lock().unwrap();
        assert_eq!(updated.len(), asked);
        assert!(updated.iter().all(|u| u.container_id == CID && u.resources == resources.as_bytes()));
    }
    let checkpoint = api::CheckpointTaskRequest { id: CID.into(), ..Default::default() };
    let refused = "container c1 cannot be checkpointed: its microVM has no CRIU; stop it and start another";
    let answer = pod.task.checkpoint(context::Context::default(), &checkpoint).await;
    assert_eq!(code(answer), (Code::UNIMPLEMENTED, refused.into()));
    let restore = api::CreateTaskRequest { checkpoint: "/it".into(), ..pod.create_request("c2", "") };
    let refused =
        "container c2 cannot be restored from a checkpoint: its microVM has no CRIU; create it without one";
    assert_eq!(create(&restore).await, (Code::UNIMPLEMENTED, refused.into()));
    // One more than at the start: the connection to the guest.
    pod.fds_settle_at(before + 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_hangs_holds_nobody_up() {
    let pod = Pod::running().await;
    let ids = [CID, "c2", "c3", "c4", "c5"];
    for id in ids.into_iter().skip(1) {
        pod.create(id, "").await;
    }
    let mut stats = Vec::new();
    for id in ids {
        stats.push(pod.stats(id).await.unwrap());
    }
    pod.guest.hangs.send_replace(true);
    let begun = Instant::now();
    // As containerd asks: one after the other.
    for (id, stats) in ids.iter().zip(&stats) {
        assert_eq!(pod.stats(id).await.unwrap(), *stats);
        assert_eq!(pod.pids(id).await, [pod.state(id, "").await.unwrap().pid]);
    }
    assert_eq!(pod.state(CID, "").await.unwrap().status.enum_value(), Ok(Status::RUNNING));
    // The guest is waited for once, 1.8 s; twice would be 3.6.
    assert!(begun.elapsed() < Duration::from_millis(2300), "{:?}", begun.elapsed());
    // It is not forgotten when it comes back, and asked again.
    pod.guest.hangs.send_replace(false);
    for _ in 0..200 {
        if pod.pids(CID).await == [PID + 100, PID + 200] {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("the guest is still taken for silent");
}

/// containerd sends SIGKILL only when SIGTERM was no error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_in_a_guest_that_hangs_can_be_stopped() {
    let mut pod = Pod::running().await;
    pod.guest.hangs.send_replace(true);
    let begun = Instant::now();
    let request = api::KillRequest { id: CID.into(), signal: 15, ..Default::default() };
    soon("Kill", pod.task.kill(context::with_duration(Duration::from_secs(60)), &request)).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(13), "{:?}", begun.elapsed());
    assert!(pod.vmm.try_wait().unwrap().is_none(), "it may still come back, and end by itself");
    pod.kill(CID).await.unwrap();
    assert_eq!(pod.wait(CID, "").await.unwrap().exit_status, 137);
    assert_eq!(
        code(soon("Kill", pod.task.kill(context::Context::default(), &request)).await).0,
        Code::NOT_FOUND
    );
}

/// A process that waits for a file of a host that does not answer takes its SIGKILL, and stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_of_killed_containers_that_do_not_end_is_ended() {
    let mut pod = Pod::running().await;
    let begun = Instant::now();
    pod.kill(CID).await.unwrap();
    assert!(pod.relay.try_wait().unwrap().is_none());
    assert_eq!(pod.wait(CID, "").await.unwrap().exit_status, 137);
    assert!(begun.elapsed() > Duration::from_secs(14), "it had {:?}", begun.elapsed());
    assert!(!pod.vmm.wait().unwrap().success(), "nothing less than the VM's end can end it");
    assert!(pod.log().contains("do not end 15 s after SIGKILL"), "{}", pod.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_in_a_guest_that_hangs_can_be_killed() {
    let mut pod = Pod::running().await;
    pod.guest.hangs.send_replace(true);
    pod.kill(CID).await.unwrap();
    assert_eq!(pod.wait(CID, "").await.unwrap().exit_status, 137);
    assert!(!pod.vmm.wait().unwrap().success(), "nothing less than the VM's end can end it");
    assert!(pod.log().contains("nor does it answer anything else: killing the VM"), "{}", pod.log());
    assert_eq!(code(pod.kill(CID).await).0, Code::NOT_FOUND);
    assert_eq!(pod.delete(CID, "").await.unwrap().exit_status, 137);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_from_the_guest_is_survived() {
    let pod = Pod::new().await;
    let out = pod.fifo("out");
    for (said, why) in [
        ("ERR too many\n", "it answered \"ERR too many\""),
        ("\n", "it answered \"\""),
        (&"x".repeat(10_000), "a line of over 4096 bytes"),
        ("", "closed before an answer"),
    ] {
        *pod.guest.stream_error.lock().unwrap() = Some(said.into());
        let (code, text) = code(
            soon("Create", pod.task.create(context::Context::default(), &pod.create_request(CID, &out)))
                .await,
        );
        assert_eq!(code, Code::UNAVAILABLE);
        assert!(
            text.starts_with("creating container c1: opening Stdout in the guest: ") && text.contains(why),
            "{text}"
        );
    }
    *pod.guest.stream_error.lock().unwrap() = None;
    let output = reader(&out);
    pod.create(CID, &out).await;
    // Frames that are none break the connection; the next one goes on.
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"good, ").await;
    conn.write_all(&[0xff; 64]).await.unwrap();
    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"and good again").await;
    send(&mut conn, b"").await;
    assert_eq!(read_all(output).await, b"good, and good again");
    assert_eq!(pod.pids(CID).await, [PID + 100, PID + 200]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_cannot_begin_says_why() {
    let program = env!("CARGO_BIN_EXE_containerd-shim-kuasar-vmm-v1");
    let dir = TempDir::new().unwrap();
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(program);
        let command = command.arg("serve").args(args).stdin(Stdio::null());
        let output = command.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let pod: PathBuf = dir.path().into();
    let pod = pod.to_str().unwrap();
    let args = ["--pod-dir", pod, "--guest", "vsock://5", "--listen-fd", "3"];
    let text = run(&args);
    assert!(text.contains(&format!("reading the pod's token {pod}/token: No such file")), "{text}");
    fs::write(dir.path().join("token"), "short").unwrap();
    assert!(run(&args).contains("it is not 64 hexadecimal digits"));
    fs::write(dir.path().join("token"), fake::TOKEN).unwrap();
    let text = run(&["--pod-dir", pod, "--guest", "vsock://5", "--listen-fd", "77"]);
    assert!(
        text.contains("taking over file descriptor 77 as the listening socket: it is not open"),
        "{text}"
    );
}
