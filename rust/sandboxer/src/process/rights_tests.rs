//! With small programs that say what they have.

use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt, time::Duration};

use super::*;
use crate::process::{Namespaces, Spawn, vsock_device_filter};

const ID: u32 = 1_900_000_123;

/// Only root may give rights away.
fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: not root");
    }
    root
}

/// All that is taken away from a process that needs nothing.
fn nothing() -> Rights {
    // As the daemon's: nobody else may use what it makes.
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    Rights {
        id: Some(ID),
        capabilities: Some(CapabilitySet::empty()),
        no_new_privileges: true,
        namespaces: Namespaces { pid: true, ipc: true, uts: true },
        jail: Some(Jail::new()),
        limits: vec![(Resource::Core, 0), (Resource::Nofile, 64)],
        oom_score_adj: Some(345),
        filter: None,
    }
}

/// Output of a script that runs with these rights.
async fn said(rights: Rights, script: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut spawn = Spawn::new("sh");
    spawn.args(["-c", script]).log(&log).rights(rights);
    let process = spawn.spawn().unwrap();
    tokio::time::timeout(Duration::from_secs(20), process.wait()).await.unwrap().unwrap();
    fs::read_to_string(&log).unwrap()
}

fn status(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|line| line.split_once(':')).map(|(key, value)| (key, value.trim())).collect()
}

#[tokio::test]
async fn a_process_that_needs_nothing_has_nothing() {
    if !root() {
        return;
    }
    let text = said(nothing(), "cat /proc/self/status /proc/self/limits; cat /proc/self/oom_score_adj").await;
    let status = status(&text);
    let ids = [ID.to_string().as_str(); 4].join("\t");
    assert_eq!(status["Uid"], ids, "{text}");
    assert_eq!(status["Gid"], ids);
    assert_eq!(status["Groups"], "");
    assert_eq!(status["NoNewPrivs"], "1");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    let limit = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert!(
        limit("Max core file size").split_whitespace().eq(["Max", "core", "file", "size", "0", "0", "bytes"])
    );
    assert!(limit("Max open files").contains("64"), "{}", limit("Max open files"));
    assert!(text.ends_with("\n345\n"), "{text}");
}

#[tokio::test]
async fn it_sees_programs_and_nothing_else_of_the_host() {
    if !root() {
        return;
    }
    let secret = tempfile::tempdir().unwrap();
    fs::set_permissions(secret.path(), fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(secret.path().join("file"), "secret").unwrap();
    let script = format!(
        "echo pid $$; ls /; ls /proc | grep -c '^[0-9]'; cat {0}/file; cat /etc/passwd; echo x > /dev/null && echo null; \
         echo x > /here; echo x > /usr/here; mount -t tmpfs x /usr; ls /proc/1/root/etc; echo end",
        secret.path().display()
    );
    let text = said(nothing(), &script).await;
    assert!(text.starts_with("pid 1\n"), "{text}");
    assert!(!text.contains("secret\n") && !text.contains("root:"), "{text}");
    assert!(text.contains("\nnull\n") && text.ends_with("end\n"), "{text}");
    // The processes that it sees are its own: the shell, ls and grep.
    assert!(["2", "3"].iter().any(|count| text.lines().any(|line| line == *count)), "{text}");
    assert!(!text.lines().any(|line| ["home", "root", "run", "sys", "tmp", "var"].contains(&line)), "{text}");
    assert_eq!(text.matches("here: ").count(), 2, "nothing can be written: {text}");
}

/// Beside what it is given: the id alone lets it open what anybody may.
#[tokio::test]
async fn a_file_that_it_holds_is_opened_once_more_and_no_other() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kernel");
    fs::write(&path, "a kernel").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let writable = dir.path().join("sockets");
    fs::create_dir(&writable).unwrap();
    std::os::unix::fs::chown(&writable, Some(ID), Some(ID)).unwrap();
    let file = fs::File::open(&path).unwrap();
    let mut jail = Jail::new();
    jail.reopened(file.try_clone().unwrap()).writable(&writable);
    let log = dir.path().join("log");
    let mut spawn = Spawn::new("sh");
    let fd = spawn.fd(file.into());
    let other = spawn.fd(fs::File::open("/etc/hostname").unwrap().into());
    let script = format!(
        "cat /proc/self/fd/{fd}; echo; cat {0}; cat /proc/self/fd/{other} >/dev/null && echo other; ls {1} && echo seen",
        path.display(),
        writable.display()
    );
    spawn.args(["-c", &script]).log(&log).rights(Rights { jail: Some(jail), ..nothing() });
    let process = spawn.spawn().unwrap();
    assert!(process.wait().await.unwrap().is_some());
    let text = fs::read_to_string(&log).unwrap();
    assert_eq!(text.matches("a kernel\n").count(), 1, "{text}");
    assert!(text.contains("seen\n"), "{text}");
    // What it holds and was not given to be opened is refused where the kernel has Landlock.
    let landlock = super::super::landlock::Ruleset::new().unwrap().is_some();
    assert_eq!(text.contains("other\n"), !landlock, "{text}");
}

