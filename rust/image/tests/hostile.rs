//! Files that mean harm: whatever the bytes, looking at them ends, and without a panic.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::fs;

use kuasar_image::archive;
use kuasar_image::source::Pieces;
use kuasar_image::{examine, report::Report};

/// Numbers that look random and are the same in every run (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }
}

#[test]
fn random_tables_superblocks_and_file_systems_are_judged() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    kuasar_image::disk::write_header(&path, Some(4 << 20)).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let mut numbers = Numbers(1);
    for round in 0..1000 {
        for (at, length) in [(440, 72), (4096, 96), (8184, 8), ((2 << 20) + 440, 72), ((3 << 20) + 1024, 272)]
        {
            let bytes: Vec<u8> = (0..length).map(|_| numbers.next() as u8).collect();
            file.write_all_at(&bytes, at).unwrap();
        }
        // Every other time what is needed to get past the first look.
        if round % 2 == 0 {
            file.write_all_at(&[0x53, 0xef], (3 << 20) + 1024 + 56).unwrap();
            file.write_all_at(b"NVDIMM_PFN_INFO\0", 4096).unwrap();
        }
        let report = examine::examine(&path).unwrap();
        assert!(report.problems().count() > 0);
        assert!(report.to_string().is_ascii(), "bytes of the image reach the terminal: {report}");
    }
}

#[test]
fn mutated_file_systems_are_walked() {
    let dir = tempfile::tempdir().unwrap();
    let (root, path) = (dir.path().join("root"), dir.path().join("image"));
    common::root(&root, false);
    for odd in ["bin/big", "etc/a file", "etc/with \"quotes\""] {
        fs::remove_file(root.join(odd)).unwrap();
    }
    let mut numbers = Numbers(3);
    for fs_name in ["ext4", "erofs", "xfs"] {
        let mut command = common::tool();
        command.args(["build", "--arch", "x86_64", "--fs", fs_name, "--rootfs"]);
        common::good(command.arg(&root).arg("--output").arg(&path));
        let original = fs::read(&path).unwrap();
        // What is not empty of its first MiB: superblock, inodes, folders.
        let used: Vec<usize> = (768..1024).filter(|n| original[n * 4096..][..4096] != [0; 4096]).collect();
        let mut bytes = original.clone();
        for _ in 0..300 {
            let block = used[numbers.below(used.len())] * 4096;
            for _ in 0..=numbers.below(8) {
                bytes[block + numbers.below(4096)] = numbers.next() as u8;
            }
            let pieces = vec![(0, &bytes[..])];
            examine::disk_image(&Pieces { size: bytes.len() as u64, pieces }).unwrap();
            bytes[block..block + 4096].copy_from_slice(&original[block..block + 4096]);
        }
    }
}

#[test]
fn mutated_initrds_are_judged() {
    let dir = tempfile::tempdir().unwrap();
    common::root(&dir.path().join("root"), false);
    fs::remove_file(dir.path().join("root/bin/big")).unwrap();
    let path = dir.path().join("initrd");
    let mut numbers = Numbers(2);
    for packing in ["none", "gzip"] {
        let mut command = common::tool();
        command.args(["initrd", "--arch", "x86_64", "--compress", packing, "--rootfs"]);
        common::good(command.arg(dir.path().join("root")).arg("--output").arg(&path));
        let original = fs::read(&path).unwrap();
        let mut ends = 0;
        for _ in 0..5000 {
            let mut bytes = original.clone();
            for _ in 0..=numbers.below(4) {
                let at = numbers.below(bytes.len());
                bytes[at] = if numbers.below(2) == 0 { b'f' } else { numbers.next() as u8 };
            }
            bytes.truncate(numbers.below(2 * bytes.len()).max(6));
            let mut report = Report::default();
            archive::judge(&bytes[..], &mut report).unwrap();
            ends += usize::from(report.problems().count() == 0);
        }
        // Changes of what no field has, such as numbers of inodes.
        assert!(ends < 2500, "{packing}: {ends} of 5000 are good");
    }
}

#[test]
fn an_entry_that_claims_4_gib_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("initrd");
    fs::write(&path, [b"070701".as_slice(), "ffffffff".repeat(13).as_bytes()].concat()).unwrap();
    let report = examine::examine(&path).unwrap().to_string();
    assert!(report.contains("a name is 4294967295 bytes; 1 to 4096 are allowed"), "{report}");
}
