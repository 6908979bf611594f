//! A pod that gets other resources while it runs.

use super::{Phase, Pod, PodError, PodResources, VmSize, cgroup::Changes};

impl Pod {
    /// Gives the pod other resources: those that its cgroups hold are set, those that its VM has already need nothing.
    ///
    /// # Errors
    /// When its VM would have to grow, or the host refuses. Nothing is changed then.
    pub async fn update(&self, resources: PodResources) -> Result<(), PodError> {
        let mut work = self.work.lock().await;
        let phase = self.view().phase;
        let (wishes, sizes) = (&work.spec.wishes, &self.environment.sizes);
        let wanted = match phase {
            Phase::Created => VmSize::with(&resources, wishes, sizes)?,
            // What a guest needs to boot is no matter to one that has.
            Phase::Starting | Phase::Running | Phase::Stopped => VmSize::asked(&resources, wishes, sizes),
        };
        let mut changes = Changes::default();
        if phase == Phase::Running {
            if let Some(size) = work.size {
                grow(size, wanted)?;
            }
            let limits = resources.limits();
            let changed = self.cgroups().and_then(|cgroups| cgroups.limit(&limits));
            changes = changed
                .map_err(|error| PodError::Refused(format!("updating the sandbox's resources: {error}")))?;
            if let Err(error) = self.pin_again() {
                changes.undo();
                return Err(error);
            }
        }
        // One that has not started yet starts with them.
        let before = std::mem::replace(&mut work.spec.resources, resources);
        if phase != Phase::Stopped
            && let Err(error) = self.persist(&work)
        {
            work.spec.resources = before;
            changes.undo();
            return Err(PodError::End { doing: "recording the sandbox's resources", source: error });
        }
        tracing::info!(?wanted, "the sandbox has other resources");
        Ok(())
    }
}

/// Makes a VM larger. (Until VMMs here plug CPUs and memory into running VMs: only if it is large enough already. A smaller
/// one is not needed: containers have limits of their own in the guest, and the VM has its cgroup's.)
fn grow(size: VmSize, wanted: VmSize) -> Result<(), PodError> {
    let refuse = |what: String| {
        Err(PodError::Refused(format!(
            "updating the sandbox's resources: {what}, which a running VM cannot be given yet; create the pod anew with \
             the limits that it needs"
        )))
    };
    if wanted.vcpus > size.vcpus {
        return refuse(format!("the pod's CPUs need {} vCPUs and its VM has {}", wanted.vcpus, size.vcpus));
    }
    if wanted.memory_mib > size.memory_mib {
        return refuse(format!(
            "the pod's memory needs a VM of {} MiB and it has {}",
            wanted.memory_mib, size.memory_mib
        ));
    }
    Ok(())
}
