//! A node: the lab's containerd and daemon, and a real kubelet without an API server above them.
//!
//! Such a kubelet runs the pods whose manifests lie in a folder. It makes their cgroups, sends every field
//! that it sends under an API server, probes, restarts, and tells by HTTP on the loopback interface what
//! became of them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use kuasar_e2e::{
    lab::{Containerd, Lab, QEMU, end, run},
    leaks,
    machine::Machine,
    paths::Paths,
    suite::{Shared, patient},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::{Child, Command},
    sync::Mutex,
    time::{Instant, sleep},
};

/// kubelet's port for who may only read.
const PORT: u16 = 10255;
/// A link with a default route: kubelet wants to know the node's address.
const LINK: &str = "klabnode";
/// Time for a pod to become what it should, with a guest emulated in an emulated machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// The node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) lab: Lab,
    root: PathBuf,
    kubelet: Mutex<Child>,
}

/// Reason why there can be no node here, if there cannot.
pub(crate) fn missing() -> Option<String> {
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Some("no cgroup v2 alone: tests/lab/check kubelet runs it in a machine that has it".into());
    }
    let program = Paths::find().ok()?.kubelet();
    (!program.exists()).then(|| format!("{} is not there: run tests/kubelet/build", program.display()))
}

impl Node {
    pub(crate) async fn start(machine: Machine) -> Result<Self> {
        let paths = Paths::find()?;
        let settings = Containerd { default_handler: Some(QEMU), ..Containerd::given() };
        let lab = Lab::start_with(machine, paths, &[QEMU], &settings).await?;
        lab.import_images().await?;
        let root = lab.machine.root.join("kubelet");
        fs::create_dir_all(root.join("manifests"))?;
        for args in [
            vec!["link", "add", LINK, "type", "bridge"],
            vec!["address", "add", "10.88.76.1/24", "dev", LINK],
            vec!["link", "set", LINK, "up"],
            vec!["route", "add", "default", "via", "10.88.76.2"],
        ] {
            run(Command::new("ip").args(args)).await?;
        }
        fs::write(root.join("config.json"), configuration(&lab, &root).to_string())?;
        let kubelet = Mutex::new(spawn(&lab, &root)?);
        let node = Self { lab, root, kubelet };
        node.answers().await?;
        Ok(node)
    }

    /// Ends kubelet as an upgrade of the node does, and starts it again.
    pub(crate) async fn restart_kubelet(&self) -> Result<()> {
        let mut kubelet = self.kubelet.lock().await;
        end("kubelet", &mut kubelet).await?;
        *kubelet = spawn(&self.lab, &self.root)?;
        drop(kubelet);
        self.answers().await
    }

    /// Gives kubelet a pod to run.
    pub(crate) fn put(&self, name: &str, spec: &Value) -> Result<()> {
        let manifest = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "lab"},
            "spec": spec,
        });
        // kubelet reads the folder at any moment: a file appears whole.
        let path = self.manifest(name);
        let part = self.root.join(format!("{name}.part"));
        fs::write(&part, manifest.to_string())?;
        fs::rename(&part, &path).with_context(|| format!("writing {}", path.display()))
    }

    /// Takes a pod away, and waits until kubelet has nothing of it any more.
    pub(crate) async fn take(&self, name: &str) -> Result<()> {
        fs::remove_file(self.manifest(name))?;
        let end = Instant::now() + patient(PATIENCE);
        loop {
            let (pods, left) = (self.lab.cri.pods().await?, self.cgroups_of_pods());
            if pods.is_empty() && left.is_empty() {
                return Ok(());
            }
            ensure!(
                Instant::now() < end,
                "still there: {} pods, {left:?}\n{}",
                pods.len(),
                self.lab.log("kubelet")
            );
            sleep(Duration::from_millis(300)).await;
        }
    }

    /// The pod's status, once it `holds`.
    pub(crate) async fn until(
        &self,
        name: &str,
        goal: &str,
        holds: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let end = Instant::now() + patient(PATIENCE);
        loop {
            let status = self.status(name).await?;
            if holds(&status) {
                return Ok(status);
            }
            if Instant::now() >= end {
                bail!(
                    "{name} is not {goal}: {status:#}\n{}\n{}",
                    self.lab.log("kubelet"),
                    self.lab.log(QEMU)
                );
            }
            sleep(Duration::from_millis(300)).await;
        }
    }

    /// Waits until all containers of a pod are ready.
    pub(crate) async fn ready(&self, name: &str) -> Result<Value> {
        self.until(name, "ready", |status| {
            let all = status["containerStatuses"].as_array();
            all.is_some_and(|all| !all.is_empty() && all.iter().all(|one| one["ready"] == true))
        })
        .await
    }

    /// Id of a container in containerd.
    pub(crate) fn id_of(status: &Value, container: &str) -> Result<String> {
        let one = container_of(status, container)?;
        let id = one["containerID"].as_str().unwrap_or_default();
        Ok(id.strip_prefix("containerd://").context("the container has no id")?.to_owned())
    }

    /// Runs a command in a container and returns what it wrote; one that fails is an error.
    pub(crate) async fn exec(&self, id: &str, script: &str) -> Result<String> {
        let output = self.lab.cri.exec(id, &["/bin/sh", "-c", script]).await?;
        ensure!(output.code == 0, "`{script}` ended with {}: {}", output.code, output.stderr);
        Ok(output.stdout)
    }

    /// kubelet's cgroup of a pod.
    pub(crate) fn cgroups_of_pods(&self) -> Vec<PathBuf> {
        let all = leaks::cgroups(&self.lab.machine.cgroup());
        let is_pod =
            |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("pod"));
        all.into_iter().filter(is_pod).collect()
    }

    async fn status(&self, name: &str) -> Result<Value> {
        let list: Value =
            serde_json::from_str(&get("/pods").await?).context("parsing kubelet's list of pods")?;
        let pods = list["items"].as_array().cloned().unwrap_or_default();
        // A static pod has the node's name behind its own.
        let one = pods.into_iter().find(|pod| pod["metadata"]["name"] == format!("{name}-lab"));
        Ok(one.map(|pod| pod["status"].clone()).unwrap_or_default())
    }

    async fn answers(&self) -> Result<()> {
        let end = Instant::now() + patient(PATIENCE);
        while get("/healthz").await.is_err() {
            if let Some(status) = self.kubelet.lock().await.try_wait()? {
                bail!("kubelet ended with {status}: {}", self.lab.log("kubelet"));
            }
            ensure!(Instant::now() < end, "kubelet does not answer: {}", self.lab.log("kubelet"));
            sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    }

    fn manifest(&self, name: &str) -> PathBuf {
        self.root.join("manifests").join(format!("{name}.json"))
    }
}

