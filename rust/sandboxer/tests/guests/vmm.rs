//! The hypervisors that guests are booted with.

use vmm_sandboxer::vmm::Machine;

/// The daemon drives QEMU; of the others, it is the test that starts the program that it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vmm {
    Qemu(Machine),
    CloudHypervisor,
    StratoVirt,
}

pub(crate) const Q35: Vmm = Vmm::Qemu(Machine::Q35);

impl Vmm {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Qemu(_) => "QEMU",
            Self::CloudHypervisor => "Cloud Hypervisor",
            Self::StratoVirt => "StratoVirt",
        }
    }

    pub(crate) const fn architecture(self) -> &'static str {
        self.machine().architecture()
    }

    /// QEMU's machine; for the others, one of the same architecture.
    pub(crate) const fn machine(self) -> Machine {
        match self {
            Self::Qemu(machine) => machine,
            Self::CloudHypervisor | Self::StratoVirt => Machine::Q35,
        }
    }

    /// The variable that names the guests, and the flake's output that makes them.
    pub(crate) const fn guests(self) -> (&'static str, &'static str) {
        match self {
            Self::Qemu(Machine::Virt) => ("KUASAR_GUESTS_AARCH64", "packages.aarch64-linux.guests-qemu"),
            Self::Qemu(_) => ("KUASAR_GUESTS", "guests-qemu"),
            Self::CloudHypervisor => ("KUASAR_GUESTS_CLOUD_HYPERVISOR", "guests-cloud-hypervisor"),
            Self::StratoVirt => ("KUASAR_GUESTS_STRATOVIRT", "guests-stratovirt"),
        }
    }

    /// The variable that names the program that the test starts.
    pub(crate) const fn program(self) -> Option<&'static str> {
        match self {
            Self::Qemu(_) => None,
            Self::CloudHypervisor => Some("KUASAR_CLOUD_HYPERVISOR"),
            Self::StratoVirt => Some("KUASAR_STRATOVIRT"),
        }
    }

    /// The forms of a kernel that it enters, the fastest first.
    pub(crate) const fn forms(self) -> &'static [&'static str] {
        match self {
            Self::Qemu(Machine::Virt) => &["Image"],
            Self::Qemu(_) | Self::CloudHypervisor => &["vmlinux", "bzImage"],
            Self::StratoVirt => &["vmlinux.bin", "bzImage"],
        }
    }
}
