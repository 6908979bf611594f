//! Sockets of the host in containers: whoever is let in by their mode talks to the service, which sees who it
//! is.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use kuasar_e2e::{
    cri::{ContainerConfig, Int64Value, LinuxContainerSecurityContext, Mount},
    image::BUSYBOX,
    lab::{self, Lab, Pod, folder_of, own_pids, run},
    suite::{handler, patient},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    process::Command,
    task::JoinHandle,
    time::{Instant, sleep},
};

use super::{IDLE, common::sh, restart::relay_of};

/// The group that may use the service.
const GROUP: u32 = 4242;

/// A service of the host. It greets with who called, reads to the end, and gives everything back.
struct Service {
    path: PathBuf,
    serving: JoinHandle<()>,
}

impl Service {
    fn start(lab: &Lab, name: &str) -> Result<Self> {
        let folder = lab.machine.root.join("tmp").join(name);
        fs::create_dir_all(&folder)?;
        // Nobody but root comes by this way on the host.
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700))?;
        let path = folder.join("service.sock");
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        chown(&path, Some(0), Some(GROUP))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o660))?;
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream));
            }
        });
        Ok(Self { path, serving })
    }

    async fn end(self) {
        self.serving.abort();
        let _ = self.serving.await;
    }
}

async fn answer(mut stream: UnixStream) -> Result<()> {
    let peer = stream.peer_cred()?;
    stream.write_all(format!("{}:{} ", peer.uid(), peer.gid()).as_bytes()).await?;
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await?;
    Ok(stream.write_all(&all).await?)
}

/// The client, as a program that needs nothing of the image it runs in.
async fn client(lab: &Lab) -> Result<PathBuf> {
    let program = lab.machine.root.join("tmp/unix_client");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/unix_client.rs");
    if !program.exists() {
        let mut rustc = Command::new("rustc");
        rustc.args(["--edition", "2024", "-C", "target-feature=+crt-static", "-o"]);
        run(rustc.arg(&program).arg(source)).await.context("building the client")?;
    }
    Ok(program)
}

fn mount(host: &Path, container: &str, readonly: bool) -> Mount {
    let host_path = host.to_string_lossy().into_owned();
    Mount { container_path: container.into(), host_path, readonly, ..Mount::default() }
}

/// A container with the client and the socket; of a user with these supplementary groups, or of root.
async fn with_socket(
    lab: &Lab,
    pod: &Pod<'_>,
    name: &str,
    socket: &Path,
    user: Option<(i64, &[i64])>,
) -> Result<String> {
    let mounts =
        vec![mount(&client(lab).await?, "/client", true), mount(socket, "/run/service.sock", user.is_some())];
    let mut config = ContainerConfig { mounts, ..lab::container(name, BUSYBOX, IDLE) };
    if let Some((id, groups)) = user {
        let id = || Some(Int64Value { value: id });
        config.linux.get_or_insert_default().security_context = Some(LinuxContainerSecurityContext {
            namespace_options: Some(own_pids()),
            run_as_user: id(),
            run_as_group: id(),
            supplemental_groups: groups.to_vec(),
            ..Default::default()
        });
    }
    let id = pod.create(config).await?;
    lab.cri.start(&id).await.map_err(|e| anyhow!("starting {name}: {}", e.message()))?;
    Ok(id)
}

const ASK: &str = "echo question | /client /run/service.sock";

async fn says(lab: &Lab, id: &str, script: &str, expected: &str) -> Result<()> {
    let out = sh(lab, id, script).await?;
    ensure!(out == expected, "`{script}` gave {out:?} instead of {expected:?}");
    Ok(())
}

