//! nftables rules that CNI plugins left in the pod's network namespace. A VM's frames do not pass through
//! that namespace's stack, so the guest's kernel gets the same rules: its links have the same names and
//! addresses, and the programs that rules tell apart by user are there.

use std::{collections::BTreeSet, io};

use kuasar_common::{
    api::sandbox::NftablesMessage,
    netlink::{attribute, attributes, list, push, text},
    nftables::{
        CHAIN_NAME, GENERIC, NAME, RULE_CHAIN, SUBSYSTEM, TABLE, describe, expressions, family, generic,
        kind, split,
    },
};
use rustix::net::netlink;

use super::NetworkError;

/// Most bytes of one pod's rules.
const MAX_RULES: usize = 512 << 10;
/// Most bytes of one message's elements: an attribute has 64 KiB at most.
const MAX_ELEMENTS: usize = 32 << 10;

/// Attributes of `linux/netfilter/nf_tables.h`.
const TABLE_FLAGS: u16 = 2;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const SET_FLAGS: u16 = 3;
const SET_ID: u16 = 10;
const ELEMENT_LIST: u16 = 3;
/// Of a table that is switched off: `NFT_TABLE_F_DORMANT`. The other flags tie a table to its maker.
const DORMANT: u32 = 1;
/// Of a set of ranges: `NFT_SET_INTERVAL`.
const INTERVAL: u32 = 4;
/// A chain's policy, in network byte order.
const DROP: [u8; 4] = [0; 4];
/// With `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

/// Returns true if the guest's kernel takes this attribute of a message; the rest are numbers and counters of
/// the host's.
fn is_kept(what: u16, attribute: u16) -> bool {
    let kept: &[u16] = match what {
        kind::TABLE => &[1, 2, 6],
        kind::CHAIN => &[1, 3, 4, 5, 7, 12],
        kind::RULE => &[1, 2, 4, 7],
        kind::SET => &[1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 17, 18],
        kind::OBJECT => &[1, 2, 3, 4, 8],
        _ => &[],
    };
    kept.contains(&attribute)
}

/// A table: its family and its name.
type Table = (u8, String);

/// Reads the rules of the thread's network namespace. `bridged`: its links and bridges see the VM's frames,
/// so that their rules hold where they are.
pub(super) fn read(bridged: bool) -> Result<Vec<NftablesMessage>, NetworkError> {
    let doing = NetworkError::io("reading the pod's nftables rules");
    let (chains, rules) = match ask(kind::CHAIN).and_then(|chains| Ok((chains, ask(kind::RULE)?))) {
        Ok(both) => both,
        Err(error) => return Err(doing(error)),
    };
    let tables = effective(&chains, &rules, bridged)?;
    if tables.is_empty() {
        return Ok(Vec::new());
    }
    for rule in rules.iter().filter(|rule| tables.contains(&table(rule))) {
        refuse_numbers(rule)?;
    }
    let all = gather(&tables, &chains, &rules).map_err(doing)?;
    let bytes: usize = all.iter().map(|message| message.body.len()).sum();
    if let Some(flow) = all.iter().find(|message| message.kind == u32::from(kind::FLOW_TABLE)) {
        let (number, attributes) = split(&flow.body);
        return Err(unsupported(&format!(
            "the flow table {} of table {} {}",
            text(attributes, NAME),
            family(number),
            text(attributes, TABLE)
        )));
    }
    if bytes > MAX_RULES {
        return Err(unsupported(&format!("more than {} KiB of nftables rules", MAX_RULES >> 10)));
    }
    Ok(all)
}

fn unsupported(what: &str) -> NetworkError {
    NetworkError::Unsupported(format!(
        "the pod's network namespace has {what}, which a guest cannot be given; use a CNI plugin without it, or a runtime class \
         without VMs"
    ))
}

fn ask(what: u16) -> io::Result<Vec<Vec<u8>>> {
    ask_about(what, &generic(0))
}

fn ask_about(what: u16, question: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    list(netlink::NETFILTER, SUBSYSTEM | (what + 1), question)
}

fn table(message: &[u8]) -> Table {
    let (family, attributes) = split(message);
    (family, text(attributes, TABLE))
}

