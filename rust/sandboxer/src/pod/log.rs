//! The ends of a pod's logs, for error messages.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
    time::Duration,
};

use kuasar_common::{constants::pod_files, text::printable_within};

use super::Pods;
use crate::vmm::bound_logs;

/// Size of the part at a log's end that the daemon reads, in bytes.
const TAIL: i64 = 4096;
/// Most lines that are shown.
const LINES: usize = 5;
/// Most characters of each that are shown.
const LINE: usize = 256;

/// Time between two looks at logs that other processes write: they can grow beyond their limit only by what
/// is written meanwhile.
const BOUNDING: Duration = Duration::from_secs(2);

impl Pods {
    /// Keeps the logs of all pods' processes bounded, for ever: also of those that an earlier daemon started,
    /// or that have not been found again.
    pub async fn keep_logs_bounded(&self) {
        let mut ticks = tokio::time::interval(BOUNDING);
        loop {
            ticks.tick().await;
            for pod in self.all() {
                bound_logs(&pod.dir().join(pod_files::LOG));
            }
        }
    }
}

/// `; <name>: <last lines>` for each of these logs that has any.
pub(super) fn tails(pod_dir: &Path, names: &[&str]) -> String {
    let folder = pod_dir.join(pod_files::LOG);
    names
        .iter()
        .filter_map(|name| {
            let text = tail(&folder.join(name))?;
            Some(format!("; {name}: {text}"))
        })
        .collect()
}

/// The last lines of a file, of which a guest may have written any.
fn tail(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let length = i64::try_from(file.metadata().ok()?.len()).ok()?;
    file.seek(SeekFrom::End(-length.min(TAIL))).ok()?;
    let mut bytes = Vec::new();
    file.take(TAIL.unsigned_abs()).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let last: Vec<String> = lines
        .iter()
        .skip(lines.len().saturating_sub(LINES))
        .map(|line| printable_within(line, LINE))
        .collect();
    (!last.is_empty()).then(|| last.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_is_shown_and_nothing_that_moves_a_terminal() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("log")).unwrap();
        let many: String = (0..5000).map(|n| format!("line {n}\n")).collect();
        std::fs::write(dir.path().join("log/console.log"), many + "\x1b[2Jboom\u{202e}\r\n\n").unwrap();
        std::fs::write(dir.path().join("log/empty.log"), "\n").unwrap();
        assert_eq!(
            tails(dir.path(), &["absent.log", "empty.log", "console.log"]),
            "; console.log: line 4996 | line 4997 | line 4998 | line 4999 | \\u{1b}[2Jboom\\u{202e}"
        );
    }
}
