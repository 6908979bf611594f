//! Processes outside containers. The reaper collects every child, so this is a program of its own with one
//! test.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::{sync::Arc, time::Duration};

use vmm_task::{
    error::TaskError,
    reaper::Reaper,
    vm_process::{DEADLINE, MAX_OUTPUT, Output, run},
};

async fn sh(reaper: &Arc<Reaper>, script: &str, deadline: Duration) -> Result<Output, TaskError> {
    run(reaper, &format!("sh -c \"{script}\""), b"in\n", deadline).await
}

#[tokio::test]
async fn a_process_of_the_vm_runs() {
    let reaper = Reaper::new();
    tokio::spawn(reaper.start().unwrap());

    let output = sh(&reaper, "cat; echo err >&2; exit 7", DEADLINE).await.unwrap();
    assert_eq!((output.bytes.as_slice(), output.exit.code), (&b"in\nerr\n"[..], 7));
    assert!(!output.truncated);

    // More output than is kept does not stop the writer.
    let output = sh(&reaper, "head -c 3000000 /dev/zero; exit 3", DEADLINE).await.unwrap();
    assert_eq!((output.bytes.len(), output.truncated, output.exit.code), (MAX_OUTPUT, true, 3));

    // What it leaves in the background neither holds up the answer nor stays.
    let output = sh(&reaper, "sleep 1000 & echo $!", DEADLINE).await.unwrap();
    let left = String::from_utf8(output.bytes).unwrap();
    for _ in 0..100 {
        if !std::path::Path::new("/proc").join(left.trim()).exists() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!std::path::Path::new("/proc").join(left.trim()).exists(), "{left} goes on");

    let error = sh(&reaper, "sleep 100", Duration::from_secs(1)).await.unwrap_err().to_string();
    assert_eq!(error, "running sh in the VM, which was killed after 1 s, did not end in time");

    let error = run(&reaper, " ", b"", DEADLINE).await.unwrap_err().to_string();
    assert_eq!(error, "the command to run in the VM is empty");
    let error = run(&reaper, "/nothing/here x", b"", DEADLINE).await.unwrap_err().to_string();
    assert!(error.starts_with("running /nothing/here in the VM: No such file"), "{error}");
}
