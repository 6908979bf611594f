//! The program outside a virtual machine.

#![allow(clippy::unwrap_used)]

use std::process::Command;

fn run(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_vmm-task")).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn it_knows_its_version_and_refuses_other_words() {
    assert_eq!(
        run(&["--version"]),
        (Some(0), format!("vmm-task {}\n", env!("CARGO_PKG_VERSION")), String::new())
    );
    let (code, _, error) = run(&["serve"]);
    assert_eq!(code, Some(2));
    assert!(error.starts_with("vmm-task: \"serve\" is not known; it runs in a virtual machine"), "{error}");
}
