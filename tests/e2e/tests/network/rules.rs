//! Packet filters and sysctls that CNI plugins leave in the pod's namespace beside links.

use std::{sync::Arc, time::Duration};

use anyhow::{Result, anyhow, ensure};
use kuasar_e2e::{
    image::BUSYBOX,
    lab::{Lab, NET_FILTERED, NET_LEGACY, NET_TUNED, NET_UNKNOWN},
};
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};

use super::{
    kinds::{address, inside},
    traffic::get,
};

/// Servers of a page on two ports.
const SERVERS: &str = "mkdir -p /www; echo a page > /www/index.html; httpd -p 8080 -h /www; \
    exec httpd -f -p 80 -h /www";
/// Time to wait for a packet that is dropped.
const DROPPED: Duration = Duration::from_secs(5);

/// A filter drops what it is to drop, both ways and for both families, and nothing else.
pub(crate) async fn packet_filters_of_plugins_hold(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("filtered", NET_FILTERED).await?;
    let id = pod.container("servers", BUSYBOX, &["/bin/sh", "-c", SERVERS]).await?;
    let four = address(&lab, &pod).await?;
    let status = lab.cri.pod_status(&pod.id).await?.0.network.unwrap_or_default();
    let six = &status.additional_ips.first().ok_or_else(|| anyhow!("the pod has one address only"))?.ip;
    for host in [four.clone(), format!("[{six}]")] {
        ensure!(get(&format!("{host}:80")).await?.ends_with("a page\n"), "the pod does not answer at {host}");
        let dropped = timeout(DROPPED, TcpStream::connect(format!("{host}:8080"))).await;
        ensure!(dropped.is_err(), "port 8080 of {host} is to be dropped, and it answers {dropped:?}");
    }
    // It is the filter: within the pod, the loopback is no other.
    for (gateway, url) in [("10.88.89.1", "10.88.89.1"), ("fd88:89::1", "[fd88:89::1]")] {
        let open = TcpListener::bind((gateway, 9091)).await?;
        let shut = TcpListener::bind((gateway, 9090)).await?;
        let ask = |port: u16| {
            let command = format!("echo x | timeout 20 nc -w 5 {gateway} {port}");
            let (lab, id) = (Arc::clone(&lab), id.clone());
            async move { lab.cri.exec(&id, &["/bin/sh", "-c", &command]).await }
        };
        // Hung up at once, which ends the other side.
        let came = async |server: &TcpListener, patience| {
            timeout(patience, async { server.accept().await.map(drop) }).await
        };
        let (asked, came_in) = tokio::join!(ask(9091), came(&open, DROPPED * 6));
        ensure!(came_in.is_ok_and(|came| came.is_ok()), "nothing goes to {url}:9091: {asked:?}");
        let (asked, came) = tokio::join!(ask(9090), came(&shut, DROPPED * 6));
        ensure!(came.is_err(), "what goes to {url}:9090 is to be dropped, and it came");
        ensure!(asked?.code != 0, "the pod has reached {url}:9090");
    }
    pod.remove().await
}

pub(crate) async fn sysctls_of_plugins_are_the_guests(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("tuned", NET_TUNED).await?;
    let id = pod.container("idle", BUSYBOX, super::IDLE).await?;
    for (path, expected) in [
        ("core/somaxconn", "511"),
        ("ipv4/conf/eth0/rp_filter", "2"),
        ("ipv4/tcp_keepalive_time", "600"),
        // CRI's own, which comes after a plugin's.
        ("ipv4/ip_unprivileged_port_start", "0"),
    ] {
        let value = inside(&lab, &id, &["cat", &format!("/proc/sys/net/{path}")]).await?;
        ensure!(value.trim() == expected, "{path} is {value}");
    }
    pod.remove().await
}

async fn refusal(lab: &Lab, name: &str, handler: &str) -> Result<String> {
    let config = lab.pod_config(name)?;
    let refused = lab.cri.run_pod(&config, handler).await;
    Ok(refused.err().ok_or_else(|| anyhow!("it runs"))?.message().to_owned())
}

pub(crate) async fn rules_of_plugins_that_a_vm_cannot_have_are_refused(lab: Arc<Lab>) -> Result<()> {
    let text = refusal(&lab, "legacy", NET_LEGACY).await?;
    ensure!(
        text.contains(
            "the pod's network namespace has rules of iptables-legacy (in table filter), which do not hold for a VM"
        ),
        "it is refused with {text:?}"
    );
    let text = refusal(&lab, "unknown", NET_UNKNOWN).await?;
    ensure!(
        text.contains(
            "the kernel does not take a rule of chain OUTPUT of table ip filter (match, counter, immediate)"
        ) && text.contains("or a guest kernel that has more of nftables (mini)"),
        "it is refused with {text:?}"
    );
    Ok(())
}
