//! Functions that `tests/fuzz` feeds with hostile input, and cannot reach otherwise. Nobody else is to use
//! them.

use kuasar_common::{
    api::sandbox::SyncClockPacket,
    handshake::{Fatal, Ready, ToHost},
};

use crate::{clock::Sample, pod, vmm};

/// Reads a pod's record; written anew, if it is one.
#[must_use]
pub fn pod_record(text: &[u8], id: &str) -> Option<Vec<u8>> {
    pod::parse_record(text, id)
}

/// All texts that are made of a guest's line, be it understood or not.
#[must_use]
pub fn ready_line(line: &[u8]) -> Vec<String> {
    match vmm::understand(line) {
        Ok(ToHost::Ready(Ready { agent, root, .. })) => vec![agent, root],
        Ok(ToHost::Fatal(Fatal { reason })) => vec![reason],
        Err(error) => vec![error.to_string()],
    }
}

/// Nanoseconds by which the daemon corrects a guest's clock.
#[must_use]
pub fn clock_correction(sent: i64, arrived: i64, answered: i64, received: i64) -> i64 {
    let answer =
        SyncClockPacket { ClientArriveTime: arrived, ServerSendTime: answered, ..Default::default() };
    Sample::new(sent, &answer, received).correction()
}

/// Kernel parameters that an annotation adds, if it is one that asks for something.
#[must_use]
pub fn annotation(name: &str, value: &str) -> Option<String> {
    let (name, value) = (name.to_owned(), value.to_owned());
    Some(pod::Wishes::read([(&name, &value)], &pod::Annotation::ALL).ok()?.kernel_params)
}
