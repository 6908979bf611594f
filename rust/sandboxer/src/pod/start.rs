//! From a created pod to one whose guest is ready.

use std::{
    fs::OpenOptions,
    io::{Read, Write},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant, SystemTime},
};

use kuasar_common::constants::pod_files;
use tokio::{task::JoinHandle, time::timeout};
use tracing::{Instrument, Span};

use super::{
    Caller, Exit, Phase, Pod, PodError, StepError, View, Work, cgroup::Cgroups, host::HostServer, log, relay,
    setup, size::VmSize,
};
use crate::{
    crash,
    guest::Guest,
    network::{self, PodNetwork},
    process::{IdLease, Process},
    vmm::{DeviceInfo, ReadyGuest, Vm, VmError, VmSpec, relay_rights, with_status},
};

/// Longest time that the daemon waits for the last words of a guest whose VM has ended.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// A guest that has called in time is alive, and has at least this to be set up in, however late it called.
const LEAST_TO_SET_UP: Duration = Duration::from_secs(20);
/// OOM score with which a pod's processes begin, whatever the daemon's own is.
const OOM_SCORE_ADJ: i32 = 0;
/// Logs that may explain why a guest does not come up.
const GUEST_LOGS: [&str; 3] = ["console.log", "agent.log", "vmm.log"];

impl Pod {
    /// Starts the pod; a running one is left as it is. If it fails, or `caller` goes away, everything is
    /// undone.
    ///
    /// # Errors
    /// When a step fails or the caller went away. The pod is of no use then and has no folder any more.
    pub async fn start(self: &Arc<Self>, mut caller: Caller) -> Result<View, PodError> {
        let mut work = self.work.lock().await;
        match self.view().phase {
            Phase::Running => return Ok(self.view()),
            Phase::Created => {}
            Phase::Starting | Phase::Stopped => {
                return Err(PodError::Refused(format!(
                    "the sandbox {} has been stopped and cannot be started again; create a new one",
                    self.id
                )));
            }
        }
        let began = Instant::now();
        match self.bring_up(&mut work, &mut caller).await {
            Ok(()) => {
                tracing::info!(elapsed = ?began.elapsed(), pid = self.view().pid, "the sandbox is ready");
                Ok(self.view())
            }
            Err(error) => {
                let reason = Some(error.to_string());
                self.set_ended(Exit { code: 255, at: SystemTime::now(), reason });
                // containerd does not call again for a sandbox that failed to start.
                if let Err(error) = self.remove_all(&mut work).await {
                    tracing::error!(%error, "undoing a failed start");
                }
                Err(error)
            }
        }
    }

    #[tracing::instrument(name = "start", level = "trace", skip_all)]
    async fn bring_up(self: &Arc<Self>, work: &mut Work, caller: &mut Caller) -> Result<(), PodError> {
        let deadline = Deadline::new(self.environment.start_timeout);
        let size = VmSize::of(&work.spec, &self.environment.sizes)?;
        if let Some(shortage) = self.shortage() {
            tracing::warn!("{shortage}");
        }
        let cgroups = step("creating the sandbox's cgroup", self.cgroups().map_err(StepError::Cgroup))?;
        let plan = network::Plan::read(&work.spec.netns).await;
        let plan = step("giving the VM the pod's network", plan)?;
        work.network = Some(plan.record().clone());
        work.size = Some(size);
        work.user = step("giving the sandbox a user id", self.environment.ids.take())?;
        work.cgroups = cgroups.paths();
        self.set_phase(Phase::Starting);
        // From here on a restarted daemon knows what to clear away.
        step("recording the sandbox", self.persist(work))?;
        at("start: recorded")?;
        step("creating the sandbox's cgroup", cgroups.create().map_err(StepError::Cgroup))?;
        at("start: cgroup")?;
        let limits = work.spec.resources.limits();
        let limited = cgroups.limit(&limits).map(drop).map_err(StepError::Cgroup);
        step("limiting the sandbox's cgroup", limited)?;
        let (network, files) = tokio::join!(plan.make(size.vcpus), self.files());
        // Then there is nothing of it, and nothing to be removed.
        let network = network.inspect_err(|_| work.network = None);
        let network = step("giving the VM the pod's network", network)?;
        let (token, endpoint, host) = step("preparing the sandbox's folder", files)?;
        work.host = Some(host);
        at("start: files")?;
        step("writing the sandbox's files", self.pod_files(work, &network).await)?;
        step("recording the sandbox", self.persist(work))?;
        at("start: ready to boot")?;
        caller.check("preparing the VM's network and files")?;

        let (vm, mut network) = self.boot(work, size, &cgroups, network).await?;
        at("start: VM")?;
        caller.check("starting the VM")?;
        // From here on a restarted daemon finds the VM's processes.
        step("recording the sandbox", self.persist(work))?;
        at("start: VM recorded")?;

        let greeted =
            async { tokio::join!(greet(&*vm, &token, deadline), self.place_vcpus(&*vm, &cgroups)).0 };
        let greeted = caller.unless_gone("waiting for the guest", greeted).await?;
        let agent = step("waiting for the guest's agent", greeted)?;
        at("start: guest called")?;
        let ready = &agent.ready;
        tracing::debug!(
            agent = ready.agent,
            uptime_ns = ready.uptime_ns,
            root = ready.root,
            "the agent is ready"
        );
        // Not before: it calls the guest, and vhost-device-vsock ends its work, unseen, when somebody calls
        // while the guest's driver is just about to set up its queues.
        let forward = network.forward.take();
        let rights = relay_rights(work.user.is_some(), OOM_SCORE_ADJ);
        let relay =
            relay::spawn(&self.environment, &self.dir, endpoint, &*vm, forward, (&cgroups.procs(), rights));
        let relay = step("starting the relay", relay)?;
        let relay = Arc::new(relay);
        work.relay = Some(relay.clone());
        self.apply_score(Some(work));
        at("start: relay")?;
        // And from here on the relay.
        step("recording the sandbox", self.persist(work))?;
        at("start: relay recorded")?;
        let guest = Guest::new(vm.address(), token);
        let request = setup::request(&self.id, &work.spec, &network);
        let told = guest.setup(&request, deadline.left().max(LEAST_TO_SET_UP));
        let told = caller.unless_gone("setting the guest up", told).await?;
        told.map_err(|source| PodError::Start {
            step: "setting the guest up",
            source: source.into(),
            log: log::tails(&self.dir, &GUEST_LOGS),
        })?;
        at("start: guest set up")?;
        caller.check("setting the guest up")?;
        self.set_phase(Phase::Running);
        step("recording the sandbox", self.persist(work))?;
        at("start: running")?;
        self.watch(vm, relay, Some(agent));
        Ok(())
    }

