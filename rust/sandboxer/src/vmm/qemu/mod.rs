//! QEMU, version 8.2 or later.

mod args;
mod clock;
mod events;
mod plug;
mod qmp;
mod start;

use std::{
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use kuasar_common::{
    address::GuestAddress,
    constants::pod_files::{LOG, VSOCK_SOCKET},
};
use tokio::{
    net::UnixStream,
    process::Command,
    sync::{OnceCell, watch},
    time::timeout,
};

use self::plug::Plugged;
use super::{
    Accel, Bus, DeviceAddress, DeviceInfo, Hypervisor, PreflightError, ReadyGuest, ReadyListener, Vm,
    VmConfig, VmError, VmExit, VmRecord, VmSpec, VsockHub, VsockKind,
    error::with_status,
    logs, preflight,
    supervisor::{Outcome, Supervisor},
};
use crate::process::Process;

/// Files of a pod's folder that only QEMU has.
const QMP_SOCKET: &str = "qmp.sock";
const CONSOLE_SOCKET: &str = "console.sock";
const EVENTS_SOCKET: &str = "events.sock";
/// Logs that explain a failed start, the likeliest first.
const LOGS: [&str; 4] = ["vmm.log", "virtiofsd.log", "vsock.log", "console.log"];
/// Longest time that QEMU may take to answer a command.
const QMP_DEADLINE: Duration = Duration::from_secs(5);
/// Longest time that it may take to answer the first one: it does so when its machine is built.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// Longest time that it may take to list the plugged devices when the daemon is back. Far less than the
/// daemon has to find a pod again: a QEMU that stands still, on a node that swaps, is no reason to give its
/// pod up.
const STOCK_DEADLINE: Duration = Duration::from_secs(3);
/// The first version that takes `/dev/kvm` as a descriptor.
const MIN_VERSION: (u32, u32) = (8, 2);
/// Longest time that it may take to say its version: a moment, but for an emulated machine whose processors
/// are all wanted.
const VERSION_DEADLINE: Duration = Duration::from_secs(30);

/// Starts QEMU's VMs.
#[derive(Debug)]
pub struct Qemu {
    config: VmConfig,
    hub: OnceCell<VsockHub>,
    clock: OnceCell<String>,
}

impl Qemu {
    /// QEMU with a configuration that [`Hypervisor::preflight`] checks.
    #[must_use]
    pub const fn new(config: VmConfig) -> Self {
        Self { config, hub: OnceCell::const_new(), clock: OnceCell::const_new() }
    }

    /// The listener for the calls of guests on the kernel's vsock, made once.
    async fn hub(&self) -> std::io::Result<&VsockHub> {
        self.hub.get_or_try_init(|| async { VsockHub::listen() }).await
    }

    /// Kernel parameters about the host's clock; a guest under KVM asks its hypervisor. Measured once.
    async fn clock(&self) -> &str {
        match (self.config.accel, self.config.machine.architecture()) {
            (Accel::Tcg, "x86_64") => self.clock.get_or_init(clock::parameter).await,
            _ => "",
        }
    }
}

#[async_trait]
impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        "qemu"
    }

    async fn preflight(&self) -> Result<(), PreflightError> {
        let config = self.config.clone();
        let path = config.path.clone();
        let checked = tokio::task::spawn_blocking(move || preflight::check(&config)).await;
        checked.unwrap_or_else(|e| Err(PreflightError::Refused(e.to_string())))?;
        let (version, _) = tokio::join!(version(&path), self.clock());
        version?;
        // Not with the first pod: nobody is to have its port by then.
        if self.config.vsock == VsockKind::Vhost {
            self.hub().await.map_err(|error| {
                PreflightError::Refused(format!(
                    "no port of the host's vsock can be listened on for guests ({error}); load the module vhost_vsock, or set \
                     hypervisor.vsock to \"vhost-user\""
                ))
            })?;
        }
        Ok(())
    }

    async fn start(&self, mut spec: VmSpec) -> Result<Arc<dyn Vm>, VmError> {
        spec.kernel_params = format!("{} {}", self.clock().await, spec.kernel_params);
        Ok(Arc::new(start::start(self, spec).await?))
    }

    async fn adopt(&self, record: VmRecord) -> Result<Option<Arc<dyn Vm>>, VmError> {
        let mut companions = std::collections::BTreeMap::new();
        for (name, companion) in &record.companions {
            if let Some(process) = Process::adopt(*companion)? {
                companions.insert(name.clone(), process);
            }
        }
        let Some(vmm) = Process::adopt(record.vmm)? else {
            for process in companions.values() {
                process.end(Duration::ZERO).await?;
            }
            return Ok(None);
        };
        // A VM without one of its companions is broken; the supervisor ends it, as it would have done then.
        let lost = companions.len() < record.companions.len();
        let supervisor = Supervisor::new(vmm, companions);
        if lost {
            supervisor.end(Duration::ZERO).await?;
            return Ok(None);
        }
        if let Ok(console) = UnixStream::connect(record.dir.join(CONSOLE_SOCKET)).await {
            tokio::spawn(logs::copy_console(console, record.dir.join(LOG)));
        }
        let vm = QemuVm {
            resumptions: events::resumptions(record.dir.join(EVENTS_SOCKET)),
            dir: record.dir,
            cid: record.cid,
            bus: Mutex::new(record.buses),
            plugging: tokio::sync::Mutex::default(),
            supervisor,
            listener: Mutex::new(None),
        };
        if let Err(error) = vm.take_stock(&mut *vm.plugging.lock().await, STOCK_DEADLINE).await {
            tracing::warn!(%error, "asking the VMM what is plugged in; it is asked again when a disk comes or goes");
        }
        Ok(Some(Arc::new(vm)))
    }
}

