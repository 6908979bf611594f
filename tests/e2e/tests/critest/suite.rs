//! The suite as a program beside containerd, and the registry that it pulls from.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use kuasar_e2e::{
    conformance::{Outcome, State},
    lab::{Lab, QEMU, QEMU_STREAM, SOCKET, run as run_command},
    machine::Machine,
    paths::Paths,
    suite,
};
use nix::mount::{MntFlags, umount2};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    time::timeout,
};

/// Address of the registry, inside the private machine.
const REGISTRY: &str = "127.0.0.1:5000";
const NRI: &str = "/run/nri";
/// A hang of the suite is longer.
const DEADLINE: Duration = Duration::from_secs(45 * 60);
/// Specs at once. An emulated VM keeps one core busy while it boots; more than cores make every spec slow.
const PROCESSES: usize = 2;

/// The programs made of `tests/critest`, and the containerd to judge with.
#[derive(Debug)]
pub(crate) struct Programs {
    folder: PathBuf,
    busybox: PathBuf,
    nginx: PathBuf,
    /// `KUASAR_CONTAINERD`, when given.
    pub(crate) containerd: Option<PathBuf>,
    version: String,
}

impl Programs {
    pub(crate) fn find(paths: &Paths) -> Result<Self> {
        let tools = paths.tools.parent().context("the folder of tools has no parent")?;
        let (folder, nginx) = (tools.join("critest"), tools.join("nginx"));
        let busybox = tools.join("busybox-shared");
        for file in [
            folder.join("critest.test"),
            folder.join("ginkgo"),
            folder.join("registry"),
            folder.join("nnp"),
            nginx.join("usr/sbin/nginx"),
        ] {
            if !file.is_file() {
                bail!("{} is not there: run tests/lab/setup --check", file.display());
            }
        }
        let containerd = std::env::var_os("KUASAR_CONTAINERD").map(PathBuf::from);
        let program = containerd.clone().unwrap_or_else(|| paths.tool("containerd"));
        let output = std::process::Command::new(&program).arg("--version").output();
        let output = output.with_context(|| format!("running {}", program.display()))?;
        let version = version(&String::from_utf8_lossy(&output.stdout))?;
        Ok(Self { folder, busybox, nginx, containerd, version })
    }

    /// Head of the table's column for a handler with this containerd. How bytes come and go makes no
    /// difference.
    pub(crate) fn column(&self, handler: &str) -> String {
        let handler = if handler == QEMU_STREAM { QEMU } else { handler };
        format!("{handler}, containerd {}", self.version)
    }
}

/// `2.1` of `containerd github.com/containerd/containerd/v2 v2.1.9 …` or of a packager's `2.1.9~ds1-1`.
fn version(text: &str) -> Result<String> {
    let word = text.split_whitespace().nth(2).context("containerd says no version")?;
    let mut parts = word.trim_start_matches('v').split('.');
    match (parts.next(), parts.next()) {
        (Some(major), Some(minor)) if minor.bytes().all(|b| b.is_ascii_digit()) => {
            Ok(format!("{major}.{minor}"))
        }
        _ => bail!("{word} is no version of containerd"),
    }
}

/// The registry; it ends with its standard input.
#[derive(Debug)]
pub(crate) struct Registry {
    child: Child,
    digest: String,
}

