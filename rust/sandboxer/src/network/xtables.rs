//! Tables of `iptables-legacy`, `ip6tables-legacy` and `arptables-legacy` in the thread's network namespace.

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::libc;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// `struct ipt_getinfo` and `struct ip6t_getinfo`: a name, hooks, two offsets for each of five hooks,
/// entries, bytes.
const INFO: usize = 84;
const NAME: usize = 32;
const HOOKS: usize = 32;
const UNDERFLOW: usize = 56;
const ENTRIES: usize = 76;
const BYTES: usize = 80;
const MAX_HOOKS: u32 = 5;
/// `struct ipt_get_entries` and `struct ip6t_get_entries`: a name, a length, and, aligned, the entries.
const GOT: usize = 40;
/// Most bytes of a table that are taken: larger ones have rules.
const MAX_TABLE: u32 = 1 << 20;
/// `IPT_SO_GET_INFO` and `IPT_SO_GET_ENTRIES`, the same for IPv6.
const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;
/// Of a `struct xt_standard_target`, behind its header.
const VERDICT: usize = 32;
/// `-NF_ACCEPT - 1`.
const ACCEPT: i32 = -2;

/// A family that has tables.
struct Family {
    program: &'static str,
    names: &'static str,
    /// The way to look into them, if there is one.
    inside: Option<Inside>,
}

#[derive(Clone, Copy)]
struct Inside {
    family: AddressFamily,
    level: i32,
    /// Of `target_offset` in `struct ipt_entry` or `struct ip6t_entry`.
    target: usize,
}

const FAMILIES: [Family; 3] = [
    Family {
        program: "iptables",
        names: "/proc/thread-self/net/ip_tables_names",
        inside: Some(Inside { family: AddressFamily::INET, level: libc::IPPROTO_IP, target: 88 }),
    },
    Family {
        program: "ip6tables",
        names: "/proc/thread-self/net/ip6_tables_names",
        inside: Some(Inside { family: AddressFamily::INET6, level: libc::IPPROTO_IPV6, target: 140 }),
    },
    Family { program: "arptables", names: "/proc/thread-self/net/arp_tables_names", inside: None },
];

/// The first table that is not as the kernel makes it: its program and its name. Listing a table makes it, so
/// that it is there says nothing.
pub(super) fn first_in_use() -> io::Result<Option<(&'static str, String)>> {
    for family in &FAMILIES {
        let names = match fs::read_to_string(family.names) {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for table in names.lines() {
            let untouched = match family.inside {
                Some(inside) => is_untouched(inside, table)?,
                None => false,
            };
            if !untouched {
                return Ok(Some((family.program, table.to_owned())));
            }
        }
    }
    Ok(None)
}

/// Returns true if a table has no entries but its hooks' policies, all of which accept.
fn is_untouched(inside: Inside, table: &str) -> io::Result<bool> {
    let socket =
        socket_with(inside.family, SocketType::RAW, SocketFlags::CLOEXEC, Some(rustix::net::ipproto::RAW))?;
    let mut info = named(table, INFO);
    get(&socket, inside.level, GET_INFO, &mut info)?;
    let (hooks, entries, bytes) = (number(&info, HOOKS), number(&info, ENTRIES), number(&info, BYTES));
    // Each hook has its policy, and at the end there is one more entry.
    if entries != hooks.count_ones() + 1 || bytes > MAX_TABLE {
        return Ok(false);
    }
    let mut table = named(table, GOT + usize::try_from(bytes).unwrap_or(0));
    if let Some(length) = table.get_mut(NAME..NAME + 4) {
        length.copy_from_slice(&bytes.to_ne_bytes());
    }
    get(&socket, inside.level, GET_ENTRIES, &mut table)?;
    let hooks = (0..MAX_HOOKS).filter(|hook| hooks & (1 << hook) != 0);
    Ok(hooks.into_iter().all(|hook| {
        let policy = number(&info, UNDERFLOW + 4 * usize::try_from(hook).unwrap_or(0));
        verdict(&table, inside.target, usize::try_from(policy).unwrap_or(usize::MAX)) == Some(ACCEPT)
    }))
}

/// The verdict of the entry at this offset.
fn verdict(table: &[u8], target: usize, offset: usize) -> Option<i32> {
    let entry = table.get(GOT..)?.get(offset..)?;
    let target = usize::from(u16::from_ne_bytes(*entry.get(target..)?.first_chunk()?));
    Some(i32::from_ne_bytes(*entry.get(target..)?.get(VERDICT..)?.first_chunk()?))
}

fn named(table: &str, length: usize) -> Vec<u8> {
    let mut buffer = vec![0; length];
    for (to, from) in buffer.iter_mut().take(NAME - 1).zip(table.bytes()) {
        *to = from;
    }
    buffer
}

fn number(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).copied().map_or(0, u32::from_ne_bytes)
}

fn get(socket: &OwnedFd, level: i32, option: i32, buffer: &mut [u8]) -> io::Result<()> {
    let mut length = libc::socklen_t::try_from(buffer.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads and writes at most `length` bytes, which the buffer has.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, option, buffer.as_mut_ptr().cast(), &raw mut length)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_outside_of_the_table_is_none() {
        let mut table = vec![0; GOT + 200];
        table[GOT + 88] = 112;
        table[GOT + 112 + VERDICT..][..4].copy_from_slice(&ACCEPT.to_ne_bytes());
        assert_eq!(verdict(&table, 88, 0), Some(ACCEPT));
        for offset in [150, 200, usize::MAX - 8] {
            assert_eq!(verdict(&table, 88, offset), None, "{offset}");
        }
    }
}
