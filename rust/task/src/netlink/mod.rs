//! Links, addresses, routes and neighbours of the pod, by rtnetlink.

pub mod plan;
pub mod socket;

use std::{io, net::IpAddr};

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
        RouteScope, RouteType,
    },
};
use rustix::io::Errno;

use self::{
    plan::{Address, Link, Neighbour, Route},
    socket::Socket,
};
use crate::error::TaskError;

/// Metric of an IPv6 route that was given none (`IP6_RT_PRIO_USER` of `net/ip6_route.h`).
const IP6_METRIC: u32 = 1024;
/// Index of the loopback link in every network namespace.
const LOOPBACK: u32 = 1;

/// A link that exists.
#[derive(Clone, Debug)]
struct Existing {
    index: u32,
    name: String,
    mac: Vec<u8>,
}

/// The VM's network.
pub struct Network {
    socket: Socket,
}

impl Network {
    /// Opens it.
    ///
    /// # Errors
    /// When the kernel has no rtnetlink.
    pub fn new() -> Result<Self, TaskError> {
        Ok(Self { socket: Socket::new().map_err(TaskError::io("opening an rtnetlink socket"))? })
    }

    /// Brings the loopback link up.
    ///
    /// # Errors
    /// The kernel's.
    pub fn loopback_up(&mut self) -> Result<(), TaskError> {
        let mut up = LinkMessage::default();
        up.header.index = LOOPBACK;
        up.header.flags = LinkFlags::Up;
        up.header.change_mask = LinkFlags::Up;
        self.set(RouteNetlinkMessage::SetLink(up), 0).map_err(TaskError::io("bringing lo up"))
    }

    /// Names the links, found by their hardware addresses.
    ///
    /// # Errors
    /// When there is no such link, or the kernel refuses.
    pub fn name_links(&mut self, links: &[Link]) -> Result<(), TaskError> {
        for link in links {
            let existing = self.links()?;
            let found = find(&existing, link)?;
            self.rename(&existing, found, &link.name)?;
        }
        Ok(())
    }

    /// Names and configures the links, found by their hardware addresses, and brings those up that are to be.
    /// Addresses that a link has and shall not have are removed.
    ///
    /// # Errors
    /// When there is no such link, or the kernel refuses.
    pub fn configure_links(&mut self, links: &[Link]) -> Result<(), TaskError> {
        for link in links {
            let existing = self.links()?;
            let found = find(&existing, link)?;
            self.rename(&existing, found, &link.name)?;
            self.configure(found.index, link).map_err(TaskError::io(format!("configuring {}", link.name)))?;
        }
        Ok(())
    }

    /// Adds routes, those without a gateway first, because gateways are reached through them.
    ///
    /// # Errors
    /// When there is no such link, or the kernel refuses.
    pub fn add_routes(&mut self, routes: &[Route]) -> Result<(), TaskError> {
        let links = self.links()?;
        let (via, direct): (Vec<&Route>, Vec<&Route>) =
            routes.iter().partition(|route| route.gateway.is_some());
        for route in direct.into_iter().chain(via) {
            let (network, bits) = route.destination;
            let doing = format!("adding the route to {network}/{bits} on {}", route.device);
            let message = route_message(route, index(&links, &route.device)?);
            let added = self.set(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE);
            added.map_err(TaskError::io(doing))?;
        }
        Ok(())
    }

    /// Adds `routes` and removes all others, except those that the kernel made itself.
    ///
    /// # Errors
    /// When there is no such link, or the kernel refuses.
    pub fn replace_routes(&mut self, routes: &[Route]) -> Result<(), TaskError> {
        self.add_routes(routes)?;
        let links = self.links()?;
        let mut wanted = Vec::new();
        for route in routes {
            wanted.push((route_message(route, index(&links, &route.device)?), route));
        }
        let dump = self.socket.dump(RouteNetlinkMessage::GetRoute(RouteMessage::default()));
        for message in dump.map_err(TaskError::io("listing routes"))? {
            let RouteNetlinkMessage::NewRoute(route) = message else { continue };
            let ours = route.header.table == RouteHeader::RT_TABLE_MAIN
                && route.header.kind == RouteType::Unicast
                && !matches!(route.header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra);
            if ours && !wanted.iter().any(|(wanted, plan)| same_route(&route, wanted, plan)) {
                let removed = self.set(RouteNetlinkMessage::DelRoute(route), 0);
                removed.map_err(TaskError::io("removing a route"))?;
            }
        }
        Ok(())
    }

