//! Pods that containerd has forgotten: it creates them, and in some of its failures never says that they are
//! to go.
//!
//! containerd writes a pod down before it asks for it, so one that is not in its list is nobody's. It must be
//! missing twice, with a grace between, before it is removed. Looked at when something hints at it (a network
//! namespace goes, containerd hangs up), soon after the start, and otherwise rarely.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use rustix::fs::inotify;
use tokio::io::{Interest, unix::AsyncFd};
use tracing::Instrument;

use super::{Phase, Pod, Pods};
use crate::containerd::ListError;

/// `f_type` of a file that is a namespace (`linux/magic.h`).
const NSFS: i64 = 0x6e73_6673;

/// Source of the list of pods that there ought to be.
#[async_trait]
pub trait Known: Send + Sync + fmt::Debug {
    /// Ids of the pods in a namespace of containerd.
    ///
    /// # Errors
    /// When it does not answer; then nothing is known.
    async fn known(&self, namespace: &str) -> Result<BTreeSet<String>, ListError>;
}

/// Removes what nobody knows any more.
#[derive(Debug)]
pub struct Collector {
    pods: Arc<Pods>,
    list: Arc<dyn Known>,
    interval: Duration,
    grace: Duration,
    /// Since when pods are missing in the list, those whose records cannot be read included.
    missing: BTreeMap<String, Instant>,
    /// Since when pods are without a network.
    cut_off: BTreeMap<String, Instant>,
    netns: Option<Folders>,
}

impl Collector {
    /// Looks at least every `interval`, and acts on what has been so for `grace`.
    #[must_use]
    pub fn new(pods: Arc<Pods>, list: Arc<dyn Known>, interval: Duration, grace: Duration) -> Self {
        let netns = Folders::new()
            .inspect_err(|error| tracing::warn!(%error, "not watching for the end of network namespaces"))
            .ok();
        let (missing, cut_off) = (BTreeMap::new(), BTreeMap::new());
        Self { pods, list, interval, grace, missing, cut_off, netns }
    }

    /// Goes on until it is dropped.
    pub async fn run(mut self) {
        let mut next = due_in(self.grace);
        loop {
            if let Some(netns) = &mut self.netns {
                netns.watch(&self.pods.all());
            }
            tokio::select! {
                () = tokio::time::sleep_until(next.into()) => {}
                () = self.pods.suspected() => {}
                () = self.pods.created() => continue,
                () = changed(self.netns.as_ref()) => {
                    // Every pod's namespace goes at its end; only a running one's is remarkable.
                    if !self.pods.all().iter().any(|pod| is_cut_off(pod)) {
                        continue;
                    }
                }
            }
            next = due_in(self.look().await);
        }
    }

    /// One look; returns when the next is due.
    async fn look(&mut self) -> Duration {
        let mut answered = true;
        let pods = self.pods.all();
        let mut ours = self.pods.unreadable();
        ours.extend(pods.iter().map(|pod| (pod.id().to_owned(), pod.namespace.clone())));
        let namespaces: BTreeSet<&str> = ours.iter().map(|(_, namespace)| namespace.as_str()).collect();
        let mut missing = Vec::new();
        for namespace in namespaces {
            match self.list.known(namespace).await {
                Ok(known) => {
                    let theirs = ours.iter().filter(|(_, of)| of == namespace).map(|(id, _)| id);
                    missing.extend(theirs.filter(|id| !known.contains(*id)).map(String::as_str));
                }
                Err(error) => {
                    tracing::debug!(%error, "looking for sandboxes that containerd has forgotten");
                    answered = false;
                }
            }
        }
        if answered {
            for id in due(&mut self.missing, &missing, self.grace) {
                self.remove(id);
            }
        }
        let cut_off: Vec<_> = pods.iter().filter(|pod| is_cut_off(pod)).map(|pod| pod.id()).collect();
        for id in due(&mut self.cut_off, &cut_off, self.grace) {
            pods.iter().filter(|pod| pod.id() == id).cloned().for_each(stop);
        }
        let quiet = answered && self.missing.is_empty() && self.cut_off.is_empty();
        if quiet { self.interval } else { self.grace.min(self.interval) }
    }

