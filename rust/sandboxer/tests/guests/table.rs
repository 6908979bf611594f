//! docs/guest-matrix.md.

use std::fmt::Write as _;

/// One guest that came up.
#[derive(Debug)]
pub(crate) struct Row {
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

Every kernel with every kind of root that it knows, under QEMU (q35, one vCPU, 256 MiB, software emulation), each booted until its
agent said READY. Made by `KUASAR_GUESTS=$(nix build --print-out-paths .#guests-qemu) KUASAR_BLESS=1 cargo test --test guests`;
without `KUASAR_BLESS` the test boots them all again and compares the rows, not the figures.

- **boot**: processor time of the VMM from its start to READY, as a multiple of that of the same kernel with an empty init on ext4 on
  pmem (the floor); median of three.
- **guest memory**: pages of the guest's memory that the host had to give it by then. What a guest reads from pmem is not in it:
  that is the host's page cache, which all guests of an image share.
- dm-verity reads what it checks into the guest's own page cache: such a root has no DAX, on pmem or not.

| kernel | MB | root | MB | mounted as | boot | guest memory, MiB |
|---|---|---|---|---|---|---|
";

pub(crate) fn render(rows: &[Row]) -> String {
    let mut text = HEAD.to_owned();
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    for row in rows {
        writeln!(
            text,
            "| {} | {:.2} | {} | {:.2} | `{}` | {:.2} | {:.1} |",
            row.kernel,
            megabytes(row.kernel_bytes),
            row.root,
            megabytes(row.root_bytes),
            row.mounted,
            row.boot,
            row.memory_kib as f64 / 1024.0,
        )
        .unwrap();
    }
    text
}

/// The rows without the figures.
pub(crate) fn shape(text: &str) -> Vec<String> {
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    let rows = text.lines().filter(|line| line.starts_with('|')).map(cells);
    rows.map(|cells| [1, 3, 5].map(|at| cells.get(at).cloned().unwrap_or_default()).join(" | ")).collect()
}
