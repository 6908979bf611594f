//! The host's wishes, checked and typed before anything is changed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kuasar_common::api::sandbox as api;

use crate::error::TaskError;

/// Longest name of a link, in bytes (`IFNAMSIZ` without its end).
const MAX_NAME: usize = 15;
/// `IFF_NOARP` of `linux/if.h`.
const IFF_NOARP: u32 = 0x80;

/// A link as it shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Finds it.
    pub mac: [u8; 6],
    /// Its name.
    pub name: String,
    /// Its MTU in bytes; `None` leaves it.
    pub mtu: Option<u32>,
    /// Its addresses.
    pub addresses: Vec<Address>,
    /// It does no ARP.
    pub noarp: bool,
    /// It is to be up.
    pub up: bool,
}

/// An address of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// It.
    pub ip: IpAddr,
    /// Length of the network's prefix of it, or of the peer, in bits.
    pub bits: u8,
    /// The other end's, if it is another.
    pub peer: Option<IpAddr>,
}

/// A route as it shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination, and the length of its prefix in bits.
    pub destination: (IpAddr, u8),
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// The link's name.
    pub device: String,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// `RTNH_F_*`.
    pub flags: u32,
    /// Metric; `None` is the kernel's default.
    pub metric: Option<u32>,
    /// `RTAX_*` and their values.
    pub metrics: Vec<(u16, u32)>,
}

/// A permanent neighbour.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// The link's name.
    pub device: String,
    /// Its link-layer address.
    pub mac: [u8; 6],
}

impl TryFrom<&api::Interface> for Link {
    type Error = TaskError;

    fn try_from(from: &api::Interface) -> Result<Self, TaskError> {
        let name = if from.name.is_empty() { &from.device } else { &from.name };
        let refuse = |why: String| refused("interface", name, &why);
        let addresses = from.IPAddresses.iter().map(|ip| {
            let (own, peer) = (address(&ip.address).map_err(&refuse)?, optional(&ip.peer).map_err(&refuse)?);
            let bits = prefix(&ip.mask, own).map_err(&refuse)?;
            if peer.is_some_and(|peer| peer.is_ipv4() != own.is_ipv4()) {
                return Err(refuse(format!("{own} and its peer {} are of two families", ip.peer)));
            }
            Ok(Address { ip: own, bits, peer })
        });
        Ok(Self {
            mac: mac(&from.hwAddr).map_err(refuse)?,
            name: link_name(name).map_err(refuse)?,
            mtu: match from.mtu {
                0 => None,
                mtu => Some(u32::try_from(mtu).map_err(|_| refuse(format!("MTU {mtu} is too large")))?),
            },
            addresses: addresses.collect::<Result<_, TaskError>>()?,
            noarp: from.raw_flags & IFF_NOARP != 0,
            up: !from.down,
        })
    }
}

impl TryFrom<&api::Route> for Route {
    type Error = TaskError;

    fn try_from(from: &api::Route) -> Result<Self, TaskError> {
        let name = if from.dest.is_empty() { "default" } else { &from.dest };
        let refuse = |why: String| refused("route", name, &why);
        let gateway = optional(&from.gateway).map_err(refuse)?;
        let destination = if from.dest.is_empty() {
            let v6 = from.family.enum_value_or_default() == api::IPFamily::v6
                || gateway.is_some_and(|gateway| gateway.is_ipv6());
            (if v6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) }, 0)
        } else {
            cidr(&from.dest).map_err(refuse)?
        };
        Ok(Self {
            destination,
            gateway,
            device: link_name(&from.device).map_err(refuse)?,
            source: optional(&from.source).map_err(refuse)?,
            scope: u8::try_from(from.scope)
                .map_err(|_| refuse(format!("scope {} is above 255", from.scope)))?,
            flags: from.flags,
            metric: (from.metric != 0).then_some(from.metric),
            metrics: metrics(from).map_err(refuse)?,
        })
    }
}

impl TryFrom<&api::Neighbour> for Neighbour {
    type Error = TaskError;

    fn try_from(from: &api::Neighbour) -> Result<Self, TaskError> {
        let refuse = |why: String| refused("neighbour", &from.address, &why);
        Ok(Self {
            address: address(&from.address).map_err(refuse)?,
            device: link_name(&from.device).map_err(refuse)?,
            mac: mac(&from.hwAddr).map_err(refuse)?,
        })
    }
}

/// All of a list, or the first error.
///
/// # Errors
/// When one of them is wrong.
pub fn all<'a, A: 'a, T: TryFrom<&'a A, Error = TaskError>>(list: &'a [A]) -> Result<Vec<T>, TaskError> {
    list.iter().map(T::try_from).collect()
}

fn refused(what: &str, name: &str, why: &str) -> TaskError {
    TaskError::InvalidArgument(format!("{what} {name:?}: {why}"))
}

fn address(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| format!("{text:?} is no IP address"))
}

fn optional(text: &str) -> Result<Option<IpAddr>, String> {
    if text.is_empty() { Ok(None) } else { address(text).map(Some) }
}

/// The last one that is a number, `RTAX_FASTOPEN_NO_COOKIE` of `linux/rtnetlink.h`, and the one that is not,
/// `RTAX_CC_ALGO`.
const RTAX_LAST: u16 = 17;
const RTAX_CC_ALGO: u16 = 16;

