//! Very many containers in one virtual machine, and what is left of them: nothing.

use std::time::{Duration, Instant};

use containerd_shim_protos::{api, shim_async::TaskClient};
use serde_json::{Value, json};

use crate::{
    given,
    given::Kind,
    life::futures,
    pod::{Pod, step},
    vm::{Vm, bundle},
};

/// Containers, unless `KUASAR_LOAD` says another number: what an emulated processor does in half a minute.
const CONTAINERS: usize = 40;
/// As many at a time.
const AT_ONCE: usize = 20;
/// A connection that was closed may be noticed, and a cgroup freed, a moment later.
const SETTLED: Duration = Duration::from_secs(20);

/// Most of its own memory that the agent may have then, in KiB.
const MEMORY: u64 = 4096;

/// Run in a container that sees the guest's `/proc` as `/tmp` and its cgroups as `/etc`. Kernel threads,
/// which come and go, have no program.
const COUNT: &str = r#"
cd /tmp
users() { for p in [0-9]*; do [ -n "$(busybox readlink $p/exe)" ] && echo $p; done; }
set -- $(users)
echo processes $#
echo mounts $(wc -l < 1/mountinfo)
echo descriptors $(ls 1/fd | wc -l)
echo namespaces $(for p in $*; do for n in $p/ns/*; do busybox readlink $n; done; done | busybox sort -u | wc -l)
echo cgroups $(busybox find /etc -type d | wc -l)
echo files $(busybox find 1/root/run 1/root/dev/shm | busybox grep -v ^1/root/run/kuasar/state | wc -l)
"#;

#[tokio::test]
#[ignore = "needs a guest: set KUASAR_IMAGE"]
async fn nothing_is_left_of_many_containers() {
    let containers: usize = std::env::var("KUASAR_LOAD")
        .map_or(CONTAINERS, |number| number.parse().expect("KUASAR_LOAD: a number"));
    let given = given();
    let vm = Vm::boot(&given, Kind::InitrdNineP, "task.sharefs_type=9p task.log_level=info", true);
    let task = TaskClient::new(vm.client());
    let pod = Pod { given, vm, task };
    counter(&pod).await;
    // Once before: what is made on first use, and stays, is there when counting begins.
    live(&pod, 0).await;
    let before = count(&pod, "before").await;
    println!("before: {before:?}, the agent's own memory {} KiB", memory(&pod, "m0").await);
    let at = Instant::now();
    for batch in (1..=containers).collect::<Vec<_>>().chunks(AT_ONCE) {
        futures(batch.iter().map(|n| live(&pod, *n))).await;
    }
    step(&format!("{containers} containers, {AT_ONCE} at a time"), at);
    let settled = Instant::now() + SETTLED;
    let mut tries = 0;
    loop {
        let after = count(&pod, &format!("after{tries}")).await;
        if after == before {
            break;
        }
        assert!(Instant::now() < settled, "left: {after:?}\nnot: {before:?}");
        tries += 1;
    }
    let memory = memory(&pod, "m1").await;
    println!("after: the same, the agent's own memory {memory} KiB");
    // Events that nobody fetched, and what the allocator keeps for the next twenty.
    assert!(memory < MEMORY, "the agent has {memory} KiB");
}

/// Memory of the agent that is no file's, in KiB.
async fn memory(pod: &Pod, exec: &str) -> u64 {
    let (status, text) = pod.run("count", exec, &["busybox", "grep", "RssAnon", "/tmp/1/status"]).await;
    assert_eq!(status, 0, "{text}");
    text.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Runs the container that counts.
async fn counter(pod: &Pod) {
    let path = bundle(&pod.given, &pod.vm, "count", &["sleep", "100000"], false);
    let file = pod.vm.shared("count").join("config.json");
    let mut spec: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    for (target, source) in [("/tmp", "/proc"), ("/etc", "/sys/fs/cgroup")] {
        let mount =
            json!({"destination": target, "type": "bind", "source": source, "options": ["rbind", "ro"]});
        spec["mounts"].as_array_mut().unwrap().push(mount);
    }
    std::fs::write(&file, spec.to_string()).unwrap();
    pod.create_from("count", path, false, false).await.unwrap();
    pod.start("count", "").await.unwrap();
}

async fn count(pod: &Pod, exec: &str) -> Vec<String> {
    let capabilities = ["CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", "CAP_DAC_OVERRIDE"];
    let (status, text) = pod.run_with("count", exec, &["sh", "-c", COUNT], &capabilities).await;
    assert_eq!(status, 0, "{text}");
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    // Each is a number, and not nothing.
    assert!(lines.len() == 6 && lines.iter().all(|line| !line.ends_with(" 0")), "{text}");
    lines
}

/// A container's whole life. They share a root file system, as those of a Deployment do.
async fn live(pod: &Pod, n: usize) {
    let id = format!("load{n}");
    let dir = pod.vm.shared(&id);
    std::fs::create_dir_all(&dir).unwrap();
    let spec = std::fs::read(pod.vm.shared("count").join("config.json")).unwrap();
    let mut spec: Value = serde_json::from_slice(&spec).unwrap();
    spec["mounts"].as_array_mut().unwrap().truncate(7);
    spec["linux"]["cgroupsPath"] = format!("/kuasar/{id}").into();
    spec["root"]["readonly"] = true.into();
    std::fs::write(dir.join("config.json"), spec.to_string()).unwrap();
    let path = format!("/run/kuasar/state/{id}");
    let create = api::CreateTaskRequest { id: id.clone(), bundle: path, ..Default::default() };
    let pid = pod.task.create(pod.vm.context(), &create).await.unwrap().pid;
    assert_eq!(pod.start(&id, "").await.unwrap(), pid);
    // An orphan beside it, and a code of its own.
    let code = u32::try_from(n % 200).unwrap() + 1;
    let script = format!("sleep 1000 & echo {n}; exit {code}");
    assert_eq!(pod.run(&id, "x", &["sh", "-c", &script]).await, (code, format!("{n}\n")), "{id}");
    pod.kill(&id, "", 9, true).await.unwrap();
    assert_eq!(pod.wait(&id, "").await.unwrap(), 137, "{id}");
    assert_eq!(pod.delete(&id, "").await.unwrap().pid, pid);
}
