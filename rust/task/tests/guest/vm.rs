//! A virtual machine for the tests: QEMU without KVM, vsock in user space, the shared folder by 9p, an initrd
//! made here.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use kuasar_common::{
    api::{
        sandbox::{ExecVMProcessRequest, ExecVMProcessResponse},
        sandbox_ttrpc::SandboxServiceClient,
    },
    constants::{PORT_READY, PORT_STDIO, PORT_TTRPC, TOKEN_METADATA},
    stdio::{HEADER, Hello, Stream, header, payload_len},
};
use tempfile::TempDir;
use ttrpc::{
    r#async::{Client, transport::Socket},
    context::Context,
};

use crate::given::{Given, Kind};

/// Longest time that a guest may be silent where something is to come: an emulated one on a busy machine is
/// slow.
const SILENCE: Duration = Duration::from_secs(120);

pub(crate) const MAC: &str = "02:00:00:00:00:01";

/// A running virtual machine.
pub(crate) struct Vm {
    dir: TempDir,
    pub(crate) token: String,
    processes: Vec<Child>,
    /// The connection that the agent opened.
    pub(crate) ready: BufReader<UnixStream>,
}

impl Drop for Vm {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
        if std::thread::panicking() {
            for log in ["console.log", "vsock.log", "qemu.log"] {
                let text = fs::read_to_string(self.dir.path().join(log)).unwrap_or_default();
                let tail: Vec<&str> = text.lines().rev().take(40).collect();
                eprintln!("--- {log} ---");
                tail.iter().rev().for_each(|line| eprintln!("{line}"));
            }
        }
    }
}

impl Vm {
    /// Boots and waits for READY. Answers it with a token unless told otherwise.
    pub(crate) fn boot(given: &Given, kind: Kind, cmdline: &str, answer: bool) -> Self {
        Self::boot_with(given, kind, cmdline, answer, |_| String::new())
    }

