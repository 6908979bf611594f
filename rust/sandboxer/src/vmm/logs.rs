//! Logs of a pod: bounded when a guest writes them, quoted when they explain a failure.

use std::{
    fmt::Write as _,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use kuasar_common::text::printable_within;
use tokio::{io::AsyncReadExt, net::UnixStream};

/// Size at which a guest's log is renamed to `<name>.old` and begun anew, in bytes.
const LIMIT: u64 = 1 << 20;
/// Bytes of a guest's console that the daemon copies in a second: output beyond that waits in the guest.
const RATE: u32 = 256 << 10;
/// Bytes that may come at once: a kernel's messages while it starts.
const BURST: u32 = 512 << 10;
/// Logs of the VM's processes.
const PROCESS_LOGS: [&str; 3] = ["vmm.log", "virtiofsd.log", "vsock.log"];
/// Bytes of a log's end that an error quotes.
const QUOTED_BYTES: u64 = 16 * 1024;
const QUOTED_LINES: usize = 8;
/// Longest part of a line that is quoted, in characters.
const QUOTED_LINE: usize = 256;
/// Begins the line in which a kernel says why it ends; registers and a stack follow, which say less.
const PANIC: &str = "Kernel panic - not syncing";

/// Marks such a panic as caused by damage to a root that dm-verity checks.
const DAMAGED: &str = "dm-verity device corrupted";

/// Advice on a kernel that ended because of its root, for the end of an error message; empty if it did not.
#[must_use]
pub(super) fn advice(folder: &Path) -> &'static str {
    match last_lines(&folder.join("console.log")) {
        Ok(lines) if lines.contains(PANIC) && lines.contains(DAMAGED) => {
            "; the guest image is damaged: put the file of hypervisor.image_path back as it was built, `kuasar-image verify \
             --root-hash` says whether it is"
        }
        _ => "",
    }
}

/// `; <name>: "<last lines>"` for each log that says anything; for the end of an error message. Control
/// characters are escaped: guests write some of these logs, and people read them on terminals.
#[must_use]
pub(super) fn quote(folder: &Path, names: &[&str]) -> String {
    let mut text = String::new();
    for name in names {
        let end = last_lines(&folder.join(name)).unwrap_or_default();
        if !end.is_empty() {
            // Writing to a string does not fail.
            let _ = write!(text, "; {name}: {end}");
        }
    }
    text
}

fn last_lines(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(QUOTED_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(QUOTED_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let mut lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    // A panic and what led to it, or else the last lines.
    if let Some(panic) = lines.iter().position(|line| line.contains(PANIC)) {
        lines.truncate(panic.saturating_add(1));
    }
    let from = lines.len().saturating_sub(QUOTED_LINES);
    let lines = lines.get(from..).unwrap_or_default();
    let quoted = |line: &&str| printable_within(line.trim_end(), QUOTED_LINE);
    Ok(lines.iter().map(quoted).collect::<Vec<_>>().join(" | "))
}

/// Empties a log that has grown too large. Its writer appends, and so goes on at the new end.
fn bound(path: &Path, limit: u64) {
    let emptied = || {
        if fs::metadata(path)?.len() > limit {
            OpenOptions::new().write(true).open(path)?.set_len(0)?;
        }
        io::Result::Ok(())
    };
    if let Err(error) = emptied()
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::debug!(path = %path.display(), %error, "bounding a log");
    }
}

/// A file that a guest fills and that never grows beyond [`LIMIT`].
#[derive(Debug)]
struct BoundedLog {
    path: PathBuf,
    file: File,
    size: u64,
    limit: u64,
}

impl BoundedLog {
    fn open(path: &Path, limit: u64) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        let size = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, size, limit })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.size >= self.limit {
            let mut old = self.path.clone().into_os_string();
            old.push(".old");
            fs::rename(&self.path, old)?;
            *self = Self::open(&self.path, self.limit)?;
        }
        self.file.write_all(bytes)?;
        self.size = self.size.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        Ok(())
    }
}

/// Keeps the logs of a VM's processes bounded, in this folder: the host's processes write them, but a guest
/// may know how to make them.
pub(crate) fn bound_all(folder: &Path) {
    for name in PROCESS_LOGS {
        bound(&folder.join(name), LIMIT);
    }
}

/// Pace at which the daemon reads a console: a guest that floods it has to wait, and the daemon does not copy
/// faster.
#[derive(Debug)]
struct Pace {
    /// Time by which everything read so far is paid for.
    paid: Instant,
}

impl Pace {
    /// With a burst to begin with.
    fn new() -> Self {
        let now = Instant::now();
        Self { paid: now.checked_sub(time(BURST)).unwrap_or(now) }
    }

    /// Counts what was read; returns how long to wait with the next read.
    fn read(&mut self, length: usize) -> Duration {
        let now = Instant::now();
        // Of the past, only a burst is saved.
        let earliest = now.checked_sub(time(BURST)).unwrap_or(now);
        let cost = time(u32::try_from(length).unwrap_or(u32::MAX));
        self.paid = self.paid.max(earliest).checked_add(cost).unwrap_or(now);
        self.paid.saturating_duration_since(now)
    }
}

/// Time that so many bytes take at the [`RATE`].
fn time(bytes: u32) -> Duration {
    Duration::from_secs(1).saturating_mul(bytes).checked_div(RATE).unwrap_or_default()
}

