//! The OCI spec that the host sends, checked, and made into the one that the runtime gets.
//!
//! The host has rewritten it for the guest already; what is left is what only the guest knows, and what it
//! does not take from anybody: where the containers' cgroups are, which programs exist. A function on JSON,
//! so that fields unknown to the agent survive.

use std::path::{Component, Path};

use kuasar_common::constants::GUEST_BLOCK_NODES;
use serde_json::{Map, Value, json};

use crate::{
    cgroup::Hierarchies,
    error::TaskError,
    storage::{Node, Nodes},
    unified,
};

/// Cgroup of all containers, as specs name it.
pub const CGROUPS: &str = "/kuasar";
/// Labels of the host's security modules, which the guest does not have, in the process and beside it.
const HOST_LABELS: [&str; 2] = ["apparmorProfile", "selinuxLabel"];

/// Container that a spec is for.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// Container id.
    pub container: &'a str,
    /// Its bundle's path in the guest.
    pub bundle: &'a Path,
    /// The request wants a terminal.
    pub terminal: bool,
}

type Object = Map<String, Value>;

/// Reads a container's spec and makes of it what the runtime gets.
///
/// # Errors
/// When it is none, does not fit the request, or asks for what a container must not have; the message names
/// the field.
pub fn rewrite(json: &[u8], target: Target) -> Result<Value, TaskError> {
    let mut spec: Value = serde_json::from_slice(json).map_err(|error| refuse(&error.to_string()))?;
    let fields = spec.as_object_mut().ok_or_else(|| refuse("it is not a JSON object"))?;
    set_process(object(fields, "process")?, target.terminal)?;
    set_root(object(fields, "root")?, target.bundle)?;
    if !fields.contains_key("linux") {
        fields.insert("linux".to_owned(), json!({}));
    }
    let linux = object(fields, "linux")?;
    linux.remove("mountLabel");
    set_cgroup(linux, target.container)?;
    Ok(spec)
}

/// Leaves of a spec's limits those files of its cgroup that this guest has.
///
/// # Errors
/// When one is missing that would change something.
pub(crate) fn fit_cgroup(spec: &mut Value, cgroups: &Hierarchies) -> Result<(), TaskError> {
    match spec.pointer_mut("/linux/resources").and_then(Value::as_object_mut) {
        Some(resources) => {
            unified::fit(resources, cgroups).map_err(|why| refuse(&format!("linux.resources.{why}")))
        }
        None => Ok(()),
    }
}

/// Gives block devices the guest's numbers in place of those that the host lists them under, as nodes, in the
/// rules of who may use them, and where they are bound.
pub fn set_devices(spec: &mut Value, nodes: &Nodes) {
    for list in ["/linux/devices", "/linux/resources/devices"] {
        let devices = spec.pointer_mut(list).and_then(Value::as_array_mut).into_iter().flatten();
        for device in devices.filter_map(Value::as_object_mut) {
            let number = |key| device.get(key).and_then(Value::as_u64);
            let block = device.get("type").and_then(Value::as_str) == Some("b");
            let given = number("major").zip(number("minor")).filter(|_| block);
            if let Some(Node { major, minor, .. }) = given.and_then(|given| nodes.get(&given)) {
                device.insert("major".to_owned(), json!(major));
                device.insert("minor".to_owned(), json!(minor));
            }
        }
    }
    let mounts = spec.get_mut("mounts").and_then(Value::as_array_mut).into_iter().flatten();
    for mount in mounts.filter_map(Value::as_object_mut) {
        let source = mount.get("source").and_then(Value::as_str).unwrap_or_default();
        let given =
            source.strip_prefix(GUEST_BLOCK_NODES).and_then(|rest| rest.strip_prefix('/')?.split_once(':'));
        let given = given.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        if let Some(node) = given.and_then(|given| nodes.get(&given)) {
            mount.insert("source".to_owned(), json!(node.path));
        }
    }
}

