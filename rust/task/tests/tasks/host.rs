//! Containers on the host, without namespaces, and a stand-in for the OCI runtime.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use containerd_shim_protos::events::task::TaskOOM;
use kuasar_common::{
    api::sandbox::Envelope,
    constants::STDIO_WANTED,
    stdio::{HEADER, Stream, payload_len},
};
use protobuf::Message;
use rustix::process::set_child_subreaper;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, BufReader, DuplexStream, duplex};
use vmm_task::{
    cgroup::Hierarchies,
    container::NewContainer,
    error::TaskError,
    reaper::Reaper,
    runc::{Deadlines, Runc},
    stdio::{
        process_io::StdioSpec,
        registry::{Key, Registry},
    },
    tasks::{Context, Tasks},
};

/// `create` starts the bundle's `run` script once `start` has made a file; `exec` runs the last word of the
/// process's args.
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
        # Hangs when the process is there already, which is not a child of its own.
        if [ "$script" = hang ]; then
            setsid --fork bash -c "echo \$\$ > '$pid_file.new'; mv '$pid_file.new' '$pid_file'; exec sleep 1000"
            while [ ! -s "$pid_file" ]; do sleep 0.01; done
            cp "$pid_file" "$root/$id.started"
            hang "$root/$id.hung"
        fi
        # An orphan at once, whose exit no shell can collect.
        setsid --fork bash -c "echo \$\$ > '$pid_file'; $script"
        while [ ! -s "$pid_file" ]; do sleep 0.01; done
        # Longer than what was started lives: its exit comes before anybody knows it.
        sleep 0.3 ;;
    delete)
        [ -e "$root/$id/stuck" ] && fail 'container is stuck'
        rm -f "$root/$id".* ;;
esac
exit 0
"#;

/// When a runtime that hangs is given up. Everything else here takes a fraction of it.
const HUNG_FOR: Duration = Duration::from_secs(8);

pub(crate) struct Host {
    pub(crate) dir: TempDir,
    pub(crate) tasks: Arc<Tasks>,
    streams: Arc<Registry>,
}

impl Host {
    pub(crate) fn new() -> Self {
        set_child_subreaper(Some(rustix::process::getpid())).unwrap();
        let dir = TempDir::new().unwrap();
        for name in ["root", "work"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let program = dir.path().join("runtime");
        fs::write(&program, RUNTIME).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let reaper = Reaper::new();
        tokio::spawn(reaper.start().unwrap());
        let streams = Arc::new(Registry::default());
        let context = Context {
            runc: Runc {
                program,
                root: dir.path().join("root"),
                logs: dir.path().join("work"),
                no_pivot: true,
                reaper: Arc::clone(&reaper),
                calls: AtomicU64::new(0),
                deadlines: Deadlines { create: HUNG_FOR, delete: HUNG_FOR, other: HUNG_FOR },
                turns: Default::default(),
            },
            reaper,
            events: Arc::default(),
            oom: Arc::default(),
            storages: Arc::default(),
            pids: Default::default(),
            streams: Arc::clone(&streams),
            work: dir.path().join("work"),
            cgroups: Hierarchies::Unified(dir.path().join("none")),
        };
        Self { dir, tasks: Arc::new(Tasks::new(Arc::new(context))), streams }
    }

    pub(crate) fn bundle(&self, id: &str, script: &str) -> String {
        let bundle = self.dir.path().join(id);
        fs::create_dir_all(&bundle).unwrap();
        fs::write(bundle.join("config.json"), r#"{"process":{"args":["x"]},"root":{"path":"rootfs"}}"#)
            .unwrap();
        fs::write(bundle.join("run"), script).unwrap();
        bundle.display().to_string()
    }

    pub(crate) async fn create(&self, id: &str, script: &str) -> Result<u32, TaskError> {
        self.create_from(id, &self.bundle(id, script)).await
    }

    pub(crate) async fn create_from(&self, id: &str, bundle: &str) -> Result<u32, TaskError> {
        let new = NewContainer {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            namespace: "ns".to_owned(),
            stdio: stdio(),
        };
        self.tasks.create(new).await
    }

    pub(crate) async fn wait(&self, id: &str, exec: &str) -> u32 {
        let mut exited = self.tasks.target(id, exec).unwrap().process().exited();
        let exit = tokio::time::timeout(Duration::from_secs(20), exited.wait_for(Option::is_some)).await;
        exit.unwrap_or_else(|_| panic!("the exit of {id} {exec} was lost")).unwrap().unwrap().code
    }

    pub(crate) fn connect(&self, id: &str, exec: &str, stream: Stream) -> DuplexStream {
        let (ours, theirs) = duplex(4096);
        let key = Key { container: id.into(), exec: exec.into(), stream };
        self.streams.attach(key, BufReader::new(Box::new(ours))).unwrap();
        theirs
    }

    /// Returns the events published about a container.
    pub(crate) async fn events(&self, id: &str) -> Vec<Envelope> {
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

    pub(crate) fn leftovers(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path().join("work")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

pub(crate) fn stdio() -> StdioSpec {
    StdioSpec { stdout: STDIO_WANTED.into(), ..Default::default() }
}

pub(crate) fn process(script: &str) -> Vec<u8> {
    serde_json::json!({"args": [script], "cwd": "/"}).to_string().into_bytes()
}

pub(crate) async fn read_all(mut stream: DuplexStream) -> Vec<u8> {
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
