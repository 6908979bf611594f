//! OOM scores of a pod's processes (`oom_score_adj`): the readiness with which the node's kernel kills them
//! when the node runs out of memory.
//!
//! Kubelet gives scores to containers, by their quality of service, and to no pod. The memory of all of them
//! is the VM's, so what they request together counts. Until the first container is there, the class of the
//! pod's cgroup does.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::PoisonError,
};

use super::{Pod, Work};
use crate::container::write_new;

/// The table, in the pod's folder.
const FILE: &str = "oom-scores.json";
/// Score that kubelet gives to containers that request nothing.
const BEST_EFFORT: i64 = 1000;
/// Most of those that request something, and least.
const BURSTABLE: (i64, i64) = (999, 3);
/// Those that request all that they may use. Only the node's own daemons are less.
const GUARANTEED: i64 = -997;

/// Score of each container; on disk, for the next daemon.
#[derive(Debug)]
pub(super) struct OomScores {
    path: PathBuf,
    of_pod: i64,
    of: BTreeMap<String, i64>,
}

impl OomScores {
    /// Those of the pod with this folder; `asked` is what the pod itself asks for, 0 if nothing.
    pub(super) fn new(dir: &Path, cgroup_parent: &str, asked: i64) -> Self {
        let path = dir.join(FILE);
        let of = fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Self { path, of_pod: if asked == 0 { of_class(cgroup_parent) } else { bounded(asked) }, of }
    }

    /// The pod's.
    pub(super) fn of_all(&self) -> i64 {
        let Some(least) = self.of.values().min() else { return self.of_pod };
        // A container's is 1000 less the thousandths of the node that it requests.
        let requested: i64 = self.of.values().map(|score| BEST_EFFORT - score).sum();
        bounded(BEST_EFFORT - requested).max((*least).min(BURSTABLE.1))
    }

    /// Notes one container's, or, without `score`, that it is gone. False if that changes nothing.
    fn set(&mut self, container: &str, score: Option<i64>) -> io::Result<bool> {
        let old = match score {
            Some(score) => self.of.insert(container.to_owned(), bounded(score)),
            None => self.of.remove(container),
        };
        if old == self.of.get(container).copied() {
            return Ok(false);
        }
        write_new(&self.path, &serde_json::to_vec(&self.of)?)?;
        Ok(true)
    }
}

/// By the name that kubelet gives to pods' cgroups; others than kubelet have no classes.
fn of_class(cgroup_parent: &str) -> i64 {
    let has = |class| cgroup_parent.contains(class);
    match () {
        () if !has("kubepods") => 0,
        () if has("besteffort") => BEST_EFFORT,
        () if has("burstable") => BURSTABLE.0,
        () => GUARANTEED,
    }
}

/// No pod is spared like the daemon.
fn bounded(score: i64) -> i64 {
    score.clamp(GUARANTEED, BEST_EFFORT)
}

impl Pod {
    /// Notes what a container's processes are to have, or that it is gone, and has the pod's processes have
    /// what follows.
    pub(super) fn score(&self, container: &str, score: Option<i64>) {
        let set = self.scores.lock().unwrap_or_else(PoisonError::into_inner).set(container, score);
        match set {
            Ok(false) => {}
            Ok(true) => match self.work.try_lock() {
                Ok(work) => self.apply_score(Some(&work)),
                // Those of its cgroup are known without.
                Err(_) => self.apply_score(None),
            },
            Err(error) => tracing::warn!(container, %error, "recording the OOM score of a container"),
        }
    }

