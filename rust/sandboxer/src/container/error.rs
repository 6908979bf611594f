//! Errors of mounting, unmounting and removing.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Errors of mounting, unmounting and removing.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// A system call failed.
    #[error("{doing} {}: {source}", path.display())]
    Io {
        /// The operation that failed.
        doing: String,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Something we do not mount.
    #[error("{0}")]
    Refused(String),
}

/// Wraps an I/O error with the failed action and the path.
pub(super) fn failed<D: Into<String>>(
    doing: D,
    path: &Path,
) -> impl FnOnce(io::Error) -> MountError + use<D> {
    let (doing, path) = (doing.into(), path.to_owned());
    move |source| MountError::Io { doing, path, source }
}
