use std::collections::BTreeMap;

use prost::Message;

use super::*;
use crate::container::spec::CpuSet;
use crate::protos::{cgroups_v1, cgroups_v2, types::Metric};

/// A tree of plain files with these hierarchies. What the kernel would put into a new cgroup is not there by
/// itself.
fn tree(hierarchies: &[&str]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for name in hierarchies {
        fs::create_dir_all(root.path().join(name)).unwrap();
        fs::write(root.path().join(name).join("cgroup.procs"), "").unwrap();
    }
    root
}

fn unified() -> tempfile::TempDir {
    let root = tree(&["."]);
    fs::write(root.path().join("cgroup.controllers"), "cpu memory").unwrap();
    root
}

#[test]
fn parents_are_paths_or_slices() {
    assert_eq!(below("/kubepods/burstable/podu").unwrap(), Path::new("kubepods/burstable/podu"));
    assert_eq!(
        below("kubepods-burstable-podu.slice").unwrap(),
        Path::new("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podu.slice")
    );
    assert_eq!(below("/a.slice/a-b.slice").unwrap(), Path::new("a.slice/a-b.slice"));
    assert!(below("/../x").unwrap_err().to_string().contains("is no plain path"));
}

#[test]
fn below_a_slice_is_a_scope_and_without_a_parent_there_is_nothing() {
    let root = unified();
    let paths = |parent| Cgroups::plan(root.path(), parent, "p1").unwrap().paths();
    let scope = root.path().join("kubepods.slice/kubepods-podu.slice/kuasar-p1.scope");
    assert_eq!(paths("kubepods-podu.slice").first(), Some(&scope));
    assert_eq!(paths("/kubepods/podu").first(), Some(&root.path().join("kubepods/podu/kuasar-p1")));
    assert_eq!(paths(""), Vec::<PathBuf>::new());
}

#[test]
fn every_hierarchy_of_v1_gets_one_and_all_go() {
    let root = tree(&["cpu", "memory"]);
    fs::create_dir_all(root.path().join("not-one")).unwrap();
    std::os::unix::fs::symlink(root.path().join("cpu"), root.path().join("cpu,cpuacct")).unwrap();
    let cgroups = Cgroups::plan(root.path(), "/kubepods/podu", "p1").unwrap();
    cgroups.create().unwrap();
    let pod = |name: &str| root.path().join(name).join("kubepods/podu/kuasar-p1");
    assert_eq!(
        cgroups.procs(),
        [pod("cpu").join("overhead/cgroup.procs"), pod("memory").join("cgroup.procs")]
    );
    let paths = cgroups.paths();
    assert!(remove_now(&paths).is_none() && remove_now(&paths).is_none());
    assert!(
        root.path().join("cpu/kubepods/podu").is_dir() && !pod("cpu").exists() && !pod("memory").exists()
    );
    // One hierarchy that refuses leaves none in the others.
    fs::remove_dir_all(root.path().join("memory/kubepods")).unwrap();
    fs::write(root.path().join("memory/kubepods"), "").unwrap();
    let error = cgroups.create().unwrap_err().to_string();
    assert!(error.contains("memory/kubepods/podu/kuasar-p1"), "{error}");
    assert!(!pod("cpu").exists());
}

#[test]
fn the_memory_of_a_pod_stays_out_of_the_swap() {
    let root = unified();
    let pod = root.path().join("podu/kuasar-p1");
    fs::create_dir_all(&pod).unwrap();
    fs::write(pod.join("memory.swap.max"), "max").unwrap();
    let cgroups = Cgroups::plan(root.path(), "/podu", "p1").unwrap();
    cgroups.create().unwrap();
    assert_eq!(fs::read_to_string(pod.join("memory.swap.max")).unwrap().get(..1), Some("0"));
}