/// Tables that do something: tables and chains alone do not, rules do, and chains that drop what no rule
/// takes.
fn effective(chains: &[Vec<u8>], rules: &[Vec<u8>], bridged: bool) -> Result<BTreeSet<Table>, NetworkError> {
    let mut tables = BTreeSet::new();
    let drops = |chain: &&Vec<u8>| attribute(split(chain).1, CHAIN_POLICY) == Some(&DROP);
    let rules = rules.iter().map(|rule| (rule, RULE_CHAIN));
    for (message, name) in rules.chain(chains.iter().filter(drops).map(|chain| (chain, CHAIN_NAME))) {
        let (number, attributes) = split(message);
        match family(number) {
            "inet" | "ip" | "ip6" => drop(tables.insert(table(message))),
            "netdev" | "bridge" if bridged => {}
            other => {
                return Err(NetworkError::Unsupported(format!(
                    "the pod's network namespace has nftables rules of the family {other} (chain {} of table {}), which do not \
                     hold for a VM: its frames pass them by; use a CNI plugin with rules of the families inet, ip or ip6, or a \
                     runtime class without VMs",
                    text(attributes, name),
                    text(attributes, TABLE),
                )));
            }
        }
    }
    Ok(tables)
}

/// `NFT_META_*` that mean something else in a guest.
const INPUT_LINK: u32 = 4;
const OUTPUT_LINK: u32 = 5;
const ELSEWHERE: [(u32, &str); 3] = [(23, "meta cgroup"), (26, "meta iifkind"), (27, "meta oifkind")];
const META_KEY: u16 = 2;
/// `NFT_META_L4PROTO`.
const PROTOCOL: u32 = 16;
/// `NFTA_CMP_OP`, of which `NFT_CMP_NEQ`, `NFTA_CMP_DATA`, and in that `NFTA_DATA_VALUE`.
const CMP_OPERATION: u16 = 2;
const UNLIKE: u32 = 1;
const CMP_DATA: u16 = 3;
const DATA_VALUE: u16 = 1;
/// `NFTA_RULE_COMPAT` and what is in it.
const RULE_COMPAT: u16 = 5;
const COMPAT_PROTOCOL: u16 = 1;
const COMPAT_FLAGS: u16 = 2;
const COMPAT_INVERTED: u32 = 2;
/// `NFT_SOCKET_CGROUPV2` of `NFTA_SOCKET_KEY`.
const SOCKET_CGROUP: u32 = 3;
const SOCKET_KEY: u16 = 1;
const LOOPBACK: u32 = 1;

/// Refuses a rule that tells links apart by number, or programs by a cgroup of the host's: the guest's are
/// others.
fn refuse_numbers(message: &[u8]) -> Result<(), NetworkError> {
    let refuse = |what: &str, instead: &str| {
        Err(NetworkError::Unsupported(format!(
            "the pod's network namespace has {}, which uses {what}: that is another one in a VM; use a CNI plugin whose rules \
             use {instead}",
            describe(kind::RULE, message)
        )))
    };
    let mut by_number = None;
    for (name, expression) in expressions(split(message).1) {
        if let Some(what) = by_number.take()
            && !(name == "cmp" && compared(expression) == Some(LOOPBACK))
        {
            return refuse(what, "the link's name (iifname, oifname)");
        }
        let key = |kind| attribute(expression, kind).and_then(big_endian);
        match (name.as_str(), key(META_KEY)) {
            ("meta", Some(INPUT_LINK)) => by_number = Some("a link's number (iif)"),
            ("meta", Some(OUTPUT_LINK)) => by_number = Some("a link's number (oif)"),
            ("meta", Some(key)) => {
                if let Some((_, what)) = ELSEWHERE.iter().find(|(known, _)| *known == key) {
                    return refuse(what, "something else");
                }
            }
            ("socket", _) if key(SOCKET_KEY) == Some(SOCKET_CGROUP) => {
                return refuse("socket cgroupv2", "something else");
            }
            _ => {}
        }
    }
    by_number.map_or(Ok(()), |what| refuse(what, "the link's name (iifname, oifname)"))
}

fn big_endian(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().copied().map(u32::from_be_bytes)
}

/// The number that a comparison compares with. A link's is in the machine's byte order.
fn compared(expression: &[u8]) -> Option<u32> {
    let value = attribute(attribute(expression, CMP_DATA)?, DATA_VALUE)?;
    value.first_chunk().copied().map(u32::from_ne_bytes)
}

