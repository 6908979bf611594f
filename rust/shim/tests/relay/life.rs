//! Containers from Create to Delete, and the daemon and containerd going and coming meanwhile.

use std::{
    fs,
    net::Shutdown,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant, SystemTime},
};

use containerd_shim_protos::api::{self, Status};
use kuasar_common::stdio::Stream;
use protobuf::Message;
use tokio::time::sleep;
use ttrpc::{Code, context};

use crate::{
    fake::{
        PID,
        events::{self, Events},
        figures, send, soon,
    },
    pod::{CID, Pod, code, connect_mortal, read_all, reader},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn life_of_a_container() {
    let pod = Pod::new().await;
    let out = pod.fifo("out");
    let output = reader(&out);
    let pid = pod.create(CID, &out).await;
    assert_eq!(pid, PID + 100);

    let prepared = pod.daemon.prepared.lock().unwrap()[0].clone();
    assert_eq!((prepared.container_id.as_str(), prepared.bundle.as_str()), (CID, "/run/containerd/c1"));
    assert_eq!(prepared.rootfs[0].type_, "overlay");
    assert_eq!(prepared.rootfs[0].options, ["lowerdir=/a"]);
    let created = pod.guest.created.lock().unwrap()[0].clone();
    assert_eq!(created.bundle, "/run/kuasar/state/c1");
    assert!(created.rootfs.is_empty() && created.stdin.is_empty() && created.stderr.is_empty());
    assert_eq!(created.stdout, "vsock");

    let state = pod.state(CID, "").await.unwrap();
    assert_eq!(state.status.enum_value(), Ok(Status::CREATED));
    assert_eq!((state.bundle.as_str(), &state.stdout, state.pid), ("/run/containerd/c1", &out, PID + 100));
    let request = api::ConnectRequest { id: CID.into(), ..Default::default() };
    let connected = pod.task.connect(context::Context::default(), &request).await.unwrap();
    assert_eq!((connected.shim_pid, connected.task_pid), (pod.relay.id(), PID + 100));

    pod.start(CID, "").await.unwrap();
    assert_eq!(pod.state(CID, "").await.unwrap().status.enum_value(), Ok(Status::RUNNING));
    assert_eq!(pod.pids(CID).await, [PID + 100, PID + 200]);
    assert_eq!(pod.stats(CID).await.unwrap().stats.value, figures().write_to_bytes().unwrap());

    let mut conn = pod.guest.stream(CID, "", Stream::Stdout).await;
    send(&mut conn, b"hello ").await;
    send(&mut conn, b"world\n").await;
    let before = SystemTime::now();
    pod.guest.exit(CID, "", 3);
    let waited = pod.wait(CID, "").await.unwrap();
    assert_eq!(waited.exit_status, 3);
    let at: SystemTime = waited.exited_at.unwrap().into();
    assert!(at >= before - Duration::from_millis(1) && at <= SystemTime::now(), "the host's clock");
    send(&mut conn, b"last words\n").await;
    send(&mut conn, b"").await;
    assert_eq!(read_all(output).await, b"hello world\nlast words\n");

    let state = pod.state(CID, "").await.unwrap();
    assert_eq!((state.status.enum_value(), state.exit_status), (Ok(Status::STOPPED), 3));
    assert_eq!(code(pod.kill(CID).await).0, Code::NOT_FOUND);
    assert_eq!(pod.pids(CID).await, [PID + 100], "a stopped task still has a process for containerd");
    let deleted = pod.delete(CID, "").await.unwrap();
    assert_eq!((deleted.exit_status, deleted.pid), (3, PID + 100));
    assert_eq!(*pod.daemon.released.lock().unwrap(), [CID]);
    assert_eq!(code(pod.delete(CID, "").await).0, Code::NOT_FOUND);
    assert_eq!(code(pod.state(CID, "").await).0, Code::NOT_FOUND);
    let shutdown = api::ShutdownRequest { id: CID.into(), now: true, ..Default::default() };
    pod.task.shutdown(context::Context::default(), &shutdown).await.unwrap();
    assert_eq!(pod.create(CID, "").await, PID + 101, "the relay lives on, and the id is free again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_containers_wait_for_the_daemon_and_nothing_else_does() {
    let mut pod = Pod::running().await;
    let mut server = pod.daemon_server.take().unwrap();
    server.shutdown().await.unwrap();
    drop(server);
    // What runs goes on: exec, exit, and a Delete whose release is owed.
    pod.exec(&pod.exec_request("e1", "", "")).await.unwrap();
    pod.start(CID, "e1").await.unwrap();
    pod.guest.exit(CID, "", 0);
    let begun = Instant::now();
    assert_eq!(pod.delete(CID, "").await.unwrap().exit_status, 0);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    let (task, request) = (pod.task.clone(), pod.create_request("c2", ""));
    let pending = tokio::spawn(async move { task.create(context::Context::default(), &request).await });
    sleep(Duration::from_millis(700)).await;
    assert!(!pending.is_finished(), "it waits");
    let _server = pod.daemon.serve(pod.dir.path()).await;
    assert_eq!(soon("Create", pending).await.unwrap().unwrap().pid, PID + 101);
    for _ in 0..500 {
        if *pod.daemon.released.lock().unwrap() == [CID] {
            return;
        }
        sleep(Duration::from_millis(20)).await;
    }
    panic!("the daemon was never told of the container's end: {:?}", pod.daemon.released.lock().unwrap());
}

/// containerd dies, forgets at its restart what was not there, and makes it anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_whose_creator_hung_up_is_taken_back() {
    let pod = Pod::new().await;
    pod.guest.create_delay_ms.store(500, Ordering::SeqCst);
    let out = pod.fifo("out");
    let output = reader(&out);
    for limit in [None, Some(Duration::from_secs(60))] {
        let (before, request) = (pod.guest.deleted.lock().unwrap().len(), pod.create_request(CID, &out));
        let (dying, end) = connect_mortal(pod.dir.path());
        let call = tokio::spawn(async move {
            dying.create(limit.map_or_else(context::Context::default, context::with_duration), &request).await
        });
        sleep(Duration::from_millis(200)).await;
        end.shutdown(Shutdown::Both).unwrap();
        assert!(call.await.unwrap().is_err());
        assert_eq!(code(pod.state(CID, "").await).0, Code::NOT_FOUND);
        assert_eq!(pod.guest.created.lock().unwrap().len(), before, "it is being made");
        // Not "already exists", and not before the first one is gone.
        let pid = pod.create(CID, &out).await;
        assert_eq!(pod.guest.deleted.lock().unwrap()[before..], [(CID.to_owned(), String::new())]);
        assert_eq!(pod.daemon.released.lock().unwrap()[before..], [CID]);
        let state = pod.state(CID, "").await.unwrap();
        assert_eq!((state.status.enum_value(), state.pid), (Ok(Status::CREATED), pid));
        pod.delete(CID, "").await.unwrap();
    }
    drop(output);
    assert!(pod.log().contains("hung up before it was there, so it is taken back"), "{}", pod.log());
}

/// containerd deletes what it takes for failed, on the same connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_deadline_does_not_cancel_create() {
    let pod = Pod::new().await;
    pod.guest.create_delay_ms.store(500, Ordering::SeqCst);
    let late = pod.create_request(CID, "");
    let expired = pod.task.create(context::with_duration(Duration::from_millis(100)), &late).await;
    assert!(expired.is_err(), "{expired:?}");
    assert_eq!(
        code(pod.task.create(context::Context::default(), &late).await).0,
        Code::ALREADY_EXISTS,
        "it is its caller's still"
    );
    assert_eq!(pod.delete(CID, "").await.unwrap().pid, PID + 100);
    assert_eq!(*pod.daemon.released.lock().unwrap(), [CID]);
}

