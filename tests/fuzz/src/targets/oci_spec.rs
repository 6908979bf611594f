//! The agent's rewriting of OCI specs, processes and resources: whatever comes out must be what the agent
//! relies on.

use std::path::{Component, Path};

use serde_json::Value;
use vmm_task::{
    cgroup::Hierarchies,
    hooks,
    spec::{self, Target},
};

const CRI: &str = r#"{"ociVersion":"1.2.0","process":{"terminal":false,"user":{"uid":0,"gid":0,"additionalGids":[0]},
"args":["sh","-c","sleep 1"],"env":["PATH=/bin"],"cwd":"/","apparmorProfile":"cri","selinuxLabel":"s","oomScoreAdj":-997,
"capabilities":{"bounding":["CAP_KILL"],"effective":["CAP_KILL"]},"rlimits":[{"type":"RLIMIT_NOFILE","hard":9,"soft":9}]},
"root":{"path":"/run/kuasar/state/c/rootfs","readonly":true},
"mounts":[{"destination":"/proc","type":"proc","source":"proc","options":["nosuid"]}],
"hooks":{"prestart":[{"path":"/usr/bin/hook","args":["hook"],"timeout":3}],"startContainer":[{"path":"/bin/x"}]},
"linux":{"cgroupsPath":"/kuasar/c","mountLabel":"m","namespaces":[{"type":"pid"},{"type":"mount"}],
"resources":{"cpu":{"quota":1,"cpus":"0-3"},"memory":{"limit":1}},"seccomp":{"defaultAction":"SCMP_ACT_ERRNO"}}}"#;
const BARE: &str = r#"{"process":{"args":["x"]},"root":{"path":"rootfs"},"linux":{"cgroupsPath":"/kuasar/a/b"}}"#;
const RESOURCES: &str = r#"{"cpu":{"shares":2,"cpus":"0","mems":"0"},"memory":{"limit":1,"swap":2},
"hugepageLimits":[{"pageSize":"2MB","limit":0}],"blockIO":{"weight":1},"pids":{"limit":1},"args":["x"],
"unified":{"memory.swap.max":"0","memory.swap.high":"max"}}"#;

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    [CRI, BARE, RESOURCES].map(|text| text.as_bytes().to_vec()).to_vec()
}

pub(crate) fn run(input: &[u8]) {
    let target = Target { container: "c", bundle: Path::new("/bundle"), terminal: false };
    if let Ok(rewritten) = spec::rewrite(input, target) {
        check_spec(&rewritten);
        if !has_fraction(&rewritten) {
            let again = spec::rewrite(rewritten.to_string().as_bytes(), target);
            assert_eq!(again.ok().as_ref(), Some(&rewritten), "it is stable");
        }
        // There is no such root, so no hook can be found; the lists are read all the same.
        let _ = hooks::check(&rewritten, Path::new("/nonexistent"));
    }
    if let Ok(process) = spec::process(input, true) {
        let process: Value = serde_json::from_slice(&process).unwrap_or_default();
        assert_eq!(process.get("terminal"), Some(&Value::Bool(true)));
        assert_eq!(process.get("apparmorProfile"), None);
    }
    // A guest without any files of cgroups has none that could be set.
    let cgroups = Hierarchies::Unified("/nonexistent".into());
    if let Ok(resources) = spec::resources(input, &cgroups) {
        assert_eq!((resources.pointer("/cpu/cpus"), resources.get("hugepageLimits")), (None, None));
        assert!(resources.get("unified").is_none_or(|unified| !unified.is_object()));
    }
}

/// Fractions, and integers beyond 64 bits, lose their last digit each time they are read; OCI knows neither.
fn has_fraction(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.is_f64(),
        Value::Array(values) => values.iter().any(has_fraction),
        Value::Object(fields) => fields.values().any(has_fraction),
        _ => false,
    }
}

fn check_spec(spec: &Value) {
    let text = |pointer: &str| spec.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let below = Path::new(text("/linux/cgroupsPath")).strip_prefix("/kuasar").map(Path::to_path_buf);
    let below = below.unwrap_or_default();
    assert!(below.components().next().is_some());
    assert!(below.components().all(|part| matches!(part, Component::Normal(_))));
    assert!(text("/root/path").starts_with('/'));
    assert_eq!((spec.pointer("/process/selinuxLabel"), spec.pointer("/linux/mountLabel")), (None, None));
}
