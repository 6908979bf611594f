//! Resources that a pod uses on the host, in containerd's own terms: as its cgroups count them, or without
//! any, as its processes do.

use std::{fs, path::Path, time::SystemTime};

use prost::Message;
use prost_types::Any;

use super::{Cgroups, Place, Version};
use crate::protos::{cgroups_v1 as v1, cgroups_v2 as v2, timestamp, types::Metric};

/// Clock ticks of `/proc/<pid>/stat` in a second: 100 on every Linux that Rust runs on.
const TICK_USEC: u64 = 10_000;

/// Reads the counts of the pod's cgroups; `None` if there are none.
pub(in crate::pod) fn of_cgroups(id: &str, cgroups: &Cgroups) -> Option<Metric> {
    let there: Vec<&Place> = cgroups.0.iter().filter(|place| place.pod.is_dir()).collect();
    if there.iter().any(|place| place.version == Version::V1) {
        return Some(metric(id, "io.containerd.cgroups.v1.Metrics", &metrics_v1(&there)));
    }
    let unified = there.first()?;
    Some(metric(id, "io.containerd.cgroups.v2.Metrics", &metrics_v2(&unified.pod)))
}

/// Sums up the use of these processes; for pods that were given no cgroup.
pub(in crate::pod) fn of_processes(id: &str, pids: &[u32]) -> Metric {
    let mut metrics = v2::Metrics { cpu: Some(v2::CpuStat::default()), ..v2::Metrics::default() };
    let (mut memory, mut tasks) = (v2::MemoryStat::default(), 0_u64);
    let cpu = metrics.cpu.get_or_insert_default();
    for pid in pids {
        let Some(stat) = fs::read(format!("/proc/{pid}/stat")).ok() else { continue };
        let stat = String::from_utf8_lossy(&stat);
        // The second field may hold anything; after its last parenthesis comes the third.
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap_or_default().1.split_whitespace().collect();
        let field = |number: usize| -> u64 {
            fields.get(number.saturating_sub(3)).and_then(|field| field.parse().ok()).unwrap_or(0)
        };
        cpu.user_usec = cpu.user_usec.saturating_add(field(14).saturating_mul(TICK_USEC));
        cpu.system_usec = cpu.system_usec.saturating_add(field(15).saturating_mul(TICK_USEC));
        tasks = tasks.saturating_add(field(20));
        memory.pgfault = memory.pgfault.saturating_add(field(10));
        memory.pgmajfault = memory.pgmajfault.saturating_add(field(12));
        let status = Flat::read(&Path::new("/proc").join(pid.to_string()).join("status"));
        let bytes = |name: &str| status.get(name).saturating_mul(1024);
        memory.usage = memory.usage.saturating_add(bytes("VmRSS:"));
        memory.anon = memory.anon.saturating_add(bytes("RssAnon:"));
        memory.file = memory.file.saturating_add(bytes("RssFile:").saturating_add(bytes("RssShmem:")));
    }
    cpu.usage_usec = cpu.user_usec.saturating_add(cpu.system_usec);
    memory.usage_limit = u64::MAX;
    metrics.memory = Some(memory);
    metrics.pids = Some(v2::PidsStat { current: tasks, limit: 0 });
    metric(id, "io.containerd.cgroups.v2.Metrics", &metrics)
}

fn metric(id: &str, name: &str, data: &impl Message) -> Metric {
    Metric {
        timestamp: Some(timestamp(SystemTime::now())),
        id: id.to_owned(),
        data: Some(Any { type_url: name.to_owned(), value: data.encode_to_vec() }),
    }
}

/// Lines of a name and a number.
#[derive(Default)]
struct Flat(String);

impl Flat {
    fn read(path: &Path) -> Self {
        Self(fs::read_to_string(path).unwrap_or_default())
    }

    fn get(&self, name: &str) -> u64 {
        let mut lines = self.0.lines().map(|line| line.split_whitespace());
        let value = lines.find_map(|mut words| (words.next() == Some(name)).then(|| words.next()));
        value.flatten().and_then(|value| value.parse().ok()).unwrap_or(0)
    }
}

/// A file of one number, `max` being the largest; 0 when it cannot be read.
fn number(path: &Path) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    match text.trim() {
        "max" => u64::MAX,
        text => text.parse().unwrap_or(0),
    }
}

/// Sizes of huge pages that a cgroup counts, by files like `hugetlb.2MB.<suffix>`.
fn page_sizes(pod: &Path, suffix: &str) -> Vec<String> {
    let names = fs::read_dir(pod).into_iter().flatten().flatten();
    let size = |name: &str| {
        let size = name.strip_prefix("hugetlb.")?.strip_suffix(suffix)?.strip_suffix('.')?;
        // Reservations are counted beside, and not by containerd.
        (!size.contains('.')).then(|| size.to_owned())
    };
    let mut sizes: Vec<String> = names.filter_map(|name| size(name.file_name().to_str()?)).collect();
    sizes.sort();
    sizes
}

