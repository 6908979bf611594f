//! The daemon as systemd runs it: told when it is ready, kept alive, and with the unit that the package has.
//!
//! Its VMM, kernel and image are stand-ins that are good enough to be looked at: no pod is started here.

#![allow(clippy::disallowed_methods, reason = "tests work in folders of their own")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::{
    fs,
    os::unix::{
        fs::PermissionsExt,
        net::{UnixDatagram, UnixStream},
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const UNIT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/systemd/kuasar@.service");

struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let lab = Self { dir };
        let qemu = lab.path("qemu");
        fs::write(&qemu, "#!/bin/sh\necho QEMU emulator version 10.0.2\n").unwrap();
        fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).unwrap();
        let mut kernel = vec![0; 64];
        kernel[..4].copy_from_slice(b"\x7fELF");
        kernel[18] = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
        fs::write(lab.path("vmlinux"), kernel).unwrap();
        let mut image = vec![0; 2 << 20];
        image[510..512].copy_from_slice(&[0x55, 0xAA]);
        fs::write(lab.path("kuasar.img"), image).unwrap();
        fs::write(
            lab.path("qemu.toml"),
            "[hypervisor]\npath = \"./qemu\"\nkernel_path = \"vmlinux\"\nimage_path = \"kuasar.img\"\naccel = \"tcg\"\n\
             share_fs = \"9p\"\nvsock = \"vhost-user\"\nvsock_device.path = \"/bin/true\"\n",
        )
        .unwrap();
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmm-sandboxer"));
        command.arg("--config").arg(self.path("qemu.toml")).arg("--dir").arg(self.path("pods"));
        command.arg("--listen").arg(self.path("daemon.sock")).stdin(Stdio::null());
        command.env_remove("NOTIFY_SOCKET").env_remove("WATCHDOG_USEC");
        command
    }
}

struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The daemon's next notification, if one comes within a time.
fn told(socket: &UnixDatagram, within: Duration) -> Option<String> {
    socket.set_read_timeout(Some(within)).unwrap();
    let mut buffer = [0; 256];
    let length = socket.recv(&mut buffer).ok()?;
    Some(String::from_utf8(buffer[..length].to_vec()).unwrap())
}

