//! The processes of one VM: they live and die together.

use std::{collections::BTreeMap, future::pending, sync::Arc, time::Duration, time::SystemTime};

use tokio::{sync::watch, task::JoinSet};

use super::{VmError, VmExit};
use crate::process::{Process, ProcessRecord};

/// Longest time that a companion may take to end after SIGTERM; it has nothing left to do then.
const COMPANION_GRACE: Duration = Duration::from_millis(500);
/// When to look again at a process that could not be watched.
const RETRY: Duration = Duration::from_secs(1);

/// The end of a VM, and its cause.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    pub(super) exit: VmExit,
    /// The companion whose end brought the VM down, and its status.
    pub(super) because: Option<String>,
}

/// A VMM and its companions. A task watches them: when one ends, it ends the others.
#[derive(Debug)]
pub(super) struct Supervisor {
    vmm: Arc<Process>,
    companions: BTreeMap<String, Arc<Process>>,
    outcome: watch::Receiver<Option<Outcome>>,
}

impl Supervisor {
    /// Takes charge of processes that run.
    pub(super) fn new(vmm: Process, companions: BTreeMap<String, Process>) -> Self {
        let vmm = Arc::new(vmm);
        let companions: BTreeMap<_, _> =
            companions.into_iter().map(|(name, process)| (name, Arc::new(process))).collect();
        let (sender, outcome) = watch::channel(None);
        let (watched, others) = (vmm.clone(), companions.clone());
        tokio::spawn(async move {
            let outcome = supervise(&watched, &others).await;
            sender.send_replace(Some(outcome));
        });
        Self { vmm, companions, outcome }
    }

    pub(super) fn vmm(&self) -> &Process {
        &self.vmm
    }

    pub(super) fn companions(&self) -> BTreeMap<String, ProcessRecord> {
        self.companions.iter().map(|(name, process)| (name.clone(), process.record())).collect()
    }

    /// Waits until none of the processes is left.
    pub(super) async fn ended(&self) -> Outcome {
        let mut outcome = self.outcome.clone();
        let ended = outcome.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
        match ended {
            Some(outcome) => outcome,
            // The task ends only with the runtime.
            None => pending().await,
        }
    }

    /// The outcome, if it has one already.
    pub(super) fn outcome(&self) -> Option<Outcome> {
        self.outcome.borrow().clone()
    }

    /// Ends the VMM, by SIGTERM first unless `grace` is zero, and waits until none of the processes is left.
    pub(super) async fn end(&self, grace: Duration) -> Result<(), VmError> {
        self.vmm.end(grace).await?;
        self.ended().await;
        Ok(())
    }
}

async fn supervise(vmm: &Arc<Process>, companions: &BTreeMap<String, Arc<Process>>) -> Outcome {
    let mut watched = JoinSet::new();
    for (name, process) in companions {
        let (name, process) = (name.clone(), process.clone());
        watched.spawn(async move { (name, end_of(&process).await) });
    }
    let mut because = None;
    tokio::select! {
        _ = end_of(vmm) => {}
        Some(Ok((name, status))) = watched.join_next() => {
            // A companion that ends because the VMM did is not why the VMM did.
            if tokio::time::timeout(COMPANION_GRACE, end_of(vmm)).await.is_err() {
                let status = status.map_or_else(|| "unknown".to_owned(), |code| code.to_string());
                because = Some(format!("{name} ended with status {status}"));
            }
        }
    }
    watched.shutdown().await;
    let mut ends = JoinSet::new();
    let all = std::iter::once((vmm, Duration::ZERO)).chain(companions.values().map(|c| (c, COMPANION_GRACE)));
    for (process, grace) in all {
        let process = process.clone();
        ends.spawn(async move { process.end(grace).await });
    }
    while let Some(ended) = ends.join_next().await {
        if let Ok(Err(error)) = ended {
            tracing::error!(%error, "ending a VM's process");
        }
    }
    let code = end_of(vmm).await;
    Outcome { exit: VmExit { code, at: SystemTime::now() }, because }
}

/// Waits for a process, whatever it takes: not being able to watch it, for want of descriptors perhaps, is no
/// reason to take it for dead.
async fn end_of(process: &Process) -> Option<u32> {
    loop {
        match process.wait().await {
            Ok(status) => return status,
            Err(error) => tracing::error!(%error, "trying again in {RETRY:?}"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Spawn;

    fn sh(script: &str) -> Process {
        let mut spawn = Spawn::new("sh");
        spawn.args(["-c", script]);
        spawn.spawn().unwrap()
    }

    fn gone(record: ProcessRecord) -> bool {
        Process::adopt(record).unwrap().is_none()
    }

    #[tokio::test]
    async fn companions_end_with_the_vmm() {
        let companion = sh("exec sleep 60");
        let record = companion.record();
        let vm = Supervisor::new(sh("exit 3"), [("virtiofsd".to_owned(), companion)].into());
        let outcome = vm.ended().await;
        assert_eq!((outcome.exit.code, outcome.because), (Some(3), None));
        assert!(gone(record));
    }

    #[tokio::test]
    async fn the_vmm_ends_with_a_companion_and_says_why() {
        let vmm = sh("exec sleep 60");
        let record = vmm.record();
        let vm = Supervisor::new(vmm, [("virtiofsd".to_owned(), sh("exit 4"))].into());
        let outcome = vm.ended().await;
        assert_eq!(outcome.exit.code, Some(137));
        assert_eq!(outcome.because.as_deref(), Some("virtiofsd ended with status 4"));
        assert!(gone(record));
    }

    #[tokio::test]
    async fn ending_it_ends_all_and_may_be_repeated() {
        let companion = sh("trap '' TERM; while :; do sleep 0.05; done");
        let record = companion.record();
        let vm = Supervisor::new(sh("exec sleep 60"), [("vsock".to_owned(), companion)].into());
        assert!(vm.outcome().is_none());
        vm.end(Duration::from_secs(5)).await.unwrap();
        vm.end(Duration::ZERO).await.unwrap();
        assert_eq!(vm.outcome().unwrap().exit.code, Some(143));
        assert!(gone(record));
    }
}
