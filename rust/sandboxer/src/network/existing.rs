//! Taps that CNI itself left in the pod's network namespace: the VM gets such a tap as it is. What the plugin
//! put behind it, a bridge and that bridge's other ports or filters of `tc`, is the plugin's, and stays as it
//! is, too.

use std::{collections::BTreeSet, fs, os::fd::OwnedFd};

use netlink_packet_route::link::{InfoData, InfoKind, InfoTun, LinkAttribute, LinkInfo, LinkMessage};
use nix::libc;
use rtnetlink::packet_core::Nla;

use super::{NetworkError, tap};

/// `IFLA_TUN_TYPE` and `IFLA_TUN_MULTI_QUEUE` of `linux/if_link.h`, and `IFF_TAP` of `linux/if_tun.h` as the
/// value of the first.
const TYPE: u16 = 3;
const MULTI_QUEUE: u16 = 7;
const TAP: u8 = 2;

/// `arp_ignore` of the whole namespace: 0 answers for every address of the namespace on every link, 1 for a
/// link's own.
pub(super) const ARP_IGNORE: &str = "/proc/sys/net/ipv4/conf/all/arp_ignore";

/// Features of a link of the kernel's kind `tun`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tun {
    /// It carries ethernet frames, not packets.
    pub(super) tap: bool,
    /// It was made for several queues.
    pub(super) many: bool,
}

impl Tun {
    pub(super) fn of(info: &[LinkInfo]) -> Option<Self> {
        info.iter().find(|info| matches!(info, LinkInfo::Kind(InfoKind::Tun)))?;
        let data = info.iter().find_map(|info| match info {
            LinkInfo::Data(InfoData::Tun(data)) => Some(data.as_slice()),
            _ => None,
        });
        let value = |kind| byte(data.unwrap_or_default(), kind);
        Some(Self { tap: value(TYPE) == Some(TAP), many: value(MULTI_QUEUE) == Some(1) })
    }
}

fn byte(data: &[InfoTun], kind: u16) -> Option<u8> {
    let found = data.iter().find(|attribute| attribute.kind() == kind && attribute.value_len() == 1)?;
    let mut value = [0];
    found.emit_value(&mut value);
    Some(value[0])
}

/// Indices of the links that such taps are ports of.
pub(super) fn bridges(links: &[LinkMessage]) -> BTreeSet<u32> {
    links.iter().filter(|link| is_tun(link)).filter_map(controller).collect()
}

/// Returns true if a link is behind a tap: one of these bridges, or another port of one.
pub(super) fn is_behind(link: &LinkMessage, bridges: &BTreeSet<u32>) -> bool {
    bridges.contains(&link.header.index)
        || (!is_tun(link) && controller(link).is_some_and(|bridge| bridges.contains(&bridge)))
}

fn is_tun(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(info) => Tun::of(info).is_some(),
        _ => false,
    })
}

fn controller(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Controller(index) => Some(*index),
        _ => None,
    })
}

/// The hardware address of the guest's card on a tap: not the tap's own, at which the namespace's kernel (or
/// the bridge) is, and the same after every start.
pub(super) fn guest_address(tap: &[u8]) -> Vec<u8> {
    let mut address = tap.to_owned();
    if let Some(first) = address.first_mut() {
        // Locally administered, and another one.
        *first = (*first ^ 4) | 2;
    }
    address
}

/// Opens a tap that is there: as many queues as it can have.
pub(super) fn open(name: &str, many: bool, queues: u32) -> Result<Vec<OwnedFd>, NetworkError> {
    tap::queues(name, if many { queues.max(1) } else { 1 }, many).map_err(|source| {
        if source.raw_os_error() == Some(libc::EBUSY) {
            NetworkError::Unsupported(format!(
                "the pod's tap {name} is held by another program, so the VM cannot have it; use a CNI plugin that leaves its \
                 tap to the VM"
            ))
        } else {
            NetworkError::io(format!("opening the pod's tap {name}"))(source)
        }
    })
}

/// Returns true if the namespace's kernel answers for all its addresses. Those on a tap are the guest's.
/// The kernel has them as well, so that CNI finds them, and must not answer for them on a bridge.
pub(super) fn answers() -> Result<bool, NetworkError> {
    let now = fs::read_to_string(ARP_IGNORE).map_err(NetworkError::io(format!("reading {ARP_IGNORE}")))?;
    Ok(now.trim() == "0")
}

/// Keeps it from that. [`speak_up`] makes it do so again.
#[expect(clippy::disallowed_methods, reason = "a file of the kernel")]
pub(super) fn keep_quiet() -> Result<(), NetworkError> {
    fs::write(ARP_IGNORE, "1").map_err(NetworkError::io(format!("setting {ARP_IGNORE}")))
}

/// Undoes [`keep_quiet`].
#[expect(clippy::disallowed_methods, reason = "a file of the kernel")]
pub(super) fn speak_up() -> Result<(), NetworkError> {
    fs::write(ARP_IGNORE, "0").map_err(NetworkError::io(format!("setting {ARP_IGNORE}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_has_an_address_of_its_own() {
        assert_eq!(guest_address(&[2, 0, 0, 0, 0, 5]), [6, 0, 0, 0, 0, 5]);
        assert_eq!(guest_address(&[0x0c, 1, 2, 3, 4, 5]), [0x0a, 1, 2, 3, 4, 5]);
    }
}
