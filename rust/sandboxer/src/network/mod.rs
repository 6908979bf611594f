//! The pod's network: from the links that CNI left in the pod's network namespace to network cards of the VM.
//!
//! Each veth stays where it is, name and addresses included, because CNI and pod statistics look for it
//! there. A tap is put beside it and every frame that arrives at one is sent out of the other by `tc` (an
//! ingress qdisc with a filter that matches everything and redirects). Taps vanish with the VMM that holds
//! them; the rest vanishes with the namespace or by [`remove`]. A tap that CNI left there is opened as it is,
//! and outlives the VMM; see [`existing`]. The namespace's loopback is what `kubectl port-forward` connects
//! to; see [`forward`].

mod bpf;
mod existing;
mod forward;
mod nftables;
mod read;
mod redirect;
mod rules;
mod sysctls;
mod tap;
mod xtables;

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

pub use self::forward::Forward;
use kuasar_common::api::sandbox::{Interface, Neighbour, NftablesMessage, Route};
use rustix::thread::LinkNameSpaceType;
use serde::{Deserialize, Serialize};
use tokio::{sync::oneshot, time::timeout};

use crate::vmm::Nic;

/// Longest time that the kernel may take to answer all requests made here; it needs milliseconds.
const DEADLINE: Duration = Duration::from_secs(10);

/// The pod's network, as the VM and its agent get it.
#[derive(Debug, Default)]
pub struct PodNetwork {
    /// Network cards for [`crate::vmm::VmSpec::devices`].
    pub nics: Vec<Nic>,
    /// For `SetupSandbox`.
    pub interfaces: Vec<Interface>,
    /// For `SetupSandbox`; those that others need to be reachable come first.
    pub routes: Vec<Route>,
    /// For `SetupSandbox`.
    pub neighbours: Vec<Neighbour>,
    /// For `SetupSandbox`.
    pub sysctls: BTreeMap<String, String>,
    /// For `SetupSandbox`.
    pub nftables: Vec<NftablesMessage>,
    /// For the relay; nothing where the kernel has no way to do it.
    pub forward: Option<Forward>,
    /// For the pod's record.
    pub record: NetworkRecord,
}

/// Everything that [`Plan::make`] makes in the pod's network namespace, so that the daemon can remove it
/// after a restart, too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkRecord {
    /// The network namespace.
    pub netns: PathBuf,
    /// Taps, by name.
    pub taps: Vec<String>,
    /// Links that got an ingress qdisc, by name.
    pub redirected: Vec<String>,
    /// The namespace's kernel would answer ARP for the addresses of CNI's own taps again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub quiet: bool,
}

/// Why a pod's network could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace cannot be entered.
    #[error("entering the network namespace {}: {source}", path.display())]
    Enter {
        /// The namespace.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A request to the kernel failed.
    #[error("{doing}: {source}")]
    Netlink {
        /// The action that failed, and its object.
        doing: String,
        /// The kernel's answer.
        source: Box<rtnetlink::Error>,
    },
    /// Another system call failed.
    #[error("{doing}: {source}")]
    Io {
        /// The action that failed, and its object.
        doing: String,
        /// Why.
        source: io::Error,
    },
    /// The pod has something that cannot be given to a VM.
    #[error("{0}")]
    Unsupported(String),
    /// The kernel did not answer.
    #[error("working in the network namespace {}: no answer within {DEADLINE:?}", .0.display())]
    Deadline(PathBuf),
}

impl NetworkError {
    fn netlink(doing: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Netlink { doing, source: Box::new(source) }
    }

    fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }
}

/// A pod's network as CNI left it, and what is to be made beside it for the VM. Nothing is made yet.
#[derive(Debug)]
pub struct Plan {
    pod: read::Pod,
    sysctls: BTreeMap<String, String>,
    nftables: Vec<NftablesMessage>,
    record: NetworkRecord,
}

