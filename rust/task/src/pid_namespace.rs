//! PID namespaces that several containers share: the pod's own, and that of another container.
//!
//! In a spec that comes from the host, the `path` of the PID namespace is [`POD`] for the pod's, or
//! [`CONTAINER`] and an id or [`PROCESS`] and the pid of its first process for a container's; no path is a
//! namespace of the container's own, as in any spec. (Paths of the host's `/proc` would mean nothing here.)

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::process::CommandExt},
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, OnceLock},
};

use rustix::{
    process::Pid,
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};
use serde_json::{Value, json};

use crate::{error::TaskError, reaper::Reaper, runc::Runc};

/// `path` of the PID namespace that all containers of the pod share.
pub const POD: &str = "pod";
/// `path` of a container's PID namespace, followed by the container's id.
pub const CONTAINER: &str = "container:";
/// `path` of a container's PID namespace, followed by the pid that was reported for the container: all that
/// CRI names.
pub const PROCESS: &str = "process:";
/// Name under which the agent's program runs as the first process of the pod's PID namespace. Not an
/// argument: what the kernel does not understand of its command line becomes arguments of PID 1.
const PAUSE: &str = "kuasar-pause";

/// The pod's PID namespace, once there is one.
#[derive(Default)]
pub struct PodPidNamespace {
    init: OnceLock<Pid>,
}

impl PodPidNamespace {
    /// Makes it; its first process, which reaps what the containers leave, is this very program. Repeating
    /// changes nothing.
    ///
    /// # Errors
    /// The kernel's.
    pub fn make(&self, reaper: &Arc<Reaper>) -> Result<(), TaskError> {
        if self.init.get().is_some() {
            return Ok(());
        }
        let init = start(reaper).map_err(TaskError::io("making the pod's PID namespace"))?;
        let _ = self.init.set(init);
        Ok(())
    }

    /// Replaces the host's names of PID namespaces in a spec by paths of this VM. True if the container is
    /// not alone in its namespace: the end of its first process will not end the others then.
    ///
    /// # Errors
    /// When there is no such namespace.
    pub fn resolve(&self, spec: &mut Value, runc: &Runc) -> Result<bool, TaskError> {
        let Some(namespaces) = spec.pointer_mut("/linux/namespaces").and_then(Value::as_array_mut) else {
            return Ok(false);
        };
        let is_pid = |namespace: &&mut Value| namespace.get("type").and_then(Value::as_str) == Some("pid");
        let Some(namespace) = namespaces.iter_mut().find(is_pid).and_then(Value::as_object_mut) else {
            // Without one of its own it is in the VM's, with the agent.
            return Err(refused("there is none, and the VM's own is the agent's"));
        };
        let Some(name) = namespace.get("path").and_then(Value::as_str).filter(|path| !path.is_empty()) else {
            return Ok(false);
        };
        let pid = self.init_of_namespace(name, runc)?;
        namespace.insert("path".to_owned(), json!(format!("/proc/{pid}/ns/pid")));
        Ok(true)
    }

    /// The first process of the namespace that the host calls `name`.
    fn init_of_namespace(&self, name: &str, runc: &Runc) -> Result<i64, TaskError> {
        if name == POD {
            let init = self.init.get().ok_or_else(|| refused("the pod was set up without a shared one"))?;
            return Ok(i64::from(init.as_raw_nonzero().get()));
        }
        if let Some(container) = name.strip_prefix(CONTAINER) {
            let gone = || refused(&format!("container {container}, whose it is to share, does not run"));
            return init_of(container, runc).ok_or_else(gone);
        }
        if let Some(pid) = name.strip_prefix(PROCESS) {
            let gone =
                || refused(&format!("the container of process {pid}, whose it is to share, does not run"));
            return pid.parse().ok().filter(|pid| is_init(*pid, runc)).ok_or_else(gone);
        }
        Err(refused(&format!("{name:?} is none of {POD:?}, \"{CONTAINER}<id>\" and \"{PROCESS}<pid>\"")))
    }
}

fn refused(why: &str) -> TaskError {
    TaskError::FailedPrecondition(format!("linux.namespaces of the container's spec, pid: {why}"))
}

/// The pid that the runtime keeps of a container.
fn init_of(container: &str, runc: &Runc) -> Option<i64> {
    if container.is_empty() || container.contains(['/', '\0']) || container.starts_with('.') {
        return None;
    }
    let state = fs::read(runc.root.join(container).join("state.json")).ok()?;
    let state: Value = serde_json::from_slice(&state).ok()?;
    let pid = state.get("init_process_pid")?.as_i64().filter(|pid| *pid > 1)?;
    Path::new("/proc").join(pid.to_string()).join("ns/pid").exists().then_some(pid)
}

