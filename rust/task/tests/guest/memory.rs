//! Memory that the agent costs every pod.

use kuasar_common::api::sandbox::CheckRequest;

use crate::{
    given,
    given::Kind,
    vm::{Vm, bundle},
};

/// Most memory of its own that the agent may have when a pod is ready, in KiB: what nobody else in the VM
/// shares, be it written or part of its program.
const MOST: u64 = 4096;

#[tokio::test]
#[ignore = "needs a guest: set KUASAR_IMAGE"]
async fn the_agent_has_little_memory_when_the_pod_is_ready() {
    for (kind, share) in [(Kind::InitrdNineP, "9p"), (Kind::DiskVirtiofs, "virtiofs")] {
        let given = given();
        if let Some(missing) = kind.missing(&given) {
            println!("skipped: memory with {share}: {missing}");
            continue;
        }
        let vm = Vm::boot(
            &given,
            kind,
            &format!("task.sharefs_type={share} task.debug task.log_level=warn"),
            true,
        );
        bundle(&given, &vm, "tools", &["sh"], false);
        vm.sandbox().check(vm.context(), &CheckRequest::new()).await.unwrap();
        let command = "/run/kuasar/state/tools/rootfs/bin/busybox cat /proc/1/smaps_rollup";
        let output = vm.run(command).await.unwrap();
        assert_eq!(output.exit_status, 0, "{output}");
        let (clean, dirty) = (kib(&output.out, "Private_Clean"), kib(&output.out, "Private_Dirty"));
        println!(
            "{share}: private {} KiB = {dirty} KiB written + {clean} KiB of its program; resident {} KiB",
            clean + dirty,
            kib(&output.out, "Rss"),
        );
        assert!(clean + dirty <= MOST, "more than {MOST} KiB:\n{}", output.out);
        // It is the agent that was looked at, and alive.
        assert!(dirty > 50, "{}", output.out);
    }
}

fn kib(rollup: &str, name: &str) -> u64 {
    let line = rollup.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or_else(|| panic!("no {name} in {rollup}"))
}
