//! A container's figures from the guest, as the messages that containerd knows and no others.
//!
//! containerd and the kubelet list the figures of all containers at once, and fail all of them for one that
//! they cannot decode or write as JSON.

use containerd_shim_protos::{
    api::StatsResponse,
    cgroups::metrics as v1,
    cgroups_v2::metrics::{self as v2, PSIData, PSIStats},
};
use protobuf::{Message, MessageField, well_known_types::any::Any};

/// Longest answer with figures, in bytes.
pub const MAX_FIGURES: usize = 64 * 1024;
/// Types of figures, of either kind of cgroups; containerd knows these names only.
pub const V1: &str = "io.containerd.cgroups.v1.Metrics";
/// See [`V1`].
pub const V2: &str = "io.containerd.cgroups.v2.Metrics";

/// The guest's answer to Stats made anew; nothing if it makes no sense.
#[must_use]
pub fn figures(payload: &[u8]) -> Option<Vec<u8>> {
    if payload.len() > MAX_FIGURES {
        return None;
    }
    let stats = StatsResponse::parse_from_bytes(payload).ok()?.stats.into_option()?;
    let (type_url, value) = match stats.type_url.as_str() {
        V1 => {
            let mut metrics = v1::Metrics::parse_from_bytes(&stats.value).ok()?;
            clean_v1(&mut metrics);
            (V1, metrics.write_to_bytes())
        }
        V2 => {
            let mut metrics = v2::Metrics::parse_from_bytes(&stats.value).ok()?;
            clean_v2(&mut metrics);
            (V2, metrics.write_to_bytes())
        }
        _ => return None,
    };
    answer(type_url, value.ok()?).filter(|answer| answer.len() <= MAX_FIGURES)
}

/// The answer of a container of which nothing is known.
pub(crate) fn none() -> Vec<u8> {
    answer(V2, Vec::new()).unwrap_or_default()
}

fn answer(type_url: &str, value: Vec<u8>) -> Option<Vec<u8>> {
    let any = Any { type_url: type_url.to_owned(), value, ..Default::default() };
    StatsResponse { stats: MessageField::some(any), ..Default::default() }.write_to_bytes().ok()
}

/// Forgets fields of these messages that their types do not have.
macro_rules! forget_unknown {
    ($($message:expr),* $(,)?) => {
        $( if let Some(message) = $message.as_mut() { message.special_fields.mut_unknown_fields().clear(); } )*
    };
}

/// The same, of lists of messages.
macro_rules! forget_unknown_in {
    ($($messages:expr),* $(,)?) => {
        $( for message in &mut $messages { message.special_fields.mut_unknown_fields().clear(); } )*
    };
}

fn clean_v2(metrics: &mut v2::Metrics) {
    metrics.special_fields.mut_unknown_fields().clear();
    forget_unknown!(
        metrics.pids,
        metrics.cpu,
        metrics.memory,
        metrics.memory_events,
        metrics.rdma,
        metrics.io
    );
    forget_unknown_in!(metrics.hugetlb, metrics.network);
    if let Some(rdma) = metrics.rdma.as_mut() {
        forget_unknown_in!(rdma.current, rdma.limit);
    }
    if let Some(io) = metrics.io.as_mut() {
        forget_unknown_in!(io.usage);
        pressure(&mut io.psi);
    }
    if let Some(cpu) = metrics.cpu.as_mut() {
        pressure(&mut cpu.psi);
    }
    if let Some(memory) = metrics.memory.as_mut() {
        pressure(&mut memory.psi);
    }
}

/// Shares of time are 0 to 100: what is no number cannot be written as JSON.
fn pressure(stats: &mut MessageField<PSIStats>) {
    fn data(data: &mut MessageField<PSIData>) {
        if let Some(data) = data.as_mut() {
            data.special_fields.mut_unknown_fields().clear();
            for average in [&mut data.avg10, &mut data.avg60, &mut data.avg300] {
                *average = if average.is_finite() { average.clamp(0.0, 100.0) } else { 0.0 };
            }
        }
    }
    if let Some(stats) = stats.as_mut() {
        stats.special_fields.mut_unknown_fields().clear();
        data(&mut stats.some);
        data(&mut stats.full);
    }
}

