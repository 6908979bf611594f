//! Images with every file system, hash trees, other packings, and images of other builders.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{bad, good, gpt, has, host, inspect, tool};
use tempfile::TempDir;

const FS: u64 = 3 << 20;

/// The program on `root`, with more arguments.
fn make(mode: &str, root: &Path, output: &Path, more: &[&str]) -> Command {
    let mut command = tool();
    command.args([mode, "--arch", "x86_64", "--rootfs"]).arg(root).arg("--output").arg(output).args(more);
    command
}

/// A root that every file system can hold: `mkfs.xfs` takes no blanks.
fn root(place: &Path, reverse: bool) -> PathBuf {
    let root = place.join("root");
    common::root(&root, reverse);
    for odd in ["etc/a file", "etc/with \"quotes\""] {
        fs::remove_file(root.join(odd)).unwrap();
    }
    root
}

/// The file system of an image in a file of its own.
fn alone(image: &Path) -> PathBuf {
    let path = image.with_extension("fs");
    fs::write(&path, &fs::read(image).unwrap()[FS as usize..]).unwrap();
    path
}

#[test]
fn every_kind_built_twice_is_equal() {
    let dir = TempDir::new().unwrap();
    let places = [false, true].map(|second| {
        let place = dir.path().join(if second { "some/other-and-longer-place" } else { "a" });
        fs::create_dir_all(&place).unwrap();
        let root = root(&place, second);
        if second {
            // A store may make equal files one.
            fs::remove_file(root.join("etc/-f")).unwrap();
            fs::write(root.join("etc/#hash"), "same").unwrap();
            fs::hard_link(root.join("etc/#hash"), root.join("etc/-f")).unwrap();
            // Time stamps count in seconds.
            std::thread::sleep(std::time::Duration::from_millis(1100));
        } else {
            fs::write(root.join("etc/#hash"), "same").unwrap();
            fs::write(root.join("etc/-f"), "same").unwrap();
        }
        (place, root)
    });
    for (mode, more) in [
        ("build", &["--fs", "erofs"][..]),
        ("build", &["--fs", "erofs", "--verity"]),
        ("build", &["--fs", "xfs"]),
        ("build", &["--fs", "ext4", "--verity"]),
        ("initrd", &["--compress", "zstd"]),
    ] {
        let [first, second] = places.each_ref().map(|(place, root)| {
            let output = place.join("out");
            let said = good(make(mode, root, &output, more).env("TZ", "Pacific/Apia"));
            assert!(good(tool().arg("verify").arg(&output)).contains("out: good, "));
            (fs::read(output).unwrap(), said)
        });
        assert!(first == second, "{mode} {more:?}: the second build gave other bytes");
        assert!(mode == "initrd" || first.0.len().is_multiple_of(2 << 20));
    }
}

#[test]
fn erofs_holds_every_file_as_the_tools_of_linux_read_it() {
    let dir = TempDir::new().unwrap();
    let root = dir.path().join("root");
    common::root(&root, false);
    // More names than one block holds, and a link whose target does not fit behind its inode.
    fs::create_dir(root.join("many")).unwrap();
    for n in 0..300 {
        fs::write(root.join(format!("many/{n:0>60}")), n.to_string()).unwrap();
    }
    std::os::unix::fs::symlink("z/".repeat(2040), root.join("far")).unwrap();
    let image = dir.path().join("image");
    good(&mut make("build", &root, &image, &["--fs", "erofs"]));
    let fs_only = alone(&image);
    // Its exit code is its word.
    good(&mut host("fsck.erofs", &[], &fs_only));
    let lines = inspect(&image);
    for wanted in [
        "type erofs",
        "block size 4096 bytes",
        "label kuasar",
        "root inode 36",
        "file 1200000 bytes /bin/big",
    ] {
        has(&lines, wanted);
    }
    let unpacked = dir.path().join("unpacked");
    good(&mut host("fsck.erofs", &[&format!("--extract={}", unpacked.display())], &fs_only));
    let list = |root: &Path| {
        let mut command = Command::new("find");
        command.current_dir(root).args([".", "-printf", "%p %y %m %l %n\n"]);
        let mut lines: Vec<_> = good(&mut command).lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let (found, wanted) = (list(&unpacked), list(&root));
    let other: Vec<_> = wanted.iter().filter(|l| !found.contains(l)).map(String::as_str).collect();
    // Unpacking leaves the setuid bit out; the inode has it.
    assert_eq!((other, found.len()), (vec!["./bin/big f 4755  1"], wanted.len()));
    let about = good(&mut host("dump.erofs", &["--path=/bin/big"], &fs_only));
    let number: u64 = about.split_once("NID: ").unwrap().1.split(' ').next().unwrap().parse().unwrap();
    let mut mode = [0; 2];
    fs::File::open(&fs_only).unwrap().read_exact_at(&mut mode, number * 32 + 4).unwrap();
    assert_eq!(u16::from_le_bytes(mode), 0o104_755);
    good(Command::new("diff").arg("-r").arg("--no-dereference").arg(&root).arg(&unpacked));
    let error = bad(&mut make("build", &root, &image, &["--fs", "erofs", "--reserve-mib", "1"]));
    assert!(error.contains("EROFS is never written to: it takes no reserve"), "{error}");
}

/// Later versions of `mkfs.xfs` turn on what stamping inodes would break.
#[test]
fn xfs_of_later_tools_is_whole() {
    let Some(tools) = std::env::var_os("KUASAR_XFSPROGS") else {
        println!("skipped: XFS by later tools: KUASAR_XFSPROGS names no folder with them");
        return;
    };
    let dir = TempDir::new().unwrap();
    let (root, image) = (root(dir.path(), false), dir.path().join("image"));
    let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap());
    let mut build = make("build", &root, &image, &["--fs", "xfs"]);
    good(build.env("PATH", &path));
    good(tool().arg("verify").arg(&image));
    has(&inspect(&image), "file 1200000 bytes /bin/big");
    // They say themselves whether all of it is sound.
    good(host("xfs_repair", &["-n", "-f", "-o", "force_geometry"], &alone(&image)).env("PATH", path));
}

