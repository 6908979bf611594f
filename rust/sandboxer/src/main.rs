//! containerd sandbox controller that runs every pod in a microVM.

use std::{
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use clap::Parser;
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};
use vmm_sandboxer::{
    args::Args,
    config::Config,
    daemon::{self, Collecting},
    pod::{CGROUP_ROOT, Environment},
    trace::ChromeTrace,
    vmm,
};

/// For a mount that a request did not ask for and waits for; less than the relay waits for the daemon at a
/// container's end.
const MOUNT_TIMEOUT: Duration = Duration::from_secs(20);
/// For one pod after a restart; all of them are found again at the same time.
const RECOVER_TIMEOUT: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    // Before anything is made: what others may have of it is set, not inherited.
    daemon::keep_files_private();
    let args = Args::parse();
    if args.version {
        let written = writeln!(std::io::stdout(), "vmm-sandboxer {}", env!("CARGO_PKG_VERSION"));
        return if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nowhere to complain if standard error is gone.
            let _ = writeln!(std::io::stderr(), "vmm-sandboxer: {}", told_once(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, less those that a text above them tells already.
fn told_once(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Reads the configuration, and what of it is not understood by reading.
fn configuration(args: &Args) -> anyhow::Result<(Config, EnvFilter)> {
    let config = Config::load(&args.config)?;
    let level = args.log_level.as_ref().unwrap_or(&config.sandbox.log_level);
    let filter =
        EnvFilter::try_new(level).with_context(|| format!("understanding the log level {level:?}"))?;
    Ok((config, filter))
}

fn run(args: Args) -> anyhow::Result<()> {
    let (config, filter) = configuration(&args)?;
    if args.check {
        return Ok(());
    }
    let log = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_filter(filter);
    let trace = args.trace.as_ref().map(|path| {
        let trace =
            ChromeTrace::create(path).with_context(|| format!("creating the trace {}", path.display()));
        trace.map(|trace| trace.with_filter(ChromeTrace::filter()))
    });
    tracing_subscriber::registry().with(log).with(trace.transpose()?).init();
    let environment = Environment {
        dir: place("--dir", &args.dir)?,
        hypervisor: vmm::new(&config),
        sizes: config.hypervisor.clone(),
        relay: config.sandbox.relay_path.clone(),
        containerd: config.sandbox.containerd_address.clone(),
        start_timeout: Duration::from_secs(config.sandbox.start_timeout_s),
        stop_timeout: Duration::from_secs(config.sandbox.stop_timeout_s),
        mount_timeout: MOUNT_TIMEOUT,
        recover_timeout: RECOVER_TIMEOUT,
        cgroup_root: CGROUP_ROOT.into(),
        ids: config.ids(),
    };
    let collecting = Collecting {
        interval: Duration::from_secs(config.sandbox.collect_interval_s),
        grace: Duration::from_secs(config.sandbox.collect_grace_s),
    };
    daemon::raise_open_files();
    daemon::allocate_from_one_arena();
    let listen = place("--listen", &args.listen)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(4)
        .build()
        .context("starting the runtime")?;
    let served = runtime.block_on(daemon::run(environment, collecting, &listen));
    // Tasks that wait for the end of a VM must not keep the daemon.
    runtime.shutdown_background();
    Ok(served?)
}

/// A path of the command line as it reaches other processes, whose working folder is another, in texts.
fn place(option: &str, path: &Path) -> anyhow::Result<PathBuf> {
    let path = std::path::absolute(path).with_context(|| format!("resolving {option}"))?;
    if path.to_str().is_none() {
        anyhow::bail!(
            "{option} {path:?} is not UTF-8, and would be another path in addresses and arguments; rename it"
        );
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_would_be_another_one_in_a_text_is_refused() {
        use std::os::unix::ffi::OsStrExt;
        assert_eq!(place("--dir", Path::new("/a/b")).unwrap(), Path::new("/a/b"));
        let odd = std::ffi::OsStr::from_bytes(b"/a/\xff");
        let error = place("--dir", Path::new(odd)).unwrap_err().to_string();
        assert_eq!(
            error,
            "--dir \"/a/\\xFF\" is not UTF-8, and would be another path in addresses and arguments; rename it"
        );
    }

    #[test]
    fn causes_are_told_once() {
        let inner = std::io::Error::other("no such file");
        let error = anyhow::Error::new(inner).context("reading a: no such file").context("starting");
        assert_eq!(told_once(&error), "starting: reading a: no such file");
    }
}