#[tokio::test]
async fn root_keeps_what_it_is_given_and_no_more() {
    if !root() {
        return;
    }
    let keep = CapabilitySet::CHOWN | CapabilitySet::KILL;
    let rights = Rights { capabilities: Some(keep), no_new_privileges: true, ..Rights::default() };
    let text = said(rights, "cat /proc/self/status").await;
    let status = status(&text);
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(status[set], "0000000000000021", "{set} in {text}");
    }
    assert_eq!((status["CapInh"], status["Uid"]), ("0000000000000000", "0\t0\t0\t0"));
}

#[tokio::test]
async fn the_filter_refuses_what_the_vsock_device_has_no_use_for() {
    if !root() {
        return;
    }
    let rights = || Rights { filter: Some(vsock_device_filter().unwrap()), ..nothing() };
    let text = said(rights(), "grep Seccomp: /proc/self/status; mkdir /tmp/x; echo end").await;
    assert!(text.contains("Seccomp:\t2\n") && text.ends_with("end\n"), "{text}");
    // `mkdir` and `chmod` are no calls of its, nor is a socket of the network.
    assert!(text.contains("Function not implemented"), "{text}");
}

#[tokio::test]
async fn what_cannot_be_done_is_named() {
    if !root() {
        return;
    }
    let mut spawn = Spawn::new("true");
    let mut jail = Jail::new();
    jail.writable("/nonexistent/folder");
    spawn.rights(Rights { jail: Some(jail), ..nothing() });
    let error = spawn.spawn().unwrap_err().to_string();
    assert!(error.starts_with("confining true: "), "{error}");
    let mut spawn = Spawn::new("true");
    spawn.rights(Rights { oom_score_adj: Some(2000), ..Rights::default() });
    let error = spawn.spawn().unwrap_err().to_string();
    assert_eq!(error, "setting the OOM score of true: Invalid argument (os error 22)");
}

/// Two pods' processes: neither opens what is the other's, nor signals it.
#[tokio::test]
async fn two_users_cannot_reach_one_another() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let folder = dir.path().join("of-another");
    fs::create_dir(&folder).unwrap();
    std::os::unix::fs::chown(&folder, Some(ID + 1), Some(ID + 1)).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    let mut spawn = Spawn::new("sleep");
    spawn.args(["60"]).rights(Rights { id: Some(ID + 1), ..nothing() });
    let other = spawn.spawn().unwrap();
    // Without a PID namespace and a file system of its own, to see what the id alone does.
    let rights = Rights { jail: None, namespaces: Namespaces::default(), ..nothing() };
    let script = format!(
        "ls {} && echo opened; kill {} && echo killed; cat /proc/{}/maps && echo read; echo end",
        folder.display(),
        other.pid(),
        other.pid()
    );
    let text = said(rights, &script).await;
    assert!(!text.contains("opened") && !text.contains("killed") && !text.contains("read\n"), "{text}");
    assert!(text.ends_with("end\n"), "{text}");
    other.end(Duration::ZERO).await.unwrap();
}
