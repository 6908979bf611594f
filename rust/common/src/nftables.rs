//! Rules of nftables, which the daemon reads in one kernel and the agent makes again in another: numbers of
//! `linux/netfilter/nf_tables.h` and `linux/netfilter/nfnetlink.h`, and the making.

use std::{
    collections::{HashMap, VecDeque},
    io,
};

use rustix::net::{SendFlags, netlink, send, sockopt::set_socket_send_buffer_size_force};

use crate::{
    api::sandbox::NftablesMessage,
    netlink::{ACK, REQUEST, attribute, attributes, list, message, receive, socket, text},
};

/// `NFNL_SUBSYS_NFTABLES`, in the upper half of a message's type.
pub const SUBSYSTEM: u16 = 10 << 8;

/// `NFT_MSG_NEW*`; what asks for a list of them is one more.
pub mod kind {
    /// A table.
    pub const TABLE: u16 = 0;
    /// A chain.
    pub const CHAIN: u16 = 3;
    /// A rule.
    pub const RULE: u16 = 6;
    /// A set or map.
    pub const SET: u16 = 9;
    /// Elements of one.
    pub const ELEMENTS: u16 = 12;
    /// A counter, quota or the like with a name.
    pub const OBJECT: u16 = 18;
    /// A flow table.
    pub const FLOW_TABLE: u16 = 22;
}

/// `NFTA_RULE_TABLE`; of everything that belongs to a table.
pub const TABLE: u16 = 1;
/// `NFTA_RULE_CHAIN`.
pub const RULE_CHAIN: u16 = 2;
/// `NFTA_RULE_EXPRESSIONS`.
pub const RULE_EXPRESSIONS: u16 = 4;
/// `NFTA_CHAIN_NAME`.
pub const CHAIN_NAME: u16 = 3;
/// `NFTA_SET_NAME`, `NFTA_OBJ_NAME`, `NFTA_SET_ELEM_LIST_SET`.
pub const NAME: u16 = 2;

/// Bytes of `struct nfgenmsg`.
pub const GENERIC: usize = 4;

/// `struct nfgenmsg` of a family.
#[must_use]
pub const fn generic(family: u8) -> [u8; GENERIC] {
    [family, 0, 0, 0]
}

/// A message's family and attributes.
#[must_use]
pub fn split(body: &[u8]) -> (u8, &[u8]) {
    (body.first().copied().unwrap_or(0), body.get(GENERIC..).unwrap_or_default())
}

/// The name of a family: `NFPROTO_*` of `linux/netfilter.h`.
#[must_use]
pub const fn family(number: u8) -> &'static str {
    match number {
        1 => "inet",
        2 => "ip",
        3 => "arp",
        5 => "netdev",
        7 => "bridge",
        10 => "ip6",
        _ => "of an unknown family",
    }
}

/// The expressions of a rule, by name and with their attributes.
pub fn expressions(rule: &[u8]) -> impl Iterator<Item = (String, &[u8])> {
    let list = attribute(rule, RULE_EXPRESSIONS).unwrap_or_default();
    attributes(list)
        .map(|(_, expression)| (text(expression, 1), attribute(expression, 2).unwrap_or_default()))
}

/// Describes the object of a message, as a person would.
#[must_use]
pub fn describe(kind: u16, body: &[u8]) -> String {
    let (number, attributes) = split(body);
    let table = format!("table {} {}", family(number), text(attributes, TABLE));
    match kind {
        kind::TABLE => table,
        kind::CHAIN => format!("chain {} of {table}", text(attributes, CHAIN_NAME)),
        kind::RULE => {
            let names: Vec<String> = expressions(attributes).map(|(name, _)| name).collect();
            format!("a rule of chain {} of {table} ({})", text(attributes, RULE_CHAIN), names.join(", "))
        }
        kind::SET => format!("the set {} of {table}", text(attributes, NAME)),
        kind::ELEMENTS => format!("elements of the set {} of {table}", text(attributes, NAME)),
        _ => format!("the object {} of {table}", text(attributes, NAME)),
    }
}

/// `NFNL_MSG_BATCH_BEGIN` and `NFNL_MSG_BATCH_END`: what is between them is done as one.
const BEGIN: u16 = 0x10;
const END: u16 = 0x11;
/// Subsystem that a batch is for, as the kernel reads it: `struct nfgenmsg` with the subsystem in network
/// byte order.
const FOR_NFTABLES: [u8; GENERIC] = [0, 0, 0, 10];
/// `NLM_F_CREATE` and `NLM_F_APPEND`.
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
/// The kernel takes a batch in one piece, and counts more than its bytes.
const SEND_BUFFER: usize = 4 << 20;

/// Why rules were not made.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// Nobody was there to make them, or to say how it went.
    #[error("setting nftables rules: {0}")]
    Io(#[from] io::Error),
    /// The kernel does not take one of the messages.
    #[error("the kernel does not take {what}: {error}")]
    Refused {
        /// The message, in words.
        what: String,
        /// The kernel's answer.
        error: io::Error,
    },
    /// The kernel does not know all of a rule, and has left that out.
    #[error("the kernel makes another rule of {0}")]
    Differs(String),
}

