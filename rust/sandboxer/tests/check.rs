//! `vmm-sandboxer --check`: a configuration is looked at where it is built, which is not where it runs.

#![allow(clippy::disallowed_methods, reason = "tests work in folders of their own")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

/// Checks `text` as a configuration, with a folder and a socket that must not come into being.
fn check(dir: &Path, text: &str) -> Output {
    let config = dir.join("qemu.toml");
    fs::write(&config, text).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm-sandboxer"));
    command.arg("--check").arg("--config").arg(&config);
    command.arg("--dir").arg(dir.join("state")).arg("--listen").arg(dir.join("socket"));
    command.output().unwrap()
}

#[test]
fn a_good_configuration_is_checked_without_a_trace() {
    let dir = tempfile::tempdir().unwrap();
    // None of these programs and files is there.
    let text = "[sandbox]\nlog_level = \"info,vmm_sandboxer=debug\"\nrelay_path = \"/nowhere/relay\"\n\
                [hypervisor]\npath = \"/nowhere/qemu\"\nkernel_path = \"/nowhere/vmlinux\"\n";
    let output = check(dir.path(), text);
    assert!(output.status.success(), "{output:?}");
    assert_eq!((output.stdout.len(), output.stderr.len()), (0, 0), "{output:?}");
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["qemu.toml"]);
}

#[test]
fn what_is_wrong_is_said() {
    let dir = tempfile::tempdir().unwrap();
    for (text, wanted) in [
        ("[hypervisor]\nvcpu = 1\n", "vcpus"),
        ("[hypervisor]\nmemory_in_mb = 47\n", "48"),
        ("[sandbox]\nlog_level = \"in=fo=x\"\n", "understanding the log level"),
        ("[sandbox\n", "qemu.toml"),
    ] {
        let output = check(dir.path(), text);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}: {said}");
        assert!(said.starts_with("vmm-sandboxer: ") && said.contains(wanted), "{text}: {said}");
    }
    let output = Command::new(env!("CARGO_BIN_EXE_vmm-sandboxer"))
        .args(["--check", "--config"])
        .arg(dir.path().join("none.toml"))
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("none.toml"), "{said}");
}
