//! Virtual machines: what a pod asks of a hypervisor, and what it gets.
//!
//! A hypervisor is one folder below this one that implements [`Hypervisor`] and [`Vm`], and one line where
//! the configuration names it. Nothing outside that folder knows its command line or its control protocol.

mod config;
mod device;
mod error;
mod logs;
mod preflight;
pub mod qemu;
mod ready;
mod rights;
mod root;
mod supervisor;
mod vsock;

use std::{
    collections::BTreeMap,
    fmt,
    os::fd::BorrowedFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use kuasar_common::address::GuestAddress;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub use self::{
    config::{
        Accel, FileServer, FileServerSandbox, InodeFileHandles, Machine, Root, ShareFs, VmConfig, VsockKind,
    },
    device::{Bus, BusKind, DeviceAddress, DeviceInfo, Nic},
    error::{PreflightError, VmError},
    ready::{ReadyError, ReadyGuest, ReadyListener, VsockHub},
    rights::relay as relay_rights,
    root::{Verity, words as root_words},
};
pub(crate) use self::{error::with_status, logs::bound_all as bound_logs, ready::understand};
use crate::{
    config::{Config, HypervisorKind},
    process::ProcessRecord,
};

/// The hypervisor that the configuration names.
#[must_use]
pub fn new(config: &Config) -> Arc<dyn Hypervisor> {
    match config.sandbox.hypervisor {
        HypervisorKind::Qemu => Arc::new(qemu::Qemu::new(config.vm())),
    }
}

/// Parts of one pod's VM, beyond those that the configuration gives all pods.
#[derive(Debug)]
pub struct VmSpec {
    /// The pod's id: only used in names and messages.
    pub pod: String,
    /// The pod's folder; `shared/` and `log/` exist in it.
    pub dir: PathBuf,
    /// Network namespace in which the VM's processes run; `None`: the daemon's own.
    pub netns: Option<PathBuf>,
    /// `cgroup.procs` files that every process of the VM writes itself to before it executes.
    pub cgroup_procs: Vec<PathBuf>,
    /// Virtual CPUs, at least 1.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Devices present at boot, in this order.
    pub devices: Vec<DeviceInfo>,
    /// Appended to the guest's command line.
    pub kernel_params: String,
    /// User and group id of the processes that need not be root's. `None`: the daemon's own, and nothing is
    /// confined.
    pub user: Option<u32>,
    /// Readiness of the kernel to end its processes when memory runs out.
    pub oom_score_adj: i32,
}

/// Everything that is needed to find a running VM again after the daemon was restarted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRecord {
    /// The pod's folder.
    pub dir: PathBuf,
    /// The hypervisor's process.
    pub vmm: ProcessRecord,
    /// Its companions by name (`virtiofsd`, `vhost-device-vsock`); they live and die with it.
    pub companions: BTreeMap<String, ProcessRecord>,
    /// Context id, when the guest is on the kernel's vsock.
    pub cid: Option<u32>,
    /// Buses and what is plugged into them.
    pub buses: Vec<Bus>,
}

/// The end of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmExit {
    /// Exit status as a shell shows it (128 + signal for a killed process); `None` when it was not our child
    /// because the daemon was restarted since, and so nobody can know.
    pub code: Option<u32>,
    /// When it was noticed.
    pub at: SystemTime,
}

/// A kind of VMM with its configuration.
#[async_trait]
pub trait Hypervisor: Send + Sync + fmt::Debug {
    /// Name in configuration and paths, e.g. `qemu`.
    fn name(&self) -> &'static str;

    /// Checks that VMs can be started at all: programs, kernel, image, accelerator. Called when the daemon
    /// starts.
    async fn preflight(&self) -> Result<(), PreflightError>;

    /// Starts a VM and its companions. Returns when all processes are there and the VM was told to run;
    /// the guest's agent is awaited by [`Vm::ready`]. On error nothing is left running.
    async fn start(&self, spec: VmSpec) -> Result<Arc<dyn Vm>, VmError>;

    /// Finds a VM again that an earlier daemon started. `None`: it is not running any more, and its
    /// companions were ended.
    async fn adopt(&self, record: VmRecord) -> Result<Option<Arc<dyn Vm>>, VmError>;
}

/// A running VM. Dropping it changes nothing: VMs outlive the daemon.
#[async_trait]
pub trait Vm: Send + Sync + fmt::Debug {
    /// Process id of the VMM.
    fn pid(&self) -> u32;

    /// Readable when the VMM has ended.
    fn pidfd(&self) -> BorrowedFd<'_>;

    /// Address of the guest's vsock ports.
    fn address(&self) -> GuestAddress;

    /// The VM's part of the pod's record; changes with every hot-plug.
    fn record(&self) -> VmRecord;

    /// Waits until the guest's agent has called. Can be called once, and not on an adopted VM. Ends early,
    /// with the log's last lines, when the VM ends or a companion does.
    async fn ready(&self, deadline: Duration) -> Result<ReadyGuest, VmError>;

    /// Changes each time the VM goes on after a pause, whoever resumed it; closed at its end. `None`: nobody
    /// tells.
    fn resumptions(&self) -> Option<watch::Receiver<u64>> {
        None
    }

    /// The VMM's threads that are the guest's CPUs, by thread id; none when the VMM does not tell.
    async fn vcpu_threads(&self) -> Result<Vec<u32>, VmError> {
        Ok(Vec::new())
    }

    /// Plugs a device into the running VM.
    async fn hot_attach(&self, device: DeviceInfo) -> Result<DeviceAddress, VmError>;

    /// Returns true if [`Vm::hot_attach`] can work at all with this VM.
    fn can_hot_attach(&self) -> bool {
        false
    }

    /// Number of further devices that it can take.
    fn free_slots(&self) -> usize {
        0
    }

    /// Unplugs a device by its id. A device that is not there is no error.
    async fn hot_detach(&self, id: &str) -> Result<(), VmError>;

    /// Checks that the VMM still answers and the VM runs.
    async fn ping(&self) -> Result<(), VmError>;

    /// Ends the VM and its companions; returns when none of them is left. `force` skips asking the VMM to
    /// quit. Idempotent.
    async fn stop(&self, force: bool, deadline: Duration) -> Result<(), VmError>;

    /// Waits for the end of the VMM. Its companions have been ended when this returns. Any number of callers.
    async fn wait(&self) -> VmExit;
}
