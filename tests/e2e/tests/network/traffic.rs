//! Traffic in and out of pods.

use std::{fs, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    cri::{DnsConfig, LinuxContainerResources, Mount, PortMapping},
    image::BUSYBOX,
    lab::{Lab, NET_DUAL, Pod, container, run},
    suite::patient,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    process::Command,
    time::{Instant, sleep, timeout},
};

use super::{
    IDLE,
    kinds::{address, inside},
    netns::Netns,
};

const SOON: Duration = Duration::from_secs(60);
const VHOST_NET: &str = "/dev/vhost-net";
/// Bytes of a transfer that tells.
const LARGE: usize = 4 << 20;

/// A container that serves a page on port 80.
pub(crate) async fn serve(pod: &Pod<'_>) -> Result<String> {
    let script = "mkdir -p /www; echo a page > /www/index.html; exec httpd -f -p 80 -h /www";
    pod.container("server", BUSYBOX, &["/bin/sh", "-c", script]).await
}

/// Fetches that page; the server needs a moment to listen.
pub(crate) async fn get(address: &str) -> Result<String> {
    let end = Instant::now() + patient(SOON);
    loop {
        let attempt = async {
            let mut stream = TcpStream::connect(address).await?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
            let mut text = String::new();
            stream.read_to_string(&mut text).await.map(|_| text)
        };
        match attempt.await {
            Ok(text) => return Ok(text),
            Err(e) if Instant::now() >= end => return Err(e).with_context(|| format!("reaching {address}")),
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn sixth_address(lab: &Lab, pod: &Pod<'_>) -> Result<String> {
    let status = lab.cri.pod_status(&pod.id).await?.0.network.unwrap_or_default();
    Ok(status.additional_ips.first().context("the pod has one address only")?.ip.clone())
}

pub(crate) async fn a_dual_stack_pod(lab: Arc<Lab>) -> Result<()> {
    let mut config = lab.pod_config("dual")?;
    config.dns_config = Some(DnsConfig {
        servers: vec!["10.88.78.1".into(), "fd88:78::1".into()],
        searches: vec!["a.svc".into(), "svc".into()],
        options: vec!["ndots:5".into()],
    });
    let pod = lab.run(config, NET_DUAL).await?;
    let (four, six) = (address(&lab, &pod).await?, sixth_address(&lab, &pod).await?);
    let id = serve(&pod).await?;
    for address in [format!("{four}:80"), format!("[{six}]:80")] {
        ensure!(get(&address).await?.ends_with("a page\n"), "the pod does not answer at {address}");
    }
    for gateway in ["10.88.78.1", "fd88:78::1"] {
        inside(&lab, &id, &["ping", "-c", "1", "-W", "5", gateway]).await?;
    }
    let link = inside(&lab, &id, &["ip", "addr", "show", "eth0"]).await?;
    for part in ["mtu 1400", &four, &six] {
        ensure!(link.contains(part), "there is no {part} in {link}");
    }
    let (hosts, name) = (inside(&lab, &id, &["cat", "/etc/hosts"]).await?, &pod.config.hostname);
    ensure!(
        hosts.contains(&format!("{four}\t{name}\n")) && hosts.contains(&format!("{six}\t{name}\n")),
        "/etc/hosts is {hosts}"
    );
    let resolv = inside(&lab, &id, &["cat", "/etc/resolv.conf"]).await?;
    let expected = "search a.svc svc\nnameserver 10.88.78.1\nnameserver fd88:78::1\noptions ndots:5\n";
    ensure!(resolv == expected, "/etc/resolv.conf is {resolv}");
    let bash = bash(&lab, &pod).await?;
    datagrams(&lab, &bash).await?;
    frames_are_larger_than_the_mtu(&lab, &pod, &bash).await?;
    pod.remove().await
}

pub(crate) async fn a_pod_with_two_processors_has_two_queues(lab: Arc<Lab>) -> Result<()> {
    let pod = two_processors(&lab, "queues").await?;
    let id = serve(&pod).await?;
    let queues = inside(&lab, &id, &["ls", "/sys/class/net/eth0/queues"]).await?;
    ensure!(queues.contains("rx-1") && !queues.contains("rx-2"), "the queues are {queues}");
    let ip = address(&lab, &pod).await?;
    ensure!(get(&format!("{ip}:80")).await?.ends_with("a page\n"), "the pod does not answer");
    pod.remove().await
}

async fn two_processors<'a>(lab: &'a Lab, name: &str) -> Result<Pod<'a>> {
    let mut config = lab.pod_config(name)?;
    let linux = config.linux.as_mut().context("it has no linux part")?;
    // The pod's own cgroup has no limit here, so what is asked for counts.
    let two_processors = LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 200_000,
        cpu_shares: 2048,
        ..Default::default()
    };
    linux.resources = Some(two_processors);
    lab.run(config, NET_DUAL).await
}

/// Reason why the kernel of this machine cannot move frames itself.
pub(crate) fn vhost_missing() -> Option<String> {
    let there = Path::new(VHOST_NET).exists();
    (!there).then(|| format!("there is no {VHOST_NET}; the machine of tests/lab/machine has one"))
}

