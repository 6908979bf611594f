//! Runs one container of an OCI image in a pod that is a microVM, and shows that it is one: the whole way
//! from CRI over a stock containerd to the guest, in a machine of its own that is gone afterwards.

use std::{
    future::Future,
    io::Write,
    process::{ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use clap::Parser;
use kuasar_e2e::{
    cri::Output,
    image,
    lab::{self, Lab},
    machine::{self, Machine},
    paths::Paths,
};

/// Runs a container in a microVM pod and shows what came of it.
#[derive(Debug, Parser)]
struct Args {
    /// Image to run; anything but the built-in one is pulled from its registry.
    #[arg(long, default_value = image::BUSYBOX)]
    image: String,
    /// Shell command that the container runs.
    #[arg(long, default_value = DEFAULT_COMMAND)]
    cmd: String,
    /// Runtime handler: kuasar-qemu, kuasar-qemu-9p or kuasar-qemu-initrd.
    #[arg(long, default_value = lab::QEMU)]
    handler: String,
    /// Opens a shell beside the running containerd instead, with ctr and the socket of CRI at hand.
    #[arg(long)]
    shell: bool,
}

const DEFAULT_COMMAND: &str = r#". /etc/os-release
echo "hello from $PRETTY_NAME, process $$ in $(hostname)"
echo "kernel $(uname -r), $(nproc) CPU, $(free -m | awk '/^Mem/ {print $2}') MiB, up $(cut -d. -f1 /proc/uptime) s""#;

/// The container waits for this file, so that there is something to exec into even if its command is short.
const SEEN: &str = "/.kuasar-demo-seen";

/// Longest time for the user's command.
const PATIENCE: Duration = Duration::from_secs(600);

fn main() -> ExitCode {
    let args = Args::parse();
    machine::run(|machine| run(args, machine))
}

/// The steps and how long they took.
struct Steps {
    start: Instant,
}

impl Steps {
    async fn step<T>(&self, title: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut out = std::io::stdout();
        write!(out, "  {title:<52}")?;
        out.flush()?;
        let start = Instant::now();
        let done = work.await;
        match &done {
            Ok(_) => writeln!(out, "{:>8.2} s", start.elapsed().as_secs_f64())?,
            Err(_) => writeln!(out, "  failed")?,
        }
        done
    }
}

async fn run(args: Args, machine: Machine) -> Result<ExitCode> {
    let paths = Paths::find()?;
    let steps = Steps { start: Instant::now() };
    let handler = lab::handlers().find(|name| *name == args.handler);
    let handlers: Vec<_> = if args.shell { lab::handlers().collect() } else { handler.into_iter().collect() };
    if handlers.is_empty() && args.handler != lab::RUNC {
        let known: Vec<_> = lab::handlers().collect();
        bail!("--handler {} is none of {}", args.handler, known.join(", "));
    }
    let lab = steps
        .step("start the daemon and a private containerd", Lab::start(machine, paths, &handlers))
        .await?;
    let outcome = show(&args, &lab, &steps).await;
    let wrong = steps.step("stop and remove everything", async { Ok(lab.stop().await) }).await?;
    let code = outcome?;
    if !wrong.is_empty() {
        bail!("ending: {}", wrong.join("; "));
    }
    println!("  {:<52}{:>8.2} s", "in all", steps.start.elapsed().as_secs_f64());
    Ok(code)
}

async fn show(args: &Args, lab: &Lab, steps: &Steps) -> Result<ExitCode> {
    if args.image.starts_with("kuasar.test/") || args.shell {
        steps.step("make an OCI image from busybox and import it", lab.import_images()).await?;
    } else {
        steps.step(&format!("pull {}", args.image), lab.pull(&args.image)).await?;
    }
    if args.shell {
        return shell(lab).await;
    }
    let pod = steps.step("run the pod: network, VM, kernel, agent", lab.pod("demo", &args.handler)).await?;
    // In a shell of its own: the command may say `exit`.
    let script =
        format!("(\n{}\n)\ncode=$?\nwhile [ ! -e {SEEN} ]; do sleep 0.1; done\nexit $code", args.cmd);
    let command = ["/bin/sh", "-c", &script];
    let id =
        steps.step("create and start the container", pod.container("demo", &args.image, &command)).await?;
    let look = format!("uname -r; uname -v; touch {SEEN}");
    let exec = steps.step("exec `uname -r` in it", async { exec(lab, &id, &look).await }).await?;
    let ended = async { lab.cri.ended(&id, PATIENCE).await.map_err(|e| anyhow!("{}", e.message())) };
    let status = steps.step("wait for its end", ended).await?;
    let (stdout, stderr) = pod.output("demo")?;
    steps.step("remove the pod", pod.remove()).await?;

    let host =
        std::fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the host's kernel release")?;
    println!("\n  kernel of the host   {}", host.trim());
    println!("  kernel of the pod    {}", exec.stdout.lines().next().unwrap_or("?"));
    println!("\n  the container wrote:");
    for text in [&stdout, &stderr] {
        for line in String::from_utf8_lossy(text).lines() {
            println!("  | {line}");
        }
    }
    println!("\n  exec `uname -r; uname -v` wrote (exit code {}):", exec.code);
    for line in exec.stdout.lines() {
        println!("  | {line}");
    }
    println!("\n  the container's exit code: {}\n", status.exit_code);
    // The user's command may fail on purpose; the demo has worked all the same.
    Ok(ExitCode::SUCCESS)
}

async fn exec(lab: &Lab, id: &str, script: &str) -> Result<Output> {
    let output = lab.cri.exec(id, &["/bin/sh", "-c", script]).await;
    let output = output.map_err(|e| anyhow!("exec: {}", e.message()))?;
    if output.code != 0 {
        bail!("exec ended with {}: {}", output.code, output.stderr.trim());
    }
    Ok(output)
}

async fn shell(lab: &Lab) -> Result<ExitCode> {
    println!("\n  a shell beside the lab: `ctr images ls`, `ip link`, logs in {}\n", lab.logs().display());
    let mut shell = tokio::process::Command::new("/bin/sh");
    shell.envs(lab::shell_environment(lab)).current_dir(&lab.machine.root);
    shell.stdin(Stdio::inherit()).status().await.context("running a shell")?;
    Ok(ExitCode::SUCCESS)
}