/// Refuses QEMUs that are too old, or none at all.
async fn version(path: &Path) -> Result<(), PreflightError> {
    let asked = Command::new(path).arg("--version").stdin(Stdio::null()).kill_on_drop(true).output();
    let said = match timeout(VERSION_DEADLINE, asked).await {
        Ok(Ok(output)) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {VERSION_DEADLINE:?}"),
    };
    let number =
        said.split_once(" version ").map(|(_, rest)| rest.split([' ', '\n', '(']).next().unwrap_or(rest));
    let numbers = number.and_then(|number| {
        let mut parts = number.split('.').map(|part| part.parse::<u32>().ok());
        Some((parts.next()??, parts.next().flatten().unwrap_or(0)))
    });
    let found = match (number, numbers) {
        (_, Some(numbers)) if numbers >= MIN_VERSION => return Ok(()),
        (Some(number), Some(_)) => format!("is version {number}"),
        _ => format!("does not say its version but {:?}", said.trim()),
    };
    Err(PreflightError::Refused(format!(
        "the VMM {} {found} and QEMU {}.{} or later is needed; install one, or set hypervisor.path to it",
        path.display(),
        MIN_VERSION.0,
        MIN_VERSION.1
    )))
}

/// Threads of a process by the host's numbers: those that it says are of its own PID namespace.
fn on_the_host(pid: u32, named: &[u32]) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let numbers = threads.filter_map(|thread| {
        let status = std::fs::read_to_string(thread.path().join("status")).ok()?;
        let inner = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace().last()?;
        Some((inner.parse().ok()?, thread.file_name().to_str()?.parse().ok()?))
    });
    let numbers: std::collections::BTreeMap<u32, u32> = numbers.collect();
    named.iter().filter_map(|name| numbers.get(name).copied()).collect()
}

/// A VM that runs in a QEMU.
#[derive(Debug)]
struct QemuVm {
    dir: PathBuf,
    cid: Option<u32>,
    bus: Mutex<Vec<Bus>>,
    /// Held while a disk comes or goes.
    plugging: tokio::sync::Mutex<Plugged>,
    supervisor: Supervisor,
    resumptions: watch::Receiver<u64>,
    /// Until the agent has called.
    listener: Mutex<Option<ReadyListener>>,
}

impl QemuVm {
    fn logs(&self) -> String {
        logs::quote(&self.dir.join(LOG), &LOGS)
    }

    fn ended(&self, outcome: &Outcome) -> VmError {
        let why = match &outcome.because {
            Some(companion) => format!(" because {companion}"),
            None => with_status(outcome.exit.code),
        };
        VmError::Ended(format!("{why}{}{}", self.logs(), logs::advice(&self.dir.join(LOG))))
    }
}

