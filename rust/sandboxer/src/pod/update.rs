//! A pod that gets other resources while it runs.

use std::sync::PoisonError;

use super::{
    Phase, Pod, PodError, PodResources, VmSize,
    cgroup::{Changes, Given},
};

impl Pod {
    /// Gives the pod other resources, and logs why not, if it cannot be. Kubelet asks again every second, so
    /// what was said already is not said again.
    ///
    /// # Errors
    /// As [`Self::try_update`].
    pub async fn update(&self, resources: PodResources) -> Result<(), PodError> {
        let done = self.try_update(resources).await;
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = news(&mut refused, done.as_ref().err().map(ToString::to_string)) {
            tracing::warn!(error, "answering containerd");
        }
        done
    }

    /// Gives the pod other resources: those that its cgroups hold are set, those that its VM has already need
    /// nothing.
    ///
    /// # Errors
    /// When its VM would have to grow, or the host refuses. Nothing is changed then.
    async fn try_update(&self, mut resources: PodResources) -> Result<(), PodError> {
        let mut work = self.work.lock().await;
        resources.bound(&Given::of_pod(&self.environment.cgroup_root, &self.cgroup_parent));
        let phase = self.view().phase;
        let (wishes, sizes) = (&work.spec.wishes, &self.environment.sizes);
        let wanted = match phase {
            Phase::Created => VmSize::with(&resources, wishes, sizes)?,
            // What a guest needs to boot is no matter to one that has.
            Phase::Starting | Phase::Running | Phase::Stopped => VmSize::needed(&resources, wishes, sizes),
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

/// The refusal that is to be told, unless it is the same as before.
fn news(before: &mut Option<String>, now: Option<String>) -> Option<&str> {
    let changed = *before != now;
    *before = now;
    before.as_deref().filter(|_| changed)
}

/// Makes a VM larger. (Until VMMs here plug CPUs and memory into running VMs: only if it is large enough
/// already. A smaller one is not needed: containers have limits of their own in the guest, and the VM has its
/// cgroup's.)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unchanged_refusal_is_told_once() {
        let mut last = None;
        let mut told = |now: Option<&str>| news(&mut last, now.map(str::to_owned)).map(str::to_owned);
        assert_eq!(told(Some("too large")).as_deref(), Some("too large"));
        assert_eq!(told(Some("too large")), None);
        assert_eq!(told(Some("larger still")).as_deref(), Some("larger still"));
        // What was given meanwhile is asked for anew.
        assert_eq!((told(None), told(Some("larger still")).as_deref()), (None, Some("larger still")));
    }
}