/// The answer may have arrived or not: a restarted containerd finds the container, and says what becomes of
/// it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answered_create_is_never_taken_back() {
    let pod = Pod::new().await;
    let (dying, end) = connect_mortal(pod.dir.path());
    let request = pod.create_request(CID, "");
    assert_eq!(dying.create(context::Context::default(), &request).await.unwrap().pid, PID + 100);
    end.shutdown(Shutdown::Both).unwrap();
    sleep(Duration::from_millis(300)).await;
    assert_eq!(pod.state(CID, "").await.unwrap().status.enum_value(), Ok(Status::CREATED));
    assert!(pod.daemon.released.lock().unwrap().is_empty());
    pod.delete(CID, "").await.unwrap();
}

/// containerd may be away, and the guest's connection may break: each event arrives once, in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_reach_containerd_whatever_was_away() {
    let pod = Pod::running().await;
    pod.guest.happens(events::created(CID));
    pod.guest.happens(events::resumed(CID));
    sleep(Duration::from_millis(300)).await;
    let socket = pod.dir.path().join("containerd.sock.ttrpc");
    let seen = Arc::new(Events::default());
    let mut containerd = seen.serve(&socket).await;
    pod.guest.happens(events::out_of_memory(CID));
    assert_eq!(seen.wait_for(2).await, ["k8s.io /tasks/create", "k8s.io /tasks/oom"]);

    pod.guest.cut();
    pod.guest.happens(events::exited(CID, CID));
    pod.guest.listen(pod.dir.path()).await;
    assert_eq!(seen.wait_for(3).await[2], "k8s.io /tasks/exit");

    containerd.shutdown().await.unwrap();
    fs::remove_file(&socket).unwrap();
    // Of one that is gone already: containerd is told all the same.
    pod.delete(CID, "").await.unwrap();
    pod.guest.happens(events::deleted(CID));
    sleep(Duration::from_millis(300)).await;
    let _containerd = seen.serve(&socket).await;
    assert_eq!(seen.wait_for(4).await[3], "k8s.io /tasks/delete");
    let log = fs::read_to_string(pod.dir.path().join("relay.log")).unwrap();
    assert!(log.contains("connecting to containerd's "), "{log}");
    assert!(log.contains("containerd refuses the event /tasks/resumed: no"), "{log}");
}

/// Rights that a guest's bytes would have, were they to take over the relay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_relay_has_no_more_rights_than_it_needs() {
    let pod = Pod::running().await;
    let status = fs::read_to_string(format!("/proc/{}/status", pod.relay.id())).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_default().trim().to_owned()
    };
    // DAC_OVERRIDE, KILL, SETGID and SETUID are the bits 1, 5, 6 and 7.
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(field(set), "00000000000000e2", "{set}");
    }
    assert_eq!((field("CapInh"), field("CapAmb")), ("0".repeat(16), "0".repeat(16)));
    assert_eq!(field("NoNewPrivs"), "1");
    let limits = fs::read_to_string(format!("/proc/{}/limits", pod.relay.id())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().collect::<Vec<_>>()[4..6], ["0", "0"]);
}
