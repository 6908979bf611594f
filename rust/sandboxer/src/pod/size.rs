//! Size of a pod's VM: arithmetic on the pod's limits.

use serde::{Deserialize, Serialize};

use super::{
    PodError,
    annotations::Wishes,
    spec::{PodResources, PodSpec},
};
use crate::config::HypervisorConfig;

/// Bytes in a MiB.
const MIB: i64 = 1 << 20;
/// Shares of one CPU. Shares are the kernel's way to say what is requested.
const SHARES_PER_CPU: i64 = 1024;
/// A kernel takes one byte in so many for its table of pages: 64 of each 4096.
const PAGES_TABLE: u64 = 64;
/// Limits up to so many MiB have room for that table in what is added for the guest anyway.
const TABLE_FREE_MIB: u64 = 1024;
/// Of a node's memory, a pod without a limit gets one part in so many.
const NODE_SHARE: u64 = 4;
/// Least and most of that, in MiB. All a guest's memory costs at its boot is the table of pages, 16 MiB of
/// each GiB and the time to write it, and a pod that wants more can say so by a limit.
const SHARE_BOUNDS_MIB: (u64, u64) = (512, 2048);

/// A VM's size when it boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VmSize {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
}

impl VmSize {
    /// Limit plus what the guest itself takes, within what the pod's cgroup leaves beside the VMM, and CPUs
    /// for the quota or for what is requested, whichever is more. Without a limit: the defaults. An
    /// annotation that is allowed goes before all that.
    ///
    /// # Errors
    /// When the guest could not start with it.
    pub(super) fn of(spec: &PodSpec, config: &HypervisorConfig) -> Result<Self, PodError> {
        Self::with(&spec.resources, &spec.wishes, config)
    }

    /// As [`Self::of`], for resources that a pod has not been given yet.
    pub(super) fn with(
        resources: &PodResources,
        wishes: &Wishes,
        config: &HypervisorConfig,
    ) -> Result<Self, PodError> {
        let floor = u64::from(config.least_memory_in_mb());
        let size = Self {
            vcpus: wishes.vcpus.unwrap_or_else(|| vcpus(resources, config.vcpus)),
            memory_mib: wishes.memory_mib.unwrap_or_else(|| memory_mib(resources, config)),
        };
        match wishes.memory_mib {
            _ if size.memory_mib >= floor => Ok(size),
            Some(wished) => Err(PodError::Refused(format!(
                "the annotation io.kuasar.vm.memory_mib asks for a VM of {wished} MiB, and its guest needs {floor} \
                 MiB to start; set it to {floor} or more"
            ))),
            None => Err(too_small(resources, config, floor)),
        }
    }

    /// Least size that a VM that runs must have to give the pod these resources. A resource without a limit
    /// asks for nothing.
    pub(super) fn needed(resources: &PodResources, wishes: &Wishes, config: &HypervisorConfig) -> Self {
        let memory_mib = if resources.memory_limit > 0 { memory_mib(resources, config) } else { 0 };
        Self {
            vcpus: wishes.vcpus.unwrap_or_else(|| vcpus(resources, 1)),
            memory_mib: wishes.memory_mib.unwrap_or(memory_mib),
        }
    }

    /// Why the guest has less than the pod's limit and its own part make, if it has.
    pub(super) fn shortage(self, spec: &PodSpec, config: &HypervisorConfig) -> Option<String> {
        let resources = &spec.resources;
        let limit = up(resources.memory_limit, MIB);
        let wanted = wanted_mib(limit, config);
        let asked = spec.wishes.memory_mib.is_none() && resources.memory_limit > 0;
        (asked && self.memory_mib < wanted).then(|| {
            format!(
                "the guest has {} MiB instead of {wanted}: the pod's cgroup may use {} MiB, of which {} are for the VMM \
                 and what runs beside it; a RuntimeClass with an overhead of {} MiB gives it the rest",
                self.memory_mib,
                resources.cgroup_memory / MIB,
                config.vmm_memory(),
                wanted.saturating_sub(limit).saturating_add(config.vmm_memory())
            )
        })
    }
}

