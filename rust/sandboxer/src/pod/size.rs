//! How big a pod's VM is: arithmetic on the pod's limits.

use super::spec::PodResources;
use crate::config::{HypervisorConfig, MIN_MEMORY_IN_MB};

/// Bytes in a MiB.
const MIB: i64 = 1 << 20;

/// A VM's size when it boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct VmSize {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
}

impl VmSize {
    /// Limit plus what the guest itself takes, and CPUs for the quota, rounded up. Without a limit: the defaults.
    #[must_use]
    pub(super) fn of(pod: &PodResources, config: &HypervisorConfig) -> Self {
        Self { vcpus: vcpus(pod).unwrap_or(config.vcpus), memory_mib: memory_mib(pod, config) }
    }
}

fn vcpus(pod: &PodResources) -> Option<u32> {
    if pod.cpu_quota <= 0 || pod.cpu_period <= 0 {
        return None;
    }
    let whole = pod.cpu_quota / pod.cpu_period;
    let rounded = if pod.cpu_quota % pod.cpu_period == 0 { whole } else { whole.saturating_add(1) };
    let host =
        std::thread::available_parallelism().map_or(u32::MAX, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
    // More vCPUs than the host has CPUs only make it slower.
    Some(u32::try_from(rounded).unwrap_or(u32::MAX).clamp(1, host))
}

fn memory_mib(pod: &PodResources, config: &HypervisorConfig) -> u64 {
    if pod.memory_limit <= 0 {
        return u64::from(config.memory_in_mb);
    }
    let overhead = if pod.memory_overhead > 0 {
        pod.memory_overhead
    } else {
        i64::from(config.memory_overhead_in_mb).saturating_mul(MIB)
    };
    let bytes = pod.memory_limit.saturating_add(overhead);
    let mib = bytes / MIB + i64::from(bytes % MIB != 0);
    u64::try_from(mib).unwrap_or(u64::MAX).max(u64::from(MIN_MEMORY_IN_MB))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(cpu_quota: i64, memory_limit: i64, memory_overhead: i64) -> VmSize {
        let config = HypervisorConfig { vcpus: 7, ..HypervisorConfig::default() };
        VmSize::of(&PodResources { cpu_quota, cpu_period: 100_000, memory_limit, memory_overhead }, &config)
    }

    #[test]
    fn unlimited_stays_the_default() {
        for unlimited in [0, -1, i64::MIN] {
            assert_eq!(size(unlimited, unlimited, 0), VmSize { vcpus: 7, memory_mib: 512 });
        }
        assert_eq!(size(0, 0, 160 * MIB).memory_mib, 512);
    }

    #[test]
    fn limits_are_rounded_up_and_the_guest_comes_on_top() {
        assert_eq!(size(1, 256 * MIB, 0), VmSize { vcpus: 1, memory_mib: 320 });
        assert_eq!(size(100_000, 256 * MIB + 1, 0), VmSize { vcpus: 1, memory_mib: 321 });
        assert_eq!(size(100_000, 256 * MIB, 100 * MIB).memory_mib, 356);
        assert_eq!(size(100_000, 1, 1).memory_mib, u64::from(MIN_MEMORY_IN_MB));
    }

    #[test]
    fn vcpus_follow_the_quota_up_to_the_hosts() {
        let host = u32::try_from(std::thread::available_parallelism().unwrap().get()).unwrap();
        assert_eq!(size(100_001, 0, 0).vcpus, 2.min(host));
        assert_eq!(size(i64::MAX, 0, 0).vcpus, host);
    }

    #[test]
    fn absurd_numbers_do_not_overflow() {
        assert!(size(i64::MAX, i64::MAX, i64::MAX).memory_mib > 1 << 40);
    }
}
