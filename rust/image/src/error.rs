//! Errors of this crate.

use std::path::{Path, PathBuf};

/// Result with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Errors of building, reading and checking images.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The failed action, as a verb.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The root file system cannot boot, or cannot be stored.
    #[error("root file system {}: {reason}", root.display())]
    Root {
        /// The folder given.
        root: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A tool this crate runs is missing.
    #[error("{tool} was not found in PATH; it is part of {package} (Debian keeps it in /usr/sbin)")]
    ToolMissing {
        /// Name of the program.
        tool: &'static str,
        /// The package that brings it.
        package: &'static str,
    },
    /// A tool this crate runs failed.
    #[error("{tool} failed: {detail}")]
    Tool {
        /// Name of the program.
        tool: &'static str,
        /// Output of the tool.
        detail: String,
    },
    /// A size that cannot be.
    #[error("image size: {0}")]
    Size(String),
    /// `SOURCE_DATE_EPOCH` makes no sense.
    #[error("SOURCE_DATE_EPOCH is {0:?}; it must be seconds since 1970, at most 4294967295")]
    Epoch(String),
    /// No root hash of a dm-verity tree.
    #[error("root hash {0:?}: it must be 64 hexadecimal digits, as `build --verity` prints them")]
    RootHash(String),
    /// A file is not what it is said to be.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The defect.
        reason: String,
    },
}

impl Error {
    /// Makes a closure for `map_err` that names the action and the file.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}
