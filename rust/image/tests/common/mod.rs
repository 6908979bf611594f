//! Helpers that the tests of the program share.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output};

/// The program under test. `mke2fs` lives in `/usr/sbin`, which a user's PATH does not hold everywhere.
pub(crate) fn tool() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kuasar-image"));
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin")).env_remove("SOURCE_DATE_EPOCH");
    command
}

/// Runs a command that has to succeed; gives its standard output.
#[track_caller]
pub(crate) fn good(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command that has to fail; gives its standard error.
#[track_caller]
pub(crate) fn bad(command: &mut Command) -> String {
    let Output { status, stderr, .. } = command.output().unwrap();
    assert_eq!(status.code(), Some(1), "{command:?}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stderr).unwrap()
}

/// A program of the machine on a file, found where [`tool`] finds its own.
pub(crate) fn host(program: &str, arguments: &[&str], file: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", tool().get_envs().find(|(key, _)| *key == "PATH").unwrap().1.unwrap());
    command.args(arguments).arg(file);
    command
}

/// The lines of `inspect`, blanks made one.
#[track_caller]
pub(crate) fn inspect(file: &Path) -> Vec<String> {
    let text = good(tool().arg("inspect").arg(file));
    text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

/// One of the lines begins so.
#[track_caller]
pub(crate) fn has(lines: &[String], wanted: &str) {
    assert!(lines.iter().any(|line| line.starts_with(wanted)), "{wanted:?} is not in\n{}", lines.join("\n"));
}

/// The smallest ELF file the checks take for a static program.
pub(crate) fn program(machine: u16) -> Vec<u8> {
    let mut data = vec![0_u8; 64];
    data[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    data[16] = 2;
    data[18..20].copy_from_slice(&machine.to_le_bytes());
    data[20] = 1;
    data[52] = 64;
    data[54] = 56;
    data
}

/// ELF machine numbers.
pub(crate) const X86_64: u16 = 62;
/// See there.
pub(crate) const AARCH64: u16 = 183;

/// Writes a file with exactly these permissions.
pub(crate) fn put(root: &Path, path: &str, content: &[u8], mode: u32) {
    let file = root.join(path);
    fs::write(&file, content).unwrap();
    fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
}

/// A root with a program as init, and one of everything else; `order` turns round in which it is made.
pub(crate) fn root(root: &Path, reverse: bool) {
    for dir in ["sbin", "bin", "etc", "tmp", "deep/er/still"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::set_permissions(root.join("tmp"), Permissions::from_mode(0o1777)).unwrap();
    for dir in ["", "sbin", "bin", "etc", "deep", "deep/er", "deep/er/still"] {
        fs::set_permissions(root.join(dir), Permissions::from_mode(0o755)).unwrap();
    }
    let big: Vec<u8> = (0..300_000_u32).flat_map(|n| (n ^ (n >> 3)).to_le_bytes()).collect();
    let names = ["etc/a file", "etc/with \"quotes\"", "etc/ümlaut", "etc/#hash", "etc/b?offset=1", "etc/-f"];
    let mut steps: Vec<Box<dyn Fn() + '_>> = Vec::new();
    for name in names {
        steps.push(Box::new(move || put(root, name, name.as_bytes(), 0o600)));
    }
    steps.push(Box::new(|| put(root, "sbin/init", &program(X86_64), 0o755)));
    steps.push(Box::new(move || put(root, "bin/big", &big, 0o4755)));
    steps.push(Box::new(|| put(root, "etc/empty", b"", 0o644)));
    steps.push(Box::new(|| symlink("sbin/init", root.join("init")).unwrap()));
    steps.push(Box::new(|| symlink("x/".repeat(100), root.join("deep/long")).unwrap()));
    if reverse {
        steps.reverse();
    }
    steps.iter().for_each(|step| step());
}

/// A label as `parted mklabel gpt mkpart` makes it, at `base`, for a disk that ends at `end`.
pub(crate) fn gpt(image: &mut [u8], base: usize, end: usize, start: u64) {
    let crc = |bytes: &[u8]| {
        let mut crc = flate2::Crc::new();
        crc.update(bytes);
        crc.sum().to_le_bytes()
    };
    let sectors = ((end - base) / 512) as u64;
    image[base + 450] = 0xee;
    image[base + 454..base + 458].copy_from_slice(&1_u32.to_le_bytes());
    image[base + 458..base + 462].copy_from_slice(&((sectors - 1) as u32).to_le_bytes());
    image[base + 510..base + 512].copy_from_slice(&[0x55, 0xaa]);
    let mut entry = [0; 128];
    entry[..16].copy_from_slice(&[7; 16]);
    entry[32..40].copy_from_slice(&start.to_le_bytes());
    entry[40..48].copy_from_slice(&(sectors - 34).to_le_bytes());
    for (at, letter) in "primary".encode_utf16().enumerate() {
        entry[56 + at * 2..58 + at * 2].copy_from_slice(&letter.to_le_bytes());
    }
    image[base + 1024..base + 1152].copy_from_slice(&entry);
    let entries_crc = crc(&image[base + 1024..base + 1024 + 128 * 128]);
    let mut header = [0; 92];
    header[..8].copy_from_slice(b"EFI PART");
    header[8..16].copy_from_slice(&[0, 0, 1, 0, 92, 0, 0, 0]);
    header[24..32].copy_from_slice(&1_u64.to_le_bytes());
    header[32..40].copy_from_slice(&(sectors - 1).to_le_bytes());
    header[40..48].copy_from_slice(&34_u64.to_le_bytes());
    header[48..56].copy_from_slice(&(sectors - 34).to_le_bytes());
    header[72..80].copy_from_slice(&2_u64.to_le_bytes());
    header[80..88].copy_from_slice(&[128, 0, 0, 0, 128, 0, 0, 0]);
    header[88..92].copy_from_slice(&entries_crc);
    let own = crc(&header);
    header[16..20].copy_from_slice(&own);
    image[base + 512..base + 604].copy_from_slice(&header);
}
