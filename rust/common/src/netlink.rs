//! Messages and attributes of netlink families for which there is no library: those of netfilter and of
//! IPsec. What the kernel is asked is about the thread's network namespace.

use std::{io, os::fd::OwnedFd, time::Duration};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, netlink, recv, send,
        socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};

/// The kernel answers at once; this is only so that a defect of it does not hold the daemon's thread for
/// ever.
const PATIENCE: Duration = Duration::from_secs(5);
/// The kernel sends lists in pieces of at most this many bytes.
const MAX_PIECE: usize = 64 * 1024;
/// Most bytes of one list that are taken.
const MAX_LIST: usize = 4 << 20;
/// Number of attempts at a list that changes while it is read.
const ATTEMPTS: usize = 5;

/// `struct nlmsghdr` and `struct nlattr` of `linux/netlink.h`.
const HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
/// Flag of every message to the kernel.
pub const REQUEST: u16 = 1;
/// Flag: an answer is wanted if all is well, too.
pub const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const DUMP_INTERRUPTED: u16 = 0x10;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// Without the flags "nested" and "big-endian".
const TYPE_MASK: u16 = 0x3fff;

/// Asks the kernel for a list: the messages, each without its header. A kernel that does not have what is
/// asked for has an empty list.
///
/// # Errors
/// The kernel's; or the list is too long, or changes all the time.
pub fn list(protocol: Protocol, kind: u16, question: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    for _ in 0..ATTEMPTS {
        match list_once(protocol, kind, question) {
            Ok(Some(list)) => return Ok(list),
            Ok(None) => {}
            Err(error) if is_missing(&error) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "it changes all the time"))
}

fn is_missing(error: &io::Error) -> bool {
    let missing = [Errno::PROTONOSUPPORT, Errno::AFNOSUPPORT, Errno::OPNOTSUPP, Errno::INVAL];
    missing.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// `None` if it changed meanwhile.
fn list_once(protocol: Protocol, kind: u16, question: &[u8]) -> io::Result<Option<Vec<Vec<u8>>>> {
    let socket = socket(protocol)?;
    send(&socket, &message(kind, REQUEST | DUMP, 0, question), SendFlags::empty())?;
    answers(&socket)
}

/// Opens a socket of the protocol. Receiving from it does not wait for ever.
///
/// # Errors
/// When the kernel does not have the protocol.
pub fn socket(protocol: Protocol) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(protocol))?;
    bind(&socket, &netlink::SocketAddrNetlink::new(0, 0))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
    Ok(socket)
}

/// The bytes of a message.
#[must_use]
pub fn message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(sequence.to_ne_bytes());
    message.extend([0; 4]);
    message.extend(body);
    message.resize(message.len().next_multiple_of(ATTRIBUTE_HEADER), 0);
    message
}

/// The kernel's answer to the message with a number: done, or the error.
pub struct Answer {
    /// The number.
    pub sequence: u32,
    /// Why it was not done.
    pub error: Option<io::Error>,
}

/// Receives the kernel's answers to messages; lists are left out.
///
/// # Errors
/// When nothing comes.
pub fn receive(socket: &OwnedFd) -> io::Result<Vec<Answer>> {
    let mut buffer = vec![0; MAX_PIECE];
    let (read, _) = recv(socket, &mut *buffer, RecvFlags::empty())?;
    let (mut rest, mut all) = (buffer.get(..read).unwrap_or_default(), Vec::new());
    while let Some((length, kind, _)) = header(rest) {
        if kind == ERROR {
            let sequence = rest.get(8..).and_then(number).unwrap_or(0);
            let code = rest.get(HEADER..).and_then(number).unwrap_or(0).cast_signed();
            let error = (code != 0).then(|| io::Error::from_raw_os_error(code.saturating_neg()));
            all.push(Answer { sequence, error });
        }
        rest = rest.get(length.next_multiple_of(ATTRIBUTE_HEADER)..).unwrap_or_default();
    }
    Ok(all)
}

fn answers(socket: &OwnedFd) -> io::Result<Option<Vec<Vec<u8>>>> {
    let (mut list, mut bytes, mut steady) = (Vec::new(), 0, true);
    let mut buffer = vec![0; MAX_PIECE];
    loop {
        let (read, _) = recv(socket, &mut *buffer, RecvFlags::empty())?;
        let mut rest = buffer.get(..read).unwrap_or_default();
        while let Some((length, kind, flags)) = header(rest) {
            let body = rest.get(HEADER..length).unwrap_or_default();
            steady &= flags & DUMP_INTERRUPTED == 0;
            match kind {
                // A number that is 0 or a negative error.
                ERROR | DONE => match number(body).unwrap_or(0).cast_signed() {
                    0 => return Ok(steady.then_some(list)),
                    error => return Err(io::Error::from_raw_os_error(error.saturating_neg())),
                },
                _ => list.push(body.to_owned()),
            }
            bytes += body.len();
            rest = rest.get(length.next_multiple_of(ATTRIBUTE_HEADER)..).unwrap_or_default();
        }
        if bytes > MAX_LIST {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("it has more than {MAX_LIST} bytes"),
            ));
        }
    }
}

/// Length, type and flags of the first message.
fn header(bytes: &[u8]) -> Option<(usize, u16, u16)> {
    let length = usize::try_from(number(bytes)?).ok().filter(|length| *length >= HEADER)?;
    let short = |at: usize| Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
    Some((length, short(4)?, short(6)?))
}

fn number(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().copied().map(u32::from_ne_bytes)
}

/// Appends an attribute, whose type may have flags.
pub fn push(to: &mut Vec<u8>, kind: u16, payload: &[u8]) {
    let length = u16::try_from(ATTRIBUTE_HEADER + payload.len()).unwrap_or(u16::MAX);
    to.extend(length.to_ne_bytes());
    to.extend(kind.to_ne_bytes());
    to.extend(payload);
    to.resize(to.len().next_multiple_of(ATTRIBUTE_HEADER), 0);
}

/// Attributes one after another: type and payload. Ends where they make no sense any more.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & TYPE_MASK;
        let payload = bytes.get(ATTRIBUTE_HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(ATTRIBUTE_HEADER)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// The payload of the attribute of this type.
#[must_use]
pub fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(kind, payload)| (kind == wanted).then_some(payload))
}

/// The text of the attribute of this type, without the zero at its end.
#[must_use]
pub fn text(bytes: &[u8], wanted: u16) -> String {
    let payload = attribute(bytes, wanted).unwrap_or_default();
    String::from_utf8_lossy(payload.strip_suffix(&[0]).unwrap_or(payload)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_and_nonsense_ends_them() {
        let mut bytes = Vec::new();
        push(&mut bytes, 1 | 0x8000, b"a\0");
        push(&mut bytes, 2, &[0, 0, 0, 7]);
        assert_eq!(text(&bytes, 1), "a");
        assert_eq!(attribute(&bytes, 2), Some(&[0, 0, 0, 7][..]));
        assert_eq!(attribute(&bytes, 3), None);
        for bad in [&[][..], &[3, 0, 1, 0], &[9, 0, 1, 0, 1], &[4], &[0, 0, 0, 0]] {
            assert_eq!(attributes(bad).count(), 0, "{bad:?}");
        }
    }

    #[test]
    fn a_header_that_lies_ends_the_message() {
        assert_eq!(header(&message(7, 1, 9, &[1, 2, 3, 4])), Some((20, 7, 1)));
        assert_eq!(header(&[15, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(header(&[16, 0]), None);
    }
}