#[test]
fn xfs_holds_every_file_with_its_mode_and_the_one_time() {
    let dir = TempDir::new().unwrap();
    let root = root(dir.path(), false);
    let image = dir.path().join("image");
    good(make("build", &root, &image, &["--fs", "xfs"]).env("SOURCE_DATE_EPOCH", "1700000000"));
    let lines = inspect(&image);
    for wanted in [
        "type xfs",
        "version 5",
        "label kuasar",
        "groups 1",
        "file 1200000 bytes /bin/big",
        "file 64 bytes /sbin/init",
    ] {
        has(&lines, wanted);
    }
    let fs_only = alone(&image);
    let db = |path: &str, field: &str| {
        let (path, field) = (format!("path {path}"), format!("print {field}"));
        good(&mut host("xfs_db", &["-r", "-f", "-c", &path, "-c", &field], &fs_only))
    };
    for (path, mode) in
        [("/tmp", "041777"), ("/sbin/init", "0100755"), ("/bin/big", "0104755"), ("/deep/er", "040755")]
    {
        assert_eq!(db(path, "core.mode"), format!("core.mode = {mode}\n"), "{path}");
        for stamp in ["core.mtime.sec", "core.ctime.sec", "core.atime.sec", "v3.crtime.sec"] {
            assert!(
                db(path, stamp).contains("Tue Nov 14 22:13:20 2023"),
                "{path} {stamp}: {}",
                db(path, stamp)
            );
        }
    }
    assert_eq!(db("/bin/big", "core.size"), "core.size = 1200000\n");
    fs::write(root.join("etc/a file"), "").unwrap();
    let error = bad(&mut make("build", &root, &image, &["--fs", "xfs"]));
    assert!(error.contains("etc/a file: has a blank in its name, which mkfs.xfs cannot take"), "{error}");
}

#[test]
fn a_hash_tree_vouches_for_every_block() {
    let dir = TempDir::new().unwrap();
    let root = root(dir.path(), false);
    let image = dir.path().join("image");
    for fs_name in ["ext4", "erofs", "xfs"] {
        let said = good(&mut make("build", &root, &image, &["--fs", fs_name, "--verity"]));
        let value =
            |key: &str| said.lines().find_map(|l| l.strip_prefix(&format!("{key} = "))).unwrap().to_owned();
        let root_hash = value("root_hash").trim_matches('"').to_owned();
        let data: u64 = value("data_blocks").parse().unwrap();
        assert_eq!(root_hash.len(), 64);
        let lines = inspect(&image);
        has(&lines, "dm-verity, behind the file system");
        has(&lines, "hash sha256");
        has(&lines, &format!("data blocks {data}"));
        good(tool().arg("verify").arg("--root-hash").arg(&root_hash).arg(&image));
        let other = root_hash.replace(['0', '1', '2', '3', '4'], "5");
        let error = bad(tool().arg("verify").arg("--root-hash").arg(other).arg(&image));
        let wanted = "image: is not what this root hash stands for: Verification of ";
        assert!(error.contains(wanted), "{error}");
        // One byte in the last block, which no field of any header knows.
        let file = fs::File::options().read(true).write(true).open(&image).unwrap();
        let at = FS + (data - 1) * 4096 + 17;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        let error = bad(tool().arg("verify").arg("--root-hash").arg(&root_hash).arg(&image));
        let wanted = format!("stands for: Verification failed at position {}.; ", (data - 1) * 4096);
        assert!(error.contains(&wanted), "{error}");
    }
    good(&mut make("build", &root, &image, &[]));
    let error = bad(tool().arg("verify").args(["--root-hash", &"0".repeat(64)]).arg(&image));
    assert!(error.contains("has no dm-verity tree behind its file system"), "{error}");
    for odd in ["", "abcd", &"g".repeat(64)] {
        let error = bad(tool().arg("verify").arg(format!("--root-hash={odd}")).arg(&image));
        let wanted = "it must be 64 hexadecimal digits, as `build --verity` prints them";
        assert_eq!(error, format!("kuasar-image: root hash {odd:?}: {wanted}\n"));
    }
}

