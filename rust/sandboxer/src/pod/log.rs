//! The ends of a pod's logs, for error messages.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
};

use kuasar_common::constants::pod_files;

/// How much of a log's end is looked at, in bytes.
const TAIL: i64 = 4096;
/// How many lines are shown.
const LINES: usize = 5;

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

/// The last lines of a file; control characters, which a guest may have written, are replaced.
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
        .map(|line| line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect())
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
        std::fs::write(dir.path().join("log/console.log"), many + "\x1b[2Jboom\r\n\n").unwrap();
        std::fs::write(dir.path().join("log/empty.log"), "\n").unwrap();
        assert_eq!(
            tails(dir.path(), &["absent.log", "empty.log", "console.log"]),
            "; console.log: line 4996 | line 4997 | line 4998 | line 4999 |  [2Jboom"
        );
    }
}
