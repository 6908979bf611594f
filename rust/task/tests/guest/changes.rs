//! A network that changes while containers run.

use kuasar_common::api::sandbox::{
    IPAddress, Interface, Neighbour, Neighbours, Route, UpdateInterfacesRequest, UpdateRoutesRequest,
};
use ttrpc::Code;

use crate::{
    pod::{Pod, code},
    vm::MAC,
};

pub(crate) async fn network(pod: &Pod) {
    pod.create("net", &["sleep", "1000"], false, false).await.unwrap();
    pod.start("net", "").await.unwrap();
    let client = pod.vm.sandbox();
    let address =
        |text: &str, bits: &str| IPAddress { address: text.into(), mask: bits.into(), ..Default::default() };
    let link = Interface {
        name: "eth7".into(),
        hwAddr: MAC.into(),
        mtu: 1300,
        IPAddresses: vec![address("10.3.0.9", "24"), address("fd03::9", "64")],
        ..Default::default()
    };
    let update = UpdateInterfacesRequest { interfaces: vec![link.clone()], ..Default::default() };
    client.update_interfaces(pod.vm.context(), &update).await.unwrap();
    let shown = pod.run("net", "addr", &["ip", "addr"]).await.1;
    for part in ["eth7", "mtu 1300", "10.3.0.9/24", "fd03::9/64"] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
    assert!(!shown.contains("net0") && !shown.contains("10.0.2.15"), "{shown}");

    let route = |dest: &str, gateway: &str, source: &str, metric| Route {
        dest: dest.into(),
        gateway: gateway.into(),
        device: "eth7".into(),
        source: source.into(),
        metric,
        ..Default::default()
    };
    let mut update = UpdateRoutesRequest::new();
    // A gateway that is no neighbour by its address, before the route that says where it is.
    update.routes = vec![
        route("", "169.254.1.1", "10.3.0.9", 5),
        route("169.254.1.1", "", "", 0),
        route("fd04::/64", "fd03::1", "", 0),
    ];
    let mac = "ee:ee:ee:ee:ee:ee".to_owned();
    let gateway =
        Neighbour { address: "169.254.1.1".into(), device: "eth7".into(), hwAddr: mac, ..Default::default() };
    let list = Neighbours { neighbours: vec![gateway], ..Default::default() };
    update.neighbours = Some(list).into();
    client.update_routes(pod.vm.context(), &update).await.unwrap();
    let (v4, v6, neighbours) = routes(pod, "one").await;
    let default = v4.lines().find(|line| line.starts_with("default via 169.254.1.1 dev eth7")).expect(&v4);
    assert!(default.contains("src 10.3.0.9") && default.contains("metric 5"), "{v4}");
    assert!(!v4.contains("10.0.2.2") && v6.contains("fd04::/64 via fd03::1"), "{v4}{v6}");
    let gateway = neighbours.lines().find(|line| line.starts_with("169.254.1.1 ")).expect(&neighbours);
    assert!(gateway.contains("ee:ee:ee:ee:ee:ee") && gateway.contains("PERMANENT"), "{neighbours}");

    // Routes go with the next list; neighbours stay unless there is one of them, too.
    update = UpdateRoutesRequest::new();
    client.update_routes(pod.vm.context(), &update).await.unwrap();
    let (v4, v6, neighbours) = routes(pod, "two").await;
    assert!(
        !v4.contains("via") && !v6.contains("fd04::") && neighbours.contains("PERMANENT"),
        "{v4}{v6}{neighbours}"
    );
    update.neighbours = Some(Neighbours::new()).into();
    client.update_routes(pod.vm.context(), &update).await.unwrap();
    assert!(!routes(pod, "three").await.2.contains("PERMANENT"));

    update.routes = vec![route("10.9.0.0/33", "", "", 0)];
    let wrong = code(client.update_routes(pod.vm.context(), &update).await);
    assert_eq!(wrong.0, Code::INVALID_ARGUMENT);
    assert!(wrong.1.contains("\"33\" is no prefix length of 10.9.0.0"), "{}", wrong.1);
    pod.kill("net", "", 9, true).await.unwrap();
    pod.wait("net", "").await.unwrap();
    pod.delete("net", "").await.unwrap();
}

async fn routes(pod: &Pod, exec: &str) -> (String, String, String) {
    let script = "ip route; echo --; ip -6 route; echo --; busybox ip neigh";
    let shown = pod.run("net", exec, &["sh", "-c", script]).await.1;
    let mut parts = shown.split("--\n").map(str::to_owned);
    let mut next = || parts.next().unwrap();
    (next(), next(), next())
}
