//! The pod's cgroups on the host: everything of a pod runs in a child of the one that kubelet made and
//! limits, so that it is accounted to the pod.
//!
//! ```text
//! <parent>/kuasar-<pod>            (below a systemd slice: kuasar-<pod>.scope)
//!     overhead                     VMM, its companions, the relay
//!     vcpu                         the threads that are the guest's CPUs
//! ```
//!
//! With cgroup v2 the two are threaded cgroups, so memory is counted once, in the one above them; with v1
//! they exist where CPUs are handed out or counted (`cpu`, `cpuacct`, `cpuset`). Limits of CPU time and
//! memory are the parent's, and kubelet's to set; a pod without limits has none here either.

mod given;
mod limits;
mod metrics;
mod oom;

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Component, Path, PathBuf},
    time::Duration,
};

pub(super) use self::{
    given::Given,
    limits::{Changes, Limits},
    metrics::{of_cgroups, of_processes},
};
use crate::process::Process;

/// Folder in which hierarchies are mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
/// The guest's CPUs.
const VCPU: &str = "vcpu";
/// Everything else.
const OVERHEAD: &str = "overhead";
/// Number of attempts at removal, and the time between them: a process that was just collected takes a moment
/// to leave.
const TRIES: u32 = 50;
const APART: Duration = Duration::from_millis(20);
/// After so many of them, what is still inside has nobody who would end it.
const PATIENT_TRIES: u32 = 10;

/// Kind of a hierarchy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    /// One or a few controllers, named by the folder where it is mounted.
    V1,
    /// The unified one; beside others (hybrid) it has few controllers or none.
    V2,
}

/// A pod's place in one hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    mount: PathBuf,
    version: Version,
    pod: PathBuf,
}

/// A pod's places in all hierarchies of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cgroups(Vec<Place>);

impl Cgroups {
    /// Plans the pod's places below `parent`, whether they are there or not; an empty parent: none.
    pub(super) fn plan(root: &Path, parent: &str, pod: &str) -> io::Result<Self> {
        if parent.is_empty() {
            return Ok(Self::default());
        }
        let below = below(parent)?;
        let slice = below.extension().is_some_and(|kind| kind == "slice");
        let below = below.join(format!("kuasar-{pod}{}", if slice { ".scope" } else { "" }));
        let place = |(mount, version): (PathBuf, _)| Place { pod: mount.join(&below), mount, version };
        Ok(Self(hierarchies(root)?.into_iter().map(place).collect()))
    }

    /// Every cgroup that may be there, outermost first.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.0
            .iter()
            .flat_map(|place| [place.pod.clone(), place.pod.join(VCPU), place.pod.join(OVERHEAD)])
            .collect()
    }

    /// Creates them.
    pub(super) fn create(&self) -> io::Result<()> {
        for place in &self.0 {
            if let Err(error) = place.create() {
                remove_now(&self.paths());
                return Err(io::Error::new(error.kind(), format!("{}: {error}", place.pod.display())));
            }
        }
        Ok(())
    }

    /// Files that processes of the pod write themselves to.
    pub(super) fn procs(&self) -> Vec<PathBuf> {
        let file =
            |place: &Place| place.part(OVERHEAD).unwrap_or_else(|| place.pod.clone()).join("cgroup.procs");
        self.0.iter().map(file).collect()
    }

    /// Processes in them.
    pub(super) fn members(&self) -> BTreeSet<u32> {
        // Cannot be read in a threaded cgroup; the one above it names the same processes.
        let texts =
            self.paths().into_iter().filter_map(|path| fs::read_to_string(path.join("cgroup.procs")).ok());
        texts.flat_map(|text| pids(&text).collect::<Vec<_>>()).collect()
    }

    /// Moves the threads that are the guest's CPUs.
    pub(super) fn place_vcpus(&self, threads: &[u32]) -> io::Result<()> {
        for place in &self.0 {
            let Some(vcpu) = place.part(VCPU) else { continue };
            let file = vcpu.join(match place.version {
                Version::V1 => "tasks",
                Version::V2 => "cgroup.threads",
            });
            for thread in threads {
                // One at a time: the kernel takes no lists here.
                write(&file, &thread.to_string())?;
            }
        }
        Ok(())
    }
}