/// Returns true if a container's first process has this pid: any other process's namespace, the agent's own
/// among them, is none to share.
fn is_init(pid: i64, runc: &Runc) -> bool {
    let containers = fs::read_dir(&runc.root).into_iter().flatten().flatten();
    containers.filter_map(|entry| init_of(entry.file_name().to_str()?, runc)).any(|init| init == pid)
}

fn start(reaper: &Arc<Reaper>) -> io::Result<Pid> {
    let ours = File::open("/proc/self/ns/pid")?;
    // SAFETY: it only changes in which namespace children start; this thread's descriptors and memory stay
    // shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(PAUSE).env_clear().current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let started = reaper.spawn(&mut command);
    move_into_link_name_space(ours.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
    Ok(started?.0)
}

/// Returns true if this process was started as the first one of a pod's PID namespace.
#[must_use]
pub fn is_pause() -> bool {
    std::env::args_os().next().as_deref() == Some(OsStr::new(PAUSE))
}

/// The life of that process: collects what ends and has no parent, until it is killed.
pub fn pause() -> ! {
    // SAFETY: an all-zero set is a value; the calls only write to the set and to this thread's mask.
    let child = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        // Kept waiting, so that an exit between the two calls of the loop is not missed.
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        set
    };
    loop {
        while matches!(rustix::process::wait(rustix::process::WaitOptions::NOHANG), Ok(Some(_))) {}
        // SAFETY: the set lives as long as the call; nothing is asked for about the signal.
        unsafe { libc::sigwaitinfo(&raw const child, std::ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, sync::atomic::AtomicU64};

    use super::*;

    fn runc(root: PathBuf) -> Runc {
        Runc {
            program: "runc".into(),
            logs: root.clone(),
            root,
            no_pivot: false,
            reaper: Reaper::new(),
            calls: AtomicU64::new(0),
            deadlines: crate::runc::Deadlines::default(),
            turns: Default::default(),
        }
    }

    fn spec(namespace: Value) -> Value {
        json!({"linux": {"namespaces": [{"type": "mount"}, namespace]}})
    }

    #[test]
    fn names_become_paths_and_wrong_ones_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let runc = runc(dir.path().to_owned());
        let pod = PodPidNamespace::default();
        let mut own = spec(json!({"type": "pid"}));
        assert!(!pod.resolve(&mut own, &runc).unwrap());
        assert_eq!(own, spec(json!({"type": "pid"})));

        let refused = |path: &str| {
            pod.resolve(&mut spec(json!({"type": "pid", "path": path})), &runc).unwrap_err().to_string()
        };
        assert!(refused("pod").ends_with("the pod was set up without a shared one"));
        assert!(refused("container:a").ends_with("container a, whose it is to share, does not run"));
        assert!(refused("container:../a").contains("does not run"));
        assert!(refused("/proc/77/ns/pid").contains("is none of \"pod\", \"container:<id>\" and"));
        let none = pod.resolve(&mut json!({"linux": {"namespaces": []}}), &runc).unwrap_err().to_string();
        assert!(none.contains("the VM's own is the agent's"), "{none}");

        fs::create_dir(dir.path().join("a")).unwrap();
        let pid = std::process::id();
        fs::write(dir.path().join("a/state.json"), format!("{{\"init_process_pid\":{pid}}}")).unwrap();
        let mut target = spec(json!({"type": "pid", "path": "container:a"}));
        assert!(pod.resolve(&mut target, &runc).unwrap());
        assert_eq!(target, spec(json!({"type": "pid", "path": format!("/proc/{pid}/ns/pid")})));
        let mut target = spec(json!({"type": "pid", "path": format!("process:{pid}")}));
        assert!(pod.resolve(&mut target, &runc).unwrap());
        assert_eq!(target, spec(json!({"type": "pid", "path": format!("/proc/{pid}/ns/pid")})));
        // Not any process, and not the agent.
        for other in ["1", "", "-1", "x", "/proc/1"] {
            assert!(refused(&format!("process:{other}")).contains("does not run"), "{other}");
        }
        fs::write(dir.path().join("a/state.json"), "{\"init_process_pid\":\"x\"}").unwrap();
        assert!(refused("container:a").contains("does not run"));
    }
}
