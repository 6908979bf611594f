//! The kernel's counters of a container: cgroup v2 files, read as they are and sent as containerd's metrics.

use std::{fs, path::Path};

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
    RdmaEntry, RdmaStat,
};
use protobuf::MessageField;

use crate::cgroup::Flat;

/// Everything containerd knows of in a cgroup; `None` if the cgroup is gone. Files of controllers that are
/// not enabled leave their part out.
#[must_use]
pub fn read(cgroup: &Path) -> Option<Metrics> {
    let cpu = Flat::read(&cgroup.join("cpu.stat"))?;
    let mut metrics = Metrics::new();
    metrics.cpu = MessageField::some(cpu_stat(cgroup, &cpu));
    if let Some(current) = number(&cgroup.join("memory.current")) {
        metrics.memory = MessageField::some(memory_stat(cgroup, current));
        let events = Flat::read(&cgroup.join("memory.events")).unwrap_or_default();
        metrics.memory_events = MessageField::some(memory_events(&events));
    }
    if let Some(current) = number(&cgroup.join("pids.current")) {
        let mut pids = PidsStat::new();
        pids.current = current;
        pids.limit = number(&cgroup.join("pids.max")).unwrap_or(0);
        metrics.pids = MessageField::some(pids);
    }
    if let Ok(text) = fs::read_to_string(cgroup.join("io.stat")) {
        let mut io = io_stat(&text);
        io.psi = pressure(&cgroup.join("io.pressure"));
        metrics.io = MessageField::some(io);
    }
    metrics.hugetlb = huge_pages(cgroup);
    metrics.rdma = rdma(cgroup).into();
    Some(metrics)
}

/// A file of one number, `max` being the largest.
fn number(path: &Path) -> Option<u64> {
    parse_number(&fs::read_to_string(path).ok()?)
}

fn parse_number(text: &str) -> Option<u64> {
    match text.trim() {
        "max" => Some(u64::MAX),
        text => text.parse().ok(),
    }
}

fn cpu_stat(cgroup: &Path, cpu: &Flat) -> CPUStat {
    let mut stat = CPUStat::new();
    macro_rules! copy {
        ($($field:ident)*) => { $( stat.$field = cpu.get(stringify!($field)); )* };
    }
    copy!(usage_usec user_usec system_usec nr_periods nr_throttled throttled_usec nr_bursts burst_usec);
    stat.psi = pressure(&cgroup.join("cpu.pressure"));
    stat
}

fn memory_stat(cgroup: &Path, current: u64) -> MemoryStat {
    let file = Flat::read(&cgroup.join("memory.stat")).unwrap_or_default();
    let mut stat = MemoryStat::new();
    macro_rules! copy {
        ($($field:ident)*) => { $( stat.$field = file.get(stringify!($field)); )* };
    }
    copy!(anon file kernel_stack slab sock shmem file_mapped file_dirty file_writeback anon_thp inactive_anon
        active_anon inactive_file active_file unevictable slab_reclaimable slab_unreclaimable pgfault pgmajfault
        workingset_nodereclaim pgrefill pgscan pgsteal pgactivate pgdeactivate pglazyfree pglazyfreed
        thp_fault_alloc thp_collapse_alloc);
    // Counted apart for anonymous memory and files since Linux 5.9.
    let both = |name: &str| file.get(&format!("{name}_anon")) + file.get(&format!("{name}_file"));
    stat.workingset_refault = both("workingset_refault");
    stat.workingset_activate = both("workingset_activate");
    let limit = |name: &str| number(&cgroup.join(name)).unwrap_or(0);
    stat.usage = current;
    stat.usage_limit = limit("memory.max");
    stat.max_usage = limit("memory.peak");
    stat.swap_usage = limit("memory.swap.current");
    stat.swap_limit = limit("memory.swap.max");
    stat.swap_max_usage = limit("memory.swap.peak");
    stat.psi = pressure(&cgroup.join("memory.pressure"));
    stat
}

fn memory_events(file: &Flat) -> MemoryEvents {
    let mut events = MemoryEvents::new();
    macro_rules! copy {
        ($($field:ident)*) => { $( events.$field = file.get(stringify!($field)); )* };
    }
    copy!(low high max oom oom_kill oom_group_kill);
    events
}

/// Lines like `some avg10=0.00 avg60=0.12 avg300=0.00 total=345`; none if the kernel does not count pressure.
fn pressure(path: &Path) -> MessageField<PSIStats> {
    let Ok(text) = fs::read_to_string(path) else { return MessageField::none() };
    let mut stats = PSIStats::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let kind = words.next();
        let mut data = PSIData::new();
        for (name, value) in words.filter_map(|word| word.split_once('=')) {
            match name {
                "avg10" => data.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => data.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => data.avg300 = value.parse().unwrap_or(0.0),
                "total" => data.total = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        match kind {
            Some("some") => stats.some = MessageField::some(data),
            Some("full") => stats.full = MessageField::some(data),
            _ => {}
        }
    }
    MessageField::some(stats)
}

/// Lines like `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`.
fn io_stat(text: &str) -> IOStat {
    let mut stat = IOStat::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let device = words.next().and_then(|device| device.split_once(':'));
        let Some((Ok(major), Ok(minor))) = device.map(|(major, minor)| (major.parse(), minor.parse())) else {
            continue;
        };
        let mut entry = IOEntry::new();
        (entry.major, entry.minor) = (major, minor);
        for (name, value) in words.filter_map(|word| word.split_once('=')) {
            let value = value.parse().unwrap_or(0);
            match name {
                "rbytes" => entry.rbytes = value,
                "wbytes" => entry.wbytes = value,
                "rios" => entry.rios = value,
                "wios" => entry.wios = value,
                _ => {}
            }
        }
        stat.usage.push(entry);
    }
    stat
}

