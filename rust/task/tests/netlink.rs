//! Links, addresses, routes and neighbours in a network namespace of the test's own. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::{process::Command, sync::Once};

use kuasar_common::api::sandbox as api;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use vmm_task::{
    error::TaskError,
    netlink::{Network, plan},
};

/// Puts this thread into a new network namespace with the links `a` (02:..:01) and `b` (02:..:02).
fn namespace() -> bool {
    static SAID: Once = Once::new();
    // SAFETY: only the network namespace of this thread changes.
    if unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.is_err() {
        SAID.call_once(|| eprintln!("skipped: making a network namespace needs root"));
        return false;
    }
    ip("link add name a address 02:00:00:00:00:01 type veth peer name b address 02:00:00:00:00:02");
    true
}

fn ip(args: &str) -> String {
    let output = Command::new("ip").args(args.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn link(name: &str, mac: &str, addresses: &[(&str, &str)]) -> plan::Link {
    let addresses = addresses.iter().map(|(address, mask)| api::IPAddress {
        address: (*address).into(),
        mask: (*mask).into(),
        ..Default::default()
    });
    let interface = api::Interface {
        name: name.into(),
        hwAddr: mac.into(),
        mtu: 1400,
        IPAddresses: addresses.collect(),
        ..Default::default()
    };
    plan::Link::try_from(&interface).unwrap()
}

fn route(dest: &str, gateway: &str, device: &str) -> api::Route {
    api::Route { dest: dest.into(), gateway: gateway.into(), device: device.into(), ..Default::default() }
}

fn routes(list: &[api::Route]) -> Vec<plan::Route> {
    plan::all(list).unwrap()
}

#[test]
fn a_pod_s_network_is_made() {
    if !namespace() {
        return;
    }
    let mut network = Network::new().unwrap();
    network.loopback_up().unwrap();
    assert!(ip("link show dev lo").contains("UP"));

    // The names are exchanged, which needs a third one for a moment.
    let eth0 = link("b", "02:00:00:00:00:01", &[("10.1.0.2", "24"), ("fd00::2", "64")]);
    network.configure_links(&[eth0.clone(), link("a", "02:00:00:00:00:02", &[])]).unwrap();
    let shown = ip("addr show dev b");
    assert!(
        shown.contains("02:00:00:00:00:01") && shown.contains("mtu 1400") && shown.contains("UP"),
        "{shown}"
    );
    assert!(shown.contains("inet 10.1.0.2/24") && shown.contains("inet6 fd00::2/64"), "{shown}");
    assert!(shown.contains("fd00::2/64 scope global nodad"), "usable at once: {shown}");
    assert!(ip("link show dev a").contains("02:00:00:00:00:02"));

    // Again: no error; and an address that is not wanted any more goes.
    network.configure_links(&[eth0]).unwrap();
    let fewer = link("b", "02:00:00:00:00:01", &[("10.1.0.3", "24"), ("fd00::2", "64")]);
    network.configure_links(&[fewer]).unwrap();
    let shown = ip("addr show dev b");
    assert!(
        !shown.contains("10.1.0.2") && shown.contains("10.1.0.3/24") && shown.contains("fd00::2/64"),
        "{shown}"
    );

    // A gateway outside the link's network is reached through a route that comes later in the list, and a
    // neighbour.
    let neighbour = api::Neighbour {
        address: "169.254.1.1".into(),
        device: "b".into(),
        hwAddr: "ee:ee:ee:ee:ee:ee".into(),
        ..Default::default()
    };
    network.add_neighbours(&plan::all(&[neighbour]).unwrap()).unwrap();
    assert!(ip("neigh show dev b").contains("169.254.1.1 lladdr ee:ee:ee:ee:ee:ee PERMANENT"));
    let wanted = [
        route("", "169.254.1.1", "b"),
        route("169.254.1.1/32", "", "b"),
        route("10.9.0.0/16", "10.1.0.1", "b"),
        route("", "fd00::1", "b"),
    ];
    network.add_routes(&routes(&wanted)).unwrap();
    network.add_routes(&routes(&wanted)).unwrap();
    let shown = ip("route show");
    assert!(
        shown.contains("default via 169.254.1.1 dev b") && shown.contains("10.9.0.0/16 via 10.1.0.1"),
        "{shown}"
    );
    assert!(ip("-6 route show").contains("default via fd00::1 dev b"));

    // Only these, and what the kernel made for the addresses.
    let mut fewer = vec![route("", "10.1.0.1", "b"), route("169.254.1.1/32", "", "b")];
    fewer[0].source = "10.1.0.3".into();
    fewer[0].metric = 77;
    network.replace_routes(&routes(&fewer)).unwrap();
    let shown = ip("route show");
    assert!(shown.contains("default via 10.1.0.1 dev b proto static src 10.1.0.3 metric 77"), "{shown}");
    assert!(shown.contains("10.1.0.0/24") && shown.contains("169.254.1.1"), "{shown}");
    assert!(!shown.contains("10.9.0.0") && !shown.contains("via 169.254.1.1"), "{shown}");
    assert!(!ip("-6 route show").contains("default"));
}

#[test]
fn peers_metrics_and_links_without_arp() {
    if !namespace() {
        return;
    }
    let mut network = Network::new().unwrap();
    let mut eth0 = link("eth0", "02:00:00:00:00:01", &[]);
    let address = |ip: &str, peer: &str| api::IPAddress {
        address: ip.into(),
        mask: if ip.contains(':') { "128".into() } else { "32".into() },
        peer: peer.into(),
        ..Default::default()
    };
    let interface = api::Interface {
        name: "eth0".into(),
        hwAddr: "02:00:00:00:00:01".into(),
        IPAddresses: vec![address("10.1.0.2", "10.1.0.1"), address("fd00::2", "fd00::1")],
        ..Default::default()
    };
    eth0.addresses = plan::Link::try_from(&interface).unwrap().addresses;
    eth0.noarp = true;
    // Again: nothing of it is removed or refused.
    for _ in 0..2 {
        network.configure_links(std::slice::from_ref(&eth0)).unwrap();
        let shown = ip("addr show dev eth0");
        assert!(shown.contains("NOARP") && shown.contains("inet 10.1.0.2 peer 10.1.0.1/32"), "{shown}");
        assert!(shown.contains("inet6 fd00::2 peer fd00::1/128"), "{shown}");
    }
    eth0.noarp = false;
    (eth0.up, eth0.mtu) = (false, Some(1300));
    network.configure_links(std::slice::from_ref(&eth0)).unwrap();
    let shown = ip("addr show dev eth0");
    assert!(!shown.contains("NOARP") && !shown.contains("UP") && shown.contains("mtu 1300"), "{shown}");
    assert!(shown.contains("inet 10.1.0.2 peer 10.1.0.1/32"), "it has what it had: {shown}");
    eth0.up = true;
    network.configure_links(&[eth0]).unwrap();
    assert!(ip("link show dev eth0").contains("UP"));
    // RTAX_LOCK, RTAX_MTU, RTAX_INITCWND.
    let mut limited = route("10.9.0.0/16", "10.1.0.1", "eth0");
    limited.metrics = [(1, 1 << 2), (2, 1300), (11, 20)].into();
    network.add_routes(&routes(&[limited])).unwrap();
    let shown = ip("route show 10.9.0.0/16");
    assert!(shown.contains("mtu lock 1300") && shown.contains("initcwnd 20"), "{shown}");
}

/// A link that nobody asked for gives its name away, and nothing else.
#[test]
fn a_link_in_the_way_stays_up() {
    if !namespace() {
        return;
    }
    ip("link set dev b name eth0");
    ip("link set dev eth0 up");
    ip("addr add fd01::1/64 dev eth0 nodad");
    let mut network = Network::new().unwrap();
    network.configure_links(&[link("eth0", "02:00:00:00:00:01", &[])]).unwrap();
    assert!(ip("link show dev eth0").contains("02:00:00:00:00:01"));
    let all = ip("-oneline addr show");
    assert!(all.lines().any(|line| line.contains("kuasar") && line.contains("fd01::1/64")), "{all}");
    let all = ip("-oneline link show");
    assert!(all.lines().any(|line| line.contains("kuasar") && line.contains(",UP")), "{all}");
}

#[test]
fn what_cannot_be_done_is_said() {
    if !namespace() {
        return;
    }
    let mut network = Network::new().unwrap();
    let error = network.configure_links(&[link("eth0", "02:00:00:00:00:99", &[])]).unwrap_err();
    assert!(matches!(error, TaskError::NotFound(_)));
    let text = error.to_string();
    assert!(text.starts_with("link eth0 with hardware address 02:00:00:00:00:99 (there are: "), "{text}");
    assert!(text.contains("a 02:00:00:00:00:01"), "{text}");
    let error = network.add_routes(&routes(&[route("", "10.0.0.1", "eth9")])).unwrap_err().to_string();
    assert_eq!(error, "link \"eth9\" not found");
    network.configure_links(&[link("a", "02:00:00:00:00:01", &[])]).unwrap();
    let error = network.add_routes(&routes(&[route("", "10.0.0.1", "a")])).unwrap_err().to_string();
    assert!(error.starts_with("adding the route to 0.0.0.0/0 on a: Network is unreachable"), "{error}");
}

/// Changes of a pod's network while it runs: other names, another size, fewer addresses, other routes.
#[test]
fn updates_while_running() {
    if !namespace() {
        return;
    }
    let mut network = Network::new().unwrap();
    let one = |name: &str, addresses: &[(&str, &str)]| link(name, "02:00:00:00:00:01", addresses);
    let two = |name: &str, addresses: &[(&str, &str)]| link(name, "02:00:00:00:00:02", addresses);
    network
        .configure_links(&[
            one("eth0", &[("10.1.0.2", "24"), ("fd00::2", "64")]),
            two("eth1", &[("10.2.0.2", "24")]),
        ])
        .unwrap();
    // Both are up when they exchange their names.
    let mut swapped =
        [one("eth1", &[("10.1.0.2", "24"), ("fd00::2", "64")]), two("eth0", &[("10.2.0.2", "24")])];
    swapped[0].mtu = Some(1280);
    network.configure_links(&swapped).unwrap();
    let (eth0, eth1) = (ip("addr show dev eth0"), ip("addr show dev eth1"));
    assert!(
        eth0.contains("02:00:00:00:00:02") && eth0.contains("10.2.0.2/24") && eth0.contains("mtu 1400"),
        "{eth0}"
    );
    assert!(
        eth1.contains("02:00:00:00:00:01") && eth1.contains("10.1.0.2/24") && eth1.contains("mtu 1280"),
        "{eth1}"
    );
    assert!(eth0.contains(",UP") && eth1.contains(",UP") && !ip("link").contains("kuasar"), "{eth0}{eth1}");

    let mut wanted = [
        route("fd01::/64", "", "eth1"),
        route("", "fd00::1", "eth1"),
        route("10.9.0.0/16", "", "eth0"),
        route("", "10.2.0.1", "eth0"),
    ];
    (wanted[0].metric, wanted[1].metric) = (50, 60);
    wanted[1].source = "fd00::2".into();
    // As `ip route` has it: the host itself.
    wanted[2].scope = 253;
    network.replace_routes(&routes(&wanted)).unwrap();
    let (v4, v6) = (ip("route show"), ip("-6 route show"));
    assert!(v4.contains("10.9.0.0/16 dev eth0 proto static scope link"), "{v4}");
    assert!(v6.contains("fd01::/64 dev eth1 proto static metric 50"), "{v6}");
    assert!(v6.contains("default via fd00::1 dev eth1 proto static src fd00::2 metric 60"), "{v6}");
    // The same but for a metric: the old one goes.
    wanted[0].metric = 70;
    network.replace_routes(&routes(&wanted)).unwrap();
    let v6 = ip("-6 route show");
    assert!(v6.contains("fd01::/64 dev eth1 proto static metric 70") && !v6.contains("metric 50"), "{v6}");
    // And one with a metric is not the one without that is wanted now.
    wanted[0].metric = 0;
    wanted[3].metric = 80;
    network.replace_routes(&routes(&wanted)).unwrap();
    let (v4, v6) = (ip("route show"), ip("-6 route show"));
    assert!(v6.contains("fd01::/64 dev eth1 proto static metric 1024") && !v6.contains("metric 70"), "{v6}");
    assert!(v4.contains("default via 10.2.0.1 dev eth0 proto static metric 80"), "{v4}");
    wanted[3].metric = 0;
    network.replace_routes(&routes(&wanted)).unwrap();
    let v4 = ip("route show");
    assert!(v4.contains("default via 10.2.0.1 dev eth0 proto static") && !v4.contains("metric 80"), "{v4}");

    let neighbour = |mac: &str| api::Neighbour {
        address: "fd00::1".into(),
        device: "eth1".into(),
        hwAddr: mac.into(),
        ..Default::default()
    };
    for mac in ["ee:ee:ee:ee:ee:01", "ee:ee:ee:ee:ee:02"] {
        network.add_neighbours(&plan::all(&[neighbour(mac)]).unwrap()).unwrap();
        assert!(ip("-6 neigh show dev eth1").contains(&format!("fd00::1 lladdr {mac} PERMANENT")));
    }
    let mut other = neighbour("ee:ee:ee:ee:ee:03");
    (other.address, other.device) = ("10.2.0.77".into(), "eth0".into());
    network.replace_neighbours(&plan::all(&[other]).unwrap()).unwrap();
    let (v4, v6) = (ip("-4 neigh show nud permanent"), ip("-6 neigh show nud permanent"));
    assert!(
        v4.contains("10.2.0.77 dev eth0 lladdr ee:ee:ee:ee:ee:03") && !v6.contains("fd00::1"),
        "{v4}{v6}"
    );
    network.replace_neighbours(&[]).unwrap();
    assert_eq!(ip("-4 neigh show nud permanent"), "");

    // Nothing is wanted any more: what is left is the kernel's own.
    network.replace_routes(&[]).unwrap();
    network.configure_links(&[one("eth1", &[]), two("eth0", &[])]).unwrap();
    assert_eq!(ip("route show"), "");
    let (v4, v6) = (ip("-4 addr show"), ip("-6 addr show scope global"));
    assert!(!v4.contains("10.") && v6.is_empty(), "{v4}{v6}");
}
