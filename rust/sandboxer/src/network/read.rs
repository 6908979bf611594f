//! Reads the network that CNI left in the pod's network namespace, in the agent's words.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use kuasar_common::api::sandbox::{IPAddress, IPFamily, Interface, Neighbour, Route};
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressMessage, AddressScope},
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
        RouteType,
    },
    rule::{RuleAttribute, RuleMessage},
    tc::TcHandle,
};
use nix::libc;
use rtnetlink::{IpVersion, RouteMessageBuilder, packet_core::Nla};
use tokio_stream::{Stream, StreamExt};

use super::{
    NetworkError,
    existing::{self, Tun},
};

/// A link that the VM gets.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) interface: Interface,
    /// It is a tap itself.
    pub(super) tap: Option<Tun>,
}

/// All that the VM gets.
#[derive(Debug)]
pub(super) struct Pod {
    pub(super) links: Vec<Link>,
    pub(super) routes: Vec<Route>,
    pub(super) neighbours: Vec<Neighbour>,
}

/// Reads the thread's network namespace.
pub(super) async fn pod(handle: &rtnetlink::Handle) -> Result<Pod, NetworkError> {
    let messages = all(handle.link().get().execute(), "reading the pod's links").await?;
    let addresses = all(handle.address().get().execute(), "reading the pod's addresses").await?;
    let mut links = Vec::new();
    let bridges = existing::bridges(&messages);
    for message in messages.iter().filter(|message| !existing::is_behind(message, &bridges)) {
        let addresses = addresses.iter().filter(|address| address.header.index == message.header.index);
        links.extend(link(message, addresses)?);
    }
    refuse_twins(&links)?;
    let mut routes = Vec::new();
    for (version, request) in [
        (IpVersion::V4, RouteMessageBuilder::<Ipv4Addr>::new().build()),
        (IpVersion::V6, RouteMessageBuilder::<Ipv6Addr>::new().build()),
    ] {
        for message in all(handle.rule().get(version).execute(), "reading the pod's routing rules").await? {
            refuse_rule(&message)?;
        }
        for message in all(handle.route().get(request).execute(), "reading the pod's routes").await? {
            routes.extend(route(&message, &links)?);
        }
    }
    // A gateway must be reachable when the route through it is added; metric decides among equals.
    routes.sort_by_key(|route| (!route.gateway.is_empty(), route.dest.is_empty(), route.metric));
    let messages = all(handle.neighbours().get().execute(), "reading the pod's neighbours").await?;
    let neighbours = messages.iter().filter_map(|message| neighbour(message, &links)).collect();
    Ok(Pod { links, routes, neighbours })
}

/// Indices of the links that have an ingress qdisc.
pub(super) async fn ingress(handle: &rtnetlink::Handle) -> Result<BTreeSet<u32>, NetworkError> {
    let messages = all(handle.qdisc().get().execute(), "reading the pod's traffic control").await?;
    let there = messages.iter().filter(|message| message.header.parent == TcHandle::INGRESS);
    Ok(there.filter_map(|message| u32::try_from(message.header.index).ok()).collect())
}

/// Finds a link; `None` when there is none of that name.
pub(super) async fn link_by_name(
    handle: &rtnetlink::Handle,
    name: &str,
) -> Result<Option<LinkMessage>, NetworkError> {
    let mut found = std::pin::pin!(handle.link().get().match_name(name).execute());
    match found.next().await {
        Some(Ok(link)) => Ok(Some(link)),
        Some(Err(rtnetlink::Error::NetlinkError(e))) if -e.raw_code() == libc::ENODEV => Ok(None),
        Some(Err(error)) => Err(NetworkError::netlink(format!("looking for the link {name}"))(error)),
        None => Ok(None),
    }
}

async fn all<T>(
    messages: impl Stream<Item = Result<T, rtnetlink::Error>>,
    doing: &str,
) -> Result<Vec<T>, NetworkError> {
    match messages.collect::<Result<Vec<T>, _>>().await {
        Ok(messages) => Ok(messages),
        // A host without IPv6 has no routes and rules of it.
        Err(rtnetlink::Error::NetlinkError(e))
            if matches!(-e.raw_code(), libc::EAFNOSUPPORT | libc::EOPNOTSUPP) =>
        {
            Ok(Vec::new())
        }
        Err(error) => Err(NetworkError::netlink(doing)(error)),
    }
}

