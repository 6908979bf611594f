//! In real network namespaces, with real veth pairs, taps and `tc`.

mod rules;
mod taps;

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    os::fd::AsFd,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use rtnetlink::NETNS_PATH;

use super::*;
use crate::testing::eventually;

/// A namespace as CNI's bridge plugin leaves it: a veth `eth0` whose other end is in a namespace that plays
/// the host.
struct Netns {
    pod: String,
    host: String,
}

fn ip(args: &str) {
    let output = Command::new("ip").args(args.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
}

fn show(program: &str, args: &str) -> String {
    let output = Command::new(program).args(args.split_whitespace()).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

impl Netns {
    /// `None` where there can be no namespaces and taps: in a build sandbox, or without root.
    fn new() -> Option<Self> {
        let able = rustix::process::geteuid().is_root()
            && Path::new("/dev/net/tun").exists()
            && ["ip", "tc"].iter().all(|program| Command::new(program).arg("-V").output().is_ok());
        if !able {
            eprintln!("skipped: needs root, /dev/net/tun and the programs ip and tc");
            return None;
        }
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("vmnet{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let this = Self { pod: format!("{name}p"), host: format!("{name}h") };
        ip(&format!("netns add {}", this.pod));
        ip(&format!("netns add {}", this.host));
        Some(this)
    }

    fn with_eth0() -> Option<Self> {
        let this = Self::new()?;
        let (pod, host) = (&this.pod, &this.host);
        ip(&format!("-n {pod} link add eth0 mtu 1400 type veth peer name peer netns {host}"));
        ip(&format!("-n {pod} link set eth0 address 02:00:00:00:00:05 up"));
        ip(&format!("-n {host} link set peer up"));
        ip(&format!("-n {host} addr add 10.77.0.1/24 dev peer"));
        ip(&format!("-n {pod} addr add 10.77.0.5/24 dev eth0"));
        ip(&format!("-n {pod} addr add fd77::5/64 dev eth0 nodad"));
        ip(&format!("-n {pod} route add default via 10.77.0.1"));
        ip(&format!(
            "-n {pod} route add 192.0.2.0/24 via 10.77.0.9 src 10.77.0.5 metric 7 mtu lock 1300 initcwnd 20"
        ));
        ip(&format!("-n {pod} addr add 10.79.0.5 peer 10.79.0.1/32 dev eth0"));
        ip(&format!("-n {pod} route add 169.254.1.1/32 dev eth0 scope link"));
        ip(&format!("-n {pod} -6 route add default via fd77::1"));
        ip(&format!("-n {pod} neigh add 10.77.0.1 lladdr 02:00:00:00:00:01 nud permanent dev eth0"));
        Some(this)
    }

    fn path(&self) -> PathBuf {
        Path::new(NETNS_PATH).join(&self.pod)
    }

    fn tc(&self) -> String {
        show("tc", &format!("-n {} qdisc show", self.pod))
    }

    fn links(&self) -> String {
        show("ip", &format!("-n {} -o link show", self.pod))
    }
}

async fn prepare(netns: &Path, queues: u32) -> Result<PodNetwork, NetworkError> {
    Plan::read(netns).await?.make(queues).await
}

impl Drop for Netns {
    fn drop(&mut self) {
        for name in [&self.pod, &self.host] {
            drop(Command::new("ip").args(["netns", "del", name]).status());
        }
    }
}

/// A daemon that dies while it makes a network has recorded before everything that it leaves.
#[tokio::test]
async fn what_will_be_made_is_known_before() {
    let Some(netns) = Netns::with_eth0() else { return };
    let plan = Plan::read(&netns.path()).await.unwrap();
    assert!(!netns.links().contains("kua") && !netns.tc().contains("ingress"), "it is made already");
    let record = plan.record().clone();
    // Before anything was made, and after all was.
    remove(&record).await.unwrap();
    let network = plan.make(1).await.unwrap();
    assert_eq!(network.record, record);
    assert_eq!((record.taps.len(), record.redirected.as_slice()), (1, &["eth0".to_owned()][..]));
    drop(network);
    assert!(netns.tc().contains("ingress"));
    remove(&record).await.unwrap();
    assert!(!netns.tc().contains("ingress"), "{}", netns.tc());
}

#[tokio::test]
async fn a_link_that_is_down_stays_down() {
    let Some(netns) = Netns::with_eth0() else { return };
    let pod = &netns.pod;
    ip(&format!("-n {pod} link add down0 type veth peer name nothing netns {}", netns.host));
    let network = prepare(&netns.path(), 1).await.unwrap();
    assert_eq!(network.interfaces.len(), 1, "without an address it is nothing");
    remove(&network.record).await.unwrap();
    drop(network);
    ip(&format!("-n {pod} addr add 10.78.0.5/24 dev down0"));
    let network = prepare(&netns.path(), 1).await.unwrap();
    let mut down: Vec<_> = network.interfaces.iter().map(|i| (i.name.as_str(), i.down)).collect();
    down.sort_unstable();
    assert_eq!(down, [("down0", true), ("eth0", false)]);
    remove(&network.record).await.unwrap();
}

#[tokio::test]
async fn a_veth_becomes_a_network_card_and_messages() {
    let Some(netns) = Netns::with_eth0() else { return };
    let network = prepare(&netns.path(), 2).await.unwrap();

    let [nic] = network.nics.as_slice() else { panic!("one card, not {:?}", network.nics) };
    assert_eq!((nic.mac.as_str(), nic.mtu, nic.queues.len()), ("02:00:00:00:00:05", 1400, 2));
    let [interface] = network.interfaces.as_slice() else { panic!("{:?}", network.interfaces) };
    assert_eq!((interface.name.as_str(), interface.mtu), ("eth0", 1400));
    assert_eq!(interface.hwAddr, "02:00:00:00:00:05");
    let mut addresses: Vec<_> =
        interface.IPAddresses.iter().map(|a| format!("{}/{} {}", a.address, a.mask, a.peer)).collect();
    addresses.sort();
    assert_eq!(addresses, ["10.77.0.5/24 ", "10.79.0.5/32 10.79.0.1", "fd77::5/64 "]);

    let routes: Vec<_> = network
        .routes
        .iter()
        .map(|r| {
            assert_eq!(r.device, "eth0");
            format!("{} via {} src {} metric {} scope {}", r.dest, r.gateway, r.source, r.metric, r.scope)
        })
        .collect();
    assert_eq!(
        routes,
        [
            "169.254.1.1/32 via  src  metric 0 scope 253",
            "192.0.2.0/24 via 10.77.0.9 src 10.77.0.5 metric 7 scope 0",
            " via 10.77.0.1 src  metric 0 scope 0",
            " via fd77::1 src  metric 0 scope 0",
        ]
    );
    // RTAX_LOCK (a bit for each that is), RTAX_MTU, RTAX_INITCWND.
    let metrics: BTreeMap<u32, u32> = network
        .routes
        .iter()
        .flat_map(|route| route.metrics.iter().map(|(kind, value)| (*kind, *value)))
        .collect();
    assert_eq!(metrics, BTreeMap::from([(1, 1 << 2), (2, 1300), (11, 20)]));
    let neighbours: Vec<_> =
        network.neighbours.iter().map(|n| (n.address.as_str(), n.hwAddr.as_str())).collect();
    assert_eq!(neighbours, [("10.77.0.1", "02:00:00:00:00:01")]);

    let links = netns.links();
    assert!(links.contains("eth0@") && links.contains(&nic.tap) && links.contains("mtu 1400"), "{links}");
    remove(&network.record).await.unwrap();
    assert!(!netns.links().contains(&nic.tap));
    assert!(!netns.tc().contains("ingress"), "{}", netns.tc());
    remove(&network.record).await.unwrap();
}

/// Sends a broadcast from the host's side and reads it at the tap, then the other way round.
#[tokio::test]
async fn frames_pass_both_ways() {
    let Some(netns) = Netns::with_eth0() else { return };
    let network = prepare(&netns.path(), 1).await.unwrap();
    exchange(&netns, &network).await;
    remove(&network.record).await.unwrap();
}

async fn exchange(netns: &Netns, network: &PodNetwork) {
    let queue = network.nics[0].queues[0].try_clone().unwrap();

    let host = Path::new(NETNS_PATH).join(&netns.host);
    let udp = thread::spawn(move || {
        let host = File::open(host).unwrap();
        rustix::thread::move_into_link_name_space(host.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        let udp = std::net::UdpSocket::bind("10.77.0.1:4000").unwrap();
        udp.set_broadcast(true).unwrap();
        udp.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let mut buffer = [0; 64];
        // Again and again: a bridge forwards to a port only some time after that has a carrier.
        for _ in 0..50 {
            udp.send_to(b"to the guest", "10.77.0.255:4001").unwrap();
            if let Ok((length, from)) = udp.recv_from(&mut buffer) {
                return (buffer[..length].to_vec(), from.to_string());
            }
        }
        panic!("nothing came from the guest");
    });
    let from_guest = tokio::task::spawn_blocking(move || {
        let mut queue = File::from(queue);
        let mut buffer = [0; 2048];
        // Other frames (IPv6 multicast of the host's end) come by, too.
        loop {
            let length = queue.read(&mut buffer).unwrap();
            if buffer[..length].windows(12).any(|w| w == b"to the guest") {
                break;
            }
        }
        // A frame without checksums to compute: virtio header, ethernet, IPv4, UDP with checksum 0.
        let mut frame = vec![0; 10];
        frame.extend([0xff; 6].iter().chain(&[2, 0, 0, 0, 0, 5, 8, 0]));
        let mut header = vec![0x45, 0, 0, 20 + 8 + 10, 0, 0, 0, 0, 64, 17, 0, 0, 10, 77, 0, 5, 10, 77, 0, 1];
        let sum: u32 = header.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(c[1])).sum();
        let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        frame.extend(header);
        frame.extend([0x0f, 0xa1, 0x0f, 0xa0, 0, 18, 0, 0]);
        frame.extend(b"from guest");
        queue.write_all(&frame).unwrap();
    });
    timeout(Duration::from_secs(10), from_guest).await.unwrap().unwrap();
    let (bytes, from) = udp.join().unwrap();
    assert_eq!((bytes.as_slice(), from.as_str()), (&b"from guest"[..], "10.77.0.5:4001"));
}

#[tokio::test]
async fn a_tap_vanishes_with_its_last_holder_and_removal_still_works() {
    let Some(netns) = Netns::with_eth0() else { return };
    let network = prepare(&netns.path(), 1).await.unwrap();
    let (record, tap) = (network.record.clone(), network.nics[0].tap.clone());
    drop(network);
    // Other tests fork, and for a moment their children have a copy of the tap's descriptor.
    eventually("the tap goes", || !netns.links().contains(&tap)).await;
    assert!(netns.tc().contains("ingress"));
    remove(&record).await.unwrap();
    assert!(!netns.tc().contains("ingress"));
    drop(netns);
    remove(&record).await.unwrap();
}

#[tokio::test]
async fn what_a_vm_cannot_have_is_refused_by_name_and_nothing_is_left() {
    for (setup, expected) in [
        (
            "link add br0 up type bridge",
            "the pod's link br0 is of kind bridge, which cannot be given to a VM; use a CNI plugin",
        ),
        ("link add vx0 up type vxlan id 7 dstport 4789", "the pod's link vx0 is of kind vxlan, which cannot"),
        (
            "link add eth1 up address 02:00:00:00:00:05 type veth peer name other",
            "the pod's links eth0 and eth1 both have the hardware address 02:00:00:00:00:05, by which",
        ),
        (
            "route add 198.51.100.0/24 via 10.77.0.1 congctl reno",
            "the pod's route 198.51.100.0/24 has a congestion control of its own",
        ),
        ("route add blackhole 198.51.100.0/24", "the pod's route 198.51.100.0/24 has type BlackHole"),
        ("rule add from 10.77.0.5 table 100", "the pod has a routing rule for table 100"),
        (
            "route add 198.51.100.0/24 nexthop via 10.77.0.1 nexthop via 10.77.0.2",
            "the pod's route 198.51.100.0/24 has several next hops",
        ),
    ] {
        let Some(netns) = Netns::with_eth0() else { return };
        ip(&format!("-n {} {setup}", netns.pod));
        let error = prepare(&netns.path(), 1).await.unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
        assert!(!netns.tc().contains("ingress") && !netns.links().contains("kua"), "{}", netns.links());
    }
}

#[tokio::test]
async fn a_failure_half_way_leaves_nothing() {
    let Some(netns) = Netns::with_eth0() else { return };
    let (pod, host) = (&netns.pod, &netns.host);
    ip(&format!("-n {pod} link add eth1 up type veth peer name peer1 netns {host}"));
    // Someone else's ingress qdisc is in the way of the second card.
    let status =
        Command::new("tc").args(["-n", pod, "qdisc", "add", "dev", "eth1", "clsact"]).status().unwrap();
    assert!(status.success());
    let plan = Plan::read(&netns.path()).await.unwrap();
    assert_eq!(plan.record().redirected, ["eth0"], "the other one is somebody else's");
    let error = plan.make(1).await.unwrap_err().to_string();
    assert!(error.starts_with("redirecting the traffic of eth1 to kua"), "{error}");
    assert!(!netns.links().contains("kua"), "{}", netns.links());
    let tc = netns.tc();
    assert!(!tc.contains("ingress") && tc.contains("clsact"), "{tc}");
}

#[tokio::test]
async fn macvlan_and_macvtap_become_network_cards_too() {
    for kind in ["macvlan", "macvtap"] {
        let Some(netns) = Netns::new() else { return };
        let (pod, host) = (&netns.pod, &netns.host);
        ip(&format!("-n {host} link add up0 up type veth peer name out0"));
        ip(&format!("-n {host} link set out0 up"));
        ip(&format!("-n {host} link add mv0 link up0 type {kind} mode bridge"));
        ip(&format!("-n {host} link set mv0 netns {pod} name eth0"));
        ip(&format!("-n {pod} link set eth0 address 02:00:00:00:00:07 up"));
        ip(&format!("-n {pod} addr add 10.78.0.5/24 dev eth0"));
        let network = prepare(&netns.path(), 1).await.unwrap();
        let [interface] = network.interfaces.as_slice() else { panic!("{:?}", network.interfaces) };
        assert_eq!((interface.type_.as_str(), interface.name.as_str()), (kind, "eth0"));
        assert_eq!(network.nics[0].mac, "02:00:00:00:00:07");
        // A frame for its address arrives at the tap.
        let mut queue = File::from(network.nics[0].queues[0].try_clone().unwrap());
        ip(&format!("-n {host} addr add 10.78.0.1/24 dev out0"));
        ip(&format!("-n {host} neigh add 10.78.0.5 lladdr 02:00:00:00:00:07 dev out0"));
        let host = Path::new(NETNS_PATH).join(host);
        let send = move || {
            let host = File::open(host).unwrap();
            rustix::thread::move_into_link_name_space(host.as_fd(), Some(LinkNameSpaceType::Network))
                .unwrap();
            std::net::UdpSocket::bind("10.78.0.1:0").unwrap().send_to(b"hi", "10.78.0.5:9").unwrap();
        };
        thread::spawn(send).join().unwrap();
        let end = std::time::Instant::now() + Duration::from_secs(5);
        rustix::io::ioctl_fionbio(&queue, true).unwrap();
        let mut buffer = [0; 2048];
        // Behind the headers of virtio, ethernet, IPv4 and UDP.
        while !queue.read(&mut buffer).is_ok_and(|read| buffer[..read].get(52..54) == Some(&b"hi"[..])) {
            assert!(std::time::Instant::now() < end, "no frame came through {kind}");
            thread::sleep(Duration::from_millis(1));
        }
        remove(&network.record).await.unwrap();
        assert!(!netns.tc().contains("ingress"), "{}", netns.tc());
    }
}

/// Connects in a pod's namespace, as containerd does; what the other side says it is called.
fn dial(netns: &Netns, address: &'static str) -> io::Result<std::net::TcpStream> {
    let pod = netns.path();
    let dialled = thread::spawn(move || {
        rustix::thread::move_into_link_name_space(
            File::open(pod)?.as_fd(),
            Some(LinkNameSpaceType::Network),
        )?;
        std::net::TcpStream::connect_timeout(&address.parse().unwrap(), Duration::from_secs(2))
    });
    dialled.join().unwrap()
}

#[tokio::test]
async fn one_listener_gets_whatever_is_connected_to_on_the_loopback() {
    let Some(netns) = Netns::with_eth0() else { return };
    let mut network = prepare(&netns.path(), 1).await.unwrap();
    let Forward { listener, link } = network.forward.take().expect("this kernel can forward ports");
    let listener = std::net::TcpListener::from(listener);
    listener.set_nonblocking(false).unwrap();
    for (address, seen) in [
        ("127.0.0.1:80", "[::ffff:127.0.0.1]:80"),
        ("127.9.8.7:65535", "[::ffff:127.9.8.7]:65535"),
        ("[::1]:443", "[::1]:443"),
    ] {
        let client = dial(&netns, address).unwrap();
        let (served, _) = listener.accept().unwrap();
        assert_eq!(served.local_addr().unwrap().to_string(), seen);
        drop(client);
    }
    // The pod's own addresses are the VM's: nothing of the namespace answers there.
    for address in ["10.77.0.5:80", "[fd77::5]:80"] {
        let error = dial(&netns, address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{address}");
    }
    // With its last descriptor, all is as before; a program that another test is just starting has them all
    // for a moment.
    drop(link);
    let refused = || dial(&netns, "127.0.0.1:80").err().map(|error| error.kind());
    for _ in 0..100 {
        if refused().is_some() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(refused(), Some(io::ErrorKind::ConnectionRefused));
    remove(&network.record).await.unwrap();
}

#[tokio::test]
async fn loopback_alone_is_no_network_and_a_missing_namespace_is_named() {
    let Some(netns) = Netns::new() else { return };
    let network = prepare(&netns.path(), 1).await.unwrap();
    assert!(network.nics.is_empty() && network.interfaces.is_empty() && network.routes.is_empty());
    let error = prepare(Path::new("/nonexistent/netns"), 1).await.unwrap_err().to_string();
    assert_eq!(
        error,
        "entering the network namespace /nonexistent/netns: No such file or directory (os error 2)"
    );
}
