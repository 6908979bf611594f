//! The pod's cgroup on the host: everything of a pod runs in a child of the one that kubelet made and limits, so that it
//! is accounted to the pod.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
    time::Duration,
};

/// Where hierarchies are mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// How often, and how far apart, removal is tried: a process that was just collected takes a moment to leave.
const TRIES: u32 = 25;
const APART: Duration = Duration::from_millis(20);

/// Creates the pod's cgroups below `parent`, in every hierarchy of the host; empty: none. Returns them all.
pub(super) fn create(parent: &str, pod: &str) -> io::Result<Vec<PathBuf>> {
    if parent.is_empty() {
        return Ok(Vec::new());
    }
    create_in(Path::new(ROOT), parent, pod)
}

fn create_in(root: &Path, parent: &str, pod: &str) -> io::Result<Vec<PathBuf>> {
    let below = below(parent)?.join(format!("kuasar-{pod}"));
    let mut made = Vec::new();
    for hierarchy in hierarchies(root)? {
        let path = hierarchy.join(&below);
        let done = make(&hierarchy, &below);
        made.push(path.clone());
        if let Err(error) = done {
            remove_now(&made);
            return Err(io::Error::new(error.kind(), format!("{}: {error}", path.display())));
        }
    }
    Ok(made)
}

/// Path of a cgroup as kubelet names it: a path, or, with systemd, the name of a slice, whose dashes are levels.
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
fn hierarchies(root: &Path) -> io::Result<Vec<PathBuf>> {
    if root.join("cgroup.procs").exists() {
        return Ok(vec![root.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        // Links to combined hierarchies would be counted twice.
        if !path.is_symlink() && path.join("cgroup.procs").exists() {
            found.push(path);
        }
    }
    Ok(found)
}

fn make(hierarchy: &Path, below: &Path) -> io::Result<()> {
    let mut path = hierarchy.to_owned();
    for part in below.components() {
        let parent = path.clone();
        path.push(part);
        match fs::create_dir(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
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

/// Removes a pod's cgroups after everything in them has ended. Ones that are gone are no error.
pub(super) async fn remove(cgroups: &[PathBuf]) -> io::Result<()> {
    for _ in 0..TRIES {
        if remove_now(cgroups).is_none() {
            return Ok(());
        }
        tokio::time::sleep(APART).await;
    }
    remove_now(cgroups).map_or(Ok(()), Err)
}

fn remove_now(cgroups: &[PathBuf]) -> Option<io::Error> {
    let mut last = None;
    for cgroup in cgroups {
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
mod tests {
    use super::*;

    #[test]
    fn parents_are_paths_or_slices() {
        assert_eq!(below("/kubepods/burstable/podu").unwrap(), Path::new("kubepods/burstable/podu"));
        assert_eq!(
            below("kubepods-burstable-podu.slice").unwrap(),
            Path::new("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podu.slice")
        );
        assert_eq!(below("/a.slice/a-b.slice").unwrap(), Path::new("a.slice/a-b.slice"));
        assert!(below("/../x").unwrap_err().to_string().contains("is no plain path"));
    }

    #[test]
    fn every_hierarchy_gets_one_and_all_go() {
        let root = tempfile::tempdir().unwrap();
        for name in ["cpu", "memory", "not-one"] {
            fs::create_dir_all(root.path().join(name).join("kubepods/podu")).unwrap();
        }
        for name in ["cpu", "memory"] {
            fs::write(root.path().join(name).join("cgroup.procs"), "").unwrap();
        }
        std::os::unix::fs::symlink(root.path().join("cpu"), root.path().join("cpu,cpuacct")).unwrap();
        let mut made = create_in(root.path(), "/kubepods/podu", "p1").unwrap();
        made.sort();
        assert_eq!(
            made,
            ["cpu", "memory"].map(|name| root.path().join(name).join("kubepods/podu/kuasar-p1"))
        );
        assert!(made.iter().all(|path| path.is_dir()));
        assert!(remove_now(&made).is_none() && remove_now(&made).is_none());
        assert!(root.path().join("cpu/kubepods/podu").is_dir());
        // One hierarchy that refuses leaves none in the others.
        fs::remove_dir_all(root.path().join("memory/kubepods")).unwrap();
        fs::write(root.path().join("memory/kubepods"), "").unwrap();
        let error = create_in(root.path(), "/kubepods/podu", "p2").unwrap_err().to_string();
        assert!(error.contains("memory/kubepods/podu/kuasar-p2"), "{error}");
        assert!(!root.path().join("cpu/kubepods/podu/kuasar-p2").exists());
    }
}
