//! A guest's answers: figures, processes and errors. What comes out is decodable, short, and of the types
//! that containerd knows.

use containerd_shim_protos::{
    api::{PidsResponse, ProcessInfo, StatsResponse},
    cgroups_v2::metrics::{CPUStat, HugeTlbStat, MemoryStat, Metrics, PSIData, PSIStats},
};
use kuasar_common::constants::GUEST_PID_BASE;
use kuasar_relay::{
    figures::{MAX_FIGURES, V1, V2, figures},
    probe::{guest_status, pids},
};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use ttrpc::proto::Status;

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let data = MessageField::some(PSIData { avg10: 1.5, total: 3, ..Default::default() });
    let psi = MessageField::some(PSIStats { some: data, ..Default::default() });
    let cpu = MessageField::some(CPUStat { usage_usec: 1 << 40, psi, ..Default::default() });
    let memory = MessageField::some(MemoryStat { usage: 1 << 30, ..Default::default() });
    let hugetlb = vec![HugeTlbStat { pagesize: "2MB".into(), ..Default::default() }];
    let value = Metrics { cpu, memory, hugetlb, ..Default::default() }.write_to_bytes().unwrap_or_default();
    let figures = |type_url: &str| {
        let any = Any { type_url: type_url.into(), value: value.clone(), ..Default::default() };
        StatsResponse { stats: MessageField::some(any), ..Default::default() }.write_to_bytes()
    };
    let processes = [1, 300, 1 << 22].map(|pid| ProcessInfo { pid, ..Default::default() }).to_vec();
    let status = Status { code: ttrpc::Code::NOT_FOUND.into(), message: "gone\n".into(), ..Default::default() };
    let pids = PidsResponse { processes, ..Default::default() };
    [figures(V2), figures(V1), pids.write_to_bytes(), status.write_to_bytes()].into_iter().flatten().collect()
}

pub(crate) fn run(input: &[u8]) {
    if let Some(answer) = figures(input) {
        assert!(answer.len() <= MAX_FIGURES);
        let stats = StatsResponse::parse_from_bytes(&answer).unwrap_or_default().stats;
        assert!([V1, V2].contains(&stats.type_url.as_str()));
        if stats.type_url == V2 {
            let metrics = Metrics::parse_from_bytes(&stats.value);
            assert!(metrics.is_ok(), "no figures came out");
            let metrics = metrics.unwrap_or_default();
            let averages = [&metrics.cpu.psi.some, &metrics.memory.psi.full, &metrics.io.psi.some];
            assert!(averages.iter().all(|data| data.avg10.is_finite() && data.avg300.is_finite()));
        }
        assert_eq!(figures(&answer), Some(answer), "what came out is good");
    }
    if let Some(answer) = pids(input, |_| false) {
        let answer = PidsResponse::parse_from_bytes(&answer).unwrap_or_default();
        assert!(!answer.processes.is_empty());
        assert!(answer.processes.iter().all(|process| process.pid > GUEST_PID_BASE && process.info.is_none()));
    }
    if let Ok(status) = Status::parse_from_bytes(input) {
        let status = guest_status(&status);
        assert!(status.message.chars().count() <= 513 && status.details.is_empty());
        assert!(!status.message.chars().any(char::is_control));
        assert!(status.code.enum_value().is_ok_and(|code| code != ttrpc::Code::OK));
    }
}
