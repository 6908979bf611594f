//! Errors of the agent's services and how they are told to the host.

use std::io;

use ttrpc::Code;

use crate::runc::RuncError;

/// Why a call was not done.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// The object of the call does not exist.
    #[error("{0} not found")]
    NotFound(String),
    /// The object that the call would make exists already.
    #[error("{0} already exists")]
    AlreadyExists(String),
    /// The call does not fit the state of what it names.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The request itself is wrong.
    #[error("{0}")]
    InvalidArgument(String),
    /// This agent does not do it.
    #[error("{0} is not supported")]
    Unimplemented(&'static str),
    /// It did not end in time.
    #[error("{0} did not end in time")]
    Deadline(String),
    /// The OCI runtime refused; its message is what a user sees.
    #[error(transparent)]
    Runc(#[from] RuncError),
    /// The guest's kernel refused.
    #[error("{doing}: {source}")]
    Io {
        /// The action that failed, and its object.
        doing: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A defect of the agent.
    #[error("internal error: {0}")]
    Internal(String),
}

impl TaskError {
    /// For `map_err`: names what was being done.
    pub fn io<E: Into<io::Error>>(doing: impl Into<String>) -> impl FnOnce(E) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source: source.into() }
    }

    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            Self::InvalidArgument(_) => Code::INVALID_ARGUMENT,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::Deadline(_) | Self::Runc(RuncError::Timeout { .. }) => Code::DEADLINE_EXCEEDED,
            // As containerd's own runc shim answers, so that messages look the same with and without a VM.
            Self::Runc(_) => Code::UNKNOWN,
            Self::Io { .. } | Self::Internal(_) => Code::INTERNAL,
        }
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}
