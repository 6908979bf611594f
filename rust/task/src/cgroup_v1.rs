//! cgroup v1, for pods whose programs know nothing else: one hierarchy for each controller, and no way to ask
//! for all processes to be killed at once, or to be told that none is left.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_shim_protos::cgroups::metrics::{
    BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl, MemoryStat,
    Metrics, PidsStat, Throttle,
};
use protobuf::MessageField;
use rustix::{
    event::{EventfdFlags, eventfd},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

use crate::cgroup::{Flat, MAX_DEPTH, processes, remove_below};

/// Nanoseconds of one of the ticks that `cpuacct.stat` counts (`USER_HZ` is 100 on every architecture).
const TICK: u64 = 10_000_000;
/// A limit that is none: the largest number of pages, in bytes.
const NO_LIMIT: u64 = 0x7fff_ffff_ffff_f000;

/// A cgroup: a folder of the same path in each hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    mounts: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup with this path in the hierarchies that are mounted below a folder.
    #[must_use]
    pub fn new(mounts: &Path, path: &str) -> Self {
        Self { mounts: mounts.to_owned(), path: path.into() }
    }

    fn dir(&self, controller: &str) -> PathBuf {
        self.mounts.join(controller).join(&self.path)
    }

    /// Its folders, in all hierarchies that have it.
    fn dirs(&self) -> Vec<PathBuf> {
        let mounts = fs::read_dir(&self.mounts).into_iter().flatten().flatten();
        mounts.map(|mount| mount.path().join(&self.path)).filter(|dir| dir.is_dir()).collect()
    }

    /// Its processes: the same in every hierarchy, but for one that is just being moved.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let mut pids: Vec<i32> = self.dirs().iter().flat_map(|dir| processes(dir)).collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    pub(crate) fn oom_kills(&self) -> Option<u64> {
        Flat::read(&self.dir("memory").join("memory.oom_control")).map(|file| file.get("oom_kill"))
    }

    /// Kills what is in it, and again what that has started meanwhile, until nothing is left; then removes
    /// it.
    pub(crate) async fn remove(&self, deadline: Duration) -> io::Result<()> {
        let emptied = async {
            loop {
                let pids: Vec<Pid> = self.processes().into_iter().filter_map(Pid::from_raw).collect();
                if pids.is_empty() {
                    return Ok::<(), io::Error>(());
                }
                for pid in pids {
                    // By the time it is opened the number may be another's: who is in the cgroup still is its
                    // own.
                    let Ok(process) = pidfd_open(pid, PidfdFlags::NONBLOCK) else { continue };
                    if self.processes().contains(&pid.as_raw_nonzero().get()) {
                        let _ = pidfd_send_signal(&process, Signal::KILL);
                        ended(process).await?;
                    }
                }
            }
        };
        timeout(deadline, emptied).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        self.dirs().iter().try_for_each(|dir| remove_below(dir, MAX_DEPTH))
    }

    /// Becomes readable whenever the cgroup's memory runs out.
    pub(crate) fn oom_event(&self) -> io::Result<AsyncFd<OwnedFd>> {
        let dir = self.dir("memory");
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let control = File::open(dir.join("memory.oom_control"))?;
        let line = format!("{} {}", event.as_raw_fd(), control.as_raw_fd());
        fs::OpenOptions::new()
            .write(true)
            .open(dir.join("cgroup.event_control"))?
            .write_all(line.as_bytes())?;
        // SAFETY: the descriptor is owned, and closed with the registration and not before.
        Ok(unsafe { AsyncFd::register_with_interest(event, Interest::READABLE) }?)
    }

    /// Everything containerd knows of; `None` if the cgroup is gone.
    pub(crate) fn metrics(&self) -> Option<Metrics> {
        let (cpu, cpuacct) = (self.dir("cpu"), self.dir("cpuacct"));
        let total = number(&cpuacct.join("cpuacct.usage"))?;
        let mut metrics = Metrics::new();
        metrics.cpu = MessageField::some(cpu_stat(total, &cpu, &cpuacct));
        let memory = self.dir("memory");
        if let Some(usage) = entry(&memory, "memory") {
            metrics.memory = MessageField::some(memory_stat(&memory, usage));
            let control = Flat::read(&memory.join("memory.oom_control")).unwrap_or_default();
            let mut oom = MemoryOomControl::new();
            (oom.oom_kill_disable, oom.under_oom) =
                (control.get("oom_kill_disable"), control.get("under_oom"));
            oom.oom_kill = control.get("oom_kill");
            metrics.memory_oom_control = MessageField::some(oom);
        }
        if let Some(current) = number(&self.dir("pids").join("pids.current")) {
            let mut pids = PidsStat::new();
            (pids.current, pids.limit) = (current, number(&self.dir("pids").join("pids.max")).unwrap_or(0));
            metrics.pids = MessageField::some(pids);
        }
        metrics.blkio = blkio(&self.dir("blkio")).into();
        metrics.hugetlb = huge_pages(&self.dir("hugetlb"));
        Some(metrics)
    }
}