    /// Adds permanent neighbours.
    ///
    /// # Errors
    /// When there is no such link, or the kernel refuses.
    pub fn add_neighbours(&mut self, neighbours: &[Neighbour]) -> Result<(), TaskError> {
        let links = self.links()?;
        for neighbour in neighbours {
            let mut message = NeighbourMessage::default();
            message.header.family = family(neighbour.address);
            message.header.ifindex = index(&links, &neighbour.device)?;
            message.header.state = NeighbourState::Permanent;
            message.attributes.push(NeighbourAttribute::Destination(neighbour_address(neighbour.address)));
            message.attributes.push(NeighbourAttribute::LinkLayerAddress(neighbour.mac.to_vec()));
            self.set(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
                .map_err(TaskError::io(format!("adding the neighbour {}", neighbour.address)))?;
        }
        Ok(())
    }

    /// Adds `neighbours` and removes all other permanent ones.
    ///
    /// # Errors
    /// When there is no such link, or the kernel refuses.
    pub fn replace_neighbours(&mut self, neighbours: &[Neighbour]) -> Result<(), TaskError> {
        self.add_neighbours(neighbours)?;
        let links = self.links()?;
        let mut wanted = Vec::new();
        for neighbour in neighbours {
            wanted.push((index(&links, &neighbour.device)?, neighbour_address(neighbour.address)));
        }
        let dump = self.socket.dump(RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()));
        for message in dump.map_err(TaskError::io("listing neighbours"))? {
            let RouteNetlinkMessage::NewNeighbour(neighbour) = message else { continue };
            let is = |(link, address): &(u32, NeighbourAddress)| {
                let destination = NeighbourAttribute::Destination(address.clone());
                neighbour.header.ifindex == *link && neighbour.attributes.contains(&destination)
            };
            let ours = neighbour.header.state == NeighbourState::Permanent;
            if ours && neighbour.header.ifindex != LOOPBACK && !wanted.iter().any(is) {
                let removed = self.set(RouteNetlinkMessage::DelNeighbour(neighbour), 0);
                removed.map_err(TaskError::io("removing a neighbour"))?;
            }
        }
        Ok(())
    }

    fn set(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.socket.request(message, flags)
    }

    fn links(&mut self) -> Result<Vec<Existing>, TaskError> {
        let dump = self.socket.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()));
        let messages = dump.map_err(TaskError::io("listing links"))?;
        Ok(messages.into_iter().filter_map(existing).collect())
    }

    /// Renames a link; one that has the name already gets a name nobody asks for.
    fn rename(&mut self, links: &[Existing], link: &Existing, name: &str) -> Result<(), TaskError> {
        if link.name == name {
            return Ok(());
        }
        if let Some(other) = links.iter().find(|other| other.name == name) {
            let aside = format!("kuasar{}", other.index);
            // Up or down as it is: nobody brings it up again.
            self.rename_one(other.index, &aside, LinkFlags::empty())
                .map_err(TaskError::io(format!("renaming {name} to {aside}")))?;
        }
        // Not while it is up; it is brought up with its addresses, if it is to be.
        self.rename_one(link.index, name, LinkFlags::Up)
            .map_err(TaskError::io(format!("renaming {} to {name}", link.name)))
    }

    fn rename_one(&mut self, index: u32, name: &str, cleared: LinkFlags) -> io::Result<()> {
        let mut rename = LinkMessage::default();
        rename.header.index = index;
        rename.header.change_mask = cleared;
        rename.attributes.push(LinkAttribute::IfName(name.to_owned()));
        self.set(RouteNetlinkMessage::SetLink(rename), 0)
    }

    fn configure(&mut self, index: u32, link: &Link) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags.set(LinkFlags::Noarp, link.noarp);
        message.header.flags.set(LinkFlags::Up, link.up);
        message.header.change_mask = LinkFlags::Up | LinkFlags::Noarp;
        message.attributes.extend(link.mtu.map(LinkAttribute::Mtu));
        self.set(RouteNetlinkMessage::SetLink(message), 0)?;
        for address in self.addresses(index)? {
            let there = address_of(&address);
            if there.is_some_and(|there| link.addresses.contains(&there)) {
                continue;
            }
            match self.set(RouteNetlinkMessage::DelAddress(address), 0) {
                // Went together with another one.
                Err(error) if error.raw_os_error() == Some(Errno::ADDRNOTAVAIL.raw_os_error()) => {}
                done => done?,
            }
        }
        for address in &link.addresses {
            let message = address_message(index, address);
            self.set(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)?;
        }
        Ok(())
    }

    /// Addresses of a link, without those the kernel gives every IPv6 link.
    fn addresses(&mut self, index: u32) -> io::Result<Vec<AddressMessage>> {
        let dump = self.socket.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
        let addresses = dump.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewAddress(address) => Some(address),
            _ => None,
        });
        Ok(addresses.filter(|a| a.header.index == index && a.header.scope != AddressScope::Link).collect())
    }
}

