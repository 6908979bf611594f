//! A private containerd with our daemons beside it, in the machine that [`crate::machine`] made.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

use crate::{
    cri::{
        ContainerConfig, ContainerMetadata, Cri, ImageSpec, LinuxContainerConfig,
        LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode,
        NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    },
    image, leaks,
    machine::Machine,
    paths::Paths,
};

/// containerd's socket, where `ctr` looks without being told.
pub const SOCKET: &str = "/run/containerd/containerd.sock";
/// CRI's containerd namespace.
pub const NAMESPACE: &str = "k8s.io";
/// Handler with every default: image on pmem, virtiofs.
pub const QEMU: &str = "kuasar-qemu";
/// Handler without virtiofsd: image on virtio-blk, 9p.
pub const QEMU_9P: &str = "kuasar-qemu-9p";
/// Handler whose guest runs from the initrd.
pub const QEMU_INITRD: &str = "kuasar-qemu-initrd";
/// Handler of ordinary containers, to tell a fault of the lab from one of ours.
pub const RUNC: &str = "runc";

/// The pods' bridge.
const BRIDGE: &str = "klab0";

/// Time for a program of the lab to listen, and to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// Keys of `[hypervisor]` by handler, over the `config.toml` of the image.
const VARIANTS: [(&str, &[(&str, &str)]); 3] =
    [(QEMU, &[]), (QEMU_9P, &[("share_fs", "9p"), ("root", "blk")]), (QEMU_INITRD, &[("root", "initrd")])];

/// The running lab.
#[derive(Debug)]
pub struct Lab {
    /// The machine it is in.
    pub machine: Machine,
    /// Where the programs are.
    pub paths: Paths,
    /// The client.
    pub cri: Cri,
    containerd: Child,
    daemons: Vec<Daemon>,
    pods: AtomicU32,
}

/// One of our daemons.
#[derive(Debug)]
pub struct Daemon {
    handler: &'static str,
    child: Child,
}

/// A pod under test.
#[derive(Debug)]
pub struct Pod<'a> {
    lab: &'a Lab,
    /// Its id.
    pub id: String,
    /// What it was made from.
    pub config: PodSandboxConfig,
}

/// All handlers whose pods are VMs.
pub fn handlers() -> impl Iterator<Item = &'static str> {
    VARIANTS.iter().map(|(handler, _)| *handler)
}

/// Socket of a handler's daemon; for the first handler the place where it is by default.
#[must_use]
pub fn socket_of(handler: &str) -> PathBuf {
    folder_of(handler).with_extension("sock")
}

/// Folder of a handler's pods. Short: the sockets in it have to fit the 107 bytes of a socket's address.
#[must_use]
pub fn folder_of(handler: &str) -> PathBuf {
    Path::new("/run/kuasar").join(handler.trim_start_matches("kuasar-"))
}

/// The daemon's configuration: the image's own, with this machine's programs, emulation, and `keys` of `[hypervisor]`.
///
/// # Errors
/// When the image's `config.toml` cannot be read.
pub fn daemon_config(paths: &Paths, keys: &[(&str, &str)]) -> Result<toml::Table> {
    let file = paths.image.join("config.toml");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let mut config: toml::Table = text.parse().with_context(|| format!("parsing {}", file.display()))?;
    let tool = |name: &str| paths.tool(name).to_string_lossy().into_owned();
    let part = |name: &str| paths.image.join(name).to_string_lossy().into_owned();
    let hypervisor = table(&mut config, "hypervisor")?;
    let accel = std::env::var("KUASAR_ACCEL").unwrap_or_else(|_| "tcg".into());
    let vsock = std::env::var("KUASAR_VSOCK").unwrap_or_else(|_| "vhost-user".into());
    for (key, value) in [
        ("accel", accel),
        ("vsock", vsock),
        ("path", tool("qemu-system-x86_64")),
        ("kernel_path", part("vmlinux")),
        ("image_path", part("kuasar.img")),
        ("initrd_path", part("kuasar.initrd")),
    ] {
        hypervisor.insert(key.into(), value.into());
    }
    for (key, value) in keys {
        hypervisor.insert((*key).into(), (*value).into());
    }
    table(hypervisor, "virtiofsd")?.insert("path".into(), tool("virtiofsd").into());
    table(hypervisor, "vsock_device")?.insert("path".into(), tool("vhost-device-vsock").into());
    let relay = paths.relay().to_string_lossy().into_owned();
    table(&mut config, "sandbox")?.insert("relay_path".into(), relay.into());
    Ok(config)
}

