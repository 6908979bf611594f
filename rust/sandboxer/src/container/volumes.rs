//! The mounts of a spec: which pass, which are made on the host first, and which the pod adds.

use std::path::PathBuf;

use kuasar_common::constants::{GUEST_STATE_DIR, pod_files};
use serde_json::{Value, json};

use super::{
    exports::Wish,
    spec::{Bind, Object, SpecError, refused},
};

/// File systems that the guest's kernel makes itself.
const OF_THE_GUEST: [&str; 7] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

/// Files of the pod that containers get unless CRI already gave them one: name in their folder, destination.
const POD_FILES: [(&str, &str); 3] =
    [("hosts", "/etc/hosts"), ("hostname", "/etc/hostname"), ("resolv.conf", "/etc/resolv.conf")];

pub(super) fn rewrite(
    spec: &mut Object,
    container: &str,
    read_only_root: bool,
) -> Result<Vec<Bind>, SpecError> {
    let given = match spec.remove("mounts") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(mounts)) => mounts,
        Some(_) => return Err(SpecError::Malformed("mounts is not a list".into())),
    };
    let mut binds = Vec::new();
    let mut mounts = Vec::with_capacity(given.len() + POD_FILES.len());
    for mut mount in given {
        let fields =
            mount.as_object_mut().ok_or_else(|| SpecError::Malformed("a mount is not an object".into()))?;
        if let Some(bind) = rewrite_one(fields, container, binds.len())? {
            binds.push(bind);
        }
        mounts.push(mount);
    }
    add_pod_files(&mut mounts, read_only_root);
    spec.insert("mounts".into(), Value::Array(mounts));
    Ok(binds)
}

fn rewrite_one(mount: &mut Object, container: &str, index: usize) -> Result<Option<Bind>, SpecError> {
    let text = |key: &str| mount.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (kind, source, destination) = (text("type"), text("source"), text("destination"));
    let options: Vec<String> = mount
        .get("options")
        .and_then(Value::as_array)
        .map(|options| options.iter().filter_map(Value::as_str).map(str::to_owned).collect())
        .unwrap_or_default();
    if mount.get("uidMappings").and_then(Value::as_array).is_some_and(|mappings| !mappings.is_empty()) {
        return Err(refused(
            "mounts",
            format!("{destination} has id mappings, which the VM does not support; set hostUsers: true"),
        ));
    }
    if destination.trim_end_matches('/') == "/dev/shm" && is_the_pods_shm(&kind, &source) {
        share_shm(mount, &options);
        return Ok(None);
    }
    let has = |name: &str| options.iter().any(|option| option == name);
    let is_bind = kind == "bind" || has("bind") || has("rbind");
    if !is_bind {
        if OF_THE_GUEST.contains(&kind.as_str()) {
            return Ok(None);
        }
        // One that is on a disk may be.
        if !source.starts_with('/') {
            return Err(not_mountable(&destination, &kind));
        }
    }
    if has("rshared") || has("shared") {
        return Err(refused(
            "mounts",
            format!(
                "{destination} asks for mount propagation to the host, which cannot leave the VM; set mountPropagation to HostToContainer or None"
            ),
        ));
    }
    if !source.starts_with('/') {
        return Err(refused(
            "mounts",
            format!("{destination} has the source {source:?}, which is not an absolute path"),
        ));
    }
    let name = index.to_string();
    mount.insert("source".into(), json!(placeholder(container, &name)));
    let read_only = has("ro") || has("rro");
    // "bind" without "rbind" means the top mount only.
    let recursive = has("rbind") || !has("bind");
    let disk = (!is_bind).then(|| {
        mount.insert("type".into(), json!("bind"));
        mount.insert("options".into(), json!(["bind", if read_only { "ro" } else { "rw" }]));
        (kind, options)
    });
    Ok(Some(Bind { name, source: PathBuf::from(source), destination, read_only, recursive, disk }))
}

/// The source that a mount has until it is known where the guest finds it.
fn placeholder(container: &str, name: &str) -> String {
    format!("{GUEST_STATE_DIR}/{container}/mounts/{name}")
}

/// The spec's mount that shows a bind mount of the host.
pub(super) fn mount_of<'a>(spec: &'a mut Value, container: &str, name: &str) -> Option<&'a mut Object> {
    let source = placeholder(container, name);
    let mounts = spec.get_mut("mounts").and_then(Value::as_array_mut).into_iter().flatten();
    let mut mounts = mounts.filter_map(Value::as_object_mut);
    mounts.find(|mount| mount.get("source").and_then(Value::as_str) == Some(&source))
}

/// Says where the guest finds it.
pub(super) fn set_source(spec: &mut Value, container: &str, name: &str, source: &str) {
    if let Some(mount) = mount_of(spec, container, name) {
        mount.insert("source".into(), json!(source));
    }
}

/// Demands that the guest's own mount of it leaves to the host.
pub(super) fn wish(spec: &mut Value, container: &str, bind: &Bind) -> Wish {
    let mount = mount_of(spec, container, &bind.name);
    let options = mount.and_then(|mount| mount.get("options")).and_then(Value::as_array);
    let has = |names: &[&str]| {
        options.into_iter().flatten().filter_map(Value::as_str).any(|option| names.contains(&option))
    };
    Wish { read_only_by_host: bind.read_only && !has(&["ro", "rro"]), receives: has(&["slave", "rslave"]) }
}

pub(super) fn not_mountable(destination: &str, kind: &str) -> SpecError {
    refused(
        "mounts",
        format!("{destination} is of type {kind:?}, which the VM cannot mount; use a bind mount"),
    )
}

/// Returns true if a mount at `/dev/shm` is the one that every container gets, and not a volume of the
/// user's. A pod that needs more shared memory has such a volume there.
fn is_the_pods_shm(kind: &str, source: &str) -> bool {
    // As containerd makes it for its own sandboxes, or the host's.
    let of_a_sandbox = source.contains("/io.containerd.grpc.v1.cri/sandboxes/") && source.ends_with("/shm");
    kind != "bind" || of_a_sandbox || source.trim_end_matches('/') == "/dev/shm"
}

/// All containers of the pod see the VM's one /dev/shm, as with a pod's sandbox on the host.
fn share_shm(mount: &mut Object, options: &[String]) {
    let mut kept = vec!["rbind"];
    kept.extend(
        ["ro", "nosuid", "noexec", "nodev"].into_iter().filter(|name| options.iter().any(|o| o == name)),
    );
    mount.insert("options".into(), json!(kept));
    mount.insert("type".into(), json!("bind"));
    mount.insert("source".into(), json!("/dev/shm"));
}

fn add_pod_files(mounts: &mut Vec<Value>, read_only_root: bool) {
    for (name, destination) in POD_FILES {
        let taken =
            mounts.iter().any(|mount| mount.get("destination").and_then(Value::as_str) == Some(destination));
        if !taken {
            let access = if read_only_root { "ro" } else { "rw" };
            mounts.push(json!({
                "destination": destination,
                "type": "bind",
                "source": format!("{GUEST_STATE_DIR}/{}/{name}", pod_files::FILES),
                "options": ["rbind", "rprivate", access],
            }));
        }
    }
}