fn find<'a>(existing: &'a [Existing], link: &Link) -> Result<&'a Existing, TaskError> {
    existing.iter().find(|existing| existing.mac == link.mac).ok_or_else(|| {
        let there: Vec<String> =
            existing.iter().map(|link| format!("{} {}", link.name, mac_text(&link.mac))).collect();
        TaskError::NotFound(format!(
            "link {} with hardware address {} (there are: {})",
            link.name,
            mac_text(&link.mac),
            there.join(", ")
        ))
    })
}

fn existing(message: RouteNetlinkMessage) -> Option<Existing> {
    let RouteNetlinkMessage::NewLink(link) = message else { return None };
    let mut existing = Existing { index: link.header.index, name: String::new(), mac: Vec::new() };
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => existing.name = name,
            LinkAttribute::Address(mac) => existing.mac = mac,
            _ => {}
        }
    }
    Some(existing)
}

fn mac_text(mac: &[u8]) -> String {
    let bytes: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}

fn index(links: &[Existing], name: &str) -> Result<u32, TaskError> {
    let found = links.iter().find(|link| link.name == name);
    found.map(|link| link.index).ok_or_else(|| TaskError::NotFound(format!("link {name:?}")))
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

const fn neighbour_address(address: IpAddr) -> NeighbourAddress {
    match address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    }
}

fn address_message(index: u32, address: &Address) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.family = family(address.ip);
    message.header.prefix_len = address.bits;
    message.attributes.push(AddressAttribute::Address(address.peer.unwrap_or(address.ip)));
    message.attributes.push(AddressAttribute::Local(address.ip));
    // Nobody else has it: it is the pod's. Duplicate detection would keep it unusable for seconds.
    if address.ip.is_ipv6() {
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}

fn address_of(message: &AddressMessage) -> Option<Address> {
    let (mut local, mut other) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => other = Some(*address),
            _ => {}
        }
    }
    let ip = local.or(other)?;
    Some(Address { ip, bits: message.header.prefix_len, peer: other.filter(|other| *other != ip) })
}

fn route_message(route: &Route, index: u32) -> RouteMessage {
    let (network, bits) = route.destination;
    let mut message = RouteMessage::default();
    message.header.address_family = family(network);
    message.header.destination_prefix_length = bits;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.header.scope = match (route.scope, route.gateway) {
        // Nobody said so, and without a gateway it cannot be further away.
        (0, None) if network.is_ipv4() => RouteScope::Link,
        (scope, _) => RouteScope::from(scope),
    };
    message.header.flags = RouteFlags::from_bits_retain(route.flags);
    if bits > 0 {
        message.attributes.push(RouteAttribute::Destination(RouteAddress::from(network)));
    }
    message
        .attributes
        .extend(route.gateway.map(|gateway| RouteAttribute::Gateway(RouteAddress::from(gateway))));
    message
        .attributes
        .extend(route.source.map(|source| RouteAttribute::PrefSource(RouteAddress::from(source))));
    message.attributes.push(RouteAttribute::Oif(index));
    message.attributes.extend(route.metric.map(RouteAttribute::Priority));
    if !route.metrics.is_empty() {
        let metric = |(kind, value): &(u16, u32)| {
            RouteMetric::Other(DefaultNla::new(*kind, value.to_ne_bytes().to_vec()))
        };
        message.attributes.push(RouteAttribute::Metrics(route.metrics.iter().map(metric).collect()));
    }
    message
}

/// Returns true if a route that exists is one that is wanted.
fn same_route(exists: &RouteMessage, wanted: &RouteMessage, plan: &Route) -> bool {
    let has = |attribute: &RouteAttribute| exists.attributes.contains(attribute);
    let gateway = |attribute: &&RouteAttribute| matches!(attribute, RouteAttribute::Gateway(_));
    let metric = exists.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Priority(metric) => Some(*metric),
        _ => None,
    });
    let same_metric = match plan.metric {
        Some(wanted) => metric == Some(wanted),
        // The kernel gives routes of IPv6 one.
        None => {
            metric.is_none_or(|metric| metric == 0 || (plan.destination.0.is_ipv6() && metric == IP6_METRIC))
        }
    };
    exists.header.address_family == wanted.header.address_family
        && exists.header.destination_prefix_length == wanted.header.destination_prefix_length
        && exists.attributes.iter().find(gateway) == wanted.attributes.iter().find(gateway)
        && wanted
            .attributes
            .iter()
            .filter(|a| matches!(a, RouteAttribute::Destination(_) | RouteAttribute::Oif(_)))
            .all(has)
        && same_metric
}
