//! Input and output of a container's processes.

use std::{os::fd::OwnedFd, process::Stdio, sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow, ensure};
use kuasar_e2e::{
    image::BUSYBOX,
    lab::{Lab, QEMU_STREAM},
    suite::{handler, patient},
};
use nix::pty::{Winsize, openpty};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::Command,
    time::timeout,
};

use super::IDLE;

const SOON: Duration = Duration::from_secs(30);

/// 10 MiB in lines of 64 bytes, each with its own number: a lost, doubled or moved line shows.
const LINES: usize = (10 << 20) / 64;

/// `ctr tasks exec`: the same Exec, CloseIO and fifos of containerd's Task service that CRI uses for `kubectl
/// exec`.
fn ctr_exec(lab: &Lab, container: &str, name: &str, terminal: bool, command: &[&str]) -> Command {
    let mut ctr = lab.ctr();
    ctr.args(["tasks", "exec", "--exec-id", name]);
    if terminal {
        ctr.arg("--tty");
    }
    ctr.arg(container).args(command);
    ctr
}

pub(crate) async fn exec_reads_stdin_to_its_end(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("stdin", handler()).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    for (name, size) in [("short", 5), ("long", 300_000)] {
        let sent: Vec<u8> = (0..size).map(|n: u32| b'a' + u8::try_from(n % 26).unwrap_or(0)).collect();
        let mut child = ctr_exec(&lab, &id, name, false, &["cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut stdin = child.stdin.take().context("no stdin")?;
        let mut stdout = child.stdout.take().context("no stdout")?;
        let mut back = vec![0; sent.len()];
        // All of it comes back before the end is sent: `ctr` forgets an end that it reads before its Exec is
        // answered.
        let echo = async { tokio::try_join!(stdin.write_all(&sent), stdout.read_exact(&mut back)) };
        timeout(patient(SOON), echo).await.map_err(|_| anyhow!("{name}: cat does not echo"))??;
        ensure!(back == sent, "{name}: what came back is something else");
        drop(stdin);
        // `cat` ends only when its standard input does.
        let out = timeout(patient(SOON), child.wait_with_output()).await;
        let out = out.map_err(|_| anyhow!("{name}: cat never saw the end"))??;
        ensure!(out.status.success(), "{name}: {}: {}", out.status, String::from_utf8_lossy(&out.stderr));
        let mut rest = Vec::new();
        stdout.read_to_end(&mut rest).await?;
        ensure!(rest.is_empty(), "{name}: {} more bytes came than were sent", rest.len());
    }
    pod.remove().await
}

pub(crate) async fn exec_with_a_terminal(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("tty", handler()).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    let size = Winsize { ws_row: 33, ws_col: 77, ws_xpixel: 0, ws_ypixel: 0 };
    let terminal = openpty(Some(&size), None).context("opening a terminal")?;
    let end = || -> Result<Stdio> { Ok(terminal.slave.try_clone()?.into()) };
    let script = "tty; sleep 1; stty size; exit 5";
    let mut command = ctr_exec(&lab, &id, "tty", true, &["/bin/sh", "-c", script]);
    let mut child = command.stdin(end()?).stdout(end()?).stderr(end()?).spawn()?;
    drop(command);
    let reader = tokio::task::spawn_blocking({
        let master = terminal.master.try_clone()?;
        move || read_terminal(master)
    });
    let status =
        timeout(patient(SOON), child.wait()).await.map_err(|_| anyhow!("the exec did not end"))??;
    drop(terminal.slave);
    let text = timeout(patient(SOON), reader).await.map_err(|_| anyhow!("the terminal did not end"))??;
    ensure!(text.contains("/dev/pts/"), "it had no terminal: {text:?}");
    ensure!(text.contains("33 77"), "its size did not arrive: {text:?}");
    ensure!(text.contains("\r\n"), "it was not a terminal's output: {text:?}");
    ensure!(status.code() == Some(5), "it ended with {status}");
    pod.remove().await
}

/// Everything until the last holder of the other end has gone, which the kernel tells as an error.
fn read_terminal(master: OwnedFd) -> String {
    use std::io::Read;
    let (mut file, mut all, mut buffer) = (std::fs::File::from(master), Vec::new(), [0; 4096]);
    while let Ok(count @ 1..) = file.read(&mut buffer) {
        all.extend_from_slice(buffer.get(..count).unwrap_or_default());
    }
    String::from_utf8_lossy(&all).into_owned()
}

pub(crate) async fn two_streams_stay_apart(lab: Arc<Lab>) -> Result<()> {
    apart(&lab, handler()).await
}

pub(crate) async fn two_streams_stay_apart_over_streams(lab: Arc<Lab>) -> Result<()> {
    apart(&lab, QEMU_STREAM).await
}

async fn apart(lab: &Lab, handler: &str) -> Result<()> {
    let pod = lab.pod("streams", handler).await?;
    let id =
        pod.container("both", BUSYBOX, &["/bin/sh", "-c", "echo out; echo err >&2; echo -n open"]).await?;
    ensure!(lab.cri.ended(&id, SOON).await?.exit_code == 0, "it failed");
    let (stdout, stderr) = pod.output("both")?;
    // A last line without an end is part of the output all the same.
    ensure!(
        stdout == b"out\nopen" || stdout == b"out\nopen\n",
        "stdout is {:?}",
        String::from_utf8_lossy(&stdout)
    );
    ensure!(stderr == b"err\n", "stderr is {:?}", String::from_utf8_lossy(&stderr));
    let idle = pod.container("idle", BUSYBOX, IDLE).await?;
    let out = lab.cri.exec(&idle, &["/bin/sh", "-c", "echo out; echo err >&2; exit 3"]).await?;
    ensure!((out.code, &*out.stdout, &*out.stderr) == (3, "out\n", "err\n"), "exec gave {out:?}");
    pod.remove().await
}

pub(crate) async fn ten_mebibytes_of_log_are_complete(lab: Arc<Lab>) -> Result<()> {
    ten_mebibytes(&lab, handler()).await
}

pub(crate) async fn ten_mebibytes_of_log_over_streams(lab: Arc<Lab>) -> Result<()> {
    ten_mebibytes(&lab, QEMU_STREAM).await
}

/// Around the 32 KiB that containerd counts of a message, the 64 KiB of its windows, and several of them.
pub(crate) async fn execs_of_many_sizes_over_streams(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("sizes", QEMU_STREAM).await?;
    let id = pod.container("idle", BUSYBOX, IDLE).await?;
    for size in [0, 1, 32_767, 32_769, 65_536, 131_073, 1_000_000] {
        let script = format!("head -c {size} /dev/zero | tr '\\0' x; echo $? >&2; exit 7");
        let out = lab.cri.exec(&id, &["/bin/sh", "-c", &script]).await?;
        ensure!(out.code == 7, "{size} bytes: it ended with {}", out.code);
        ensure!(out.stdout.len() == size, "{size} bytes: {} came", out.stdout.len());
        ensure!(out.stderr == "0\n", "{size} bytes: it said {:?}", out.stderr);
    }
    pod.remove().await
}

async fn ten_mebibytes(lab: &Lab, handler: &str) -> Result<()> {
    let pod = lab.pod("log", handler).await?;
    let script = format!("BEGIN {{ for (i = 0; i < {LINES}; i++) printf \"%063d\\n\", i }}");
    let id = pod.container("writer", BUSYBOX, &["awk", &script]).await?;
    let status = lab.cri.ended(&id, Duration::from_secs(120)).await?;
    ensure!(status.exit_code == 0, "the writer ended with {}", status.exit_code);
    // The exit may be known before the last line is in the file, but not by much.
    let stdout = timeout(patient(SOON), async {
        loop {
            match pod.output("writer") {
                Ok((stdout, _)) if stdout.len() >= LINES * 64 => return stdout,
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    })
    .await;
    let stdout = match stdout {
        Ok(stdout) => stdout,
        Err(_) => pod.output("writer")?.0,
    };
    ensure!(stdout.len() == LINES * 64, "{} of {} bytes arrived", stdout.len(), LINES * 64);
    for (number, line) in stdout.chunks(64).enumerate() {
        ensure!(
            line == format!("{number:063}\n").as_bytes(),
            "line {number} is {:?}",
            String::from_utf8_lossy(line)
        );
    }
    // The same amount through one exec, which CRI returns in a single answer.
    let mut child =
        ctr_exec(lab, &pod.container("idle", BUSYBOX, IDLE).await?, "big", false, &["awk", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
    let mut stdout = Vec::new();
    child.stdout.take().context("no stdout")?.read_to_end(&mut stdout).await?;
    ensure!(child.wait().await?.success(), "the exec failed");
    ensure!(stdout.len() == LINES * 64, "{} of {} bytes came out of the exec", stdout.len(), LINES * 64);
    pod.remove().await
}
