//! Limits of the cgroup above the pod's own. Kubelet makes that cgroup and sets them before the pod is
//! created.
//!
//! The CRI says the sum of those limits that the pod's containers have. Only the cgroup says whether each of
//! them has one: if not, kubelet leaves it unlimited.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{Version, below, hierarchies};

/// A limit of cgroup v1 that is none: the largest number of pages, in bytes.
const NO_LIMIT: u64 = 0x7fff_ffff_ffff_f000;

/// The limits of a cgroup. In each field `None` is a file that is not there, and `Some(None)` is no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::pod) struct Given {
    /// Bytes.
    pub memory: Option<Option<u64>>,
    /// Microseconds of CPU time, and of the period in which they may be spent.
    pub cpu: Option<Option<(u64, u64)>>,
    /// Processes and threads.
    pub pids: Option<Option<u64>>,
}

impl Given {
    /// As [`Self::read`]. A limit that cannot be read is not known: the step that makes the pod's own cgroup
    /// in there is told why.
    pub(in crate::pod) fn of_pod(root: &Path, parent: &str) -> Self {
        Self::read(root, parent).unwrap_or_else(|error| {
            tracing::debug!(%error, parent, "reading the limits of the pod's cgroup");
            Self::default()
        })
    }

    /// Reads what the cgroup `parent` has in all hierarchies below `root`. One that is not there, or is the
    /// root of its hierarchy, has nothing.
    fn read(root: &Path, parent: &str) -> io::Result<Self> {
        let below = below(parent)?;
        let mut given = Self::default();
        if below.as_os_str().is_empty() {
            return Ok(given);
        }
        for (mount, version) in hierarchies(root)? {
            let dir = mount.join(&below);
            let one = match version {
                Version::V1 => Self::of_v1(&dir),
                Version::V2 => Self::of_v2(&dir),
            };
            given.memory = given.memory.or(one.memory);
            given.cpu = given.cpu.or(one.cpu);
            given.pids = given.pids.or(one.pids);
        }
        Ok(given)
    }

    fn of_v1(dir: &Path) -> Self {
        let quota = text(dir.join("cpu.cfs_quota_us"));
        let period = text(dir.join("cpu.cfs_period_us")).and_then(|period| period.parse().ok());
        Self {
            memory: number(dir.join("memory.limit_in_bytes"))
                .map(|limit| limit.filter(|bytes| *bytes < NO_LIMIT)),
            // No limit is -1.
            cpu: quota.zip(period).map(|(quota, period)| quota.parse().ok().map(|quota| (quota, period))),
            pids: number(dir.join("pids.max")),
        }
    }

    fn of_v2(dir: &Path) -> Self {
        let cpu = text(dir.join("cpu.max")).and_then(|text| {
            let (quota, period) = text.split_once(' ')?;
            Some(quota.parse().ok().zip(period.parse().ok()))
        });
        Self { memory: number(dir.join("memory.max")), cpu, pids: number(dir.join("pids.max")) }
    }
}

fn text(file: PathBuf) -> Option<String> {
    fs::read_to_string(file).ok().map(|text| text.trim().to_owned())
}

/// A file of one number, or `max`.
fn number(file: PathBuf) -> Option<Option<u64>> {
    match text(file)?.as_str() {
        "max" => Some(None),
        number => number.parse().ok().map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn v2(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tree(files);
        fs::write(root.path().join("cgroup.procs"), "").unwrap();
        fs::write(root.path().join("cgroup.controllers"), "cpu memory pids").unwrap();
        root
    }

    #[test]
    fn limits_of_version_2_are_read_where_kubelet_made_them() {
        let root = v2(&[
            ("kubepods.slice/kubepods-podu.slice/memory.max", "301989888\n"),
            ("kubepods.slice/kubepods-podu.slice/cpu.max", "75000 100000\n"),
            ("kubepods.slice/kubepods-podu.slice/pids.max", "1024\n"),
        ]);
        let given = Given::read(root.path(), "kubepods-podu.slice").unwrap();
        let expected = Given {
            memory: Some(Some(288 << 20)),
            cpu: Some(Some((75_000, 100_000))),
            pids: Some(Some(1024)),
        };
        assert_eq!(given, expected);
    }

    #[test]
    fn unlimited_is_not_the_same_as_not_there() {
        let root = v2(&[
            ("kubepods/podu/memory.max", "max\n"),
            ("kubepods/podu/cpu.max", "max 100000\n"),
            ("kubepods/podu/pids.max", "max\n"),
        ]);
        let unlimited = Given { memory: Some(None), cpu: Some(None), pids: Some(None) };
        assert_eq!(Given::read(root.path(), "/kubepods/podu").unwrap(), unlimited);
        for nowhere in ["/kubepods/podv", "/", ""] {
            assert_eq!(Given::read(root.path(), nowhere).unwrap(), Given::default(), "{nowhere:?}");
        }
        assert!(Given::read(root.path(), "/../x").is_err());
    }

    #[test]
    fn limits_of_version_1_are_in_several_hierarchies() {
        let files = |memory: &str, quota: &str| {
            tree(&[
                ("memory/cgroup.procs", ""),
                ("memory/kubepods/podu/memory.limit_in_bytes", memory),
                ("cpu,cpuacct/cgroup.procs", ""),
                ("cpu,cpuacct/kubepods/podu/cpu.cfs_quota_us", quota),
                ("cpu,cpuacct/kubepods/podu/cpu.cfs_period_us", "100000\n"),
                ("pids/cgroup.procs", ""),
                ("pids/kubepods/podu/pids.max", "max\n"),
            ])
        };
        let limited = files("134217728\n", "20000\n");
        let given = Given::read(limited.path(), "/kubepods/podu").unwrap();
        let expected =
            Given { memory: Some(Some(128 << 20)), cpu: Some(Some((20_000, 100_000))), pids: Some(None) };
        assert_eq!(given, expected);
        let unlimited = files("9223372036854771712\n", "-1\n");
        let given = Given::read(unlimited.path(), "/kubepods/podu").unwrap();
        assert_eq!(given, Given { memory: Some(None), cpu: Some(None), pids: Some(None) });
    }

    #[test]
    fn what_is_no_limit_is_not_there() {
        let root = v2(&[("podu/memory.max", "lots"), ("podu/cpu.max", "1"), ("podu/pids.max", "")]);
        assert_eq!(Given::read(root.path(), "/podu").unwrap(), Given::default());
    }
}