#[test]
fn a_zstd_initrd_is_what_zstd_reads_and_damage_is_found() {
    let dir = TempDir::new().unwrap();
    let root = root(dir.path(), false);
    let (packed, plain) = (dir.path().join("packed"), dir.path().join("plain"));
    good(&mut make("initrd", &root, &packed, &["--compress", "zstd"]));
    good(&mut make("initrd", &root, &plain, &["--compress", "none"]));
    let unpacked = Command::new("zstd").arg("-dc").arg(&packed).output().unwrap().stdout;
    assert!(unpacked == fs::read(&plain).unwrap());
    for file in [&packed, &plain] {
        has(&inspect(file), "file 1200000 bytes /bin/big");
    }
    has(&inspect(&packed), "packing zstd");
    let bytes = fs::read(&packed).unwrap();
    fs::write(&packed, &bytes[..bytes.len() / 2]).unwrap();
    assert!(bad(tool().arg("verify").arg(&packed)).contains("archive: end is damaged: "));
    let error = bad(make("initrd", &root, &packed, &["--compress", "zstd"]).env("PATH", "/nowhere"));
    assert!(error.contains("zstd was not found in PATH; it is part of zstd"), "{error}");
}

#[test]
fn an_image_of_kuasar_s_builder_is_inspected() {
    let dir = TempDir::new().unwrap();
    let root = root(dir.path(), false);
    let ours = dir.path().join("ours");
    good(&mut make("build", &root, &ours, &[]));
    let mut image = fs::read(&ours).unwrap();
    let superblock = image[4096..8192].to_vec();
    image[..2 << 20].fill(0);
    image[2 << 20..3 << 20].fill(0);
    let end = image.len();
    gpt(&mut image, 0, end, 6144);
    gpt(&mut image, 2 << 20, end, 2048);
    // Its tool writes the superblock into the first label's entries.
    image[4096..8192].copy_from_slice(&superblock);
    let theirs = dir.path().join("theirs");
    fs::write(&theirs, image).unwrap();
    let lines = inspect(&theirs);
    for wanted in [
        "type 0xee",
        "GPT signature EFI PART",
        "GPT partition sectors 6144 to ",
        "GPT partition sectors 2048 to ",
        "checksum 0x685b032be3943830",
        "file system, at 3 MiB",
        "type ext4",
        "file 1200000 bytes /bin/big",
    ] {
        has(&lines, wanted);
    }
    let error = bad(tool().arg("verify").arg(&theirs));
    assert!(error.contains("table 1, at 0: type is 0xee: must be 0x83, Linux"), "{error}");
    assert_eq!(error.matches("GPT entries' CRC is ").count(), 1, "the second label is whole: {error}");
    assert!(!error.contains("header's CRC"), "{error}");
}

#[test]
fn an_image_without_a_header_is_inspected_where_its_table_says() {
    let dir = TempDir::new().unwrap();
    let root = root(dir.path(), false);
    let ours = dir.path().join("ours");
    good(&mut make("build", &root, &ours, &["--fs", "erofs"]));
    // Kata's builder without DAX: an MBR, the file system at 1 MiB.
    let image = fs::read(&ours).unwrap()[2 << 20..].to_vec();
    let theirs = dir.path().join("theirs");
    fs::write(&theirs, image).unwrap();
    let lines = inspect(&theirs);
    for wanted in
        ["start sector 2048", "file system, where table 1 says", "type erofs", "file 1200000 bytes /bin/big"]
    {
        has(&lines, wanted);
    }
    let error = bad(tool().arg("verify").arg(&theirs));
    assert!(error.contains("PFN superblock, at 4096: signature is "), "{error}");
}
