//! `serve`: takes over the descriptors that the daemon hands down, and serves until it is ended.

use std::{
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use kuasar_common::{
    constants::pod_files,
    streaming::route::{Incoming, Purpose, Rewound, purpose},
};
use rustix::{
    net::sockopt::socket_acceptconn,
    process::{Resource, getrlimit, setrlimit},
};
use tokio::{
    net::{TcpListener, UnixListener, UnixStream},
    sync::mpsc,
    time::sleep,
};
use ttrpc::asynchronous::{Server, transport::Listener};

use crate::{
    args::Serve,
    events, forward,
    guest::Guest,
    host::Host,
    log::{log, name_pod},
    rights,
    streams::Streams,
    task::Relay,
    vm::Vm,
};

/// Connections that wait for ttrpc's server.
const WAITING: usize = 16;
/// Pause after a connection could not be accepted, as when there are no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why a relay could not begin.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each says itself what it is")]
pub enum ServeError {
    #[error("reading the pod's token {path}: {source}")]
    Token { path: PathBuf, source: io::Error },
    #[error("reading the pod's token {path}: it is not 64 hexadecimal digits")]
    BadToken { path: PathBuf },
    #[error("taking over file descriptor {fd} as {what}: {source}")]
    Descriptor { fd: i32, what: &'static str, source: io::Error },
    #[error("listening on the Task endpoint: {0}")]
    Listener(io::Error),
    #[error("starting the runtime: {0}")]
    Runtime(io::Error),
    #[error("watching the VM's process: {0}")]
    Vm(io::Error),
    #[error("serving the Task endpoint: {0}")]
    Server(#[from] ttrpc::Error),
}

/// Serves; returns only with an error.
///
/// # Errors
/// When what the daemon hands down is not what it should be, or the endpoint cannot be served.
pub fn serve(args: Serve) -> Result<(), ServeError> {
    let pod = args.pod_dir.file_name().unwrap_or(args.pod_dir.as_os_str());
    name_pod(&pod.to_string_lossy());
    rights::give_up();
    let token = read_token(&args.pod_dir)?;
    let listens = |fd: &OwnedFd| {
        if socket_acceptconn(fd)? { Ok(()) } else { Err(wrong("it does not listen".to_owned())) }
    };
    let listener = inherited(args.listen_fd, "the listening socket", listens)?;
    let forward = args
        .forward_fd
        .map(|fd| inherited(fd, "the listening socket of port-forward", listens))
        .transpose()?;
    let is_pidfd = |fd: &OwnedFd| {
        let target = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if target.to_string_lossy().contains("pidfd") {
            Ok(())
        } else {
            Err(wrong(format!("it is {}", target.display())))
        }
    };
    let pidfd = args.vmm_pidfd.map(|fd| inherited(fd, "the VMM's pidfd", is_pidfd)).transpose()?;
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    runtime.map_err(ServeError::Runtime)?.block_on(async {
        let vm = Vm::new(pidfd).map_err(ServeError::Vm)?;
        let guest = Guest::new(args.guest, token, vm);
        let relay = Relay::new(guest, Host::new(&args.pod_dir));
        let listener = listen(listener).map_err(ServeError::Listener)?;
        let (calls, incoming) = mpsc::channel(WAITING);
        let server = Server::new().add_listener(Listener::new(Incoming(incoming)));
        let mut server = server.register_service(relay.service());
        server.start().await?;
        tokio::spawn(route(listener, calls, Arc::clone(&relay.streams)));
        log!("serving, process {}", std::process::id());
        let relay: Arc<Relay> = relay;
        if let Some(listener) = forward {
            let listener = TcpListener::from_std(listener.into()).map_err(ServeError::Listener)?;
            tokio::spawn(forward::serve(listener, Arc::clone(&relay.guest)));
        }
        events::forward(&relay, &args.containerd).await;
        // SIGTERM, which has its default effect, is how a relay ends: there is nothing to say or save then.
        std::future::pending().await
    })
}

fn listen(socket: OwnedFd) -> io::Result<UnixListener> {
    let listener = std::os::unix::net::UnixListener::from(socket);
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Hands connections to the streams or to ttrpc's own server: their first frame tells.
async fn route(listener: UnixListener, calls: mpsc::Sender<Rewound<UnixStream>>, streams: Arc<Streams>) {
    loop {
        let connection = match listener.accept().await {
            Ok((connection, _)) => connection,
            Err(e) => {
                log!("accepting a connection: {e}");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (calls, streams) = (calls.clone(), Arc::clone(&streams));
        tokio::spawn(async move {
            match purpose(connection).await {
                Ok(Purpose::Stream(connection, first)) => streams.serve(connection, &first).await,
                Ok(Purpose::Calls(connection)) => drop(calls.send(connection).await),
                Ok(Purpose::Nothing) => {}
                Err(e) => log!("a connection to the Task endpoint: {e}"),
            }
        });
    }
}

fn wrong(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

fn read_token(pod_dir: &Path) -> Result<String, ServeError> {
    let path = pod_dir.join(pod_files::TOKEN);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(source) => return Err(ServeError::Token { path, source }),
    };
    let token = text.trim();
    if token.len() == 64 && token.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        Ok(token.to_owned())
    } else {
        Err(ServeError::BadToken { path })
    }
}

/// Owns a descriptor that this process was started with, after `check` found it to be what it should be.
fn inherited(
    fd: i32,
    what: &'static str,
    check: impl FnOnce(&OwnedFd) -> io::Result<()>,
) -> Result<OwnedFd, ServeError> {
    let failed = |source| ServeError::Descriptor { fd, what, source };
    // An `OwnedFd` of a closed descriptor would be undefined behaviour: ask the kernel by path first.
    fs::symlink_metadata(format!("/proc/self/fd/{fd}"))
        .map_err(|_| failed(io::Error::new(io::ErrorKind::NotFound, "it is not open")))?;
    // SAFETY: the descriptor is open, numbered 3 or more, and was inherited for this use: nothing else here
    // has it, as nothing was opened yet that is still open.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    check(&fd).map_err(failed)?;
    Ok(fd)
}

/// Containers and execs take up to seven descriptors each; the usual soft limit of 1024 is for programs that
/// `select`.
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(e) = setrlimit(Resource::Nofile, limit) {
        log!("raising the limit of open files: {e}");
    }
}
