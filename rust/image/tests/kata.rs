//! Images of Kata's builder (`tools/osbuilder/image-builder/image_builder.sh`), made here with the tools and
//! the options that it uses: `mkfs.ext4 -q -F -b 4096`, `tune2fs -m 3`, `fsck.ext4 -D -y` or `mkfs.erofs
//! -zlz4hc -Enoinline_data` for the file system; where it calls `parted mklabel msdos` and its `nsdax`, the
//! bytes that these write.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::{bad, good, has, host, inspect, tool};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
/// Its images are multiples of it.
const SIZE: u64 = 128 * MIB;
/// Size of its own headers: MBR and superblock, then MBR and a MiB of nothing.
const FS: u64 = 3 * MIB;

/// `parted -s -a optimal IMAGE -- mklabel msdos mkpart primary ext4 START END [set 1 boot on]`, sectors.
fn label(partitions: &[(u32, u32)], boot: bool) -> [u8; 512] {
    let mut sector = [0; 512];
    sector[440..444].copy_from_slice(&0x000b_5cf1_u32.to_le_bytes());
    for (index, (start, end)) in partitions.iter().enumerate() {
        let entry = &mut sector[446 + 16 * index..][..16];
        entry[0] = if boot && index == 0 { 0x80 } else { 0 };
        entry[1..4].copy_from_slice(&[4, 4, 1]);
        entry[4] = 0x83;
        entry[5..8].copy_from_slice(&[0x0f, 0xa3, 0x21]);
        entry[8..12].copy_from_slice(&start.to_le_bytes());
        entry[12..16].copy_from_slice(&(end - start).to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// `nsdax IMAGE 2097152 2097152`.
fn header() -> [u8; 4096] {
    let mut block = [0; 4096];
    block[..15].copy_from_slice(b"NVDIMM_PFN_INFO");
    block[54] = 2;
    block[56..64].copy_from_slice(&(2 * MIB).to_le_bytes());
    block[72] = 1;
    block[84..88].copy_from_slice(&(2_u32 << 20).to_le_bytes());
    block[4088..].copy_from_slice(&0x685b_032b_e394_3830_u64.to_le_bytes());
    block
}

/// An image with DAX header; `hashes` of its MiB at the end are a partition of their own
/// (`MEASURED_ROOTFS=yes`).
fn kata(dir: &Path, hashes: u64) -> PathBuf {
    let (root, part) = (dir.join("root"), dir.join("part"));
    common::root(&root, false);
    File::create(&part).unwrap().set_len(SIZE - FS - hashes * MIB).unwrap();
    good(host("mkfs.ext4", &["-q", "-F", "-b", "4096", "-d"], &root).arg(&part));
    good(&mut host("tune2fs", &["-m", "3"], &part));
    // 1: it has optimised the folders.
    let checked = host("fsck.ext4", &["-D", "-y", "-f"], &part).output().unwrap();
    assert!(matches!(checked.status.code(), Some(0 | 1)), "{checked:?}");
    wrap(dir, &part, hashes)
}

/// Puts tables and header around a file system.
fn wrap(dir: &Path, part: &Path, hashes: u64) -> PathBuf {
    let image = dir.join("kata-containers.img");
    let file = File::create(&image).unwrap();
    file.set_len(SIZE).unwrap();
    let sectors = |bytes: u64| u32::try_from(bytes / 512).unwrap();
    for (base, start) in [(0, FS), (2 * MIB, MIB)] {
        let end = sectors(SIZE - base);
        let split = end - sectors(hashes * MIB);
        let all = [(sectors(start), split), (split, end)];
        file.write_all_at(&label(&all[..if hashes > 0 { 2 } else { 1 }], hashes > 0), base).unwrap();
    }
    file.write_all_at(&header(), 4096).unwrap();
    file.write_all_at(&fs::read(part).unwrap(), FS).unwrap();
    image
}

#[test]
fn an_image_with_a_dax_header_is_as_good_as_ours() {
    let dir = TempDir::new().unwrap();
    let image = kata(dir.path(), 0);
    let lines = inspect(&image);
    for wanted in [
        "size 134217728 bytes",
        "table 1, at 0",
        "disk id 0x000b5cf1",
        "start sector 6144",
        "table 2, at 2 MiB",
        "start sector 2048",
        "checksum 0x685b032be3943830",
        "file system, at 3 MiB",
        "type ext4",
        "file 1200000 bytes /bin/big",
    ] {
        has(&lines, wanted);
    }
    assert!(!lines.iter().any(|line| line.contains("WRONG")), "{}", lines.join("\n"));
    good(tool().arg("verify").arg(&image));

    // One byte of each superblock, and it is not.
    let file = File::options().write(true).open(&image).unwrap();
    file.write_all_at(&[4], 4096 + 72).unwrap();
    file.write_all_at(b"x", FS + 1024 + 120).unwrap();
    let error = bad(tool().arg("verify").arg(&image));
    assert!(error.contains("file system, at 3 MiB: checksum is 0x"), "{error}");
    assert!(error.contains("PFN superblock, at 4096: mode is 4: must be 1"), "{error}");
    assert!(error.contains("checksum is 0x685b032be3943830: must be "), "{error}");
}

#[test]
fn a_measured_image_has_a_second_partition() {
    let dir = TempDir::new().unwrap();
    let image = kata(dir.path(), 2);
    let lines = inspect(&image);
    has(&lines, "type ext4");
    has(&lines, "file 1200000 bytes /bin/big");
    let error = bad(tool().arg("verify").arg(&image));
    for wanted in [
        "table 1, at 0: sectors is 251904 of 512 bytes: must be 256000, to the end of the file",
        "table 1, at 0: other entries is 1: there must be one partition only",
        "table 2, at 2 MiB: other entries is 1: there must be one partition only",
    ] {
        assert!(error.contains(wanted), "{wanted:?} is not in {error}");
    }
}

#[test]
fn erofs_is_walked_packed_or_not_with_inodes_of_both_sizes() {
    let dir = TempDir::new().unwrap();
    let (root, part) = (dir.path().join("root"), dir.path().join("part"));
    common::root(&root, false);
    for n in 0..200 {
        fs::write(root.join(format!("etc/{n:0>60}")), n.to_string()).unwrap();
    }
    let packed = "incompat 0x1: content is packed: DAX cannot map it";
    for (extended, options, wrong) in [
        (1, &["-zlz4hc", "-Enoinline_data,force-inode-extended"][..], packed),
        (0, &["-zlz4hc", "-Enoinline_data,force-inode-compact"], packed),
        (0, &["-Enoinline_data,force-inode-compact"], ""),
        // The end of a folder lies behind its inode.
        (0, &["-Eforce-inode-compact"], ""),
        (1, &["-Eforce-inode-extended"], ""),
    ] {
        good(host("mkfs.erofs", options, &part).arg(&root));
        let image = wrap(dir.path(), &part, 0);
        let bytes = fs::read(&part).unwrap();
        let [low, high] = [bytes[1024 + 14], bytes[1024 + 15]];
        let inode = usize::from(u16::from_le_bytes([low, high])) * 32;
        assert_eq!(bytes[inode] & 1, extended, "{options:?}: the size of the root's inode");
        let lines = inspect(&image);
        for wanted in
            ["type erofs", "file 1200000 bytes /bin/big", "file 64 bytes /sbin/init", "file 17 bytes /etc/"]
        {
            has(&lines, wanted);
        }
        let names: Vec<_> = lines.iter().filter(|line| line.starts_with("file 3 bytes /etc/000")).collect();
        assert!(names.len() == 2, "{}", lines.join("\n"));
        let mut verify = tool();
        verify.arg("verify").arg(&image);
        if wrong.is_empty() {
            good(&mut verify);
        } else {
            let error = bad(&mut verify);
            assert!(error.contains(wrong) && error.contains(": 1 of "), "{error}");
        }
    }
}
