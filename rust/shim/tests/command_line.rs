//! Output of the one-shot actions for containerd.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that cannot go on fails"
)]

use std::{
    process::{Command, Output},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{api::DeleteResponse, types::introspection::RuntimeInfo};
use protobuf::Message;

const COMMON: [&str; 6] = [
    "-namespace",
    "k8s.io",
    "-address",
    "/run/containerd/containerd.sock",
    "-publish-binary",
    "/bin/containerd",
];

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_containerd-shim-kuasar-vmm-v1"))
        .args(COMMON)
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn delete_reports_a_killed_process_every_time() {
    let before = SystemTime::now();
    for args in [
        &["-id", "c1", "-bundle", "/none", "delete"][..],
        &["-id", "c1", "-bundle", "/none", "-debug", "delete"],
    ] {
        let output = run(args);
        assert!(output.status.success() && output.stderr.is_empty());
        let response = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!((response.pid, response.exit_status), (0, 137));
        let at: SystemTime = response.exited_at.unwrap().into();
        assert!(at >= before - Duration::from_millis(1) && at <= SystemTime::now());
        // Field 2, varint, 137; field 3, a message.
        assert_eq!(output.stdout[..4], [0x10, 0x89, 0x01, 0x1a]);
    }
}

#[test]
fn info_names_the_runtime() {
    let output = run(&["-info"]);
    assert!(output.status.success());
    let info = RuntimeInfo::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!(info.name, "io.containerd.kuasar-vmm.v1");
    assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
}

#[test]
fn start_is_refused_with_the_way_out() {
    let output = run(&["-id", "c1", "start"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    for part in [
        "starting c1 in namespace k8s.io",
        "containerd >= 2.1",
        "sandboxer = ",
        "io.containerd.kuasar-vmm.v1",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

#[test]
fn the_version_is_told_and_nonsense_refused() {
    let output = run(&["-v"]);
    let expected = format!("containerd-shim-kuasar-vmm-v1 {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
    let output = run(&["-nonsense"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "containerd-shim-kuasar-vmm-v1: unknown flag -nonsense; see -h\n"
    );
}
