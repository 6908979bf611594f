//! The present mounts, from mountinfo (proc_pid_mountinfo(5)).

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its number, and that of the mount it is in.
    pub(crate) id: u64,
    pub(crate) parent: u64,
    /// The file system's device, `major:minor`.
    pub(crate) device: String,
    /// The folder of its file system that it shows.
    pub(crate) root: PathBuf,
    /// Its mount point.
    pub(crate) point: PathBuf,
    /// The group of mounts that pass on to one another what is mounted in one of them.
    pub(crate) peers: Option<u64>,
    /// The group that it receives from.
    pub(crate) master: Option<u64>,
}

/// Reads what is mounted in this process's namespace, in the order of mounting.
///
/// # Errors
/// When mountinfo cannot be read.
pub(crate) fn read() -> io::Result<Vec<Entry>> {
    Ok(parse(&fs::read("/proc/self/mountinfo")?))
}

/// Returns true if something is mounted below a path, the path itself aside.
///
/// # Errors
/// When mountinfo cannot be read.
pub fn has_mounts_below(path: &Path) -> io::Result<bool> {
    Ok(read()?.iter().any(|entry| entry.point != path && entry.point.starts_with(path)))
}

/// Reads mountinfo. Lines that cannot be read are skipped.
pub(crate) fn parse(mountinfo: &[u8]) -> Vec<Entry> {
    mountinfo.split(|byte| *byte == b'\n').filter_map(entry).collect()
}

fn entry(line: &[u8]) -> Option<Entry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut next = || fields.next();
    let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse().ok();
    let (id, parent) = (number(next()?)?, number(next()?)?);
    let device = String::from_utf8_lossy(next()?).into_owned();
    let (root, point) = (unescape(next()?), unescape(next()?));
    let _options = next()?;
    let (mut peers, mut master) = (None, None);
    for field in fields.take_while(|field| *field != b"-") {
        if let Some(group) = field.strip_prefix(b"shared:") {
            peers = number(group);
        } else if let Some(group) = field.strip_prefix(b"master:") {
            master = number(group);
        }
    }
    Some(Entry { id, parent, device, root, point, peers, master })
}

/// Blanks, tabs, newlines and backslashes are three octal digits in mountinfo.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|d| *first == b'\\' && d.iter().all(|b| (b'0'..=b'7').contains(b)));
        match digits {
            Some(digits) => {
                bytes.push(digits.iter().fold(0u8, |n, d| n.wrapping_mul(8).wrapping_add(d - b'0')));
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &[u8] = br"22 1 0:20 / / rw,relatime shared:1 - ext4 /dev/vda rw
32 30 0:32 /x /run/k/p/with\040blank rw shared:7 master:2 propagate_from:1 - ext4 /dev/vda rw
34 22 0:34 / /run/k/p2 rw - tmpfs tmpfs rw
";

    #[test]
    fn fields_are_found() {
        let all = parse(INFO);
        assert_eq!(
            all.get(1),
            Some(&Entry {
                id: 32,
                parent: 30,
                device: "0:32".into(),
                root: "/x".into(),
                point: "/run/k/p/with blank".into(),
                peers: Some(7),
                master: Some(2),
            })
        );
        let groups: Vec<_> = all.iter().map(|entry| (entry.peers, entry.master)).collect();
        assert_eq!(groups, [(Some(1), None), (Some(7), Some(2)), (None, None)]);
    }

    #[test]
    fn torn_lines_are_skipped() {
        assert!(parse(b"\n1 2\nx\n3 4 0:1 / \n").is_empty());
        assert_eq!(unescape(br"/a\0b\"), Path::new(r"/a\0b\"));
    }
}
