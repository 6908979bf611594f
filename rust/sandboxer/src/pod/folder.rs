//! Folders of pods: made with a marker in them before all else, and removed only with a proof that they were
//! made so.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use kuasar_common::constants::pod_files;

use super::StepError;
use crate::{
    container::{is_safe_id, remove},
    crash,
};

/// An empty file: the daemon made the folder that it is in, for a pod.
const MARKER: &str = ".kuasar-pod";
/// Mode of a pod's folder and of those in it.
const MODE: u32 = 0o700;

/// Path to which the daemon moves a record that it cannot read.
pub(super) fn aside(dir: &Path) -> PathBuf {
    dir.join(format!("{}.unreadable", pod_files::RECORD))
}

/// Files of which any one proves that a folder is a pod's. Older daemons wrote no marker but a record.
fn proofs(dir: &Path) -> [PathBuf; 3] {
    [dir.join(pod_files::RECORD), aside(dir), dir.join(MARKER)]
}

/// Returns true if the daemon made this folder for a pod. A link to one is none.
pub(crate) fn is_pods(dir: &Path) -> bool {
    let named = dir.file_name().and_then(|name| name.to_str()).is_some_and(is_safe_id);
    let is_file = |path: &PathBuf| fs::symlink_metadata(path).is_ok_and(|found| found.is_file());
    named && fs::symlink_metadata(dir).is_ok_and(|found| found.is_dir()) && proofs(dir).iter().any(is_file)
}

/// Returns true if an older daemon may have died here between making a folder and writing its first record.
/// Such a folder has a name as containerd gives it, and nothing in it but the files that come before the
/// record.
pub(crate) fn is_unfinished(dir: &Path) -> bool {
    let name = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let named = name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    let first = |entry: io::Result<fs::DirEntry>| {
        let name = entry.map(|entry| entry.file_name());
        name.is_ok_and(|name| [pod_files::LOG, pod_files::SHARED].iter().any(|known| name == *known))
    };
    named
        && fs::symlink_metadata(dir).is_ok_and(|found| found.is_dir())
        && fs::read_dir(dir).is_ok_and(|mut entries| entries.all(first))
}

/// Makes a pod's folder, or completes one that an earlier try has made.
///
/// # Errors
/// When it cannot be made, or somebody else's is there.
pub(super) fn make(dir: &Path) -> Result<(), StepError> {
    let create = |path: &Path| DirBuilder::new().mode(MODE).create(path);
    let at = |path: &Path| StepError::file(path.to_owned());
    match create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && is_pods(dir) => {}
        // An empty folder is nobody's loss: a daemon may have died before it wrote the marker.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && fs::remove_dir(dir).is_ok() => {
            create(dir).map_err(at(dir))?;
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(StepError::Foreign(dir.to_owned()));
        }
        made => made.map_err(at(dir))?,
    }
    crash::step("create: marker").map_err(at(dir))?;
    let marker = dir.join(MARKER);
    let marked = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&marker);
    marked.map_err(at(&marker))?;
    for path in [dir.join(pod_files::LOG), dir.join(pod_files::SHARED)] {
        match create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.map_err(at(&path))?,
        }
    }
    Ok(())
}

/// Removes what [`make`] made before it failed.
pub(super) fn undo(dir: &Path) -> Result<(), StepError> {
    if is_pods(dir) {
        return remove(dir);
    }
    // Without a marker only as long as it is empty.
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StepError::file(dir)(error)),
        _ => Ok(()),
    }
}

/// Removes a pod's folder, whatever is mounted in it. What proves that it is one goes last: what an
/// interrupted removal leaves is still known. One that is not there is no error.
///
/// # Errors
/// When something stays mounted or cannot be removed.
pub(super) fn remove(dir: &Path) -> Result<(), StepError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(StepError::file(dir))?,
    };
    let proofs = proofs(dir);
    for entry in entries {
        let path = entry.map_err(StepError::file(dir))?.path();
        if !proofs.contains(&path) {
            remove::remove(&path)?;
        }
    }
    crash::step("remove: emptied").map_err(StepError::file(dir))?;
    for proof in &proofs {
        remove::remove(proof)?;
    }
    crash::step("remove: unproved").map_err(StepError::file(dir))?;
    remove::remove(dir).map_err(StepError::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_a_proof_and_a_pods_name_is_a_pods() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("p1");
        make(&dir).unwrap();
        make(&dir).unwrap();
        assert!(is_pods(&dir));
        std::os::unix::fs::symlink(&dir, root.path().join("link")).unwrap();
        assert!(!is_pods(&root.path().join("link")));
        fs::rename(&dir, root.path().join(".p1")).unwrap();
        assert!(!is_pods(&root.path().join(".p1")));
        // As an older daemon left it.
        fs::create_dir(&dir).unwrap();
        assert!(!is_pods(&dir));
        fs::write(dir.join(pod_files::RECORD), "{}").unwrap();
        assert!(is_pods(&dir));
    }

    #[test]
    fn a_folder_of_somebody_elses_is_not_taken() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("p1");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("precious"), "").unwrap();
        let error = make(&dir).unwrap_err().to_string();
        assert!(
            error.contains("p1 is there already and no sandbox's") && error.contains("move it"),
            "{error}"
        );
        fs::remove_file(dir.join("precious")).unwrap();
        make(&dir).expect("an empty one is nobody's");
    }

    #[test]
    fn a_removal_that_was_interrupted_is_known_as_a_pods() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("p1");
        make(&dir).unwrap();
        // What cannot be removed interrupts it.
        let stuck = dir.join(pod_files::SHARED).join("stuck");
        fs::write(&stuck, "").unwrap();
        if !immutable(&stuck, true) {
            return eprintln!(
                "skipped: a removal that stops: the file system of {dir:?} has no immutable files"
            );
        }
        remove(&dir).unwrap_err();
        assert!(is_pods(&dir));
        immutable(&stuck, false);
        remove(&dir).unwrap();
        remove(&dir).unwrap();
        assert!(!dir.exists());
    }

    fn immutable(path: &Path, on: bool) -> bool {
        let option = if on { "+i" } else { "-i" };
        std::process::Command::new("chattr")
            .arg(option)
            .arg(path)
            .output()
            .is_ok_and(|out| out.status.success())
    }

    #[test]
    fn what_an_older_daemon_left_unfinished_is_told_from_others_things() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("0123456789abcdef".repeat(4));
        fs::create_dir_all(dir.join(pod_files::LOG)).unwrap();
        assert!(is_unfinished(&dir));
        fs::write(dir.join("config.v2.json"), "").unwrap();
        assert!(!is_unfinished(&dir));
    }
}
