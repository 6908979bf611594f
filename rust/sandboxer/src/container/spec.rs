//! Rewrites the OCI spec that containerd made for the host into one that is right inside the pod's VM.
//!
//! A pure function on JSON, so that fields unknown to us survive. The model of the guest: the VM is the pod,
//! so containers use its own network, UTS and IPC namespaces; mount and cgroup namespaces are private to each
//! container, and PID namespaces unless the pod shares one.

use std::path::PathBuf;

use kuasar_common::constants::{GUEST_PID_BASE, GUEST_PID_LIMIT, GUEST_STATE_DIR};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{nodes, volumes};

/// The container and the pod for which a spec is rewritten.
#[derive(Debug)]
pub struct Target<'a> {
    /// Container id.
    pub container: &'a str,
    /// The pid that the daemon reports for the pod; containerd builds namespace paths from it.
    pub pod_pid: u32,
    /// The pod's containers share a PID namespace.
    pub shared_pids: bool,
}

/// A mount of something of the host's, which has to be made there so that the guest sees its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// Its number among those of the container.
    pub name: String,
    /// The host's path.
    pub source: PathBuf,
    /// Path at which the container sees it; for messages.
    pub destination: String,
    /// Nothing in the guest may write to it.
    pub read_only: bool,
    /// With the mounts below it.
    pub recursive: bool,
    /// The file system of a disk, and the options that it is mounted with.
    pub disk: Option<(String, Vec<String>)>,
}

/// A disk of the host that the container gets as a device node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// Path at which the container sees it; for messages.
    pub path: String,
    /// The host's number of it, first half.
    pub major: u64,
    /// And second half.
    pub minor: u64,
    /// The container may only read it.
    pub read_only: bool,
}

/// CPUs and memory nodes of the host that a container may use, as in `0-3,8`; empty: all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CpuSet {
    /// CPUs.
    pub cpus: String,
    /// Memory nodes.
    pub mems: String,
}

impl CpuSet {
    /// Takes them out of OCI resources: the host's numbers mean nothing in the guest.
    pub fn take(resources: &mut Object) -> Self {
        let mut cpu = resources.get_mut("cpu").and_then(Value::as_object_mut);
        let mut take = |name| match cpu.as_mut().and_then(|cpu| cpu.remove(name)) {
            Some(Value::String(set)) => set.trim().to_owned(),
            _ => String::new(),
        };
        Self { cpus: take("cpus"), mems: take("mems") }
    }
}

/// Things that the host has to make for a rewritten spec.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Bind mounts to make before the guest reads it.
    pub binds: Vec<Bind>,
    /// Disks to plug in.
    pub devices: Vec<BlockDevice>,
    /// CPUs and memory nodes of the host that the guest's CPUs use while they are this container's.
    pub cpuset: CpuSet,
}

/// A demand of a container that a VM cannot meet. One sentence: the field, the reason, the way out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The spec is no spec.
    #[error("reading the container's spec: {0}")]
    Malformed(String),
    /// Understood, and not possible.
    #[error("{field} of the container's spec: {why}")]
    Refused {
        /// Path of the field in the spec.
        field: String,
        /// Reason and way out.
        why: String,
    },
}

pub(super) fn refused(field: impl Into<String>, why: impl Into<String>) -> SpecError {
    SpecError::Refused { field: field.into(), why: why.into() }
}

pub(crate) type Object = Map<String, Value>;

/// Rewrites `spec` in place and returns what the host has to make for it.
///
/// # Errors
/// When the spec asks for something that a container in a VM cannot have.
pub fn rewrite(spec: &mut Value, target: &Target) -> Result<Needs, SpecError> {
    let spec = spec.as_object_mut().ok_or_else(|| SpecError::Malformed("it is not a JSON object".into()))?;
    let read_only_root = set_root(spec, target)?;
    // The UTS namespace is the pod's; runc refuses a hostname without one of the container's own.
    spec.remove("hostname");
    spec.remove("domainname");
    // Hooks stay: the agent refuses those whose programs the guest does not have, which only it can know.
    if let Some(process) = spec.get_mut("process").and_then(Value::as_object_mut) {
        check_profile(process)?;
        clear_labels(process);
    }
    let linux = spec.entry("linux").or_insert_with(|| json!({}));
    let linux = linux.as_object_mut().ok_or_else(|| SpecError::Malformed("linux is not an object".into()))?;
    set_namespaces(linux, target)?;
    linux.insert("cgroupsPath".into(), json!(format!("/kuasar/{}", target.container)));
    linux.remove("mountLabel");
    linux.remove("intelRdt");
    let devices = nodes::block_devices(linux)?;
    let mut cpuset = CpuSet::default();
    if let Some(resources) = linux.get_mut("resources").and_then(Value::as_object_mut) {
        cpuset = CpuSet::take(resources);
        set_resources(resources)?;
    }
    let binds = volumes::rewrite(spec, target.container, read_only_root)?;
    Ok(Needs { binds, devices, cpuset })
}