/// CPUs of this node: more vCPUs than that only make a VM slower.
pub(super) fn host_cpus() -> u32 {
    std::thread::available_parallelism().map_or(u32::MAX, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
}

/// MiB of this node; 0 if it does not say.
fn host_memory_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok());
    total.map_or(0, |kib: u64| kib >> 10)
}

/// CPUs for a quota, or, without one, at least `least`; in any case as many as are requested.
fn vcpus(pod: &PodResources, least: u32) -> u32 {
    let whole = |part, whole| u32::try_from(up(part, whole)).unwrap_or(u32::MAX);
    let requested = whole(pod.cpu_shares.max(0), SHARES_PER_CPU).min(host_cpus());
    let limited = if pod.cpu_quota > 0 && pod.cpu_period > 0 {
        whole(pod.cpu_quota, pod.cpu_period).min(host_cpus()).max(1)
    } else {
        least
    };
    requested.max(limited)
}

fn memory_mib(pod: &PodResources, config: &HypervisorConfig) -> u64 {
    if pod.memory_limit <= 0 {
        return config.memory_in_mb.map_or_else(|| node_share_mib(host_memory_mib()), u64::from);
    }
    let wanted = wanted_mib(up(pod.memory_limit, MIB), config);
    match u64::try_from(pod.cgroup_memory / MIB) {
        Ok(all) if pod.cgroup_memory > 0 => wanted.min(all.saturating_sub(config.vmm_memory())),
        _ => wanted,
    }
}

/// Memory of a pod without a limit on a node of this size.
fn node_share_mib(node: u64) -> u64 {
    let (least, most) = SHARE_BOUNDS_MIB;
    (node / NODE_SHARE).clamp(least, most)
}

/// A limit and what the guest takes for itself: kernel, agent, and the table of pages.
fn wanted_mib(limit: u64, config: &HypervisorConfig) -> u64 {
    let table = limit.saturating_sub(TABLE_FREE_MIB).div_ceil(PAGES_TABLE);
    limit.saturating_add(config.memory_overhead_in_mb.into()).saturating_add(table)
}

fn too_small(pod: &PodResources, config: &HypervisorConfig, floor: u64) -> PodError {
    let limit = up(pod.memory_limit, MIB);
    if pod.cgroup_memory <= 0 {
        return PodError::Refused(format!(
            "the pod's memory limit of {limit} MiB and memory_overhead_in_mb of {} MiB make a VM whose guest could not \
             start, as it needs {floor} MiB; raise the limits of the pod's containers",
            config.memory_overhead_in_mb
        ));
    }
    let (all, vmm) = (pod.cgroup_memory / MIB, config.vmm_memory());
    PodError::Refused(format!(
        "the pod's cgroup may use {all} MiB of memory, and its VM needs {} MiB: {floor} MiB for the smallest guest and \
         {vmm} MiB for the VMM and what runs beside it; use a RuntimeClass with an overhead of {} MiB \
         (overhead.podFixed.memory), or raise the memory limits of the pod's containers",
        floor.saturating_add(vmm),
        wanted_mib(limit, config).saturating_sub(limit).saturating_add(vmm)
    ))
}

