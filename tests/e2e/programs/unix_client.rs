//! `unix_client PATH`: sends its standard input to a unix socket, ends that direction, and writes the answer
//! to its standard output. Built static by the tests that run it in containers: busybox knows no unix
//! sockets.
//!
//! `io::copy` splices (splice(2)), so the pipes of standard input and output are locked for as long as the
//! socket has nothing to give or to take: the agent, at their other ends, must not mind.

use std::{
    fs::File,
    io,
    net::Shutdown,
    os::{fd::AsFd, unix::net::UnixStream},
    process::ExitCode,
    thread,
};

fn talk() -> Result<(), String> {
    let path = std::env::args().nth(1).ok_or("PATH is missing")?;
    let said = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    let stream = UnixStream::connect(path).map_err(said("connect"))?;
    let mut from = stream.try_clone().map_err(said("clone"))?;
    let mut to = stream;
    // Itself, not the buffer before it.
    let mut output = File::from(io::stdout().as_fd().try_clone_to_owned().map_err(said("clone"))?);
    let answer = thread::spawn(move || io::copy(&mut from, &mut output));
    io::copy(&mut io::stdin().lock(), &mut to).map_err(said("write"))?;
    to.shutdown(Shutdown::Write).map_err(said("shutdown"))?;
    answer.join().map_err(|_| "panic".to_owned())?.map_err(said("read"))?;
    Ok(())
}

fn main() -> ExitCode {
    match talk() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}