#[test]
fn processes_of_all_parts_are_its_members() {
    let root = tree(&["cpu", "memory"]);
    let cgroups = Cgroups::plan(root.path(), "/podu", "p1").unwrap();
    cgroups.create().unwrap();
    assert!(cgroups.members().is_empty());
    let pod = |name: &str| root.path().join(name).join("podu/kuasar-p1");
    fs::write(pod("cpu").join("overhead/cgroup.procs"), "7\n0\n").unwrap();
    fs::write(pod("memory").join("cgroup.procs"), "7\n9\n").unwrap();
    assert_eq!(cgroups.members(), [7, 9].into());
}

#[test]
fn cpus_of_the_guest_are_apart_in_v1() {
    let root = tree(&["cpu,cpuacct", "memory"]);
    let cgroups = Cgroups::plan(root.path(), "/podu", "p1").unwrap();
    cgroups.create().unwrap();
    let tasks = root.path().join("cpu,cpuacct/podu/kuasar-p1/vcpu/tasks");
    fs::write(&tasks, "").unwrap();
    cgroups.place_vcpus(&[17]).unwrap();
    assert_eq!(fs::read_to_string(&tasks).unwrap(), "17");
}

fn limits(cpus: &str, huge_pages: &[(&str, u64)]) -> Limits {
    let huge_pages = huge_pages.iter().map(|(size, limit)| ((*size).to_owned(), *limit)).collect();
    Limits { cpus: cpus.into(), mems: String::new(), huge_pages }
}

#[test]
fn sets_of_cpus_reach_all_parts_and_nothing_is_written_without_being_asked_for() {
    let root = tree(&["cpuset"]);
    let cgroups = Cgroups::plan(root.path(), "/podu", "p1").unwrap();
    cgroups.create().unwrap();
    let file = |part: &str| root.path().join("cpuset/podu/kuasar-p1").join(part).join("cpuset.cpus");
    for part in ["", "vcpu", "overhead"] {
        fs::write(file(part), "   ").unwrap();
    }
    cgroups.limit(&limits("", &[])).unwrap();
    assert_eq!(fs::read_to_string(file("vcpu")).unwrap(), "   ");
    cgroups.limit(&limits("0-1", &[])).unwrap();
    for part in ["", "vcpu", "overhead"] {
        assert_eq!(fs::read_to_string(file(part)).unwrap(), "0-1", "{part}");
    }
}

#[test]
fn sets_of_containers_are_those_of_the_guests_cpus_alone() {
    let set = |cpus: &str| CpuSet { cpus: cpus.into(), mems: String::new() };
    for (root, hierarchy, all) in [(unified(), ".", "0-63"), (tree(&["cpuset"]), "cpuset", "0-7")] {
        let cgroups = Cgroups::plan(root.path(), "/podu", "p1").unwrap();
        cgroups.create().unwrap();
        let pod = root.path().join(hierarchy).join("podu/kuasar-p1");
        fs::create_dir_all(pod.join(VCPU)).unwrap();
        // Without the controller, a pod that does not ask for it runs.
        cgroups.confine_vcpus(&set("")).unwrap();
        let error = cgroups.confine_vcpus(&set("2-3")).unwrap_err().to_string();
        assert!(error.starts_with("linux.resources.cpu.cpus is \"2-3\": the pod's cgroup"), "{error}");
        // What the kernel has written there by itself; a file is written over from its start.
        fs::write(pod.join("cpuset.cpus"), "0-7").unwrap();
        for file in ["cpuset.cpus.effective", "cpuset.mems.effective"] {
            fs::write(root.path().join(file), "0-63\n").unwrap();
        }
        let own = pod.join(VCPU).join("cpuset.cpus");
        for (wanted, written) in [("2-3", "2-3"), ("", all)] {
            fs::write(&own, "").unwrap();
            cgroups.confine_vcpus(&set(wanted)).unwrap();
            assert_eq!(fs::read_to_string(&own).unwrap(), written);
        }
        assert_eq!(fs::read_to_string(pod.join("cpuset.cpus")).unwrap(), "0-7");
    }
    Cgroups::default().confine_vcpus(&set("2-3")).unwrap();
}