impl Plan {
    /// Reads the pod's network namespace.
    ///
    /// # Errors
    /// When it cannot be entered or read, or has a link, route or rule of a kind that cannot be given to a
    /// VM, or that a VM would pass by.
    #[tracing::instrument(name = "read network", level = "trace", skip_all)]
    pub async fn read(netns: &Path) -> Result<Self, NetworkError> {
        let path = netns.to_owned();
        within(netns, move |handle| async move { Self::read_here(&handle, path).await }).await
    }

    /// Everything that [`Plan::make`] will make, for the pod's record: the successor of a daemon that died
    /// meanwhile goes by it.
    #[must_use]
    pub const fn record(&self) -> &NetworkRecord {
        &self.record
    }

    /// Gives every link a tap for the VM, with `queues` queues each. On error nothing is left.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or the kernel refuses.
    #[tracing::instrument(name = "prepare network", level = "trace", skip_all)]
    pub async fn make(self, queues: u32) -> Result<PodNetwork, NetworkError> {
        let path = self.record.netns.clone();
        within(&path, move |handle| async move { self.make_here(&handle, queues).await }).await
    }

    async fn read_here(handle: &rtnetlink::Handle, netns: PathBuf) -> Result<Self, NetworkError> {
        let pod = read::pod(handle).await?;
        rules::refuse(&pod.links)?;
        let nftables = rules::nftables(&pod.links)?;
        let sysctls = sysctls::changed(&pod.links)?;
        let taken = read::ingress(handle).await?;
        let (theirs, ours): (Vec<_>, Vec<_>) = pod.links.iter().partition(|link| link.tap.is_some());
        let quiet = !theirs.is_empty() && existing::answers()?;
        let taps = ours.iter().map(|link| tap_beside(link)).collect();
        // Where somebody else's is in the way, nothing will be made, and nothing is to be removed.
        let redirected = ours.iter().filter(|link| !taken.contains(&link.index));
        let redirected = redirected.map(|link| link.interface.name.clone()).collect();
        Ok(Self { pod, sysctls, nftables, record: NetworkRecord { netns, taps, redirected, quiet } })
    }

    async fn make_here(self, handle: &rtnetlink::Handle, queues: u32) -> Result<PodNetwork, NetworkError> {
        let Self { pod, sysctls, nftables, record } = self;
        let mut network = PodNetwork {
            interfaces: pod.links.iter().map(|link| link.interface.clone()).collect(),
            routes: pod.routes,
            neighbours: pod.neighbours,
            sysctls,
            nftables,
            record,
            ..PodNetwork::default()
        };
        if let Err(error) = add_nics(handle, &pod.links, queues, &mut network).await {
            // Closes the taps' descriptors, which removes them; what was done to the links is undone here.
            network.nics.clear();
            if let Err(error) = remove_here(handle, &network.record).await {
                tracing::warn!(%error, netns = %network.record.netns.display(), "undoing half a network");
            }
            return Err(error);
        }
        let netns = &network.record.netns;
        match forward::prepare(handle, netns).await {
            Ok(forward) => network.forward = Some(forward),
            // A pod without it is worth more than none.
            Err(error) => {
                tracing::warn!(%error, netns = %netns.display(), "the pod runs, but no port can be forwarded to it");
            }
        }
        Ok(network)
    }
}

/// Removes what [`Plan::make`] made. A namespace, tap or qdisc that is gone is no error.
///
/// # Errors
/// When something is there and cannot be removed.
#[tracing::instrument(name = "remove network", level = "trace", skip_all)]
pub async fn remove(record: &NetworkRecord) -> Result<(), NetworkError> {
    let record = record.clone();
    match within(&record.netns.clone(), move |handle| async move { remove_here(&handle, &record).await })
        .await
    {
        // Gone, or, after CNI's DEL, an empty file where the namespace was mounted.
        Err(NetworkError::Enter { source, .. })
            if matches!(source.raw_os_error(), Some(nix::libc::ENOENT | nix::libc::EINVAL)) =>
        {
            Ok(())
        }
        done => done,
    }
}

