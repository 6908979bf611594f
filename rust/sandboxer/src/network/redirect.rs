//! `tc`: everything that arrives at one link leaves by another.

use nix::libc;

use super::NetworkError;

/// `ETH_P_ALL` of `linux/if_ether.h`, in network byte order as `tc` wants it.
const EVERY_PROTOCOL: u16 = 0x0003_u16.to_be();

/// Redirects every frame between two links, given by name and index. On error the first is as it was; an
/// ingress qdisc of someone else there is an error.
pub(super) async fn both_ways(
    handle: &rtnetlink::Handle,
    link: (&str, u32),
    tap: (&str, u32),
) -> Result<(), NetworkError> {
    one_way(handle, link, tap).await?;
    if let Err(error) = one_way(handle, tap, link).await {
        undo(handle, link.0, link.1).await?;
        return Err(error);
    }
    Ok(())
}

async fn one_way(
    handle: &rtnetlink::Handle,
    (from_name, from): (&str, u32),
    (to_name, to): (&str, u32),
) -> Result<(), NetworkError> {
    let fail = || NetworkError::netlink(format!("redirecting the traffic of {from_name} to {to_name}"));
    let index = link_index(from).map_err(fail())?;
    handle.qdisc().add(index).ingress().execute().await.map_err(fail())?;
    let filter = handle.traffic_filter(index).add().parent(INGRESS).protocol(EVERY_PROTOCOL);
    let added = async { filter.redirect(to)?.execute().await };
    if let Err(error) = added.await {
        undo(handle, from_name, from).await?;
        return Err(fail()(error));
    }
    Ok(())
}

/// `ffff:`, the ingress qdisc's handle.
const INGRESS: u32 = 0xffff_0000;

/// Removes a link's ingress qdisc and with it the redirection. None there is no error.
pub(super) async fn undo(handle: &rtnetlink::Handle, name: &str, index: u32) -> Result<(), NetworkError> {
    let removed = async {
        let mut request = handle.qdisc().del(link_index(index)?);
        let header = &mut request.message_mut().header;
        header.parent = netlink_packet_route::tc::TcHandle::INGRESS;
        header.handle = INGRESS.into();
        unless_gone(request.execute().await)
    };
    removed.await.map_err(NetworkError::netlink(format!("ending the redirection of {name}")))
}

/// Accepts that the object to remove is gone already.
pub(super) fn unless_gone(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match result {
        // EINVAL: the link has no ingress qdisc.
        Err(rtnetlink::Error::NetlinkError(e))
            if matches!(-e.raw_code(), libc::ENOENT | libc::ENODEV | libc::EINVAL) =>
        {
            Ok(())
        }
        result => result,
    }
}

fn link_index(index: u32) -> Result<i32, rtnetlink::Error> {
    i32::try_from(index).map_err(|_| rtnetlink::Error::InvalidNla(format!("link index {index}")))
}
