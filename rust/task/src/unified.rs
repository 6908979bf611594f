//! Files of a container's cgroup that its spec names itself (`linux.resources.unified`), as far as this guest
//! has them.
//!
//! They are the host's names: kubelet asks for what the node's kernel knows, and the guest's may know less.
//! The runtime fails on the first one that is not there, so what would change nothing is left out, and the
//! rest is refused by name.

use serde_json::{Map, Value};

use crate::cgroup::Hierarchies;

type Object = Map<String, Value>;

/// Names the host's processors and memory nodes, as `cpu.cpus` and `cpu.mems` do, which the daemon has used
/// already.
const OF_THE_HOST: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];
/// With it the kernel kills a container as a whole for want of memory. Version 1 knows nothing like it, and
/// kubelet asks for it without being asked.
const OOM_GROUP: &str = "memory.oom.group";

/// Leaves of OCI `LinuxResources` only those files that the guest's cgroups have.
///
/// # Errors
/// When one that is not there is to have a value that would change something; says which, and why.
pub(crate) fn fit(resources: &mut Object, cgroups: &Hierarchies) -> Result<(), String> {
    let Some(unified) = resources.get_mut("unified").and_then(Value::as_object_mut) else { return Ok(()) };
    OF_THE_HOST.iter().for_each(|file| drop(unified.remove(*file)));
    let mut refusal = None;
    unified.retain(|file, value| {
        if cgroups.has(file) {
            return true;
        }
        let value = value.as_str().map_or_else(|| value.to_string(), |text| text.trim().to_owned());
        if changes_something(file, &value, cgroups) {
            refusal.get_or_insert_with(|| format!("unified: {file}={value}: {}", why(file, cgroups)));
        } else {
            log::debug!("leaving {file}={value} out, which the VM's kernel does not have");
        }
        false
    });
    if unified.is_empty() {
        resources.remove("unified");
    }
    refusal.map_or(Ok(()), Err)
}

/// Returns true if a container without this file behaves in another way than one with it.
fn changes_something(file: &str, value: &str, cgroups: &Hierarchies) -> bool {
    if file == OOM_GROUP && matches!(cgroups, Hierarchies::Legacy(_)) {
        return false;
    }
    // There is nothing to be had of what the kernel does not know.
    let none_to_be_had = ["memory.swap.", "memory.zswap.", "hugetlb."].iter().any(|of| file.starts_with(of));
    match file.rsplit_once('.').map(|(_, kind)| kind) {
        Some("max" | "high") => value != "max" && !(value == "0" && none_to_be_had),
        // What a file has that nobody has written to.
        Some("min" | "low" | "group" | "idle" | "burst") => value != "0",
        _ => true,
    }
}

/// Why the guest does not have a file, and the way out.
fn why(file: &str, cgroups: &Hierarchies) -> String {
    if matches!(cgroups, Hierarchies::Legacy(_)) {
        return "the VM has cgroups of version 1 (task.cgroup=v1), which have no such file; leave it out, or boot the VM \
                without that word"
            .to_owned();
    }
    if file.starts_with("memory.swap.") || file.starts_with("memory.zswap.") {
        return "the VM's kernel has no swap; ask for 0, on a node whose kubelet gives swap to pods by \
                memorySwap.swapBehavior: NoSwap"
            .to_owned();
    }
    "the VM's kernel has no such file in its cgroups; leave it out, or take a kernel that has it".to_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    /// Cgroups of a guest whose kernel has no swap.
    fn micro() -> (tempfile::TempDir, Hierarchies) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("kuasar")).unwrap();
        for file in
            ["memory.max", "memory.high", "memory.min", "memory.low", "memory.oom.group", "cpuset.cpus"]
        {
            fs::write(dir.path().join("kuasar").join(file), "").unwrap();
        }
        let cgroups = Hierarchies::Unified(dir.path().to_owned());
        (dir, cgroups)
    }

    fn fitted(unified: Value, cgroups: &Hierarchies) -> Result<Value, String> {
        let mut resources = json!({"cpu": {"shares": 2}, "unified": unified});
        fit(resources.as_object_mut().unwrap(), cgroups).map(|()| resources["unified"].take())
    }

    #[test]
    fn what_kubelet_asks_for_on_every_node_starts() {
        let (_dir, cgroups) = micro();
        assert_eq!(fitted(json!({"memory.swap.max": "0"}), &cgroups), Ok(Value::Null));
        // singleProcessOOMKill: false, and the gate MemoryQoS.
        let asked = json!({"memory.swap.max": "0", "memory.oom.group": "1", "memory.min": "0", "memory.low": "67108864",
            "memory.high": "125829120"});
        let mut left = asked.clone();
        left.as_object_mut().unwrap().remove("memory.swap.max");
        assert_eq!(fitted(asked, &cgroups), Ok(left));
    }

    #[test]
    fn what_would_change_nothing_is_left_out() {
        let (_dir, cgroups) = micro();
        for (file, value) in [
            ("memory.swap.max", "max"),
            ("memory.swap.high", "0"),
            ("memory.swap.high", "max\n"),
            ("memory.zswap.max", "0"),
            ("hugetlb.1GB.max", "0"),
            ("hugetlb.1GB.rsvd.max", "0"),
            ("misc.max", "max"),
            ("cpu.idle", "0"),
            ("cpuset.cpus", "0-127"),
            ("cpuset.mems", "1"),
        ] {
            assert_eq!(fitted(json!({file: value}), &cgroups), Ok(Value::Null), "{file}={value}");
        }
    }

    #[test]
    fn what_is_wanted_and_not_there_is_refused_by_name() {
        let (_dir, cgroups) = micro();
        for (file, value, why) in [
            ("memory.swap.max", "1G", "the VM's kernel has no swap; ask for 0"),
            ("memory.swap.high", "52428800", "the VM's kernel has no swap; ask for 0"),
            ("hugetlb.1GB.max", "1073741824", "the VM's kernel has no such file"),
            ("cpu.idle", "1", "the VM's kernel has no such file"),
            ("misc.max", "0", "the VM's kernel has no such file"),
            ("memory.new", "1", "the VM's kernel has no such file"),
            ("../memory.max", "1", "the VM's kernel has no such file"),
            ("kuasar/memory.max", "1", "the VM's kernel has no such file"),
            ("", "1", "the VM's kernel has no such file"),
        ] {
            let error = fitted(json!({file: value, "memory.max": "1"}), &cgroups).unwrap_err();
            assert!(error.starts_with(&format!("unified: {file}={value}: {why}")), "{error}");
        }
        let error = fitted(json!({"cpu.idle": 1}), &cgroups).unwrap_err();
        assert!(error.starts_with("unified: cpu.idle=1: "), "{error}");
    }

    #[test]
    fn cgroups_of_version_1_have_none() {
        let cgroups = Hierarchies::Legacy("/none".into());
        let kubelets = json!({"memory.swap.max": "0", "memory.oom.group": "1", "memory.min": "0"});
        assert_eq!(fitted(kubelets, &cgroups), Ok(Value::Null));
        let error = fitted(json!({"memory.high": "1"}), &cgroups).unwrap_err();
        assert!(error.contains("cgroups of version 1 (task.cgroup=v1)"), "{error}");
    }

    #[test]
    fn resources_without_any_are_left_alone() {
        let (_dir, cgroups) = micro();
        for resources in [json!({}), json!({"unified": null}), json!({"unified": 7})] {
            let mut fitted = resources.clone();
            fit(fitted.as_object_mut().unwrap(), &cgroups).unwrap();
            assert_eq!(fitted, resources);
        }
    }
}
