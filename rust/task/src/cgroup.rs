//! A container's cgroup: who is in it, and its end. [`Cgroup`] is one of either version; the functions are
//! those of version 2.

use std::{
    fs::{self, File},
    io::{self, Read, Seek},
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_shim_protos::{cgroups, cgroups_v2};
use protobuf::Message;

use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

use crate::{cgroup_v1 as v1, error::TaskError, metrics, spec::CGROUPS};

/// Deepest folders below a container's own that are looked for processes.
pub(crate) const MAX_DEPTH: u32 = 8;
/// Longest time that killed processes may take to be gone.
const EMPTY_DEADLINE: Duration = Duration::from_secs(10);

/// Mounted cgroup hierarchies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hierarchies {
    /// Version 2: one hierarchy, mounted here.
    Unified(PathBuf),
    /// Version 1: one for each controller, mounted in a folder of its name in this one.
    Legacy(PathBuf),
}

/// A container's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cgroup {
    /// Version 2: its folder.
    Unified(PathBuf),
    /// Version 1: a folder in each hierarchy.
    Legacy(v1::Cgroup),
}

/// The kernel's counters of a cgroup, as containerd knows them.
#[derive(Clone, Debug)]
pub enum Stats {
    /// Version 2.
    Unified(Box<cgroups_v2::metrics::Metrics>),
    /// Version 1.
    Legacy(Box<cgroups::metrics::Metrics>),
}

impl Hierarchies {
    /// The cgroup with this path in them.
    #[must_use]
    pub fn cgroup(&self, path: &str) -> Cgroup {
        let path = path.trim_start_matches('/');
        match self {
            Self::Unified(mount) => Cgroup::Unified(mount.join(path)),
            Self::Legacy(mounts) => Cgroup::Legacy(v1::Cgroup::new(mounts, path)),
        }
    }

    /// Lets all containers together have so many processes and threads; 0: any number.
    ///
    /// # Errors
    /// The kernel's.
    pub fn limit_processes(&self, limit: u64) -> Result<(), TaskError> {
        if limit == 0 {
            return Ok(());
        }
        let all = CGROUPS.trim_start_matches('/');
        let dir = match self {
            Self::Unified(mount) => mount.join(all),
            Self::Legacy(mounts) => mounts.join("pids").join(all),
        };
        let doing = || format!("limiting the pod's containers to {limit} processes");
        // With version 1 the first container would make it.
        fs::create_dir_all(&dir).map_err(TaskError::io(doing()))?;
        fs::write(dir.join("pids.max"), limit.to_string()).map_err(TaskError::io(doing()))
    }

    /// Returns true if a container's cgroup has this file, by version 2's names, of which version 1 has none.
    /// The cgroup above has the same controllers, and is there before the container's is.
    #[must_use]
    pub(crate) fn has(&self, file: &str) -> bool {
        let plain = !file.is_empty() && !file.contains(['/', '\0']);
        match self {
            Self::Unified(mount) => plain && mount.join(CGROUPS.trim_start_matches('/')).join(file).is_file(),
            Self::Legacy(_) => false,
        }
    }
}

impl Cgroup {
    /// All processes in it and below it.
    #[must_use]
    pub fn processes(&self) -> Vec<i32> {
        match self {
            Self::Unified(path) => processes(path),
            Self::Legacy(cgroup) => cgroup.processes(),
        }
    }

    /// Kills everything in it at once. False if the kernel cannot.
    #[must_use]
    pub fn kill(&self) -> bool {
        match self {
            Self::Unified(path) => kill(path),
            Self::Legacy(_) => false,
        }
    }

    /// Number of kills in it for want of memory; `None` if the kernel does not count them.
    #[must_use]
    pub fn oom_kills(&self) -> Option<u64> {
        match self {
            Self::Unified(path) => oom_kills(path),
            Self::Legacy(cgroup) => cgroup.oom_kills(),
        }
    }

    /// The kernel's counters of it; `None` if it is gone.
    #[must_use]
    pub fn stats(&self) -> Option<Stats> {
        match self {
            Self::Unified(path) => metrics::read(path).map(Box::new).map(Stats::Unified),
            Self::Legacy(cgroup) => cgroup.metrics().map(Box::new).map(Stats::Legacy),
        }
    }

    /// Kills everything in it and removes it with all below it. No error if there is none.
    ///
    /// # Errors
    /// When something in it does not die.
    pub async fn remove(&self) -> io::Result<()> {
        match self {
            Self::Unified(path) => remove(path).await,
            Self::Legacy(cgroup) => cgroup.remove(EMPTY_DEADLINE).await,
        }
    }
}

impl Stats {
    /// The type's name and its bytes, as containerd wants them.
    ///
    /// # Errors
    /// A defect.
    pub fn encode(&self) -> protobuf::Result<(&'static str, Vec<u8>)> {
        match self {
            Self::Unified(metrics) => Ok(("io.containerd.cgroups.v2.Metrics", metrics.write_to_bytes()?)),
            Self::Legacy(metrics) => Ok(("io.containerd.cgroups.v1.Metrics", metrics.write_to_bytes()?)),
        }
    }
}

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

/// Number of kills in a cgroup or below it for want of memory; `None` if the kernel does not count them.
#[must_use]
pub fn oom_kills(cgroup: &Path) -> Option<u64> {
    Flat::read(&cgroup.join("memory.events")).map(|events| events.get("oom_kill"))
}

/// A file of `name number` lines.
#[derive(Default)]
pub(crate) struct Flat(String);

impl Flat {
    pub(crate) fn read(path: &Path) -> Option<Self> {
        fs::read_to_string(path).ok().map(Self)
    }

    /// The number of a name, 0 if it is missing.
    pub(crate) fn get(&self, name: &str) -> u64 {
        let mut lines = self.0.lines().filter_map(|line| line.split_once(' '));
        lines.find(|(key, _)| *key == name).and_then(|(_, value)| value.trim().parse().ok()).unwrap_or(0)
    }
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

pub(crate) fn remove_below(cgroup: &Path, depth: u32) -> io::Result<()> {
    if let Some(depth) = depth.checked_sub(1) {
        for entry in fs::read_dir(cgroup)?.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                remove_below(&entry.path(), depth)?;
            }
        }
    }
    fs::remove_dir(cgroup)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_of_all_containers_are_limited_together() {
        let dir = tempfile::tempdir().unwrap();
        let read = |file: &str| fs::read_to_string(dir.path().join(file)).ok();
        for (cgroups, file) in [
            (Hierarchies::Unified(dir.path().into()), "kuasar/pids.max"),
            (Hierarchies::Legacy(dir.path().into()), "pids/kuasar/pids.max"),
        ] {
            cgroups.limit_processes(0).unwrap();
            assert_eq!(read(file), None);
            cgroups.limit_processes(1024).unwrap();
            assert_eq!(read(file).as_deref(), Some("1024"));
        }
        let error = Hierarchies::Unified("/proc/none".into()).limit_processes(7).unwrap_err().to_string();
        assert!(error.starts_with("limiting the pod's containers to 7 processes: "), "{error}");
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
