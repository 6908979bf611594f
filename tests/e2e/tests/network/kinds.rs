//! Kinds of links.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use kuasar_e2e::{
    image::BUSYBOX,
    lab::{
        Lab, MACVLAN_MASTER, NET_MACVLAN, NET_PTP, NET_RARE, NET_RULES, NET_TAP, NET_TUN, NET_TWO, NET_V6,
        Pod, run,
    },
};
use tokio::process::Command;

use super::{
    IDLE,
    netns::Netns,
    traffic::{get, serve},
};

/// Runs in a container; what it wrote.
pub(crate) async fn inside(lab: &Lab, container: &str, command: &[&str]) -> Result<String> {
    let out = lab.cri.exec(container, command).await?;
    ensure!(out.code == 0, "{command:?} gave {out:?}");
    Ok(out.stdout)
}

/// Its address as CRI says it.
pub(crate) async fn address(lab: &Lab, pod: &Pod<'_>) -> Result<String> {
    Ok(lab.cri.pod_status(&pod.id).await?.0.network.context("the pod has no network status")?.ip)
}

/// A link of the host for macvlan, and what is at its other end.
async fn macvlan_master() -> Result<()> {
    let show = run(Command::new("ip").args(["link", "show", MACVLAN_MASTER])).await;
    if show.is_ok() {
        return Ok(());
    }
    for args in [
        format!("link add {MACVLAN_MASTER} up type veth peer name kmac1").as_str(),
        "link set kmac1 up",
        "addr add 10.88.81.1/24 dev kmac1",
    ] {
        run(Command::new("ip").args(args.split(' '))).await?;
    }
    Ok(())
}

pub(crate) async fn an_ipv6_pod(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("six", NET_V6).await?;
    let ip = address(&lab, &pod).await?;
    ensure!(ip.starts_with("fd88:79::"), "its address is {ip:?}");
    let id = serve(&pod).await?;
    ensure!(get(&format!("[{ip}]:80")).await?.ends_with("a page\n"), "the pod does not answer");
    let addresses = inside(&lab, &id, &["ip", "addr", "show", "eth0"]).await?;
    ensure!(!addresses.contains("inet "), "it has an IPv4 address: {addresses}");
    inside(&lab, &id, &["ping", "-c", "1", "-W", "5", "fd88:79::1"]).await?;
    let hosts = inside(&lab, &id, &["cat", "/etc/hosts"]).await?;
    ensure!(hosts.contains(&format!("{ip}\t{}", pod.config.hostname)), "/etc/hosts is {hosts}");
    pod.remove().await
}

pub(crate) async fn a_ptp_pod(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("ptp", NET_PTP).await?;
    let id = serve(&pod).await?;
    // The gateway is reached by a route of link scope, which has to be there before the one through it.
    let routes = inside(&lab, &id, &["ip", "route"]).await?;
    ensure!(routes.contains("default via 10.88.80.1 dev eth0"), "its routes are {routes}");
    ensure!(routes.contains("10.88.80.1 dev eth0 scope link"), "its routes are {routes}");
    inside(&lab, &id, &["ping", "-c", "1", "-W", "5", "10.88.80.1"]).await?;
    let ip = address(&lab, &pod).await?;
    ensure!(get(&format!("{ip}:80")).await?.ends_with("a page\n"), "the pod does not answer");
    pod.remove().await
}

pub(crate) async fn a_pod_with_what_is_rare(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("rare", NET_RARE).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    let has =
        |text: &str, parts: &[&str]| text.lines().any(|line| parts.iter().all(|part| line.contains(part)));
    for (command, parts) in [
        (&["ip", "link", "show", "eth0"][..], &["NOARP"][..]),
        (&["ip", "neigh"], &["10.88.85.200", "lladdr 02:00:00:00:00:c8", "PERMANENT"]),
        (&["ip", "addr", "show", "eth0"], &["inet 10.88.86.5 peer 10.88.86.1/32"]),
        (&["ip", "route"], &["192.0.2.0/24 via 10.88.85.1 dev eth0", "src 10.88.86.5", "metric 7"]),
        (&["ip", "addr", "show", "down0"], &["inet 10.88.88.5/24"]),
        // 192.0.2.0 with metric 7; the MTU here is 40 more than what is advertised to TCP (advmss 1200).
        (&["cat", "/proc/net/route"], &["eth0\t000200C0", "\t7\t00FFFFFF\t1240\t"]),
    ] {
        let text = inside(&lab, &id, command).await?;
        ensure!(has(&text, parts), "there is no {parts:?} in what {command:?} says: {text}");
    }
    let down = inside(&lab, &id, &["ip", "link", "show", "down0"]).await?;
    ensure!(!down.contains("UP"), "what is down on the host is up: {down}");
    pod.remove().await
}

