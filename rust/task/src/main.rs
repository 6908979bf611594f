//! PID 1 of the microVM, or a service of it: runs the pod's containers.

#![no_main]

use std::{
    ffi::c_int,
    fs::{self, OpenOptions},
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use anyhow::{Context, Result};
use vmm_task::{boot, config::TaskConfig, logging, pid_namespace, role::Role, serve};

/// The kernel's console for what happens before, or instead of, logging.
const CONSOLE: &str = "/dev/console";

/// Stack of a thread that waits for the kernel, bytes; and how long an idle one stays.
const HELPER_STACK: usize = 256 * 1024;
const HELPER_IDLE: Duration = Duration::from_secs(1);

// Not Rust's own entry: that one ends the process if standard streams are closed and /dev/null is missing,
// which is what PID 1 finds on an image without device nodes and a kernel without console. SAFETY: the C
// library calls the one symbol of this name, with arguments that are not looked at here.
#[unsafe(no_mangle)]
extern "C" fn main() -> c_int {
    // First: it is process 1, too, of its namespace.
    if pid_namespace::is_pause() {
        pid_namespace::pause();
    }
    let role = Role::of_this_process();
    // Its arguments are words of the kernel's command line.
    if role == Role::Init {
        live(role);
    }
    match std::env::args().nth(1).as_deref() {
        None => live(role),
        Some("--version" | "-v") => {
            println!("vmm-task {}", env!("CARGO_PKG_VERSION"));
            0
        }
        Some(other) => {
            eprintln!(
                "vmm-task: {other:?} is not known; it runs in a virtual machine, as PID 1 or as a service without \
                 arguments, and elsewhere only knows --version"
            );
            2
        }
    }
}

/// The agent's life. It never returns: after PID 1's the kernel would panic.
fn live(role: Role) -> ! {
    let ended = catch_unwind(AssertUnwindSafe(|| boot_and_serve(role)));
    let reason = match ended {
        Ok(Ok(())) => "its ports ended".to_owned(),
        Ok(Err(error)) => format!("{error:#}"),
        Err(_) => "it panicked".to_owned(),
    };
    log::error!("the agent gives up: {reason}");
    // In case there is no kernel log yet.
    let line = format!("vmm-task: the agent gives up: {reason}\n");
    match role {
        Role::Init => drop(fs::write(CONSOLE, line)),
        Role::Service => eprint!("{line}"),
    }
    role.end(1)
}

fn boot_and_serve(role: Role) -> Result<()> {
    if role == Role::Init {
        boot::early()?;
    }
    standard_streams();
    let cmdline = fs::read_to_string("/proc/cmdline").context("reading /proc/cmdline")?;
    let (config, problems) = TaskConfig::parse(&cmdline);
    logging::init(config.log_level);
    for problem in problems {
        log::warn!("{problem}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .thread_stack_size(HELPER_STACK)
        .thread_keep_alive(HELPER_IDLE)
        .build()
        .context("starting the runtime")?;
    runtime.block_on(serve::run(&config, role))?;
    Ok(())
}

/// Descriptors 0 to 2 must not become sockets: opens what is missing of them.
fn standard_streams() {
    loop {
        let opened = OpenOptions::new().read(true).write(true).open("/dev/null");
        let Ok(null) = opened else { return };
        let number = std::os::fd::IntoRawFd::into_raw_fd(null);
        if number > 2 {
            // SAFETY: it was opened above and is not used elsewhere.
            drop(unsafe { <fs::File as std::os::fd::FromRawFd>::from_raw_fd(number) });
            return;
        }
    }
}
