//! A private containerd with our daemons beside it, in the machine that [`crate::machine`] made.

mod config;
mod networks;
mod pod;
mod program;
pub mod thin_pool;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use tokio::{
    process::{Child, Command},
    sync::Mutex,
    time::{Instant, sleep},
};

use config::{BRIDGE, VARIANTS, cni_config, containerd_config, scratch_file, write_base_specs};
pub use config::{
    Containerd, NAMESPACE, QEMU, QEMU_9P, QEMU_BLOCKFILE, QEMU_DEVMAPPER, QEMU_EROFS, QEMU_HUGE_PAGES,
    QEMU_INITRD, QEMU_NATIVE, QEMU_PROFILE, QEMU_STREAM, QEMU_VERITY, RUNC, SOCKET, daemon_config, folder_of,
    handlers, socket_of, table, vsock,
};
pub use networks::{
    MACVLAN_MASTER, NET_DUAL, NET_FILTERED, NET_LEGACY, NET_MACVLAN, NET_PTP, NET_RARE, NET_RULES, NET_TAP,
    NET_TUN, NET_TUNED, NET_TWO, NET_UNKNOWN, NET_V6,
};
pub use pod::{Pod, container, own_pids};
use program::{PATIENCE, log_of, spawn, tail};
pub use program::{end, listening, run};
use thin_pool::ThinPool;

use crate::{
    cri::{
        Cri, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption, PodSandboxConfig,
        PodSandboxMetadata, PodSandboxState,
    },
    image, leaks,
    machine::Machine,
    paths::Paths,
    services,
    suite::patient,
};

/// The running lab.
#[derive(Debug)]
pub struct Lab {
    /// The machine it is in.
    pub machine: Machine,
    /// Paths of the programs.
    pub paths: Paths,
    /// The client.
    pub cri: Cri,
    settings: Containerd,
    containerd: Mutex<Child>,
    daemons: Mutex<Vec<Daemon>>,
    pods: AtomicU32,
    pool: Option<ThinPool>,
}

/// One of our daemons.
#[derive(Debug)]
pub struct Daemon {
    handler: &'static str,
    child: Child,
}

impl Lab {
    /// Starts the daemons of `handlers`, then containerd, and imports the test images.
    ///
    /// # Errors
    /// When a program does not come up; the text shows the end of its log.
    pub async fn start(machine: Machine, paths: Paths, handlers: &[&str]) -> Result<Self> {
        Self::start_with(machine, paths, handlers, &Containerd::given()).await
    }

    /// As [`Lab::start`], with a containerd that differs.
    ///
    /// # Errors
    /// As those of [`Lab::start`].
    pub async fn start_with(
        machine: Machine,
        paths: Paths,
        handlers: &[&str],
        settings: &Containerd,
    ) -> Result<Self> {
        make_folders(&machine)?;
        let mut daemons = Vec::new();
        for (handler, keys) in VARIANTS.iter().filter(|(handler, _)| handlers.contains(handler)) {
            daemons.push(start_daemon(&machine, &paths, handler, &daemon_config(&paths, keys)?)?);
        }
        for daemon in &mut daemons {
            let log = log_of(&machine, daemon.handler);
            listening(&mut daemon.child, &socket_of(daemon.handler), &log).await?;
        }
        let pool = if settings.thin_pool { Some(ThinPool::make(&machine).await?) } else { None };
        let mut containerd = start_containerd(&machine, &paths, settings)?;
        listening(&mut containerd, Path::new(SOCKET), &log_of(&machine, "containerd")).await?;
        let cri = Cri::connect(Path::new(SOCKET)).await?;
        let (containerd, daemons) = (Mutex::new(containerd), Mutex::new(daemons));
        let (settings, pods) = (settings.clone(), AtomicU32::new(0));
        let lab = Self { machine, paths, cri, settings, containerd, daemons, pods, pool };
        lab.ready().await?;
        Ok(lab)
    }

