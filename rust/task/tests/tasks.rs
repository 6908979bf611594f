//! Containers' lives with a stand-in for the OCI runtime, which does on the host, without namespaces, what the agent relies
//! on: leave an orphan whose pid is in the pid file, log errors as JSON, pass standard streams on.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant},
};

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskStart,
};
use kuasar_common::{
    api::sandbox::Envelope,
    constants::STDIO_WANTED,
    stdio::{HEADER, Stream, payload_len},
};
use protobuf::Message;
use rustix::process::set_child_subreaper;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream, duplex};
use vmm_task::{
    container::NewContainer,
    error::TaskError,
    process::Phase,
    reaper::Reaper,
    runc::Runc,
    stdio::{
        process_io::StdioSpec,
        registry::{Key, Registry},
    },
    tasks::{Context, Tasks},
};

/// `create` starts the bundle's `run` script once `start` has made a file; `exec` runs the last word of the process's args.
const RUNTIME: &str = r#"#!/bin/bash
while [ $# -gt 0 ]; do
    case "$1" in
        --root) root=$2; shift ;;
        --log) log=$2; shift ;;
        --log-format) shift ;;
        --bundle) bundle=$2; shift ;;
        --pid-file) pid_file=$2; shift ;;
        --process) process=$2; shift ;;
        --detach|--force|--no-pivot) ;;
        *) words+=("$1") ;;
    esac
    shift
done
id=${words[1]}
fail() { echo "{\"level\":\"error\",\"msg\":\"$1\",\"time\":\"t\"}" >> "$log"; exit 1; }
# With a child, as one that waits for a hook has.
hang() { sleep 1000 & echo $$ $! > "$1"; wait; }
case ${words[0]} in
    create)
        # The agent's bundle names the root file system in the host's, whose scripts stand for it.
        bundle=$(sed 's/.*"path":"\([^"]*\)\/rootfs".*/\1/' "$bundle/config.json")
        [ -e "$bundle/hang" ] && hang "$bundle/hung"
        [ -e "$bundle/fail" ] && fail "$(cat "$bundle/fail")"
        mkfifo "$root/$id.start"
        bash -c "read x < '$root/$id.start'; exec bash '$bundle/run'" &
        echo $! > "$pid_file" ;;
    start) echo > "$root/$id.start" ;;
    exec)
        script=$(sed 's/.*"args":\["\([^"]*\)"\].*/\1/' "$process")
        [ "$script" = nosuch ] && fail 'exec: nosuch: executable file not found in $PATH'
        [ "$script" = hang ] && hang "$root/$id.hung"
        # An orphan at once, whose exit no shell can collect.
        setsid --fork bash -c "echo \$\$ > '$pid_file'; $script"
        while [ ! -s "$pid_file" ]; do sleep 0.01; done
        # Longer than what was started lives: its exit comes before anybody knows it.
        sleep 0.3 ;;
    delete) rm -f "$root/$id.start" "$root/$id.hung" ;;
esac
exit 0
"#;

/// When a runtime that hangs is given up. Everything else here takes a fraction of it.
const HUNG_FOR: Duration = Duration::from_secs(8);

struct Host {
    dir: TempDir,
    tasks: Arc<Tasks>,
    streams: Arc<Registry>,
}

