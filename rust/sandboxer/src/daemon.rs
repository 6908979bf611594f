//! The daemon's life: one instance per socket, recovery first, then service.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, Mode, flock},
    io::Errno,
    process::{Resource, Rlimit},
};
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
};
use tonic::transport::Server;

use crate::{
    containerd::SandboxList,
    controller::Controller,
    incoming::Incoming,
    notify,
    place::{self, PlaceError},
    pod::{Collector, Environment, Pods},
    vmm::PreflightError,
};

/// Schedule on which the daemon removes pods that containerd has forgotten.
#[derive(Clone, Copy, Debug)]
pub struct Collecting {
    /// The longest time between two looks.
    pub interval: Duration,
    /// Shortest time for which containerd must have forgotten a pod.
    pub grace: Duration,
}

/// Why the daemon cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// There is another one.
    #[error(
        "another vmm-sandboxer is running with {} (it holds the lock {}); stop it first, or give this one \
         other --listen and --dir", what.display(), lock.display()
    )]
    Taken {
        /// The socket or folder that both want.
        what: PathBuf,
        /// The file that says so.
        lock: PathBuf,
    },
    /// A file or socket.
    #[error("{doing} {}: {source}", path.display())]
    Io {
        /// The action that failed.
        doing: &'static str,
        /// The file or socket concerned.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Its folder or that of its socket.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// No VM could be started.
    #[error("checking whether VMs can be started: {0}")]
    Preflight(#[from] PreflightError),
    /// The gRPC server ended.
    #[error("serving containerd: {0}")]
    Serve(#[from] tonic::transport::Error),
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DaemonError {
    let path = path.to_owned();
    move |source| DaemonError::Io { doing, path, source }
}

/// The daemon's claim on its socket and its folder; given up by the kernel when the process ends, however it
/// does.
#[derive(Debug)]
pub struct Claim {
    _files: [File; 2],
}

impl Claim {
    /// Claims both.
    ///
    /// # Errors
    /// When another daemon has one of them, of which nothing is touched, or others could write to one.
    pub fn take(listen: &Path, dir: &Path) -> Result<Self, DaemonError> {
        let mut name = listen.as_os_str().to_owned();
        name.push(".lock");
        if let Some(folder) = listen.parent() {
            place::take_socket_folder(folder)?;
        }
        place::take_pods_folder(dir)?;
        Ok(Self { _files: [lock(listen, PathBuf::from(name))?, lock(dir, dir.join(place::LOCK))?] })
    }
}

fn lock(what: &Path, path: PathBuf) -> Result<File, DaemonError> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(failed("opening", &path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(DaemonError::Taken { what: what.to_owned(), lock: path }),
        Err(error) => Err(failed("locking", &path)(error.into())),
    }
}

/// Gives nobody else any right to what this process makes, and what it starts does.
pub fn keep_files_private() {
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
}

/// Lets the process have as many open files as it may: three for each pod, and 1024, the usual start, is not
/// for many.
pub fn raise_open_files() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let most = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, most) {
        tracing::warn!(%error, ?limit, "raising the limit of open files");
    }
}

/// Has all threads allocate from one arena, where glibc gives up to eight a processor and each keeps the most
/// it ever held: with them the daemon took 12 KiB a pod for a hundred pods, and nothing of it was allocated
/// in the end. To be called while there is one thread.
pub fn allocate_from_one_arena() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: takes two numbers and changes a parameter of the allocator; no other thread allocates yet.
        let accepted = unsafe { nix::libc::mallopt(nix::libc::M_ARENA_MAX, 1) };
        if accepted == 0 {
            tracing::warn!("the allocator does not take its number of arenas; the daemon uses more memory");
        }
    }
}

/// Recovers, serves, and returns when SIGTERM or SIGINT asks for it. Pods go on without the daemon.
///
/// # Errors
/// When VMs cannot be started at all, another daemon is there, or the socket cannot be served.
pub async fn run(environment: Environment, collecting: Collecting, listen: &Path) -> Result<(), DaemonError> {
    let _claim = Claim::take(listen, &environment.dir)?;
    let mut term = signal(SignalKind::terminate()).map_err(failed("handling signals for", listen))?;
    let mut int = signal(SignalKind::interrupt()).map_err(failed("handling signals for", listen))?;
    environment.hypervisor.preflight().await?;
    let (dir, containerd) = (environment.dir.clone(), environment.containerd.clone());
    let pods = Arc::new(Pods::new(environment));
    let recovered = pods.recover().await.map_err(failed("recovering the sandboxes of", &dir))?;
    let incoming = Incoming::new(bind(listen)?);
    tracing::info!(listen = %listen.display(), recovered, "ready");
    // Only now: containerd, started after us, asks once for each of its sandboxes.
    notify::ready();
    let list = Arc::new(SandboxList::new(containerd));
    let collector = Collector::new(pods.clone(), list, collecting.interval, collecting.grace);
    let server = Server::builder().add_service(Controller::new(pods.clone()).into_server());
    tokio::select! {
        // Not a graceful shutdown: calls of Wait would keep the daemon for the life of their pods.
        served = server.serve_with_incoming(incoming) => served?,
        () = collector.run() => {}
        () = pods.keep_logs_bounded() => {}
        () = notify::keep_alive() => {}
        _ = term.recv() => tracing::info!("SIGTERM: leaving, sandboxes go on"),
        _ = int.recv() => tracing::info!("SIGINT: leaving, sandboxes go on"),
    }
    notify::stopping();
    pods.leave();
    // containerd gets "unavailable" instead of a refused connection to a socket that nobody serves.
    let _ = fs::remove_file(listen);
    Ok(())
}

/// Binds the socket in place of one that a dead daemon left; the claim says that it is dead.
fn bind(listen: &Path) -> Result<UnixListener, DaemonError> {
    match fs::remove_file(listen) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("replacing the socket", listen)(error));
        }
        _ => {}
    }
    let listener = UnixListener::bind(listen).map_err(failed("listening on", listen))?;
    // Nobody else was able to connect before, either: the umask lets nobody.
    let mode = Permissions::from_mode(place::SOCKET_MODE);
    fs::set_permissions(listen, mode).map_err(failed("setting the mode of", listen))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_on_the_same_socket_or_folder_is_told_so() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        let first = Claim::take(&path("a.sock"), &path("a")).unwrap();
        let error = Claim::take(&path("a.sock"), &path("b")).unwrap_err().to_string();
        assert!(
            error.starts_with("another vmm-sandboxer is running with ") && error.contains("a.sock"),
            "{error}"
        );
        let error = Claim::take(&path("b.sock"), &path("a")).unwrap_err().to_string();
        assert!(error.contains("other --listen and --dir"), "{error}");
        drop(first);
        // Other tests fork, and for a moment their children have copies of the locked descriptors.
        let again = (0..100).find_map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            Claim::take(&path("a.sock"), &path("a")).ok()
        });
        assert!(again.is_some());
    }
}
