//! Write access to a volume that is shared. It is changed where the volume is, so that the volume stays the
//! same file system to the guest.
//!
//! Attributes of a mount do not propagate as mounts do, so they are changed in every copy that a file server
//! may go through: in the folder of work, in the view of it that is shared, and in the mount namespaces of
//! the processes that serve.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::Path,
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};

use super::{Change, Dir, libc};
use crate::container::{
    mountinfo::{self, Entry},
    tree::{change_mount, mount_id},
};

/// Makes a volume writable, or read-only, for the guest.
pub(super) fn change(folder: &Dir, name: &str, writable: bool, servers: &[u32]) -> io::Result<()> {
    let point = folder.find(name).map_err(io::Error::other)?;
    let point = point.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    let own = mount_id(point.as_fd())?;
    let all = mountinfo::read()?;
    let mut family = Family::of(&all, own);
    let mine: Vec<Entry> = family.members(&all);
    let change = if writable {
        Change { clear: libc::MOUNT_ATTR_RDONLY, ..Change::default() }
    } else {
        Change { set: libc::MOUNT_ATTR_RDONLY, ..Change::default() }
    };
    let here = fs::metadata("/proc/self/ns/mnt")?.ino();
    let mut namespaces = BTreeSet::from([here]);
    for server in servers {
        let process = format!("/proc/{server}");
        let namespace = File::open(format!("{process}/ns/mnt"))?;
        let number = namespace.metadata()?.ino();
        if !namespaces.insert(number) {
            continue;
        }
        let theirs = mountinfo::parse(&fs::read(format!("{process}/mountinfo"))?);
        let theirs = family.members(&theirs);
        in_namespace(&namespace, || theirs.iter().try_for_each(|entry| change_at(entry, change)))?;
    }
    mine.iter().try_for_each(|entry| change_at(entry, change))
}

/// A mount and those that came to be by propagation from it.
struct Family {
    first: u64,
    groups: BTreeSet<u64>,
}

impl Family {
    fn of(all: &[Entry], first: u64) -> Self {
        let groups = all.iter().filter(|entry| entry.id == first).filter_map(|entry| entry.peers).collect();
        Self { first, groups }
    }

    fn members(&mut self, all: &[Entry]) -> Vec<Entry> {
        loop {
            let before = self.groups.len();
            let receives = |entry: &&Entry| entry.master.is_some_and(|group| self.groups.contains(&group));
            let more: Vec<u64> = all.iter().filter(receives).filter_map(|entry| entry.peers).collect();
            self.groups.extend(more);
            if self.groups.len() == before {
                break;
            }
        }
        let is_in = |group: Option<u64>| group.is_some_and(|group| self.groups.contains(&group));
        let mine = |entry: &&Entry| entry.id == self.first || is_in(entry.peers) || is_in(entry.master);
        all.iter().filter(mine).cloned().collect()
    }
}

fn change_at(entry: &Entry, change: Change) -> io::Result<()> {
    let top = open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let below = entry.point.strip_prefix("/").unwrap_or(&entry.point);
    let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let fd = openat2(top, below, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?;
    if mount_id(fd.as_fd())? != entry.id {
        return Err(io::Error::other(format!("{} is another mount", entry.point.display())));
    }
    change_mount(fd.as_fd(), change)
}

/// Does something in another mount namespace, in a thread that ends with it.
fn in_namespace(namespace: &File, work: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // The root and the working folder belong to the process; this thread takes copies, which go
            // along.
            unshare(CloneFlags::CLONE_FS)?;
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNS)?;
            work()
        });
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}
