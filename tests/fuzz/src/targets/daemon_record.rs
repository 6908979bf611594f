//! A pod's record, which another version of the daemon, a torn disk or a user may have written.

use vmm_sandboxer::fuzz;

const RECORD: &str = r#"{
    "version": 2, "id": "p1", "phase": "stopped", "created_ns": 5,
    "spec": {
        "name": "prod/web", "netns": "/run/netns/x", "hostname": "web", "resolv_conf": "", "sysctls": {"a": "b"},
        "cgroup_parent": "/kubepods/podu", "labels": {"l": "v"},
        "resources": {"cpu_quota": 0, "cpu_period": 0, "memory_limit": 7, "memory_overhead": 0}
    },
    "network": null, "relay": {"pid": 4, "start_time": 5}, "cgroups": ["/sys/fs/cgroup/kubepods/podu/kuasar-p1"],
    "vm": {"dir": "/run/p1", "vmm": {"pid": 3, "start_time": 4}, "companions": {}, "cid": null, "buses": []},
    "size": {"vcpus": 1, "memory_mib": 512}, "exit": {"code": 137, "at_ns": 6, "reason": "x"}, "boot": "b"
}"#;

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    vec![
        RECORD.as_bytes().to_vec(),
        RECORD.replace("\"version\": 2", "\"version\": 1").into_bytes(),
        RECORD.replace("stopped", "running").into_bytes(),
        b"{torn".to_vec(),
    ]
}

pub(crate) fn run(input: &[u8]) {
    // What is understood is understood in the same way when it is written anew.
    if let Some(written) = fuzz::pod_record(input, "p1") {
        assert_eq!(fuzz::pod_record(&written, "p1").as_ref(), Some(&written));
        assert!(fuzz::pod_record(&written, "p2").is_none(), "a record counts in its own folder only");
    }
}
