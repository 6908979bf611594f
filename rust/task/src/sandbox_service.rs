//! The pod's own service: everything about the VM that is not a container.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use kuasar_common::{
    api::{
        sandbox::{
            CheckRequest, Envelope, ExecVMProcessRequest, ExecVMProcessResponse, GetEventsRequest,
            SetupSandboxRequest, ShutdownRequest, SyncClockPacket, UpdateInterfacesRequest,
            UpdateRoutesRequest,
        },
        sandbox_ttrpc::SandboxService,
    },
    constants::GUEST_STATE_DIR,
    nftables::{self, MakeError},
};
use protobuf::well_known_types::empty::Empty;
use rustix::mount::{UnmountFlags, unmount};
use tokio::time::timeout;
use ttrpc::r#async::TtrpcContext;

use crate::{
    clock,
    container::Container,
    error::TaskError,
    netlink::{Network, plan},
    sandbox,
    tasks::{Context, Tasks},
    vm_process,
};

/// Longest time that killed containers may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(5);
const SIGTERM: u32 = 15;
const SIGKILL: u32 = 9;

/// The service.
#[derive(Clone)]
pub struct Sandbox {
    tasks: Arc<Tasks>,
    debug: bool,
}

impl Sandbox {
    /// A service for the VM that runs these containers. `debug` lets the host run processes outside of them.
    #[must_use]
    pub fn new(tasks: Arc<Tasks>, debug: bool) -> Self {
        Self { tasks, debug }
    }

    /// Stops every container, then syncs and unmounts file systems: the VM may end after this.
    pub async fn leave(&self, grace: Duration) {
        self.stop(grace).await;
        self.tasks.context.storages.leave();
        rustix::fs::sync();
        // Detached, because a container that could not be killed may hold it.
        if let Err(error) = unmount(GUEST_STATE_DIR, UnmountFlags::DETACH) {
            log::info!("unmounting {GUEST_STATE_DIR}: {error}");
        }
    }

    async fn stop(&self, grace: Duration) {
        let containers = self.tasks.all();
        if !grace.is_zero() {
            signal(&containers, SIGTERM, false);
            let _ = timeout(grace, gone(&containers)).await;
        }
        signal(&containers, SIGKILL, true);
        let _ = timeout(KILL_DEADLINE, gone(&containers)).await;
    }
}

fn signal(containers: &[Arc<Container>], signal: u32, all: bool) {
    for container in containers.iter().filter(|container| container.init.exit().is_none()) {
        let sent = if all { container.kill_all(signal) } else { container.init.kill(signal) };
        if let Err(error) = sent {
            log::info!("stopping container {}: {error}", container.id);
        }
    }
}

async fn gone(containers: &[Arc<Container>]) {
    for container in containers {
        let _ = container.init.exited().wait_for(Option::is_some).await;
    }
}

/// Says whose wish it was that the guest cannot fulfil.
fn of_a_plugin(error: TaskError) -> TaskError {
    TaskError::FailedPrecondition(format!(
        "{error}; a CNI plugin has set it in the pod's network namespace: take it out of that plugin's configuration, or use a guest \
         kernel that has it"
    ))
}

fn rules_of_a_plugin(error: &MakeError) -> TaskError {
    TaskError::FailedPrecondition(format!(
        "a CNI plugin has left nftables rules in the pod's network namespace, and the guest has to have the same: {error}; use a CNI \
         plugin with simpler rules, or a guest kernel that has more of nftables (mini)"
    ))
}