/// The JSON of an OCI process as the runtime gets it: without what only the host has, and with the terminal
/// that the request asks for.
///
/// # Errors
/// When it is no process.
pub fn process(json: &[u8], terminal: bool) -> Result<Vec<u8>, TaskError> {
    let refuse = |why: String| TaskError::InvalidArgument(format!("the process to execute: {why}"));
    let mut spec: Value = serde_json::from_slice(json).map_err(|error| refuse(error.to_string()))?;
    let Some(fields) = spec.as_object_mut() else {
        return Err(refuse("it is not a JSON object".to_owned()));
    };
    if !has_args(fields) {
        return Err(refuse("it has no args".to_owned()));
    }
    clear_labels(fields);
    fields.insert("terminal".to_owned(), Value::Bool(terminal));
    serde_json::to_vec(&spec).map_err(|error| refuse(error.to_string()))
}

/// New limits of a container, OCI `LinuxResources` as JSON, as the runtime gets them: the host sends them as
/// containerd made them, so what names the host's processors, memory nodes and disks goes, as it does from
/// the spec.
///
/// # Errors
/// When they are none, or limit what the guest does not have.
pub fn resources(json: &[u8], cgroups: &Hierarchies) -> Result<Value, TaskError> {
    let refuse = |why: String| TaskError::InvalidArgument(format!("the resources to set: {why}"));
    let mut resources: Value = serde_json::from_slice(json).map_err(|error| refuse(error.to_string()))?;
    let Some(fields) = resources.as_object_mut() else {
        return Err(refuse("they are not a JSON object".to_owned()));
    };
    for (part, names) in [("cpu", ["cpus", "mems"]), ("memory", ["swap", "swappiness"])] {
        if let Some(part) = fields.get_mut(part).and_then(Value::as_object_mut) {
            names.iter().for_each(|name| drop(part.remove(*name)));
        }
    }
    let huge = fields.remove("hugepageLimits");
    let wanted = |limit: &&Value| limit.get("limit").and_then(Value::as_u64).unwrap_or(0) > 0;
    if let Some(limit) = huge.as_ref().and_then(Value::as_array).into_iter().flatten().find(wanted) {
        let size = limit.get("pageSize").and_then(Value::as_str).unwrap_or("?");
        return Err(refuse(format!(
            "hugepageLimits: the VM has no huge pages of {size}; remove the hugepages-* limits from the container"
        )));
    }
    fields.remove("blockIO");
    fields.remove("rdma");
    unified::fit(fields, cgroups).map_err(refuse)?;
    Ok(resources)
}

fn refuse(why: &str) -> TaskError {
    TaskError::InvalidArgument(format!("the container's spec: {why}"))
}

fn object<'a>(fields: &'a mut Object, name: &str) -> Result<&'a mut Object, TaskError> {
    match fields.get_mut(name) {
        Some(Value::Object(object)) => Ok(object),
        Some(_) => Err(refuse(&format!("{name} is not a JSON object"))),
        None => Err(refuse(&format!("it has no {name}"))),
    }
}

fn has_args(process: &Object) -> bool {
    process.get("args").and_then(Value::as_array).is_some_and(|args| !args.is_empty())
}

fn clear_labels(process: &mut Object) {
    for label in HOST_LABELS {
        process.remove(label);
    }
}

fn set_process(process: &mut Object, terminal: bool) -> Result<(), TaskError> {
    if !has_args(process) {
        return Err(refuse("process has no args"));
    }
    let wants = process.get("terminal").and_then(Value::as_bool).unwrap_or(false);
    if wants != terminal {
        return Err(refuse(&format!("process.terminal is {wants}, the request's terminal is {terminal}")));
    }
    clear_labels(process);
    Ok(())
}

/// The runtime reads the spec from a folder of the agent's, so the root file system's path must not depend on
/// it.
fn set_root(root: &mut Object, bundle: &Path) -> Result<(), TaskError> {
    let path = root.get("path").and_then(Value::as_str).unwrap_or_default();
    if path.is_empty() {
        return Err(refuse("root.path is empty"));
    }
    let path = bundle.join(path);
    root.insert("path".to_owned(), json!(path.to_string_lossy()));
    Ok(())
}

