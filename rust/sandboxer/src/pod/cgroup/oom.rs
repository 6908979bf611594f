//! Detects that the host's kernel killed a process of a pod for want of memory, and tells the pod's own limit
//! from the node's memory.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{Cgroups, Given, Place, Version};

impl Cgroups {
    /// Why the host's kernel killed a process of the pod for want of memory; `None` if it did not, or does
    /// not count that. `given` is what limits the cgroup above.
    pub(in crate::pod) fn killed_for_memory(&self, given: &Given) -> Option<String> {
        let place = self.0.iter().find(|place| place.oom_kills() > 0)?;
        let above = place.pod.parent().unwrap_or(&place.pod);
        let why = match given.memory.flatten() {
            Some(bytes) if place.reached_limit(above) => format!(
                "the pod's cgroup {} may use {} MiB, which the guest, its VMM and what runs beside it have used up; give the \
                 pod a RuntimeClass with an overhead, or raise the memory limits of its containers",
                above.strip_prefix(&place.mount).unwrap_or(above).display(),
                bytes >> 20
            ),
            _ => "the node itself has run out of it".to_owned(),
        };
        Some(format!("the host's kernel killed it for want of memory (OOM): {why}"))
    }
}

impl Place {
    /// Processes of the pod that the kernel has killed. Version 1 counts them in their own cgroup, version 2
    /// in those above, too.
    fn oom_kills(&self) -> u64 {
        match self.version {
            Version::V1 => field(self.pod.join("memory.oom_control"), "oom_kill"),
            Version::V2 => field(self.pod.join("memory.events"), "oom_kill"),
        }
    }

    /// Returns true if the memory ran out at a limit.
    fn reached_limit(&self, above: &Path) -> bool {
        match self.version {
            Version::V1 => {
                fs::read_to_string(above.join("memory.failcnt")).is_ok_and(|count| count.trim() != "0")
            }
            Version::V2 => field(above.join("memory.events"), "oom") > 0,
        }
    }
}

/// A number of a file of names and numbers; 0 if it is not there.
fn field(file: PathBuf, name: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok());
    value.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(root: &Path, files: &[(&str, &str)]) {
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    fn said(root: &Path) -> Option<String> {
        let given = Given::of_pod(root, "/kubepods/podu");
        Cgroups::plan(root, "/kubepods/podu", "p1").unwrap().killed_for_memory(&given)
    }

    #[test]
    fn a_kill_at_the_pods_limit_is_told_from_one_of_the_node() {
        for (own, above, limit) in [
            (
                ("memory.events", "oom 3\noom_kill 1\noom_group_kill 0\n"),
                ("memory.events", "oom 3\n"),
                "memory.max",
            ),
            (
                ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
                ("memory.failcnt", "2727\n"),
                "memory.limit_in_bytes",
            ),
        ] {
            let root = tempfile::tempdir().unwrap();
            let v2 = own.0 == "memory.events";
            let mount = if v2 { root.path().to_owned() } else { root.path().join("memory") };
            files(&mount, &[("cgroup.procs", ""), ("kubepods/podu/kuasar-p1/cgroup.procs", "")]);
            if v2 {
                files(&mount, &[("cgroup.controllers", "memory")]);
            }
            assert_eq!(said(root.path()), None);
            let (pod, own_file) =
                (mount.join("kubepods/podu"), mount.join("kubepods/podu/kuasar-p1").join(own.0));
            files(&pod, &[(limit, "134217728\n")]);
            fs::write(&own_file, own.1.replace("kill 1", "kill 0").replace("kill 2", "kill 0")).unwrap();
            assert_eq!(said(root.path()), None, "{own:?}");
            fs::write(&own_file, own.1).unwrap();
            let node = said(root.path()).unwrap();
            assert!(node.ends_with("(OOM): the node itself has run out of it"), "{node}");
            files(&pod, &[above]);
            let own = said(root.path()).unwrap();
            assert!(own.contains("the pod's cgroup kubepods/podu may use 128 MiB, which the guest"), "{own}");
        }
    }
}
