//! `unix_client PATH`: sends its standard input to a unix socket, ends that direction, and writes the answer to its
//! standard output. Built static by the tests that run it in containers: busybox knows no unix sockets.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    process::ExitCode,
    thread,
};

/// `io::copy` would use splice(2), which holds the lock of a pipe that it writes to for as long as it waits for the socket.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = [0; 8192];
    loop {
        let read = from.read(&mut buffer)?;
        to.write_all(&buffer[..read])?;
        to.flush()?;
        if read == 0 {
            return Ok(());
        }
    }
}

fn talk() -> Result<(), String> {
    let path = std::env::args().nth(1).ok_or("PATH is missing")?;
    let said = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    let stream = UnixStream::connect(path).map_err(said("connect"))?;
    let mut from = stream.try_clone().map_err(said("clone"))?;
    let mut to = stream;
    let answer = thread::spawn(move || copy(&mut from, &mut io::stdout().lock()));
    copy(&mut io::stdin().lock(), &mut to).map_err(said("write"))?;
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