/// Clears what the host's security modules would have applied; also right for the process of an exec.
pub fn clear_labels(process: &mut Object) {
    process.remove("apparmorProfile");
    process.remove("selinuxLabel");
}

/// containerd gives its own profile to every container that asks for none. The VM confines in its place; but
/// a profile that somebody wrote and asked for must not silently be left out.
fn check_profile(process: &Object) -> Result<(), SpecError> {
    match process.get("apparmorProfile").and_then(Value::as_str).unwrap_or_default() {
        "" | "unconfined" | "cri-containerd.apparmor.d" => Ok(()),
        profile => Err(refused(
            "process.apparmorProfile",
            format!(
                "{profile} is a profile of the host, which the VM's kernel does not have; set the AppArmor profile to \
                 RuntimeDefault or Unconfined"
            ),
        )),
    }
}

fn set_root(spec: &mut Object, target: &Target) -> Result<bool, SpecError> {
    let root = spec.entry("root").or_insert_with(|| json!({}));
    let root = root.as_object_mut().ok_or_else(|| SpecError::Malformed("root is not an object".into()))?;
    root.insert("path".into(), json!(format!("{GUEST_STATE_DIR}/{}/rootfs", target.container)));
    Ok(root.get("readonly").and_then(Value::as_bool).unwrap_or(false))
}

fn set_namespaces(linux: &mut Object, target: &Target) -> Result<(), SpecError> {
    let of_pod = format!("/proc/{}/ns/pid", target.pod_pid);
    let given = linux.get("namespaces").and_then(Value::as_array).cloned().unwrap_or_default();
    let is = |namespace: &Value, kind: &str| namespace.get("type").and_then(Value::as_str) == Some(kind);
    if given.iter().any(|namespace| is(namespace, "user")) {
        return Err(refused(
            "linux.namespaces",
            "user namespaces are not supported in the VM; set hostUsers: true",
        ));
    }
    if linux.get("uidMappings").and_then(Value::as_array).is_some_and(|mappings| !mappings.is_empty()) {
        return Err(refused(
            "linux.uidMappings",
            "user namespaces are not supported in the VM; set hostUsers: true",
        ));
    }
    let of_pids = given.iter().find(|namespace| is(namespace, "pid"));
    let path = of_pids.and_then(|namespace| namespace.get("path")?.as_str()).unwrap_or_default();
    // The agent's names; a path of the host's means nothing to it.
    let pid = match path {
        path if path == of_pod && target.shared_pids => json!({"type": "pid", "path": "pod"}),
        path if path == of_pod || path.is_empty() => json!({"type": "pid"}),
        path => json!({"type": "pid", "path": format!("process:{}", pid_in(path)?)}),
    };
    linux.insert("namespaces".into(), json!([pid, {"type": "mount"}, {"type": "cgroup"}]));
    Ok(())
}

/// CRI names the container whose processes another one is to see by the pid that was reported for it, which
/// the relay made of the guest's.
fn pid_in(path: &str) -> Result<u32, SpecError> {
    let pid = path.strip_prefix("/proc/").and_then(|rest| rest.strip_suffix("/ns/pid")?.parse::<u32>().ok());
    let pid =
        pid.and_then(|pid| pid.checked_sub(GUEST_PID_BASE)).filter(|pid| (1..GUEST_PID_LIMIT).contains(pid));
    pid.ok_or_else(|| {
        refused(
            "linux.namespaces",
            format!("the PID namespace {path} is one of the host; only those of the pod and of its containers can be joined"),
        )
    })
}

fn set_resources(resources: &mut Object) -> Result<(), SpecError> {
    if let Some(memory) = resources.get_mut("memory").and_then(Value::as_object_mut) {
        // The guest has no swap, so there is nothing to limit.
        memory.remove("swap");
        memory.remove("swappiness");
    }
    for limit in resources.get("hugepageLimits").and_then(Value::as_array).into_iter().flatten() {
        if limit.get("limit").and_then(Value::as_u64).unwrap_or(0) > 0 {
            let size = limit.get("pageSize").and_then(Value::as_str).unwrap_or("?");
            return Err(refused(
                "linux.resources.hugepageLimits",
                format!(
                    "the VM has no huge pages of {size}; remove the hugepages-* limits from the container"
                ),
            ));
        }
    }
    // kubelet writes limits of 0 for every size the host knows.
    resources.remove("hugepageLimits");
    // Major and minor numbers of the host's disks.
    resources.remove("blockIO");
    resources.remove("rdma");
    Ok(())
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
