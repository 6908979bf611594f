//! A container's OCI spec, of which a tenant writes much, as the daemon rewrites it for the guest.

use vmm_sandboxer::container::spec::{Target, rewrite};

const SPEC: &str = r#"{"ociVersion":"1.1.0","hostname":"x","root":{"path":"rootfs","readonly":true},
"process":{"args":["a"],"apparmorProfile":"","selinuxLabel":"l","user":{"uid":0,"gid":0},"cwd":"/"},
"mounts":[{"destination":"/proc","type":"proc","source":"proc"},{"destination":"/data","type":"bind","source":"/nowhere","options":["rbind","ro"]},
{"destination":"/dev/shm","type":"bind","source":"/run/shm","options":["rbind"]},{"destination":"/etc/hosts","type":"bind","source":"/nowhere","options":["rbind"]}],
"linux":{"cgroupsPath":"/x","namespaces":[{"type":"pid"},{"type":"network","path":"/run/netns/x"},{"type":"pid","path":"/proc/7/ns/pid"}],
"devices":[{"path":"/dev/sda","type":"b","major":8,"minor":0}],"resources":{"cpu":{"cpus":"0-3","mems":"0"},"devices":[{"allow":true,"type":"b","major":8,"minor":0,"access":"rwm"}]}}}"#;

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    vec![
        SPEC.as_bytes().to_vec(),
        b"{}".to_vec(),
        br#"{"linux":{"namespaces":[{"type":"user"}],"devices":[{"path":"/dev/null","type":"c","major":1,"minor":3}]}}"#
            .to_vec(),
    ]
}

pub(crate) fn run(input: &[u8]) {
    let Ok(mut spec) = serde_json::from_slice(input) else { return };
    let target = Target { container: "c1", pod_pid: 7, shared_pids: true };
    let Ok(needs) = rewrite(&mut spec, &target) else { return };
    // No path of the host's namespaces, and no number of its CPUs, means anything in the guest; the names are
    // the agent's.
    let namespaces = spec.pointer("/linux/namespaces").and_then(|list| list.as_array()).cloned().unwrap_or_default();
    for namespace in &namespaces {
        let path = namespace.get("path").and_then(|path| path.as_str()).unwrap_or("pod");
        assert!(path == "pod" || path.starts_with("process:"), "{namespace}");
    }
    assert!(spec.pointer("/linux/resources/cpu/cpus").is_none(), "{spec}");
    let names: std::collections::BTreeSet<&str> = needs.binds.iter().map(|bind| bind.name.as_str()).collect();
    assert_eq!(names.len(), needs.binds.len(), "two binds have one name");
    assert!(names.iter().all(|name| !name.contains('/') && !name.starts_with('.')), "{names:?}");
}
