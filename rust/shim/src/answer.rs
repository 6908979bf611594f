//! Answers to containerd: payloads, and errors with the code it acts on.

use protobuf::Message;
use ttrpc::{
    Code, get_status,
    proto::{Response, Status},
};

use crate::{guest::CallError, host::HostError, stdio::StdioError};

/// An encoded message, or the error that containerd gets.
pub(crate) type Answer = Result<Vec<u8>, Status>;

/// Understands a request.
pub(crate) fn decode<M: Message>(payload: &[u8]) -> Result<M, Status> {
    M::parse_from_bytes(payload)
        .map_err(|e| get_status(Code::INVALID_ARGUMENT, format!("decoding a request: {e}")))
}

/// Encodes a message.
pub(crate) fn encode(message: &impl Message) -> Answer {
    message.write_to_bytes().map_err(|e| get_status(Code::INTERNAL, format!("encoding a message: {e}")))
}

/// What containerd takes for "it is gone".
pub(crate) fn not_found(what: &str) -> Status {
    get_status(Code::NOT_FOUND, format!("{what}: not found"))
}

/// An answer as ttrpc sends it.
pub(crate) fn response(answer: Answer) -> Response {
    let mut response = Response::new();
    match answer {
        Ok(payload) => {
            response.payload = payload;
            response.set_status(get_status(Code::OK, ""));
        }
        Err(status) => response.set_status(status),
    }
    response
}

/// The error of a call to the guest, `doing` what. The guest's own errors are passed on as they are.
pub(crate) fn guest_error(doing: &str, error: CallError) -> Status {
    let code = match error {
        CallError::Status(status) => return status,
        CallError::Dead | CallError::Broken(_) => Code::UNAVAILABLE,
        CallError::Timeout(_) => Code::DEADLINE_EXCEEDED,
    };
    get_status(code, format!("{doing}: {error}"))
}

/// The error of a call to the daemon.
pub(crate) fn host_error(error: HostError) -> Status {
    match error {
        HostError::Refused(status) => status,
        HostError::Absent { .. } => get_status(Code::UNAVAILABLE, error),
    }
}

/// The error of opening stdio for `what`.
pub(crate) fn stdio_error(what: &str, error: &StdioError) -> Status {
    let code = match error {
        StdioError::Open { .. } | StdioError::Scheme { .. } => Code::INVALID_ARGUMENT,
        StdioError::Dial { .. } | StdioError::Hello { .. } | StdioError::Refused { .. } => Code::UNAVAILABLE,
    };
    get_status(code, format!("{what}: {error}"))
}
