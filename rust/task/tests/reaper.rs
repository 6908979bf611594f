//! The reaper collects every child of its process, so these tests are a program of their own.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::{
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use rustix::process::set_child_subreaper;
use tokio::{sync::watch, time::timeout};
use vmm_task::reaper::{Exit, Reaper};

// Waiting is what the reaper is for.
#[allow(clippy::zombie_processes)]
fn spawn(script: &str) -> i32 {
    let child = Command::new("sh").args(["-c", script]).stdout(Stdio::null()).spawn().unwrap();
    i32::try_from(child.id()).unwrap()
}

/// Processes that end at once, in all and at a time.
const MANY: u32 = 10_000;
const BATCH: u32 = 500;

/// A child that ends with the lowest byte of `n`.
fn fork(n: u32) -> i32 {
    // SAFETY: the child does nothing but end, which is safe whatever other threads of this program were
    // about.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Parent { child } => child.as_raw(),
        // SAFETY: it ends the process, which is all there is to it.
        nix::unistd::ForkResult::Child => unsafe { nix::libc::_exit((n % 256).cast_signed()) },
    }
}

async fn exit(mut exited: watch::Receiver<Option<Exit>>) -> u32 {
    let exit = timeout(Duration::from_secs(20), exited.wait_for(Option::is_some));
    exit.await.expect("the exit was lost").unwrap().unwrap().code
}

/// All in one test: there is one reaper in a process.
#[tokio::test]
async fn no_exit_is_lost() {
    set_child_subreaper(Some(rustix::process::getpid())).unwrap();
    let reaper = Reaper::new();
    tokio::spawn(reaper.start().unwrap());

    // Registered before the exit.
    for (script, code) in [("exit 0", 0), ("exit 42", 42), ("kill -9 $$", 137), ("kill -15 $$", 143)] {
        let guard = reaper.spawning();
        let (sender, exited) = watch::channel(None);
        reaper.watch(spawn(script), Arc::new(sender));
        drop(guard);
        assert_eq!(exit(exited).await, code, "{script}");
    }

    // Ended, and collected, before anybody registered: the guard keeps it.
    let guard = reaper.spawning();
    let pid = spawn("exit 7");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (sender, exited) = watch::channel(None);
    reaper.watch(pid, Arc::new(sender));
    assert_eq!(exited.borrow().unwrap().code, 7);
    drop(guard);

    // Very many short lives, every one with its own code. Half of them are known at once, the others when
    // they have ended.
    for batch in 0..MANY / BATCH {
        let guard = reaper.spawning();
        let (mut waiting, mut unknown) = (Vec::new(), Vec::new());
        for n in batch * BATCH..(batch + 1) * BATCH {
            let (pid, code) = (fork(n), n % 256);
            if n % 2 == 0 {
                let (sender, exited) = watch::channel(None);
                reaper.watch(pid, Arc::new(sender));
                waiting.push((code, exited));
            } else {
                unknown.push((code, pid));
            }
        }
        for (code, exited) in waiting {
            assert_eq!(exit(exited).await, code);
        }
        for (code, pid) in unknown {
            let (sender, exited) = watch::channel(None);
            reaper.watch(pid, Arc::new(sender));
            assert_eq!(exit(exited).await, code);
        }
        drop(guard);
    }

    // An orphan, as a container's process is when its runtime has ended; many of them, side by side.
    let dir = tempfile::tempdir().unwrap();
    let mut waiting = Vec::new();
    let guard = reaper.spawning();
    for n in 0..40 {
        let file = dir.path().join(n.to_string());
        // Half of them live until they are known. setsid has no children to collect, as a shell might.
        let life = if n % 2 == 0 { 0 } else { 1 };
        let (file_name, exit) = (file.display(), format!("sleep {life}; exit {n}"));
        let runtime = format!(
            "setsid --fork sh -c 'echo $$ > {file_name}; {exit}'; while [ ! -s {file_name} ]; do sleep 0.01; done"
        );
        let (sender, exited) = watch::channel(None);
        reaper.watch(spawn(&runtime), Arc::new(sender));
        waiting.push((n, file, exited));
    }
    for (n, file, exited) in waiting {
        assert_eq!(exit(exited).await, 0);
        if n == 0 {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        let orphan = std::fs::read_to_string(file).unwrap().trim().parse().unwrap();
        let (sender, exited) = watch::channel(None);
        reaper.watch(orphan, Arc::new(sender));
        assert_eq!(exit(exited).await, n);
    }
    drop(guard);
}
