//! Port-forward: containerd enters the pod's network namespace and dials `localhost`; the server is in the
//! VM.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    image::BUSYBOX,
    lab::{Lab, Pod},
    suite::{handler, patient},
    websocket::Forwarded,
};
use tokio::{task::JoinSet, time::sleep};

use super::netns::Netns;

/// Longer than a slow machine needs to say no, shorter than any timeout of ours.
const QUICK: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_secs(20);

/// A server that gives back what it gets; it answers the end of its input with the end of its output. As many
/// connections as there are `l` may wait for it: when more do, the kernel drops their packets, and may reset
/// one at last.
async fn echo(pod: &Pod<'_>, port: u16) -> Result<String> {
    let script = format!("exec nc -{} -p {port} -e cat", "l".repeat(32));
    pod.container("echo", BUSYBOX, &["/bin/sh", "-c", &script]).await
}

/// Servers that listen on one of the two loopbacks only.
async fn one_sided(pod: &Pod<'_>) -> Result<String> {
    let script = "mkdir -p /www; echo a page > /www/index.html; httpd -p 127.0.0.1:8084 -h /www; \
                  exec httpd -f -p '[::1]:8086' -h /www";
    pod.container("pages", BUSYBOX, &["/bin/sh", "-c", script]).await
}

/// Asks until the server is up.
async fn answered(netns: &Netns, to: SocketAddr, question: &[u8]) -> Result<Vec<u8>> {
    let end = Instant::now() + patient(SOON);
    loop {
        match netns.ask(to, question.to_vec()).await {
            Ok(answer) => return Ok(answer),
            Err(e) if Instant::now() >= end => return Err(e).with_context(|| format!("asking at {to}")),
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}

fn v4(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn v6(port: u16) -> SocketAddr {
    (Ipv6Addr::LOCALHOST, port).into()
}

pub(crate) async fn ports_are_forwarded_over_cri(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("forward", handler()).await?;
    echo(&pod, 8080).await?;
    answered(&Netns::of(&pod)?, v4(8080), b"up?").await?;
    let question: Vec<u8> = (0..100_000_u32).flat_map(u32::to_be_bytes).collect();
    let mut forwarded = Forwarded::open(&lab.cri.port_forward(&pod.id, 8080).await?).await?;
    forwarded.send(&question).await?;
    let received = forwarded.receive(question.len()).await?;
    ensure!(received.error.is_empty(), "containerd complained: {}", received.error);
    ensure!(received.data == question, "{} bytes came back and not the same", received.data.len());
    drop(forwarded);

    let began = Instant::now();
    let mut refused = Forwarded::open(&lab.cri.port_forward(&pod.id, 8081).await?).await?;
    let received = refused.receive(1).await?;
    ensure!(!received.error.is_empty(), "nobody listens on 8081, and containerd received {received:?}");
    ensure!(began.elapsed() < QUICK, "the error {:?} took {:?}", received.error, began.elapsed());
    pod.remove().await
}

pub(crate) async fn ports_are_forwarded_on_both_loopbacks(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("loopbacks", handler()).await?;
    let netns = Arc::new(Netns::of(&pod)?);
    one_sided(&pod).await?;
    // Whoever listens on one of them only is found by the other, too: containerd tries IPv4 first, and never
    // gets a refusal.
    for to in [v4(8084), v6(8084), v4(8086), v6(8086)] {
        let answer = answered(&netns, to, b"GET / HTTP/1.0\r\n\r\n").await?;
        ensure!(answer.ends_with(b"a page\n"), "{to} answered {:?}", String::from_utf8_lossy(&answer));
    }
    echo(&pod, 8080).await?;
    answered(&netns, v4(8080), b"up?").await?;
    // Many at once, half a megabyte in all, both ways, each with a half-close in the middle.
    let mut asked = JoinSet::new();
    for number in 0..8_u8 {
        let netns = Arc::clone(&netns);
        asked.spawn(async move {
            let question = vec![number; 64 * 1024];
            Ok::<_, std::io::Error>(netns.ask(v4(8080), question.clone()).await? == question)
        });
    }
    while let Some(done) = asked.join_next().await {
        ensure!(done??, "one of many connections got something else back");
    }
    let large: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_be_bytes).collect();
    ensure!(netns.ask(v4(8080), large.clone()).await? == large, "four megabytes do not come back the same");

    for to in [v4(9), v6(9)] {
        let began = Instant::now();
        let answer = netns.ask(to, b"anybody?".to_vec()).await;
        ensure!(answer.is_err(), "nobody listens at {to}, and it answered {answer:?}");
        ensure!(began.elapsed() < QUICK, "to be refused took {:?}", began.elapsed());
    }
    pod.remove().await
}

pub(crate) async fn forwarding_goes_on_without_the_daemon(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("lonely", handler()).await?;
    let netns = Netns::of(&pod)?;
    echo(&pod, 8080).await?;
    answered(&netns, v4(8080), b"before").await?;
    lab.kill_daemon(handler()).await?;
    let without = netns.ask(v4(8080), b"without".to_vec()).await;
    lab.restart_daemon(handler()).await?;
    lab.ready_again(&pod.id).await?;
    let after = netns.ask(v4(8080), b"after".to_vec()).await;
    ensure!(without.context("without the daemon")? == b"without", "something else came back");
    ensure!(after.context("with the next daemon")? == b"after", "something else came back");
    pod.remove().await?;
    // Nobody takes connections in what is left of the namespace.
    let refused = netns.dial(v4(8080)).await;
    ensure!(refused.is_err(), "the loopback of a pod that is gone still answers");
    Ok(())
}
