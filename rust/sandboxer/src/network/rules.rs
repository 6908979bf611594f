//! Rules of the pod's network namespace that frames of a VM would pass by, and that a guest cannot be given:
//! frames go from link to tap below the namespace's own packet filters, load balancers and IPsec policies. A
//! pod whose plugins count on such rules must not run without them.

use std::{fmt, fs, io};

use kuasar_common::{api::sandbox::NftablesMessage, netlink::list};
use rustix::net::netlink;

use super::{NetworkError, nftables, read::Link, xtables};

/// `XFRM_MSG_GETPOLICY` of `linux/xfrm.h`, and the length of `struct xfrm_userpolicy_id`.
const GET_POLICY: u16 = 0x15;
const POLICY_ID: usize = 64;

/// Services of IPVS in the thread's network namespace, behind three lines of heading.
const IPVS: &str = "/proc/thread-self/net/ip_vs";
const IPVS_HEADING: usize = 3;

/// Something that frames would pass by, and a way out.
struct Found {
    what: String,
    instead: &'static str,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the pod's network namespace has {}, which do not hold for a VM: its frames pass them by, and a guest cannot be given \
             them; use a CNI plugin {}, or a runtime class without VMs",
            self.what, self.instead
        )
    }
}

type Find = fn() -> io::Result<Option<Found>>;

/// Refuses a pod with rules in the thread's network namespace, by name.
pub(super) fn refuse(links: &[Link]) -> Result<(), NetworkError> {
    // Nothing passes by without links.
    if links.is_empty() {
        return Ok(());
    }
    let steps: [(&str, Find); 3] = [
        ("reading the pod's iptables rules", iptables),
        ("reading the pod's IPsec policies", ipsec),
        ("reading the pod's IPVS services", ipvs),
    ];
    for (doing, find) in steps {
        if let Some(found) = find().map_err(NetworkError::io(doing))? {
            return Err(NetworkError::Unsupported(found.to_string()));
        }
    }
    Ok(())
}

/// The nftables rules of the thread's network namespace, for the guest.
pub(super) fn nftables(links: &[Link]) -> Result<Vec<NftablesMessage>, NetworkError> {
    if links.is_empty() {
        return Ok(Vec::new());
    }
    // The namespace's bridge, and links themselves, do see the frames of a tap that CNI put there.
    nftables::read(links.iter().all(|link| link.tap.is_some()))
}

fn iptables() -> io::Result<Option<Found>> {
    Ok(xtables::first_in_use()?.map(|(program, table)| Found {
        what: format!("rules of {program}-legacy (in table {table})"),
        instead: "that sets its rules by nftables (nft, iptables-nft)",
    }))
}

fn ipsec() -> io::Result<Option<Found>> {
    let policies = list(netlink::XFRM, GET_POLICY, &[0; POLICY_ID])?;
    let found =
        || Found { what: "IPsec policies (ip xfrm policy)".to_owned(), instead: "that leaves none there" };
    Ok((!policies.is_empty()).then(found))
}

fn ipvs() -> io::Result<Option<Found>> {
    match fs::read_to_string(IPVS) {
        Ok(text) => {
            let services = text.lines().count() > IPVS_HEADING;
            let found =
                || Found { what: "IPVS services (ipvsadm)".to_owned(), instead: "that leaves none there" };
            Ok(services.then(found))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
