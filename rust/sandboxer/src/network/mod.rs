//! The pod's network: from the links that CNI left in the pod's network namespace to network cards of the VM.

use std::path::{Path, PathBuf};

use kuasar_common::api::sandbox::{Interface, Neighbour, Route};
use serde::{Deserialize, Serialize};

use crate::vmm::Nic;

/// What the VM and its agent get to be the pod's network.
#[derive(Debug, Default)]
pub struct PodNetwork {
    /// Network cards for [`crate::vmm::VmSpec::devices`].
    pub nics: Vec<Nic>,
    /// For `SetupSandbox`.
    pub interfaces: Vec<Interface>,
    /// For `SetupSandbox`.
    pub routes: Vec<Route>,
    /// For `SetupSandbox`.
    pub neighbours: Vec<Neighbour>,
    /// For the pod's record.
    pub record: NetworkRecord,
}

/// What [`prepare`] made in the pod's network namespace, so that it can be removed after a restart, too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkRecord {
    /// The network namespace.
    pub netns: PathBuf,
    /// Taps, by name.
    pub taps: Vec<String>,
    /// Links that got an ingress qdisc, by name.
    pub redirected: Vec<String>,
}

/// Why a pod's network could not be made or removed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NetworkError(String);

/// Gives every link of the pod's network namespace a tap for the VM, `queues` queues each. On error nothing is left.
///
/// # Errors
/// When the namespace cannot be entered or read, or has a link of a kind that cannot be given to a VM.
pub async fn prepare(netns: &Path, queues: u32) -> Result<PodNetwork, NetworkError> {
    Err(NetworkError(format!("preparing the network of {} for {queues} queues: not there yet", netns.display())))
}

/// Removes what [`prepare`] made. A namespace, tap or qdisc that is gone is no error.
///
/// # Errors
/// When something is there and cannot be removed.
pub async fn remove(record: &NetworkRecord) -> Result<(), NetworkError> {
    Err(NetworkError(format!("removing the network of {}: not there yet", record.netns.display())))
}
