//! Volumes of a pod: which files and folders of the host its VM sees, each of them once, and for which
//! containers.
//!
//! A file is one file in the VM only if it comes through one mount: the file server tells files apart by the
//! mount that it finds them in. So whatever containers have in common is shared once, and each of them binds
//! it in the guest, with its own access. On the host it is read-only for as long as all of them want it so: a
//! guest cannot write to what no container of its may write to. The table is on disk before anything is
//! mounted, so that a daemon that was restarted knows the containers of each volume.

mod source;
mod writable;

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use kuasar_common::constants::{GUEST_STATE_DIR, pod_files};
use nix::libc;
use serde::{Deserialize, Serialize};

use self::source::{Place, Source};
use super::{
    mount::{MountError, failed},
    spec::Bind,
    storage::{StorageError, write_new},
    tree::{Change, Dir, Mount},
};

/// The table, in the pod's folder.
const FILE: &str = "volumes.json";

/// Demands of a container on a volume.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wish {
    /// Nothing is to be written, and the guest cannot see to that: only the host knows what is mounted below
    /// a volume.
    pub(super) read_only_by_host: bool,
    /// Mounts that the host makes later are to arrive.
    pub(super) receives: bool,
}

/// Place at which the guest finds a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shown {
    number: u64,
    /// Below it; empty for all of it.
    inside: PathBuf,
}

impl Shown {
    /// The path in the guest of a volume that is shared as a whole.
    pub(super) fn whole(&self) -> Option<String> {
        self.inside
            .as_os_str()
            .is_empty()
            .then(|| format!("{GUEST_STATE_DIR}/{}/{}", pod_files::VOLUMES, self.number))
    }

    /// The path in the shared folder.
    pub(super) fn in_share(&self) -> Option<String> {
        Some(format!("{}/{}/{}", pod_files::VOLUMES, self.number, self.inside.to_str()?))
    }
}

/// Something of the host's that is shared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Export {
    place: Place,
    /// As it is mounted now; without what the host's own mount says.
    read_only: bool,
    /// It stays so.
    read_only_by_host: bool,
    /// Containers that use it, and whether each may write.
    users: BTreeMap<String, bool>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Table {
    /// The last number that was given. None is given twice: the guest may remember what was there.
    last: u64,
    exports: BTreeMap<u64, Export>,
}

/// The volumes of a pod, in the hands of one.
#[derive(Debug)]
pub(super) struct Exports {
    dir: PathBuf,
    folder: Dir,
    table: Table,
}

impl Exports {
    /// Reads which there are.
    pub(super) fn of(dir: &Path, work: &Dir) -> Result<Self, StorageError> {
        Ok(Self {
            dir: dir.to_owned(),
            folder: work.make(pod_files::VOLUMES)?,
            table: read(&dir.join(FILE))?,
        })
    }

    /// Shares what a container binds. `servers`: processes that serve the pod's shared folder.
    pub(super) fn attach(
        &mut self,
        container: &str,
        bind: &Bind,
        wish: Wish,
        servers: &[u32],
    ) -> Result<Shown, StorageError> {
        let mut source = Source::open(bind)?;
        source.place.tied |= wish.receives;
        let shown = match self.find(&source, bind, wish)? {
            Some(shown) => shown,
            None => match source.root_of_volume().filter(|_| !wish.read_only_by_host && !source.place.tied) {
                // Made first, so that a container that asks for all of it later finds it.
                Some((root, inside)) => {
                    Shown { number: self.add(&root, bind.read_only, false, container)?, inside }
                }
                None => {
                    let number = self.add(&source, bind.read_only, wish.read_only_by_host, container)?;
                    Shown { number, inside: PathBuf::new() }
                }
            },
        };
        let shown = if bind.read_only { shown } else { self.let_write(container, shown, &source, servers)? };
        if let Some(export) = self.table.exports.get_mut(&shown.number) {
            *export.users.entry(container.to_owned()).or_default() |= !bind.read_only;
        }
        self.write()?;
        Ok(shown)
    }

