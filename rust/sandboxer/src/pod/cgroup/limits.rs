//! Resources of a pod that the daemon sets in its cgroups: CPUs, memory nodes and huge pages.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use super::{Cgroups, OVERHEAD, Place, VCPU, Version, write};
use crate::container::spec::CpuSet;

/// Values to set; an empty one leaves the cgroup's as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::pod) struct Limits {
    /// As in `0-3,8`.
    pub cpus: String,
    /// Memory nodes, likewise.
    pub mems: String,
    /// Bytes by size of page, as in `2MB`.
    pub huge_pages: BTreeMap<String, u64>,
}

/// Files of cgroups that were written, with what was in them before.
#[derive(Debug, Default)]
pub(in crate::pod) struct Changes(Vec<(PathBuf, String)>);

impl Changes {
    fn write(&mut self, file: &Path, text: &str) -> io::Result<()> {
        let before = fs::read_to_string(file)?;
        write(file, text)?;
        self.0.push((file.to_owned(), before));
        Ok(())
    }

    /// Writes back what was there, in the opposite order: each step was allowed on the way here.
    pub(in crate::pod) fn undo(self) {
        for (file, before) in self.0.into_iter().rev() {
            if let Err(error) = write(&file, &before) {
                tracing::error!(%error, "undoing a change of the sandbox's cgroup");
            }
        }
    }
}

impl Cgroups {
    /// Sets limits; what is asked for and the host has no controller for is an error, and then nothing is
    /// changed.
    pub(in crate::pod) fn limit(&self, limits: &Limits) -> io::Result<Changes> {
        let mut changes = Changes::default();
        if self.0.is_empty() {
            return Ok(changes);
        }
        match self.limit_all(limits, &mut changes) {
            Ok(()) => Ok(changes),
            Err(error) => {
                changes.undo();
                Err(error)
            }
        }
    }

    fn limit_all(&self, limits: &Limits, changes: &mut Changes) -> io::Result<()> {
        for (field, file, set) in
            [("cpuset_cpus", "cpuset.cpus", &limits.cpus), ("cpuset_mems", "cpuset.mems", &limits.mems)]
        {
            if !set.is_empty() {
                self.confine(file, set, changes).map_err(|error| {
                    io::Error::new(error.kind(), format!("linux.resources.{field} is {set:?}: {error}"))
                })?;
            }
        }
        for (size, limit) in &limits.huge_pages {
            self.limit_huge_pages(size, *limit, changes).map_err(|error| {
                let field = format!("linux.resources.hugepage_limits has {limit} bytes of {size} pages");
                io::Error::new(error.kind(), format!("{field}: {error}"))
            })?;
        }
        Ok(())
    }

    fn confine(&self, file: &str, set: &str, changes: &mut Changes) -> io::Result<()> {
        let there = |path: &Path| path.join(file).exists();
        let Some(place) = self.0.iter().find(|place| there(&place.pod)) else {
            return Err(missing("cpuset"));
        };
        let own = place.pod.join(file);
        match place.version {
            // The parts have no sets of their own and follow.
            Version::V2 => changes.write(&own, set),
            // A part's set must lie within the one above it at any time, so that one is widened first and
            // narrowed last.
            Version::V1 => {
                let old = fs::read_to_string(&own)?;
                let both = [old.trim(), set].into_iter().filter(|set| !set.is_empty()).collect::<Vec<_>>();
                changes.write(&own, &both.join(","))?;
                for part in [VCPU, OVERHEAD] {
                    let path = place.pod.join(part).join(file);
                    if path.exists() {
                        changes.write(&path, set)?;
                    }
                }
                changes.write(&own, set)
            }
        }
    }

    /// Has the guest's CPUs use these CPUs and memory nodes; empty: all that the pod may.
    pub(in crate::pod) fn confine_vcpus(&self, set: &CpuSet) -> io::Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        for (field, file, set) in [("cpus", "cpuset.cpus", &set.cpus), ("mems", "cpuset.mems", &set.mems)] {
            let part = |place: &Place| place.pod.join(VCPU).join(file);
            let confined = match self.0.iter().find(|place| part(place).exists()) {
                Some(place) if !set.is_empty() => write(&part(place), set),
                Some(place) => {
                    let all = match place.version {
                        // Where threads are, it cannot be empty again. What the pod may not use does not
                        // count.
                        Version::V2 => place.mount.join(format!("{file}.effective")),
                        Version::V1 => place.pod.join(file),
                    };
                    fs::read_to_string(all).and_then(|all| write(&part(place), all.trim()))
                }
                None if set.is_empty() => Ok(()),
                None => Err(missing("cpuset")),
            };
            confined.map_err(|error| {
                io::Error::new(error.kind(), format!("linux.resources.cpu.{field} is {set:?}: {error}"))
            })?;
        }
        Ok(())
    }

    fn limit_huge_pages(&self, size: &str, limit: u64, changes: &mut Changes) -> io::Result<()> {
        if !size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "that is no size of pages"));
        }
        let files = self.0.iter().map(|place| {
            place.pod.join(match place.version {
                Version::V1 => format!("hugetlb.{size}.limit_in_bytes"),
                Version::V2 => format!("hugetlb.{size}.max"),
            })
        });
        match files.into_iter().find(|file| file.exists()) {
            Some(file) => changes.write(&file, &limit.to_string()),
            // Kubelet says 0 for every size that there is.
            None if limit == 0 => Ok(()),
            None => Err(missing("hugetlb")),
        }
    }
}

fn missing(controller: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        format!(
            "the pod's cgroup on this host has no {controller} controller for it; enable it, or do not ask for this"
        ),
    )
}