    /// The same with more arguments for QEMU, made with the VM's folder.
    pub(crate) fn boot_with(
        given: &Given,
        kind: Kind,
        cmdline: &str,
        answer: bool,
        more: impl FnOnce(&Path) -> String,
    ) -> Self {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join("shared")).unwrap();
        let listener = UnixListener::bind(dir.path().join(format!("vsock.sock_{PORT_READY}"))).unwrap();
        let started = Instant::now();
        let mut processes = vec![vsock(given, dir.path())];
        if kind != Kind::InitrdNineP {
            processes.push(virtiofsd(given, dir.path()));
        }
        let more = more(dir.path());
        processes.push(qemu(given, kind, dir.path(), cmdline, &more));
        listener.set_nonblocking(true).unwrap();
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(_) if started.elapsed() < Duration::from_secs(60) => {
                    std::thread::sleep(Duration::from_millis(5))
                }
                Err(error) => {
                    let log = |name| fs::read_to_string(dir.path().join(name)).unwrap_or_default();
                    let (console, qemu) = (log("console.log"), log("qemu.log"));
                    for process in &mut processes {
                        let _ = process.kill();
                        let _ = process.wait();
                    }
                    panic!(
                        "the agent did not call: {error}\n--- QEMU ---\n{qemu}\n--- console ---\n{console}"
                    );
                }
            }
        };
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(SILENCE)).unwrap();
        let token = "5a".repeat(32);
        let mut vm = Self { dir, token, processes, ready: BufReader::new(stream) };
        let line = vm.line();
        assert!(line.starts_with("{\"ready\":{\"agent\":"), "{line}");
        println!("READY after {:.2} s: {line}", started.elapsed().as_secs_f64());
        if answer {
            let answer = format!("{{\"token\":\"{}\"}}\n", vm.token);
            vm.ready.get_mut().write_all(answer.as_bytes()).unwrap();
        }
        vm
    }

    /// The next line from the agent.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.ready.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub(crate) fn console(&self) -> String {
        fs::read_to_string(self.dir.path().join("console.log")).unwrap_or_default()
    }

    /// Waits for a text on the console.
    pub(crate) async fn console_says(&self, text: &str, within: Duration) -> bool {
        let until = Instant::now() + within;
        while !self.console().contains(text) && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.console().contains(text)
    }

    /// A container's folder in the shared one, as the host sees it.
    pub(crate) fn shared(&self, id: &str) -> PathBuf {
        self.dir.path().join("shared").join(id)
    }

    /// A command to QEMU's monitor; what it answers, without the prompt.
    pub(crate) fn monitor(&self, command: &str) -> String {
        let mut stream = UnixStream::connect(self.dir.path().join("monitor.sock")).unwrap();
        stream.set_read_timeout(Some(SILENCE)).unwrap();
        let mut prompt = || {
            let (mut said, mut byte) = (Vec::new(), [0]);
            while !said.ends_with(b"(qemu) ") {
                assert_eq!(stream.read(&mut byte).unwrap(), 1);
                said.push(byte[0]);
            }
            let said = String::from_utf8_lossy(&said).replace("(qemu) ", "");
            let _ = stream.write_all(
                if said.contains("QEMU") { format!("{command}\n") } else { String::new() }.as_bytes(),
            );
            said
        };
        prompt();
        prompt()
    }

    /// Waits for QEMU to end.
    pub(crate) fn ended(&mut self, within: Duration) -> bool {
        let until = Instant::now() + within;
        while Instant::now() < until {
            if self.processes.last_mut().unwrap().try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    /// A connection to a port of the guest.
    pub(crate) fn connect(&self, port: u32) -> UnixStream {
        let (stream, answer) = self.try_connect(port);
        assert!(answer.starts_with("OK"), "{answer}");
        stream
    }

    /// The same with what the vsock answers: nothing when nobody serves the port.
    pub(crate) fn try_connect(&self, port: u32) -> (UnixStream, String) {
        let mut stream = UnixStream::connect(self.dir.path().join("vsock.sock")).unwrap();
        stream.set_read_timeout(Some(SILENCE)).unwrap();
        // In one piece: vhost-device-vsock takes what its first read returns for the whole line.
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        let answer = read_line(&mut stream);
        (stream, answer)
    }

    pub(crate) fn client(&self) -> Client {
        let stream = self.connect(PORT_TTRPC);
        stream.set_nonblocking(true).unwrap();
        Client::new(Socket::from(tokio::net::UnixStream::from_std(stream).unwrap()))
    }

    pub(crate) fn sandbox(&self) -> SandboxServiceClient {
        SandboxServiceClient::new(self.client())
    }

    /// A program of the VM itself, outside of containers: what it said, and how it ended.
    pub(crate) async fn run(&self, command: &str) -> ttrpc::Result<ExecVMProcessResponse> {
        let request = ExecVMProcessRequest { command: command.into(), ..Default::default() };
        self.sandbox().exec_vm_process(self.context(), &request).await
    }

    /// Returns the context of every call: the token and a time limit.
    pub(crate) fn context(&self) -> Context {
        let token = HashMap::from([(TOKEN_METADATA.to_owned(), vec![self.token.clone()])]);
        let mut context = ttrpc::context::with_metadata(token);
        context.timeout_nano = 90_000_000_000;
        context
    }

    /// Opens a stream's connection.
    pub(crate) fn stream(&self, container: &str, exec: &str, stream: Stream) -> UnixStream {
        let mut connection = self.connect(PORT_STDIO);
        let (container, exec) = (container.to_owned(), exec.to_owned());
        let hello = Hello { token: self.token.clone(), container, exec, stream };
        connection.write_all((serde_json::to_string(&hello).unwrap() + "\n").as_bytes()).unwrap();
        assert_eq!(read_line(&mut connection), "OK");
        connection
    }

    /// Reads an output stream to its end, in a thread of its own.
    pub(crate) fn output(
        &self,
        container: &str,
        exec: &str,
        stream: Stream,
    ) -> std::thread::JoinHandle<Vec<u8>> {
        let connection = self.stream(container, exec, stream);
        std::thread::spawn(move || read_frames(connection))
    }
}

pub(crate) fn read_line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

pub(crate) fn read_frame(connection: &mut UnixStream) -> Vec<u8> {
    let mut head = [0; HEADER];
    connection.read_exact(&mut head).unwrap();
    let mut payload = vec![0; payload_len(head).unwrap()];
    connection.read_exact(&mut payload).unwrap();
    payload
}

pub(crate) fn read_frames(mut connection: UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let frame = read_frame(&mut connection);
        if frame.is_empty() {
            return all;
        }
        all.extend(frame);
    }
}

pub(crate) fn write_frame(connection: &mut UnixStream, bytes: &[u8]) {
    connection.write_all(&header(bytes.len())).unwrap();
    connection.write_all(bytes).unwrap();
}

/// Starts a program that serves a device for QEMU, and waits for its socket.
fn serve(command: &mut Command, socket: &Path, log: &Path) -> Child {
    let log = fs::File::create(log).unwrap();
    let child = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
    while !socket.exists() {
        std::thread::sleep(Duration::from_millis(2));
    }
    child
}

fn vsock(given: &Given, dir: &Path) -> Child {
    let socket = dir.join("vhost-vsock.sock");
    let mut command = Command::new(&given.vsock);
    command.arg("--vm").arg(format!(
        "guest-cid=3,socket={},uds-path={}",
        socket.display(),
        dir.join("vsock.sock").display()
    ));
    serve(&mut command, &socket, &dir.join("vsock.log"))
}

fn virtiofsd(given: &Given, dir: &Path) -> Child {
    let socket = dir.join("virtiofs.sock");
    let mut command = Command::new(given.virtiofsd.as_ref().unwrap());
    command.args(["--sandbox=none", "--socket-path"]).arg(&socket);
    command.arg("--shared-dir").arg(dir.join("shared"));
    serve(&mut command, &socket, &dir.join("virtiofsd.log"))
}

