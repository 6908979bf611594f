//! A person's way into a VM: `tests/lab/console` in a terminal.

use std::{fs, path::Path, process::Stdio};

use tokio::{io::AsyncWriteExt, process::Command, time::timeout};

use crate::{
    common::TOKEN,
    lab::{DEADLINE, Guests, ROOTS, RootKind, start},
    vmm::Q35,
};

/// The tool in a terminal of 31 rows and 97 columns, into which `typed` is typed. Gives what it showed.
async fn console(pod: &Path, typed: &str) -> String {
    let tool = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/lab/console");
    let (pods, name) = (pod.parent().unwrap().display(), pod.file_name().unwrap().display());
    // `script` is the terminal. Whatever is typed `resize.` has it resized before the rest is typed.
    let in_it = format!("stty rows 31 cols 97; tty >{pods}/{name}/tty; exec {tool} {name} {pods}");
    let mut script = Command::new("script")
        .args(["-qec", &in_it, "/dev/null"])
        .env("SHELL", "/bin/sh")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut stdin = script.stdin.take().unwrap();
    let (before, after) = typed.split_once("resize.").unwrap_or((typed, ""));
    stdin.write_all(before.as_bytes()).await.unwrap();
    if !after.is_empty() {
        while !pod.join("shared/typed").exists() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        let tty = fs::read_to_string(pod.join("tty")).unwrap();
        let resized = Command::new("stty").args(["-F", tty.trim(), "rows", "50", "cols", "132"]).status();
        assert!(resized.await.unwrap().success());
        stdin.write_all(after.as_bytes()).await.unwrap();
    }
    let output = timeout(DEADLINE, script.wait_with_output()).await.unwrap().unwrap();
    drop(stdin);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_gets_a_shell_if_it_was_asked_for() {
    let Some(guests) = Guests::new(Q35) else { return };
    let kernels = guests.kernels();
    let debug = RootKind { folder: "debug", ..ROOTS[0] };
    let kernel = kernels.iter().find(|kernel| kernel.name == "micro, vmlinux").unwrap();
    let mut config = guests.config(kernel, debug);

    let off = start(config.clone()).await;
    let _ready = off.ready().await;
    fs::write(off.dir.path().join("token"), TOKEN).unwrap();
    let said = console(off.dir.path(), "").await;
    assert!(
        said.contains("console: nobody serves the debug console in this VM; start the pod with"),
        "{said}"
    );
    off.stop().await;

    config.kernel_params = "task.debug_shell=/bin/bash".into();
    let on = start(config).await;
    let _ready = on.ready().await;
    fs::write(on.dir.path().join("token"), "0".repeat(64)).unwrap();
    let said = console(on.dir.path(), "").await;
    assert!(said.contains("console: the VM refuses: wrong token"), "{said}");
    fs::write(on.dir.path().join("token"), TOKEN).unwrap();
    // The first size has been seen when the file is there; the shell reads the second command after the
    // resize.
    let typed = "stty size; touch /run/kuasar/state/typed; read line\nresize.x\nstty size; \
        ip -brief link show lo; strace -V; ss -V; exit\n";
    let said = console(on.dir.path(), typed).await;
    for wanted in ["31 97", "50 132", "<LOOPBACK", "strace -- version", "ss utility"] {
        assert!(said.contains(wanted), "{wanted:?} is not in {said}");
    }
    let said = console(&on.dir.path().with_file_name("no-such-pod"), "").await;
    assert!(said.contains("begin with 'no-such-pod'; give an id that `crictl pods` shows"), "{said}");
    on.stop().await;
}