/// The table of that name, made when it is not there.
///
/// # Errors
/// When the key holds something else.
pub fn table<'a>(parent: &'a mut toml::Table, key: &str) -> Result<&'a mut toml::Table> {
    let value = parent.entry(key).or_insert_with(|| toml::Value::Table(toml::Table::new()));
    value.as_table_mut().with_context(|| format!("{key} in config.toml is not a table"))
}

impl Lab {
    /// Starts the daemons of `handlers`, then containerd, and imports the test images.
    ///
    /// # Errors
    /// When a program does not come up; the text shows the end of its log.
    pub async fn start(machine: Machine, paths: Paths, handlers: &[&str]) -> Result<Self> {
        for folder in ["log", "containerd", "cni", "pods", "images", "tmp"] {
            fs::create_dir_all(machine.root.join(folder))?;
        }
        fs::create_dir_all("/run/kuasar")?;
        let mut daemons = Vec::new();
        for (handler, keys) in VARIANTS.iter().filter(|(handler, _)| handlers.contains(handler)) {
            daemons.push(start_daemon(&machine, &paths, handler, keys)?);
        }
        for daemon in &mut daemons {
            let log = log_of(&machine, daemon.handler);
            listening(&mut daemon.child, &socket_of(daemon.handler), &log).await?;
        }
        let mut containerd = start_containerd(&machine, &paths)?;
        listening(&mut containerd, Path::new(SOCKET), &log_of(&machine, "containerd")).await?;
        let cri = Cri::connect(Path::new(SOCKET)).await?;
        let lab = Self { machine, paths, cri, containerd, daemons, pods: AtomicU32::new(0) };
        lab.ready().await?;
        Ok(lab)
    }

    /// CRI answers a little later than containerd listens.
    async fn ready(&self) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            let why = match self.cri.complaints().await {
                Ok(list) if list.is_empty() => return Ok(()),
                Ok(list) => list.join("; "),
                Err(status) => status.message().to_owned(),
            };
            if Instant::now() >= end {
                bail!("containerd's CRI is not ready: {why}\n{}", self.log("containerd"));
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Makes the test images and imports them.
    ///
    /// # Errors
    /// When containerd refuses one.
    pub async fn import_images(&self) -> Result<()> {
        for (number, image) in image::all(&self.paths)?.iter().enumerate() {
            let file = self.machine.root.join("images").join(format!("{number}.tar"));
            image.write(&file)?;
            let mut ctr = self.ctr();
            ctr.args(["images", "import", "--local", "--all-platforms", "--no-unpack"]).arg(&file);
            run(&mut ctr).await.with_context(|| format!("importing {}", image.name()))?;
            fs::remove_file(&file)?;
        }
        Ok(())
    }

    /// Pulls an image through the host's own network; `ctr` does the talking, so that containerd needs none.
    ///
    /// # Errors
    /// When the registry cannot be reached or has no such image.
    pub async fn pull(&self, name: &str) -> Result<()> {
        let mut ctr = Command::new("nsenter");
        ctr.arg(format!("--net={}", self.machine.host_network().display())).arg("--");
        ctr.arg(self.paths.tool("ctr")).args(["-n", NAMESPACE, "images", "pull", "--local", name]);
        run(&mut ctr).await.map(drop).with_context(|| format!("pulling {name}"))
    }

    /// `ctr` in CRI's namespace.
    #[must_use]
    pub fn ctr(&self) -> Command {
        let mut ctr = Command::new(self.paths.tool("ctr"));
        ctr.args(["-n", NAMESPACE]).kill_on_drop(true);
        ctr
    }

    /// The end of a program's log, for an error text.
    #[must_use]
    pub fn log(&self, program: &str) -> String {
        tail(&log_of(&self.machine, program))
    }

    /// Folder of the programs' logs.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.machine.root.join("log")
    }