fn setup(context: &Context, req: &SetupSandboxRequest) -> Result<(), TaskError> {
    // Checked first: a wrong request changes nothing.
    let links: Vec<plan::Link> = plan::all(&req.interfaces)?;
    let routes: Vec<plan::Route> = plan::all(&req.routes)?;
    let neighbours: Vec<plan::Neighbour> = plan::all(&req.neighbours)?;
    clock::set(req.clock_ns)?;
    sandbox::set_hostname(&req.hostname)?;
    sandbox::set_resolv_conf(&req.resolv_conf)?;
    sandbox::set_shm_size(req.shm_size)?;
    context.cgroups.limit_processes(req.pids_limit)?;
    if req.shared_pid_namespace {
        context.pids.make(&context.reaper)?;
    }
    let mut network = Network::new()?;
    network.loopback_up()?;
    network.name_links(&links)?;
    // Before a link is up: it may be about what a link does then.
    sandbox::set_sysctls(&req.network_sysctls).map_err(of_a_plugin)?;
    nftables::make(&req.nftables).map_err(|error| rules_of_a_plugin(&error))?;
    network.configure_links(&links)?;
    // Neighbours first: a gateway may be reachable only through one.
    network.add_neighbours(&neighbours)?;
    network.add_routes(&routes)?;
    // Last: names of links occur in them.
    sandbox::set_sysctls(&req.sysctls)
}

#[async_trait]
impl SandboxService for Sandbox {
    async fn setup_sandbox(&self, _: &TtrpcContext, req: SetupSandboxRequest) -> ttrpc::Result<Empty> {
        setup(&self.tasks.context, &req)?;
        log::info!("sandbox {} is set up", req.sandbox_id);
        Ok(Empty::new())
    }

    async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn sync_clock(&self, _: &TtrpcContext, req: SyncClockPacket) -> ttrpc::Result<SyncClockPacket> {
        let mut answer = req;
        answer.ClientArriveTime = clock::now_ns();
        if answer.Delta != 0 {
            clock::correct(answer.Delta)?;
        }
        answer.ServerSendTime = clock::now_ns();
        Ok(answer)
    }

    async fn update_interfaces(
        &self,
        _: &TtrpcContext,
        req: UpdateInterfacesRequest,
    ) -> ttrpc::Result<Empty> {
        let links: Vec<plan::Link> = plan::all(&req.interfaces)?;
        Network::new()?.configure_links(&links)?;
        Ok(Empty::new())
    }

    async fn update_routes(&self, _: &TtrpcContext, req: UpdateRoutesRequest) -> ttrpc::Result<Empty> {
        let routes: Vec<plan::Route> = plan::all(&req.routes)?;
        let neighbours: Vec<plan::Neighbour> = plan::all(&req.neighbours.neighbours)?;
        let mut network = Network::new()?;
        // First: a gateway may be reachable only through one.
        if req.neighbours.is_some() {
            network.replace_neighbours(&neighbours)?;
        }
        network.replace_routes(&routes)?;
        Ok(Empty::new())
    }

    async fn exec_vm_process(
        &self,
        _: &TtrpcContext,
        req: ExecVMProcessRequest,
    ) -> ttrpc::Result<ExecVMProcessResponse> {
        if !self.debug {
            let why = "running a process outside containers is off in this VM: start the pod with task.debug on the kernel command line";
            return Err(TaskError::FailedPrecondition(why.to_owned()).into());
        }
        let reaper = &self.tasks.context.reaper;
        let output = vm_process::run(reaper, &req.command, &req.stdin, vm_process::DEADLINE).await?;
        Ok(ExecVMProcessResponse {
            out: String::from_utf8_lossy(&output.bytes).into_owned(),
            exit_status: output.exit.code,
            truncated: output.truncated,
            ..Default::default()
        })
    }

    async fn get_events(&self, _: &TtrpcContext, req: GetEventsRequest) -> ttrpc::Result<Envelope> {
        Ok(self.tasks.context.events.next(req.after).await?)
    }

    async fn shutdown(&self, _: &TtrpcContext, req: ShutdownRequest) -> ttrpc::Result<Empty> {
        let this = self.clone();
        let grace = Duration::from_millis(u64::from(req.timeout_ms));
        // In a task of its own: it goes on when the caller goes away.
        let done = tokio::spawn(async move { this.leave(grace).await });
        done.await.map_err(|error| TaskError::Internal(error.to_string()))?;
        Ok(Empty::new())
    }
}