/// Ends when a process does.
async fn ended(process: OwnedFd) -> io::Result<()> {
    // SAFETY: the descriptor is owned, and closed with the registration and not before.
    let process = unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) }?;
    drop(process.readable().await?);
    Ok(())
}

/// A file of one number; `max` stands for none.
fn number(path: &Path) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    if text.trim() == "max" { Some(0) } else { text.trim().parse().ok() }
}

fn cpu_stat(total: u64, cpu: &Path, cpuacct: &Path) -> CPUStat {
    let ticks = Flat::read(&cpuacct.join("cpuacct.stat")).unwrap_or_default();
    let mut usage = CPUUsage::new();
    usage.total = total;
    (usage.user, usage.kernel) = (ticks.get("user") * TICK, ticks.get("system") * TICK);
    let each = fs::read_to_string(cpuacct.join("cpuacct.usage_percpu")).unwrap_or_default();
    usage.per_cpu = each.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let file = Flat::read(&cpu.join("cpu.stat")).unwrap_or_default();
    let mut throttling = Throttle::new();
    (throttling.periods, throttling.throttled_periods) = (file.get("nr_periods"), file.get("nr_throttled"));
    throttling.throttled_time = file.get("throttled_time");
    let mut stat = CPUStat::new();
    (stat.usage, stat.throttling) = (MessageField::some(usage), MessageField::some(throttling));
    stat
}

fn memory_stat(dir: &Path, usage: MemoryEntry) -> MemoryStat {
    let file = Flat::read(&dir.join("memory.stat")).unwrap_or_default();
    let mut stat = MemoryStat::new();
    macro_rules! copy {
        ($($field:ident)*) => { $( stat.$field = file.get(stringify!($field)); )* };
    }
    copy!(cache rss rss_huge mapped_file dirty writeback inactive_anon active_anon inactive_file active_file
        unevictable hierarchical_memory_limit total_cache total_rss total_rss_huge total_mapped_file total_dirty
        total_writeback total_inactive_anon total_active_anon total_inactive_file total_active_file total_unevictable);
    // The kernel writes these without the second underscore.
    (stat.pg_pg_in, stat.pg_pg_out) = (file.get("pgpgin"), file.get("pgpgout"));
    (stat.pg_fault, stat.pg_maj_fault) = (file.get("pgfault"), file.get("pgmajfault"));
    (stat.total_pg_pg_in, stat.total_pg_pg_out) = (file.get("total_pgpgin"), file.get("total_pgpgout"));
    (stat.total_pg_fault, stat.total_pg_maj_fault) =
        (file.get("total_pgfault"), file.get("total_pgmajfault"));
    stat.hierarchical_swap_limit = file.get("hierarchical_memsw_limit");
    stat.usage = MessageField::some(usage);
    stat.swap = entry(dir, "memory.memsw").into();
    stat.kernel = entry(dir, "memory.kmem").into();
    stat.kernel_tcp = entry(dir, "memory.kmem.tcp").into();
    stat
}

fn entry(dir: &Path, prefix: &str) -> Option<MemoryEntry> {
    let file = |name: &str| number(&dir.join(format!("{prefix}.{name}")));
    let mut entry = MemoryEntry::new();
    entry.usage = file("usage_in_bytes")?;
    entry.limit = file("limit_in_bytes").filter(|limit| *limit < NO_LIMIT).unwrap_or(u64::MAX);
    entry.max = file("max_usage_in_bytes").unwrap_or(0);
    entry.failcnt = file("failcnt").unwrap_or(0);
    Some(entry)
}

fn blkio(dir: &Path) -> Option<BlkIOStat> {
    let mut stat = BlkIOStat::new();
    stat.io_service_bytes_recursive = io_entries(&dir.join("blkio.throttle.io_service_bytes_recursive"))?;
    stat.io_serviced_recursive = io_entries(&dir.join("blkio.throttle.io_serviced_recursive"))?;
    Some(stat)
}

