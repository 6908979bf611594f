//! Containers' lives with a stand-in for the OCI runtime, which does on the host, without namespaces, what
//! the agent relies on: leave an orphan whose pid is in the pid file, log errors as JSON, pass standard
//! streams on.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod host;
mod hung;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskStart,
};
use host::{Host, process, read_all, stdio};
use hung::{hung_create, hung_exec, killed_create};
use kuasar_common::{constants::STDIO_WANTED, stdio::Stream};
use protobuf::Message;
use tokio::io::AsyncWriteExt;
use vmm_task::{error::TaskError, process::Phase};

/// All in one test: one reaper collects the children of a process.
#[tokio::test]
async fn containers_live() {
    let host = Host::new();
    life(&host).await;
    execs(&host).await;
    failures(&host).await;
    slow_reader(&host).await;
    tokio::join!(hung_create(&host), hung_exec(&host), killed_create(&host));
    assert_eq!(host.leftovers(), Vec::<String>::new());
    assert!(host.tasks.all().is_empty());
}

async fn life(host: &Host) {
    let pid = host.create("c", "echo hello; exit 42").await.unwrap();
    let container = host.tasks.container("c").unwrap();
    assert_eq!((container.init.phase(), container.init.pid_u32()), (Phase::Created, pid));
    let again = host.create_from("c", "/another").await;
    assert!(matches!(again, Err(TaskError::AlreadyExists(_))));
    assert_eq!(container.pids(), [container.init.pid()]);
    assert_eq!(host.tasks.start("c", "").await.unwrap(), pid);
    assert_eq!(host.wait("c", "").await, 42);
    assert_eq!(container.init.phase(), Phase::Stopped);
    assert_eq!(container.namespace, "ns");
    assert!(matches!(host.tasks.start("c", "").await, Err(TaskError::FailedPrecondition(_))));
    assert!(matches!(container.init.kill(9), Err(TaskError::NotFound(_))));
    assert_eq!(read_all(host.connect("c", "", Stream::Stdout)).await, b"hello\n");
    let (deleted, exit) = host.tasks.delete("c", "").await.unwrap();
    assert_eq!((deleted, exit.code), (pid, 42));
    let events = host.events("c").await;
    let topics: Vec<_> = events.iter().map(|event| event.topic.as_str()).collect();
    assert_eq!(topics, ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
    assert!(events.iter().all(|event| event.namespace == "ns"));
    let created = TaskCreate::parse_from_bytes(&events[0].event.value).unwrap();
    assert_eq!(
        (created.pid, created.bundle.as_str(), created.io.stdout.as_str()),
        (pid, &*container.bundle, STDIO_WANTED)
    );
    assert_eq!(TaskStart::parse_from_bytes(&events[1].event.value).unwrap().pid, pid);
    let exited = TaskExit::parse_from_bytes(&events[2].event.value).unwrap();
    assert_eq!((exited.id.as_str(), exited.pid, exited.exit_status), ("c", pid, 42));
    assert!(exited.exited_at.seconds > 1_500_000_000);
    let deleted = TaskDelete::parse_from_bytes(&events[3].event.value).unwrap();
    assert_eq!((deleted.id.as_str(), deleted.pid, deleted.exit_status), ("", pid, 42));
    assert!(matches!(host.tasks.delete("c", "").await, Err(TaskError::NotFound(_))));
}

async fn execs(host: &Host) {
    host.create("e", "exec sleep 1000").await.unwrap();
    host.tasks.start("e", "").await.unwrap();
    for (n, (script, code)) in [("exit 5", 5), ("kill -9 $$", 137), ("true", 0)].into_iter().enumerate() {
        let exec = format!("x{n}");
        host.tasks.add_exec("e", &exec, stdio(), &process(script)).unwrap();
        assert!(host.tasks.start("e", &exec).await.unwrap() > 1);
        assert_eq!(host.wait("e", &exec).await, code, "{script}");
        host.tasks.delete("e", &exec).await.unwrap();
    }

    let nosuch = host.tasks.add_exec("e", "nosuch", stdio(), &process("nosuch"));
    nosuch.unwrap();
    let mut waiting = host.tasks.target("e", "nosuch").unwrap().process().exited();
    let error = host.tasks.start("e", "nosuch").await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "OCI runtime exec failed: exec: nosuch: executable file not found in $PATH"
    );
    assert_eq!(waiting.wait_for(Option::is_some).await.unwrap().unwrap().code, 255);
    assert_eq!(read_all(host.connect("e", "nosuch", Stream::Stdout)).await, b"");
    host.tasks.delete("e", "nosuch").await.unwrap();

    // A wait for what is deleted without having run ends.
    host.tasks.add_exec("e", "never", stdio(), &process("true")).unwrap();
    let again = host.tasks.add_exec("e", "never", stdio(), &process("true"));
    assert!(matches!(again, Err(TaskError::AlreadyExists(_))));
    let mut waiting = host.tasks.target("e", "never").unwrap().process().exited();
    host.tasks.delete("e", "never").await.unwrap();
    assert!(waiting.wait_for(Option::is_some).await.is_err());

    assert!(matches!(host.tasks.delete("e", "").await, Err(TaskError::FailedPrecondition(_))));
    host.tasks.container("e").unwrap().init.kill(15).unwrap();
    assert_eq!(host.wait("e", "").await, 143);
    let late = host.tasks.add_exec("e", "late", stdio(), &process("true"));
    assert!(matches!(late, Err(TaskError::FailedPrecondition(_))));
    host.tasks.delete("e", "").await.unwrap();
    let events = host.events("e").await;
    let topics: Vec<_> = events.iter().map(|event| event.topic.trim_start_matches("/tasks/")).collect();
    let ran = ["exec-added", "exec-started", "exit"];
    // Two that never ran: one failed, one was deleted before.
    let expected =
        [&["create", "start"][..], &ran, &ran, &ran, &["exec-added", "exec-added", "exit", "delete"]]
            .concat();
    assert_eq!(topics, expected);
    let added = TaskExecAdded::parse_from_bytes(&events[2].event.value).unwrap();
    let started = TaskExecStarted::parse_from_bytes(&events[3].event.value).unwrap();
    let exited = TaskExit::parse_from_bytes(&events[4].event.value).unwrap();
    assert_eq!((&*added.exec_id, &*started.exec_id, &*exited.id), ("x0", "x0", "x0"));
    assert_eq!((exited.exit_status, exited.pid), (5, started.pid));
}

