//! Every field that `verify` judges: bytes put into a good image, and the sentence it has for them.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{good, tool};
use tempfile::TempDir;

const PFN: usize = 4096;
const TABLE_2: usize = 2 << 20;
const FS: usize = 3 << 20;
/// Offset of the superblocks of ext4 and EROFS.
const SB: usize = FS + 1024;

/// Offset and value of changed bytes, and the problem that must be among those found.
type Case<'a> = (usize, &'a [u8], &'a str);

/// An image made with these arguments, which is good.
fn image(dir: &Path, arguments: &[&str]) -> (PathBuf, Vec<u8>) {
    let (root, image) = (dir.join("root"), dir.join("image"));
    if !root.exists() {
        common::root(&root, false);
        // `mkfs.xfs` takes no blanks.
        fs::remove_file(root.join("etc/a file")).unwrap();
        fs::remove_file(root.join("etc/with \"quotes\"")).unwrap();
    }
    let mut command = tool();
    command.args(["build", "--arch", "x86_64", "--rootfs"]).arg(root).arg("--output").arg(&image);
    good(command.args(arguments));
    assert_eq!(problems(&image), [""; 0]);
    let bytes = fs::read(&image).unwrap();
    (image, bytes)
}

/// As `verify` prints them.
fn problems(image: &Path) -> Vec<String> {
    let report = kuasar_image::examine::examine(image).unwrap();
    report
        .problems()
        .map(|f| format!("{}: {} is {}: {}", f.section, f.name, f.value, f.problem.as_deref().unwrap()))
        .collect()
}