impl Registry {
    pub(crate) async fn start(programs: &Programs, machine: &Machine) -> Result<Self> {
        fs::create_dir_all(machine.root.join("log"))?;
        let log = File::create(machine.root.join("log/registry.log"))?;
        let mut child = Command::new(programs.folder.join("registry"))
            .args(["--listen", REGISTRY, "--busybox"])
            .arg(&programs.busybox)
            .arg("--nginx")
            .arg(&programs.nginx)
            .arg("--nnp")
            .arg(programs.folder.join("nnp"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .context("starting the registry")?;
        let mut lines = BufReader::new(child.stdout.take().context("no output of the registry")?).lines();
        let line = timeout(Duration::from_secs(60), lines.next_line()).await;
        let Some(digest) = line.context("the registry does not come up")?? else {
            let log = fs::read_to_string(machine.root.join("log/registry.log")).unwrap_or_default();
            bail!("the registry ended: {log}");
        };
        Ok(Self { child, digest })
    }

    pub(crate) async fn end(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        let status = timeout(Duration::from_secs(10), self.child.wait()).await;
        let status = status.context("the registry does not end")??;
        if status.success() { Ok(()) } else { Err(anyhow!("the registry ended with {status}")) }
    }
}

/// Sends every pull to the registry, whichever was asked for.
pub(crate) fn write_registries(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder.join("_default"))?;
    let text = format!("[host.\"http://{REGISTRY}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
    fs::write(folder.join("_default/hosts.toml"), text).context("writing hosts.toml")
}

/// The handler to judge: besides the usual ones, that with streaming IO.
pub(crate) fn handler() -> &'static str {
    if std::env::var("KUASAR_HANDLER").is_ok_and(|name| name == QEMU_STREAM) {
        QEMU_STREAM
    } else {
        suite::handler()
    }
}

/// A regular expression of the specs to run, for trying one.
pub(crate) fn focus() -> Option<String> {
    std::env::var("KUASAR_FOCUS").ok()
}

/// Specs at once, but for those that the suite itself marks as serial.
fn processes() -> Result<usize> {
    let Some(given) = std::env::var_os("KUASAR_PROCESSES") else { return Ok(PROCESSES) };
    let number = given.to_str().and_then(|text| text.parse().ok()).filter(|&number| number > 0);
    number.with_context(|| format!("KUASAR_PROCESSES is {}: give a number from 1 on", given.display()))
}

/// Runs the suite, or of it what is in focus. `filter` is a part of a spec's name.
pub(crate) async fn run(
    lab: &Lab,
    programs: &Programs,
    registry: &Registry,
    filter: Option<&str>,
) -> Result<Vec<Outcome>> {
    let focus = focus().or(filter.map(escape));
    run_in(lab, programs, registry, focus.as_deref(), processes()?, "critest").await
}

/// Runs one spec, alone. Nothing, if the suite does not find it any more.
pub(crate) async fn run_alone(
    lab: &Lab,
    programs: &Programs,
    registry: &Registry,
    spec: &str,
) -> Result<Option<Outcome>> {
    let focus = format!(" {}$", escape(spec));
    let outcomes = run_in(lab, programs, registry, Some(&focus), 1, "critest-alone").await?;
    Ok(outcomes.into_iter().find(|outcome| outcome.spec == spec))
}

async fn run_in(
    lab: &Lab,
    programs: &Programs,
    registry: &Registry,
    focus: Option<&str>,
    processes: usize,
    name: &str,
) -> Result<Vec<Outcome>> {
    let results = lab.machine.root.join("results");
    let log = lab.logs().join(format!("{name}.log"));
    let out = File::options().create(true).append(true).open(&log);
    let out = out.with_context(|| format!("opening {}", log.display()))?;
    let _ = fs::remove_file(&results);
    let mut critest = Command::new(programs.folder.join("ginkgo"));
    critest
        .arg(format!("--procs={processes}"))
        // Nothing of the suite's writes past ginkgo.
        .args(["--no-color", "-v", "--seed=1", "--timeout=44m", "--output-interceptor-mode=none"])
        .args(focus.map(|focus| format!("--focus={focus}")))
        .arg(programs.folder.join("critest.test"))
        .arg("--")
        .arg(format!("--runtime-endpoint=unix://{SOCKET}"))
        .arg(format!("--runtime-handler={}", handler()))
        .arg(format!("--results={}", results.display()))
        .arg(format!("--digest-image={}", registry.digest))
        .arg(format!("--nri-socket={NRI}/nri.sock"))
        .env("TMPDIR", lab.machine.root.join("tmp"))
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        .kill_on_drop(true);
    let mut child = critest.spawn().context("starting the suite")?;
    let status = timeout(DEADLINE, child.wait()).await.context("the suite does not end")??;
    let text = fs::read_to_string(&results)
        .with_context(|| format!("the suite ended with {status} and left no results; {}", lab.log(name)))?;
    text.lines().map(outcome).collect()
}

fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        if !c.is_alphanumeric() && c != ' ' {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

fn outcome(line: &str) -> Result<Outcome> {
    let value: Value = serde_json::from_str(line).context("reading a result")?;
    let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let spec = text("spec");
    let state = match text("state").as_str() {
        "passed" => State::Passes,
        "skipped" => State::Skipped,
        _ => State::Fails,
    };
    let seconds = value.get("seconds").and_then(Value::as_f64).unwrap_or_default();
    let spec = spec.trim_start_matches("[k8s.io] ").to_owned();
    Ok(Outcome { spec, state, message: text("message"), seconds })
}

/// Pods of runc that containerd itself forgot, where one of NRI's specs lets a plugin fail. None of ours may
/// be left so: those are counted by the machine.
pub(crate) async fn forget_containers(lab: &Lab) -> Result<()> {
    for (kind, how) in [("tasks", "--force"), ("containers", "--keep-snapshot=false")] {
        let listed = run_command(lab.ctr().args([kind, "ls", "-q"])).await?;
        for id in String::from_utf8_lossy(&listed).lines() {
            run_command(lab.ctr().args([kind, "rm", how, id])).await?;
        }
    }
    Ok(())
}

/// Removes the mounts and files that containerd and the suite leave outside of the folders that are removed
/// as a whole.
pub(crate) fn clean_up(tmp: &Path) {
    // A spec of mount propagation that fails early does not unmount what it has mounted.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for point in mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)) {
        if Path::new(point).starts_with(tmp) {
            let _ = umount2(point, MntFlags::MNT_DETACH);
        }
    }
    for path in [format!("{NRI}/nri.sock"), NRI.to_owned()] {
        let _ = fs::remove_file(&path);
        let _ = fs::remove_dir(&path);
    }
    // runc's pods without a parent go here. Only empty ones: another run may be using it.
    for hierarchy in kuasar_e2e::leaks::hierarchies() {
        let _ = fs::remove_dir(hierarchy.join("k8s.io"));
    }
}
