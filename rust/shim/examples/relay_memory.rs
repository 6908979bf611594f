//! Memory of many relays at once: idle, then each with a running container, then each after an exec and some
//! output.
//!
//! `relay_memory PROGRAM [COUNT] [streams]`, over fifos or over streams; guests and daemons are not real.
//! Prints kibibytes per relay, from `smaps_rollup`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a bench that cannot go on fails"
)]

#[path = "../tests/fake/mod.rs"]
mod fake;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Child,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use containerd_shim_protos::{api, shim_async::TaskClient};
use fake::{Daemon, Guest, send, stream};
use kuasar_common::stdio::Stream;
use protobuf::{MessageField, well_known_types::any::Any};
use tempfile::TempDir;
use tokio::{net::unix::pipe, time::sleep};
use ttrpc::{asynchronous::Client, asynchronous::Server, context::Context};

struct Pod {
    dir: TempDir,
    guest: Arc<Guest>,
    _daemon: Server,
    relay: Child,
    vmm: Child,
    task: Option<TaskClient>,
    readers: Vec<pipe::Receiver>,
    streams: Vec<tokio::task::JoinHandle<()>>,
}

impl Drop for Pod {
    fn drop(&mut self) {
        for child in [&mut self.relay, &mut self.vmm] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Pod {
    async fn new(program: &Path) -> Self {
        let dir = TempDir::new().unwrap();
        let guest = Guest::serve(dir.path()).await;
        guest.auto_execs.store(true, Ordering::SeqCst);
        let daemon = Arc::new(Daemon::default()).serve(dir.path()).await;
        let (vmm, pidfd) = fake::vmm();
        let log = File::create(dir.path().join("relay.log")).unwrap();
        let relay = fake::spawn_relay(program, dir.path(), Some(&pidfd), log.into());
        Self { dir, guest, _daemon: daemon, relay, vmm, task: None, readers: Vec::new(), streams: Vec::new() }
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.dir.path().join(name);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o700.into(), 0).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Opens a stream, and reads it as containerd does.
    async fn stream(&mut self, id: &str) -> String {
        let mut client = stream::Client::reader(self.dir.path(), id).await;
        self.streams.push(tokio::spawn(async move {
            client.read_to_end(stream::WINDOW, Duration::ZERO).await;
            client.close_send().await;
        }));
        format!("ttrpc+unix://{}/task.sock?streaming_id={id}", self.dir.path().display())
    }

    /// A running container with stdout and stderr, containerd waiting for its end.
    async fn run(&mut self, over_streams: bool) {
        let address = format!("unix://{}/task.sock", self.dir.path().display());
        let task = TaskClient::new(Client::connect(&address).await.unwrap());
        let (stdout, stderr) = if over_streams {
            (self.stream("c-stdout").await, self.stream("c-stderr").await)
        } else {
            let paths = (self.fifo("out"), self.fifo("err"));
            for path in [&paths.0, &paths.1] {
                self.readers.push(pipe::OpenOptions::new().open_receiver(path).unwrap());
            }
            paths
        };
        let request = api::CreateTaskRequest {
            id: "c".into(),
            bundle: "/b".into(),
            stdout,
            stderr,
            ..Default::default()
        };
        task.create(Context::default(), &request).await.unwrap();
        let waiter = task.clone();
        tokio::spawn(async move {
            let request = api::WaitRequest { id: "c".into(), ..Default::default() };
            waiter.wait(Context::default(), &request).await
        });
        let request = api::StartRequest { id: "c".into(), ..Default::default() };
        task.start(Context::default(), &request).await.unwrap();
        self.task = Some(task);
    }

    /// An exec to its end, and a mebibyte of output.
    async fn use_it(&mut self) {
        let task = self.task.clone().unwrap();
        let (id, exec_id) = (String::from("c"), String::from("e"));
        let spec = Any { type_url: "Process".into(), value: vec![b' '; 4096], ..Default::default() };
        let stdout = if self.streams.is_empty() { self.fifo("exec") } else { self.stream("e-stdout").await };
        let request = api::ExecProcessRequest {
            id: id.clone(),
            exec_id: exec_id.clone(),
            stdout,
            spec: MessageField::some(spec),
            ..Default::default()
        };
        task.exec(Context::default(), &request).await.unwrap();
        let request = api::StartRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
        task.start(Context::default(), &request).await.unwrap();
        let request = api::WaitRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
        task.wait(Context::default(), &request).await.unwrap();
        let request = api::DeleteRequest { id, exec_id, ..Default::default() };
        task.delete(Context::default(), &request).await.unwrap();
        let mut conn = self.guest.stream("c", "", Stream::Stdout).await;
        let reader = (!self.readers.is_empty()).then(|| self.readers.remove(0));
        let drain = tokio::spawn(async move {
            let reader = reader?;
            let mut left = 1 << 20;
            let mut chunk = vec![0; 65536];
            while left > 0 {
                reader.readable().await.unwrap();
                left -= reader.try_read(&mut chunk).unwrap_or(0);
            }
            Some(reader)
        });
        for _ in 0..16 {
            send(&mut conn, &[b'x'; 65536]).await;
        }
        self.readers.extend(drain.await.unwrap());
        self.guest.streams.lock().unwrap().insert(("c".into(), String::new(), Stream::Stdout), conn);
    }
}

/// Mean of a field of `smaps_rollup` over all relays, in KiB.
fn mean(pods: &[Pod], field: &str) -> u64 {
    let sum: u64 = pods.iter().map(|pod| kib(pod.relay.id(), field)).sum();
    sum / pods.len() as u64
}

fn kib(pid: u32, field: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find(|line| line.starts_with(&format!("{field}:"))).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn report(what: &str, pods: &[Pod]) {
    let pss = mean(pods, "Pss");
    let max = pods.iter().map(|pod| kib(pod.relay.id(), "Pss")).max().unwrap();
    let (anon, file, rss) = (mean(pods, "Pss_Anon"), mean(pods, "Pss_File"), mean(pods, "Rss"));
    println!("{what:<42} Pss {pss:>5} KiB (max {max}, anonymous {anon}, file {file}), Rss {rss} KiB");
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let mut args = std::env::args().skip(1);
    let program: PathBuf =
        args.next().unwrap_or_else(|| panic!("usage: relay_memory PROGRAM [COUNT] [streams]")).into();
    let count: usize = args.next().map_or(50, |count| count.parse().unwrap());
    let over_streams = args.next().is_some_and(|word| word == "streams");
    let mut pods = Vec::new();
    for _ in 0..count {
        pods.push(Pod::new(&program).await);
    }
    sleep(Duration::from_secs(1)).await;
    println!("{count} relays, {} bytes each on disk", fs::metadata(&program).unwrap().len());
    report("idle", &pods);
    for pod in &mut pods {
        pod.run(over_streams).await;
    }
    sleep(Duration::from_millis(500)).await;
    report("a running container each", &pods);
    for pod in &mut pods {
        pod.use_it().await;
    }
    // Streams give back their room when what they sent counts as read.
    sleep(Duration::from_secs(3)).await;
    report("after an exec and 1 MiB of output each", &pods);
}