#[track_caller]
fn judge(image: &Path, original: &[u8], section: &str, cases: &[Case<'_>]) {
    for (at, bytes, wanted) in cases {
        let mut changed = original.to_vec();
        changed[*at..at + bytes.len()].copy_from_slice(bytes);
        assert!(changed != original, "{wanted}: the case changes nothing");
        fs::write(image, changed).unwrap();
        let found = problems(image);
        let wanted = format!("{section}: {wanted}");
        assert!(found.iter().any(|problem| problem.starts_with(&wanted)), "{wanted:?} is not in {found:#?}");
    }
}

#[test]
fn the_dax_superblock() {
    let dir = TempDir::new().unwrap();
    let (image, original) = image(dir.path(), &["--fs", "erofs"]);
    judge(
        &image,
        &original,
        "PFN superblock, at 4096",
        &[
            (PFN, b"X", "signature is XVDIMM_PFN_INFO\\x00: must be NVDIMM_PFN_INFO and a zero"),
            (PFN + 47, &[1], "parent uuid is 00000000000000000000000000000001: must be zero"),
            (PFN + 48, &[1], "flags is 0x1: must be 0"),
            (PFN + 52, &[1], "version is 1.2: must be 0.2"),
            (PFN + 54, &[4], "version is 0.4: must be 0.2"),
            (PFN + 58, &[0x10], "data offset is 1048576 bytes: must be 2097152"),
            (PFN + 64, &[9], "page frames is 9: must be 0 in mode RAM"),
            (PFN + 72, &[0], "mode is 0, none: must be 1"),
            (PFN + 72, &[2], "mode is 2, pmem: must be 1"),
            (PFN + 77, &[16], "start pad is 4096 bytes: must be 0"),
            (PFN + 81, &[32], "end trunc is 8192 bytes: must be 0"),
            (PFN + 86, &[0x10], "alignment is 1048576 bytes: must be 2097152 and divide the size"),
            (PFN + 88, &[1], "padding is not zero: must be zero"),
            (PFN + 4087, &[1], "padding is not zero: must be zero"),
            (PFN + 4088, &[1], "checksum is 0x685b032be3943801: must be 0x685b032be3943830, Fletcher-64"),
        ],
    );
}

#[test]
fn ext4() {
    let dir = TempDir::new().unwrap();
    let (image, original) = image(dir.path(), &[]);
    judge(
        &image,
        &original,
        "file system, at 3 MiB",
        &[
            (SB + 56, &[0], "type is unknown: no ext4, erofs, xfs or squashfs begins here"),
            (SB + 24, &[0], "block size is 1024 bytes: must be 4096, the page size, for DAX"),
            (SB + 24, &[255; 4], "block size is 4398046511104 bytes: must be 4096"),
            (SB + 4, &[0; 4], "blocks is 0: must be 1 to "),
            (SB + 4, &[255; 4], "blocks is 4294967295: must be 1 to "),
            (SB + 16, &[255; 4], "inodes is "),
            (SB, &[0; 4], "inodes is 0, "),
            (SB + 58, &[0], "state is 0: must be 1: unmounted cleanly, no errors"),
            (SB + 58, &[3], "state is 3: must be 1: unmounted cleanly, no errors"),
            (SB + 96, &[0xc6], "features is compat "),
            // Ours has none; `tests/kata.rs` has one that does.
            (SB + 101, &[original[SB + 101] | 4], "checksum is 0x00000000: must be 0x"),
        ],
    );
}

#[test]
fn erofs() {
    let dir = TempDir::new().unwrap();
    let (image, original) = image(dir.path(), &["--fs", "erofs"]);
    let packed = "content is packed: DAX cannot map it";
    let packed = [1, 2, 0x10, 0x20, 0x0a]
        .map(|bit: u8| ([bit], format!("features is compat 0x1, incompat {bit:#x}: {packed}")));
    let packed: Vec<Case<'_>> =
        packed.iter().map(|(bit, wanted)| (SB + 80, &bit[..], wanted.as_str())).collect();
    let others: [Case<'_>; 7] = [
        (SB, &[0], "type is unknown: "),
        (SB + 4, &[1, 2, 3, 4], "checksum is 0x04030201: must be 0x"),
        (SB + 12, &[9], "block size is 512 bytes: must be 4096"),
        (SB + 12, &[255], "block size is 0 bytes: must be 4096"),
        (SB + 36, &[0; 4], "blocks is 0: must be 1 to "),
        (SB + 36, &[255; 4], "blocks is 4294967295: must be 1 to "),
        (SB + 80, &[8], "features is compat 0x1, incompat 0x8: content lies in other files"),
    ];
    judge(&image, &original, "file system, at 3 MiB", &[&packed[..], &others].concat());
    // Pieces of files (CHUNKED_FILE) and long names of attributes are no matter.
    let mut changed = original;
    changed[SB + 80] = 0x44;
    fs::write(&image, changed).unwrap();
    assert!(
        problems(&image).iter().all(|problem| problem.contains(": checksum is ")),
        "{:?}",
        problems(&image)
    );
}

#[test]
fn xfs() {
    let dir = TempDir::new().unwrap();
    let (image, original) = image(dir.path(), &["--fs", "xfs"]);
    judge(
        &image,
        &original,
        "file system, at 3 MiB",
        &[
            (FS, b"Y", "type is unknown: "),
            (FS + 6, &[2], "block size is 512 bytes: must be 4096"),
            (FS + 8, &[0; 8], "blocks is 0: must be 1 to "),
            (FS + 8, &[255; 8], "blocks is 18446744073709551615: must be 1 to "),
            (FS + 100, &[0xb4, 4], "version is 4: must be 5, with checksums"),
            (FS + 224, &[0; 4], "checksum is 0x00000000: must be 0x"),
            (FS + 108, b"x", "checksum is 0x"),
        ],
    );
}

#[test]
fn dm_verity() {
    let dir = TempDir::new().unwrap();
    let (image, original) = image(dir.path(), &["--fs", "erofs", "--verity"]);
    let blocks = u32::from_le_bytes(*original[SB + 36..].first_chunk().unwrap());
    let tree = FS + blocks as usize * 4096;
    let wanted = format!("data blocks is {}: must be {blocks}, as many as the file system has", blocks ^ 1);
    judge(
        &image,
        &original,
        "dm-verity, behind the file system",
        &[
            (tree + 8, &[2], "version is 2, hash type 1: must be 1, hash type 1"),
            (tree + 12, &[0], "version is 1, hash type 0: must be 1, hash type 1"),
            (tree + 32, b"sha1\0\0", "hash is sha1: must be sha256, which the guest's kernel knows"),
            (tree + 64, &[0, 2], "block sizes is 512 and 4096 bytes: must be 4096"),
            (tree + 68, &[0, 2], "block sizes is 4096 and 512 bytes: must be 4096"),
            (tree + 72, &(blocks ^ 1).to_le_bytes(), &wanted),
        ],
    );
    // A file system whose end leaves room for the tree's superblock alone.
    let last = original.len() - 4096;
    let mut original = original;
    original.copy_within(tree..tree + 4096, last);
    let blocks = u32::try_from((last - FS) / 4096).unwrap();
    let needed = kuasar_image::verity::size(u64::from(blocks) * 4096);
    let wanted = format!("tree is {needed} bytes: does not fit into the file");
    let case = (SB + 36, &blocks.to_le_bytes()[..], wanted.as_str());
    judge(&image, &original, "dm-verity, behind the file system", &[case]);
}

#[test]
fn the_partition_tables() {
    let dir = TempDir::new().unwrap();
    let (image, original) = image(dir.path(), &["--fs", "erofs"]);
    for (base, section, start, other) in
        [(0, "table 1, at 0", 6144, 2048_u32), (TABLE_2, "table 2, at 2 MiB", 2048, 6144)]
    {
        let wanted =
            format!("start is sector {other}: must be {start}: the file system lies 3 MiB into the file");
        let cases: [Case<'_>; 6] = [
            (base + 511, &[0], "signature is none: no partition table ends here with 55 aa"),
            (base + 450, &[7], "type is 0x07: must be 0x83, Linux"),
            (base + 454, &other.to_le_bytes(), &wanted),
            (base + 461, &[9], "sectors is "),
            (base + 466, &[0x83], "other entries is 1: there must be one partition only"),
            (base + 506, &[1], "other entries is 1: there must be one partition only"),
        ];
        judge(&image, &original, section, &cases);
    }
}

#[test]
fn a_guid_partition_table() {
    let dir = TempDir::new().unwrap();
    let (image, mut original) = image(dir.path(), &["--fs", "erofs"]);
    let end = original.len();
    common::gpt(&mut original, TABLE_2, end, 2048);
    let header = TABLE_2 + 512;
    judge(
        &image,
        &original,
        "table 2, at 2 MiB",
        &[
            (header, b"e", "GPT signature is eFI PART: must be EFI PART"),
            (header + 12, &[91], "GPT header is 91 bytes: must be 92 to 512 bytes"),
            (header + 12, &[1, 2], "GPT header is 513 bytes: must be 92 to 512 bytes"),
            (header + 16, &[1, 2, 3, 4], "GPT header's CRC is 0x04030201: must be 0x"),
            // What no other field knows.
            (header + 56, &[1], "GPT header's CRC is 0x"),
            (header + 24, &[2], "GPT sector is 2: must be 1, where it is"),
            (header + 32, &[255; 4], "GPT backup is sector 4294967295: lies beyond the end of the file"),
            (
                header + 80,
                &[1, 2],
                "GPT entries is 513 of 128 bytes from sector 2: are too many, or too small",
            ),
            (
                header + 84,
                &[127],
                "GPT entries is 128 of 127 bytes from sector 2: are too many, or too small",
            ),
            (TABLE_2 + 1024 + 16, &[1], "GPT entries' CRC is 0x"),
            (TABLE_2 + 1024 + 38, &[1], "GPT partition is sectors 281474976712704 to "),
        ],
    );
}