/// Files like `hugetlb.2MB.current`, one set for each size of pages.
fn huge_pages(cgroup: &Path) -> Vec<HugeTlbStat> {
    let files = fs::read_dir(cgroup).into_iter().flatten().flatten();
    let names = files.filter_map(|file| file.file_name().into_string().ok());
    let size = |name: String| {
        let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
        // Reservations are counted beside, and not by containerd.
        (!size.contains('.')).then(|| size.to_owned())
    };
    let mut sizes: Vec<String> = names.filter_map(size).collect();
    sizes.sort();
    let stat = |size: String| {
        let file = |name: &str| cgroup.join(format!("hugetlb.{size}.{name}"));
        let mut stat = HugeTlbStat::new();
        stat.current = number(&file("current")).unwrap_or(0);
        stat.max = number(&file("max")).unwrap_or(0);
        stat.failcnt = Flat::read(&file("events")).unwrap_or_default().get("max");
        stat.pagesize = size;
        stat
    };
    sizes.into_iter().map(stat).collect()
}

fn rdma(cgroup: &Path) -> Option<RdmaStat> {
    let entries = |name: &str| fs::read_to_string(cgroup.join(name)).ok().map(|text| rdma_entries(&text));
    let mut stat = RdmaStat::new();
    (stat.current, stat.limit) = (entries("rdma.current")?, entries("rdma.max").unwrap_or_default());
    Some(stat)
}

/// Lines like `mlx4_0 hca_handle=2 hca_object=max`.
fn rdma_entries(text: &str) -> Vec<RdmaEntry> {
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let mut entry = RdmaEntry::new();
        words.next()?.clone_into(&mut entry.device);
        for (name, value) in words.filter_map(|word| word.split_once('=')) {
            let value = u32::try_from(parse_number(value).unwrap_or(0)).unwrap_or(u32::MAX);
            match name {
                "hca_handle" => entry.hca_handles = value,
                "hca_object" => entry.hca_objects = value,
                _ => {}
            }
        }
        Some(entry)
    };
    text.lines().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_become_metrics() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).is_none());
        for (name, text) in [
            (
                "cpu.stat",
                "usage_usec 7\nuser_usec 3\nsystem_usec 4\nnr_periods 9\nnr_throttled 2\nthrottled_usec 5\nnr_bursts 1\n",
            ),
            ("cpu.pressure", "some avg10=1.50 avg60=0.00 avg300=0.25 total=12\nfull avg10=0.00 total=3\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.peak", "8192\n"),
            (
                "memory.stat",
                "anon 1\nfile 2\ninactive_file 5\nfile_thp 9\nworkingset_refault_anon 3\nworkingset_refault_file 4\n",
            ),
            ("memory.events", "low 0\nhigh 0\nmax 2\noom 1\noom_kill 1\noom_group_kill 1\n"),
            ("pids.current", "3\n"),
            ("pids.max", "100\n"),
            ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\nbroken\n"),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.events", "max 6\n"),
            ("hugetlb.2MB.rsvd.current", "7\n"),
            ("hugetlb.1GB.current", "0\n"),
            ("rdma.current", "mlx4_0 hca_handle=2 hca_object=2000\n"),
            ("rdma.max", "mlx4_0 hca_handle=3 hca_object=max\n"),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let all = read(dir.path()).unwrap();
        assert_eq!((all.cpu.usage_usec, all.cpu.system_usec), (7, 4));
        assert_eq!((all.cpu.nr_periods, all.cpu.nr_throttled, all.cpu.throttled_usec), (9, 2, 5));
        assert_eq!((all.cpu.nr_bursts, all.cpu.psi.some.avg10, all.cpu.psi.full.total), (1, 1.5, 3));
        assert!(all.memory.psi.is_none());
        assert_eq!((all.memory.usage, all.memory.usage_limit, all.memory.file), (4096, u64::MAX, 2));
        assert_eq!(
            (all.memory.inactive_file, all.memory.max_usage, all.memory.workingset_refault),
            (5, 8192, 7)
        );
        assert_eq!((all.memory_events.oom_kill, all.memory_events.oom_group_kill), (1, 1));
        assert_eq!((all.pids.current, all.pids.limit), (3, 100));
        assert_eq!(all.io.usage.len(), 1);
        assert_eq!(all.io.usage[0].wbytes, 2);
        let sizes: Vec<_> =
            all.hugetlb.iter().map(|h| (h.pagesize.as_str(), h.current, h.max, h.failcnt)).collect();
        assert_eq!(sizes, [("1GB", 0, 0, 0), ("2MB", 2_097_152, u64::MAX, 6)]);
        assert_eq!((all.rdma.current[0].device.as_str(), all.rdma.current[0].hca_objects), ("mlx4_0", 2000));
        assert_eq!((all.rdma.limit[0].hca_handles, all.rdma.limit[0].hca_objects), (3, u32::MAX));
    }

    #[test]
    fn controllers_that_are_off_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cpu.stat"), "usage_usec 7\n").unwrap();
        let all = read(dir.path()).unwrap();
        assert_eq!(all.cpu.usage_usec, 7);
        assert!(
            all.memory.is_none() && all.memory_events.is_none() && all.pids.is_none() && all.io.is_none()
        );
        assert!(all.rdma.is_none() && all.hugetlb.is_empty());
    }
}
