//! docs/guest-matrix.md.

/// One guest that came up.
#[derive(Debug)]
pub(crate) struct Row {
    pub architecture: &'static str,
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

Every kernel with every kind of root that it knows, under QEMU (x86_64: q35, aarch64: virt; one vCPU, 256 MiB, software emulation
on an x86_64 machine), each booted until its agent said READY. Made by
`KUASAR_BLESS=1 cargo test --test guests -- --ignored every_kernel`, with `KUASAR_GUESTS` the result of `nix build .#guests-qemu` and
`KUASAR_GUESTS_AARCH64` that of `nix build .#packages.aarch64-linux.guests-qemu`; without `KUASAR_BLESS` the test boots them all again
and compares the rows, not the figures.

- **boot**: processor time of the VMM from its start to READY, as a multiple of that of the same kernel with an empty init (the floor:
  ext4, on pmem where there is pmem, else on virtio-blk); median of three. On a machine with other work the last tenth is noise.
- **guest memory**: pages of the guest's memory that the host had to give it by then. What a guest reads from pmem is not in it:
  that is the host's page cache, which all guests of an image share.
- dm-verity reads what it checks into the guest's own page cache: such a root has no DAX, on pmem or not.
- QEMU's machine for aarch64 has no virtio-pmem.

| architecture | kernel | MB | root | MB | mounted as | boot | guest memory, MiB |
|---|---|---|---|---|---|---|---|
";

fn render(row: &Row) -> String {
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    format!(
        "| {} | {} | {:.2} | {} | {:.2} | `{}` | {:.2} | {:.1} |",
        row.architecture,
        row.kernel,
        megabytes(row.kernel_bytes),
        row.root,
        megabytes(row.root_bytes),
        row.mounted,
        row.boot,
        row.memory_kib as f64 / 1024.0,
    )
}

/// The file with new rows of an architecture; those of the other stay.
pub(crate) fn replace(old: &str, architecture: &str, rows: &[Row]) -> String {
    let is = |line: &str, other: &str| line.starts_with(&format!("| {other} |"));
    let (mut text, mut missing) = (HEAD.to_owned(), String::new());
    for of in ["x86_64", "aarch64"] {
        let lines: Vec<_> = if of == architecture {
            rows.iter().map(render).collect()
        } else {
            old.lines().filter(|line| is(line, of)).map(str::to_owned).collect()
        };
        if lines.is_empty() {
            missing = format!("\nNo guest of {of} has been in this table yet.\n");
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
    rows.map(|cells| [1, 2, 4, 6].map(|at| cells.get(at).cloned().unwrap_or_default()).join(" | ")).collect()
}