/// `None` for links that carry nothing: loopback, and those that are down without an address, such as the
/// tunnels that some kernels put into every namespace.
fn link<'a>(
    message: &LinkMessage,
    addresses: impl Iterator<Item = &'a AddressMessage>,
) -> Result<Option<Link>, NetworkError> {
    let flags = message.header.flags;
    let addresses: Vec<IPAddress> = addresses.filter_map(address).collect();
    if flags.contains(LinkFlags::Loopback) || (!flags.contains(LinkFlags::Up) && addresses.is_empty()) {
        return Ok(None);
    }
    let mut interface = Interface { IPAddresses: addresses, ..Interface::default() };
    let (mut kind, mut tap, mut own) = (None, None, &[][..]);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => interface.mtu = u64::from(*mtu),
            LinkAttribute::Address(address) => own = address,
            LinkAttribute::LinkInfo(infos) => {
                tap = Tun::of(infos).filter(|tun| tun.tap);
                kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.clone()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    interface.hwAddr =
        hardware_address(&if tap.is_some() { existing::guest_address(own) } else { own.to_owned() });
    match kind {
        Some(kind)
            if tap.is_some() || matches!(kind, InfoKind::Veth | InfoKind::MacVlan | InfoKind::MacVtap) =>
        {
            interface.type_ = if tap.is_some() { "tap".to_owned() } else { kind.to_string() };
            interface.device.clone_from(&interface.name);
            interface.down = !flags.contains(LinkFlags::Up);
            interface.raw_flags = flags.bits() & u32::try_from(libc::IFF_NOARP).unwrap_or(0);
            Ok(Some(Link { index: message.header.index, interface, tap }))
        }
        other => {
            let kind = match other {
                Some(InfoKind::Tun) => "tun (packets without ethernet)".to_owned(),
                other => other.map_or_else(|| "physical".to_owned(), |kind| kind.to_string()),
            };
            Err(NetworkError::Unsupported(format!(
                "the pod's link {} is of kind {kind}, which cannot be given to a VM; use a CNI plugin that makes veth, macvlan or \
                 tap links (bridge, ptp, macvlan, tap)",
                interface.name
            )))
        }
    }
}

/// The guest's agent finds a network card by its hardware address.
fn refuse_twins(links: &[Link]) -> Result<(), NetworkError> {
    let mut seen = BTreeMap::new();
    for Link { interface, .. } in links {
        if let Some(other) = seen.insert(&interface.hwAddr, &interface.name) {
            return Err(NetworkError::Unsupported(format!(
                "the pod's links {other} and {} both have the hardware address {}, by which a VM tells its network cards \
                 apart; give one of them another (CNI plugin tuning, mac)",
                interface.name, interface.hwAddr
            )));
        }
    }
    Ok(())
}

/// `None` for addresses that the guest makes itself.
fn address(message: &AddressMessage) -> Option<IPAddress> {
    if matches!(message.header.scope, AddressScope::Link | AddressScope::Host) {
        return None;
    }
    // On IPv4 `Address` is the peer's where there is one, `Local` always ours; IPv6 has `Local` only with a
    // peer.
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let other = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    let address = local.or(other)?;
    let peer = other.filter(|other| *other != address).map(|peer| peer.to_string());
    Some(IPAddress {
        family: family(address).into(),
        address: address.to_string(),
        mask: message.header.prefix_len.to_string(),
        peer: peer.unwrap_or_default(),
        ..IPAddress::default()
    })
}

fn route(message: &RouteMessage, links: &[Link]) -> Result<Option<Route>, NetworkError> {
    let RouteHeader { address_family, table, protocol, kind, .. } = message.header;
    // The kernel's own routes come with the addresses, in the guest as here.
    if table != RouteHeader::RT_TABLE_MAIN || protocol == RouteProtocol::Kernel {
        return Ok(None);
    }
    let mut route = Route {
        family: if address_family == AddressFamily::Inet6 { IPFamily::v6 } else { IPFamily::v4 }.into(),
        scope: u32::from(u8::from(message.header.scope)),
        flags: (message.header.flags & RouteFlags::Onlink).bits(),
        ..Route::default()
    };
    let mut link = None;
    let mut unsupported = (kind != RouteType::Unicast).then(|| format!("type {kind:?}"));
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                route.dest = format!("{}/{}", text(address)?, message.header.destination_prefix_length);
            }
            RouteAttribute::Gateway(address) => route.gateway = text(address)?,
            RouteAttribute::PrefSource(address) => route.source = text(address)?,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    match value(metric) {
                        Some(value) => drop(route.metrics.insert(u32::from(metric.kind()), value)),
                        None => unsupported = Some("a congestion control of its own".into()),
                    }
                }
            }
            RouteAttribute::MultiPath(_) => unsupported = Some("several next hops".into()),
            RouteAttribute::Via(_) => unsupported = Some("a gateway of another family".into()),
            RouteAttribute::Encap(_) => unsupported = Some("an encapsulation".into()),
            _ => {}
        }
    }
    if let Some(what) = unsupported {
        let dest = if route.dest.is_empty() { "default" } else { &route.dest };
        return Err(NetworkError::Unsupported(format!(
            "the pod's route {dest} has {what}, which the guest's agent cannot set; use a CNI plugin without it"
        )));
    }
    // Routes of links that the VM does not get mean nothing to it.
    let Some(link) = links.iter().find(|known| Some(known.index) == link) else { return Ok(None) };
    route.device.clone_from(&link.interface.name);
    // IPv6 routes have the metric 1024 unless told otherwise, and the guest's kernel knows.
    if address_family == AddressFamily::Inet6 && route.metric == 1024 {
        route.metric = 0;
    }
    Ok(Some(route))
}

