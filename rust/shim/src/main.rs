//! Relay between containerd's Task API and one pod's microVM.
//!
//! One small process per pod, which outlives the daemon: containerd connects to a Task endpoint once per container and
//! never again, so whoever serves it must live as long as the pod. It passes calls on to the agent in the guest, copies
//! stdio, and asks the daemon for what a container needs of the host. It holds no policy and reads no OCI configuration.

mod answer;
mod args;
mod caller;
mod create;
mod delete;
mod events;
mod fifo;
mod forward;
mod guest;
mod host;
mod host_socket;
mod life;
mod log;
mod oneshot;
mod pump;
mod registry;
mod serve;
mod stdio;
mod streams;
mod task;
mod vm;

use std::{fmt::Display, io::Write, process::ExitCode};

use args::Action;

fn main() -> ExitCode {
    match args::parse(std::env::args().skip(1)) {
        Ok(Action::Serve(args)) => match serve::serve(args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => fail(e),
        },
        Ok(Action::Delete) => oneshot::delete().map_or_else(fail, |bytes| print(&bytes)),
        Ok(Action::Info) => oneshot::info().map_or_else(fail, |bytes| print(&bytes)),
        Ok(Action::Start { namespace, id }) => fail(oneshot::refusal(&namespace, &id)),
        Ok(Action::Version) => print(format!("{}\n", oneshot::VERSION).as_bytes()),
        Ok(Action::Help) => print(oneshot::USAGE.as_bytes()),
        Err(e) => fail(e),
    }
}

fn print(bytes: &[u8]) -> ExitCode {
    let mut out = std::io::stdout();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(format!("writing the answer: {e}")),
    }
}

fn fail(why: impl Display) -> ExitCode {
    eprintln!("containerd-shim-kuasar-vmm-v1: {why}");
    ExitCode::FAILURE
}