/// A transfer that the VMM, which would have to read and write it otherwise, does not see.
pub(crate) async fn the_kernel_moves_the_frames(lab: Arc<Lab>) -> Result<()> {
    let pod = two_processors(&lab, "vhost").await?;
    let vmm = pod.recorded_pid("/vm/vmm/pid")?;
    let opened = fs::read_dir(format!("/proc/{vmm}/fd"))?.flatten();
    let opened = opened.filter(|fd| fs::read_link(fd.path()).is_ok_and(|path| path == Path::new(VHOST_NET)));
    let opened = opened.count();
    ensure!(opened == 2, "the VMM has {VHOST_NET} open {opened} times, for two queues");
    let bash = bash(&lab, &pod).await?;
    let before = bytes_moved_by(vmm)?;
    let server = TcpListener::bind("10.88.78.1:5003").await?;
    tokio::try_join!(exchange(server), exchange_inside(&lab, &bash, 5003))?;
    let moved = bytes_moved_by(vmm)? - before;
    ensure!(moved < LARGE / 4, "the VMM read and wrote {moved} bytes while {LARGE} went each way");
    pod.remove().await
}

/// Bytes that went through system calls of a process, both ways (proc(5), `/proc/pid/io`).
fn bytes_moved_by(pid: i32) -> Result<usize> {
    let path = format!("/proc/{pid}/io");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let of = |name| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<usize>().ok());
    of("rchar:")
        .zip(of("wchar:"))
        .map(|(read, wrote)| read + wrote)
        .with_context(|| format!("{path}: {text}"))
}

/// A container with bash, which can talk to the network itself.
async fn bash(lab: &Lab, pod: &Pod<'_>) -> Result<String> {
    let mut bash = container("bash", BUSYBOX, IDLE);
    bash.mounts.push(Mount {
        container_path: "/bash".into(),
        host_path: lab.paths.tool("bash-static").canonicalize()?.to_string_lossy().into_owned(),
        readonly: true,
        ..Default::default()
    });
    let id = pod.create(bash).await?;
    lab.cri.start(&id).await?;
    Ok(id)
}

/// A datagram of several fragments goes out, and another comes back.
async fn datagrams(lab: &Lab, id: &str) -> Result<()> {
    let server = UdpSocket::bind("10.88.78.1:5000").await?;
    let script =
        "exec 3<>/dev/udp/10.88.78.1/5000; printf '%4000s' question >&3; timeout 20 head -c 4000 <&3 | wc -c";
    let answering = async {
        let mut buffer = vec![0; 8192];
        let (length, from) =
            timeout(patient(SOON), server.recv_from(&mut buffer)).await.context("no datagram came")??;
        ensure!(
            length == 4000 && buffer.get(..length).is_some_and(|b| b.ends_with(b"question")),
            "{length} bytes"
        );
        server.send_to(&[b'a'; 4000], from).await?;
        Ok(())
    };
    let asking = async {
        let out = lab.cri.exec(id, &["/bash", "-c", script]).await?;
        ensure!(out.stdout.trim() == "4000", "what came back: {out:?}");
        Ok(())
    };
    tokio::try_join!(asking, answering)?;
    Ok(())
}

/// A large transfer each way, whole, in pieces that only segmentation offload explains.
async fn frames_are_larger_than_the_mtu(lab: &Lab, pod: &Pod<'_>, id: &str) -> Result<()> {
    let netns = Netns::of(pod)?;
    let server = TcpListener::bind("10.88.78.1:5001").await?;
    let before = tap_counters(&netns).await?;
    let serving = exchange(server);
    tokio::try_join!(serving, exchange_inside(lab, id, 5001))?;
    let after = tap_counters(&netns).await?;
    for (name, (bytes, packets)) in [
        ("into the pod", (after.0 - before.0, after.1 - before.1)),
        ("out of the pod", (after.2 - before.2, after.3 - before.3)),
    ] {
        ensure!(bytes >= LARGE as u64, "{bytes} bytes went {name} over the tap");
        // Without offloads, none has more than 1414 bytes, and acknowledgements make the average smaller.
        ensure!(bytes / packets.max(1) > 2000, "{bytes} bytes in {packets} frames went {name}: no offload");
    }
    Ok(())
}

/// Sends a lot to whoever connects, and receives as much, all of it zeroes, at the same time.
async fn exchange(server: TcpListener) -> Result<()> {
    let (stream, _) = timeout(patient(SOON), server.accept()).await.context("the pod does not connect")??;
    let (mut from_pod, mut to_pod) = stream.into_split();
    let sending = async {
        to_pod.write_all(&vec![7; LARGE]).await?;
        to_pod.shutdown().await
    };
    let mut got = Vec::new();
    tokio::try_join!(sending, from_pod.read_to_end(&mut got))?;
    ensure!(got == vec![0; LARGE], "{} bytes came out of the pod, or not those that were sent", got.len());
    Ok(())
}

