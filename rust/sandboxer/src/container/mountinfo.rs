//! What is mounted, from `/proc/self/mountinfo` (proc_pid_mountinfo(5)).

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

/// Mount points at or below a path, deepest and latest first: the order in which to unmount them.
///
/// # Errors
/// When mountinfo cannot be read.
pub fn below(path: &Path) -> io::Result<Vec<PathBuf>> {
    Ok(below_in(&fs::read("/proc/self/mountinfo")?, path))
}

/// Whether something is mounted below a path, itself aside.
///
/// # Errors
/// When mountinfo cannot be read.
pub fn has_mounts_below(path: &Path) -> io::Result<bool> {
    Ok(below(path)?.iter().any(|point| point != path))
}

/// Whether a path is itself a mount point.
///
/// # Errors
/// When mountinfo cannot be read.
pub fn is_mounted(path: &Path) -> io::Result<bool> {
    Ok(below(path)?.iter().any(|point| point == path))
}

fn below_in(mountinfo: &[u8], path: &Path) -> Vec<PathBuf> {
    let mut points: Vec<PathBuf> = mountinfo
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(unescape)
        .filter(|point| point.starts_with(path))
        .collect();
    // Lines are in the order of mounting; a stable sort keeps what is stacked on one point in that order.
    points.reverse();
    points.sort_by_key(|point| {
        std::cmp::Reverse(point.as_os_str().as_bytes().iter().filter(|b| **b == b'/').count())
    });
    points
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
30 22 0:30 / /run/k/p/shared rw shared:2 - tmpfs tmpfs rw
31 30 0:31 / /run/k/p/shared/c/rootfs rw - overlay overlay rw
32 30 0:32 /x /run/k/p/shared/c/mounts/with\040blank rw - ext4 /dev/vda rw
33 31 0:33 / /run/k/p/shared/c/rootfs rw - overlay overlay rw
34 22 0:34 / /run/k/p2 rw - tmpfs tmpfs rw
";

    #[test]
    fn the_deepest_come_first_and_neighbours_do_not_count() {
        let found = below_in(INFO, Path::new("/run/k/p"));
        let found: Vec<&str> = found.iter().map(|p| p.to_str().unwrap()).collect();
        assert_eq!(
            found,
            [
                "/run/k/p/shared/c/mounts/with blank",
                "/run/k/p/shared/c/rootfs",
                "/run/k/p/shared/c/rootfs",
                "/run/k/p/shared"
            ]
        );
    }

    #[test]
    fn torn_lines_are_skipped() {
        assert!(below_in(b"\n1 2\nx\n", Path::new("/")).is_empty());
        assert_eq!(unescape(br"/a\0b\"), Path::new(r"/a\0b\"));
    }
}
