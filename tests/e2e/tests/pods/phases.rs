//! A container in every phase of its life while containerd or the daemon is away.

use std::{process::Stdio, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{
    cri::ContainerState,
    image::BUSYBOX,
    lab::{self, Lab, Pod, QEMU_STREAM, run},
    suite::{handler, patient},
};
use tokio::{
    io::AsyncWriteExt,
    time::{sleep, timeout},
};

use super::{IDLE, restart::SOON, restart::UNTIL_TOLD};

/// Waits for what `go` announces; then goes on by itself, whoever is away.
const WHEN_IT_GOES: &str = "echo begin; while [ ! -e /go ]; do sleep 1; done; sleep 4; echo end; exit 9";
/// A container for each phase of a container's life.
struct Phases<'a> {
    lab: &'a Lab,
    pod: Pod<'a>,
    created: String,
    running: String,
    paused: Option<String>,
    dying: String,
    exited: String,
}

impl<'a> Phases<'a> {
    /// One stands still, too, if `pausing`: after its own restart, containerd's CRI knows nothing of a paused
    /// container of any runtime.
    async fn new(lab: &'a Lab, handler: &str, pausing: bool) -> Result<Self> {
        let pod = lab.pod("phases", handler).await?;
        let shell = |script| ["/bin/sh", "-c", script];
        let created = pod.create(lab::container("created", BUSYBOX, &shell("echo late; exit 4"))).await?;
        let running = pod.container("running", BUSYBOX, &shell(UNTIL_TOLD)).await?;
        let dying = pod.container("dying", BUSYBOX, &shell(WHEN_IT_GOES)).await?;
        let exited = pod.container("exited", BUSYBOX, &shell("echo done; exit 3")).await?;
        ensure!(lab.cri.ended(&exited, SOON).await?.exit_code == 3, "the exit code is wrong from the start");
        let mut paused = None;
        if pausing {
            let id = pod.container("paused", BUSYBOX, IDLE).await?;
            run(lab.ctr().args(["tasks", "pause", &id])).await?;
            paused = Some(id);
        }
        Ok(Self { lab, pod, created, running, paused, dying, exited })
    }

    /// From here on, `dying` ends by itself within seconds.
    async fn go(&self) -> Result<()> {
        let out = self.lab.cri.exec(&self.dying, &["/bin/touch", "/go"]).await?;
        ensure!(out.code == 0, "touching a file gave {out:?}");
        Ok(())
    }

    /// Everything is as it was, or as it became meanwhile.
    async fn check(self) -> Result<()> {
        let cri = &self.lab.cri;
        if let Some(id) = &self.paused {
            self.resume(id).await?;
        }
        let state = cri.status(&self.created).await?.state();
        ensure!(state == ContainerState::ContainerCreated, "the created container is {state:?}");
        cri.start(&self.created).await.context("starting what was created before")?;
        self.ended("created", &self.created, 4, "late\n").await?;

        let state = cri.status(&self.running).await?.state();
        ensure!(state == ContainerState::ContainerRunning, "the running container is {state:?}");
        let out = cri.exec(&self.running, &["/bin/sh", "-c", "echo in it; touch /go; exit 5"]).await?;
        ensure!(out.code == 5 && out.stdout == "in it\n", "exec in it gave {out:?}");
        self.ended("running", &self.running, 9, "begin\nend\n").await?;
        self.ended("dying", &self.dying, 9, "begin\nend\n").await?;
        self.ended("exited", &self.exited, 3, "done\n").await?;
        self.pod.remove().await
    }

    async fn resume(&self, id: &str) -> Result<()> {
        let tasks = run(self.lab.ctr().args(["tasks", "ls"])).await?;
        let tasks = String::from_utf8_lossy(&tasks);
        let paused = tasks.lines().find(|line| line.starts_with(id)).unwrap_or("nothing");
        ensure!(paused.contains("PAUSED"), "the paused container is {paused}");
        run(self.lab.ctr().args(["tasks", "resume", id])).await.context("resuming")?;
        let out = self.lab.cri.exec(id, &["echo", "awake"]).await?;
        ensure!(out.stdout == "awake\n", "a resumed container gave {out:?}");
        Ok(())
    }

    async fn ended(&self, name: &str, id: &str, code: i32, log: &str) -> Result<()> {
        let status = self.lab.cri.ended(id, SOON).await.with_context(|| format!("waiting for {name}"))?;
        ensure!(status.exit_code == code, "{name} ended with {} instead of {code}", status.exit_code);
        let stdout = self.pod.output(name)?.0;
        let stdout = String::from_utf8_lossy(&stdout);
        ensure!(stdout == log, "{name} logged {stdout:?} instead of {log:?}");
        Ok(())
    }
}

pub(crate) async fn containerd_dies_in_every_phase(lab: Arc<Lab>) -> Result<()> {
    containerd_dies(&lab, handler()).await
}

pub(crate) async fn containerd_dies_in_every_phase_over_streams(lab: Arc<Lab>) -> Result<()> {
    containerd_dies(&lab, QEMU_STREAM).await
}

async fn containerd_dies(lab: &Lab, handler: &str) -> Result<()> {
    let phases = Phases::new(lab, handler, false).await?;
    // One that is running in the middle of it all. containerd will not know of it any more, and is not held
    // up by it.
    let mut exec = lab.ctr();
    exec.args(["tasks", "exec", "--exec-id", "amid", &phases.running, "sleep", "1000"]);
    let mut exec = exec.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    phases.go().await?;
    lab.kill_containerd().await?;
    sleep(Duration::from_secs(8)).await;
    lab.restart_containerd().await?;
    exec.kill().await?;
    phases.check().await
}

pub(crate) async fn the_daemon_dies_in_every_phase(lab: Arc<Lab>) -> Result<()> {
    let phases = Phases::new(&lab, handler(), true).await?;
    let mut exec = lab.ctr();
    exec.args(["tasks", "exec", "--exec-id", "amid", &phases.running]);
    exec.args(["/bin/sh", "-c", "read line; echo $line; exit 6"]);
    let mut exec = exec.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    phases.go().await?;
    lab.kill_daemon(handler()).await?;
    sleep(Duration::from_secs(6)).await;
    lab.restart_daemon(handler()).await?;
    let mut stdin = exec.stdin.take().context("no stdin")?;
    stdin.write_all(b"still there\n").await?;
    let out = timeout(patient(SOON), exec.wait_with_output())
        .await
        .context("the exec from before never ended")??;
    ensure!(out.status.code() == Some(6), "the exec from before ended with {}", out.status);
    ensure!(out.stdout == b"still there\n", "it said {:?}", String::from_utf8_lossy(&out.stdout));
    phases.check().await
}
