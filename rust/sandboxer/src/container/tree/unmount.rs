//! Unmounting whatever is below a folder of ours.

use std::{
    collections::BTreeSet,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use nix::libc;

use super::{
    super::mountinfo::{self, Entry},
    Change, Dir, MountError, failed,
    mount::change_mount,
};

/// Most times that mountinfo is read again while there is progress: mounts that are stacked on one point come
/// away one by one.
const MOST_ROUNDS: usize = 1000;

/// Unmounts everything at and below a path, and checks that nothing is left.
///
/// # Errors
/// When something stays mounted.
pub(crate) fn unmount_below(path: &Path) -> Result<(), MountError> {
    let mut before = usize::MAX;
    let mut last = None;
    for _ in 0..MOST_ROUNDS {
        let all = mountinfo::read().map_err(failed("reading the mounts below", path))?;
        let mine: Vec<&Entry> = all.iter().filter(|entry| entry.point.starts_with(path)).collect();
        if mine.is_empty() {
            return Ok(());
        }
        if mine.len() >= before {
            break;
        }
        before = mine.len();
        let ids: BTreeSet<u64> = mine.iter().map(|entry| entry.id).collect();
        for top in mine.iter().filter(|entry| !ids.contains(&entry.parent)) {
            last = take_away(path, top, &all).err().or(last);
        }
    }
    Err(last
        .unwrap_or_else(|| MountError::Refused(format!("something is still mounted at {}", path.display()))))
}

/// Takes a mount away with all that is mounted below it. Nothing of a guest's is on the way to it: whatever
/// has a mount above it goes with that.
fn take_away(path: &Path, top: &Entry, all: &[Entry]) -> Result<(), MountError> {
    let refuse = || MountError::Refused(format!("{} cannot be unmounted", top.point.display()));
    let name = top.point.file_name().ok_or_else(refuse)?;
    let parent: PathBuf = top.point.parent().map(Path::to_owned).ok_or_else(refuse)?;
    let folder = match parent.strip_prefix(path) {
        Ok(below) if !below.as_os_str().is_empty() => Dir::open(path)?.at_in_mount(below)?,
        _ => Dir::open(&parent)?,
    };
    if has_peers_elsewhere(top, all)
        && let Some(mount) = folder.find(name)?
    {
        // Left by a daemon that was killed in the wrong moment: what is unmounted here must not be unmounted
        // there.
        let change = Change { propagation: libc::MS_PRIVATE, recursive: true, ..Change::default() };
        change_mount(mount.as_fd(), change).map_err(failed("making private", &top.point))?;
    }
    folder.detach(name)
}

/// Returns true if a mount, or one below it, is in a peer group with a mount elsewhere.
fn has_peers_elsewhere(top: &Entry, all: &[Entry]) -> bool {
    let mut tree = BTreeSet::from([top.id]);
    // Parents come before their children but for mounts that were moved, so until nothing is added.
    loop {
        let before = tree.len();
        tree.extend(
            all.iter().filter(|entry| tree.contains(&entry.parent)).map(|entry| entry.id).collect::<Vec<_>>(),
        );
        if tree.len() == before {
            break;
        }
    }
    let (inside, outside): (Vec<&Entry>, Vec<&Entry>) =
        all.iter().partition(|entry| tree.contains(&entry.id));
    let peers: BTreeSet<u64> = inside.iter().filter_map(|entry| entry.peers).collect();
    outside.iter().any(|entry| entry.peers.is_some_and(|group| peers.contains(&group)))
}
