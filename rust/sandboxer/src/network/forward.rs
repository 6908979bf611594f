//! Port-forward: containerd enters the pod's network namespace and dials `localhost`, where nothing listens,
//! as the servers are in the VM. So every TCP connection to the loopback there, whatever its port, is given
//! to one listener.
//!
//! It is a program of eBPF for socket lookup that gives it (Linux 5.9 and later): no packet filter, no
//! connection tracking, and the accepted socket's own address says which port was meant. It is attached as
//! long as its descriptor is open, which goes to the relay together with the listener: both end with the pod,
//! whatever becomes of the daemon.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
};

use netlink_packet_route::link::LinkFlags;
use nix::libc::IPPROTO_TCP;
use rtnetlink::LinkUnspec;
use rustix::{
    io::Errno,
    net::{self, AddressFamily, SocketFlags, SocketType, sockopt},
};

use super::{NetworkError, bpf, read};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;
/// First byte of 127.0.0.0/8.
const LOOPBACK_NET: i32 = 127;

/// Descriptors that the relay needs to forward ports.
#[derive(Debug)]
pub struct Forward {
    /// Gets every TCP connection to the namespace's loopback.
    pub listener: OwnedFd,
    /// Has to stay open as long as it shall get them.
    pub link: OwnedFd,
}

/// Prepares the thread's network namespace, which is at `netns`, for port-forward.
///
/// # Errors
/// When the kernel refuses.
pub(super) async fn prepare(handle: &rtnetlink::Handle, netns: &Path) -> Result<Forward, NetworkError> {
    loopback_up(handle).await?;
    let listener = listener().map_err(NetworkError::io("listening for port-forward"))?;
    let attach = || {
        let map = bpf::socket_map(&listener)?;
        let program = bpf::load_socket_lookup(&lookup_program(map.as_raw_fd()))?;
        bpf::attach_socket_lookup(&program, File::open(netns)?.as_fd())
    };
    let link = attach()
        .map_err(NetworkError::io("steering port-forward by eBPF (socket lookup, Linux 5.9 or later)"))?;
    Ok(Forward { listener, link })
}

async fn loopback_up(handle: &rtnetlink::Handle) -> Result<(), NetworkError> {
    let Some(lo) = read::link_by_name(handle, "lo").await? else { return Ok(()) };
    if lo.header.flags.contains(LinkFlags::Up) {
        return Ok(());
    }
    let up = LinkUnspec::new_with_index(lo.header.index).up().build();
    handle.link().set(up).execute().await.map_err(NetworkError::netlink("bringing lo up"))
}

/// Listens on a port that nobody is told. Of both families, unless the host has no IPv6.
fn listener() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = match net::socket_with(AddressFamily::INET6, SocketType::STREAM, flags, None) {
        Ok(socket) => {
            sockopt::set_ipv6_v6only(&socket, false)?;
            net::bind(&socket, &"[::]:0".parse::<std::net::SocketAddrV6>().map_err(io::Error::other)?)?;
            socket
        }
        Err(Errno::AFNOSUPPORT) => {
            let socket = net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
            net::bind(&socket, &"127.0.0.1:0".parse::<std::net::SocketAddrV4>().map_err(io::Error::other)?)?;
            socket
        }
        Err(error) => return Err(error.into()),
    };
    net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// `if (TCP && (127.0.0.0/8 || ::1)) assign(map[0]); return PASS;` Without an assignment the kernel looks on
/// as usual.
fn lookup_program(map: i32) -> Vec<bpf::Instruction> {
    use bpf::{
        Instruction as I,
        Register::{R0, R1, R2, R3, R6, R7, R10},
        context,
    };
    let [a, b, c, d] = context::LOCAL_IP6;
    let assign: Vec<I> = [
        // The map's key 0, on the stack.
        I::store(R10, -4, 0),
        I::copy(R2, R10),
        I::add(R2, -4),
    ]
    .into_iter()
    .chain(I::map(R1, map))
    .chain([
        I::call(bpf::MAP_LOOKUP),
        I::jump_if(R0, 0, 7),
        I::copy(R7, R0),
        I::copy(R1, R6),
        I::copy(R2, R0),
        I::set(R3, 0),
        I::call(bpf::SK_ASSIGN),
        I::copy(R1, R7),
        I::call(bpf::SK_RELEASE),
    ])
    .collect();
    let assign_len = short(assign.len());
    // Jumps count instructions from the one after them; the pass at the end is what most of them go to.
    let v4 = [I::load(R2, R6, context::LOCAL_IP4), I::big_endian(R2), I::shift_right(R2, 24)];
    let v6 = [
        I::load(R2, R6, a),
        I::load(R3, R6, b),
        I::or(R2, R3),
        I::load(R3, R6, c),
        I::or(R2, R3),
        I::jump_unless(R2, 0, 2 + 1 + assign_len),
        I::load(R2, R6, d),
        I::big_endian(R2),
    ];
    let (v4_len, v6_len) = (short(v4.len()), short(v6.len()));
    let mut program = vec![I::copy(R6, R1), I::load(R2, R6, context::PROTOCOL)];
    // Over the family (2), IPv4 (its length and 2), IPv6 (its length and 1) and the assignment.
    program.push(I::jump_unless(R2, IPPROTO_TCP, 2 + v4_len + 2 + v6_len + 1 + assign_len));
    program.push(I::load(R2, R6, context::FAMILY));
    program.push(I::jump_if(R2, nix::libc::AF_INET6, v4_len + 2));
    program.extend(v4);
    program.push(I::jump_unless(R2, LOOPBACK_NET, 1 + v6_len + 1 + assign_len));
    program.push(I::jump(v6_len + 1));
    program.extend(v6);
    program.push(I::jump_unless(R2, 1, assign_len));
    program.extend(assign);
    program.extend([I::set(R0, bpf::SK_PASS), I::exit()]);
    program
}

fn short(length: usize) -> i16 {
    i16::try_from(length).unwrap_or(i16::MAX)
}
