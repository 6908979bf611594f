//! The places that the daemon uses on the host: a folder for the pods and one for its socket, which nobody
//! else can write to.

use std::{
    fs::{self, DirBuilder, File, Metadata, OpenOptions, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use crate::pod::folder;

/// A file in the folder of the pods: everything in it that is not a pod's was there by somebody's will, and
/// is left alone.
const MARKER: &str = ".kuasar";
/// The lock, in the same folder.
pub(crate) const LOCK: &str = ".lock";
/// Mode of both folders.
const MODE: u32 = 0o700;
/// Default folder of all daemons' sockets.
const SOCKETS: &str = "/run/kuasar";
/// Mode of the socket: any client that may connect may have any folder of the host mounted.
pub(crate) const SOCKET_MODE: u32 = 0o600;
/// Number of foreign things that an error names.
const NAMED: usize = 3;

/// Why a place cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Reading or making it.
    #[error("{doing} {}: {source}", path.display())]
    Io {
        /// The action that failed.
        doing: &'static str,
        /// The file or folder concerned.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Others could put their own in the place of what is there.
    #[error(
        "{option} {} is not safe: {} {why}, so others than root could change what the daemon works with; take a place of root's own, or \
         `chown root` and `chmod go-w` that one", path.display(), writable.display()
    )]
    Open {
        /// The command line's option.
        option: &'static str,
        /// Its value.
        path: PathBuf,
        /// The folder at fault, the place itself or one above it.
        writable: PathBuf,
        /// Its owner, or the users that may write to it.
        why: String,
    },
    /// Something in it is not ours.
    #[error(
        "--dir {} holds things that no vmm-sandboxer made ({found}); give --dir a folder of its own, in which every folder of a \
         sandbox is made and removed, or empty this one", path.display()
    )]
    Foreign {
        /// The folder.
        path: PathBuf,
        /// Names of some of them.
        found: String,
    },
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PlaceError {
    let path = path.to_owned();
    move |source| PlaceError::Io { doing, path, source }
}

/// Makes the folder of the pods the daemon's own.
///
/// # Errors
/// When others can write to it, or it holds their things.
pub(crate) fn take_pods_folder(dir: &Path) -> Result<(), PlaceError> {
    make(dir)?;
    check_safe("--dir", dir)?;
    let marker = dir.join(MARKER);
    if fs::symlink_metadata(&marker).is_err() {
        check_ours(dir)?;
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&marker);
        made.map_err(failed("creating", &marker))?;
    }
    set_mode(dir)
}

/// Makes the folder of the socket, or sees that nobody else can write to it.
///
/// # Errors
/// When others can.
pub(crate) fn take_socket_folder(dir: &Path) -> Result<(), PlaceError> {
    make(dir)?;
    check_safe("--listen", dir)?;
    // Another folder may have other uses.
    if dir == Path::new(SOCKETS) { set_mode(dir) } else { Ok(()) }
}

/// Whatever the umask says.
fn make(dir: &Path) -> Result<(), PlaceError> {
    DirBuilder::new().recursive(true).mode(MODE).create(dir).map_err(failed("creating", dir))
}

fn set_mode(dir: &Path) -> Result<(), PlaceError> {
    let file = File::open(dir).map_err(failed("opening", dir))?;
    let mode = file.metadata().map_err(failed("examining", dir))?.mode();
    if mode & 0o7777 == MODE {
        return Ok(());
    }
    file.set_permissions(Permissions::from_mode(MODE)).map_err(failed("setting the mode of", dir))
}

/// Checks that no other user may write to a folder on the way. Such a user can put a folder of their own in
/// the place of one below it; in a sticky folder, as `/tmp` is, only in the place of their own.
fn check_safe(option: &'static str, dir: &Path) -> Result<(), PlaceError> {
    let real = fs::canonicalize(dir).map_err(failed("finding", dir))?;
    for folder in real.ancestors() {
        let found = fs::symlink_metadata(folder).map_err(failed("examining", folder))?;
        if let Some(why) = open_to_others(&found, folder == real) {
            let (path, writable) = (dir.to_owned(), folder.to_owned());
            return Err(PlaceError::Open { option, path, writable, why });
        }
    }
    Ok(())
}

