//! The relay: the process that serves a pod's Task endpoint and outlives the daemon.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use kuasar_common::constants::pod_files;

use super::{Environment, host::bind};
use crate::{
    network::Forward,
    process::{Process, ProcessError, Rights, Spawn},
    vmm::Vm,
};

/// Binds the Task endpoint. Connections queue until the relay serves them, so nobody has to wait for the
/// relay.
pub(super) fn endpoint(dir: &Path) -> io::Result<OwnedFd> {
    let listener = bind(&dir.join(pod_files::TASK_SOCKET))?.into_std()?;
    // The daemon's runtime made it non-blocking, the relay's own runtime wants it so, too.
    Ok(listener.into())
}

/// Starts the relay of a pod whose VM is running.
#[tracing::instrument(name = "start relay", level = "trace", skip_all)]
pub(super) fn spawn(
    environment: &Environment,
    dir: &Path,
    endpoint: OwnedFd,
    vm: &dyn Vm,
    forward: Option<Forward>,
    (cgroup_procs, rights): (&[PathBuf], Rights),
) -> Result<Process, ProcessError> {
    let program = &environment.relay;
    let mut spawn = Spawn::new(program);
    let listen = spawn.fd(endpoint);
    let vmm = vm.pidfd().try_clone_to_owned().map_err(|source| ProcessError {
        doing: "passing the VMM to",
        program: program.display().to_string(),
        source,
    })?;
    let vmm = spawn.fd(vmm);
    spawn.args(["serve".as_ref(), "--pod-dir".as_ref(), dir.as_os_str()]);
    spawn.args(["--guest", &vm.address().to_string()]);
    spawn.args(["--address".as_ref(), environment.containerd.as_os_str()]);
    spawn.args(["--listen-fd", &listen.to_string(), "--vmm-pidfd", &vmm.to_string()]);
    if let Some(Forward { listener, link }) = forward {
        let listener = spawn.fd(listener);
        spawn.args(["--forward-fd", &listener.to_string()]);
        // Nothing is done with it; it only has to stay open.
        spawn.fd(link);
    }
    spawn.rights(rights).cgroup_procs(cgroup_procs).pod(dir).log(dir.join(pod_files::LOG).join("relay.log"));
    spawn.spawn()
}
