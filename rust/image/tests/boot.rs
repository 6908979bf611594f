//! Boots an image for real, both ways: the kernel's word that tables and superblock are what it wants.
//!
//! Needs a guest kernel, `$KUASAR_IMAGE/vmlinux`, and the lab's QEMU; says so and does nothing without.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{good, tool};

/// Runs as process 1: prints how its root is mounted and restarts the machine, which ends QEMU.
const INIT: &str = r#"
use std::ffi::{c_char, c_int, c_ulong, c_void};
unsafe extern "C" {
    fn mount(s: *const c_char, t: *const c_char, f: *const c_char, n: c_ulong, d: *const c_void) -> c_int;
    fn reboot(command: c_int) -> c_int;
}
fn main() {
    unsafe { mount(c"proc".as_ptr(), c"/proc".as_ptr(), c"proc".as_ptr(), 0, std::ptr::null()) };
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_else(|e| e.to_string());
    for line in mounts.lines().filter(|l| l.contains(" / ")) {
        println!("root: {line}");
    }
    println!("content: {}", std::fs::read("/content").unwrap().iter().map(|b| u64::from(*b)).sum::<u64>());
    unsafe { reboot(0x0123_4567) };
}
"#;

/// Kernel and QEMU, if there are any.
fn machine() -> Option<(PathBuf, PathBuf)> {
    let kernel = PathBuf::from(std::env::var_os("KUASAR_IMAGE")?).join("vmlinux");
    let cache = std::env::var_os("KUASAR_CACHE").map(PathBuf::from).or_else(|| {
        let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let base = base.or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cache")));
        Some(base?.join("kuasar-nix"))
    })?;
    let qemu = cache.join("tools/bin/qemu-system-x86_64");
    (kernel.is_file() && qemu.is_file()).then_some((kernel, qemu))
}

/// Builds a root with the program above and `mode` of making an image of it.
fn build(dir: &Path, mode: &str) -> PathBuf {
    let root = dir.join("root");
    if !root.exists() {
        for folder in ["sbin", "proc", "dev"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::write(dir.join("init.rs"), INIT).unwrap();
        let mut rustc = Command::new("rustc");
        rustc.args([
            "--edition",
            "2024",
            "-O",
            "-C",
            "target-feature=+crt-static",
            "-C",
            "strip=symbols",
            "-o",
        ]);
        good(rustc.arg(root.join("sbin/init")).arg(dir.join("init.rs")));
        std::os::unix::fs::symlink("sbin/init", root.join("init")).unwrap();
        fs::write(root.join("content"), vec![1; 5_000_000]).unwrap();
    }
    let output = dir.join(mode);
    good(tool().arg(mode).arg("--rootfs").arg(root).arg("--output").arg(&output));
    output
}

/// Boots, waits for the end, gives the lines the guest printed.
fn boot(command_line: &str, devices: &[String]) -> Option<String> {
    let Some((kernel, qemu)) = machine() else {
        println!(
            "skipped: KUASAR_IMAGE holds no vmlinux, or tests/lab/setup did not run: no kernel or no QEMU to boot"
        );
        return None;
    };
    let mut command = Command::new(qemu);
    command.args([
        "-no-user-config",
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
        "-accel",
        "tcg",
        "-cpu",
        "max",
    ]);
    command.args(["-machine", "q35,acpi=off", "-m", "256M,slots=1,maxmem=2G", "-serial", "stdio", "-kernel"]);
    let quiet = "console=ttyS0 reboot=t panic=-1 no_timer_check tsc=reliable quiet";
    command.arg(kernel).arg("-append").arg(format!("{quiet} {command_line}")).args(devices);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let output = child.wait_with_output().unwrap();
    Some(String::from_utf8_lossy(&output.stdout).replace('\r', ""))
}

#[test]
fn a_guest_mounts_the_image_from_pmem_with_dax_and_from_virtio_blk() {
    if machine().is_none() {
        boot("", &[]);
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = build(dir.path(), "build");
    let before = fs::read(&image).unwrap();
    let path = image.display();
    let pmem = [
        "-object".to_owned(),
        format!("memory-backend-file,id=img,mem-path={path},share=on,readonly=on,size={}", before.len()),
        "-device".to_owned(),
        "virtio-pmem-pci,memdev=img".to_owned(),
    ];
    let said = boot("root=/dev/pmem0p1 rootflags=dax ro rootfstype=ext4", &pmem).unwrap();
    assert!(said.contains("root: /dev/root / ext4 ro,relatime,dax=always 0 0\ncontent: 5000000\n"), "{said}");

    let blk = [
        "-drive".to_owned(),
        format!("if=none,id=root,file={path},format=raw,readonly=on"),
        "-device".to_owned(),
        "virtio-blk-pci,drive=root".to_owned(),
    ];
    let said = boot("root=/dev/vda1 ro rootfstype=ext4", &blk).unwrap();
    assert!(said.contains("root: /dev/root / ext4 ro,relatime 0 0\ncontent: 5000000\n"), "{said}");
    assert!(fs::read(&image).unwrap() == before, "a guest changed the image");
}

#[test]
fn a_guest_boots_the_initrd() {
    if machine().is_none() {
        boot("", &[]);
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let initrd = build(dir.path(), "initrd");
    let said = boot("", &["-initrd".to_owned(), initrd.display().to_string()]).unwrap();
    assert!(said.contains("root: rootfs / rootfs rw") && said.contains("\ncontent: 5000000\n"), "{said}");
}
