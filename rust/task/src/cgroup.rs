//! What the kernel counts for a container: cgroup v2 files, read as they are and sent as containerd's metrics.

use std::{
    fs::{self, File},
    io::{self, Read, Seek},
    path::Path,
    time::Duration,
};

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use protobuf::MessageField;
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

/// Deepest folders below a container's own that are looked for processes.
const MAX_DEPTH: u32 = 8;
/// How long killed processes may take to be gone.
const EMPTY_DEADLINE: Duration = Duration::from_secs(10);

/// All processes of a cgroup and those below it.
#[must_use]
pub fn processes(cgroup: &Path) -> Vec<i32> {
    let mut pids = Vec::new();
    collect(cgroup, MAX_DEPTH, &mut pids);
    pids
}

fn collect(cgroup: &Path, depth: u32, pids: &mut Vec<i32>) {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
    let Some(depth) = depth.checked_sub(1) else { return };
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), depth, pids);
        }
    }
}

/// Kills everything in a cgroup. False if the kernel cannot.
#[must_use]
pub fn kill(cgroup: &Path) -> bool {
    fs::write(cgroup.join("cgroup.kill"), "1").is_ok()
}

/// Kills everything in a cgroup and removes it with all below it. No error if there is none.
///
/// # Errors
/// When something in it does not die.
pub async fn remove(cgroup: &Path) -> io::Result<()> {
    if !cgroup.exists() {
        return Ok(());
    }
    let _ = kill(cgroup);
    let emptied = timeout(EMPTY_DEADLINE, emptied(cgroup)).await;
    emptied.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    remove_below(cgroup, MAX_DEPTH)
}

/// Ends when no process is left in a cgroup or below it.
async fn emptied(cgroup: &Path) -> io::Result<()> {
    let file = File::open(cgroup.join("cgroup.events"))?;
    // SAFETY: the file owns its descriptor, and is closed with the registration and not before.
    let events = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }?;
    loop {
        // Reading arms the next event.
        let mut text = String::new();
        (&mut events.get_ref()).rewind()?;
        (&mut events.get_ref()).read_to_string(&mut text)?;
        if Flat(text).get("populated") == 0 {
            return Ok(());
        }
        events.ready(Interest::PRIORITY).await?.clear_ready();
    }
}

fn remove_below(cgroup: &Path, depth: u32) -> io::Result<()> {
    if let Some(depth) = depth.checked_sub(1) {
        for entry in fs::read_dir(cgroup)?.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                remove_below(&entry.path(), depth)?;
            }
        }
    }
    fs::remove_dir(cgroup)
}

/// Everything containerd knows of in a cgroup; `None` if the cgroup is gone. Files of controllers that are not enabled
/// leave their part out.
#[must_use]
pub fn metrics(cgroup: &Path) -> Option<Metrics> {
    let cpu = Flat::read(&cgroup.join("cpu.stat"))?;
    let mut metrics = Metrics::new();
    metrics.cpu = MessageField::some(cpu_stat(&cpu));
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
        metrics.io = MessageField::some(io_stat(&text));
    }
    Some(metrics)
}

/// A file of one number, `max` being the largest.
fn number(path: &Path) -> Option<u64> {
    match fs::read_to_string(path).ok()?.trim() {
        "max" => Some(u64::MAX),
        text => text.parse().ok(),
    }
}

/// A file of `name number` lines.
#[derive(Default)]
struct Flat(String);

impl Flat {
    fn read(path: &Path) -> Option<Self> {
        fs::read_to_string(path).ok().map(Self)
    }

    fn get(&self, name: &str) -> u64 {
        let mut lines = self.0.lines().filter_map(|line| line.split_once(' '));
        lines.find(|(key, _)| *key == name).and_then(|(_, value)| value.trim().parse().ok()).unwrap_or(0)
    }
}

fn cpu_stat(cpu: &Flat) -> CPUStat {
    let mut stat = CPUStat::new();
    stat.usage_usec = cpu.get("usage_usec");
    stat.user_usec = cpu.get("user_usec");
    stat.system_usec = cpu.get("system_usec");
    stat.nr_periods = cpu.get("nr_periods");
    stat.nr_throttled = cpu.get("nr_throttled");
    stat.throttled_usec = cpu.get("throttled_usec");
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
        workingset_refault workingset_activate workingset_nodereclaim pgrefill pgscan pgsteal pgactivate
        pgdeactivate pglazyfree pglazyfreed thp_fault_alloc thp_collapse_alloc);
    stat.usage = current;
    stat.usage_limit = number(&cgroup.join("memory.max")).unwrap_or(0);
    stat.swap_usage = number(&cgroup.join("memory.swap.current")).unwrap_or(0);
    stat.swap_limit = number(&cgroup.join("memory.swap.max")).unwrap_or(0);
    stat
}

fn memory_events(file: &Flat) -> MemoryEvents {
    let mut events = MemoryEvents::new();
    events.low = file.get("low");
    events.high = file.get("high");
    events.max = file.get("max");
    events.oom = file.get("oom");
    events.oom_kill = file.get("oom_kill");
    events
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_become_metrics() {
        let dir = tempfile::tempdir().unwrap();
        assert!(metrics(dir.path()).is_none());
        for (name, text) in [
            ("cpu.stat", "usage_usec 7\nuser_usec 3\nsystem_usec 4\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 1\nfile 2\ninactive_file 5\nfile_thp 9\n"),
            ("memory.events", "low 0\nhigh 0\nmax 2\noom 1\noom_kill 1\n"),
            ("pids.current", "3\n"),
            ("pids.max", "100\n"),
            ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\nbroken\n"),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let all = metrics(dir.path()).unwrap();
        assert_eq!((all.cpu.usage_usec, all.cpu.system_usec), (7, 4));
        assert_eq!((all.memory.usage, all.memory.usage_limit, all.memory.file), (4096, u64::MAX, 2));
        assert_eq!(all.memory.inactive_file, 5);
        assert_eq!(all.memory_events.oom_kill, 1);
        assert_eq!((all.pids.current, all.pids.limit), (3, 100));
        assert_eq!(all.io.usage.len(), 1);
        assert_eq!(all.io.usage[0].wbytes, 2);
    }

    #[test]
    fn processes_below_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(dir.path().join("cgroup.procs"), "5\n").unwrap();
        fs::write(dir.path().join("sub/cgroup.procs"), "7\n0\n").unwrap();
        assert_eq!(processes(dir.path()), [5, 7]);
        assert_eq!(processes(&dir.path().join("none")), Vec::<i32>::new());
    }
}
