//! Size of the VM, and limits of containers that promise more.

use std::{num::NonZero, thread::available_parallelism};

use serde_json::Value;

const MIB: u64 = 1 << 20;
/// Time in which a quota of CPU time is spent, in µs, unless it is said.
const PERIOD: u64 = 100_000;

/// Size of the VM.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VmSize {
    /// In bytes.
    memory: u64,
    cpus: u64,
}

impl VmSize {
    /// As it is now: a VM may grow.
    pub(crate) fn now() -> Self {
        let system = rustix::system::sysinfo();
        let cpus = available_parallelism().map_or(1, NonZero::get);
        Self {
            memory: system.totalram.saturating_mul(system.mem_unit.into()),
            cpus: u64::try_from(cpus).unwrap_or(u64::MAX),
        }
    }

    /// Why the VM cannot give a container these resources, both OCI `LinuxResources`. What the container was
    /// made with it keeps, and no limit at all is no promise.
    pub(crate) fn refusal(self, resources: &Value, made_with: &Value) -> Option<String> {
        let (memory, thousandths) = (memory(resources), cpu_thousandths(resources));
        let what = if memory > self.memory.max(self::memory(made_with)) {
            format!("its memory limit of {} MiB is more than the {} MiB", memory / MIB, self.memory / MIB)
        } else if thousandths > self.cpus.saturating_mul(1000).max(cpu_thousandths(made_with)) {
            let (whole, rest) = (thousandths / 1000, thousandths % 1000);
            format!("its CPU limit of {whole}.{rest:03} CPUs is more than the {} CPUs", self.cpus)
        } else {
            return None;
        };
        Some(format!(
            "{what} of its pod's VM, which cannot grow while it runs; create the pod anew with the limits that it needs"
        ))
    }
}

/// Value for a file of the container's cgroup, written as it is. The runtime writes it after all else.
fn unified<'a>(resources: &'a Value, file: &str) -> Option<&'a str> {
    resources.get("unified")?.get(file)?.as_str().map(str::trim)
}

/// The memory limit in bytes; 0 if there is none.
fn memory(resources: &Value) -> u64 {
    match unified(resources, "memory.max") {
        Some(text) => bytes(text),
        None => resources.pointer("/memory/limit").and_then(Value::as_u64).unwrap_or(0),
    }
}

/// A number with a unit, as the kernel reads it (`memparse`); 0 if it is none, like `max`: the kernel refuses
/// others.
fn bytes(text: &str) -> u64 {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let power = match text.get(digits.len()..).unwrap_or_default().to_ascii_lowercase().as_str() {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => 6,
    };
    digits.parse().map_or(0, |number: u64| number.saturating_mul(1024_u64.saturating_pow(power)))
}

/// The limit of CPU time in thousandths of a CPU; 0 if there is none.
fn cpu_thousandths(resources: &Value) -> u64 {
    if let Some(text) = unified(resources, "cpu.max") {
        let mut numbers = text.split_whitespace().map(|word| word.parse::<u64>().unwrap_or(0));
        let (quota, period) = (numbers.next().unwrap_or(0), numbers.next().filter(|period| *period > 0));
        return quota.saturating_mul(1000) / period.unwrap_or(PERIOD);
    }
    let of = |name| resources.pointer(name).and_then(Value::as_u64).filter(|number| *number > 0);
    let quota = of("/cpu/quota").unwrap_or(0);
    quota.saturating_mul(1000) / of("/cpu/period").unwrap_or(PERIOD)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const VM: VmSize = VmSize { memory: 256 * MIB, cpus: 2 };

    #[test]
    fn limits_beyond_the_vm_are_refused_in_a_sentence() {
        let vm = " of its pod's VM, which cannot grow while it runs; create the pod anew with the limits that it needs";
        for (resources, why) in [
            (json!({"memory": {"limit": 257 * MIB}}), "its memory limit of 257 MiB is more than the 256 MiB"),
            (json!({"cpu": {"quota": 250_000}}), "its CPU limit of 2.500 CPUs is more than the 2 CPUs"),
            (
                json!({"cpu": {"quota": 21_000, "period": 10_000}}),
                "its CPU limit of 2.100 CPUs is more than the 2 CPUs",
            ),
            (
                json!({"cpu": {"quota": i64::MAX}}),
                "its CPU limit of 184467440737.095 CPUs is more than the 2 CPUs",
            ),
            (
                json!({"unified": {"memory.max": "1g"}, "memory": {"limit": MIB}}),
                "its memory limit of 1024 MiB is more than the 256 MiB",
            ),
            (
                json!({"unified": {"memory.max": (257 * MIB).to_string()}}),
                "its memory limit of 257 MiB is more than the 256 MiB",
            ),
            (
                json!({"unified": {"cpu.max": "50000 10000"}}),
                "its CPU limit of 5.000 CPUs is more than the 2 CPUs",
            ),
            (
                json!({"unified": {"cpu.max": "300000"}}),
                "its CPU limit of 3.000 CPUs is more than the 2 CPUs",
            ),
        ] {
            assert_eq!(VM.refusal(&resources, &json!({})), Some(format!("{why}{vm}")));
        }
    }

    #[test]
    fn what_fits_what_is_unlimited_and_what_was_there_is_not() {
        let within = json!({"memory": {"limit": 256 * MIB}, "cpu": {"quota": 200_000, "period": 100_000}});
        let beyond = json!({"memory": {"limit": 999 * MIB}, "cpu": {"quota": 900_000}});
        for resources in [
            within.clone(),
            json!({"memory": {"limit": -1}, "cpu": {"quota": -1, "period": 100_000}}),
            json!({"unified": {"memory.max": "256M", "cpu.max": "200000 100000", "memory.high": "9G"}}),
            json!({"unified": {"memory.max": "max", "cpu.max": "max 100000"}, "memory": {"limit": 999 * MIB}}),
            json!({"unified": {"memory.max": "", "cpu.max": ""}}),
            json!({"memory": {"limit": 0}, "cpu": {"quota": 0, "period": 0, "shares": 2}}),
            json!({}),
        ] {
            assert_eq!(VM.refusal(&resources, &Value::Null), None, "{resources}");
        }
        assert_eq!(VM.refusal(&beyond, &beyond), None);
        assert!(VM.refusal(&beyond, &within).is_some());
    }

    #[test]
    fn a_vm_has_memory_and_processors() {
        let vm = VmSize::now();
        assert!(vm.memory > MIB && vm.cpus > 0, "{vm:?}");
    }
}