/// Status of one container of a pod.
pub(crate) fn container_of<'a>(status: &'a Value, name: &str) -> Result<&'a Value> {
    let all = status["containerStatuses"].as_array().into_iter().flatten();
    all.into_iter()
        .find(|one| one["name"] == name)
        .with_context(|| format!("no container {name} in {status:#}"))
}

impl Shared for Node {
    async fn end(self) -> Vec<String> {
        let mut wrong = Vec::new();
        wrong.extend(end("kubelet", &mut *self.kubelet.lock().await).await.err().map(|e| format!("{e:#}")));
        let _ = run(Command::new("ip").args(["link", "delete", LINK])).await;
        let machine = self.lab.machine.clone();
        wrong.extend(self.lab.stop().await);
        // kubelet keeps its classes of pods; a pod's cgroup that is still there cannot be removed and is
        // named as left behind.
        leaks::remove_cgroups(&machine.cgroup());
        wrong
    }

    fn hints(&self) -> Vec<String> {
        self.lab.hints()
    }
}

/// kubelet in a cgroup of its own: from the files there it concludes what the node's kernel can limit.
fn spawn(lab: &Lab, root: &Path) -> Result<Child> {
    let top = Path::new("/sys/fs/cgroup");
    let cgroup = top.join(lab.machine.cgroup());
    fs::create_dir_all(&cgroup)?;
    for folder in [top, &cgroup] {
        // kubelet refuses a root that lacks one of the node's controllers.
        for controller in fs::read_to_string(folder.join("cgroup.controllers"))?.split_whitespace() {
            fs::write(folder.join("cgroup.subtree_control"), format!("+{controller}"))
                .with_context(|| format!("delegating {controller} below {}", folder.display()))?;
        }
    }
    let own = cgroup.join("kubelet");
    fs::create_dir_all(&own)?;
    let log = fs::File::options().append(true).create(true).open(lab.logs().join("kubelet.log"))?;
    Command::new("/bin/sh")
        .args(["-c", "echo $$ >\"$1\" && shift && exec \"$@\"", "sh"])
        .arg(own.join("cgroup.procs"))
        .arg(lab.paths.kubelet())
        .arg("--config")
        .arg(root.join("config.json"))
        .arg("--root-dir")
        .arg(root.join("state"))
        .args(["--hostname-override", "lab", "--v", "2"])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .context("starting kubelet")
}

fn configuration(lab: &Lab, root: &Path) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
        "authorization": {"mode": "AlwaysAllow"},
        "address": "127.0.0.1",
        "readOnlyPort": PORT,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "staticPodPath": root.join("manifests"),
        "fileCheckFrequency": "1s",
        "podLogsDir": root.join("logs"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}", lab.machine.cgroup()),
        "failSwapOn": false,
        "oomScoreAdj": 0,
        "imageGCHighThresholdPercent": 100,
        // Those who test must not be evicted from a disk that is nearly full.
        "evictionHard": {"memory.available": "1Mi", "nodefs.available": "0%", "imagefs.available": "0%"},
        "featureGates": {"KubeletInUserNamespace": true},
        "runtimeRequestTimeout": "4m",
    })
}

/// Asks kubelet. Enough of HTTP for a server that closes the connection.
async fn get(path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", PORT)).await.context("connecting to kubelet")?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: lab\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").context("kubelet answered nonsense")?;
    ensure!(head.contains(" 200 "), "kubelet answered {head}");
    Ok(body.to_owned())
}