/// Copies what a guest prints to `console.log` until the guest ends.
pub(super) async fn copy_console(mut console: UnixStream, folder: PathBuf) {
    let path = folder.join("console.log");
    let mut pace = Pace::new();
    let mut buffer = vec![0; 4096];
    let mut log = match BoundedLog::open(&path, LIMIT) {
        Ok(log) => log,
        Err(error) => return tracing::warn!(path = %path.display(), %error, "opening a guest's console log"),
    };
    loop {
        let length = match console.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(length) => length,
        };
        if let Err(error) = log.write(buffer.get(..length).unwrap_or_default()) {
            // Reading goes on: a guest must not hang because the host's disk is full.
            tracing::debug!(path = %path.display(), %error, "writing a guest's console log");
        }
        let pause = pace.read(length);
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[test]
    fn the_last_lines_are_quoted_and_escaped() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(quote(dir.path(), &["vmm.log"]), "");
        fs::write(dir.path().join("vmm.log"), "").unwrap();
        let lines: String = (0..600).map(|n| format!("line {n}\n\n")).collect();
        fs::write(dir.path().join("console.log"), lines + "\x1b[31mred\r\n").unwrap();
        let text = quote(dir.path(), &["vmm.log", "console.log"]);
        assert!(text.starts_with("; console.log: line 593 | line 594 |"), "{text}");
        assert!(text.ends_with("| line 599 | \\u{1b}[31mred"), "{text}");
    }

    #[test]
    fn a_kernel_panic_is_quoted_with_what_led_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let stack: String = (0..60).map(|n| format!("[    1.0] {n:04} {}\n", "f".repeat(80))).collect();
        let panic =
            "[    0.9] VFS: Cannot open root device\n[    1.0] Kernel panic - not syncing: VFS: no root\n";
        fs::write(dir.path().join("console.log"), format!("booting\n{panic}{stack}")).unwrap();
        let text = quote(dir.path(), &["console.log"]);
        assert!(
            text.ends_with("Cannot open root device | [    1.0] Kernel panic - not syncing: VFS: no root"),
            "{text}"
        );
        fs::write(dir.path().join("console.log"), "x".repeat(5000)).unwrap();
        assert!(quote(dir.path(), &["console.log"]).len() < 300);
    }

    #[test]
    fn a_damaged_root_is_told_from_other_panics() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(advice(dir.path()), "");
        let block = "device-mapper: verity: 253:1: data block 7 is corrupted\n";
        for (panic, damaged) in [(DAMAGED, true), ("VFS: no root", false)] {
            let text = format!("{block}Kernel panic - not syncing: {panic}\nCPU: 0\n");
            fs::write(dir.path().join("console.log"), text).unwrap();
            assert_eq!(advice(dir.path()).contains("hypervisor.image_path"), damaged, "{panic}");
        }
        // A container may print what it likes to the console; only the kernel's panic is its end.
        fs::write(dir.path().join("console.log"), DAMAGED).unwrap();
        assert_eq!(advice(dir.path()), "");
    }

    /// A guest that writes as fast as it can.
    #[tokio::test]
    async fn a_flooded_console_is_copied_at_its_pace() {
        let dir = tempfile::tempdir().unwrap();
        let (near, mut far) = UnixStream::pair().unwrap();
        let copying = tokio::spawn(copy_console(near, dir.path().to_owned()));
        let mut sent = 0_u64;
        let flood = async {
            loop {
                sent += far.write(&[b'x'; 64 << 10]).await.unwrap() as u64;
            }
        };
        tokio::time::timeout(Duration::from_secs(2), flood).await.unwrap_err();
        // What it may in two seconds, and what lies in the socket.
        let most = u64::from(BURST) + 2 * u64::from(RATE) + (1 << 20);
        assert!(sent < most, "{sent} bytes went");
        assert!(sent > u64::from(BURST), "{sent} bytes went");
        // Its end comes, late but whole, as what explains it.
        far.write_all(b"\nKernel panic - not syncing: x\n").await.unwrap();
        drop(far);
        copying.await.unwrap();
        assert!(quote(dir.path(), &["console.log"]).ends_with("Kernel panic - not syncing: x"));
    }

    #[test]
    fn quiet_guests_never_wait() {
        let mut pace = Pace::new();
        assert_eq!((0..8).map(|_| pace.read(4096)).max(), Some(Duration::ZERO));
        let pause = (0..1024).map(|_| pace.read(4096)).max().unwrap();
        // 4 MiB at once is 3.5 MiB too much.
        assert!(pause > Duration::from_secs(13) && pause < Duration::from_secs(17), "{pause:?}");
    }

    #[test]
    fn a_process_log_is_emptied_when_too_large_and_written_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm.log");
        bound(&path, 10);
        let mut writer = OpenOptions::new().append(true).create(true).open(&path).unwrap();
        writer.write_all(&[b'x'; 10]).unwrap();
        bound(&path, 10);
        assert_eq!(fs::metadata(&path).unwrap().len(), 10);
        writer.write_all(b"y").unwrap();
        bound(&path, 10);
        writer.write_all(b"new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
    }

    #[test]
    fn a_log_does_not_grow_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = BoundedLog::open(&path, 1000).unwrap();
        for _ in 0..1000 {
            log.write(&[b'x'; 100]).unwrap();
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), 1000);
        assert_eq!(fs::metadata(dir.path().join("console.log.old")).unwrap().len(), 1000);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        let log = BoundedLog::open(&path, 1000).unwrap();
        assert_eq!(log.size, 1000, "an adopted log counts on");
    }
}
