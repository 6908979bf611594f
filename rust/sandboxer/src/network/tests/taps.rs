//! Taps that CNI made.

use super::*;

/// A tap as CNI's plugin `tap` makes it. With `bridge`, it is a port of a bridge in the pod's namespace, and
/// the former `eth0` is another port.
fn with_tap(mode: &str, bridge: bool) -> Option<Netns> {
    let netns = if bridge { Netns::with_eth0() } else { Netns::new() }?;
    let pod = &netns.pod;
    if bridge {
        ip(&format!("-n {pod} link add br0 up type bridge"));
        ip(&format!("-n {pod} link set eth0 down"));
        ip(&format!("-n {pod} addr flush dev eth0"));
        ip(&format!("-n {pod} link set eth0 name up0 master br0 up"));
    }
    ip(&format!("-n {pod} tuntap add dev eth0 mode {mode}"));
    ip(&format!("-n {pod} link set eth0 address 02:00:00:00:00:07 mtu 1400 up"));
    ip(&format!("-n {pod} addr add 10.77.0.5/24 dev eth0"));
    if bridge {
        ip(&format!("-n {pod} link set eth0 master br0"));
    } else {
        ip(&format!("-n {pod} route add default via 10.77.0.1"));
    }
    Some(netns)
}

fn arp_ignore(netns: &Netns) -> String {
    show("ip", &format!("netns exec {} cat {}", netns.pod, existing::ARP_IGNORE)).trim().to_owned()
}

#[tokio::test]
async fn a_tap_of_cni_is_opened_as_it_is_and_left_as_it_was() {
    for (mode, queues) in [("tap", 1), ("tap multi_queue", 2)] {
        let Some(netns) = with_tap(mode, false) else { return };
        let state = || {
            let show = |what: &str| show("ip", &format!("-n {} {what}", netns.pod));
            // Without what changes with the holder.
            let routes = show("route").replace(" linkdown", "");
            (show("-o -4 addr show dev eth0"), routes, arp_ignore(&netns))
        };
        let before = state();
        let network = prepare(&netns.path(), 2).await.unwrap();
        let ([nic], [interface]) = (network.nics.as_slice(), network.interfaces.as_slice()) else {
            panic!("{network:?}")
        };
        assert_eq!((nic.tap.as_str(), nic.queues.len(), nic.mtu), ("eth0", queues, 1400));
        // Not the tap's own, which is the other end's.
        assert_eq!((nic.mac.as_str(), interface.hwAddr.as_str()), ("06:00:00:00:00:07", "06:00:00:00:00:07"));
        assert_eq!((interface.name.as_str(), interface.type_.as_str()), ("eth0", "tap"));
        assert_eq!(interface.IPAddresses.first().map(|a| a.address.as_str()), Some("10.77.0.5"));
        assert_eq!(network.routes.first().map(|route| route.gateway.as_str()), Some("10.77.0.1"));
        assert!(!netns.links().contains("kua") && !netns.tc().contains("ingress"), "{}", netns.links());
        assert_eq!(arp_ignore(&netns), "1");
        if queues == 1 {
            let error = prepare(&netns.path(), 2).await.unwrap_err().to_string();
            assert!(error.starts_with("the pod's tap eth0 is held by another program, so"), "{error}");
        }
        let record = serde_json::to_string(&network.record).unwrap();
        drop(network);
        // Another daemon may do it.
        remove(&serde_json::from_str(&record).unwrap()).await.unwrap();
        assert_eq!(state(), before);
    }
}

#[tokio::test]
async fn a_tap_on_a_bridge_is_the_guests_alone() {
    let Some(netns) = with_tap("tap", true) else { return };
    let host = &netns.host;
    // The namespace has the guest's address, too, and its kernel would answer for it.
    let answers = |host: &str| {
        ip(&format!("-n {host} neigh flush all"));
        ip(&format!("netns exec {host} bash -c echo>/dev/udp/10.77.0.5/9"));
        thread::sleep(Duration::from_millis(200));
        show("ip", &format!("-n {host} neigh show 10.77.0.5")).contains("lladdr")
    };
    assert!((0..20).any(|_| answers(host)), "the bridge does not forward");
    let network = prepare(&netns.path(), 1).await.unwrap();
    assert_eq!(network.nics.iter().map(|nic| nic.tap.as_str()).collect::<Vec<_>>(), ["eth0"]);
    assert!(!answers(host), "somebody but the guest answers for its address");
    exchange(&netns, &network).await;
    remove(&network.record).await.unwrap();
    assert!(netns.links().contains("eth0") && netns.links().contains("up0"), "{}", netns.links());
}

#[tokio::test]
async fn a_tun_is_refused_by_name() {
    let Some(netns) = Netns::with_eth0() else { return };
    ip(&format!("-n {} tuntap add dev tun0 mode tun", netns.pod));
    ip(&format!("-n {} link set tun0 up", netns.pod));
    let error = prepare(&netns.path(), 1).await.unwrap_err().to_string();
    let expected =
        "the pod's link tun0 is of kind tun (packets without ethernet), which cannot be given to a VM; use";
    assert!(error.starts_with(expected), "{error}");
}