/// Makes rules in the thread's network namespace, all or none of them, and looks whether they are as they
/// were given.
///
/// # Errors
/// When the kernel does not take them, or has made others of them.
pub fn make(messages: &[NftablesMessage]) -> Result<(), MakeError> {
    if messages.is_empty() {
        return Ok(());
    }
    let mut batch = message(BEGIN, REQUEST, 0, &FOR_NFTABLES);
    for (number, part) in (1_u32..).zip(messages) {
        // One answer, to the last: more would not have room.
        let last = usize::try_from(number).is_ok_and(|number| number == messages.len());
        let flags = REQUEST | CREATE | APPEND | if last { ACK } else { 0 };
        batch.extend(message(SUBSYSTEM | kind_of(part), flags, number, &part.body));
    }
    batch.extend(message(END, REQUEST, 0, &FOR_NFTABLES));
    let socket = socket(netlink::NETFILTER)?;
    set_socket_send_buffer_size_force(&socket, SEND_BUFFER).map_err(io::Error::from)?;
    send(&socket, &batch, SendFlags::empty()).map_err(io::Error::from)?;
    // What is not taken comes first.
    for answer in receive(&socket)? {
        if let Some(error) = answer.error {
            let place = usize::try_from(answer.sequence).unwrap_or(0).checked_sub(1);
            let about = place.and_then(|place| messages.get(place));
            let what = about.map_or_else(|| "all of them".to_owned(), |m| describe(kind_of(m), &m.body));
            return Err(MakeError::Refused { what, error });
        }
    }
    compare(messages, &list(netlink::NETFILTER, SUBSYSTEM | (kind::RULE + 1), &generic(0))?)
}

fn kind_of(message: &NftablesMessage) -> u16 {
    u16::try_from(message.kind).unwrap_or(u16::MAX)
}

/// A rule that is not there as it was given is none: a kernel leaves out what it does not know.
fn compare(messages: &[NftablesMessage], there: &[Vec<u8>]) -> Result<(), MakeError> {
    let chain = |body: &[u8]| {
        let (family, attributes) = split(body);
        (family, text(attributes, TABLE), text(attributes, RULE_CHAIN))
    };
    // Of each chain in its order, from the first to the last.
    let mut made: HashMap<_, VecDeque<&[u8]>> = HashMap::new();
    for rule in there {
        let expressions = attribute(split(rule).1, RULE_EXPRESSIONS).unwrap_or_default();
        made.entry(chain(rule)).or_default().push_back(expressions);
    }
    for rule in messages.iter().filter(|message| kind_of(message) == kind::RULE) {
        let given = attribute(split(&rule.body).1, RULE_EXPRESSIONS).unwrap_or_default();
        if made.get_mut(&chain(&rule.body)).and_then(VecDeque::pop_front) != Some(given) {
            return Err(MakeError::Differs(describe(kind::RULE, &rule.body)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::push;

    fn rule(expressions: &[u8]) -> Vec<u8> {
        let mut body = generic(2).to_vec();
        push(&mut body, TABLE, b"t\0");
        push(&mut body, RULE_CHAIN, b"c\0");
        push(&mut body, RULE_EXPRESSIONS, expressions);
        body
    }

    #[test]
    fn a_rule_that_is_not_as_it_was_given_is_found() {
        let given = |list: &[&[u8]]| -> Vec<NftablesMessage> {
            let message = |body| NftablesMessage { kind: u32::from(kind::RULE), body, ..Default::default() };
            list.iter().map(|expressions| message(rule(expressions))).collect()
        };
        let both = [rule(b"aaaa"), rule(b"bbbb")];
        compare(&given(&[b"aaaa", b"bbbb"]), &both).unwrap();
        for other in [&[&b"aaaa"[..], b"aaaa"][..], &[b"bbbb"], &[b"aaaa", b"bbbb", b"cccc"]] {
            let error = compare(&given(other), &both).unwrap_err().to_string();
            assert_eq!(error, "the kernel makes another rule of a rule of chain c of table ip t ()");
        }
    }

    #[test]
    fn a_rule_is_described_by_its_expressions() {
        let mut list = Vec::new();
        for name in [&b"meta\0"[..], b"cmp\0"] {
            let mut expression = Vec::new();
            push(&mut expression, 1, name);
            push(&mut list, 1, &expression);
        }
        let mut body = generic(1).to_vec();
        push(&mut body, TABLE, b"mesh\0");
        push(&mut body, RULE_CHAIN, b"in\0");
        push(&mut body, RULE_EXPRESSIONS, &list);
        assert_eq!(describe(kind::RULE, &body), "a rule of chain in of table inet mesh (meta, cmp)");
        assert_eq!(describe(kind::RULE, &[]), "a rule of chain  of table of an unknown family  ()");
    }
}