/// Lines like `8:0 Read 4096`, and a total at the end.
fn io_entries(path: &Path) -> Option<Vec<BlkIOEntry>> {
    let parse = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut entry = BlkIOEntry::new();
        (entry.major, entry.minor) = (major.parse().ok()?, minor.parse().ok()?);
        words.next()?.clone_into(&mut entry.op);
        entry.value = words.next()?.parse().ok()?;
        Some(entry)
    };
    Some(fs::read_to_string(path).ok()?.lines().filter_map(parse).collect())
}

/// Files like `hugetlb.2MB.usage_in_bytes`, one set for each size of pages.
fn huge_pages(dir: &Path) -> Vec<HugetlbStat> {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = files.filter_map(|file| file.file_name().into_string().ok());
    let size = |name: String| {
        let size = name.strip_prefix("hugetlb.")?.strip_suffix(".usage_in_bytes")?;
        (!size.contains('.')).then(|| size.to_owned())
    };
    let mut sizes: Vec<String> = names.filter_map(size).collect();
    sizes.sort();
    let stat = |size: String| {
        let file = |name: &str| number(&dir.join(format!("hugetlb.{size}.{name}"))).unwrap_or(0);
        let mut stat = HugetlbStat::new();
        (stat.usage, stat.max, stat.failcnt) =
            (file("usage_in_bytes"), file("max_usage_in_bytes"), file("failcnt"));
        stat.pagesize = size;
        stat
    };
    sizes.into_iter().map(stat).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_become_metrics() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::new(root.path(), "kuasar/c");
        assert!(cgroup.metrics().is_none() && cgroup.oom_kills().is_none());
        for (name, text) in [
            ("cpuacct/kuasar/c/cpuacct.usage", "7000\n"),
            ("cpuacct/kuasar/c/cpuacct.stat", "user 3\nsystem 4\n"),
            ("cpuacct/kuasar/c/cpuacct.usage_percpu", "3000 4000 \n"),
            ("cpuacct/kuasar/c/cgroup.procs", "9\n5\n"),
            ("cpu/kuasar/c/cpu.stat", "nr_periods 9\nnr_throttled 2\nthrottled_time 5\n"),
            ("cpu/kuasar/c/cgroup.procs", "5\n"),
            ("memory/kuasar/c/memory.usage_in_bytes", "4096\n"),
            ("memory/kuasar/c/memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory/kuasar/c/memory.max_usage_in_bytes", "8192\n"),
            ("memory/kuasar/c/memory.failcnt", "1\n"),
            ("memory/kuasar/c/memory.stat", "cache 1\nrss 2\npgfault 3\ntotal_inactive_file 5\n"),
            ("memory/kuasar/c/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
            ("pids/kuasar/c/pids.current", "3\n"),
            ("pids/kuasar/c/pids.max", "max\n"),
            (
                "blkio/kuasar/c/blkio.throttle.io_service_bytes_recursive",
                "8:0 Read 4096\n8:0 Write 1\nTotal 4097\n",
            ),
            ("blkio/kuasar/c/blkio.throttle.io_serviced_recursive", "8:0 Read 1\n"),
            ("hugetlb/kuasar/c/hugetlb.2MB.usage_in_bytes", "2097152\n"),
            ("hugetlb/kuasar/c/hugetlb.2MB.rsvd.usage_in_bytes", "7\n"),
        ] {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let all = cgroup.metrics().unwrap();
        assert_eq!(
            (all.cpu.usage.total, all.cpu.usage.user, all.cpu.usage.kernel),
            (7000, 3 * TICK, 4 * TICK)
        );
        assert_eq!(
            (all.cpu.usage.per_cpu.as_slice(), all.cpu.throttling.throttled_time),
            (&[3000, 4000][..], 5)
        );
        let usage = &all.memory.usage;
        assert_eq!((usage.usage, usage.limit, usage.max, usage.failcnt), (4096, u64::MAX, 8192, 1));
        assert_eq!((all.memory.cache, all.memory.pg_fault, all.memory.total_inactive_file), (1, 3, 5));
        assert!(all.memory.swap.is_none());
        assert_eq!((all.memory_oom_control.oom_kill, cgroup.oom_kills()), (2, Some(2)));
        assert_eq!((all.pids.current, all.pids.limit), (3, 0));
        let io = &all.blkio.io_service_bytes_recursive;
        assert_eq!((io.len(), io[0].op.as_str(), io[0].value), (2, "Read", 4096));
        assert_eq!((all.hugetlb.len(), all.hugetlb[0].usage), (1, 2_097_152));
        assert_eq!(cgroup.processes(), [5, 9]);
    }
}