/// The pod's part in it. Not with busybox' `nc`: at the end of what it receives, it ends, whatever it still
/// has to send.
async fn exchange_inside(lab: &Lab, bash: &str, port: u16) -> Result<()> {
    let script = format!(
        "exec 3<>/dev/tcp/10.88.78.1/{port}; head -c {LARGE} /dev/zero >&3 & \
         head -c {LARGE} <&3 | tr -d '\\000' | sha256sum; wait $! && echo sent"
    );
    let sum = format!("head -c {LARGE} /dev/zero | tr '\\000' '\\007' | sha256sum; echo sent");
    let expected = inside(lab, bash, &["/bin/sh", "-c", &sum]).await?;
    let out = inside(lab, bash, &["/bash", "-c", &script]).await?;
    ensure!(out == expected, "what arrived in the pod is not what was sent: {out}");
    Ok(())
}

/// Bytes and packets into the VM, and out of it.
async fn tap_counters(netns: &Netns) -> Result<(u64, u64, u64, u64)> {
    let text = netns.run(&["cat", "/proc/net/dev"]).await?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix("kua")).context("there is no tap")?;
    let (_, counters) = line.split_once(':').context("a line of another make")?;
    let numbers: Vec<u64> = counters.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    match numbers.as_slice() {
        [rx_bytes, rx_packets, _, _, _, _, _, _, tx_bytes, tx_packets, ..] => {
            Ok((*tx_bytes, *tx_packets, *rx_bytes, *rx_packets))
        }
        _ => anyhow::bail!("a line of another make: {line}"),
    }
}

pub(crate) async fn pods_reach_each_other(lab: Arc<Lab>) -> Result<()> {
    let server = lab.pod("server", NET_DUAL).await?;
    let client = lab.pod("client", NET_DUAL).await?;
    let (four, six) = (address(&lab, &server).await?, sixth_address(&lab, &server).await?);
    let server_id = serve(&server).await?;
    let client_id = client.container("client", BUSYBOX, IDLE).await?;
    let make = format!("head -c {LARGE} /dev/urandom > /www/file && sha256sum < /www/file");
    let expected = inside(&lab, &server_id, &["/bin/sh", "-c", &make]).await?;
    for host in [four.clone(), format!("[{six}]")] {
        let fetch = format!("wget -q -O - http://{host}/file | sha256sum");
        let fetched = inside(&lab, &client_id, &["/bin/sh", "-c", &fetch]).await?;
        ensure!(fetched == expected, "from {host} came {fetched} instead of {expected}");
    }
    for host in [four, six] {
        inside(&lab, &client_id, &["ping", "-c", "1", "-W", "5", &host]).await?;
    }
    client.remove().await?;
    server.remove().await
}

/// The plugin's limiters are on the host's end of the link: nothing must go round them, and they must stay as
/// they are.
pub(crate) async fn limits_of_the_bandwidth_plugin_hold(lab: Arc<Lab>) -> Result<()> {
    let mut config = lab.pod_config("limited")?;
    for direction in ["ingress", "egress"] {
        config.annotations.insert(format!("kubernetes.io/{direction}-bandwidth"), "80M".into());
    }
    let pod = lab.run(config, NET_DUAL).await?;
    let id = bash(&lab, &pod).await?;
    let server = TcpListener::bind("10.88.78.1:5002").await?;
    let serving = exchange(server);
    tokio::try_join!(serving, exchange_inside(&lab, &id, 5002))?;
    let text = String::from_utf8(run(Command::new("tc").args(["-s", "qdisc", "show"])).await?)?;
    // One into the pod, on the host's end of its link, and one out of it, on the plugin's own device.
    let limiters: Vec<&str> =
        text.split("qdisc ").filter(|part| part.starts_with("tbf") && part.contains("rate 80Mbit")).collect();
    ensure!(limiters.len() == 2, "the limiters are {limiters:?} in {text}");
    for limiter in limiters {
        let sent =
            limiter.split_once("Sent ").and_then(|(_, rest)| rest.split(' ').next()?.parse::<usize>().ok());
        ensure!(sent.is_some_and(|bytes| bytes >= LARGE), "traffic went round a limiter: {limiter}");
    }
    pod.remove().await?;
    let text = String::from_utf8(run(Command::new("tc").args(["qdisc", "show"])).await?)?;
    ensure!(!text.contains("tbf"), "a limiter is left: {text}");
    Ok(())
}

pub(crate) async fn host_ports_are_mapped(lab: Arc<Lab>) -> Result<()> {
    let found = ["/usr/sbin/iptables", "/sbin/iptables", "/usr/bin/iptables"]
        .iter()
        .any(|path| Path::new(path).exists());
    ensure!(found, "CNI's portmap needs iptables, which is not there: run tests/lab/setup --check");
    let mut config = lab.pod_config("mapped")?;
    config.port_mappings.push(PortMapping { container_port: 80, host_port: 18080, ..Default::default() });
    let pod = lab.run(config, NET_DUAL).await?;
    serve(&pod).await?;
    ensure!(get("10.88.78.1:18080").await?.ends_with("a page\n"), "the host's port is not the pod's");
    pod.remove().await?;
    ensure!(TcpStream::connect("10.88.78.1:18080").await.is_err(), "the port is mapped after the pod's end");
    Ok(())
}