    /// Sets it for all processes of the pod. Which of them the kernel kills is not worth failing for.
    #[expect(clippy::disallowed_methods, reason = "a file of the kernel")]
    pub(super) fn apply_score(&self, work: Option<&Work>) {
        let score = self.scores.lock().unwrap_or_else(PoisonError::into_inner).of_all();
        let relay = work.and_then(|work| Some(work.relay.as_ref()?.pid()));
        for pid in self.processes(work) {
            // The relay goes after its VM.
            let score = if Some(pid) == relay { score.saturating_sub(1) } else { score };
            match fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
                // A daemon without CAP_SYS_RESOURCE may not go below the least score that it ever had.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    tracing::debug!(pid, score, %error, "leaving the OOM score of a process of the sandbox");
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(pid, score, %error, "setting the OOM score of a process of the sandbox");
                }
                _ => {}
            }
        }
    }

    /// VMM, companions and relay: what is in the pod's cgroups, and what is known of it.
    fn processes(&self, work: Option<&Work>) -> BTreeSet<u32> {
        let mut pids: BTreeSet<u32> = self.cgroups().map(|cgroups| cgroups.members()).unwrap_or_default();
        if let Some(work) = work {
            let vm = work.vm.iter().map(|vm| vm.record());
            pids.extend(vm.flat_map(|vm| {
                std::iter::once(vm.vmm.pid).chain(vm.companions.into_values().map(|process| process.pid))
            }));
            pids.extend(work.relay.iter().map(|relay| relay.pid()));
        }
        pids
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(cgroup_parent: &str, asked: i64, of: &[i64]) -> i64 {
        let of = of.iter().enumerate().map(|(number, score)| (number.to_string(), *score)).collect();
        let scores = OomScores::new(Path::new("/nonexistent"), cgroup_parent, asked);
        OomScores { of, ..scores }.of_all()
    }

    #[test]
    fn until_a_container_is_there_the_pods_class_counts() {
        for (parent, score) in [
            ("/kubepods/besteffort/podu", 1000),
            ("kubepods-besteffort-podu.slice", 1000),
            ("/kubepods/burstable/podu", 999),
            ("kubepods-burstable-podu.slice", 999),
            ("/kubepods/podu", -997),
            ("kubepods-podu.slice", -997),
            ("/kubelet.slice/kubepods.slice/kubepods-podu.slice", -997),
            ("/k8s.io", 0),
            ("", 0),
        ] {
            assert_eq!(scores(parent, 0, &[]), score, "{parent}");
        }
        assert_eq!(scores("", 700, &[]), 700);
        assert_eq!(scores("", -1000, &[]), -997, "nobody is spared like the daemon");
    }

    #[test]
    fn what_containers_request_together_counts() {
        let burstable = |of: &[i64]| scores("/kubepods/burstable/podu", 0, of);
        assert_eq!(burstable(&[900]), 900);
        // Two that request a tenth of the node each hold a fifth of it in one process.
        assert_eq!(burstable(&[900, 900]), 800);
        assert_eq!(burstable(&[999, 1000]), 999);
        assert_eq!(burstable(&[3, 3]), 3);
        assert_eq!(scores("/kubepods/besteffort/podu", 0, &[1000, 1000]), 1000);
        assert_eq!(scores("/kubepods/podu", 0, &[-997, -997]), -997);
        assert_eq!(scores("", 0, &[900]), 900);
        assert_eq!(scores("", 0, &[-999]), -997);
        assert_eq!(scores("", 0, &[-500]), -500);
    }

    #[test]
    fn the_next_daemon_knows_them() {
        let dir = tempfile::tempdir().unwrap();
        let mut scores = OomScores::new(dir.path(), "", 0);
        assert!(scores.set("a", Some(900)).unwrap() && scores.set("b", Some(950)).unwrap());
        assert!(!scores.set("a", Some(900)).unwrap() && !scores.set("c", None).unwrap());
        assert_eq!(OomScores::new(dir.path(), "", 0).of_all(), 850);
        assert!(scores.set("b", None).unwrap());
        assert_eq!(OomScores::new(dir.path(), "", 0).of_all(), 900);
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert_eq!(OomScores::new(dir.path(), "", 5).of_all(), 5);
    }
}