#[test]
fn what_cannot_be_set_as_a_whole_is_not_set_at_all() {
    let root = tree(&["cpuset"]);
    let cgroups = Cgroups::plan(root.path(), "/podu", "p1").unwrap();
    cgroups.create().unwrap();
    let file = |part: &str| root.path().join("cpuset/podu/kuasar-p1").join(part).join("cpuset.cpus");
    let read = || ["", "vcpu", "overhead"].map(|part| fs::read_to_string(file(part)).unwrap());
    for part in ["", "vcpu", "overhead"] {
        fs::write(file(part), "0-1").unwrap();
    }
    let wanted = Limits { mems: "7".into(), ..limits("2-3", &[]) };
    // A folder can be found, and not be written.
    fs::create_dir(root.path().join("cpuset/podu/kuasar-p1/cpuset.mems")).unwrap();
    let error = cgroups.limit(&wanted).unwrap_err().to_string();
    assert!(error.starts_with("linux.resources.cpuset_mems is \"7\": "), "{error}");
    // (Longer for a moment, and these files are not the kernel's.)
    assert!(read().iter().all(|set| set.starts_with("0-1")), "{:?}", read());
    let changes = cgroups.limit(&limits("2-3", &[])).unwrap();
    assert!(read().iter().all(|set| set.starts_with("2-3")), "{:?}", read());
    changes.undo();
    assert!(read().iter().all(|set| set.starts_with("0-1")), "{:?}", read());
}

#[test]
fn what_no_controller_can_limit_is_an_error_that_names_it() {
    let root = tree(&["memory"]);
    let cgroups = Cgroups::plan(root.path(), "/podu", "p1").unwrap();
    cgroups.create().unwrap();
    let error = cgroups.limit(&limits("0", &[])).unwrap_err().to_string();
    assert!(
        error
            .starts_with("linux.resources.cpuset_cpus is \"0\": the pod's cgroup on this host has no cpuset"),
        "{error}"
    );
    let error = cgroups.limit(&limits("", &[("2MB", 4096)])).unwrap_err().to_string();
    assert!(
        error.contains("hugepage_limits has 4096 bytes of 2MB pages") && error.contains("no hugetlb"),
        "{error}"
    );
    assert!(cgroups.limit(&limits("", &[("../x", 1)])).is_err());
    // Kubelet says 0 for every size that it knows.
    cgroups.limit(&limits("", &[("2MB", 0)])).unwrap();
    let file = root.path().join("memory/podu/kuasar-p1/hugetlb.2MB.limit_in_bytes");
    fs::write(&file, "9223372036854771712").unwrap();
    cgroups.limit(&limits("", &[("2MB", 4096)])).unwrap();
    assert!(fs::read_to_string(&file).unwrap().starts_with("4096"));
    // Without a cgroup of kubelet there is nothing to limit.
    Cgroups::default().limit(&limits("0", &[])).unwrap();
}

fn write_all(folder: &Path, files: &[(&str, &str)]) {
    for (name, text) in files {
        fs::write(folder.join(name), text).unwrap();
    }
}

fn data<M: Message + Default>(metric: Metric, name: &str) -> M {
    let data = metric.data.unwrap();
    assert_eq!((data.type_url.as_str(), metric.id.as_str()), (name, "p1"));
    assert!(metric.timestamp.is_some_and(|time| time.seconds > 1_600_000_000));
    M::decode(data.value.as_slice()).unwrap()
}

