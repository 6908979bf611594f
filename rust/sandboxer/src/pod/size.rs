//! How big a pod's VM is: arithmetic on the pod's limits.

use serde::{Deserialize, Serialize};

use super::{
    PodError,
    annotations::Wishes,
    spec::{PodResources, PodSpec},
};
use crate::config::HypervisorConfig;

/// Bytes in a MiB.
const MIB: i64 = 1 << 20;
/// What one CPU is in shares, the kernel's way to say what is requested.
const SHARES_PER_CPU: i64 = 1024;

/// A VM's size when it boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VmSize {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
}

impl VmSize {
    /// Limit plus what the guest itself takes, and CPUs for the quota, rounded up. Without a limit: the defaults, and as many
    /// CPUs as are requested. An annotation that is allowed goes before all that.
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
        let size = Self::asked(resources, wishes, config);
        match wishes.memory_mib {
            _ if size.memory_mib >= floor => Ok(size),
            Some(wished) => Err(PodError::Refused(format!(
                "the annotation io.kuasar.vm.memory_mib asks for a VM of {wished} MiB, and its guest needs {floor} \
                 MiB to start; set it to {floor} or more"
            ))),
            None if resources.memory_limit <= 0 => Ok(size),
            None => Err(too_small(resources, config, size.memory_mib, floor)),
        }
    }

    /// What is asked for, whether a guest could start with it or not.
    pub(super) fn asked(resources: &PodResources, wishes: &Wishes, config: &HypervisorConfig) -> Self {
        Self {
            vcpus: wishes.vcpus.unwrap_or_else(|| vcpus(resources, config)),
            memory_mib: wishes.memory_mib.unwrap_or_else(|| memory_mib(resources, config)),
        }
    }
}

/// CPUs of this node: more vCPUs than that only make a VM slower.
pub(super) fn host_cpus() -> u32 {
    std::thread::available_parallelism().map_or(u32::MAX, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
}

fn vcpus(pod: &PodResources, config: &HypervisorConfig) -> u32 {
    let (part, whole, least) = if pod.cpu_quota > 0 && pod.cpu_period > 0 {
        (pod.cpu_quota, pod.cpu_period, 1)
    } else {
        (pod.cpu_shares.max(0), SHARES_PER_CPU, config.vcpus)
    };
    u32::try_from(up(part, whole)).unwrap_or(u32::MAX).min(host_cpus()).max(least)
}

fn memory_mib(pod: &PodResources, config: &HypervisorConfig) -> u64 {
    if pod.memory_limit <= 0 {
        return u64::from(config.memory_in_mb);
    }
    up(pod.memory_limit.saturating_add(overhead(pod, config).0), MIB)
}

/// Bytes, and who says so.
fn overhead(pod: &PodResources, config: &HypervisorConfig) -> (i64, &'static str) {
    if pod.memory_overhead > 0 {
        return (pod.memory_overhead, "the runtime class's overhead");
    }
    (i64::from(config.memory_overhead_in_mb).saturating_mul(MIB), "memory_overhead_in_mb")
}

fn too_small(pod: &PodResources, config: &HypervisorConfig, mib: u64, floor: u64) -> PodError {
    let (overhead, whose) = overhead(pod, config);
    let (limit, overhead) = (up(pod.memory_limit, MIB), u64::try_from(overhead / MIB).unwrap_or(0));
    PodError::Refused(format!(
        "the pod's memory limit of {limit} MiB and {whose} of {overhead} MiB make a VM of {mib} MiB, and its guest needs \
         {floor} MiB to start; raise the limits of the pod's containers to {} MiB or more in sum",
        floor.saturating_sub(overhead)
    ))
}

/// Division of what is not negative, rounded up.
fn up(part: i64, whole: i64) -> u64 {
    u64::try_from(part).unwrap_or(0).div_ceil(u64::try_from(whole).unwrap_or(1).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOOR: u64 = 48;

    fn config() -> HypervisorConfig {
        HypervisorConfig { vcpus: 7, ..HypervisorConfig::default() }
    }

    fn try_size(resources: PodResources) -> Result<VmSize, String> {
        VmSize::with(&resources, &Wishes::default(), &config()).map_err(|error| error.to_string())
    }

    fn size(cpu_quota: i64, memory_limit: i64, memory_overhead: i64) -> VmSize {
        let limits = PodResources { cpu_quota, memory_limit, memory_overhead, ..PodResources::default() };
        try_size(PodResources { cpu_period: 100_000, ..limits }).unwrap()
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
    fn limits_are_rounded_up_and_the_guest_comes_on_top() {
        assert_eq!(size(1, 256 * MIB, 0), VmSize { vcpus: 1, memory_mib: 320 });
        assert_eq!(size(100_000, 256 * MIB + 1, 0), VmSize { vcpus: 1, memory_mib: 321 });
        assert_eq!(size(100_000, 256 * MIB, 100 * MIB).memory_mib, 356);
    }

    #[test]
    fn vcpus_follow_the_quota_up_to_the_hosts() {
        assert_eq!(size(100_001, 0, 0).vcpus, 2.min(host_cpus()));
        assert_eq!(size(i64::MAX, 0, 0).vcpus, host_cpus());
    }

    #[test]
    fn without_a_quota_they_follow_the_requests_if_those_are_more_than_the_default() {
        let of = |cpu_shares, vcpus| {
            let resources = PodResources { cpu_shares, ..PodResources::default() };
            let config = HypervisorConfig { vcpus, ..HypervisorConfig::default() };
            VmSize::with(&resources, &Wishes::default(), &config).unwrap().vcpus
        };
        // What kubelet says of a pod that requests nothing.
        assert_eq!(of(2, 1), 1);
        assert_eq!((of(1025, 1), of(1025, 9)), (2.min(host_cpus()), 9));
        assert_eq!((of(i64::MAX, 1), of(-1, 1)), (host_cpus(), 1));
    }

    #[test]
    fn a_pod_too_small_for_its_guest_is_told_what_would_do() {
        let limits = |memory_limit, memory_overhead| {
            try_size(PodResources { memory_limit, memory_overhead, ..PodResources::default() })
        };
        let error = limits(8 * MIB, 20 * MIB).unwrap_err();
        let would_do = FLOOR.cast_signed() - 20;
        assert!(
            error.contains("limit of 8 MiB and the runtime class's overhead of 20 MiB make a VM of 28 MiB"),
            "{error}"
        );
        assert!(error.ends_with(&format!("to {would_do} MiB or more in sum")), "{error}");
        assert_eq!(limits(would_do * MIB, 20 * MIB).unwrap().memory_mib, FLOOR);
        assert!(limits((would_do - 1) * MIB, 20 * MIB).is_err());
        assert!(limits(1, 1).is_err());
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
    }
}
