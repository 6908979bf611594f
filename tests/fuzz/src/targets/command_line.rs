//! The agent's part of the kernel command line, which a pod's annotations may add to.

use vmm_task::config::TaskConfig;

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    [
        "console=hvc0 root=/dev/pmem0p1 rootflags=dax ro task.log_level=info task.sharefs_type=virtiofs quiet",
        "task.debug task.debug_shell=/bin/sh \"task.log_level=trace\" panic=-1 task.enable_tracing=true",
        "task.sharefs_type=9p task.debug=false task.cgroup=v1 init=\"/sbin/init with spaces\"",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

pub(crate) fn run(input: &[u8]) {
    // As the kernel hands it out, and as the agent reads it: text.
    let text = String::from_utf8_lossy(input);
    let (_, problems) = TaskConfig::parse(&text);
    assert!(problems.iter().all(|problem| problem.starts_with("kernel command line: task.")), "{problems:?}");
}