impl Place {
    /// One of the two parts, where there are any.
    fn part(&self, name: &str) -> Option<PathBuf> {
        Some(self.pod.join(name)).filter(|path| path.is_dir())
    }

    /// Names of the controllers, by the folder, which is a list with v1.
    fn has(&self, controllers: &[&str]) -> bool {
        let name = self.mount.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.split(',').any(|own| controllers.contains(&own))
    }

    fn create(&self) -> io::Result<()> {
        make(&self.mount, &self.pod)?;
        match self.version {
            Version::V1 if self.has(&["cpu", "cpuacct", "cpuset"]) => {
                [VCPU, OVERHEAD].iter().try_for_each(|part| make(&self.pod, &self.pod.join(part)))
            }
            Version::V1 => Ok(()),
            Version::V2 => {
                self.forbid_swap();
                if let Err(error) = self.split() {
                    tracing::debug!(%error, cgroup = %self.pod.display(), "not splitting a cgroup");
                    for part in [VCPU, OVERHEAD] {
                        let _ = fs::remove_dir(self.pod.join(part));
                    }
                }
                Ok(())
            }
        }
    }

    /// Keeps the VM's memory out of the node's swap: for the host it is the memory of one process, and the
    /// containers that kubelet wants none of in there are inside of it. A host without swap has no such file.
    fn forbid_swap(&self) {
        let file = self.pod.join("memory.swap.max");
        if file.exists()
            && let Err(error) = write(&file, "0")
        {
            tracing::warn!(%error, "keeping the sandbox's memory out of the swap");
        }
    }

    /// Threads of one process can be in two cgroups only if both are threaded.
    fn split(&self) -> io::Result<()> {
        for part in [VCPU, OVERHEAD] {
            let path = self.pod.join(part);
            create_dir(&path)?;
            write(&path.join("cgroup.type"), "threaded")?;
        }
        enable(&self.pod, |controller| ["cpu", "cpuset", "pids"].contains(&controller));
        Ok(())
    }
}

/// Path of a cgroup as kubelet names it: a path, or, with systemd, the name of a slice, whose dashes are
/// levels.
fn below(parent: &str) -> io::Result<PathBuf> {
    let path = Path::new(parent.trim_start_matches('/'));
    if path.components().any(|part| !matches!(part, Component::Normal(_))) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("cgroup_parent {parent:?} is no plain path"),
        ));
    }
    match parent.strip_suffix(".slice") {
        Some(name) if !parent.contains('/') => {
            let levels = name.match_indices('-').map(|(end, _)| end).chain([name.len()]);
            Ok(levels.filter_map(|end| name.get(..end)).map(|level| format!("{level}.slice")).collect())
        }
        _ => Ok(path.to_owned()),
    }
}

/// The mount points of all hierarchies: one with cgroup v2, several with v1 or both.
fn hierarchies(root: &Path) -> io::Result<Vec<(PathBuf, Version)>> {
    let version = |path: &Path| {
        if path.join("cgroup.controllers").exists() { Version::V2 } else { Version::V1 }
    };
    if root.join("cgroup.procs").exists() {
        return Ok(vec![(root.to_owned(), version(root))]);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        // Links to combined hierarchies would be counted twice.
        if !path.is_symlink() && path.join("cgroup.procs").exists() {
            found.push((path.clone(), version(&path)));
        }
    }
    found.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(found)
}

/// The cgroups of a pod, outermost first, when nobody knows any more where they are: found by their name.
pub(super) fn find(root: &Path, pod: &str) -> Vec<PathBuf> {
    let names = [format!("kuasar-{pod}"), format!("kuasar-{pod}.scope")];
    let (mut found, mut left) = (Vec::new(), vec![root.to_owned()]);
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            // (Not what a link leads to.)
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let path = entry.path();
            if names.iter().any(|name| entry.file_name() == name.as_str()) {
                found.extend([path.clone(), path.join(VCPU), path.join(OVERHEAD)]);
            } else {
                left.push(path);
            }
        }
    }
    found
}

