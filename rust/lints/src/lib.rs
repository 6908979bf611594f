//! Rules about this repository that no compiler and no linter keeps.
//!
//! A rule is a function from files to findings. Its test, in `tests/rules.rs`, runs it over the repository
//! and fails with every finding, and its unit tests run it over text that breaks the rule. Nothing here is
//! part of a program.
//!
//! - [`circles`] finds files of a crate that import each other. `cargo-modules` answers a like question, but
//!   takes minutes to build on a new machine and counts items and modules, not files; what a reader meets is
//!   files.
//! - [`comments`] reads doc comments: how they open, and how wide they are.
//! - [`promises`] reads `docs/specification.md`: each promise there names the test that keeps it.

pub mod circles;
pub mod comments;
pub mod promises;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Root of the repository.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Rust files at and below a folder, sorted.
///
/// # Errors
/// When a folder cannot be listed.
pub fn rust_files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Returns true if a file holds tests only, by its name.
#[must_use]
pub fn is_test(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str() == "tests")
        || path.file_name().is_some_and(|name| {
            let name = name.to_string_lossy();
            name == "tests.rs" || name.ends_with("_tests.rs") || name == "testing.rs"
        })
}