pub(crate) async fn containers_talk_to_a_socket_of_the_host(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("sockets", handler()).await?;
    let service = Service::start(&lab, "service")?;
    let root = with_socket(&lab, &pod, "root", &service.path, None).await?;
    says(&lab, &root, "stat -c '%F %a %u:%g' /run/service.sock", "0 socket 660 0:4242").await?;
    says(&lab, &root, ASK, "0 0:0 question").await?;
    // More than any buffer on the way, in both directions, and in both at once.
    says(
        &lab,
        &root,
        "seq 100000 > /sent; /client /run/service.sock < /sent > /got; \
         (printf '0:0 '; cat /sent) | cmp - /got && wc -c < /got",
        "0 588899",
    )
    .await?;
    let many = "for i in $(seq 12); do (echo $i | /client /run/service.sock > /out-$i) & done; wait; \
                cat /out-* | sort -k 2 -n | tr '\\n' ','";
    let expected: String = (1..=12).map(|i| format!("0:0 {i},")).collect();
    says(&lab, &root, many, &format!("0 {expected}")).await?;

    // The service sees the user; who is let in, and by which group, is as it is on the host.
    let member = with_socket(&lab, &pod, "member", &service.path, Some((1000, &[i64::from(GROUP)]))).await?;
    says(&lab, &member, ASK, "0 1000:1000 question").await?;
    let stranger = with_socket(&lab, &pod, "stranger", &service.path, Some((1001, &[]))).await?;
    let out = sh(&lab, &stranger, ASK).await?;
    ensure!(out == "1 connect: Permission denied (os error 13)", "a stranger gets {out:?}");

    // What the relay holds for a container ends with it.
    let relay = relay_of(&pod.id)?;
    lab.cri.stop(&stranger, 0).await?;
    lab.cri.remove(&stranger).await?;
    ensure!(held(relay, &service.path)? == 2, "the relay holds {}", held(relay, &service.path)?);

    // Nobody listens any more: connections end, and the log says why.
    let path = service.path.clone();
    service.end().await;
    let out = sh(&lab, &root, ASK).await?;
    ensure!(out == "0 " || out.contains("os error"), "without a service, a container gets {out:?}");
    let log = fs::read_to_string(folder_of(handler()).join(&pod.id).join("log/relay.log"))?;
    ensure!(
        log.contains(&format!(
            "a connection to the mounted socket {}: connecting to it as user 0, group 0: Connection refused",
            path.display()
        )),
        "the relay's log: {log}"
    );
    pod.remove().await
}

/// Number of a process's descriptors that are this file.
fn held(process: i32, file: &Path) -> Result<usize> {
    let descriptors = fs::read_dir(format!("/proc/{process}/fd"))?.flatten();
    Ok(descriptors.filter(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == file)).count())
}

pub(crate) async fn sockets_are_served_while_the_daemon_is_away(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("sockets", handler()).await?;
    let service = Service::start(&lab, "lasting")?;
    let id = with_socket(&lab, &pod, "before", &service.path, None).await?;
    lab.kill_daemon(handler()).await?;
    says(&lab, &id, ASK, "0 0:0 question").await?;
    lab.restart_daemon(handler()).await?;
    lab.ready_again(&pod.id).await?;
    says(&lab, &id, ASK, "0 0:0 question").await?;
    let later = with_socket(&lab, &pod, "later", &service.path, None).await?;
    says(&lab, &later, ASK, "0 0:0 question").await?;
    // A container that ends in the middle of a connection, and its successor with the same socket.
    let open = "(sleep 1000 | /client /run/service.sock > /out) > /dev/null 2>&1 & for i in $(seq 100); do [ -s /out ] && exit; sleep 0.1; done; exit 1";
    says(&lab, &later, open, "0 ").await?;
    lab.cri.stop(&later, 0).await?;
    lab.cri.remove(&later).await?;
    let relay = relay_of(&pod.id)?;
    let end = Instant::now() + patient(Duration::from_secs(30));
    while held(relay, &service.path)? != 1 {
        ensure!(Instant::now() < end, "the relay holds {}", held(relay, &service.path)?);
        sleep(Duration::from_millis(100)).await;
    }
    let next = with_socket(&lab, &pod, "next", &service.path, None).await?;
    says(&lab, &next, ASK, "0 0:0 question").await?;
    pod.remove().await?;
    service.end().await;
    Ok(())
}