fn metrics_v2(pod: &Path) -> v2::Metrics {
    let file = |name: &str| pod.join(name);
    let cpu = Flat::read(&file("cpu.stat"));
    let (stat, events) = (Flat::read(&file("memory.stat")), Flat::read(&file("memory.events")));
    let huge = |size: String| v2::HugeTlbStat {
        current: number(&file(&format!("hugetlb.{size}.current"))),
        max: number(&file(&format!("hugetlb.{size}.max"))),
        failcnt: Flat::read(&file(&format!("hugetlb.{size}.events"))).get("max"),
        pagesize: size,
    };
    v2::Metrics {
        pids: Some(v2::PidsStat { current: number(&file("pids.current")), limit: number(&file("pids.max")) }),
        cpu: Some(v2::CpuStat {
            usage_usec: cpu.get("usage_usec"),
            user_usec: cpu.get("user_usec"),
            system_usec: cpu.get("system_usec"),
            nr_periods: cpu.get("nr_periods"),
            nr_throttled: cpu.get("nr_throttled"),
            throttled_usec: cpu.get("throttled_usec"),
        }),
        memory: Some(v2::MemoryStat {
            usage: number(&file("memory.current")),
            usage_limit: number(&file("memory.max")),
            swap_usage: number(&file("memory.swap.current")),
            swap_limit: number(&file("memory.swap.max")),
            max_usage: number(&file("memory.peak")),
            ..memory_v2(&stat)
        }),
        memory_events: Some(v2::MemoryEvents {
            low: events.get("low"),
            high: events.get("high"),
            max: events.get("max"),
            oom: events.get("oom"),
            oom_kill: events.get("oom_kill"),
        }),
        hugetlb: page_sizes(pod, "current").into_iter().map(huge).collect(),
    }
}

fn memory_v2(stat: &Flat) -> v2::MemoryStat {
    v2::MemoryStat {
        anon: stat.get("anon"),
        file: stat.get("file"),
        kernel_stack: stat.get("kernel_stack"),
        slab: stat.get("slab"),
        sock: stat.get("sock"),
        shmem: stat.get("shmem"),
        file_mapped: stat.get("file_mapped"),
        file_dirty: stat.get("file_dirty"),
        file_writeback: stat.get("file_writeback"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        pgfault: stat.get("pgfault"),
        pgmajfault: stat.get("pgmajfault"),
        ..v2::MemoryStat::default()
    }
}

/// Each hierarchy counts its own; which one that is, its files say.
fn metrics_v1(places: &[&Place]) -> v1::Metrics {
    let find = |file: &str| {
        places.iter().map(|place| place.pod.join(file)).find(|path| path.exists()).unwrap_or_default()
    };
    let (usage, throttle) = (Flat::read(&find("cpuacct.stat")), Flat::read(&find("cpu.stat")));
    let ticks = |name: &str| usage.get(name).saturating_mul(TICK_USEC).saturating_mul(1000);
    let stat = Flat::read(&find("memory.stat"));
    let huge = places.iter().flat_map(|place| {
        // With v2, which may be there beside v1, the largest usage so far is not counted.
        let usage = match place.version {
            Version::V1 => "usage_in_bytes",
            Version::V2 => "current",
        };
        let count = move |size: String| v1::HugetlbStat {
            usage: number(&place.pod.join(format!("hugetlb.{size}.{usage}"))),
            max: number(&place.pod.join(format!("hugetlb.{size}.max_usage_in_bytes"))),
            failcnt: number(&place.pod.join(format!("hugetlb.{size}.failcnt"))),
            pagesize: size,
        };
        page_sizes(&place.pod, usage).into_iter().map(count)
    });
    v1::Metrics {
        hugetlb: huge.collect(),
        pids: Some(v1::PidsStat { current: number(&find("pids.current")), limit: limit(&find("pids.max")) }),
        cpu: Some(v1::CpuStat {
            usage: Some(v1::CpuUsage {
                total: number(&find("cpuacct.usage")),
                kernel: ticks("system"),
                user: ticks("user"),
            }),
            throttling: Some(v1::Throttle {
                periods: throttle.get("nr_periods"),
                throttled_periods: throttle.get("nr_throttled"),
                throttled_time: throttle.get("throttled_time"),
            }),
        }),
        memory: Some(v1::MemoryStat {
            usage: Some(v1::MemoryEntry {
                limit: number(&find("memory.limit_in_bytes")),
                usage: number(&find("memory.usage_in_bytes")),
                max: number(&find("memory.max_usage_in_bytes")),
                failcnt: number(&find("memory.failcnt")),
            }),
            ..memory_v1(&stat)
        }),
    }
}

/// cgroup v1's word for unlimited is 0 here.
fn limit(path: &Path) -> u64 {
    match number(path) {
        u64::MAX => 0,
        limit => limit,
    }
}

fn memory_v1(stat: &Flat) -> v1::MemoryStat {
    v1::MemoryStat {
        hierarchical_memory_limit: stat.get("hierarchical_memory_limit"),
        hierarchical_swap_limit: stat.get("hierarchical_memsw_limit"),
        total_cache: stat.get("total_cache"),
        total_rss: stat.get("total_rss"),
        total_rss_huge: stat.get("total_rss_huge"),
        total_mapped_file: stat.get("total_mapped_file"),
        total_dirty: stat.get("total_dirty"),
        total_writeback: stat.get("total_writeback"),
        total_pg_pg_in: stat.get("total_pgpgin"),
        total_pg_pg_out: stat.get("total_pgpgout"),
        total_pg_fault: stat.get("total_pgfault"),
        total_pg_maj_fault: stat.get("total_pgmajfault"),
        total_inactive_anon: stat.get("total_inactive_anon"),
        total_active_anon: stat.get("total_active_anon"),
        total_inactive_file: stat.get("total_inactive_file"),
        total_active_file: stat.get("total_active_file"),
        total_unevictable: stat.get("total_unevictable"),
        usage: None,
    }
}