    fn remove(&self, id: String) {
        let (pods, span) = (self.pods.clone(), tracing::info_span!("pod", id));
        let removing = async move {
            tracing::warn!("containerd does not know the sandbox any more; removing it");
            if let Ok(pod) = pods.get(&id) {
                pod.blame("containerd forgot it");
            }
            if let Err(error) = pods.remove(&id).await {
                tracing::error!(%error, "removing a sandbox that containerd has forgotten; it is tried again");
            }
        };
        // Apart: a pod that hangs does not keep others.
        tokio::spawn(removing.instrument(span));
    }
}

fn due_in(pause: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(pause).unwrap_or(now)
}

/// A VM without a network is of no use. containerd, if it knows the pod, asks for its removal when it sees it
/// stopped.
fn stop(pod: Arc<Pod>) {
    let span = tracing::info_span!("pod", id = pod.id());
    let stopping = async move {
        let reason = format!("its network namespace {} is gone", pod.netns.display());
        tracing::warn!(reason, "stopping the sandbox");
        pod.blame(reason);
        if let Err(error) = pod.stop().await {
            tracing::error!(%error, "stopping a sandbox whose network is gone");
        }
    };
    tokio::spawn(stopping.instrument(span));
}

/// Notes since when these pods are so, forgets others, and returns those for which it has been long enough.
fn due(since: &mut BTreeMap<String, Instant>, now_so: &[&str], grace: Duration) -> Vec<String> {
    since.retain(|id, _| now_so.contains(&id.as_str()));
    let mut due = Vec::new();
    for id in now_so {
        let first = *since.entry((*id).to_owned()).or_insert_with(Instant::now);
        if first.elapsed() >= grace {
            // Begins anew: what fails is tried again after another grace.
            since.insert((*id).to_owned(), Instant::now());
            due.push((*id).to_owned());
        }
    }
    due
}

fn is_cut_off(pod: &Pod) -> bool {
    pod.view().phase == Phase::Running && !is_namespace(&pod.netns)
}

/// A namespace that was taken away leaves no file, or an ordinary one.
fn is_namespace(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type == NSFS)
}

/// Folders whose files are watched for going.
#[derive(Debug)]
struct Folders {
    events: AsyncFd<std::os::fd::OwnedFd>,
    watched: BTreeSet<PathBuf>,
}

impl Folders {
    fn new() -> std::io::Result<Self> {
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        // SAFETY: the descriptor is owned by what it is registered with, and closed with it only.
        let events = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        Ok(Self { events, watched: BTreeSet::new() })
    }

    /// Adds the folders of these pods' namespaces.
    fn watch(&mut self, pods: &[Arc<Pod>]) {
        for folder in pods.iter().filter_map(|pod| pod.netns.parent()) {
            if self.watched.contains(folder) {
                continue;
            }
            match inotify::add_watch(self.events.get_ref(), folder, inotify::WatchFlags::DELETE) {
                Ok(_) => {
                    self.watched.insert(folder.to_owned());
                }
                Err(error) => tracing::debug!(%error, folder = %folder.display(), "watching a folder"),
            }
        }
    }
}

/// Waits for a file to go in one of the folders.
async fn changed(folders: Option<&Folders>) {
    let Some(folders) = folders else { return std::future::pending().await };
    let Ok(mut ready) = folders.events.readable().await else { return std::future::pending().await };
    let mut buffer = [0; 4096];
    while rustix::io::read(folders.events.get_ref(), &mut buffer).is_ok_and(|length| length > 0) {}
    ready.clear_ready();
}

#[cfg(test)]
mod tests;
