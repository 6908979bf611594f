//! Relay between containerd's Task API and one pod's microVM: the program. Its parts are in the library
//! beside it.

use std::{fmt::Display, io::Write, process::ExitCode};

use kuasar_relay::{
    args::{self, Action},
    oneshot, serve,
};

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