    /// What a kubelet would ask for: a pod with a name, a log folder and a cgroup of its own.
    ///
    /// # Errors
    /// When its folders cannot be made.
    pub fn pod_config(&self, name: &str) -> Result<PodSandboxConfig> {
        let number = self.pods.fetch_add(1, Ordering::Relaxed);
        let name = format!("{name}-{number}");
        let logs = self.machine.root.join("pods").join(&name);
        fs::create_dir_all(&logs)?;
        let cgroup = format!("{}/{name}", self.machine.cgroup());
        make_cgroup(&cgroup)?;
        Ok(PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.clone(),
                uid: format!("uid-{number}"),
                namespace: "lab".into(),
                attempt: 0,
            }),
            hostname: name,
            log_directory: logs.to_string_lossy().into_owned(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("/{cgroup}"),
                security_context: Some(LinuxSandboxSecurityContext { namespace_options: Some(own_pids()) }),
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    /// Runs a pod.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn pod(&self, name: &str, handler: &str) -> Result<Pod<'_>> {
        let config = self.pod_config(name)?;
        let id = self.cri.run_pod(&config, handler).await.map_err(|status| {
            anyhow!("running a pod with {handler}: {}\n{}", status.message(), self.log(handler))
        })?;
        Ok(Pod { lab: self, id, config })
    }

    /// Removes all pods, ends containerd and the daemons, and says what went wrong with it.
    pub async fn stop(mut self) -> Vec<String> {
        let mut wrong = Vec::new();
        match self.cri.pods().await {
            Ok(pods) => {
                for pod in pods {
                    wrong.extend(
                        self.cri.stop_pod(&pod.id).await.err().map(|e| said("stopping", &pod.id, &e)),
                    );
                    wrong.extend(
                        self.cri.remove_pod(&pod.id).await.err().map(|e| said("removing", &pod.id, &e)),
                    );
                }
            }
            Err(e) => wrong.push(said("listing", "pods", &e)),
        }
        wrong.extend(end("containerd", &mut self.containerd).await.err().map(|e| e.to_string()));
        for daemon in &mut self.daemons {
            wrong.extend(end(daemon.handler, &mut daemon.child).await.err().map(|e| e.to_string()));
            // Lock files stay by design, and only empty folders go: what a daemon forgot must be seen.
            let socket = socket_of(daemon.handler);
            for file in [socket.with_extension("sock.lock"), socket, folder_of(daemon.handler).join(".lock")]
            {
                let _ = fs::remove_file(file);
            }
            let _ = fs::remove_dir(folder_of(daemon.handler));
        }
        let _ = fs::remove_dir("/run/kuasar");
        // CNI never removes the bridge that it made.
        let _ = run(Command::new("ip").args(["link", "delete", BRIDGE])).await;
        for path in
            leaks::cgroups(&self.machine.cgroup()).iter().filter(|path| is_pod_cgroup(path, &self.machine))
        {
            // Fails while a cgroup of ours is still below or a process in it, and is then named as left behind.
            let _ = fs::remove_dir(path);
        }
        for hierarchy in leaks::hierarchies() {
            let _ = fs::remove_dir(hierarchy.join(self.machine.cgroup()));
        }
        if let Some(folder) = std::env::var_os("KUASAR_LOGS").map(PathBuf::from) {
            wrong.extend(keep_logs(&self.logs(), &folder).err().map(|e| format!("keeping the logs: {e:#}")));
        }
        wrong
    }
}

fn said(doing: &str, what: &str, status: &tonic::Status) -> String {
    format!("{doing} {what}: {}", status.message())
}

/// The folders that [`Lab::pod_config`] made, and no deeper.
fn is_pod_cgroup(path: &Path, machine: &Machine) -> bool {
    path.parent().and_then(Path::file_name).is_some_and(|name| *name == *machine.cgroup())
}

fn keep_logs(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

impl Pod<'_> {
    /// Creates and starts a container that runs `command` of `image`.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn container(&self, name: &str, image: &str, command: &[&str]) -> Result<String> {
        let id = self.create(container(name, image, command)).await?;
        self.lab.cri.start(&id).await.map_err(|e| anyhow!("starting {name}: {}", e.message()))?;
        Ok(id)
    }

    /// Creates a container.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn create(&self, config: ContainerConfig) -> Result<String> {
        let created = self.lab.cri.create(&self.id, &self.config, config).await;
        created.map_err(|e| anyhow!("creating a container: {}", e.message()))
    }

    /// Everything a container wrote, by stream, from its log file.
    ///
    /// # Errors
    /// When the log is missing or a line of it is torn.
    pub fn output(&self, name: &str) -> Result<(Vec<u8>, Vec<u8>)> {
        let path = Path::new(&self.config.log_directory).join(format!("{name}.log"));
        let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        parse_log(&text).with_context(|| format!("parsing {}", path.display()))
    }

    /// Stops and removes the pod.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn remove(self) -> Result<()> {
        self.lab.cri.stop_pod(&self.id).await.map_err(|e| anyhow!("stopping the pod: {}", e.message()))?;
        self.lab.cri.remove_pod(&self.id).await.map_err(|e| anyhow!("removing the pod: {}", e.message()))
    }
}

