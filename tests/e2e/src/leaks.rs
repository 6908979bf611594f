//! Things that a run must not leave behind, compared before and after inside the private machine. Nothing but
//! the run lives there, so whatever is new was made by it: no need to guess by names.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// Folder in which cgroup hierarchies are mounted.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Folders that other programs keep in `/run`: a stock containerd, whatever runtime it is used with; CNI;
/// `mount`.
const OF_OTHERS: [&str; 3] = ["/run/containerd", "/run/netns", "/run/mount"];

/// Everything of the machine that a run can leave behind, one line each, sorted.
#[derive(Clone, Debug)]
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// Takes stock. `root` is the run's temporary root, below which files are not counted: it is removed as a
    /// whole.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn take(root: &Path) -> Result<Self> {
        let mut all = BTreeSet::new();
        all.extend(processes().context("listing processes")?);
        all.extend(mounts().context("listing mounts")?);
        all.extend(links().context("listing network links")?);
        all.extend(network_namespaces());
        all.extend(files_in_run());
        all.extend(cgroups(&cgroup_of(root)).into_iter().map(|path| format!("cgroup {}", path.display())));
        Ok(Self(all))
    }

    /// Returns everything that is here and was not in `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

fn cgroup_of(root: &Path) -> String {
    root.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn processes() -> Result<Vec<String>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name == "1" || !name.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        // One that has just ended has no command line; a kernel thread is not in a PID namespace.
        let command = fs::read(format!("/proc/{name}/cmdline")).unwrap_or_default();
        if !command.is_empty() {
            let words = String::from_utf8_lossy(&command).replace('\0', " ");
            all.push(format!("process {name}: {}", words.trim_end()));
        }
    }
    Ok(all)
}

fn mounts() -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let mount = |line: &str| {
        let mut words = line.split(' ');
        let point = words.nth(4)?.to_owned();
        let (_, after) = line.split_once(" - ")?;
        Some(format!("mount {point} ({})", after.split(' ').next()?))
    };
    Ok(text.lines().filter_map(mount).collect())
}

fn links() -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/self/net/dev")?;
    let name = |line: &str| line.split_once(':').map(|(name, _)| format!("network link {}", name.trim()));
    Ok(text.lines().filter_map(name).collect())
}

fn network_namespaces() -> Vec<String> {
    let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    entries.map(|entry| format!("network namespace {}", entry.path().display())).collect()
}

/// Sockets, files and links in the private `/run`; empty folders are nobody's loss but tell of one kept by
/// mistake, so they count, too.
fn files_in_run() -> Vec<String> {
    let mut all = Vec::new();
    let mut folders = vec![PathBuf::from("/run")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if OF_OTHERS.iter().any(|known| path.starts_with(known)) {
                continue;
            }
            // Not into symbolic links: /run/current-system is half a file system.
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) && !path.starts_with("/run/systemd") {
                folders.push(path.clone());
            }
            all.push(format!("file {}", path.display()));
        }
    }
    all
}

/// Cgroups of that name, with all below them, in every hierarchy; deepest first, so that they can be removed
/// in order.
#[must_use]
pub fn cgroups(name: &str) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for hierarchy in hierarchies() {
        let top = hierarchy.join(name);
        if !name.is_empty() && top.is_dir() {
            collect(&top, &mut all);
        }
    }
    all
}

fn collect(folder: &Path, all: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), all);
        }
    }
    all.push(folder.to_owned());
}

/// The hierarchies of this host: one with cgroup v2, several with v1 or both.
#[must_use]
pub fn hierarchies() -> Vec<PathBuf> {
    let top = PathBuf::from(CGROUPS);
    if top.join("cgroup.procs").exists() {
        return vec![top];
    }
    let entries = fs::read_dir(&top).into_iter().flatten().flatten();
    // Symbolic links are second names of the same hierarchy.
    let mut all: Vec<_> =
        entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()).collect();
    all.sort();
    all
}

/// Removes the cgroups of a run after everything in them has ended.
pub fn remove_cgroups(name: &str) {
    for path in cgroups(name) {
        // The kernel may still be taking the last process out of it.
        for _ in 0..50 {
            if fs::remove_dir(&path).is_ok() || !path.exists() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}
