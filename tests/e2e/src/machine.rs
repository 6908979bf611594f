//! A machine of one's own for a test run: everything happens in new mount, network and PID namespaces, with a
//! private `/run`, so that a run can neither disturb the host nor leave anything on it, whatever goes wrong,
//! and so that "nothing is left" can be checked exactly instead of by guessing what belongs to whom.
//!
//! Three processes, all the same binary:
//! - *outer*, on the host: makes the temporary root, waits, removes it;
//! - *init*, PID 1 of the new namespace: mounts, reaps, compares before and after;
//! - *main*, which [`enter`] returns to: containerd, the daemons, the tests.

use std::{
    env, fs,
    io::Write,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode, ExitStatus},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::{
        signal::{SigSet, Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::leaks::{self, Snapshot};

/// Exit status of a run whose tests passed but which left something behind.
pub const LEAKED: u8 = 99;

const STAGE: &str = "KUASAR_LAB_STAGE";
const ROOT: &str = "KUASAR_LAB_ROOT";
const OUTER: &str = "KUASAR_LAB_OUTER";

/// The parent of the folder where libcni keeps results, which cannot be told otherwise.
const VAR_LIB: &str = "/var/lib";

/// Names below `/run` of the host that stay visible, where they exist: programs of NixOS, and name
/// resolution.
const KEPT_IN_RUN: [&str; 4] = ["current-system", "booted-system", "wrappers", "systemd/resolve"];

/// Grace for processes that were told to end.
const SETTLE: Duration = Duration::from_secs(3);

/// The private machine, as *main* sees it.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The temporary root: everything that must be on a disk.
    pub root: PathBuf,
}

impl Machine {
    /// The host's network namespace as a file, for what needs the outside (pulling an image).
    #[must_use]
    pub fn host_network(&self) -> PathBuf {
        self.root.join("host-net")
    }

    /// Name of the cgroup, in every hierarchy, below which pods of this run go.
    #[must_use]
    pub fn cgroup(&self) -> String {
        cgroup_name(&self.root)
    }
}

fn cgroup_name(root: &Path) -> String {
    root.file_name().map_or_else(|| "klab".into(), |name| name.to_string_lossy().into_owned())
}

/// Either the machine, for the process that is to do the work in it, or the status with which this process
/// ends.
///
/// Call it first in `main`, before any thread is made.
///
/// # Errors
/// When the namespaces or mounts cannot be made.
pub fn enter() -> Result<Result<Machine, ExitCode>> {
    match env::var(STAGE).ok().as_deref() {
        None => outer().map(Err),
        Some("init") => init().map(Err),
        Some("main") => {
            end_signals().thread_unblock().context("unblocking signals")?;
            Ok(Ok(Machine { root: root_from_env()? }))
        }
        Some(other) => bail!("{STAGE} is {other:?}: it is set by this program only"),
    }
}

/// The life of a program that does its work in such a machine.
pub fn run<W>(work: impl FnOnce(Machine) -> W) -> ExitCode
where
    W: Future<Output = Result<ExitCode>>,
{
    let done = enter().and_then(|entered| match entered {
        Ok(machine) => {
            tokio::runtime::Runtime::new().context("starting the async runtime")?.block_on(work(machine))
        }
        Err(code) => Ok(code),
    });
    done.unwrap_or_else(|error| {
        let _ = writeln!(std::io::stderr(), "\nerror: {error:#}");
        ExitCode::FAILURE
    })
}

fn root_from_env() -> Result<PathBuf> {
    env::var_os(ROOT).map(PathBuf::from).with_context(|| format!("{ROOT} is not set"))
}

fn outer() -> Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        bail!("this needs root (namespaces, mounts, tap devices): run it as root");
    }
    let root = tempfile::Builder::new().prefix("klab-").tempdir().context("making the temporary root")?;
    end_signals().thread_block().context("blocking signals")?;
    let mut child = Command::new("unshare")
        .args(["--mount", "--net", "--pid", "--fork", "--kill-child=KILL", "--propagation", "slave", "--"])
        .arg(env::current_exe().context("finding this program")?)
        .args(env::args_os().skip(1))
        .env(STAGE, "init")
        .env(ROOT, root.path())
        .env(OUTER, std::process::id().to_string())
        .spawn()
        .context("running unshare (of util-linux)")?;
    end_on_signal(pid_of(child.id()));
    let status = child.wait().context("waiting for the private machine");
    leaks::remove_cgroups(&cgroup_name(root.path()));
    let path = root.path().to_owned();
    root.close().with_context(|| format!("removing the temporary root {}", path.display()))?;
    Ok(exit_code(status?))
}

fn end_signals() -> SigSet {
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect()
}

/// Ctrl-C must not end this process: it still has to clean up. It ends the machine instead, init first, which
/// takes everything in it along.
fn end_on_signal(unshare: Pid) {
    std::thread::spawn(move || {
        if end_signals().wait().is_ok() {
            let _ = kill(unshare, Signal::SIGKILL);
        }
    });
}