#[test]
fn metrics_of_v2() {
    let root = unified();
    let cgroups = Cgroups::plan(root.path(), "/podu", "p1").unwrap();
    assert!(of_cgroups("p1", &cgroups).is_none());
    cgroups.create().unwrap();
    write_all(
        &root.path().join("podu/kuasar-p1"),
        &[
            ("cpu.stat", "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_throttled 2\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 7\ninactive_file 8\npgfault 9\n"),
            ("pids.current", "5\n"),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.rsvd.current", "1\n"),
            ("hugetlb.2MB.max", "max\n"),
        ],
    );
    let metrics: cgroups_v2::Metrics =
        data(of_cgroups("p1", &cgroups).unwrap(), "io.containerd.cgroups.v2.Metrics");
    let (cpu, memory) = (metrics.cpu.unwrap(), metrics.memory.unwrap());
    assert_eq!((cpu.usage_usec, cpu.user_usec, cpu.nr_throttled), (30, 20, 2));
    assert_eq!((memory.usage, memory.usage_limit), (4096, u64::MAX));
    assert_eq!((memory.anon, memory.inactive_file, memory.pgfault), (7, 8, 9));
    assert_eq!(metrics.pids.unwrap().current, 5);
    assert_eq!(
        metrics.hugetlb.iter().map(|huge| (&*huge.pagesize, huge.current)).collect::<Vec<_>>(),
        [("2MB", 2 << 20)]
    );
}

#[test]
fn metrics_of_v1_with_the_unified_hierarchy_beside_it() {
    let root = tree(&["cpuacct", "memory", "pids", "unified"]);
    fs::write(root.path().join("unified/cgroup.controllers"), "hugetlb").unwrap();
    let cgroups = Cgroups::plan(root.path(), "/podu", "p1").unwrap();
    cgroups.create().unwrap();
    let pod = |name: &str| root.path().join(name).join("podu/kuasar-p1");
    write_all(&pod("cpuacct"), &[("cpuacct.usage", "123456789\n"), ("cpuacct.stat", "user 3\nsystem 4\n")]);
    write_all(
        &pod("memory"),
        &[
            ("memory.usage_in_bytes", "4096\n"),
            ("memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory.stat", "rss 1\ntotal_rss 7\ntotal_inactive_file 8\n"),
        ],
    );
    write_all(&pod("pids"), &[("pids.current", "5"), ("pids.max", "max")]);
    write_all(&pod("unified"), &[("hugetlb.2MB.current", "2097152")]);
    let metrics: cgroups_v1::Metrics =
        data(of_cgroups("p1", &cgroups).unwrap(), "io.containerd.cgroups.v1.Metrics");
    let (usage, memory) = (metrics.cpu.unwrap().usage.unwrap(), metrics.memory.unwrap());
    assert_eq!((usage.total, usage.user, usage.kernel), (123_456_789, 30_000_000, 40_000_000));
    assert_eq!((memory.usage.unwrap().usage, memory.total_rss, memory.total_inactive_file), (4096, 7, 8));
    assert_eq!(metrics.pids.unwrap(), cgroups_v1::PidsStat { current: 5, limit: 0 });
    assert_eq!(metrics.hugetlb.first().map(|huge| huge.usage), Some(2 << 20));
}

#[test]
fn metrics_of_processes_that_have_no_cgroup() {
    let metric = of_processes("p1", &[std::process::id(), 0]);
    let metrics: cgroups_v2::Metrics = data(metric, "io.containerd.cgroups.v2.Metrics");
    let memory = metrics.memory.unwrap();
    assert!(memory.usage > 1 << 20 && memory.anon > 0, "{memory:?}");
    assert!(metrics.pids.unwrap().current > 0 && metrics.cpu.is_some());
}

/// The hierarchies that this machine really has; only root may make cgroups in them.
fn real() -> BTreeMap<&'static str, PathBuf> {
    let candidates = [("all of this host's", PathBuf::from(ROOT)), ("v2", Path::new(ROOT).join("unified"))];
    candidates
        .into_iter()
        .filter(|(_, root)| hierarchies(root).is_ok_and(|found| !found.is_empty()))
        .collect()
}

