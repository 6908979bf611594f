//! The request that the daemon sends once to set up a pod's guest, and the files that the pod's containers
//! share.

use std::time::SystemTime;

use kuasar_common::api::sandbox::{Interface, SetupSandboxRequest};
use protobuf::well_known_types::any::Any;
use serde_json::json;

use super::spec::PodSpec;
use crate::{clock::epoch_ns, network::PodNetwork};

/// The agent's instructions.
pub(super) fn request(id: &str, spec: &PodSpec, network: &PodNetwork) -> SetupSandboxRequest {
    let mut config = Any::new();
    config.type_url = "PodSandboxConfig".into();
    config.value =
        json!({"metadata": {"name": spec.name}, "hostname": spec.hostname}).to_string().into_bytes();
    let mut request = SetupSandboxRequest::new();
    request.config = Some(config).into();
    request.sandbox_id = id.to_owned();
    request.hostname.clone_from(&spec.hostname);
    request.resolv_conf.clone_from(&spec.resolv_conf);
    request.interfaces.clone_from(&network.interfaces);
    request.routes.clone_from(&network.routes);
    request.neighbours.clone_from(&network.neighbours);
    request.nftables.clone_from(&network.nftables);
    request.network_sysctls = network.sysctls.clone().into_iter().collect();
    request.sysctls = spec.sysctls.clone().into_iter().collect();
    request.pids_limit = u64::try_from(spec.resources.pids_limit).unwrap_or(0);
    request.shared_pid_namespace = spec.shared_pids;
    request.clock_ns = epoch_ns(SystemTime::now());
    request
}

/// Text of `/etc/hosts` for containers that kubelet gave none.
pub(super) fn hosts(hostname: &str, interfaces: &[Interface]) -> String {
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    // Only what others can reach the pod by.
    let up = interfaces.iter().filter(|interface| !interface.down);
    for address in up.flat_map(|interface| &interface.IPAddresses) {
        if !address.address.starts_with("fe80:") && !hostname.is_empty() {
            text += &format!("{}\t{hostname}\n", address.address);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use kuasar_common::api::sandbox::IPAddress;

    use super::*;

    #[test]
    fn hosts_names_the_pod_by_its_reachable_addresses() {
        let address = |text: &str| IPAddress { address: text.into(), ..IPAddress::default() };
        let interface = Interface {
            IPAddresses: vec![address("10.88.0.5"), address("fe80::1"), address("fd00::5")],
            ..Interface::default()
        };
        let down = Interface { down: true, IPAddresses: vec![address("10.88.0.6")], ..Interface::default() };
        let text = hosts("web-0", &[down, interface]);
        assert!(text.ends_with("10.88.0.5\tweb-0\nfd00::5\tweb-0\n"), "{text}");
        assert!(!text.contains("10.88.0.6"), "{text}");
        assert!(text.starts_with("127.0.0.1\tlocalhost\n"));
    }
}