    /// The parts that need nothing but the folder.
    #[tracing::instrument(name = "prepare folder", level = "trace", skip_all)]
    async fn files(self: &Arc<Self>) -> Result<(String, OwnedFd, HostServer), StepError> {
        let path = self.dir.join(pod_files::TOKEN);
        let token = new_token(&path).map_err(StepError::file(&path))?;
        self.take_storage("sharing the sandbox's folder").await?.with(|storage| storage.create()).await?;
        let endpoint = relay::endpoint(&self.dir);
        let endpoint = endpoint.map_err(StepError::file(self.dir.join(pod_files::TASK_SOCKET)))?;
        let host = HostServer::start(self).await;
        let host = host.map_err(StepError::file(self.dir.join(pod_files::HOST_SOCKET)))?;
        Ok((token, endpoint, host))
    }

    #[tracing::instrument(name = "write files", level = "trace", skip_all)]
    async fn pod_files(self: &Arc<Self>, work: &Work, network: &PodNetwork) -> Result<(), StepError> {
        let hosts = setup::hosts(&work.spec.hostname, &network.interfaces);
        let (hostname, resolv_conf) = (format!("{}\n", work.spec.hostname), work.spec.resolv_conf.clone());
        let storage = self.take_storage("writing the sandbox's files").await?;
        let write = storage.with(move |storage| {
            storage.write_pod_file("hosts", &hosts)?;
            storage.write_pod_file("hostname", &hostname)?;
            storage.write_pod_file("resolv.conf", &resolv_conf)
        });
        Ok(write.await?)
    }

    async fn boot(
        &self,
        work: &mut Work,
        size: VmSize,
        cgroups: &Cgroups,
        mut network: PodNetwork,
    ) -> Result<(Arc<dyn Vm>, PodNetwork), PodError> {
        let spec = VmSpec {
            pod: self.id.clone(),
            dir: self.dir.clone(),
            netns: Some(work.spec.netns.clone()),
            cgroup_procs: cgroups.procs(),
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            devices: network.nics.drain(..).map(DeviceInfo::Tap).collect(),
            kernel_params: work.spec.wishes.kernel_params.clone(),
            user: work.user.as_ref().map(IdLease::id),
            oom_score_adj: OOM_SCORE_ADJ,
        };
        let vm = step("starting the VM", self.environment.hypervisor.start(spec).await)?;
        self.view.send_modify(|view| view.pid = vm.pid());
        self.disks.lock().await.set_vm(vm.clone());
        work.vm = Some(vm.clone());
        self.apply_score(Some(work));
        Ok((vm, network))
    }

