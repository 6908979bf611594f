//! On which of the host's CPUs the guest's run, and on which memory nodes: those of the pod's containers
//! together.
//!
//! Kubelet's CPU manager gives CPUs to containers and not to pods: exclusive ones to some, and what it shares
//! among all others to the rest. The guest's CPUs run whatever container the guest's kernel picks, so they
//! may use what any of them may; one container without a set may use all, and so may they.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::PoisonError,
};

use super::{Pod, PodError};
use crate::container::{StorageError, spec::CpuSet, write_new};

/// The table, in the pod's folder.
const FILE: &str = "cpusets.json";

/// CPUs and memory nodes of each container; on disk, for the next daemon.
#[derive(Debug)]
pub(super) struct CpuSets {
    path: PathBuf,
    of: BTreeMap<String, CpuSet>,
}

impl CpuSets {
    /// Those of the pod with this folder.
    pub(super) fn new(dir: &Path) -> Self {
        let path = dir.join(FILE);
        let of = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).unwrap_or_else(|error| {
                tracing::error!(%error, path = %path.display(), "reading the CPUs of the containers");
                BTreeMap::new()
            }),
            Err(_) => BTreeMap::new(),
        };
        Self { path, of }
    }

    /// All together; a kernel's list may name a CPU twice.
    fn union(&self) -> CpuSet {
        let join = |part: fn(&CpuSet) -> &str| {
            let mut sets: Vec<&str> = self.of.values().map(part).collect();
            sets.sort_unstable();
            sets.dedup();
            if sets.iter().any(|set| set.is_empty()) { String::new() } else { sets.join(",") }
        };
        CpuSet { cpus: join(|set| &set.cpus), mems: join(|set| &set.mems) }
    }

    fn write(&self) -> io::Result<()> {
        write_new(&self.path, &serde_json::to_vec(&self.of)?)
    }
}

impl Pod {
    /// Gives the guest's CPUs what the container needs, or, without `set`, no longer. On error nothing has
    /// changed.
    pub(super) fn pin(&self, container: &str, set: Option<CpuSet>) -> Result<(), StorageError> {
        let mut sets = self.cpusets.lock().unwrap_or_else(PoisonError::into_inner);
        let (old, before, ends) = (sets.of.clone(), sets.union(), set.is_none());
        match set {
            Some(set) => sets.of.insert(container.to_owned(), set),
            None => sets.of.remove(container),
        };
        if sets.of == old {
            return Ok(());
        }
        let now = sets.union();
        let confine = |set: &CpuSet| self.cgroups().and_then(|cgroups| cgroups.confine_vcpus(set));
        let done = if now == before { Ok(()) } else { confine(&now) };
        let written = |sets: &CpuSets| match sets.write() {
            // An end never waits for room on a disk.
            Err(error) if ends => {
                tracing::warn!(%error, container, "recording that a container needs its CPUs no longer");
                Ok(())
            }
            written => written,
        };
        done.and_then(|()| written(&sets)).map_err(|error| {
            sets.of = old;
            if now != before
                && let Err(error) = confine(&before)
            {
                tracing::warn!(%error, "undoing a change of the CPUs that the guest's use");
            }
            StorageError::CpuSet(error)
        })
    }

    /// A container has other resources.
    pub(super) fn update_container(&self, container: &str, resources: &[u8]) -> Result<(), StorageError> {
        let refuse =
            |error: serde_json::Error| StorageError::Refused(format!("the resources to set: {error}"));
        let wanted = CpuSet::take(&mut serde_json::from_slice(resources).map_err(refuse)?);
        let known = self.cpusets.lock().unwrap_or_else(PoisonError::into_inner).of.get(container).cloned();
        // What is not named stays.
        let mut set = known.unwrap_or_default();
        for (part, wanted) in [(&mut set.cpus, wanted.cpus), (&mut set.mems, wanted.mems)] {
            if !wanted.is_empty() {
                *part = wanted;
            }
        }
        self.pin(container, Some(set))
    }

    /// After the pod as a whole was given other CPUs.
    pub(super) fn pin_again(&self) -> Result<(), PodError> {
        let set = self.cpusets.lock().unwrap_or_else(PoisonError::into_inner).union();
        let confined = if set == CpuSet::default() {
            Ok(())
        } else {
            self.cgroups().and_then(|c| c.confine_vcpus(&set))
        };
        confined.map_err(|error| PodError::Refused(format!("updating the sandbox's resources: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sets(of: &[(&str, &str, &str)]) -> CpuSets {
        let set = |cpus: &str, mems: &str| CpuSet { cpus: cpus.into(), mems: mems.into() };
        let of =
            of.iter().map(|(container, cpus, mems)| ((*container).to_owned(), set(cpus, mems))).collect();
        CpuSets { path: PathBuf::new(), of }
    }

    #[test]
    fn guests_use_what_any_container_may_and_all_if_one_may() {
        let union = |of: &[(&str, &str, &str)]| {
            let set = sets(of).union();
            (set.cpus, set.mems)
        };
        let is = |cpus: &str, mems: &str| (cpus.to_owned(), mems.to_owned());
        assert_eq!(union(&[]), is("", ""));
        assert_eq!(union(&[("a", "2-3", "0")]), is("2-3", "0"));
        assert_eq!(
            union(&[("a", "2-3", "0"), ("b", "0,4-7", "0"), ("c", "2-3", "1")]),
            is("0,4-7,2-3", "0,1")
        );
        assert_eq!(union(&[("a", "2-3", "0"), ("b", "", "0")]), is("", "0"));
    }

    #[test]
    fn the_next_daemon_knows_them() {
        let dir = tempfile::tempdir().unwrap();
        let mut known = CpuSets::new(dir.path());
        assert!(known.of.is_empty());
        known.of = sets(&[("a", "2-3", ""), ("b", "", "")]).of;
        known.write().unwrap();
        assert_eq!(CpuSets::new(dir.path()).of, known.of);
        fs::write(dir.path().join(FILE), "torn").unwrap();
        assert!(CpuSets::new(dir.path()).of.is_empty());
    }
}
