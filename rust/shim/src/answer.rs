//! Answers to containerd: payloads, and errors with the code it acts on.

use kuasar_common::constants::{GUEST_PID_BASE, GUEST_PID_LIMIT};
use protobuf::Message;
use ttrpc::{
    Code, get_status,
    proto::{Response, Status},
};

use crate::{guest::CallError, host::HostError, stdio::StdioError};

/// Most characters of a guest's text in an error.
pub(crate) const MAX_TEXT: usize = 512;

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

/// Status that containerd takes for "it is gone".
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

/// A process of the guest's as containerd is told of it; nothing if the guest cannot have it.
pub(crate) fn host_pid(pid: u32) -> Option<u32> {
    (1..GUEST_PID_LIMIT).contains(&pid).then(|| pid.saturating_add(GUEST_PID_BASE))
}

/// A guest's text for people: short, and of characters that show. Others could forge lines of a log, or hide
/// some.
#[must_use]
pub fn quote(text: &str) -> String {
    let mut shown: String = text.chars().map(|c| if shows(c) { c } else { ' ' }).take(MAX_TEXT).collect();
    if text.chars().nth(MAX_TEXT).is_some() {
        shown.push('…');
    }
    shown
}

/// Neither a control character nor one that changes how others are shown: marks of direction, joiners, tags,
/// line ends.
pub(crate) fn shows(c: char) -> bool {
    !c.is_control()
        && !matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff0}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

/// Codes that a guest may answer with. All else is unknown to containerd as well.
const CODES: [Code; 12] = [
    Code::UNKNOWN,
    Code::INVALID_ARGUMENT,
    Code::DEADLINE_EXCEEDED,
    Code::NOT_FOUND,
    Code::ALREADY_EXISTS,
    Code::PERMISSION_DENIED,
    Code::RESOURCE_EXHAUSTED,
    Code::FAILED_PRECONDITION,
    Code::ABORTED,
    Code::UNIMPLEMENTED,
    Code::INTERNAL,
    Code::UNAVAILABLE,
];

/// An error of the guest's as everybody here sees it, made anew.
#[must_use]
pub fn guest_status(status: &Status) -> Status {
    let code = CODES.into_iter().find(|code| status.code.enum_value() == Ok(*code)).unwrap_or(Code::UNKNOWN);
    get_status(code, quote(status.message()))
}

/// The error of a call to the guest, `doing` what.
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