fn clean_v1(metrics: &mut v1::Metrics) {
    metrics.special_fields.mut_unknown_fields().clear();
    forget_unknown!(metrics.pids, metrics.cpu, metrics.memory, metrics.blkio, metrics.rdma);
    forget_unknown!(metrics.cgroup_stats, metrics.memory_oom_control);
    forget_unknown_in!(metrics.hugetlb, metrics.network);
    if let Some(cpu) = metrics.cpu.as_mut() {
        forget_unknown!(cpu.usage, cpu.throttling);
    }
    if let Some(memory) = metrics.memory.as_mut() {
        forget_unknown!(memory.usage, memory.swap, memory.kernel, memory.kernel_tcp);
    }
    if let Some(rdma) = metrics.rdma.as_mut() {
        forget_unknown_in!(rdma.current, rdma.limit);
    }
    if let Some(io) = metrics.blkio.as_mut() {
        forget_unknown_in!(
            io.io_service_bytes_recursive,
            io.io_serviced_recursive,
            io.io_queued_recursive,
            io.io_service_time_recursive,
            io.io_wait_time_recursive,
            io.io_merged_recursive,
            io.io_time_recursive,
            io.sectors_recursive,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field 15, seven bytes: of no message here.
    const UNKNOWN: &[u8] = b"\x7a\x07unknown";

    fn response(type_url: &str, value: &[u8]) -> Vec<u8> {
        let any = Any { type_url: type_url.into(), value: value.to_vec(), ..Default::default() };
        StatsResponse { stats: MessageField::some(any), ..Default::default() }.write_to_bytes().unwrap()
    }

    fn metrics<M: Message>(answer: &[u8]) -> M {
        M::parse_from_bytes(&StatsResponse::parse_from_bytes(answer).unwrap().stats.value).unwrap()
    }

    fn full() -> v2::Metrics {
        let psi = || {
            let data = PSIData { avg10: 1.5, avg60: 100.0, total: 7, ..Default::default() };
            let some = MessageField::some(data);
            MessageField::some(PSIStats { full: some.clone(), some, ..Default::default() })
        };
        let mut metrics = v2::Metrics::new();
        metrics.cpu = MessageField::some(v2::CPUStat { usage_usec: 5, psi: psi(), ..Default::default() });
        metrics.memory = MessageField::some(v2::MemoryStat { usage: 6, psi: psi(), ..Default::default() });
        let entry = v2::IOEntry { rbytes: 9, ..Default::default() };
        metrics.io = MessageField::some(v2::IOStat { usage: vec![entry], psi: psi(), ..Default::default() });
        metrics.hugetlb = vec![v2::HugeTlbStat { pagesize: "2MB".into(), current: 1, ..Default::default() }];
        metrics
    }

    #[test]
    fn figures_come_out_as_they_were() {
        let metrics_v2 = full();
        let answer = figures(&response(V2, &metrics_v2.write_to_bytes().unwrap())).unwrap();
        assert_eq!(metrics::<v2::Metrics>(&answer), metrics_v2);
        let mut metrics_v1 = v1::Metrics::new();
        metrics_v1.cpu = MessageField::some(v1::CPUStat {
            usage: MessageField::some(v1::CPUUsage { total: 3, per_cpu: vec![1, 2], ..Default::default() }),
            ..Default::default()
        });
        let answer = figures(&response(V1, &metrics_v1.write_to_bytes().unwrap())).unwrap();
        assert_eq!(metrics::<v1::Metrics>(&answer), metrics_v1);
    }

    #[test]
    fn what_is_none_is_refused() {
        let good = full().write_to_bytes().unwrap();
        let many = vec![v2::HugeTlbStat { pagesize: "x".repeat(1024), ..Default::default() }; 64];
        let long = v2::Metrics { hugetlb: many, ..Default::default() }.write_to_bytes().unwrap();
        for (what, payload) in [
            ("no message", vec![0xff; 40]),
            ("no figures", Vec::new()),
            ("another type", response("containerd.events.TaskExit", &good)),
            ("a prefix", response("type.googleapis.com/io.containerd.cgroups.v2.Metrics", &good)),
            ("no metrics", response(V2, &[1, 2, 3])),
            ("a name that is no text", response(V2, b"\x3a\x04\x1a\x02\xff\xff")),
            ("too much", response(V2, &long)),
        ] {
            assert_eq!(figures(&payload), None, "{what}");
        }
    }

    #[test]
    fn fields_that_no_type_has_and_numbers_that_are_none_are_left_out() {
        let mut metrics_v2 = full();
        let data =
            metrics_v2.cpu.mut_or_insert_default().psi.mut_or_insert_default().some.mut_or_insert_default();
        (data.avg10, data.avg60, data.avg300) = (f64::NAN, f64::INFINITY, -1e300);
        let pids = [b"\x0a\x09".as_slice(), UNKNOWN].concat();
        let value = [&metrics_v2.write_to_bytes().unwrap(), UNKNOWN, &pids].concat();
        let answer = figures(&[response(V2, &value).as_slice(), UNKNOWN].concat()).unwrap();
        assert!(!answer.windows(7).any(|part| part == b"unknown"));
        let cleaned: v2::Metrics = metrics(&answer);
        let some = &cleaned.cpu.psi.some;
        assert_eq!((some.avg10, some.avg60, some.avg300, some.total), (0.0, 0.0, 0.0, 7));
    }

    #[test]
    fn none_is_a_message_that_containerd_decodes() {
        let none = StatsResponse::parse_from_bytes(&none()).unwrap();
        assert_eq!((none.stats.type_url.as_str(), none.stats.value.len()), (V2, 0));
    }
}
