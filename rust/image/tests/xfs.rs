//! XFS as `mkfs.xfs` makes it for other builders of images: every kind of folder, files in all groups.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use common::{good, host, inspect, tool};
use tempfile::TempDir;

/// Folders by what their names take: the inode, a block, blocks, blocks with a tree of their places.
const FOLDERS: [(&str, usize, &str); 4] = [
    ("short", 3, "1 (local)"),
    ("block", 20, "2 (extents)"),
    ("blocks", 300, "2 (extents)"),
    ("tree", 6000, "3 (btree)"),
];

/// An image with Kata's options, `mkfs.xfs -q -f -b size=4096`, and more; gives the sizes of its largest
/// files, and them.
fn image(dir: &Path, more: &[&str]) -> Vec<(usize, String)> {
    let mut largest = Vec::new();
    let file = |size: usize| {
        let path = dir.join(size.to_string());
        fs::write(&path, vec![7; size]).unwrap();
        path.display().to_string()
    };
    let small = file(5000);
    let mut prototype = String::from("/dev/null\n0 0\nd--755 0 0\n");
    let mut sizes = (1..).map(|n| n * 10_000 + n);
    for (name, count, _) in FOLDERS {
        writeln!(prototype, "{name} d--755 0 0").unwrap();
        for n in 0..count {
            // Of different length, so that places of names are odd, too.
            let short = format!("{n:0>width$}", width = 1 + n % 7);
            let child = if count > 3 { format!("{short}-{}", "n".repeat(100)) } else { short };
            let source = if n == 0 || n == count / 2 || n == count - 1 {
                let size = sizes.next().unwrap();
                largest.push((size, format!("/{name}/{child}")));
                file(size)
            } else {
                small.clone()
            };
            writeln!(prototype, "{child} ---644 0 0 {source}").unwrap();
        }
        prototype.push_str("$\n");
    }
    prototype.push_str("$\n");
    fs::write(dir.join("prototype"), prototype).unwrap();

    let (part, image) = (dir.join("part"), dir.join("image"));
    let _ = fs::remove_file(&image);
    fs::File::create(&part).unwrap().set_len(317 << 20).unwrap();
    let mut mkfs = host("mkfs.xfs", &["-q", "-f", "-b", "size=4096"], &part);
    good(mkfs.args(more).arg("-p").arg(dir.join("prototype")));
    good(tool().args(["header", "--size-mib", "320", "--output"]).arg(&image));
    let words = [format!("if={}", part.display()), format!("of={}", image.display())];
    good(
        host("dd", &["bs=1M", "seek=3", "conv=notrunc,sparse", "status=none"], Path::new(&words[0]))
            .arg(&words[1]),
    );
    largest.sort_by(|a, b| b.cmp(a));
    largest.truncate(10);
    largest
}

#[test]
fn the_largest_files_are_found_in_every_kind_of_folder() {
    let dir = TempDir::new().unwrap();
    for more in [&[][..], &["-i", "size=1024"], &["-i", "nrext64=1", "-m", "bigtime=0"]] {
        let largest = image(dir.path(), more);
        for (name, _, format) in FOLDERS {
            let path = format!("path /{name}");
            let words = ["-r", "-f", "-c", &path, "-c", "print core.format"];
            let found = good(&mut host("xfs_db", &words, &dir.path().join("part")));
            assert_eq!(found, format!("core.format = {format}\n"), "{name}");
        }
        let lines = inspect(&dir.path().join("image"));
        let found: Vec<_> =
            lines.iter().filter(|line| line.starts_with("file ") && line.contains(" bytes /")).collect();
        let wanted: Vec<_> = largest.iter().map(|(size, path)| format!("file {size} bytes {path}")).collect();
        assert_eq!(found, wanted.iter().collect::<Vec<_>>(), "{more:?}");
        good(tool().arg("verify").arg(dir.path().join("image")));
    }
}