async fn failures(host: &Host) {
    let bundle = host.bundle("f", "");
    fs::write(Path::new(&bundle).join("fail"), "mounting x: no such device").unwrap();
    let reader = host.connect("f", "", Stream::Stdout);
    let error = host.create_from("f", &bundle).await.unwrap_err();
    assert_eq!(error.to_string(), "OCI runtime create failed: mounting x: no such device");
    assert_eq!(read_all(reader).await, b"");
    assert!(matches!(host.tasks.container("f"), Err(TaskError::NotFound(_))));
    // Nothing is left of it, so the id is free.
    fs::remove_file(Path::new(&bundle).join("fail")).unwrap();
    assert!(host.events("f").await.is_empty(), "it never was");
    host.create("f", "exit 0").await.unwrap();
    // Never started: deleting kills it.
    assert_eq!(host.tasks.delete("f", "").await.unwrap().1.code, 137);
    // A runtime that cannot delete keeps nothing alive.
    host.create("stuck", "exec sleep 1000").await.unwrap();
    host.tasks.start("stuck", "").await.unwrap();
    let kept = host.dir.path().join("root/stuck");
    fs::create_dir(&kept).unwrap();
    fs::write(kept.join("stuck"), "").unwrap();
    host.tasks.container("stuck").unwrap().init.kill(9).unwrap();
    assert_eq!(host.wait("stuck", "").await, 137);
    host.tasks.delete("stuck", "").await.unwrap();
    assert!(!kept.exists());
    let error = host.create_from("f2", "/nonexistent").await.unwrap_err().to_string();
    assert!(error.contains("/nonexistent/config.json: No such file"), "{error}");
    let bundle = host.bundle("f3", "");
    let hook = r#"{"process":{"args":["x"]},"root":{"path":"rootfs"},"hooks":{"prestart":[{"path":"/opt/gpu/hook"}]}}"#;
    fs::write(Path::new(&bundle).join("config.json"), hook).unwrap();
    let error = host.create_from("f3", &bundle).await.unwrap_err().to_string();
    assert!(
        error.starts_with("hooks.prestart[0] of the container's spec cannot run: /opt/gpu/hook"),
        "{error}"
    );
    assert!(matches!(host.tasks.container("f3"), Err(TaskError::NotFound(_))));
}

/// A client that does not read stops only its own writer.
async fn slow_reader(host: &Host) {
    host.create("slow", "head -c 1000000 /dev/zero; exit 3").await.unwrap();
    host.create("fast", "head -c 1000000 /dev/zero; exit 4").await.unwrap();
    let slow = host.connect("slow", "", Stream::Stdout);
    let fast = host.connect("fast", "", Stream::Stdout);
    host.tasks.start("slow", "").await.unwrap();
    host.tasks.start("fast", "").await.unwrap();
    assert_eq!(read_all(fast).await.len(), 1_000_000);
    assert_eq!(host.wait("fast", "").await, 4);
    assert_eq!(host.tasks.container("slow").unwrap().init.phase(), Phase::Running);
    assert_eq!(read_all(slow).await.len(), 1_000_000);
    assert_eq!(host.wait("slow", "").await, 3);
    let started = Instant::now();
    host.tasks.delete("slow", "").await.unwrap();
    host.tasks.delete("fast", "").await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(20));
    // Input goes to nobody, and is read to its end all the same.
    host.create("in", "cat; exit 6").await.unwrap();
    host.tasks.start("in", "").await.unwrap();
    assert_eq!(host.wait("in", "").await, 6);
    let mut nobody = host.connect("in", "", Stream::Stdin);
    nobody.write_all(b"x").await.unwrap();
    host.tasks.delete("in", "").await.unwrap();
}
