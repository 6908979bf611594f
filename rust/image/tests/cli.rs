//! The program as its users see it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{bad, good, program, put, tool};
use tempfile::TempDir;

fn build(rootfs: &Path, output: &Path) -> Command {
    let mut command = tool();
    command.args(["build", "--arch", "x86_64", "--rootfs"]).arg(rootfs).arg("--output").arg(output);
    command
}

fn initrd(rootfs: &Path, output: &Path) -> Command {
    let mut command = tool();
    command.args(["initrd", "--arch", "x86_64", "--rootfs"]).arg(rootfs).arg("--output").arg(output);
    command
}

/// A root and an image of it.
fn image() -> (TempDir, PathBuf) {
    let dir = TempDir::new().unwrap();
    let root = dir.path().join("root");
    common::root(&root, false);
    let image = dir.path().join("kuasar.img");
    good(&mut build(&root, &image));
    (dir, image)
}

/// Answer of debugfs about the file system in an image.
fn debugfs(image: &Path, request: &str) -> String {
    let mut command = Command::new("debugfs");
    command.env("PATH", tool().get_envs().find(|(k, _)| *k == "PATH").unwrap().1.unwrap());
    command.args(["-R", request]).arg(format!("{}?offset=3145728", image.display()));
    good(&mut command)
}

#[test]
fn an_image_verifies_and_its_size_is_a_multiple_of_2_mib() {
    let (_dir, image) = image();
    assert!(good(tool().arg("verify").arg(&image)).contains("kuasar.img: good, "));
    assert_eq!(fs::metadata(&image).unwrap().len() % (2 << 20), 0);
}

#[test]
fn an_image_holds_every_file_with_its_mode_and_owner_0() {
    let (_dir, image) = image();
    let mut found: Vec<String> = Vec::new();
    for folder in ["/", "/etc", "/bin", "/deep", "/deep/er"] {
        for line in debugfs(&image, &format!("ls -p {folder}")).lines().filter(|l| !l.is_empty()) {
            let [_, _inode, mode, uid, gid, name, _size, ..] = line.split('/').collect::<Vec<_>>()[..] else {
                panic!("{line}")
            };
            if ![".", ".."].contains(&name) {
                assert_eq!((uid, gid), ("0", "0"), "{line}");
                found.push(format!("{mode} {name}"));
            }
        }
    }
    found.sort();
    let expected = [
        "040755 bin",
        "040755 deep",
        "040755 er",
        "040755 etc",
        "040755 sbin",
        "040755 still",
        "041777 tmp",
        "100600 #hash",
        "100600 -f",
        "100600 a file",
        "100600 b?offset=1",
        "100600 with \"quotes\"",
        "100600 ümlaut",
        "100644 empty",
        "104755 big",
        "120777 init",
        "120777 long",
    ];
    assert_eq!(found, expected);
    assert_eq!(debugfs(&image, "cat \"/etc/with \"\"quotes\"\"\""), "etc/with \"quotes\"");
    assert!(debugfs(&image, "stat /init").contains("Fast link dest: \"sbin/init\""));
    assert_eq!(debugfs(&image, "cat /deep/long"), "x/".repeat(100));
}

#[test]
fn content_comes_back_byte_for_byte() {
    let (dir, image) = image();
    let copy = dir.path().join("copy");
    debugfs(&image, &format!("dump /bin/big {}", copy.display()));
    assert!(fs::read(copy).unwrap() == fs::read(dir.path().join("root/bin/big")).unwrap());
}

/// Two roots equal in content, made in another order, at another time, by another owner, in other folders.
fn twins(make: fn(&Path, &Path) -> Command) {
    let dir = TempDir::new().unwrap();
    let outputs = [false, true].map(|second| {
        let place = dir.path().join(if second { "some/other, and\"longer place" } else { "a" });
        let temporary = place.join("tmp");
        fs::create_dir_all(&temporary).unwrap();
        common::root(&place.join("root"), second);
        if second {
            // Only root may; for others the rest of the test holds.
            let _ = std::os::unix::fs::chown(place.join("root/etc/a file"), Some(1234), Some(1234));
            // Time stamps count in seconds.
            std::thread::sleep(std::time::Duration::from_millis(1100));
        }
        let output = place.join("out");
        good(make(&place.join("root"), &output).env("TMPDIR", &temporary));
        let others: Vec<_> = fs::read_dir(&place).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(others.len(), 3, "{others:?}");
        fs::read(output).unwrap()
    });
    assert!(outputs[0] == outputs[1], "the second build gave other bytes");
}

#[test]
fn images_built_twice_are_equal() {
    twins(build);
}

#[test]
fn initrds_built_twice_are_equal() {
    twins(initrd);
}