    /// CRI answers a little later than containerd listens.
    async fn ready(&self) -> Result<()> {
        let end = Instant::now() + patient(PATIENCE);
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

    /// Starts a daemon that the lab begins without; it ends with the lab.
    ///
    /// # Errors
    /// When it does not come up; the text shows the end of its log.
    pub async fn start_daemon(&self, handler: &'static str, config: &toml::Table) -> Result<()> {
        let mut daemon = start_daemon(&self.machine, &self.paths, handler, config)?;
        listening(&mut daemon.child, &socket_of(handler), &log_of(&self.machine, handler)).await?;
        self.daemons.lock().await.push(daemon);
        Ok(())
    }

    /// Kills a daemon as the kernel does when memory runs out: nothing of it can clean up.
    ///
    /// # Errors
    /// When there is no such daemon.
    pub async fn kill_daemon(&self, handler: &str) -> Result<()> {
        let mut daemons = self.daemons.lock().await;
        let daemon = daemons.iter_mut().find(|daemon| daemon.handler == handler).context("no such daemon")?;
        daemon.child.kill().await.with_context(|| format!("killing the daemon of {handler}"))
    }

    /// Starts a daemon again that was killed, and waits until containerd, which tries at most every 3 s, has
    /// found it: until then every pod's calls fail at once.
    ///
    /// # Errors
    /// When it does not come up, or is not found; the text shows the end of its log.
    pub async fn restart_daemon(&self, handler: &str) -> Result<()> {
        let (handler, keys) = VARIANTS.iter().find(|(name, _)| *name == handler).context("no such daemon")?;
        let mut daemon =
            start_daemon(&self.machine, &self.paths, handler, &daemon_config(&self.paths, keys)?)?;
        // A killed daemon's socket file is still there; what it serves is known by an answer.
        let end = Instant::now() + patient(PATIENCE);
        while !services::reaches(handler).await? {
            let ended = daemon.child.try_wait().context("looking after the daemon")?;
            if ended.is_some() || Instant::now() >= end {
                bail!("the daemon of {handler} does not come back: {}", self.log(handler));
            }
            sleep(Duration::from_millis(50)).await;
        }
        let mut daemons = self.daemons.lock().await;
        daemons.retain(|daemon| daemon.handler != *handler);
        daemons.push(daemon);
        Ok(())
    }

    /// Waits until a pod is ready again, after its daemon came back.
    ///
    /// # Errors
    /// When it has not after some time.
    pub async fn ready_again(&self, pod: &str) -> Result<()> {
        let end = Instant::now() + patient(PATIENCE);
        loop {
            let state = self.cri.pod_status(pod).await.map(|(status, _)| status.state());
            match state {
                Ok(PodSandboxState::SandboxReady) => return Ok(()),
                other if Instant::now() >= end => {
                    bail!("the pod is {other:?} after the daemon came back")
                }
                _ => sleep(Duration::from_millis(200)).await,
            }
        }
    }

    /// Kills containerd as the kernel does when memory runs out.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub async fn kill_containerd(&self) -> Result<()> {
        self.containerd.lock().await.kill().await.context("killing containerd")
    }

    /// Starts containerd again after it was killed, and waits for its CRI.
    ///
    /// # Errors
    /// When it does not come up; the text shows the end of its log.
    pub async fn restart_containerd(&self) -> Result<()> {
        let mut containerd = start_containerd(&self.machine, &self.paths, &self.settings)?;
        listening(&mut containerd, Path::new(SOCKET), &log_of(&self.machine, "containerd")).await?;
        *self.containerd.lock().await = containerd;
        self.ready().await
    }

    /// Process ids of the programs that outlive a pod: containerd and the daemons.
    pub async fn programs(&self) -> Vec<(String, u32)> {
        let mut all: Vec<(String, u32)> = Vec::new();
        all.extend(self.containerd.lock().await.id().map(|id| ("containerd".to_owned(), id)));
        for daemon in self.daemons.lock().await.iter() {
            all.extend(daemon.child.id().map(|id| (daemon.handler.to_owned(), id)));
        }
        all
    }

