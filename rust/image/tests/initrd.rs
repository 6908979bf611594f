//! Initrds, whole and damaged: ours, those of other builders, and what the kernel takes besides.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{bad, good, has, inspect, tool};
use tempfile::TempDir;

/// A root, and the file in which an initrd of it is put.
fn place() -> (TempDir, PathBuf, PathBuf) {
    let dir = TempDir::new().unwrap();
    let root = dir.path().join("root");
    common::root(&root, false);
    // Less than elsewhere: it is packed and unpacked very often here.
    let content: Vec<u8> = (0..9000_u32).flat_map(|n| (n ^ (n >> 3)).to_le_bytes()).collect();
    common::put(&root, "bin/big", &content, 0o755);
    let file = dir.path().join("initrd");
    (dir, root, file)
}

fn ours(root: &Path, file: &Path, packing: &str) -> Vec<u8> {
    let mut command = tool();
    command.args(["initrd", "--arch", "x86_64", "--compress", packing, "--rootfs"]).arg(root);
    good(command.arg("--output").arg(file));
    fs::read(file).unwrap()
}

/// Problems of an initrd with these bytes.
fn problems(file: &Path, bytes: &[u8]) -> Vec<String> {
    fs::write(file, bytes).unwrap();
    let report = kuasar_image::examine::examine(file).unwrap();
    report.problems().map(|field| format!("{}: {}", field.name, field.problem.as_deref().unwrap())).collect()
}

#[test]
fn an_initrd_cut_anywhere_is_refused() {
    let (_dir, root, file) = place();
    for packing in ["gzip", "zstd", "none"] {
        let bytes = ours(&root, &file, packing);
        for length in [bytes.len() / 2, bytes.len() / 10 * 9, bytes.len() - 520] {
            fs::write(&file, &bytes[..length]).unwrap();
            let error = bad(tool().arg("verify").arg(&file));
            assert!(error.contains("archive: end is damaged: ends in the middle"), "{packing}: {error}");
        }
    }
    // All that the archive is, but not all of the packing.
    let bytes = ours(&root, &file, "gzip");
    assert_eq!(problems(&file, &bytes[..bytes.len() - 1]), ["end: ends in the middle"]);
}

#[test]
fn a_flipped_bit_in_gzip_is_found() {
    let (_dir, root, file) = place();
    common::put(&root, "bin/big", &[7; 100], 0o755);
    let good = ours(&root, &file, "gzip");
    assert!(problems(&file, &good).is_empty());
    let end = good.len();
    let mut found = 0;
    // The ten bytes of its header say nothing of the content.
    for at in 10..end {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        // Some are a longer way to say the same.
        let same = unpack(&bytes).is_ok_and(|content| content == unpack(&good).unwrap());
        assert_eq!(problems(&file, &bytes).is_empty(), same, "a bit of byte {at} of {end}");
        found += usize::from(!same);
    }
    assert!(found > (end - 10) / 10 * 9, "{found} of {end} bytes mean something");
    let mut bytes = good;
    bytes[end - 8] ^= 1;
    fs::write(&file, bytes).unwrap();
    let error = bad(tool().arg("verify").arg(&file));
    let wanted = "archive: end is damaged: corrupt gzip stream does not have a matching checksum";
    assert!(error.contains(wanted), "{error}");
}

#[test]
fn damaged_zstd_is_found_as_far_as_it_can_be() {
    let (_dir, root, file) = place();
    let plain = ours(&root, &file, "none");
    let packed = file.with_extension("zst");
    good(Command::new("zstd").args(["-q", "-f", "--check"]).arg(&file).arg("-o").arg(&packed));
    let mut bytes = fs::read(&packed).unwrap();
    assert!(problems(&file, &bytes).is_empty());
    assert!(inspect(&file).contains(&"packing zstd".to_owned()));
    *bytes.last_mut().unwrap() ^= 1;
    let problem = &problems(&file, &bytes)[0];
    assert!(
        problem.starts_with("end: zstd failed: exit status: 1: ") && problem.contains("checksum"),
        "{problem}"
    );

    ours(&root, &file, "zstd");
    has(&inspect(&file), "packing zstd without a checksum: only what cannot be unpacked is found");
    // A block of the kind that there is none of.
    let mut bytes = fs::read(&file).unwrap();
    bytes[6] |= 6;
    assert!(problems(&file, &bytes)[0].starts_with("end: "), "{:?}", problems(&file, &bytes));
    let error = bad(tool().arg("verify").arg(&file).env("PATH", "/nowhere"));
    assert_eq!(
        error,
        "kuasar-image: zstd was not found in PATH; it is part of zstd (Debian keeps it in /usr/sbin)\n"
    );
    assert_eq!(problems(&file, &plain), [""; 0]);
}