fn metrics(from: &api::Route) -> Result<Vec<(u16, u32)>, String> {
    let mut metrics = Vec::new();
    for (kind, value) in &from.metrics {
        match u16::try_from(*kind) {
            Ok(kind) if (1..=RTAX_LAST).contains(&kind) && kind != RTAX_CC_ALGO => {
                metrics.push((kind, *value))
            }
            _ => return Err(format!("{kind} is no metric of a route that is a number")),
        }
    }
    metrics.sort_unstable();
    Ok(metrics)
}

fn prefix(text: &str, address: IpAddr) -> Result<u8, String> {
    let most = if address.is_ipv4() { 32 } else { 128 };
    match text.parse() {
        Ok(bits) if bits <= most => Ok(bits),
        _ => Err(format!("{text:?} is no prefix length of {address}")),
    }
}

fn cidr(text: &str) -> Result<(IpAddr, u8), String> {
    let Some((network, bits)) = text.split_once('/') else {
        let address = address(text)?;
        return Ok((address, if address.is_ipv4() { 32 } else { 128 }));
    };
    let address = address(network)?;
    Ok((address, prefix(bits, address)?))
}

fn mac(text: &str) -> Result<[u8; 6], String> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2);
        let parsed = part.and_then(|part| u8::from_str_radix(part, 16).ok());
        *byte = parsed.ok_or_else(|| format!("{text:?} is no hardware address like aa:bb:cc:dd:ee:ff"))?;
    }
    if parts.next().is_some() { Err(format!("{text:?} is too long for a hardware address")) } else { Ok(mac) }
}

fn link_name(text: &str) -> Result<String, String> {
    let fine = !text.is_empty()
        && text.len() <= MAX_NAME
        && text != "."
        && text != ".."
        && !text.contains(|c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':'));
    if fine { Ok(text.to_owned()) } else { Err(format!("{text:?} cannot be the name of a link")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface() -> api::Interface {
        let ip = api::IPAddress { address: "10.0.0.2".into(), mask: "24".into(), ..Default::default() };
        api::Interface {
            name: "eth0".into(),
            hwAddr: "02:00:00:aa:bb:cc".into(),
            mtu: 1400,
            IPAddresses: vec![ip],
            ..Default::default()
        }
    }

    #[test]
    fn links_are_typed() {
        let link = Link::try_from(&interface()).unwrap();
        assert_eq!(link.mac, [2, 0, 0, 0xaa, 0xbb, 0xcc]);
        assert_eq!((link.name.as_str(), link.mtu), ("eth0", Some(1400)));
        assert_eq!((link.noarp, link.up), (false, true));
        assert_eq!(link.addresses, [Address { ip: "10.0.0.2".parse().unwrap(), bits: 24, peer: None }]);
    }

    #[test]
    fn default_routes_have_a_family() {
        let mut route = api::Route { device: "eth0".into(), gateway: "fe80::1".into(), ..Default::default() };
        assert_eq!(Route::try_from(&route).unwrap().destination, ("::".parse().unwrap(), 0));
        route.gateway = "10.0.0.1".into();
        assert_eq!(Route::try_from(&route).unwrap().destination, ("0.0.0.0".parse().unwrap(), 0));
        route.dest = "10.1.0.0/16".into();
        assert_eq!(Route::try_from(&route).unwrap().destination, ("10.1.0.0".parse().unwrap(), 16));
    }

    #[test]
    fn nonsense_is_named() {
        let error = |change: fn(&mut api::Interface)| {
            let mut interface = interface();
            change(&mut interface);
            Link::try_from(&interface).unwrap_err().to_string()
        };
        assert_eq!(
            error(|i| i.hwAddr = "02:00".into()),
            "interface \"eth0\": \"02:00\" is no hardware address like aa:bb:cc:dd:ee:ff"
        );
        assert!(error(|i| i.hwAddr = "02:00:00:00:00:00:00".into()).contains("too long"));
        assert!(error(|i| i.name = "a/b".into()).contains("cannot be the name"));
        assert!(error(|i| i.mtu = u64::MAX).contains("too large"));
        assert!(error(|i| i.IPAddresses[0].mask = "33".into()).contains("no prefix length"));
        assert!(error(|i| i.IPAddresses[0].address = "x".into()).contains("no IP address"));
        assert!(error(|i| i.IPAddresses[0].peer = "fe80::1".into()).contains("are of two families"));
        let mut route = api::Route { device: "eth0".into(), dest: "10.0.0.0/x".into(), ..Default::default() };
        assert_eq!(
            Route::try_from(&route).unwrap_err().to_string(),
            "route \"10.0.0.0/x\": \"x\" is no prefix length of 10.0.0.0"
        );
        route.dest = "10.0.0.0/8".into();
        route.metrics = [(11, 20), (2, 1300)].into();
        assert_eq!(Route::try_from(&route).unwrap().metrics, [(2, 1300), (11, 20)]);
        for bad in [0, 16, 18, 1 << 16] {
            route.metrics = [(bad, 1)].into();
            assert!(Route::try_from(&route).unwrap_err().to_string().contains("is no metric of a route"));
        }
    }
}