    /// Counts the guest's CPUs apart from what it costs to have them. A pod is as good without.
    async fn place_vcpus(&self, vm: &dyn Vm, cgroups: &Cgroups) {
        let placed = match vm.vcpu_threads().await {
            Ok(threads) => cgroups.place_vcpus(&threads).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = placed {
            tracing::warn!(error, "putting the VM's CPUs into a cgroup of their own");
        }
    }

    /// Notices the end of what a running pod is made of.
    pub(super) fn watch(self: &Arc<Self>, vm: Arc<dyn Vm>, relay: Arc<Process>, agent: Option<ReadyGuest>) {
        self.keep_clock(vm.clone());
        let (pod, watched) = (self.clone(), vm.clone());
        let last_words = last_words(agent, self.span());
        let ended = async move {
            let exit = watched.wait().await;
            let by_us = pod.stopping.load(Ordering::Relaxed);
            let reason = match pod.blamed() {
                None if !by_us => Some(reason(&pod, &*watched, last_words, exit.code).await),
                blamed => blamed,
            };
            tracing::info!(code = ?exit.code, by_us, reason, "the VM has ended");
            // Nobody's child any more after a restart, so nobody knows; containerd expects a number.
            pod.set_ended(Exit { code: exit.code.unwrap_or(255), at: exit.at, reason });
            let mut work = pod.work.lock().await;
            // containerd may take its time to call Stop, or never do.
            if let Some(record) = &work.network {
                match network::remove(record).await {
                    Ok(()) => work.network = None,
                    Err(error) => tracing::warn!(%error, "giving the network back"),
                }
            }
            if pod.dir.exists()
                && let Err(error) = pod.persist(&work)
            {
                tracing::warn!(%error, "recording the end of the VM");
            }
        };
        self.beside(ended);
        let pod = self.clone();
        let relay_ended = async move {
            let code = relay.wait().await;
            if pod.view().phase == Phase::Running {
                // containerd takes all containers of the pod for dead now and would start them a second time.
                let log = log::tails(&pod.dir, &["relay.log"]);
                tracing::error!(?code, log, "the relay has ended; stopping the VM");
                pod.blame(format!("its relay ended{}{log}", with_status(code.ok().flatten())));
                if let Err(error) = vm.stop(true, Duration::from_secs(10)).await {
                    tracing::error!(%error, "stopping the VM of a relay that ended");
                }
            }
        };
        self.beside(relay_ended);
    }
}

/// Listens from now on for the reason that the agent gives before it ends its VM, if it does.
fn last_words(agent: Option<ReadyGuest>, span: Span) -> JoinHandle<Option<String>> {
    let listening = async move {
        let reason = agent?.fatal().await;
        if let Some(reason) = &reason {
            tracing::error!(reason, "the guest's agent gives up");
        }
        reason
    };
    tokio::spawn(listening.instrument(span))
}

/// Why a VM ended that nobody ended: what its agent said, or else what the logs show.
async fn reason(pod: &Pod, vm: &dyn Vm, last_words: JoinHandle<Option<String>>, code: Option<u32>) -> String {
    // The connection has ended with the VM, or does now.
    match timeout(LAST_WORDS, last_words).await {
        Ok(Ok(Some(said))) => format!("the guest's agent gave up: {said}"),
        _ => match pod.killed_for_memory() {
            Some(why) => why,
            None => vm.ping().await.err().map_or_else(|| died(&pod.dir, code), |error| error.to_string()),
        },
    }
}

/// Says what is known of a VM's end without its help.
fn died(dir: &std::path::Path, code: Option<u32>) -> String {
    format!("the VM ended{}{}", with_status(code), log::tails(dir, &["vmm.log", "console.log"]))
}

/// For tests: the start is as far as this.
fn at(name: &'static str) -> Result<(), PodError> {
    step(name, crash::step(name).map_err(|error| StepError::Internal(error.to_string())))
}

fn step<T, E: Into<StepError>>(step: &'static str, done: Result<T, E>) -> Result<T, PodError> {
    done.map_err(|error| match error.into() {
        StepError::Vm(error @ VmError::Start { .. }) => PodError::StartVm(error),
        source => PodError::Start { step, source, log: String::new() },
    })
}

#[tracing::instrument(name = "wait for guest", level = "trace", skip_all)]
async fn greet(vm: &dyn Vm, token: &str, deadline: Deadline) -> Result<ReadyGuest, StepError> {
    let mut agent = vm.ready(deadline.left()).await.map_err(|error: VmError| StepError::from(error))?;
    agent.give_token(token).await?;
    Ok(agent)
}

/// One deadline for all steps together.
#[derive(Clone, Copy)]
struct Deadline(Instant);

impl Deadline {
    fn new(length: Duration) -> Self {
        let now = Instant::now();
        Self(now.checked_add(length).unwrap_or(now))
    }

    fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }
}

/// 32 random bytes as hex digits, in a file that only root may read.
fn new_token(path: &std::path::Path) -> std::io::Result<String> {
    let mut bytes = [0; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(token.as_bytes())?;
    Ok(token)
}