pub(crate) async fn a_pod_on_a_tap(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("tap", NET_TAP).await?;
    let netns = Netns::of(&pod)?;
    let id = serve(&pod).await?;
    let ip = address(&lab, &pod).await?;
    ensure!(get(&format!("{ip}:80")).await?.ends_with("a page\n"), "the pod does not answer");
    inside(&lab, &id, &["ping", "-c", "1", "-W", "5", "10.88.84.1"]).await?;
    let own = inside(&lab, &id, &["ip", "addr", "show", "eth0"]).await?;
    ensure!(own.contains(&format!("inet {ip}/24")) && own.contains("mtu 1400"), "the card is {own}");
    let links = netns.run(&["ip", "-o", "link"]).await?;
    ensure!(!links.contains("kua") && links.contains("up0"), "the links are {links}");
    let filters = netns.run(&["tc", "qdisc", "show"]).await?;
    ensure!(!filters.contains("ingress"), "frames are redirected: {filters}");
    let mac = |text: &str| {
        text.split_once("link/ether ").and_then(|(_, rest)| Some(rest.split(' ').next()?.to_owned()))
    };
    let tap = netns.run(&["ip", "-o", "link", "show", "eth0"]).await?;
    ensure!(mac(&tap).is_some() && mac(&tap) != mac(&own), "the card has the tap's address: {own}, {tap}");
    pod.remove().await
}

pub(crate) async fn a_pod_with_a_tun_is_refused(lab: Arc<Lab>) -> Result<()> {
    let config = lab.pod_config("tun")?;
    let refused = lab.cri.run_pod(&config, NET_TUN).await;
    let text = refused.err().ok_or_else(|| anyhow!("it runs"))?.message().to_owned();
    ensure!(
        text.contains(
            "the pod's link tun0 is of kind tun (packets without ethernet), which cannot be given to a VM"
        ),
        "it is refused with {text:?}"
    );
    Ok(())
}

pub(crate) async fn a_macvlan_pod(lab: Arc<Lab>) -> Result<()> {
    macvlan_master().await?;
    let pod = lab.pod("macvlan", NET_MACVLAN).await?;
    let id = serve(&pod).await?;
    inside(&lab, &id, &["ping", "-c", "1", "-W", "5", "10.88.81.1"]).await?;
    let ip = address(&lab, &pod).await?;
    ensure!(get(&format!("{ip}:80")).await?.ends_with("a page\n"), "the pod does not answer");
    pod.remove().await
}

pub(crate) async fn a_pod_with_two_interfaces(lab: Arc<Lab>) -> Result<()> {
    macvlan_master().await?;
    let pod = lab.pod("two", NET_TWO).await?;
    let id = serve(&pod).await?;
    for (link, gateway) in [("eth0", "10.88.82.1"), ("eth1", "10.88.81.1")] {
        let text = inside(&lab, &id, &["ip", "-4", "addr", "show", link]).await?;
        let subnet = gateway.trim_end_matches('1');
        ensure!(text.contains(&format!("inet {subnet}")), "{link} is {text}");
        inside(&lab, &id, &["ping", "-c", "1", "-W", "5", "-I", link, gateway]).await?;
    }
    pod.remove().await
}

pub(crate) async fn a_pod_with_routing_rules_is_refused(lab: Arc<Lab>) -> Result<()> {
    let config = lab.pod_config("rules")?;
    let refused = lab.cri.run_pod(&config, NET_RULES).await;
    let text = refused.err().ok_or_else(|| anyhow!("it runs"))?.message().to_owned();
    ensure!(
        text.contains("the pod has a routing rule for table 100")
            && text.contains("use a CNI plugin without rules"),
        "it is refused with {text:?}"
    );
    Ok(())
}