#[test]
fn systemd_is_told_ready_when_it_listens_and_kept_awake_until_it_leaves() {
    let lab = Lab::new();
    let socket = UnixDatagram::bind(lab.path("notify")).unwrap();
    // systemd names the process whose keep-alives count.
    let mut command = Command::new("sh");
    command.args(["-c", "WATCHDOG_PID=$$ exec \"$@\"", "sh"]);
    let daemon = lab.command();
    command.arg(daemon.get_program()).args(daemon.get_args());
    command.env("NOTIFY_SOCKET", lab.path("notify")).env("WATCHDOG_USEC", "2000000");
    let child = command.spawn().unwrap();
    let mut daemon = Daemon(child);
    assert_eq!(told(&socket, Duration::from_secs(30)).as_deref(), Some("READY=1\n"));
    UnixStream::connect(lab.path("daemon.sock")).expect("it listens before it says so");
    // The first at once, then one every second; slower machines have until systemd would lose its patience.
    for _ in 0..3 {
        assert_eq!(told(&socket, Duration::from_secs(2)).as_deref(), Some("WATCHDOG=1\n"));
    }
    let pid = nix::unistd::Pid::from_raw(i32::try_from(daemon.0.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let last =
        std::iter::from_fn(|| told(&socket, Duration::from_secs(10))).find(|text| text != "WATCHDOG=1\n");
    assert_eq!(last.as_deref(), Some("STOPPING=1\n"));
    assert!(daemon.0.wait().unwrap().success());
    assert!(!lab.path("daemon.sock").exists());
}

#[test]
fn nobody_is_told_anything_without_being_asked() {
    let lab = Lab::new();
    let mut daemon = Daemon(lab.command().stderr(Stdio::piped()).spawn().unwrap());
    let end = Instant::now() + Duration::from_secs(30);
    while UnixStream::connect(lab.path("daemon.sock")).is_err() {
        assert!(Instant::now() < end && daemon.0.try_wait().unwrap().is_none(), "it does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    // Taking the place of one that was killed: its socket is still there.
    daemon.0.kill().unwrap();
    daemon.0.wait().unwrap();
    assert!(lab.path("daemon.sock").exists());
    let socket = UnixDatagram::bind(lab.path("notify")).unwrap();
    let _next = Daemon(lab.command().env("NOTIFY_SOCKET", lab.path("notify")).spawn().unwrap());
    assert_eq!(told(&socket, Duration::from_secs(30)).as_deref(), Some("READY=1\n"));
    assert_eq!(told(&socket, Duration::from_millis(500)), None, "keep-alives that nobody wants");
}

fn mode(path: &std::path::Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// Any client that may connect may have any folder of the host mounted.
#[test]
fn nobody_else_may_use_what_it_makes_whatever_the_umask() {
    let lab = Lab::new();
    let socket = UnixDatagram::bind(lab.path("notify")).unwrap();
    let daemon = lab.command();
    let mut command = Command::new("sh");
    command.args(["-c", "umask 0; exec \"$@\"", "sh"]).arg(daemon.get_program());
    let listen = lab.path("a/b/daemon.sock");
    let replaced = |argument| if argument == lab.path("daemon.sock") { listen.as_os_str() } else { argument };
    command.args(daemon.get_args().map(replaced));
    command.args(["--trace".as_ref(), lab.path("trace").as_os_str()]);
    let _daemon = Daemon(command.env("NOTIFY_SOCKET", lab.path("notify")).spawn().unwrap());
    assert_eq!(told(&socket, Duration::from_secs(30)).as_deref(), Some("READY=1\n"));
    for (name, expected) in [
        ("pods", 0o700),
        ("pods/.lock", 0o600),
        ("a", 0o700),
        ("a/b", 0o700),
        ("a/b/daemon.sock", 0o600),
        ("a/b/daemon.sock.lock", 0o600),
        ("trace", 0o600),
    ] {
        assert_eq!(format!("{:o}", mode(&lab.path(name))), format!("{expected:o}"), "{name}");
    }
}

#[test]
fn a_folder_that_is_not_its_own_stops_it_with_a_sentence() {
    let lab = Lab::new();
    let said = || {
        let output = lab.command().output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    fs::create_dir_all(lab.path("pods/precious")).unwrap();
    fs::write(lab.path("pods/precious/data"), "x").unwrap();
    let text = said();
    assert!(text.starts_with("vmm-sandboxer: --dir /"), "{text}");
    assert!(text.contains("(\"precious\"); give --dir a folder of its own"), "{text}");
    assert_eq!(fs::read_dir(lab.path("pods")).unwrap().count(), 1, "nothing is made there");
    assert!(lab.path("pods/precious/data").exists());
    fs::remove_dir_all(lab.path("pods/precious")).unwrap();
    fs::set_permissions(lab.path("pods"), fs::Permissions::from_mode(0o777)).unwrap();
    let text = said();
    assert!(text.contains("has mode 0777") && text.contains("chmod go-w"), "{text}");
}

/// The unit with the program that was built here.
fn unit(lab: &Lab) -> String {
    let text = fs::read_to_string(UNIT).unwrap();
    let text = text.replace("/usr/bin/vmm-sandboxer", env!("CARGO_BIN_EXE_vmm-sandboxer"));
    let text = text.replace("/etc/kuasar/%i.toml", lab.path("qemu.toml").to_str().unwrap());
    let text = text.replace("/run/kuasar/%i.sock", lab.path("daemon.sock").to_str().unwrap());
    text.replace("/run/kuasar/%i", lab.path("pods").to_str().unwrap())
}

#[test]
fn the_unit_is_one_that_systemd_takes_and_keeps_what_pods_need() {
    let lab = Lab::new();
    let path = lab.path("kuasar@qemu.service");
    let text = unit(&lab);
    fs::write(&path, &text).unwrap();
    for line in [
        "Before=containerd.service k3s.service kubelet.service",
        "Type=notify",
        "KillMode=process",
        "Delegate=yes",
        "WatchdogSec=30",
        "Restart=always",
    ] {
        assert!(text.lines().any(|own| own == line), "{line} is not in the unit");
    }
    // Each of these gives the service a mount namespace, and then its mounts do not reach the VMs of an
    // earlier one.
    for option in [
        "ProtectSystem=",
        "ProtectHome=",
        "PrivateTmp=",
        "PrivateDevices=",
        "PrivateMounts=",
        "MountFlags=",
        "ReadOnlyPaths=",
        "InaccessiblePaths=",
        "ProtectKernelTunables=",
        "ProtectKernelModules=",
        "ProtectKernelLogs=",
        "ProtectControlGroups=",
        "BindPaths=",
        "RootDirectory=",
        "TemporaryFileSystem=",
        "ProtectProc=",
        "DynamicUser=",
    ] {
        assert!(!text.lines().any(|line| line.starts_with(option)), "{option}");
    }
    // Of ten, by systemd's own measure, with what QEMU, virtiofsd and the relay inherit and need left in.
    let judged = Command::new("systemd-analyze")
        .args(["security", "--offline=yes", "--no-pager", "--threshold=70"])
        .arg(&path)
        .output();
    if let Ok(judged) = judged {
        let said = String::from_utf8_lossy(&judged.stdout);
        assert!(judged.status.success(), "{}", said.lines().last().unwrap_or_default());
        assert!(said.contains("Overall exposure level"), "{said}");
    }
    let Ok(verified) = Command::new("systemd-analyze").arg("verify").arg(&path).output() else {
        println!("skipped: systemd-analyze verify: systemd is not installed here");
        return;
    };
    let said = String::from_utf8_lossy(&verified.stderr);
    // Of other units of the machine it complains as well.
    let ours: Vec<_> = said.lines().filter(|line| line.contains("kuasar")).collect();
    assert!(verified.status.success() && ours.is_empty(), "{said}");
}