/// A container that runs `command` of `image`.
#[must_use]
pub fn container(name: &str, image: &str, command: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(ImageSpec { image: image.to_owned() }),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext { namespace_options: Some(own_pids()) }),
        }),
        ..Default::default()
    }
}

/// What the kubelet asks for unless a pod shares its processes; the protocol's zero means the opposite.
fn own_pids() -> NamespaceOption {
    NamespaceOption { pid: NamespaceMode::Container.into(), ..Default::default() }
}

/// CRI's log lines: time, stream, `F` or `P` (the line goes on), text.
fn parse_log(text: &[u8]) -> Result<(Vec<u8>, Vec<u8>)> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        let Some(line) = line.strip_suffix(b"\n") else { bail!("the last line has no end") };
        let mut words = line.splitn(4, |&byte| byte == b' ');
        let (_, stream, tag, data) = (words.next(), words.next(), words.next(), words.next());
        let sink = match stream {
            Some(b"stdout") => &mut stdout,
            Some(b"stderr") => &mut stderr,
            _ => bail!("a line of no stream: {}", String::from_utf8_lossy(line)),
        };
        sink.extend_from_slice(data.unwrap_or_default());
        match tag {
            Some(b"F") => sink.push(b'\n'),
            Some(b"P") => {}
            _ => bail!("a line that is neither whole nor part: {}", String::from_utf8_lossy(line)),
        }
    }
    Ok((stdout, stderr))
}

fn log_of(machine: &Machine, program: &str) -> PathBuf {
    machine.root.join("log").join(format!("{program}.log"))
}

fn tail(path: &Path) -> String {
    let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    let last = lines.get(lines.len().saturating_sub(15)..).unwrap_or_default();
    format!("the end of {}:\n{}", path.display(), last.join("\n"))
}

/// Starts a program of the lab with its output in its log. It dies with this process.
fn spawn(machine: &Machine, name: &str, command: &mut Command) -> Result<Child> {
    let path = log_of(machine, name);
    let log = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .env("TMPDIR", machine.root.join("tmp"))
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("starting {name}"))
}

fn start_daemon(
    machine: &Machine,
    paths: &Paths,
    handler: &'static str,
    keys: &[(&str, &str)],
) -> Result<Daemon> {
    let config = machine.root.join(format!("{handler}.toml"));
    fs::write(&config, toml::to_string(&daemon_config(paths, keys)?)?)?;
    let mut command = Command::new(&paths.sandboxer);
    command.arg("--config").arg(&config);
    command.arg("--listen").arg(socket_of(handler)).arg("--dir").arg(folder_of(handler));
    let child = spawn(machine, handler, &mut command)?;
    Ok(Daemon { handler, child })
}

fn start_containerd(machine: &Machine, paths: &Paths) -> Result<Child> {
    fs::write(machine.root.join("cni/10-lab.conflist"), cni_config(machine))?;
    let config = machine.root.join("containerd.toml");
    fs::write(&config, containerd_config(machine, paths))?;
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{}:{}:{path}", paths.relay_dir.display(), paths.tools.display());
    let mut command = Command::new(paths.tool("containerd"));
    command.arg("--config").arg(&config).env("PATH", path);
    spawn(machine, "containerd", &mut command)
}