#[async_trait]
impl Vm for QemuVm {
    fn pid(&self) -> u32 {
        self.supervisor.vmm().pid()
    }

    fn pidfd(&self) -> BorrowedFd<'_> {
        self.supervisor.vmm().pidfd()
    }

    fn address(&self) -> GuestAddress {
        match self.cid {
            Some(cid) => GuestAddress::Vsock(cid),
            None => GuestAddress::Hybrid(self.dir.join(VSOCK_SOCKET)),
        }
    }

    fn record(&self) -> VmRecord {
        VmRecord {
            dir: self.dir.clone(),
            vmm: self.supervisor.vmm().record(),
            companions: self.supervisor.companions(),
            cid: self.cid,
            buses: self.bus.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    async fn ready(&self, deadline: Duration) -> Result<ReadyGuest, VmError> {
        let listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(listener) = listener else {
            return Err(VmError::Unsupported("waiting for a guest's agent that has called already".into()));
        };
        let step = "waiting for the guest's agent";
        tokio::select! {
            biased;
            ready = timeout(deadline, listener.accept()) => match ready {
                Ok(Ok(guest)) => Ok(guest),
                Ok(Err(error)) => Err(VmError::Start { step, why: error.to_string(), log: self.logs() }),
                Err(_) => Err(VmError::Deadline { doing: step, deadline, log: self.logs() }),
            },
            outcome = self.supervisor.ended() => {
                let why = self.ended(&outcome).to_string();
                Err(VmError::Start { step, why, log: String::new() })
            }
        }
    }

    fn resumptions(&self) -> Option<watch::Receiver<u64>> {
        Some(self.resumptions.clone())
    }

    async fn vcpu_threads(&self) -> Result<Vec<u32>, VmError> {
        let command = qapi::qmp::query_cpus_fast {};
        let cpus = qmp::execute(&self.dir.join(QMP_SOCKET), command, START_DEADLINE).await?;
        // The answer has a variant for each architecture, and all have this in common.
        let thread = |cpu| u32::try_from(serde_json::to_value(cpu).ok()?.get("thread-id")?.as_i64()?).ok();
        let named: Vec<u32> = cpus.iter().filter_map(thread).collect();
        Ok(on_the_host(self.pid(), &named))
    }

    async fn hot_attach(&self, device: DeviceInfo) -> Result<DeviceAddress, VmError> {
        match self.supervisor.outcome() {
            Some(outcome) => Err(self.ended(&outcome)),
            None => self.plug(device).await,
        }
    }

    async fn hot_detach(&self, id: &str) -> Result<(), VmError> {
        self.unplug(id).await
    }

    fn can_hot_attach(&self) -> bool {
        self.bus.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|bus| bus.id == plug::BUS)
    }

    fn free_slots(&self) -> usize {
        let buses = self.bus.lock().unwrap_or_else(PoisonError::into_inner);
        let plug = buses.iter().find(|bus| bus.id == plug::BUS);
        plug.map_or(0, |bus| usize::try_from(bus.slots).unwrap_or(0).saturating_sub(bus.used.len()))
    }

    async fn ping(&self) -> Result<(), VmError> {
        match self.supervisor.outcome() {
            Some(outcome) => Err(self.ended(&outcome)),
            None => qmp::ping(&self.dir.join(QMP_SOCKET), QMP_DEADLINE).await,
        }
    }

    async fn stop(&self, force: bool, deadline: Duration) -> Result<(), VmError> {
        if force {
            return self.supervisor.end(Duration::ZERO).await;
        }
        if self.supervisor.outcome().is_none() {
            // QEMU may end before it answers, and SIGTERM follows anyway.
            let quit = qapi::qmp::quit {};
            drop(qmp::execute(&self.dir.join(QMP_SOCKET), quit, deadline.min(QMP_DEADLINE) / 2).await);
        }
        self.supervisor.end(deadline).await
    }

    async fn wait(&self) -> VmExit {
        self.supervisor.ended().await.exit
    }
}

#[cfg(test)]
mod tests;