    /// A volume that is shared and is, or has in it, what is wanted.
    fn find(&self, source: &Source, bind: &Bind, wish: Wish) -> Result<Option<Shown>, MountError> {
        let mut found = None;
        for (number, export) in &self.table.exports {
            if export.read_only_by_host != wish.read_only_by_host
                || !self.folder.is_mounted(&number.to_string())?
            {
                continue;
            }
            let Some(inside) = export.place.leads_to(&source.place) else { continue };
            let top = self.folder.find(number.to_string())?;
            if !top.is_some_and(|top| source.is_at(top.as_fd(), &inside)) {
                continue;
            }
            let shown = Shown { number: *number, inside };
            if bind.read_only || !export.read_only {
                return Ok(Some(shown));
            }
            found.get_or_insert(shown);
        }
        Ok(found)
    }

    fn add(
        &mut self,
        source: &Source,
        read_only: bool,
        read_only_by_host: bool,
        container: &str,
    ) -> Result<u64, StorageError> {
        self.table.last = self.table.last.saturating_add(1);
        let number = self.table.last;
        let users = BTreeMap::from([(container.to_owned(), false)]);
        self.table
            .exports
            .insert(number, Export { place: source.place.clone(), read_only, read_only_by_host, users });
        self.write()?;
        let made = source.mount(read_only)?;
        let name = number.to_string();
        self.folder.make_point(&name, source.folder)?;
        self.folder.attach(&name, &made)?;
        Ok(number)
    }

    /// Sees to it that a container can write to what it has. That of the host stays as it is.
    fn let_write(
        &mut self,
        container: &str,
        shown: Shown,
        source: &Source,
        servers: &[u32],
    ) -> Result<Shown, StorageError> {
        let export = self.table.exports.get_mut(&shown.number);
        let Some(export) = export.filter(|export| export.read_only && !export.place.is_read_only()) else {
            return Ok(shown);
        };
        if let Err(error) = writable::change(&self.folder, &shown.number.to_string(), true, servers) {
            tracing::warn!(
                container, volume = %source.path.display(), %error,
                "making a shared volume writable; this container gets it apart from the others, as another file system"
            );
            let number = self.add(source, false, false, container)?;
            return Ok(Shown { number, inside: PathBuf::new() });
        }
        export.read_only = false;
        Ok(shown)
    }

    /// A container uses no volume any more: those that nobody else uses are unmounted, and those that nobody
    /// else writes to are read-only again.
    pub(super) fn release(&mut self, container: &str, servers: &[u32]) -> Result<(), StorageError> {
        let mut changed = false;
        let mut failed = None;
        let numbers: Vec<u64> = self.table.exports.keys().copied().collect();
        for number in numbers {
            let Some(export) = self.table.exports.get_mut(&number) else { continue };
            let wrote = export.users.remove(container);
            changed |= wrote.is_some();
            if export.users.is_empty() {
                match unmount(&self.folder, &number.to_string()) {
                    Ok(()) => changed |= self.table.exports.remove(&number).is_some(),
                    Err(error) => failed = Some(error),
                }
            } else if wrote == Some(true) && !export.users.values().any(|writes| *writes) {
                // Somebody may still have a file open for writing: then it stays writable.
                if writable::change(&self.folder, &number.to_string(), false, servers).is_ok() {
                    export.read_only = true;
                }
            }
        }
        if changed {
            self.write()?;
        }
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    fn write(&self) -> Result<(), StorageError> {
        let path = self.dir.join(FILE);
        let text = serde_json::to_vec_pretty(&self.table).map_err(|e| StorageError::Broken(e.to_string()))?;
        write_new(&path, &text).map_err(StorageError::file("writing", &path))
    }
}

fn unmount(folder: &Dir, name: &str) -> Result<(), MountError> {
    while folder.is_mounted(name)? {
        folder.detach(name.as_ref())?;
    }
    folder.remove_point(name)
}

fn read(path: &Path) -> Result<Table, StorageError> {
    let text = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Table::default()),
        read => read.map_err(StorageError::file("reading", path))?,
    };
    serde_json::from_slice(&text)
        .map_err(|error| StorageError::Broken(format!("{}: {error}", path.display())))
}

#[cfg(test)]
mod tests;
