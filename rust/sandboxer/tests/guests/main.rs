//! Boots every kernel with every kind of root. Needs `KUASAR_GUESTS`, what `nix build .#guests-qemu` makes;
//! says "skipped" without; `KUASAR_GUESTS_AARCH64` is the same of the other architecture, `vmm.rs` has the
//! variables of other hypervisors. `KUASAR_BLESS=1` writes docs/guest-matrix.md instead of comparing with it.

#![allow(clippy::disallowed_methods, reason = "tests work in folders of their own")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where it fails")]

#[path = "../common/mod.rs"]
mod common;
mod console;
mod given;
mod lab;
mod table;
mod vmm;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
};

use lab::{Booted, Guests, Kernel, ROOTS, RootKind, Running, start};
use table::Row;
use vmm::{Q35, Vmm};
use vmm_sandboxer::vmm::{Machine, Root};

/// Name of the memory that is the guest's, in `/proc/PID/smaps`.
const GUEST_MEMORY: &str = "memfd:";
/// Number of times that the test boots each guest of QEMU for a figure that it writes down; in a machine that
/// is emulated to have KVM, once.
const BLESSED_BOOTS: usize = 3;

fn named(roots: &[RootKind], name: &str) -> RootKind {
    *roots.iter().find(|kind| kind.name == name).unwrap()
}

fn find<'a>(kernels: &'a [Kernel], name: &str) -> &'a Kernel {
    kernels.iter().find(|kernel| kernel.name == name).unwrap()
}

/// Median of the VMM's processor time up to the empty init, seconds.
async fn floor(guests: &Guests, kernel: &Kernel, boots: usize) -> f64 {
    let mut busy = Vec::new();
    for _ in 0..boots {
        let booted = guests.start(kernel, guests.floor()).await;
        booted.said("INIT UP").await;
        busy.push(booted.busy().as_secs_f64());
        booted.stop().await;
    }
    median(busy)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    *values.get(values.len() / 2).unwrap()
}

async fn row(guests: &Guests, kernel: &Kernel, kind: RootKind, floor: f64, boots: usize) -> Row {
    println!("booting {}, {}", kernel.name, kind.name);
    let (mut busy, mut memory, mut mounted) = (Vec::new(), 0, String::new());
    for _ in 0..boots {
        let booted = guests.start(kernel, kind).await;
        let guest = booted.ready().await;
        busy.push(booted.busy().as_secs_f64());
        mounted = without_sizes(&guest.ready.root);
        memory = booted.mapped(GUEST_MEMORY, "Rss");
        booted.stop().await;
    }
    Row {
        vmm: guests.vmm(),
        kernel: kernel.name.clone(),
        kernel_bytes: fs::metadata(&kernel.path).unwrap().len(),
        root: kind.name.into(),
        root_bytes: fs::metadata(guests.root(kind)).unwrap().len(),
        mounted,
        boot: median(busy) / floor,
        memory_kib: memory,
    }
}

/// Mount options less those that say how much memory is left.
fn without_sizes(options: &str) -> String {
    let is_size = |word: &&str| ["size=", "nr_inodes="].iter().any(|name| word.starts_with(name));
    options.split(',').filter(|word| !is_size(word)).collect::<Vec<_>>().join(",")
}

