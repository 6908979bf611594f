//! The agent as a whole: its ports, its services, its life.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use containerd_shim_protos::shim_async::create_task;
use kuasar_common::{
    api::sandbox_ttrpc::create_sandbox_service,
    constants::{CID_HOST, GUEST_RUNC, PORT_DEBUG, PORT_FORWARD, PORT_STDIO, PORT_TTRPC},
    streaming::route::Incoming,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};
use ttrpc::r#async::{Server, Service, transport::Listener};

use crate::{
    auth::{Token, guarded},
    boot::{self, BootError},
    calls::Calls,
    config::TaskConfig,
    console::Consoles,
    forward::Forwards,
    handshake::{HandshakeError, HostLink},
    limits::{panic_message, unless_it_panics},
    reaper::Reaper,
    role::Role,
    runc::{Deadlines, Runc},
    sandbox_service::Sandbox,
    stdio::{listener::StdioListener, registry::Registry},
    streaming::Streaming,
    task_service::TaskService,
    tasks::{Context, Tasks},
    transport::SmallWrites,
};

/// The host listens before it starts the VM, so this is only for a device that is late: on a host with too
/// much to do, by more than 5 s. The daemon ends a VM that has not called in its own time, 60 s unless
/// configured.
const CONNECT_DEADLINE: Duration = Duration::from_secs(30);
const CONNECT_PAUSE: Duration = Duration::from_millis(20);
/// Connections that wait for ttrpc's server to take them.
const MAX_WAITING: usize = 16;
/// Time between SIGTERM and SIGKILL of containers when the VM is ended by a signal.
const SIGNAL_GRACE: Duration = Duration::from_secs(10);
/// `asm-generic/signal.h`; the same on x86-64 and aarch64.
const SIGPWR: i32 = 30;

/// Why the agent cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Bringing the guest up failed.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A port of ours, or the host's.
    #[error("{0}: {1}")]
    Port(String, io::Error),
    /// The host and we did not get together.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The services could not be started.
    #[error("serving port {PORT_TTRPC}: {0}")]
    Serve(#[from] ttrpc::Error),
    /// A defect of the agent.
    #[error("a defect of the agent: it panicked: {0}")]
    Panic(String),
}

/// The agent's services, each method behind the token. `debug` lets the host run processes outside
/// containers.
#[must_use]
pub fn services(tasks: &Arc<Tasks>, token: &Arc<Token>, debug: bool) -> HashMap<String, Service> {
    let mut services = create_task(Arc::new(TaskService::new(Arc::clone(tasks))));
    services.extend(create_sandbox_service(Arc::new(Sandbox::new(Arc::clone(tasks), debug))));
    guarded(services, token)
}

/// Boots the rest of the guest and serves it until the VM ends.
///
/// # Errors
/// When the agent cannot do its work. The host has been told why, if it could be reached.
pub async fn run(config: &TaskConfig, role: Role) -> Result<(), AgentError> {
    role.adopt().map_err(|error| AgentError::Port("becoming a subreaper".to_owned(), error))?;
    // Listening first: the host calls as soon as it has read READY.
    let ttrpc = listen(PORT_TTRPC)?;
    let stdio = listen(PORT_STDIO)?;
    let forward = listen(PORT_FORWARD)?;
    let mut host = HostLink::ready(connect(config.ready_port).await?).await?;
    let served = told(serve(config, role, [ttrpc, stdio, forward], &mut host)).await;
    match served {
        Ok(()) => Ok(()),
        Err(error) => {
            host.fatal(&error.to_string()).await;
            Err(error)
        }
    }
}

/// Turns a panic into an error: the host must be told why its VM ends.
async fn told(work: impl Future<Output = Result<(), AgentError>>) -> Result<(), AgentError> {
    unless_it_panics(work).await.unwrap_or_else(|panic| Err(AgentError::Panic(panic)))
}