/// All metrics are numbers, but for the name of a congestion control.
fn value(metric: &RouteMetric) -> Option<u32> {
    let mut value = [0; 4];
    (metric.value_len() == value.len() && !matches!(metric, RouteMetric::CcAlgo(_))).then(|| {
        metric.emit_value(&mut value);
        u32::from_ne_bytes(value)
    })
}

/// Rules beyond the kernel's own three choose among tables that the guest does not have.
fn refuse_rule(message: &RuleMessage) -> Result<(), NetworkError> {
    let wide = message.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Table(table) => Some(*table),
        _ => None,
    });
    let table = wide.unwrap_or(u32::from(message.header.table));
    if matches!(table, 0 | 253..=255) {
        return Ok(());
    }
    Err(NetworkError::Unsupported(format!(
        "the pod has a routing rule for table {table}, which the guest's agent cannot set; use a CNI plugin without rules"
    )))
}

fn neighbour(message: &NeighbourMessage, links: &[Link]) -> Option<Neighbour> {
    let link = links.iter().find(|link| link.index == message.header.ifindex)?;
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut neighbour = Neighbour { device: link.interface.name.clone(), ..Neighbour::default() };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => neighbour.address = a.to_string(),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) if !a.is_multicast() => {
                neighbour.address = a.to_string();
            }
            NeighbourAttribute::LinkLayerAddress(a) => neighbour.hwAddr = hardware_address(a),
            _ => {}
        }
    }
    (!neighbour.address.is_empty() && !neighbour.hwAddr.is_empty()).then_some(neighbour)
}

const fn family(address: IpAddr) -> IPFamily {
    if address.is_ipv6() { IPFamily::v6 } else { IPFamily::v4 }
}

fn text(address: &RouteAddress) -> Result<String, NetworkError> {
    match address {
        RouteAddress::Inet(address) => Ok(address.to_string()),
        RouteAddress::Inet6(address) => Ok(address.to_string()),
        other => Err(NetworkError::Unsupported(format!("a route of the pod has the address {other:?}"))),
    }
}

fn hardware_address(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}