fn open_to_others(found: &Metadata, itself: bool) -> Option<String> {
    let (uid, gid, mode) = (found.uid(), found.gid(), found.mode());
    if uid != 0 && uid != rustix::process::geteuid().as_raw() {
        return Some(format!("belongs to user {uid}"));
    }
    let by_group = mode & 0o020 != 0 && gid != 0;
    let sticky = mode & 0o1000 != 0 && !itself;
    let open = (mode & 0o002 != 0 || by_group) && !sticky;
    open.then(|| format!("has mode {:04o} and group {gid}", mode & 0o7777))
}

/// Checks that a folder that no daemon has taken yet may become a daemon's: it is empty, or has only what
/// older daemons made.
fn check_ours(dir: &Path) -> Result<(), PlaceError> {
    let mut foreign = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed("listing", dir))? {
        let entry = entry.map_err(failed("listing", dir))?;
        let path = entry.path();
        if entry.file_name() != LOCK && !folder::is_pods(&path) && !folder::is_unfinished(&path) {
            foreign.push(format!("{:?}", entry.file_name()));
        }
    }
    if foreign.is_empty() {
        return Ok(());
    }
    foreign.sort();
    let more = foreign.len().saturating_sub(NAMED);
    foreign.truncate(NAMED);
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    Err(PlaceError::Foreign { path: dir.to_owned(), found: format!("{}{more}", foreign.join(", ")) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn a_new_folder_is_taken_with_its_mode_and_again() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("a/pods");
        for _ in 0..2 {
            take_pods_folder(&dir).unwrap();
            assert_eq!(mode(&dir), 0o700);
        }
        // What was readable for all is not any more.
        chmod(&dir, 0o755);
        take_pods_folder(&dir).unwrap();
        assert_eq!(mode(&dir), 0o700);
        // Others' things that come later stop nobody.
        fs::write(dir.join("note"), "").unwrap();
        take_pods_folder(&dir).unwrap();
    }

    #[test]
    fn a_folder_of_others_things_is_refused_with_their_names() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("kuasar");
        fs::create_dir_all(dir.join("qemu")).unwrap();
        let error = take_pods_folder(&dir).unwrap_err().to_string();
        assert!(error.contains("holds things that no vmm-sandboxer made (\"qemu\"); give --dir"), "{error}");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing is written there");
        for name in ["b", "c", "d"] {
            fs::write(dir.join(name), "").unwrap();
        }
        let error = take_pods_folder(&dir).unwrap_err().to_string();
        assert!(error.contains("(\"b\", \"c\", \"d\" and 1 more)"), "{error}");
    }

    #[test]
    fn a_folder_of_an_older_daemon_is_taken() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("pods");
        fs::create_dir_all(dir.join("p1")).unwrap();
        fs::write(dir.join("p1/pod.json"), "{}").unwrap();
        fs::write(dir.join(LOCK), "").unwrap();
        fs::create_dir_all(dir.join("0".repeat(64)).join("log")).unwrap();
        take_pods_folder(&dir).unwrap();
    }

    #[test]
    fn places_that_others_can_write_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("pods");
        fs::create_dir(&dir).unwrap();
        for mode in [0o777, 0o702, 0o1777] {
            chmod(&dir, mode);
            for error in [take_pods_folder(&dir), take_socket_folder(&dir)] {
                let error = error.unwrap_err().to_string();
                assert!(
                    error.contains(&format!("has mode {mode:04o}")) && error.contains("chmod go-w"),
                    "{error}"
                );
            }
        }
        chmod(&dir, 0o700);
        chmod(root.path(), 0o777);
        let error = take_pods_folder(&dir).unwrap_err().to_string();
        assert!(error.starts_with("--dir ") && error.contains("0777"), "{error}");
        // As /tmp is.
        chmod(root.path(), 0o1777);
        take_pods_folder(&dir).unwrap();
        take_socket_folder(&dir).unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(root.path(), Some(1000), None).unwrap();
            let error = take_pods_folder(&dir).unwrap_err().to_string();
            assert!(error.contains("belongs to user 1000"), "{error}");
        }
    }
}