/// All messages that make the tables again, in an order in which nothing is named before it is there.
fn gather(
    tables: &BTreeSet<Table>,
    chains: &[Vec<u8>],
    rules: &[Vec<u8>],
) -> io::Result<Vec<NftablesMessage>> {
    let mut all = Vec::new();
    let mut take = |what: u16, messages: &[Vec<u8>]| {
        let ours = messages.iter().filter(|message| tables.contains(&table(message)));
        all.extend(ours.map(|message| again(what, message)));
    };
    take(kind::TABLE, &ask(kind::TABLE)?);
    take(kind::CHAIN, chains);
    take(kind::OBJECT, &ask(kind::OBJECT)?);
    take(kind::FLOW_TABLE, &ask(kind::FLOW_TABLE)?);
    let sets: Vec<Vec<u8>> = ask(kind::SET)?.into_iter().filter(|set| tables.contains(&table(set))).collect();
    for (number, set) in (1_u32..).zip(&sets) {
        let mut message = again(kind::SET, set);
        push(&mut message.body, SET_ID, &number.to_be_bytes());
        all.push(message);
        all.extend(elements(set)?);
    }
    let rules = rules.iter().filter(|rule| tables.contains(&table(rule)));
    all.extend(rules.map(|rule| again(kind::RULE, rule)));
    Ok(all)
}

/// A message of a list as one that makes the same again.
fn again(what: u16, message: &[u8]) -> NftablesMessage {
    let (family, listed) = split(message);
    let mut body = generic(family).to_vec();
    for (kind, payload) in
        attributes(listed).filter(|(kind, _)| is_kept(what, *kind) || what == kind::FLOW_TABLE)
    {
        match (what, kind) {
            (kind::TABLE, TABLE_FLAGS) => {
                let flags = big_endian(payload).unwrap_or(0) & DORMANT;
                push(&mut body, kind, &flags.to_be_bytes());
            }
            (kind::CHAIN, CHAIN_HOOK) => push(&mut body, kind | NESTED, payload),
            _ => push(&mut body, kind, payload),
        }
    }
    if what == kind::RULE {
        body.extend(compat(listed));
    }
    NftablesMessage { kind: u32::from(what), body, ..NftablesMessage::default() }
}

/// The protocol that extensions of iptables ask for, as an attribute: the kernel wants it of the maker of a
/// rule, and does not list it. It is what the rule compares the packet's protocol with.
fn compat(rule: &[u8]) -> Vec<u8> {
    let all: Vec<_> = expressions(rule).collect();
    let mut attribute_of_rule = Vec::new();
    if !all.iter().any(|(name, _)| matches!(name.as_str(), "match" | "target")) {
        return attribute_of_rule;
    }
    let protocol = all.iter().zip(all.iter().skip(1)).find_map(|((first, meta), (second, cmp))| {
        let asked = first == "meta" && attribute(meta, META_KEY).and_then(big_endian) == Some(PROTOCOL);
        let value = attribute(attribute(cmp, CMP_DATA)?, DATA_VALUE)?;
        let unlike = attribute(cmp, CMP_OPERATION).and_then(big_endian)? == UNLIKE;
        (asked && second == "cmp").then_some((*value.first()?, unlike))
    });
    if let Some((protocol, unlike)) = protocol {
        let mut compat = Vec::new();
        push(&mut compat, COMPAT_PROTOCOL, &u32::from(protocol).to_be_bytes());
        push(&mut compat, COMPAT_FLAGS, &(if unlike { COMPAT_INVERTED } else { 0 }).to_be_bytes());
        push(&mut attribute_of_rule, RULE_COMPAT | NESTED, &compat);
    }
    attribute_of_rule
}

/// Elements of a set, as messages that put them into it.
fn elements(set: &[u8]) -> io::Result<Vec<NftablesMessage>> {
    let (family, attributes_of_set) = split(set);
    let mut of_set = generic(family).to_vec();
    for name in [TABLE, NAME] {
        push(&mut of_set, name, attribute(attributes_of_set, name).unwrap_or_default());
    }
    let listed = ask_about(kind::ELEMENTS, &of_set)?;
    let mut elements: Vec<(u16, &[u8])> = listed
        .iter()
        .filter_map(|message| attribute(message.get(GENERIC..)?, ELEMENT_LIST))
        .flat_map(attributes)
        .collect();
    // Ranges are listed from the last to the first, and must be made from the first to the last.
    if attribute(attributes_of_set, SET_FLAGS).and_then(big_endian).unwrap_or(0) & INTERVAL != 0 {
        elements.reverse();
    }
    let mut messages = Vec::new();
    let mut list = Vec::new();
    for (kind, payload) in elements {
        if list.len() + payload.len() > MAX_ELEMENTS {
            messages.push(put(&of_set, &std::mem::take(&mut list)));
        }
        push(&mut list, kind | NESTED, payload);
    }
    if !list.is_empty() {
        messages.push(put(&of_set, &list));
    }
    Ok(messages)
}

fn put(set: &[u8], list: &[u8]) -> NftablesMessage {
    let mut body = set.to_vec();
    push(&mut body, ELEMENT_LIST | NESTED, list);
    NftablesMessage { kind: u32::from(kind::ELEMENTS), body, ..NftablesMessage::default() }
}