#[test]
fn source_date_epoch_is_the_one_time() {
    let (dir, _) = image();
    let root = dir.path().join("root");
    let image = dir.path().join("dated.img");
    good(build(&root, &image).env("SOURCE_DATE_EPOCH", "1700000000"));
    assert!(good(tool().arg("inspect").arg(&image)).contains("made at          1700000000 s since 1970"));
    let stat = debugfs(&image, "stat /sbin/init");
    assert_eq!(stat.matches("0x6553f100:00000000").count(), 4, "{stat}");
    let error = bad(build(&root, &image).env("SOURCE_DATE_EPOCH", "yesterday"));
    assert!(error.contains("SOURCE_DATE_EPOCH is \"yesterday\"; it must be seconds since 1970"), "{error}");
}

#[test]
fn inspect_prints_tables_superblock_and_file_system() {
    let (_dir, image) = image();
    let sectors = fs::metadata(&image).unwrap().len() / 512 - 6144;
    let text = good(tool().arg("inspect").arg(&image));
    let lines: Vec<_> = text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let sectors = format!("sectors {sectors} of 512 bytes");
    for line in [
        "kind disk image",
        "table 1, at 0",
        "start sector 6144",
        "table 2, at 2 MiB",
        "start sector 2048",
        &sectors,
        "PFN superblock, at 4096",
        "signature NVDIMM_PFN_INFO\\x00",
        "mode 1, RAM",
        "alignment 2097152 bytes",
        "data offset 2097152 bytes",
        "checksum 0x685b032be3943830",
        "type ext4",
        "block size 4096 bytes",
    ] {
        assert!(lines.iter().any(|l| l == line), "{line:?} is not in\n{text}");
    }
}

#[test]
fn the_reserve_is_free_and_odd_trees_fit() {
    let dir = TempDir::new().unwrap();
    let root = dir.path().join("root");
    common::root(&root, false);
    for n in 0..150 {
        let folder = root.join(format!("many/{n:0>200}"));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("x".repeat(255)), [1]).unwrap();
        std::os::unix::fs::symlink("y".repeat(1000), folder.join("link")).unwrap();
    }
    let output = dir.path().join("image");
    good(build(&root, &output).args(["--reserve-mib", "5"]));
    let mut start = [0; 4];
    fs::File::open(&output).unwrap().read_exact_at(&mut start, (3 << 20) + 1024 + 12).unwrap();
    let free = u64::from(u32::from_le_bytes(start)) * 4096;
    assert!((5 << 20..9 << 20).contains(&free), "{free} bytes are free");
}

#[test]
fn an_initrd_is_what_cpio_reads() {
    let (dir, _) = image();
    let output = dir.path().join("kuasar.initrd");
    good(initrd(&dir.path().join("root"), &output).args(["--compress", "none"]));
    let text = good(tool().arg("inspect").arg(&output));
    assert!(text.contains("packing          none") && text.contains("end              complete"), "{text}");
    assert!(good(tool().arg("verify").arg(&output)).contains("good"));
    let unpacked = fs::read(&output).unwrap();
    assert_eq!((&unpacked[..6], unpacked.len() % 512), (&b"070701"[..], 0));
    let packed = dir.path().join("packed");
    good(&mut initrd(&dir.path().join("root"), &packed));
    assert!(good(tool().arg("verify").arg(&packed)).contains("good"));
    let bytes = fs::read(packed).unwrap();
    assert_eq!(bytes[3..8], [0; 5], "the gzip header has a name or a time");
    let mut plain = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&bytes[..]), &mut plain).unwrap();
    assert!(plain == unpacked);
}

#[test]
fn roots_that_cannot_boot_are_refused_with_the_reason() {
    let dir = TempDir::new().unwrap();
    let output = dir.path().join("out");
    let refused = |root: &Path, reason: &str| {
        let error = bad(&mut build(root, &output));
        assert_eq!(error, format!("kuasar-image: root file system {}: {reason}\n", root.display()));
        assert!(!output.exists(), "a refused root left a file");
    };
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("sbin")).unwrap();
    refused(&root, "/sbin/init is missing");
    put(&root, "sbin/init", &program(common::X86_64), 0o644);
    refused(&root, "/sbin/init is not executable (mode 0644)");
    put(&root, "sbin/init", &program(common::AARCH64), 0o755);
    refused(&root, "/sbin/init is built for aarch64, the image is for x86_64");
    put(&root, "sbin/init", b"#!/bin/sh\n", 0o755);
    refused(&root, "/sbin/init needs /bin/sh, but /bin/sh is missing");
    put(&root, "sbin/init", &program(common::X86_64), 0o755);
    let error = bad(&mut initrd(&root, &output));
    assert!(error.ends_with(": /init is missing\n"), "{error}");
    let error = bad(&mut build(&dir.path().join("none"), &output));
    assert!(error.contains("cannot read the root file system"), "{error}");
    let error = bad(&mut build(&root, Path::new("/no/such/folder/image")));
    assert!(error.contains("cannot create a file in /no/such/folder: No such file"), "{error}");
}