fn pid_of(id: u32) -> Pid {
    Pid::from_raw(i32::try_from(id).unwrap_or(i32::MAX))
}

fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

/// PID 1 of the private machine.
fn init() -> Result<ExitCode> {
    let root = root_from_env()?;
    furnish(&root).context("furnishing the private machine")?;
    let before = Snapshot::take(&root)?;
    let child = Command::new(env::current_exe().context("finding this program")?)
        .args(env::args_os().skip(1))
        .env(STAGE, "main")
        .spawn()
        .context("starting the main stage")?;
    let status = reap_until(pid_of(child.id()))?;
    let code = match status {
        WaitStatus::Exited(_, code) => u8::try_from(code).unwrap_or(1),
        // It could not tear down; the end of this process does.
        _ => return Ok(ExitCode::from(130)),
    };
    let left = settle(&before, &root)?;
    if left.is_empty() {
        eprintln!(
            "left behind: nothing (processes, mounts, links, network namespaces, cgroups, files in /run)"
        );
    }
    for line in &left {
        eprintln!("left behind: {line}");
    }
    Ok(ExitCode::from(if code == 0 && !left.is_empty() { LEAKED } else { code }))
}

/// Mounts of the private machine. They end with it.
fn furnish(root: &Path) -> Result<()> {
    let none: Option<&str> = None;
    let outer = env::var(OUTER).with_context(|| format!("{OUTER} is not set"))?;
    let host_net = root.join("host-net");
    fs::write(&host_net, "").context("creating a file for the host's network namespace")?;
    // Before /proc is replaced: the outer process is not visible in the new one.
    mount(Some(&*format!("/proc/{outer}/ns/net")), &host_net, none, MsFlags::MS_BIND, none)
        .context("keeping the host's network namespace")?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).context("mounting /proc")?;
    furnish_run(root)?;
    cover_var_lib(root)?;
    // Changes of the host still arrive, ours never go out; within, mounts propagate as on any host with
    // systemd. Last, for until here a bind mount must not be a peer of what it was made from.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none).context("sharing mounts")?;
    let status =
        Command::new("ip").args(["link", "set", "lo", "up"]).status().context("running ip (of iproute2)")?;
    if !status.success() {
        bail!("bringing up the loopback interface: ip ended with {status}");
    }
    Ok(())
}

/// Redirects writes below `/var/lib` to the temporary root.
fn cover_var_lib(root: &Path) -> Result<()> {
    let (upper, work) = (root.join("var-lib/upper"), root.join("var-lib/work"));
    for folder in [&upper, &work] {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    let options = format!("lowerdir={VAR_LIB},upperdir={},workdir={}", upper.display(), work.display());
    mount(Some("overlay"), VAR_LIB, Some("overlay"), MsFlags::empty(), Some(&*options))
        .with_context(|| format!("covering {VAR_LIB}"))
}

/// A `/run` of its own, with the few names of the host's that programs need.
fn furnish_run(root: &Path) -> Result<()> {
    let none: Option<&str> = None;
    let host_run = root.join("host-run");
    fs::create_dir(&host_run)?;
    mount(Some("/run"), &host_run, none, MsFlags::MS_BIND | MsFlags::MS_REC, none).context("binding /run")?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))
        .context("mounting /run")?;
    if fs::read_dir("/run").context("reading the private /run")?.next().is_some() {
        bail!("the private /run is not empty: the host's own was not covered");
    }
    for name in KEPT_IN_RUN {
        let (from, to) = (host_run.join(name), Path::new("/run").join(name));
        match fs::read_link(&from) {
            Ok(target) => std::os::unix::fs::symlink(target, &to)?,
            Err(_) if from.is_dir() => {
                fs::create_dir_all(&to)?;
                mount(Some(&from), &to, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
                    .with_context(|| format!("binding {}", from.display()))?;
            }
            Err(_) => {}
        }
    }
    nix::mount::umount2(&host_run, nix::mount::MntFlags::MNT_DETACH).context("releasing the host's /run")?;
    Ok(())
}

/// Reaps whatever becomes a child of PID 1 until `main` has ended.
fn reap_until(main: Pid) -> Result<WaitStatus> {
    loop {
        match waitpid(None, None) {
            Ok(status) if status.pid() == Some(main) => return Ok(status),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e).context("waiting for the main stage"),
        }
    }
}

/// Returns everything that is still there and was not before, once processes had time to end.
fn settle(before: &Snapshot, root: &Path) -> Result<Vec<String>> {
    let deadline = Instant::now() + SETTLE;
    loop {
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
        }
        let left = Snapshot::take(root)?.since(before);
        if left.is_empty() || Instant::now() >= deadline {
            return Ok(left);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
