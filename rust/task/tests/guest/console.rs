//! The debug console.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use containerd_shim_protos::shim_async::TaskClient;
use kuasar_common::{
    api::sandbox::CheckRequest,
    console::{INPUT, RESIZE},
    constants::PORT_DEBUG,
    stdio::Stream,
};

use crate::{
    given,
    given::{Given, Kind},
    pod::Pod,
    vm::{Vm, bundle, read_frame, read_line, write_frame},
};

fn open(vm: &Vm, hello: &str) -> (UnixStream, String) {
    let mut connection = vm.connect(PORT_DEBUG);
    connection.write_all(format!("{hello}\n").as_bytes()).unwrap();
    let answer = read_line(&mut connection);
    (connection, answer)
}

fn type_in(connection: &mut UnixStream, line: &str) {
    write_frame(connection, &[&[INPUT], line.as_bytes()].concat());
}

/// Reads until the terminal shows a text.
fn until(connection: &mut UnixStream, text: &str) {
    let mut seen = String::new();
    while !seen.contains(text) {
        let frame = read_frame(connection);
        assert!(!frame.is_empty(), "the shell ended; it said {seen:?}");
        seen += &String::from_utf8(frame).unwrap();
    }
}

#[tokio::test]
#[ignore = "needs a guest: set KUASAR_IMAGE"]
async fn a_debug_console_is_a_shell_of_the_vm() {
    let given = given();
    let shell = "/run/kuasar/state/tools/rootfs/bin/sh";
    let cmdline = format!("task.sharefs_type=9p task.debug task.debug_shell={shell}");
    let vm = Vm::boot(&given, Kind::InitrdNineP, &cmdline, true);
    let hello = format!(r#"{{"token":"{}","rows":31,"columns":97}}"#, vm.token);

    // Its port is open before the agent answers calls.
    vm.sandbox().check(vm.context(), &CheckRequest::new()).await.unwrap();
    assert_eq!(open(&vm, r#"{"token":"5b"}"#).1, "ERR wrong token");
    let missing = open(&vm, &hello).1;
    assert_eq!(
        missing,
        format!("ERR starting the shell {shell} of task.debug_shell: No such file or directory (os error 2)")
    );
    bundle(&given, &vm, "tools", &["sh"], false);

    let (mut console, answer) = open(&vm, &hello);
    assert_eq!(answer, "OK");
    type_in(&mut console, "PATH=/run/kuasar/state/tools/rootfs/bin; stty size\n");
    until(&mut console, "31 97");
    write_frame(&mut console, &[RESIZE, 0, 50, 0, 132]);
    type_in(&mut console, "stty size\n");
    until(&mut console, "50 132");
    // The end of the shell ends the connection.
    type_in(&mut console, "exit\n");
    while !read_frame(&mut console).is_empty() {}
    assert_eq!(console.read(&mut [0]).unwrap(), 0);

    // Hanging up ends the shell and what runs in it.
    let (mut console, _) = open(&vm, &hello);
    type_in(&mut console, "/run/kuasar/state/tools/rootfs/bin/sleep 4711\n");
    let sleepers = || async {
        vm.run("/run/kuasar/state/tools/rootfs/bin/ps").await.unwrap().out.contains("sleep 4711")
    };
    while !sleepers().await {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Not by closing alone: vhost-device-vsock says nothing to the guest if there is output left that nobody
    // read.
    write_frame(&mut console, b"");
    let mut left = 100;
    while sleepers().await {
        left -= 1;
        assert!(left > 0, "the shell's program goes on after a hang-up");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    power_off(vm, &given, &hello).await;
}

/// Powers off from within, as `poweroff -f` does on a machine without a service manager: here it asks PID 1,
/// which ends the VM in order.
async fn power_off(vm: Vm, given: &Given, hello: &str) {
    let task = TaskClient::new(vm.client());
    let mut pod = Pod { given: given.clone(), vm, task };
    let script = "trap 'echo bye > /last-words; exit 0' TERM; echo ready; while true; do sleep 0.1; done";
    pod.create("last", &["sh", "-c", script], false, false).await.unwrap();
    pod.start("last", "").await.unwrap();
    assert_eq!(read_frame(&mut pod.vm.stream("last", "", Stream::Stdout)), b"ready\n");
    let (mut console, _) = open(&pod.vm, hello);
    type_in(&mut console, "kill -TERM 1\n");
    assert!(pod.vm.ended(Duration::from_secs(20)), "the VM goes on");
    let said = std::fs::read_to_string(pod.vm.shared("last").join("rootfs/last-words")).unwrap();
    assert_eq!(said, "bye\n");
}