async fn serve(
    config: &TaskConfig,
    role: Role,
    [ttrpc, stdio, forward]: [VsockListener; 3],
    host: &mut HostLink<VsockStream>,
) -> Result<(), AgentError> {
    let reaper = Reaper::new();
    let mut vital = JoinSet::new();
    let reaping = reaper.start().map_err(|error| AgentError::Port("receiving SIGCHLD".to_owned(), error))?;
    vital.spawn(reaping);
    boot::late(config.share, config.cgroup, role)?;
    let token = Token::new();
    token.set(host.token().await?);
    let streams = Arc::new(Registry::default());
    let context = Arc::new(Context {
        runc: Runc {
            program: GUEST_RUNC.into(),
            root: boot::RUNC_ROOT.into(),
            logs: boot::WORK.into(),
            no_pivot: boot::root_is_initramfs(),
            reaper: Arc::clone(&reaper),
            calls: AtomicU64::new(0),
            deadlines: Deadlines::default(),
            turns: Default::default(),
        },
        reaper,
        events: Arc::default(),
        oom: Arc::default(),
        pids: Default::default(),
        streams: Arc::clone(&streams),
        storages: Arc::default(),
        work: boot::WORK.into(),
        cgroups: boot::hierarchies(config.cgroup),
    });
    let tasks = Arc::new(Tasks::new(context));
    if let Some(shell) = &config.debug_shell {
        let port = listen(PORT_DEBUG)?;
        let consoles = Consoles::new(shell, Arc::clone(&token), Arc::clone(&tasks.context.reaper));
        vital.spawn(async move {
            loop {
                consoles.accept(Box::new(accepted(&port, PORT_DEBUG).await));
            }
        });
    }
    end_on_signal(Sandbox::new(Arc::clone(&tasks), false), role)
        .map_err(|error| AgentError::Port("receiving SIGTERM and SIGPWR".to_owned(), error))?;
    let services = services(&tasks, &token, config.debug);
    let (calls, incoming) = mpsc::channel(MAX_WAITING);
    let mut server = Server::new().add_listener(Listener::new(Incoming(incoming))).register_service(services);
    server.start().await?;
    let streaming = Streaming::new(Arc::clone(&streams), Arc::clone(&token));
    let calls = Calls::new(Arc::clone(&token), calls, streaming);
    vital.spawn(async move {
        loop {
            calls.accept(accepted(&ttrpc, PORT_TTRPC).await);
        }
    });
    let sockets = Arc::clone(&tasks.context.storages.sockets);
    let forwards = Forwards::new(Arc::clone(&token), sockets);
    vital.spawn(async move {
        loop {
            forwards.accept(Box::new(accepted(&forward, PORT_FORWARD).await));
        }
    });
    let stdio_listener = StdioListener::new(streams, token);
    vital.spawn(async move {
        loop {
            stdio_listener.accept(Box::new(accepted(&stdio, PORT_STDIO).await));
        }
    });
    Err(first_end(vital).await)
}

/// Waits for the end of a task that never ends: without it the agent would only seem to work.
async fn first_end(mut vital: JoinSet<()>) -> AgentError {
    let panic = vital.join_next().await.and_then(Result::err).and_then(|error| error.try_into_panic().ok());
    let why = panic.map_or_else(|| "a task has ended that never should".to_owned(), |p| panic_message(&*p));
    AgentError::Panic(why)
}

/// Ends the VM in order when it is told to from inside: by a person in a debug console, a kernel whose power
/// is going, or systemd that stops its services.
fn end_on_signal(sandbox: Sandbox, role: Role) -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut power = signal(SignalKind::from_raw(SIGPWR))?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = power.recv() => {}
        }
        log::warn!("told to end by a signal");
        sandbox.leave(SIGNAL_GRACE).await;
        role.end(0);
    });
    Ok(())
}

type Accepted = SmallWrites<VsockStream>;

/// The next connection to a port.
async fn accepted(listener: &VsockListener, port: u32) -> Accepted {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return SmallWrites(stream),
            Err(error) => {
                log::warn!("accepting on port {port}: {error}");
                sleep(CONNECT_PAUSE).await;
            }
        }
    }
}

fn listen(port: u32) -> Result<VsockListener, AgentError> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .map_err(|error| AgentError::Port(format!("listening on vsock port {port}"), error))
}

async fn connect(port: u32) -> Result<VsockStream, AgentError> {
    let started = Instant::now();
    loop {
        match VsockStream::connect(VsockAddr::new(CID_HOST, port)).await {
            Ok(stream) => return Ok(stream),
            Err(error) if started.elapsed() > CONNECT_DEADLINE => {
                return Err(AgentError::Port(format!("calling the host on vsock port {port}"), error));
            }
            Err(error) => log::info!("calling the host: {error}"),
        }
        sleep(CONNECT_PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_becomes_the_reason_that_the_host_is_told() {
        let broken = told(async {
            tokio::task::yield_now().await;
            panic!("no {}", "way");
        });
        let reason = broken.await.unwrap_err().to_string();
        assert_eq!(reason, "a defect of the agent: it panicked: no way");
        told(async { Ok(()) }).await.unwrap();
    }

    #[tokio::test]
    async fn the_panic_of_a_task_that_others_need_is_that_of_the_agent() {
        let mut vital = JoinSet::new();
        vital.spawn(std::future::pending());
        vital.spawn(async { panic!("no {}", "exits") });
        let reason = first_end(vital).await.to_string();
        assert_eq!(reason, "a defect of the agent: it panicked: no exits");
    }
}