/// Returns true if the table has this combination. A kernel's packing has no effect on roots: one root will
/// do.
fn wanted(kernel: &Kernel, kind: RootKind) -> bool {
    kernel.has(kind.needs) && (kernel.is_first || kind.name == ROOTS[0].name)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots some twenty guests, one after another: its figures are of a machine that does nothing else"]
async fn every_kernel_boots_every_root_that_it_knows() {
    boot_all(Q35).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs guests that `make check` does not build"]
async fn every_kernel_of_aarch64_boots_every_root_that_it_knows() {
    boot_all(Vmm::Qemu(Machine::Virt)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Cloud Hypervisor, KVM, and guests that `make check` does not build"]
async fn every_kernel_of_cloud_hypervisor_boots_every_root_that_it_knows() {
    boot_all(Vmm::CloudHypervisor).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs StratoVirt, KVM, vhost-vsock, and guests that `make check` does not build"]
async fn every_kernel_of_stratovirt_boots_every_root_that_it_knows() {
    boot_all(Vmm::StratoVirt).await;
}

async fn boot_all(vmm: Vmm) {
    let Some(guests) = Guests::new(vmm) else { return };
    let blessed = std::env::var("KUASAR_BLESS").is_ok_and(|given| given == "1");
    let boots = if blessed && vmm.program().is_none() { BLESSED_BOOTS } else { 1 };
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/guest-matrix.md");
    let text = || fs::read_to_string(file).unwrap_or_default();
    let mut rows = Vec::new();
    for kernel in guests.kernels() {
        let floor = floor(&guests, &kernel, boots).await;
        for kind in guests.roots().filter(|kind| wanted(&kernel, *kind)) {
            let row = row(&guests, &kernel, kind, floor, boots).await;
            let dax = kind.root == Root::Pmem && kind.folder != "verity";
            assert_eq!(row.mounted.contains("dax=always"), dax, "{row:?}");
            assert!(kind.root == Root::Initrd || row.mounted.contains(" ro"), "{row:?}");
            rows.push(row);
            if blessed {
                fs::write(file, table::replace(&text(), vmm, &rows)).unwrap();
            }
        }
    }
    if blessed {
        return;
    }
    let (known, found) = (table::shape(&text()), table::shape(&table::replace(&text(), vmm, &rows)));
    assert_eq!(known, found, "docs/guest-matrix.md has other rows; KUASAR_BLESS=1 writes it anew");
}

/// On a host of either architecture.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_of_aarch64_comes_up() {
    let Some(guests) = Guests::new(Vmm::Qemu(Machine::Virt)) else { return };
    let kernels = guests.kernels();
    let booted = start(guests.config(find(&kernels, "micro, Image"), named(&ROOTS, "initrd, gzip"))).await;
    let guest = booted.ready().await;
    println!("{:?}", guest.ready);
    let Running::Daemon(vm) = &booted.vm else { panic!("not the daemon's") };
    assert!(vm.can_hot_attach(), "disks of a running pod");
    booted.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_byte_of_a_checked_root_stops_the_boot() {
    let Some(guests) = Guests::new(Q35) else { return };
    let kernels = guests.kernels();
    for root in ["EROFS on virtio-blk, dm-verity", "EROFS on pmem, dm-verity"] {
        let mut config = guests.config(find(&kernels, "micro, vmlinux"), named(&ROOTS, root));
        let copy = tempfile::NamedTempFile::new().unwrap();
        fs::copy(config.image.as_ref().unwrap(), copy.path()).unwrap();
        config.image = Some(copy.path().into());
        let booted = start(config.clone()).await;
        booted.ready().await;
        booted.stop().await;

        flip(copy.path());
        let booted = start(config).await;
        let error = booted.called().await.unwrap_err();
        println!("{error}");
        assert!(error.contains("the VM has ended"), "{error}");
        assert!(error.contains("data block") && error.contains("is corrupted"), "{error}");
        assert!(error.contains("Kernel panic - not syncing: dm-verity device corrupted"), "{error}");
    }
}

/// Changes one bit of the agent: of its first block, in the padding of the ELF header, which nothing but the
/// tree knows. The root has two programs, and its files lie in the order of their names: `bin/runc`,
/// `sbin/init`.
fn flip(image: &std::path::Path) {
    const FS: u64 = 3 << 20;
    let file = File::options().read(true).write(true).open(image).unwrap();
    let mut start = [0; 16];
    let mut agent = None;
    for at in (FS..file.metadata().unwrap().len()).step_by(4096) {
        file.read_exact_at(&mut start, at).unwrap();
        if start.starts_with(b"\x7fELF") {
            agent = Some((at + 15, start[15]));
        }
    }
    let (at, byte) = agent.unwrap();
    file.write_all_at(&[byte ^ 1], at).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_guest_shares_the_image_with_the_first() {
    let Some(guests) = Guests::new(Q35) else { return };
    let kernels = guests.kernels();
    for root in ["ext4 on pmem", "EROFS on pmem", "XFS on pmem"] {
        let kernel = find(&kernels, "mini, vmlinux");
        let config = guests.config(kernel, named(&ROOTS, root));
        let image = config.image.clone().unwrap();
        let name = image.to_str().unwrap();
        let first = start(config.clone()).await;
        let guest = first.ready().await;
        // Without DAX each guest copies what it reads into memory of its own, and maps the image as well.
        assert!(guest.ready.root.contains("dax=always"), "{root}: {}", guest.ready.root);
        let alone = first.mapped(name, "Pss");
        let second = start(config).await;
        let _second = second.ready().await;
        let pss = |booted: &Booted| booted.mapped(name, "Pss");
        let (both, resident) = (pss(&first) + pss(&second), second.mapped(name, "Rss"));
        let size = fs::metadata(&image).unwrap().len() / 1024;
        let added = both.saturating_sub(alone);
        println!(
            "{root}: the image has {size} KiB; one guest maps {alone} KiB of it, a second {resident} KiB and adds {added}"
        );
        assert!(alone > 0 && resident > 0, "the image is not mapped: {alone} {resident}");
        assert!(added * 4 < size, "a second guest adds {added} KiB of an image of {size} KiB");
        first.stop().await;
        second.stop().await;
    }
}