/// Division of what is not negative, rounded up.
fn up(part: i64, whole: i64) -> u64 {
    u64::try_from(part).unwrap_or(0).div_ceil(u64::try_from(whole).unwrap_or(1).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::Accel;

    const FLOOR: u64 = 48;

    fn config() -> HypervisorConfig {
        let memory_in_mb = Some(512);
        HypervisorConfig { vcpus: 7, memory_in_mb, vmm_memory_in_mb: Some(70), ..HypervisorConfig::default() }
    }

    fn try_size(resources: PodResources) -> Result<VmSize, String> {
        VmSize::with(&resources, &Wishes::default(), &config()).map_err(|error| error.to_string())
    }

    fn size(cpu_quota: i64, memory_limit: i64, memory_overhead: i64) -> VmSize {
        let limits = PodResources { cpu_quota, memory_limit, memory_overhead, ..PodResources::default() };
        try_size(PodResources { cpu_period: 100_000, ..limits }).unwrap()
    }

    /// A limit of the containers and of the cgroup, in MiB.
    fn in_cgroup(limit: i64, all: i64) -> PodResources {
        PodResources { memory_limit: limit * MIB, cgroup_memory: all * MIB, ..PodResources::default() }
    }

    #[test]
    fn unlimited_stays_the_default() {
        for unlimited in [0, -1, i64::MIN] {
            assert_eq!(size(unlimited, unlimited, 0), VmSize { vcpus: 7, memory_mib: 512 });
        }
        assert_eq!(size(0, 0, 160 * MIB).memory_mib, 512);
        assert_eq!(size(0, -1, -1).memory_mib, 512);
    }

    #[test]
    fn without_a_limit_and_a_default_it_is_a_share_of_the_node() {
        assert_eq!([900, 4096, 8000, 1 << 20].map(node_share_mib), [512, 1024, 2000, 2048]);
        let config = HypervisorConfig::default();
        let size = VmSize::with(&PodResources::default(), &Wishes::default(), &config).unwrap();
        assert_eq!(size.memory_mib, node_share_mib(host_memory_mib()));
        assert!(host_memory_mib() > 64);
    }

    #[test]
    fn limits_are_rounded_up_and_the_guest_comes_on_top() {
        assert_eq!(size(1, 256 * MIB, 0), VmSize { vcpus: 1, memory_mib: 320 });
        assert_eq!(size(100_000, 256 * MIB + 1, 0), VmSize { vcpus: 1, memory_mib: 321 });
        // What a runtime class adds is for the VMM, too, and no matter of the guest's.
        assert_eq!(size(100_000, 256 * MIB, 100 * MIB).memory_mib, 320);
        // Its table of pages grows with it.
        assert_eq!(size(100_000, 1024 * MIB, 0).memory_mib, 1024 + 64);
        assert_eq!(size(100_000, (16 << 10) * MIB, 0).memory_mib, (16 << 10) + 64 + 240);
    }

    #[test]
    fn guest_and_vmm_fit_into_the_pods_cgroup_together() {
        // With a runtime class that has room for both, the guest has what it wants.
        assert_eq!(try_size(in_cgroup(128, 288)).unwrap().memory_mib, 192);
        assert_eq!(try_size(in_cgroup(128, 262)).unwrap().memory_mib, 192);
        assert_eq!(try_size(in_cgroup(128, 261)).unwrap().memory_mib, 191);
        // Without any, it is smaller than the limit, and lives.
        let size = try_size(in_cgroup(128, 128)).unwrap();
        assert_eq!(size.memory_mib, 58);
        let shortage = |resources: PodResources| {
            let spec = PodSpec { resources, ..PodSpec::default() };
            VmSize::of(&spec, &config()).unwrap().shortage(&spec, &config())
        };
        let said = shortage(in_cgroup(128, 128)).unwrap();
        assert!(
            said.starts_with("the guest has 58 MiB instead of 192: the pod's cgroup may use 128 MiB"),
            "{said}"
        );
        assert!(said.ends_with("with an overhead of 134 MiB gives it the rest"), "{said}");
        for enough in [in_cgroup(128, 288), in_cgroup(128, 0), in_cgroup(0, 0)] {
            assert_eq!(shortage(enough), None);
        }
        let wishes = Wishes { memory_mib: Some(50), ..Wishes::default() };
        let wished = PodSpec { resources: in_cgroup(128, 128), wishes, ..PodSpec::default() };
        assert_eq!(VmSize::of(&wished, &config()).unwrap().shortage(&wished, &config()), None);
    }

    #[test]
    fn a_cgroup_too_small_for_the_smallest_vm_is_refused_with_the_numbers() {
        assert_eq!(try_size(in_cgroup(100, 118)).unwrap().memory_mib, FLOOR);
        let error = try_size(in_cgroup(100, 117)).unwrap_err();
        for part in [
            "the pod's cgroup may use 117 MiB of memory, and its VM needs 118 MiB: 48 MiB for the smallest guest and 70 MiB",
            "a RuntimeClass with an overhead of 134 MiB (overhead.podFixed.memory)",
        ] {
            assert!(error.contains(part), "{error}");
        }
        try_size(in_cgroup(1, 1)).unwrap_err();
        try_size(PodResources { cgroup_memory: 1, ..in_cgroup(1, 0) }).unwrap_err();
    }

    #[test]
    fn what_the_vmm_takes_depends_on_who_executes_the_guest() {
        let of = |accel| HypervisorConfig { accel, ..HypervisorConfig::default() }.vmm_memory();
        assert!(of(Accel::Kvm) < of(Accel::Tcg));
        assert_eq!(config().vmm_memory(), 70);
    }

    #[test]
    fn vcpus_follow_the_quota_up_to_the_hosts() {
        assert_eq!(size(100_001, 0, 0).vcpus, 2.min(host_cpus()));
        assert_eq!(size(i64::MAX, 0, 0).vcpus, host_cpus());
    }

    #[test]
    fn requests_always_count() {
        let of = |cpu_shares, vcpus, cpu_quota| {
            let resources =
                PodResources { cpu_shares, cpu_quota, cpu_period: 100_000, ..PodResources::default() };
            let config = HypervisorConfig { vcpus, ..config() };
            VmSize::with(&resources, &Wishes::default(), &config).unwrap().vcpus
        };
        // What kubelet says of a pod that requests nothing.
        assert_eq!(of(2, 1, 0), 1);
        assert_eq!((of(1025, 1, 0), of(1025, 9, 0)), (2.min(host_cpus()), 9));
        assert_eq!((of(i64::MAX, 1, 0), of(-1, 1, 0)), (host_cpus(), 1));
        // A container with a limit of 200m beside one that requests 1200m and has none.
        assert_eq!(of(1228, 1, 20_000), 2.min(host_cpus()));
        assert_eq!(of(204, 9, 20_000), 1);
    }

    #[test]
    fn a_running_vm_needs_nothing_for_what_is_not_limited() {
        let needed = |resources: &PodResources| VmSize::needed(resources, &Wishes::default(), &config());
        assert_eq!(needed(&PodResources::default()), VmSize { vcpus: 1, memory_mib: 0 });
        let unlimited =
            PodResources { cpu_quota: -1, memory_limit: -1, cpu_shares: 2, ..PodResources::default() };
        assert_eq!(needed(&unlimited), VmSize { vcpus: 1, memory_mib: 0 });
        assert_eq!(needed(&in_cgroup(128, 128)).memory_mib, 58);
        let wishes = Wishes { memory_mib: Some(300), vcpus: Some(3), ..Wishes::default() };
        let wished = VmSize { vcpus: 3, memory_mib: 300 };
        assert_eq!(VmSize::needed(&in_cgroup(128, 0), &wishes, &config()), wished);
    }

    #[test]
    fn a_wish_goes_before_limits_and_has_the_same_floor() {
        let limits = PodResources { memory_limit: 256 * MIB, ..PodResources::default() };
        let wish = |memory_mib| {
            let wishes = Wishes { vcpus: Some(3), memory_mib: Some(memory_mib), ..Wishes::default() };
            VmSize::with(&limits, &wishes, &config())
        };
        assert_eq!(wish(777).unwrap(), VmSize { vcpus: 3, memory_mib: 777 });
        let error = wish(FLOOR - 1).unwrap_err().to_string();
        assert!(error.ends_with(&format!("set it to {FLOOR} or more")), "{error}");
    }

    #[test]
    fn absurd_numbers_do_not_overflow() {
        assert!(size(i64::MAX, i64::MAX, i64::MAX).memory_mib > 1 << 40);
        assert!(size(1, i64::MAX, 1).memory_mib > 1 << 40);
        let all = PodResources { memory_limit: i64::MAX, cgroup_memory: i64::MAX, ..PodResources::default() };
        assert!(try_size(all).unwrap().memory_mib > 1 << 40);
    }
}
