//! Networks beside the lab's own: each has a runtime handler, whose pods are the daemon's of [`super::QEMU`].

use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::config::QEMU;
use crate::machine::Machine;

/// Both families, an MTU of 1400, rate limits and host ports.
pub const NET_DUAL: &str = "kuasar-net-dual";
/// IPv6 and nothing else.
pub const NET_V6: &str = "kuasar-net-v6";
/// A link without a bridge, whose gateway is reached by a route of link scope.
pub const NET_PTP: &str = "kuasar-net-ptp";
/// A second hardware address on a link of the host: [`MACVLAN_MASTER`], to be made before.
pub const NET_MACVLAN: &str = "kuasar-net-macvlan";
/// Two interfaces: a bridge's and a macvlan.
pub const NET_TWO: &str = "kuasar-net-two";
/// A pod with a routing rule, which a VM cannot have.
pub const NET_RULES: &str = "kuasar-net-rules";
/// The host's link that macvlan links share.
pub const MACVLAN_MASTER: &str = "kmac0";

/// Links of the host that CNI leaves, or that a test made for it.
pub(super) const LINKS: [&str; 5] = ["klabd0", "klab60", "klabt0", "klabr0", MACVLAN_MASTER];

const HANDLERS: [&str; 6] = [NET_DUAL, NET_V6, NET_PTP, NET_MACVLAN, NET_TWO, NET_RULES];

/// Address ranges, one for each family, with a default route for each.
fn ipam(machine: &Machine, subnets: &[&str]) -> Value {
    let ranges: Vec<_> = subnets.iter().map(|subnet| json!([{"subnet": subnet}])).collect();
    let default = |subnet: &str| if subnet.contains(':') { "::/0" } else { "0.0.0.0/0" };
    let routes: Vec<_> = subnets.iter().map(|subnet| json!({"dst": default(subnet)})).collect();
    json!({"type": "host-local", "dataDir": machine.root.join("cni/leases"), "ranges": ranges, "routes": routes})
}

fn bridge(machine: &Machine, name: &str, subnets: &[&str]) -> Value {
    json!({"type": "bridge", "bridge": name, "isGateway": true, "ipMasq": false, "ipam": ipam(machine, subnets)})
}

fn macvlan(machine: &Machine) -> Value {
    let ipam = json!({
        "type": "host-local", "dataDir": machine.root.join("cni/leases"),
        "ranges": [[{"subnet": "10.88.81.0/24", "rangeStart": "10.88.81.10"}]],
    });
    json!({"type": "macvlan", "master": MACVLAN_MASTER, "mode": "bridge", "ipam": ipam})
}

/// Plugin lists of a handler's network, one for each interface.
fn lists(machine: &Machine, handler: &str) -> Vec<Value> {
    match handler {
        NET_DUAL => {
            let mut bridge = bridge(machine, "klabd0", &["10.88.78.0/24", "fd88:78::/64"]);
            bridge.as_object_mut().map(|fields| fields.insert("mtu".into(), json!(1400)));
            let bandwidth = json!({"type": "bandwidth", "capabilities": {"bandwidth": true}});
            let portmap = json!({"type": "portmap", "capabilities": {"portMappings": true}, "snat": true});
            vec![json!([bridge, bandwidth, portmap])]
        }
        NET_V6 => vec![json!([bridge(machine, "klab60", &["fd88:79::/64"])])],
        NET_PTP => vec![json!([{"type": "ptp", "ipMasq": false, "ipam": ipam(machine, &["10.88.80.0/24"])}])],
        NET_MACVLAN => vec![json!([macvlan(machine)])],
        NET_TWO => {
            vec![json!([bridge(machine, "klabt0", &["10.88.82.0/24"])]), json!([macvlan(machine)])]
        }
        _ => {
            let sbr = json!({"type": "sbr"});
            vec![json!([bridge(machine, "klabr0", &["10.88.83.0/24"]), sbr])]
        }
    }
}

/// Writes what CNI reads.
pub(super) fn write(machine: &Machine) -> Result<()> {
    for handler in HANDLERS {
        let folder = machine.root.join(handler);
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        for (number, plugins) in lists(machine, handler).into_iter().enumerate() {
            let name = format!("{handler}-{number}");
            let list = json!({"cniVersion": "1.0.0", "name": name, "plugins": plugins});
            fs::write(folder.join(format!("{number}.conflist")), list.to_string())?;
        }
    }
    Ok(())
}

/// The handlers, for containerd's configuration.
pub(super) fn runtimes(machine: &Machine) -> String {
    let root = machine.root.display();
    let runtime = |handler: &str| {
        format!(
            r#"[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{handler}]
  runtime_type = "io.containerd.kuasar-vmm.v1"
  sandboxer = "{QEMU}"
  io_type = "fifo"
  cni_conf_dir = "{root}/{handler}"
  cni_max_conf_num = 2
"#
        )
    };
    HANDLERS.map(runtime).concat()
}