    /// Makes the test images and imports them.
    ///
    /// # Errors
    /// When containerd refuses one.
    pub async fn import_images(&self) -> Result<()> {
        import_images(&self.machine, &self.paths).await
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
        ctr(&self.paths)
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

    /// Returns the request that a kubelet would send: a pod with a name, a log folder and a cgroup of its
    /// own.
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
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(own_pids()),
                    ..Default::default()
                }),
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
        self.run(self.pod_config(name)?, handler).await
    }

    /// Runs a pod whose containers see each other's processes.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn pod_with_shared_pids(&self, name: &str, handler: &str) -> Result<Pod<'_>> {
        let mut config = self.pod_config(name)?;
        // The protocol's zero is what shares.
        config.linux.get_or_insert_default().security_context = Some(LinuxSandboxSecurityContext {
            namespace_options: Some(NamespaceOption::default()),
            ..Default::default()
        });
        self.run(config, handler).await
    }

    /// Runs a pod of this configuration.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn run(&self, config: PodSandboxConfig, handler: &str) -> Result<Pod<'_>> {
        let id = self.cri.run_pod(&config, handler).await.map_err(|status| {
            anyhow!("running a pod with {handler}: {}\n{}", status.message(), self.log(handler))
        })?;
        Ok(Pod { lab: self, id, config })
    }

    /// Removes a pod, and its cgroup as a kubelet does.
    ///
    /// # Errors
    /// As containerd says, or when something is still in the cgroup.
    pub async fn forget(&self, pod: Pod<'_>) -> Result<()> {
        let cgroup = pod.config.linux.as_ref().map(|linux| linux.cgroup_parent.clone()).unwrap_or_default();
        pod.remove().await?;
        for hierarchy in leaks::hierarchies() {
            let path = hierarchy.join(cgroup.trim_start_matches('/'));
            fs::remove_dir(&path).with_context(|| format!("removing the cgroup {}", path.display()))?;
        }
        Ok(())
    }

    /// Path to which the daemon of a handler writes its trace.
    #[must_use]
    pub fn trace(&self, handler: &str) -> PathBuf {
        trace_of(&self.machine, handler)
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
        wrong.extend(end("containerd", self.containerd.get_mut()).await.err().map(|e| e.to_string()));
        if let Some(pool) = &self.pool {
            wrong.extend(pool.remove().await.err().map(|e| format!("{e:#}")));
        }
        for daemon in self.daemons.get_mut() {
            wrong.extend(end(daemon.handler, &mut daemon.child).await.err().map(|e| e.to_string()));
            // Lock files and the folder's marker stay by design, and only empty folders go: what a daemon
            // forgot must be seen.
            let socket = socket_of(daemon.handler);
            let own = [".lock", ".kuasar"].map(|name| folder_of(daemon.handler).join(name));
            for file in own.into_iter().chain([socket.with_extension("sock.lock"), socket]) {
                let _ = fs::remove_file(file);
            }
            let _ = fs::remove_dir(folder_of(daemon.handler));
        }
        let _ = fs::remove_dir("/run/kuasar");
        // CNI never removes the bridges that it made.
        for link in networks::LINKS.iter().chain([&BRIDGE]) {
            let _ = run(Command::new("ip").args(["link", "delete", link])).await;
        }
        for path in
            leaks::cgroups(&self.machine.cgroup()).iter().filter(|path| is_pod_cgroup(path, &self.machine))
        {
            // Fails while a cgroup of ours is still below or a process in it, and is then named as left
            // behind.
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

fn ctr(paths: &Paths) -> Command {
    let mut ctr = Command::new(paths.tool("ctr"));
    ctr.args(["-n", NAMESPACE]).kill_on_drop(true);
    ctr
}

/// Makes the test images and imports them into the containerd that is there.
///
/// # Errors
/// When containerd refuses one.
pub async fn import_images(machine: &Machine, paths: &Paths) -> Result<()> {
    for (number, image) in image::all(paths)?.iter().enumerate() {
        let file = machine.root.join("images").join(format!("{number}.tar"));
        image.write(&file)?;
        let mut ctr = ctr(paths);
        ctr.args(["images", "import", "--local", "--all-platforms", "--no-unpack"]).arg(&file);
        run(&mut ctr).await.with_context(|| format!("importing {}", image.name()))?;
        fs::remove_file(&file)?;
    }
    Ok(())
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

fn start_daemon(
    machine: &Machine,
    paths: &Paths,
    handler: &'static str,
    config: &toml::Table,
) -> Result<Daemon> {
    let text = toml::to_string(config)?;
    let config = machine.root.join(format!("{handler}.toml"));
    fs::write(&config, text)?;
    let mut command = Command::new(&paths.sandboxer);
    command.arg("--config").arg(&config);
    command.arg("--listen").arg(socket_of(handler)).arg("--dir").arg(folder_of(handler));
    command.arg("--trace").arg(trace_of(machine, handler));
    let child = spawn(machine, handler, &mut command)?;
    Ok(Daemon { handler, child })
}

fn trace_of(machine: &Machine, handler: &str) -> PathBuf {
    machine.root.join("trace").join(format!("{handler}.json"))
}

/// The folders of a lab in its machine.
///
/// # Errors
/// When one cannot be made.
pub fn make_folders(machine: &Machine) -> Result<()> {
    for folder in ["log", "trace", "containerd", "cni", "pods", "images", "tmp"] {
        fs::create_dir_all(machine.root.join(folder))?;
    }
    fs::create_dir_all("/run/kuasar").context("creating /run/kuasar")
}

/// Writes what containerd reads; returns its configuration.
///
/// # Errors
/// When a file cannot be written.
pub fn write_containerd_config(machine: &Machine, paths: &Paths, settings: &Containerd) -> Result<PathBuf> {
    fs::write(machine.root.join("cni/10-lab.conflist"), cni_config(machine))?;
    networks::write(machine)?;
    let config = machine.root.join("containerd.toml");
    fs::write(&config, containerd_config(machine, paths, settings) + &networks::runtimes(machine))?;
    make_scratch_file(&scratch_file(machine))?;
    write_base_specs(machine, paths)?;
    Ok(config)
}

/// Search path by which containerd finds shims and runc: the relay first.
#[must_use]
pub fn search_path(paths: &Paths) -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{}:{}:{path}", paths.relay_dir.display(), paths.tools.display())
}

fn start_containerd(machine: &Machine, paths: &Paths, settings: &Containerd) -> Result<Child> {
    let config = write_containerd_config(machine, paths, settings)?;
    let program = settings.program.clone().unwrap_or_else(|| paths.tool("containerd"));
    // The shims that were built with another containerd come before those of the unpacked one.
    let path = format!("{}:{}", program.parent().unwrap_or(Path::new("/")).display(), search_path(paths));
    let mut command = Command::new(program);
    command.arg("--config").arg(&config).env("PATH", path).envs([thin_pool::NO_UDEV]);
    spawn(machine, "containerd", &mut command)
}

/// Without `mkfs.ext4` there is none, and containerd leaves the snapshotter out that wants it.
fn make_scratch_file(path: &Path) -> Result<()> {
    const MKFS: &str = "/sbin/mkfs.ext4";
    if !Path::new(MKFS).exists() {
        return Ok(());
    }
    fs::File::create(path)?.set_len(64 << 20)?;
    let made = std::process::Command::new(MKFS).args(["-q", "-F"]).arg(path).status();
    if !made.with_context(|| format!("running {MKFS}"))?.success() {
        bail!("{MKFS} cannot make {}", path.display());
    }
    Ok(())
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
    BTreeMap::from([
        ("PATH", search_path(&lab.paths)),
        ("CONTAINERD_ADDRESS", SOCKET.into()),
        ("CONTAINERD_NAMESPACE", NAMESPACE.into()),
        ("CONTAINER_RUNTIME_ENDPOINT", format!("unix://{SOCKET}")),
        ("PS1", "lab# ".into()),
    ])
}
