//! Taps: the host's end of a guest's network card.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use netlink_packet_route::link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute};
use nix::libc;
use rtnetlink::LinkUnspec;

use super::{NetworkError, read};

nix::ioctl_write_ptr_bad!(
    /// `TUNSETIFF` of `linux/if_tun.h`: makes an open `/dev/net/tun` a queue of a tap.
    tun_set_iff,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);

/// Opens queues of a tap in the thread's network namespace; `many`: of one for several. One that is not there
/// is created, and exists as long as one of its queues is open.
pub(super) fn queues(name: &str, queues: u32, many: bool) -> io::Result<Vec<OwnedFd>> {
    (0..queues).map(|_| open_queue(name, many)).collect()
}

fn open_queue(name: &str, many: bool) -> io::Result<OwnedFd> {
    let file: File = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: `ifreq` is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    // Frames with the virtio header in front carry checksum and segmentation offloads between guests and
    // veth.
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if many {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: the descriptor is a tun device's and the request is fully initialised and outlives the call.
    unsafe { tun_set_iff(file.as_raw_fd(), &raw const request) }?;
    Ok(file.into())
}

/// One `/dev/vhost-net` for each of a tap's queues; none at all where the host's kernel does not have it.
pub(super) fn vhost_net(queues: usize) -> Vec<OwnedFd> {
    let open = |_| OpenOptions::new().read(true).write(true).open("/dev/vhost-net").map(OwnedFd::from);
    let opened: io::Result<Vec<OwnedFd>> = (0..queues).map(open).collect();
    opened.unwrap_or_else(|error| {
        tracing::debug!(%error, "no /dev/vhost-net: the VMM moves frames itself, which is slower");
        Vec::new()
    })
}

/// Brings a tap up; returns its index.
pub(super) async fn configure(handle: &rtnetlink::Handle, name: &str, mtu: u32) -> Result<u32, NetworkError> {
    let Some(link) = read::link_by_name(handle, name).await? else {
        return Err(NetworkError::Io {
            doing: format!("looking for the tap {name}"),
            source: io::ErrorKind::NotFound.into(),
        });
    };
    let index = link.header.index;
    // The host must not speak IPv6 into the guest by itself. Fails where the host has no IPv6, which is as
    // good.
    let silent = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
        In6AddrGenMode::None,
    )])]);
    let silent = LinkUnspec::new_with_index(index).append_extra_attribute(silent).build();
    drop(handle.link().set(silent).execute().await);
    let up = LinkUnspec::new_with_index(index).mtu(mtu).up().build();
    let set = handle.link().set(up).execute().await;
    set.map_err(NetworkError::netlink(format!("setting the tap {name} up with MTU {mtu}")))?;
    Ok(index)
}
