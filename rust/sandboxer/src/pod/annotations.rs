//! Wishes for a pod's VM that its annotations state. The daemon refuses each of them unless the node's
//! configuration allows it, because such a wish goes past what kubelet has reserved.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::PodError;

/// All of ours begin with this.
const PREFIX: &str = "io.kuasar.vm.";
/// Longest text for the kernel's command line, which has 2048 bytes in all.
const MAX_KERNEL_PARAMS: usize = 1024;

/// An annotation that can be allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Annotation {
    /// Virtual CPUs.
    #[serde(rename = "io.kuasar.vm.vcpus")]
    Vcpus,
    /// The guest's memory in MiB, kernel and agent included.
    #[serde(rename = "io.kuasar.vm.memory_mib")]
    MemoryMib,
    /// Added to the kernel command line, behind what the configuration adds.
    #[serde(rename = "io.kuasar.vm.kernel_params")]
    KernelParams,
}

impl Annotation {
    pub(crate) const ALL: [Self; 3] = [Self::Vcpus, Self::MemoryMib, Self::KernelParams];

    const fn name(self) -> &'static str {
        match self {
            Self::Vcpus => "io.kuasar.vm.vcpus",
            Self::MemoryMib => "io.kuasar.vm.memory_mib",
            Self::KernelParams => "io.kuasar.vm.kernel_params",
        }
    }
}

/// The wishes that the annotations state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Wishes {
    /// See [`Annotation::Vcpus`].
    pub vcpus: Option<u32>,
    /// See [`Annotation::MemoryMib`].
    pub memory_mib: Option<u64>,
    /// See [`Annotation::KernelParams`].
    pub kernel_params: String,
}

impl Wishes {
    /// Reads a pod's annotations. Those of others are none of our business.
    ///
    /// # Errors
    /// When one of ours is not allowed, not known, or has a value that means nothing.
    pub(crate) fn read<'a>(
        annotations: impl IntoIterator<Item = (&'a String, &'a String)>,
        allowed: &[Annotation],
    ) -> Result<Self, PodError> {
        let ours: BTreeMap<_, _> =
            annotations.into_iter().filter(|(name, _)| name.starts_with(PREFIX)).collect();
        let mut wishes = Self::default();
        for (name, value) in ours {
            let known = Annotation::ALL.into_iter().find(|known| known.name() == name);
            let known = known.ok_or_else(|| unknown(name))?;
            if !allowed.contains(&known) {
                return Err(PodError::Refused(format!(
                    "the annotation {name} is not allowed on this node; remove it from the pod, or add it to \
                     hypervisor.allowed_annotations of the node's configuration"
                )));
            }
            wishes.set(known, value)?;
        }
        Ok(wishes)
    }

    fn set(&mut self, annotation: Annotation, value: &str) -> Result<(), PodError> {
        let odd = |expected: &str| {
            let name = annotation.name();
            PodError::Refused(format!("the annotation {name} is {value:?}, expected {expected}"))
        };
        match annotation {
            Annotation::Vcpus => {
                let host = super::size::host_cpus();
                let number = value.parse().ok().filter(|number| (1..=host).contains(number));
                self.vcpus =
                    Some(number.ok_or_else(|| odd(&format!("a whole number from 1 to this node's {host}")))?);
            }
            Annotation::MemoryMib => {
                let number = value.parse().ok().filter(|number| (1..=1 << 24).contains(number));
                self.memory_mib = Some(number.ok_or_else(|| odd("a whole number of MiB"))?);
            }
            Annotation::KernelParams => {
                if value.len() > MAX_KERNEL_PARAMS || !value.chars().all(|c| c == ' ' || c.is_ascii_graphic())
                {
                    return Err(odd(&format!(
                        "at most {MAX_KERNEL_PARAMS} printable ASCII characters in one line"
                    )));
                }
                value.clone_into(&mut self.kernel_params);
            }
        }
        Ok(())
    }
}

fn unknown(name: &str) -> PodError {
    let known = Annotation::ALL.map(Annotation::name);
    let nearest = known
        .iter()
        .max_by(|a, b| strsim::jaro_winkler(name, a).total_cmp(&strsim::jaro_winkler(name, b)))
        .copied()
        .unwrap_or_default();
    PodError::Refused(format!(
        "the annotation {name} is not known; did you mean {nearest}? There are {}",
        known.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, value: &str, allowed: &[Annotation]) -> Result<Wishes, String> {
        let annotations = BTreeMap::from([
            (name.to_owned(), value.to_owned()),
            ("kubernetes.io/config.source".to_owned(), "api".to_owned()),
        ]);
        Wishes::read(&annotations, allowed).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_allowed_is_read() {
        let all = Annotation::ALL;
        assert_eq!(read("io.kuasar.vm.vcpus", "1", &all).unwrap().vcpus, Some(1));
        assert_eq!(read("io.kuasar.vm.memory_mib", "300", &all).unwrap().memory_mib, Some(300));
        let params = "task.log_level=debug quiet";
        assert_eq!(read("io.kuasar.vm.kernel_params", params, &all).unwrap().kernel_params, params);
        assert_eq!(read("io.kata-containers.x", "y", &[]).unwrap(), Wishes::default());
    }

    #[test]
    fn what_is_not_allowed_is_refused_by_name() {
        let error = read("io.kuasar.vm.vcpus", "1", &[Annotation::MemoryMib]).unwrap_err();
        assert!(
            error.starts_with("the annotation io.kuasar.vm.vcpus is not allowed on this node; "),
            "{error}"
        );
        assert!(error.contains("hypervisor.allowed_annotations"), "{error}");
    }

    #[test]
    fn what_is_not_known_or_means_nothing_is_refused_by_name() {
        let all = Annotation::ALL;
        let error = read("io.kuasar.vm.vcpu", "1", &all).unwrap_err();
        assert!(error.contains("vm.vcpu is not known; did you mean io.kuasar.vm.vcpus?"), "{error}");
        for (name, values) in [
            ("io.kuasar.vm.vcpus", vec!["0", "-1", "two", "", "4000000000", "99999999999999999999"]),
            ("io.kuasar.vm.memory_mib", vec!["0", "-5", "1Gi", "18446744073709551615"]),
            ("io.kuasar.vm.kernel_params", vec!["a\nb", "a\0b", "ä"]),
        ] {
            for value in values {
                let error = read(name, value, &all).unwrap_err();
                assert!(
                    error.starts_with(&format!("the annotation {name} is {value:?}, expected ")),
                    "{error}"
                );
            }
        }
        assert!(read("io.kuasar.vm.kernel_params", &"x".repeat(1025), &all).is_err());
    }
}
