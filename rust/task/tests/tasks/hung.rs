//! Runtimes that hang.

use std::{fs, path::Path, sync::Arc, time::Duration};

use vmm_task::{container::NewContainer, error::TaskError, process::Phase};

use crate::host::{Host, process, stdio};

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
pub(crate) async fn hung_create(host: &Host) {
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
    let _ = hung.stats();
    assert!(!creating.is_finished(), "all that happened while the runtime hung");
    // Waits for its turn, and finds nothing then.
    let tasks = Arc::clone(&host.tasks);
    let deleting = tokio::spawn(async move { tasks.delete("hung", "").await });
    let error = creating.await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "OCI runtime create did not end within 8 s and was killed");
    assert!(matches!(deleting.await.unwrap(), Err(TaskError::NotFound(_))));
    gone(&pids).await;
    fs::remove_file(Path::new(&bundle).join("hang")).unwrap();
    other(host, "hung").await;
}

/// A runtime that is killed while it makes a container is an error at once, and leaves nothing.
pub(crate) async fn killed_create(host: &Host) {
    let bundle = host.bundle("killed", "exit 0");
    fs::write(Path::new(&bundle).join("hang"), "").unwrap();
    let tasks = Arc::clone(&host.tasks);
    let new = NewContainer { id: "killed".into(), bundle: bundle.clone(), ..Default::default() };
    let creating = tokio::spawn(async move { tasks.create(new).await });
    let pids = hung_processes(&Path::new(&bundle).join("hung")).await;
    let runtime = rustix::process::Pid::from_raw(pids[0]).unwrap();
    rustix::process::kill_process(runtime, rustix::process::Signal::KILL).unwrap();
    let error = creating.await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "OCI runtime create failed: it was killed by signal 9");
    // What it had started goes with it.
    gone(&pids).await;
    fs::remove_file(Path::new(&bundle).join("hang")).unwrap();
    other(host, "killed").await;
}

/// So does one that hangs while it starts a process; the container's others, and its end, do not wait for it.
pub(crate) async fn hung_exec(host: &Host) {
    host.create("h", "exec sleep 1000").await.unwrap();
    host.tasks.start("h", "").await.unwrap();
    host.tasks.add_exec("h", "x", stdio(), &process("hang")).unwrap();
    let tasks = Arc::clone(&host.tasks);
    let starting = tokio::spawn(async move { tasks.start("h", "x").await });
    let pids = hung_processes(&host.dir.path().join("root/h.hung")).await;
    // What the runtime had started when it hung is in the container's cgroup, for which a folder stands.
    let cgroup = host.dir.path().join("none/kuasar/h");
    fs::create_dir_all(&cgroup).unwrap();
    fs::copy(host.dir.path().join("root/h.started"), cgroup.join("cgroup.procs")).unwrap();
    let started = hung_processes(&cgroup.join("cgroup.procs")).await;
    assert!(Path::new(&format!("/proc/{}", started[0])).exists());
    host.tasks.add_exec("h", "y", stdio(), &process("exit 5")).unwrap();
    host.tasks.start("h", "y").await.unwrap();
    assert_eq!(host.wait("h", "y").await, 5);
    host.tasks.container("h").unwrap().init.kill(9).unwrap();
    assert_eq!(host.wait("h", "").await, 137);
    assert!(!starting.is_finished(), "all that happened while the runtime hung");
    host.tasks.add_exec("h", "late", stdio(), &process("true")).unwrap_err();
    let error = starting.await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "OCI runtime exec did not end within 8 s and was killed");
    assert_eq!(host.wait("h", "x").await, 255);
    gone(&pids).await;
    gone(&started).await;
    fs::remove_dir_all(&cgroup).unwrap();
    assert_eq!(host.tasks.delete("h", "").await.unwrap().1.code, 137);
}
