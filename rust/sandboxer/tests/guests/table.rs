//! docs/guest-matrix.md.

use vmm_sandboxer::vmm::Machine;

use crate::vmm::{Q35, Vmm};

/// The table's parts, in its order: each is made by a test of its own.
const PARTS: [Vmm; 4] = [Q35, Vmm::Qemu(Machine::Virt), Vmm::CloudHypervisor, Vmm::StratoVirt];

/// One guest that came up.
#[derive(Debug)]
pub(crate) struct Row {
    pub vmm: Vmm,
    pub kernel: String,
    pub kernel_bytes: u64,
    pub root: String,
    pub root_bytes: u64,
    /// File system and options, as the guest's `/proc/mounts` has them.
    pub mounted: String,
    /// The VMM's processor time until READY, as a multiple of the floor's.
    pub boot: f64,
    pub memory_kib: u64,
}

const HEAD: &str = "# Guest matrix

Every kernel with every kind of root that it knows, each booted until its agent said READY: one vCPU, 256 MiB. Under QEMU (x86_64: q35,
aarch64: virt) by software emulation on an x86_64 machine, with the pod's folder shared by virtiofs. Under Cloud Hypervisor, and StratoVirt
(its machine microvm), which the daemon has no driver for yet, with KVM in an emulated machine (`tests/lab/machine`), and nothing shared.

Made by `KUASAR_BLESS=1 cargo test --test guests -- --ignored --test-threads=1 every_kernel`, with `KUASAR_GUESTS` the result of `nix build .#guests-qemu` and
`KUASAR_GUESTS_AARCH64` that of `nix build .#packages.aarch64-linux.guests-qemu`; the other hypervisors' rows by
`KUASAR_BLESS=1 KUASAR_LOGS=$PWD/docs tests/lab/check hypervisors`, with `KUASAR_CLOUD_HYPERVISOR` (here 53.0) and `KUASAR_STRATOVIRT`
(here of April 2026: 2.5.0 has no virtio-pmem) their programs, built without optimization. Without `KUASAR_BLESS` the test boots them all
again and compares the rows, not the figures.

- **boot**: processor time of the VMM from its start to READY, as a multiple of that of the same kernel with an empty init (the floor:
  ext4, on pmem where there is pmem, else on virtio-blk); median of three under QEMU, where on a machine with other work the last
  tenth is noise. Under the other hypervisors it is of one boot, in a machine that is emulated itself: half of it may be.
- **guest memory**: pages of the guest's memory that the host had to give it by then. What a guest reads from pmem is not in it:
  that is the host's page cache, which all guests of an image share.
- dm-verity reads what it checks into the guest's own page cache: such a root has no DAX, on pmem or not.
- QEMU's machine for aarch64 has no virtio-pmem.
- StratoVirt knows no ELF file: it enters vmlinux.bin, the kernel as it lies in memory (kernel-configs/README.md). Its filter of system
  calls does not know the one that maps its pmem: with such a root it runs without the filter. It opens an image on pmem for writing,
  though it maps it for itself alone.

| hypervisor | architecture | kernel | MB | root | MB | mounted as | boot | guest memory, MiB |
|---|---|---|---|---|---|---|---|---|
";

fn render(row: &Row) -> String {
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    format!(
        "{} {} | {:.2} | {} | {:.2} | `{}` | {:.2} | {:.1} |",
        start(row.vmm),
        row.kernel,
        megabytes(row.kernel_bytes),
        row.root,
        megabytes(row.root_bytes),
        row.mounted,
        row.boot,
        row.memory_kib as f64 / 1024.0,
    )
}

/// Beginning of the rows of a part.
fn start(vmm: Vmm) -> String {
    format!("| {} | {} |", vmm.name(), vmm.architecture())
}

/// The file with new rows of one part; the others stay.
pub(crate) fn replace(old: &str, part: Vmm, rows: &[Row]) -> String {
    let (mut text, mut missing) = (HEAD.to_owned(), String::new());
    for of in PARTS {
        let lines: Vec<_> = if of == part {
            rows.iter().map(render).collect()
        } else {
            old.lines().filter(|line| line.starts_with(&start(of))).map(str::to_owned).collect()
        };
        if lines.is_empty() {
            missing += &format!(
                "\nNo guest of {} on {} has been in this table yet.\n",
                of.name(),
                of.architecture()
            );
        }
        for line in lines {
            text.push_str(&line);
            text.push('\n');
        }
    }
    text + &missing
}

/// The rows without the figures.
pub(crate) fn shape(text: &str) -> Vec<String> {
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    let rows = text.lines().filter(|line| line.starts_with('|')).map(cells);
    rows.map(|cells| [1, 2, 3, 5, 7].map(|at| cells.get(at).cloned().unwrap_or_default()).join(" | "))
        .collect()
}