/// Containers' cgroups are where the agent looks for them, and nowhere near its own.
fn set_cgroup(linux: &mut Object, container: &str) -> Result<(), TaskError> {
    let given = linux.get("cgroupsPath").and_then(Value::as_str).unwrap_or_default();
    if given.is_empty() {
        linux.insert("cgroupsPath".to_owned(), json!(format!("{CGROUPS}/{container}")));
        return Ok(());
    }
    let below = Path::new(given).strip_prefix(CGROUPS).ok();
    let plain = |below: &Path| {
        below.components().next().is_some()
            && below.components().all(|part| matches!(part, Component::Normal(_)))
    };
    if below.is_some_and(plain) && !given.contains('\0') {
        return Ok(());
    }
    Err(refuse(&format!("linux.cgroupsPath {given:?} is not below {CGROUPS}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target() -> Target<'static> {
        Target { container: "c", bundle: Path::new("/b"), terminal: false }
    }

    fn spec() -> Value {
        json!({
            "process": {"args": ["sh"], "apparmorProfile": "x", "selinuxLabel": "y", "new": {"a": 1}},
            "root": {"path": "rootfs", "readonly": true},
            "linux": {"mountLabel": "z", "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}},
            "annotations": {"k": "v"},
        })
    }

    fn rewritten(spec: &Value) -> Result<Value, String> {
        rewrite(spec.to_string().as_bytes(), target()).map_err(|error| error.to_string())
    }

    #[test]
    fn what_only_the_host_has_is_dropped_and_the_rest_kept() {
        let once = rewritten(&spec()).unwrap();
        assert_eq!(
            once,
            json!({
                "process": {"args": ["sh"], "new": {"a": 1}},
                "root": {"path": "/b/rootfs", "readonly": true},
                "linux": {"cgroupsPath": "/kuasar/c", "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}},
                "annotations": {"k": "v"},
            })
        );
        assert_eq!(rewritten(&once).unwrap(), once, "it is stable");
    }

    #[test]
    fn paths_of_the_host_s_choice_are_kept() {
        let mut spec = spec();
        spec["root"]["path"] = json!("/run/kuasar/state/c/rootfs");
        spec["linux"]["cgroupsPath"] = json!("/kuasar/pod/c");
        let spec = rewritten(&spec).unwrap();
        assert_eq!(spec["root"]["path"], "/run/kuasar/state/c/rootfs");
        assert_eq!(spec["linux"]["cgroupsPath"], "/kuasar/pod/c");
    }

    #[test]
    fn cgroups_elsewhere_are_refused() {
        for bad in ["/", "/kuasar", "/kuasar/", "/kuasar/../x", "/other/c", "kuasar/c", "/kuasar/a\0b"] {
            let mut spec = spec();
            spec["linux"]["cgroupsPath"] = json!(bad);
            let error = rewritten(&spec).unwrap_err();
            assert!(error.ends_with("is not below /kuasar"), "{error}");
        }
    }

    #[test]
    fn block_devices_get_the_guest_s_numbers_in_one_go() {
        let device =
            |kind: &str, minor: u64| json!({"path": "/dev/x", "type": kind, "major": 8, "minor": minor});
        let list = json!([device("b", 16), device("b", 32), device("c", 16), {"allow": false}]);
        let bind = |source: &str| json!({"type": "bind", "source": source});
        let mut spec = json!({
            "linux": {"devices": list.clone(), "resources": {"devices": list}},
            "mounts": [bind("/dev/block/8:32"), bind("/dev/block/8:48"), bind("/dev/null"), {}],
        });
        // One's number in the guest is the other's on the host.
        let node = |major, minor, path: &str| Node { major, minor, path: path.into() };
        let nodes = Nodes::from([((8, 16), node(8, 32, "/dev/sdc")), ((8, 32), node(254, 0, "/dev/vda"))]);
        set_devices(&mut spec, &nodes);
        let other = json!({"path": "/dev/x", "type": "b", "major": 254, "minor": 0});
        let expected = json!([device("b", 32), other, device("c", 16), {"allow": false}]);
        let expected = json!({"devices": expected.clone(), "resources": {"devices": expected}});
        assert_eq!(spec["linux"], expected);
        assert_eq!(spec["mounts"], json!([bind("/dev/vda"), bind("/dev/block/8:48"), bind("/dev/null"), {}]));
        set_devices(&mut json!({}), &Nodes::new());
    }

    #[test]
    fn what_is_no_spec_is_refused_by_the_field() {
        for (change, why) in [
            (json!([]), "it is not a JSON object"),
            (json!({}), "it has no process"),
            (json!({"process": {"args": ["sh"]}}), "it has no root"),
            (json!({"process": 1}), "process is not a JSON object"),
            (json!({"process": {}}), "process has no args"),
            (json!({"process": {"args": []}}), "process has no args"),
            (
                json!({"process": {"args": ["sh"], "terminal": true}}),
                "process.terminal is true, the request's terminal is false",
            ),
            (json!({"process": {"args": ["sh"]}, "root": {}}), "root.path is empty"),
            (
                json!({"process": {"args": ["sh"]}, "root": {"path": "r"}, "linux": 7}),
                "linux is not a JSON object",
            ),
        ] {
            assert_eq!(rewritten(&change).unwrap_err(), format!("the container's spec: {why}"));
        }
        let error = rewrite(b"{\"process\":", target()).unwrap_err().to_string();
        assert!(error.contains("EOF while parsing"), "{error}");
    }

    #[test]
    fn host_labels_are_dropped_and_the_terminal_is_the_request_s() {
        let json =
            br#"{"args":["sh"],"apparmorProfile":"x","selinuxLabel":"y","terminal":true,"cwd":"/","new":{"a":1}}"#;
        let spec: Value = serde_json::from_slice(&process(json, false).unwrap()).unwrap();
        assert_eq!(spec, json!({"args":["sh"],"terminal":false,"cwd":"/","new":{"a":1}}));
    }

    #[test]
    fn new_limits_lose_what_only_the_host_has() {
        let json = br#"{"cpu":{"quota":1,"cpus":"4-7","mems":"0"},"memory":{"limit":2,"swap":2,"new":3},
            "hugepageLimits":[{"pageSize":"2MB","limit":0}],"blockIO":{"weight":9},"rdma":{},"pids":{"limit":4},
            "unified":{"memory.swap.max":"0"}}"#;
        let cgroups = Hierarchies::Unified("/none".into());
        let set = resources(json, &cgroups).unwrap();
        assert_eq!(set, json!({"cpu": {"quota": 1}, "memory": {"limit": 2, "new": 3}, "pids": {"limit": 4}}));
        for (bad, why) in [
            (&b"{"[..], "EOF while parsing"),
            (b"7", "they are not a JSON object"),
            (br#"{"hugepageLimits":[{"pageSize":"2MB","limit":9}]}"#, "the VM has no huge pages of 2MB"),
            (
                br#"{"unified":{"memory.swap.max":"1G"}}"#,
                "unified: memory.swap.max=1G: the VM's kernel has no swap",
            ),
        ] {
            let error = resources(bad, &cgroups).unwrap_err().to_string();
            assert!(error.starts_with("the resources to set: ") && error.contains(why), "{error}");
        }
    }

    #[test]
    fn files_of_the_cgroup_that_the_guest_lacks_are_left_out_or_refused() {
        let cgroups = Hierarchies::Unified("/none".into());
        let mut spec = json!({"linux": {"resources": {"unified": {"memory.swap.max": "0"}}}});
        fit_cgroup(&mut spec, &cgroups).unwrap();
        assert_eq!(spec, json!({"linux": {"resources": {}}}));
        let mut spec = json!({"linux": {"resources": {"unified": {"memory.swap.max": "1G"}}}});
        let error = fit_cgroup(&mut spec, &cgroups).unwrap_err().to_string();
        let start = "the container's spec: linux.resources.unified: memory.swap.max=1G: the VM's kernel has no swap; ";
        assert!(error.starts_with(start), "{error}");
        fit_cgroup(&mut json!({}), &cgroups).unwrap();
    }

    #[test]
    fn what_is_no_process_is_refused() {
        for (bad, why) in [
            (&b"{"[..], "EOF while parsing"),
            (b"[]", "it is not a JSON object"),
            (b"{}", "it has no args"),
            (b"{\"args\":[]}", "it has no args"),
        ] {
            let error = process(bad, false).unwrap_err().to_string();
            assert!(error.starts_with("the process to execute: ") && error.contains(why), "{error}");
        }
    }
}