fn qemu(given: &Given, kind: Kind, dir: &Path, cmdline: &str, more: &str) -> Child {
    let path = |name: &str| dir.join(name).display().to_string();
    let log = fs::File::create(dir.join("qemu.log")).unwrap();
    let mut args = format!(
        "-no-user-config -nodefaults -display none -no-reboot -accel tcg -cpu max -smp 1 -m 512M,slots=1,maxmem=1G \
         -M q35,memory-backend=mem,acpi=off,hpet=off,usb=off,graphics=off,vmport=off,sata=off,smbus=off,i8042=off \
         -object memory-backend-memfd,id=mem,size=512M,share=on \
         -chardev socket,id=vs,path={} -device vhost-user-vsock-pci,chardev=vs \
         -netdev user,id=n0,restrict=on -device virtio-net-pci,netdev=n0,mac={MAC},romfile= -device virtio-rng-pci \
         -device virtio-serial-pci -chardev file,id=con,path={} -device virtconsole,chardev=con \
         -monitor unix:{},server=on,wait=off ",
        path("vhost-vsock.sock"),
        path("console.log"),
        path("monitor.sock"),
    );
    let mut append = format!("console=hvc0 reboot=t panic=-1 loglevel=7 {cmdline}");
    match kind {
        Kind::InitrdNineP => {
            args += &format!(
                "-fsdev local,id=fs,path={},security_model=none,multidevs=remap \
             -device virtio-9p-pci,fsdev=fs,mount_tag=kuasar -initrd {}",
                path("shared"),
                given.initrd(dir).display()
            )
        }
        Kind::DiskVirtiofs => {
            let disk = given.disk.as_ref().unwrap();
            args += &format!(
                "-object memory-backend-file,id=img,mem-path={},share=on,readonly=on,size={} \
                 -device virtio-pmem-pci,memdev=img,id=root ",
                disk.display(),
                fs::metadata(disk).unwrap().len(),
            );
            append += " root=/dev/pmem0p1 rootflags=dax ro rootfstype=ext4";
        }
        Kind::PlainDisk => {
            let disk = given.disk.as_ref().unwrap();
            args += &format!(
                "-drive if=none,id=root,file={},format=raw,readonly=on -device virtio-blk-pci,drive=root ",
                disk.display()
            );
            append += " root=/dev/vda ro rootfstype=ext4";
        }
    }
    if kind != Kind::InitrdNineP {
        args += &format!(
            "-chardev socket,id=fs,path={} -device vhost-user-fs-pci,chardev=fs,tag=kuasar",
            path("virtiofs.sock")
        );
        // Pages that virtiofsd fills behind the emulator's back must not hold translated code.
        append += " init_on_alloc=1";
    }
    Command::new(&given.qemu)
        .args(args.split_whitespace())
        .args(more.split_whitespace())
        .arg("-kernel")
        .arg(&given.kernel)
        .arg("-append")
        .arg(append)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// A bundle in the shared folder, with a root file system of BusyBox's; returns its path in the guest.
pub(crate) fn bundle(given: &Given, vm: &Vm, id: &str, args: &[&str], terminal: bool) -> String {
    let dir = vm.shared(id);
    for name in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
        fs::create_dir_all(dir.join("rootfs").join(name)).unwrap();
    }
    fs::copy(&given.busybox, dir.join("rootfs/bin/busybox")).unwrap();
    fs::set_permissions(dir.join("rootfs/bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    for name in [
        "sh", "cat", "sleep", "dd", "wc", "md5sum", "ip", "hostname", "stty", "id", "tty", "ps", "true",
        "yes", "ls",
    ] {
        let link = dir.join("rootfs/bin").join(name);
        if !link.exists() {
            std::os::unix::fs::symlink("busybox", link).unwrap();
        }
    }
    fs::write(dir.join("config.json"), spec(id, args, terminal).to_string()).unwrap();
    format!("/run/kuasar/state/{id}")
}

pub(crate) fn process(args: &[&str], terminal: bool) -> serde_json::Value {
    serde_json::json!({
        "args": args, "cwd": "/", "env": ["PATH=/bin", "TERM=xterm"], "terminal": terminal,
        "user": {"uid": 0, "gid": 0}, "noNewPrivileges": true, "apparmorProfile": "cri-containerd.apparmor.d",
        "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
    })
}

fn spec(id: &str, args: &[&str], terminal: bool) -> serde_json::Value {
    let mut process = process(args, terminal);
    process.as_object_mut().unwrap().remove("apparmorProfile");
    let mount = |target: &str, kind: &str, options: &[&str]| serde_json::json!({"destination": target, "type": kind, "source": kind, "options": options});
    serde_json::json!({
        "ociVersion": "1.2.0",
        "process": process,
        "root": {"path": format!("/run/kuasar/state/{id}/rootfs")},
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            {"destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["rbind"]},
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ],
        "linux": {
            "cgroupsPath": format!("/kuasar/{id}"),
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}],
            "resources": {"memory": {"limit": 67_108_864}, "pids": {"limit": 64}},
            "seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{"names": ["swapon"], "action": "SCMP_ACT_ERRNO"}]},
        },
    })
}