#[test]
fn a_missing_tool_is_named() {
    let (dir, _) = image();
    let error = bad(build(&dir.path().join("root"), &dir.path().join("x")).env("PATH", "/nowhere"));
    let expected = "mke2fs was not found in PATH; it is part of e2fsprogs (Debian keeps it in /usr/sbin)";
    assert_eq!(error, format!("kuasar-image: {expected}\n"));
}

#[test]
fn a_name_the_tools_cannot_take_is_refused() {
    let (dir, _) = image();
    let root = dir.path().join("root");
    fs::write(root.join("etc/two\nlines"), "").unwrap();
    let error = bad(&mut build(&root, &dir.path().join("x")));
    assert!(error.contains("has a line break in its name"), "{error}");
}

#[test]
fn verify_names_the_field_that_is_wrong() {
    let (_dir, image) = image();
    let original = fs::read(&image).unwrap();
    // `tests/fields.rs` has every field.
    let cases: [(u64, &[u8], &str); 3] = [
        (454, &[0, 8], "table 1, at 0: start is sector 2048: must be 6144"),
        (4096 + 72, &[2], "PFN superblock, at 4096: mode is 2, pmem: must be 1"),
        ((3 << 20) + 1024 + 24, &[0], "file system, at 3 MiB: block size is 1024 bytes: must be 4096"),
    ];
    for (at, bytes, expected) in cases {
        fs::write(&image, &original).unwrap();
        fs::OpenOptions::new().write(true).open(&image).unwrap().write_all_at(bytes, at).unwrap();
        let error = bad(tool().arg("verify").arg(&image));
        assert!(error.contains(&format!("kuasar-image: {expected}")), "{expected}\n{error}");
        let inspected = good(tool().arg("inspect").arg(&image));
        assert!(inspected.contains("WRONG: "), "{inspected}");
    }
}

#[test]
fn verify_refuses_cut_and_foreign_files() {
    let (dir, image) = image();
    let file = fs::OpenOptions::new().write(true).open(&image).unwrap();
    let size = file.metadata().unwrap().len();
    for (length, expected) in [
        (size - 4096, "bytes: is no multiple of 2 MiB, which DAX needs"),
        (size - (2 << 20), "table 1, at 0: sectors is "),
        (3 << 20, "file: size is 3145728 bytes: leaves no room for a file system behind the first 3 MiB\n"),
        (5, "file: size is 5 bytes: leaves no room for a file system behind the first 3 MiB\n"),
        (0, "file: size is 0 bytes: leaves no room for a file system behind the first 3 MiB\n"),
    ] {
        file.set_len(length).unwrap();
        let error = bad(tool().arg("verify").arg(&image));
        assert!(error.contains(expected), "{error}");
    }
    let error = bad(tool().arg("verify").arg(dir.path().join("none")));
    assert!(error.contains("none: No such file or directory"), "{error}");
    let error = bad(tool().arg("verify").arg("/dev/zero"));
    assert!(error.contains("/dev/zero: is not a regular file"), "{error}");
}

#[test]
fn the_help_says_which_time_stamps_are_written() {
    let (_dir, image) = image();
    let help = good(tool().arg("--help")).split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        help.contains(
            "every time stamp is SOURCE_DATE_EPOCH (seconds since 1970; 0 when unset, but 1 in ext4"
        )
    );
    common::has(&common::inspect(&image), "made at 1 s since 1970");
}

#[test]
fn header_writes_the_tables_and_leaves_the_rest() {
    let (dir, image) = image();
    let file = dir.path().join("header");
    good(tool().args(["header", "--size-mib", "8", "--output"]).arg(&file));
    let error = bad(tool().arg("verify").arg(&file));
    assert!(error.contains("file system, at 3 MiB: type is unknown") && error.contains("1 of "), "{error}");
    let error = bad(tool().args(["header", "--size-mib", "8", "--output"]).arg(&file));
    assert!(error.contains("cannot create") && error.contains("File exists"), "{error}");

    let original = fs::read(&image).unwrap();
    fs::OpenOptions::new().write(true).open(&image).unwrap().write_all_at(&[0xff; 512], 2 << 20).unwrap();
    bad(tool().arg("verify").arg(&image));
    good(tool().args(["header", "--output"]).arg(&image));
    assert!(fs::read(&image).unwrap() == original);

    for (size, reason) in [("2", "leaves no room"), ("5", "is no multiple of 2 MiB")] {
        let file = dir.path().join("odd");
        let error = bad(tool().args(["header", "--size-mib", size, "--output"]).arg(&file));
        assert!(error.contains(reason), "{error}");
        assert!(!file.exists());
    }
    let error = bad(tool().args(["header", "--output"]).arg(dir.path().join("none")));
    assert!(error.contains("cannot open ") && error.contains("No such file"), "{error}");
}