async fn add_nics(
    handle: &rtnetlink::Handle,
    links: &[read::Link],
    queues: u32,
    network: &mut PodNetwork,
) -> Result<(), NetworkError> {
    if network.record.quiet {
        existing::keep_quiet()?;
    }
    for link in links {
        let nic = add_nic(handle, link, queues).await?;
        network.nics.push(nic);
    }
    Ok(())
}

/// The name of a link's tap.
fn tap_beside(link: &read::Link) -> String {
    format!("kua{}", link.index)
}

async fn add_nic(handle: &rtnetlink::Handle, link: &read::Link, queues: u32) -> Result<Nic, NetworkError> {
    let (name, mtu) = (&link.interface.name, u32::try_from(link.interface.mtu).unwrap_or(u32::MAX));
    let (tap, fds) = if let Some(tun) = link.tap {
        (name.clone(), existing::open(name, tun.many, queues)?)
    } else {
        let tap = tap_beside(link);
        let fds = tap::queues(&tap, queues.max(1), queues > 1);
        let fds = fds.map_err(NetworkError::io(format!("creating the tap {tap}")))?;
        let tap_index = tap::configure(handle, &tap, mtu).await?;
        redirect::both_ways(handle, (name, link.index), (&tap, tap_index)).await?;
        (tap, fds)
    };
    Ok(Nic {
        id: format!("net{}", link.index),
        tap,
        mac: link.interface.hwAddr.clone(),
        mtu,
        vhost: tap::vhost_net(fds.len()),
        queues: fds,
    })
}

async fn remove_here(handle: &rtnetlink::Handle, record: &NetworkRecord) -> Result<(), NetworkError> {
    if record.quiet {
        existing::speak_up()?;
    }
    for name in &record.taps {
        if let Some(link) = read::link_by_name(handle, name).await? {
            let deleted = handle.link().del(link.header.index).execute().await;
            redirect::unless_gone(deleted)
                .map_err(NetworkError::netlink(format!("removing the tap {name}")))?;
        }
    }
    for name in &record.redirected {
        if let Some(link) = read::link_by_name(handle, name).await? {
            redirect::undo(handle, name, link.header.index).await?;
        }
    }
    Ok(())
}

/// Runs `work` in a thread that is in the network namespace and ends afterwards: a thread of the runtime's
/// pool must never change its namespace, because others use it next.
async fn within<T, F>(
    netns: &Path,
    work: impl FnOnce(rtnetlink::Handle) -> F + Send + 'static,
) -> Result<T, NetworkError>
where
    T: Send + 'static,
    F: Future<Output = Result<T, NetworkError>>,
{
    let (sender, receiver) = oneshot::channel();
    let path = netns.to_owned();
    let thread = move || drop(sender.send(in_thread(&path, work)));
    std::thread::Builder::new()
        .name("netns".into())
        .spawn(thread)
        .map_err(NetworkError::io("starting a thread for the network namespace"))?;
    match timeout(DEADLINE + Duration::from_secs(1), receiver).await {
        Ok(Ok(done)) => done,
        _ => Err(NetworkError::Deadline(netns.to_owned())),
    }
}

fn in_thread<T, F>(path: &Path, work: impl FnOnce(rtnetlink::Handle) -> F) -> Result<T, NetworkError>
where
    F: Future<Output = Result<T, NetworkError>>,
{
    let enter = || {
        let netns = File::open(path)?;
        rustix::thread::move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?;
        tokio::runtime::Builder::new_current_thread().enable_all().build()
    };
    let runtime = enter().map_err(|source| NetworkError::Enter { path: path.to_owned(), source })?;
    runtime.block_on(async {
        let (connection, handle, _messages) =
            rtnetlink::new_connection().map_err(NetworkError::io("opening a netlink socket"))?;
        let connection = tokio::spawn(connection);
        let done = timeout(DEADLINE, work(handle)).await;
        connection.abort();
        done.unwrap_or_else(|_| Err(NetworkError::Deadline(path.to_owned())))
    })
}

#[cfg(test)]
mod tests;
