//! A container's processes, as the guest tells of them and as containerd gets them.

use containerd_shim_protos::{
    api::{PidsResponse, ProcessInfo},
    shim::oci::ProcessDetails,
};
use protobuf::{Message, MessageField, well_known_types::any::Any};

use crate::answer::host_pid;

/// Longest answer with processes, and how many are passed on.
const MAX_ANSWER: usize = 128 * 1024;
const MAX_PROCESSES: usize = 4096;
/// Type of what is said of a process that Exec added.
const DETAILS: &str = "containerd.runc.v1.ProcessDetails";

/// The guest's answer to Pids made anew; nothing if it makes no sense, or names none. `known` knows the
/// container's execs.
#[must_use]
pub fn pids(payload: &[u8], known: impl Fn(&str) -> bool) -> Option<Vec<u8>> {
    if payload.len() > MAX_ANSWER {
        return None;
    }
    let answered = PidsResponse::parse_from_bytes(payload).ok()?;
    let process = |process: &ProcessInfo| {
        let pid = host_pid(process.pid)?;
        let info = process.info.as_ref().filter(|info| info.type_url == DETAILS);
        let details = info.and_then(|info| ProcessDetails::parse_from_bytes(&info.value).ok());
        let exec = details.map(|details| details.exec_id).filter(|exec| !exec.is_empty() && known(exec));
        Some(ProcessInfo { pid, info: details_of(exec).into(), ..Default::default() })
    };
    let processes: Vec<_> = answered.processes.iter().filter_map(process).take(MAX_PROCESSES).collect();
    if processes.is_empty() {
        return None;
    }
    PidsResponse { processes, ..Default::default() }.write_to_bytes().ok()
}

fn details_of(exec_id: Option<String>) -> Option<Any> {
    let value = ProcessDetails { exec_id: exec_id?, ..Default::default() }.write_to_bytes().ok()?;
    Some(Any { type_url: DETAILS.to_owned(), value, ..Default::default() })
}

/// The answer of a container of which only the first process is known.
pub(crate) fn one(pid: u32) -> PidsResponse {
    let first = ProcessInfo { pid, info: MessageField::none(), ..Default::default() };
    PidsResponse { processes: vec![first], ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, type_url: &str, exec_id: &str) -> ProcessInfo {
        let value =
            ProcessDetails { exec_id: exec_id.into(), ..Default::default() }.write_to_bytes().unwrap();
        let info = MessageField::some(Any { type_url: type_url.into(), value, ..Default::default() });
        ProcessInfo { pid, info, ..Default::default() }
    }

    #[test]
    fn processes_are_those_of_no_host_and_execs_those_of_the_container() {
        let processes = vec![
            ProcessInfo { pid: 5, ..Default::default() },
            process(6, DETAILS, "e1"),
            process(7, DETAILS, "of-another"),
            process(8, "containerd.events.TaskExit", "e1"),
            process(0, DETAILS, "e1"),
            process(1 << 22, "", ""),
            process(u32::MAX, "", ""),
        ];
        let payload = PidsResponse { processes, ..Default::default() }.write_to_bytes().unwrap();
        let answer = PidsResponse::parse_from_bytes(&pids(&payload, |exec| exec == "e1").unwrap()).unwrap();
        let base = 1 << 30;
        let seen: Vec<_> = answer.processes.iter().map(|p| (p.pid - base, p.info.value.clone())).collect();
        assert_eq!(seen, [(5, vec![]), (6, b"\x0a\x02e1".to_vec()), (7, vec![]), (8, vec![])]);
    }

    #[test]
    fn nonsense_nothing_and_too_many_are_bounded() {
        let many = vec![ProcessInfo { pid: 9, ..Default::default() }; MAX_PROCESSES + 100];
        let payload = PidsResponse { processes: many, ..Default::default() }.write_to_bytes().unwrap();
        let answer = PidsResponse::parse_from_bytes(&pids(&payload, |_| true).unwrap()).unwrap();
        assert_eq!(answer.processes.len(), MAX_PROCESSES);
        for nonsense in [&[][..], &[0xff; 9], &vec![b'x'; MAX_ANSWER + 1], b"\x0a\x00"] {
            assert_eq!(pids(nonsense, |_| true), None);
        }
    }
}