fn cni_config(machine: &Machine) -> String {
    serde_json::json!({
        "cniVersion": "1.0.0",
        "name": "lab",
        "plugins": [{
            "type": "bridge", "bridge": BRIDGE, "isGateway": true, "ipMasq": false,
            "ipam": {
                "type": "host-local",
                "dataDir": machine.root.join("cni/leases"),
                "ranges": [[{"subnet": "10.88.77.0/24"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }],
    })
    .to_string()
}

/// Stock settings, but for places, and without what needs a network or a device of the host.
fn containerd_config(machine: &Machine, paths: &Paths) -> String {
    let root = machine.root.display();
    let mut text = format!(
        r#"version = 3
root = "{root}/containerd"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.blockfile",
]
[grpc]
  address = "{SOCKET}"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{}"
[plugins.'io.containerd.cri.v1.runtime']
  # A machine that is itself a container may not lower an OOM score.
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["{}"]
  conf_dir = "{root}/cni"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
"#,
        image::PAUSE,
        paths.tool("cni").display(),
    );
    for (handler, _) in VARIANTS {
        text.push_str(&format!(
            r#"[proxy_plugins.{handler}]
  type = "sandbox"
  address = "{}"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{handler}]
  runtime_type = "io.containerd.kuasar-vmm.v1"
  sandboxer = "{handler}"
  io_type = "fifo"
  privileged_without_host_devices = true
"#,
            socket_of(handler).display()
        ));
    }
    text
}

/// Waits until a program listens; fails early when it ends instead.
///
/// # Errors
/// With the end of its log.
pub async fn listening(child: &mut Child, socket: &Path, log: &Path) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        if tokio::net::UnixStream::connect(socket).await.is_ok() {
            return Ok(());
        }
        if let Some(status) = child.try_wait()? {
            bail!("it ended with {status} before it listened at {}; {}", socket.display(), tail(log));
        }
        if Instant::now() >= end {
            bail!("nothing listens at {} after {PATIENCE:?}; {}", socket.display(), tail(log));
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Asks a program to end, and waits for it.
///
/// # Errors
/// When it had to be killed.
pub async fn end(name: &str, child: &mut Child) -> Result<()> {
    let Some(id) = child.id() else { return Ok(()) };
    let _ = kill(Pid::from_raw(i32::try_from(id)?), Signal::SIGTERM);
    if timeout(PATIENCE, child.wait()).await.is_ok() {
        return Ok(());
    }
    child.kill().await.with_context(|| format!("killing {name}"))?;
    bail!("{name} did not end within {PATIENCE:?} of SIGTERM")
}

/// Runs a command to its end and returns what it wrote.
///
/// # Errors
/// When it fails, with what it wrote to standard error.
pub async fn run(command: &mut Command) -> Result<Vec<u8>> {
    let output =
        command.stdin(Stdio::null()).kill_on_drop(true).output().await.context("running a command")?;
    if !output.status.success() {
        let words = format!("{:?}", command.as_std());
        bail!("{words} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

/// A pod's cgroup in every hierarchy, as the kubelet makes it.
fn make_cgroup(name: &str) -> Result<()> {
    for hierarchy in leaks::hierarchies() {
        let mut path = hierarchy.clone();
        for part in Path::new(name) {
            let parent = path.clone();
            path.push(part);
            fs::create_dir_all(&path).with_context(|| format!("creating the cgroup {}", path.display()))?;
            // cgroup v1 only: an empty set takes no process.
            for set in ["cpuset.cpus", "cpuset.mems"] {
                if let (Ok(value), true) = (fs::read(parent.join(set)), hierarchy.ends_with("cpuset")) {
                    fs::write(path.join(set), value)?;
                }
            }
        }
    }
    Ok(())
}

/// The environment of a shell in the lab, for looking around.
#[must_use]
pub fn shell_environment(lab: &Lab) -> BTreeMap<&'static str, String> {
    let path = std::env::var("PATH").unwrap_or_default();
    BTreeMap::from([
        ("PATH", format!("{}:{}:{path}", lab.paths.relay_dir.display(), lab.paths.tools.display())),
        ("CONTAINERD_ADDRESS", SOCKET.into()),
        ("CONTAINERD_NAMESPACE", NAMESPACE.into()),
        ("CONTAINER_RUNTIME_ENDPOINT", format!("unix://{SOCKET}")),
        ("PS1", "lab# ".into()),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_put_together_by_stream() {
        let log = b"t stdout F one\nt stderr F two\nt stdout P thr\nt stdout F ee\nt stdout F \n";
        let (stdout, stderr) = parse_log(log).unwrap();
        assert_eq!(stdout, b"one\nthree\n\n");
        assert_eq!(stderr, b"two\n");
    }

    #[test]
    fn a_torn_log_is_seen() {
        assert!(parse_log(b"t stdout F one\nt stdout F tw").is_err());
        assert!(parse_log(b"t stdout X one\n").is_err());
        assert!(parse_log(b"t nowhere F one\n").is_err());
    }
}