/// Makes a cgroup and those above it.
#[expect(clippy::disallowed_methods, reason = "a file of the kernel")]
fn make(above: &Path, cgroup: &Path) -> io::Result<()> {
    let mut path = above.to_owned();
    for part in cgroup.strip_prefix(above).unwrap_or(cgroup).components() {
        let parent = path.clone();
        path.push(part);
        // cgroup v2 only: a child has the controllers that its parent hands down. What cannot be handed down
        // is counted above.
        enable(&parent, |_| true);
        create_dir(&path)?;
        // cgroup v1 only: an empty set takes no process.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let own = path.join(file);
            if parent.join("cgroup.clone_children").exists()
                && fs::read_to_string(&own).is_ok_and(|set| set.trim().is_empty())
            {
                fs::write(&own, fs::read_to_string(parent.join(file))?)?;
            }
        }
    }
    Ok(())
}

fn create_dir(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
        // Whatever the daemon's umask says: figures are for everybody, as those of kubelet's own cgroups.
        Ok(()) => fs::set_permissions(path, fs::Permissions::from_mode(0o755)),
    }
}

/// Hands controllers down, one by one, because one that is refused would refuse all.
fn enable(cgroup: &Path, wanted: impl Fn(&str) -> bool) {
    let list = |name: &str| fs::read_to_string(cgroup.join(name)).unwrap_or_default();
    let enabled = list("cgroup.subtree_control");
    for controller in list("cgroup.controllers").split_whitespace() {
        if wanted(controller)
            && !enabled.split_whitespace().any(|there| there == controller)
            && let Err(error) = write(&cgroup.join("cgroup.subtree_control"), &format!("+{controller}"))
        {
            tracing::debug!(%error, "not handing a cgroup controller down");
        }
    }
}

/// Writes a file of a cgroup, in one call, and names it when that fails.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let written = fs::OpenOptions::new().write(true).open(path).and_then(|file| {
        rustix::io::write(&file, text.as_bytes())?;
        Ok(())
    });
    written.map_err(|error| {
        io::Error::new(error.kind(), format!("writing {text:?} to {}: {error}", path.display()))
    })
}

/// Removes a pod's cgroups after everything in them has ended; what has not by then is ended here. Ones that
/// are gone are no error.
pub(super) async fn remove(cgroups: &[PathBuf]) -> io::Result<()> {
    for tried in 0..TRIES {
        if remove_now(cgroups).is_none() {
            return Ok(());
        }
        if tried == PATIENT_TRIES {
            end_members(cgroups);
        }
        tokio::time::sleep(APART).await;
    }
    remove_now(cgroups).map_or(Ok(()), Err)
}

/// Kills what runs in these cgroups: processes of a start that was interrupted before it was written down.
pub(super) fn end_members(cgroups: &[PathBuf]) {
    for cgroup in cgroups {
        // Cannot be read in a threaded cgroup; the one above it names the same processes.
        let Ok(members) = fs::read_to_string(cgroup.join("cgroup.procs")) else { continue };
        for pid in pids(&members) {
            tracing::info!(pid, cgroup = %cgroup.display(), "ending a process of a sandbox that is no more");
            let killed = Process::open(pid).map(|process| process.signal(rustix::process::Signal::KILL));
            if let Ok(Err(error)) = killed {
                tracing::error!(%error, "ending a process of a sandbox that is no more");
            }
        }
    }
}

/// The processes of a `cgroup.procs`; those of another PID namespace are 0.
fn pids(text: &str) -> impl Iterator<Item = u32> {
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(|pid| *pid > 0)
}

fn remove_now(cgroups: &[PathBuf]) -> Option<io::Error> {
    let mut last = None;
    for cgroup in cgroups.iter().rev() {
        match fs::remove_dir(cgroup) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                last = Some(io::Error::new(error.kind(), format!("{}: {error}", cgroup.display())));
            }
            _ => {}
        }
    }
    last
}

#[cfg(test)]
mod tests;