impl Host {
    fn new() -> Self {
        set_child_subreaper(Some(rustix::process::getpid())).unwrap();
        let dir = TempDir::new().unwrap();
        for name in ["root", "work"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let program = dir.path().join("runtime");
        fs::write(&program, RUNTIME).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let reaper = Reaper::new();
        reaper.start().unwrap();
        let streams = Arc::new(Registry::default());
        let context = Context {
            runc: Runc {
                program,
                root: dir.path().join("root"),
                logs: dir.path().join("work"),
                no_pivot: true,
                reaper: Arc::clone(&reaper),
                calls: AtomicU64::new(0),
                deadline: HUNG_FOR,
            },
            reaper,
            events: Arc::default(),
            oom: Arc::default(),
            streams: Arc::clone(&streams),
            work: dir.path().join("work"),
            cgroups: dir.path().join("none"),
        };
        Self { dir, tasks: Arc::new(Tasks::new(Arc::new(context))), streams }
    }

    fn bundle(&self, id: &str, script: &str) -> String {
        let bundle = self.dir.path().join(id);
        fs::create_dir_all(&bundle).unwrap();
        fs::write(bundle.join("config.json"), r#"{"process":{"args":["x"]},"root":{"path":"rootfs"}}"#)
            .unwrap();
        fs::write(bundle.join("run"), script).unwrap();
        bundle.display().to_string()
    }

    async fn create(&self, id: &str, script: &str) -> Result<u32, TaskError> {
        self.create_from(id, &self.bundle(id, script)).await
    }

    async fn create_from(&self, id: &str, bundle: &str) -> Result<u32, TaskError> {
        let new = NewContainer {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            namespace: "ns".to_owned(),
            stdio: stdio(),
        };
        self.tasks.create(new).await
    }

    async fn wait(&self, id: &str, exec: &str) -> u32 {
        let mut exited = self.tasks.target(id, exec).unwrap().process().exited();
        let exit = tokio::time::timeout(Duration::from_secs(20), exited.wait_for(Option::is_some)).await;
        exit.unwrap_or_else(|_| panic!("the exit of {id} {exec} was lost")).unwrap().unwrap().code
    }

    fn connect(&self, id: &str, exec: &str, stream: Stream) -> DuplexStream {
        let (ours, theirs) = duplex(4096);
        let key = Key { container: id.into(), exec: exec.into(), stream };
        self.streams.attach(key, BufReader::new(Box::new(ours))).unwrap();
        theirs
    }

    /// What was published about a container.
    async fn events(&self, id: &str) -> Vec<Envelope> {
        let events = &self.tasks.context.events;
        let mut all = Vec::new();
        let mut last = 0;
        while let Ok(event) = tokio::time::timeout(Duration::ZERO, events.next(Some(last))).await {
            let event = event.unwrap();
            assert_eq!(event.sequence, last + 1);
            last = event.sequence;
            // Field 1 of every event is the container's id.
            if TaskOOM::parse_from_bytes(&event.event.value).unwrap().container_id == id {
                all.push(event);
            }
        }
        all
    }

    fn leftovers(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path().join("work")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

fn stdio() -> StdioSpec {
    StdioSpec { stdout: STDIO_WANTED.into(), ..Default::default() }
}

fn process(script: &str) -> Vec<u8> {
    serde_json::json!({"args": [script], "cwd": "/"}).to_string().into_bytes()
}

async fn read_all(mut stream: DuplexStream) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let mut header = [0; HEADER];
        stream.read_exact(&mut header).await.unwrap();
        let mut payload = vec![0; payload_len(header).unwrap()];
        if payload.is_empty() {
            return all;
        }
        stream.read_exact(&mut payload).await.unwrap();
        all.extend(payload);
    }
}

/// All in one test: one reaper collects the children of a process.
#[tokio::test]
async fn containers_live() {
    let host = Host::new();
    life(&host).await;
    execs(&host).await;
    failures(&host).await;
    slow_reader(&host).await;
    tokio::join!(hung_create(&host), hung_exec(&host));
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
    host.create("e", "sleep 1000").await.unwrap();
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

/// One that does not read stops only whoever writes to it.
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

/// Processes whose numbers the stand-in left in a file, once it has.
async fn hung_processes(file: &Path) -> Vec<i32> {
    loop {
        let text = fs::read_to_string(file).unwrap_or_default();
        if text.ends_with('\n') {
            return text.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn gone(pids: &[i32]) {
    for pid in pids {
        while Path::new(&format!("/proc/{pid}")).exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Another container's whole life.
async fn other(host: &Host, id: &str) {
    host.create(id, "exit 12").await.unwrap();
    host.tasks.start(id, "").await.unwrap();
    assert_eq!(host.wait(id, "").await, 12);
    host.tasks.delete(id, "").await.unwrap();
}

/// A runtime that hangs stops its own container only, and that not for ever.
async fn hung_create(host: &Host) {
    let bundle = host.bundle("hung", "exit 0");
    fs::write(Path::new(&bundle).join("hang"), "").unwrap();
    let tasks = Arc::clone(&host.tasks);
    let new = NewContainer { id: "hung".into(), bundle: bundle.clone(), ..Default::default() };
    let creating = tokio::spawn(async move { tasks.create(new).await });
    let pids = hung_processes(&Path::new(&bundle).join("hung")).await;
    other(host, "other").await;
    // What asks about it is answered meanwhile.
    let hung = host.tasks.container("hung").unwrap();
    assert_eq!((hung.init.phase(), hung.init.pid()), (Phase::Created, 0));
    assert!(matches!(hung.kill_all(9), Err(TaskError::FailedPrecondition(_))));
    let _ = hung.metrics();
    assert!(!creating.is_finished(), "all that happened while the runtime hung");
    let error = creating.await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "OCI runtime create did not end within 8 s and was killed");
    gone(&pids).await;
    fs::remove_file(Path::new(&bundle).join("hang")).unwrap();
    other(host, "hung").await;
}

/// So does one that hangs while it starts a process; the container's others, and its end, do not wait for it.
async fn hung_exec(host: &Host) {
    host.create("h", "sleep 1000").await.unwrap();
    host.tasks.start("h", "").await.unwrap();
    host.tasks.add_exec("h", "x", stdio(), &process("hang")).unwrap();
    let tasks = Arc::clone(&host.tasks);
    let starting = tokio::spawn(async move { tasks.start("h", "x").await });
    let pids = hung_processes(&host.dir.path().join("root/h.hung")).await;
    host.tasks.add_exec("h", "y", stdio(), &process("exit 5")).unwrap();
    host.tasks.start("h", "y").await.unwrap();
    assert_eq!(host.wait("h", "y").await, 5);
    host.tasks.container("h").unwrap().kill_all(9).unwrap();
    assert_eq!(host.wait("h", "").await, 137);
    assert!(!starting.is_finished(), "all that happened while the runtime hung");
    // Its turn comes when the runtime was given up, whoever waits for it.
    let tasks = Arc::clone(&host.tasks);
    let deleting = tokio::spawn(async move { tasks.delete("h", "").await });
    let error = starting.await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "OCI runtime exec did not end within 8 s and was killed");
    assert_eq!(host.wait("h", "x").await, 255);
    gone(&pids).await;
    assert_eq!(deleting.await.unwrap().unwrap().1.code, 137);
}