#[test]
fn an_initrd_of_many_parts_is_what_the_kernel_takes() {
    let (dir, root, file) = place();
    let [plain, gzip, zstd] = ["none", "gzip", "zstd"].map(|packing| ours(&root, &file, packing));
    let lines = inspect(&file);
    let entries = lines.iter().find_map(|line| line.strip_prefix("entries ")).unwrap();
    let entries: usize = entries.parse().unwrap();
    // As a processor's microcode lies in front of an initrd: an archive of its own, no /init in it.
    fs::create_dir(dir.path().join("early")).unwrap();
    fs::write(dir.path().join("early/microcode"), "12345").unwrap();
    let early = archive(&dir.path().join("early"));
    for (parts, packing, count) in [
        (&[&early[..], &gzip, &[0; 7]][..], "none, gzip", entries + 2),
        (&[&gzip, &zstd, &[0; 13], &gzip], "gzip, zstd without", 3 * entries),
        (&[&plain, &plain, &[0; 4], &zstd, &[0; 512]], "none, zstd without", 3 * entries),
        (&[&pack(&[&plain[..], &[0; 512], &plain].concat())], "gzip", 2 * entries),
    ] {
        assert_eq!(problems(&file, &parts.concat()), [""; 0], "{packing}");
        let lines = inspect(&file);
        has(&lines, &format!("packing {packing}"));
        has(&lines, &format!("entries {count}"));
    }
    let end = gzip.len();
    for (parts, wanted) in [
        (&[&gzip[..], b"junk"][..], format!("no archive begins at byte {end}, where zeros end")),
        (
            &[&plain, &[0; 2], &plain],
            format!("an archive begins at byte {}, no multiple of 4", plain.len() + 2),
        ),
        (&[&pack(&[&plain[..], b"\0\0junk"].concat())], "packed with an archive is what is none".into()),
        (&[&pack(&gzip)], "packed with an archive is what is none".into()),
        (&[&gzip, &gzip[..end / 2]], "ends in the middle".into()),
        (&[&plain, &[0; 4], b"070701"], "ends in the middle".into()),
        (&[&gzip, &zstd[..4], &[0; 64]], "ends in the middle".into()),
        (&[&gzip, &zstd[..3]], "ends in the middle".into()),
        (&[&gzip, b"(ABCDEFG"], "no frame of zstd begins where one should".into()),
    ] {
        assert_eq!(problems(&file, &parts.concat())[0], format!("end: {wanted}"));
    }
}

#[test]
fn an_initrd_of_kuasar_s_builder_is_good() {
    let (_dir, root, file) = place();
    fs::write(&file, pack(&archive(&root))).unwrap();
    let lines = inspect(&file);
    for wanted in
        ["packing gzip", "end complete", "/init mode 120777", "owners 0 not 0:0", "file 36000 bytes /bin/big"]
    {
        has(&lines, wanted);
    }
    good(tool().arg("verify").arg(&file));
}

/// `find . | cpio -H newc -o`, by root or as if.
fn archive(root: &Path) -> Vec<u8> {
    let mut command = Command::new("sh");
    command.current_dir(root).args(["-c", "find . | cpio --quiet -H newc -o -R +0:+0"]);
    command.output().unwrap().stdout
}

/// `gunzip`.
fn unpack(bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut content = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(bytes), &mut content).map(|_| content)
}

/// `gzip -9`.
fn pack(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut child = Command::new("gzip")
        .args(["-9", "-c"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, bytes) = (child.stdin.take().unwrap(), bytes.to_vec());
    let writer = std::thread::spawn(move || stdin.write_all(&bytes).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success());
    output.stdout
}
