//! `share_probe COMMAND PATH`: uses a file as programs do that share it with others: sockets, locks, watches.
//! Built static by the tests that run it in containers.

use std::{
    ffi::{CString, c_char, c_int, c_long, c_short},
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::net::{UnixListener, UnixStream},
    },
    process::ExitCode,
    thread,
    time::Duration,
};

#[repr(C)]
struct Flock {
    kind: c_short,
    whence: c_short,
    start: c_long,
    len: c_long,
    pid: c_int,
}

unsafe extern "C" {
    fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
    fn inotify_init() -> c_int;
    fn inotify_add_watch(fd: c_int, path: *const c_char, mask: u32) -> c_int;
    fn mkfifo(path: *const c_char, mode: u32) -> c_int;
}

const F_SETLK: c_int = 6;
const F_WRLCK: c_short = 1;
const IN_CREATE: u32 = 0x100;
const IN_MOVED_TO: u32 = 0x80;

type Said = Result<String, String>;

fn open(path: &str) -> Result<File, String> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).map_err(|error| format!("open: {error}"))
}

fn lock(kind: &str, file: &File) -> bool {
    if kind == "flock" {
        return file.try_lock().is_ok();
    }
    let wanted = Flock { kind: F_WRLCK, whence: 0, start: 0, len: 0, pid: 0 };
    // SAFETY: the descriptor is open, and the record lives beyond the call.
    unsafe { fcntl(file.as_raw_fd(), F_SETLK, &raw const wanted) == 0 }
}

fn hold(kind: &str, path: &str) -> Said {
    let file = open(path)?;
    if !lock(kind, &file) {
        return Ok("busy".into());
    }
    println!("held");
    let _ = std::io::stdout().flush();
    thread::sleep(Duration::from_secs(1000));
    Ok(String::new())
}

fn serve(path: &str) -> Said {
    let said = |error: std::io::Error| error.to_string();
    let listener = UnixListener::bind(path).map_err(said)?;
    let (mut stream, _) = listener.accept().map_err(said)?;
    stream.write_all(b"hello").map_err(said)?;
    Ok(String::new())
}

fn ask(path: &str) -> Said {
    let mut answer = String::new();
    let mut stream = UnixStream::connect(path).map_err(|error| format!("connect: {error}"))?;
    stream.read_to_string(&mut answer).map_err(|error| error.to_string())?;
    Ok(answer)
}

fn watch(path: &str) -> Said {
    let name = CString::new(path).map_err(|error| error.to_string())?;
    // SAFETY: no arguments; the descriptor belongs to nobody else.
    let mut events = unsafe { File::from_raw_fd(inotify_init()) };
    // SAFETY: the path is a string that lives beyond the call.
    if unsafe { inotify_add_watch(events.as_raw_fd(), name.as_ptr(), IN_CREATE | IN_MOVED_TO) } < 0 {
        return Err(std::io::Error::last_os_error().to_string());
    }
    println!("watching");
    let _ = std::io::stdout().flush();
    let mut event = [0; 4096];
    let length = events.read(&mut event).map_err(|error| error.to_string())?;
    // A record of 16 bytes, then the name.
    let name = event.get(16..length).unwrap_or_default();
    Ok(String::from_utf8_lossy(name).trim_end_matches('\0').to_owned())
}

fn pipe(path: &str) -> Said {
    let name = CString::new(path).map_err(|error| error.to_string())?;
    // SAFETY: the path is a string that lives beyond the call.
    if unsafe { mkfifo(name.as_ptr(), 0o666) } < 0 {
        return Err(std::io::Error::last_os_error().to_string());
    }
    Ok(String::new())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let said = match *words.as_slice() {
        ["serve", path] => serve(path),
        ["ask", path] => ask(path),
        ["hold", kind, path] => hold(kind, path),
        ["try", kind, path] => {
            open(path).map(|file| if lock(kind, &file) { "got".into() } else { "busy".into() })
        }
        ["watch", path] => watch(path),
        ["pipe", path] => pipe(path),
        _ => Err("serve|ask|watch|pipe PATH, or hold|try flock|posix PATH".into()),
    };
    match said {
        Ok(said) => println!("{said}"),
        Err(why) => {
            println!("{why}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