/// A busy process uses CPU time and memory; both within what it can have used by now.
fn counts_what_runs(name: &str, cgroups: &Cgroups) {
    let end = std::time::Instant::now() + Duration::from_secs(10);
    // Without a controller of memory in these hierarchies there is nothing to see of it.
    let counts_memory = cgroups.0.iter().any(|place| {
        ["memory.current", "memory.usage_in_bytes"].iter().any(|file| place.pod.join(file).exists())
    });
    loop {
        let data = of_cgroups("p1", cgroups).unwrap().data.unwrap();
        let (cpu_ns, memory) = if data.type_url.contains(".v1.") {
            let metrics = cgroups_v1::Metrics::decode(data.value.as_slice()).unwrap();
            let usage = metrics.cpu.and_then(|cpu| cpu.usage).map_or(0, |usage| usage.total);
            (usage, metrics.memory.and_then(|memory| memory.usage).map_or(0, |usage| usage.usage))
        } else {
            let metrics = cgroups_v2::Metrics::decode(data.value.as_slice()).unwrap();
            let usage = metrics.cpu.map_or(0, |cpu| cpu.usage_usec * 1000);
            (usage, metrics.memory.map_or(0, |memory| memory.usage))
        };
        if cpu_ns > 1_000_000 && (memory > 0 || !counts_memory) {
            assert!(cpu_ns < 60_000_000_000 && memory < 64 << 20, "{name}: {cpu_ns} ns, {memory} bytes");
            return;
        }
        assert!(std::time::Instant::now() < end, "{name}: {cpu_ns} ns, {memory} bytes");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn runs_where_it_may(name: &str, cgroups: &Cgroups, pid: u32) {
    let allowed = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
        line.trim().to_owned()
    };
    if !cgroups.0.iter().any(|place| place.pod.join(VCPU).join("cpuset.cpus").exists()) {
        eprintln!("skipped: {name} has no cpuset controller");
        return;
    }
    let before = allowed();
    let one = before.split(['-', ',']).next().unwrap();
    cgroups.confine_vcpus(&CpuSet { cpus: one.into(), mems: String::new() }).unwrap();
    assert_eq!(allowed(), one, "{name}");
    cgroups.confine_vcpus(&CpuSet::default()).unwrap();
    assert_eq!(allowed(), before, "{name}");
}

#[tokio::test]
async fn the_kernel_takes_it_threads_apart_and_gives_it_all_back() {
    for (name, root) in real() {
        let parent = format!("/kuasar-test-{}", std::process::id());
        let cgroups = Cgroups::plan(&root, &parent, "p1").unwrap();
        cgroups.create().unwrap();
        let mut spawn = crate::process::Spawn::new("sh");
        spawn.args(["-c", "while :; do :; done"]).cgroup_procs(&cgroups.procs());
        let process = spawn.spawn().unwrap();
        cgroups.place_vcpus(&[process.pid()]).unwrap();
        let of = fs::read_to_string(format!("/proc/{}/cgroup", process.pid())).unwrap();
        let apart = of.lines().filter(|line| line.ends_with("/kuasar-p1/vcpu")).count();
        assert!(apart > 0, "{name}: {of}");
        for place in &cgroups.0 {
            assert!(
                of.contains(&parent) && (place.version == Version::V1 || place.part(VCPU).is_some()),
                "{name}: {of}"
            );
        }
        counts_what_runs(name, &cgroups);
        runs_where_it_may(name, &cgroups, process.pid());
        // Nobody else ends it: as after a start that was interrupted before its processes were written down.
        remove(&cgroups.paths()).await.unwrap();
        assert_eq!(process.wait().await.unwrap(), Some(137), "{name}");
        for place in &cgroups.0 {
            assert!(!place.pod.exists());
            fs::remove_dir(place.pod.parent().unwrap()).unwrap();
        }
    }
}
