//! Networks beside the lab's own: each has a runtime handler, whose pods are the daemon's of [`super::QEMU`].

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::config::QEMU;
use crate::{machine::Machine, paths::Paths};

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
/// As [`NET_PTP`], with what plugins seldom leave: no ARP, a permanent neighbour, a peer, a preferred source,
/// metrics, a link that is down.
pub const NET_RARE: &str = "kuasar-net-rare";
/// A tap that is a port of a bridge in the pod's namespace.
pub const NET_TAP: &str = "kuasar-net-tap";
/// A link that carries packets and no frames.
pub const NET_TUN: &str = "kuasar-net-tun";
/// Rules of nftables in the pod's namespace: TCP to port 8080 of the pod and to port 9090 of others is
/// dropped.
pub const NET_FILTERED: &str = "kuasar-net-filtered";
/// Sysctls in the pod's namespace, by the plugin `tuning`.
pub const NET_TUNED: &str = "kuasar-net-tuned";
/// Rules of `iptables-legacy` in the pod's namespace, which a VM cannot have.
pub const NET_LEGACY: &str = "kuasar-net-legacy";
/// A rule that the guest's kernel does not know.
pub const NET_UNKNOWN: &str = "kuasar-net-unknown";
/// The host's link that macvlan links share.
pub const MACVLAN_MASTER: &str = "kmac0";

/// Links of the host that CNI leaves, or that a test made for it.
pub(super) const LINKS: [&str; 11] = [
    "klabd0",
    "klab60",
    "klabt0",
    "klabr0",
    "klaba0",
    "klabu0",
    "klabf0",
    "klabs0",
    "klabl0",
    "klabn0",
    MACVLAN_MASTER,
];

const HANDLERS: [&str; 13] = [
    NET_DUAL,
    NET_V6,
    NET_PTP,
    NET_MACVLAN,
    NET_TWO,
    NET_RULES,
    NET_RARE,
    NET_TAP,
    NET_TUN,
    NET_FILTERED,
    NET_TUNED,
    NET_LEGACY,
    NET_UNKNOWN,
];

/// A chained plugin: the commands of its `script` change what those before it made in the pod's namespace.
/// libcni writes the keys of a configuration in the order of the alphabet. What JSON writes in another way, a
/// script cannot have.
const CHANGED: &str = r#"#!/bin/sh
set -eu
config=$(cat)
case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}' ;;
ADD)
    script=$(printf %s "$config" | sed 's/.*"script":"\([^"]*\)".*/\1/')
    nsenter --net="$CNI_NETNS" sh -euc "$script" >&2
    printf %s "$config" | sed 's/.*"prevResult":\(.*\),"script":.*/\1/'
    ;;
esac
"#;

/// Script that makes the links of the newer packages' plugin `tap`, with its key `bridge`, in place of a veth
/// of the same name.
const TAP: &str = "set -- $(ip -o -4 addr show dev eth0); address=$4; ip link set eth0 down; ip addr flush dev eth0; ip link set eth0 name up0; ip link add kbr0 type bridge; \
    ip link set up0 master kbr0 up; ip tuntap add dev eth0 mode tap multi_queue; \
    ip link set eth0 master kbr0 mtu 1400 up; ip link set kbr0 up; ip addr add $address dev eth0; \
    ip route add default via 10.88.84.1";

/// No ARP, a neighbour, a peer, a route with all that one can have, and a link with an address that is down.
const RARE: &str = "ip link set eth0 arp off; ip neigh add 10.88.85.200 lladdr 02:00:00:00:00:c8 nud permanent dev eth0; \
    ip addr add 10.88.86.5 peer 10.88.86.1/32 dev eth0; \
    ip route add 192.0.2.0/24 via 10.88.85.1 src 10.88.86.5 metric 7 mtu lock 1300 advmss 1200; \
    ip link add down0 type veth peer name down1; ip addr add 10.88.88.5/24 dev down0";

/// Of either family.
const FILTERED: &str = "for p in iptables-nft ip6tables-nft; do $p -A INPUT -p tcp --dport 8080 -j DROP; \
    $p -A OUTPUT -p tcp --dport 9090 -j DROP; done";

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
        NET_RARE => {
            let ptp = json!({"type": "ptp", "ipMasq": false, "ipam": ipam(machine, &["10.88.85.0/24"])});
            vec![json!([ptp, {"type": "klab-changed", "script": RARE}])]
        }
        NET_TAP => {
            let bridge = bridge(machine, "klaba0", &["10.88.84.0/24"]);
            vec![json!([bridge, {"type": "klab-changed", "script": TAP}])]
        }
        NET_TUN => {
            let script = "ip tuntap add dev tun0 mode tun; ip link set tun0 up";
            let bridge = bridge(machine, "klabu0", &["10.88.87.0/24"]);
            vec![json!([bridge, {"type": "klab-changed", "script": script}])]
        }
        NET_FILTERED => {
            let bridge = bridge(machine, "klabf0", &["10.88.89.0/24", "fd88:89::/64"]);
            vec![json!([bridge, {"type": "klab-changed", "script": FILTERED}])]
        }
        NET_TUNED => {
            let sysctls = json!({
                "net.core.somaxconn": "511", "net.ipv4.conf.eth0.rp_filter": "2", "net.ipv4.tcp_keepalive_time": "600",
            });
            let bridge = bridge(machine, "klabs0", &["10.88.90.0/24"]);
            vec![json!([bridge, {"type": "tuning", "sysctl": sysctls}])]
        }
        NET_LEGACY => {
            // Its lock would be left behind.
            let script = "XTABLES_LOCKFILE=/dev/null iptables-legacy -A INPUT -p tcp --dport 8080 -j DROP";
            let bridge = bridge(machine, "klabl0", &["10.88.91.0/24"]);
            vec![json!([bridge, {"type": "klab-changed", "script": script}])]
        }
        NET_UNKNOWN => {
            let script = "iptables-nft -A OUTPUT -m owner --uid-owner 1337 -j DROP";
            let bridge = bridge(machine, "klabn0", &["10.88.92.0/24"]);
            vec![json!([bridge, {"type": "klab-changed", "script": script}])]
        }
        _ => {
            let sbr = json!({"type": "sbr"});
            vec![json!([bridge(machine, "klabr0", &["10.88.83.0/24"]), sbr])]
        }
    }
}

/// Folders in which containerd finds plugins: the package's, and the lab's own.
pub(super) fn plugins(machine: &Machine, paths: &Paths) -> [PathBuf; 2] {
    [paths.tool("cni"), machine.root.join("cni/bin")]
}

/// Writes what CNI reads.
pub(super) fn write(machine: &Machine) -> Result<()> {
    let own = machine.root.join("cni/bin");
    fs::create_dir_all(&own).with_context(|| format!("creating {}", own.display()))?;
    fs::write(own.join("klab-changed"), CHANGED)?;
    fs::set_permissions(own.join("klab-changed"), fs::Permissions::from_mode(0o755))?;
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
