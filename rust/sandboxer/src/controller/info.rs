//! Information that `crictl inspectp` shows.

use std::collections::HashMap;

use kuasar_common::constants::RUNTIME_TYPE;
use serde_json::json;

use crate::{
    pod::{Phase, Pod, View},
    protos::timestamp,
};

/// Verbose information. containerd 2.3 and later parse the value of `info` and fail on fields of a type they
/// do not expect, so only those that mean the same in all versions are in there; ours have a key of their
/// own.
pub(super) fn of(pod: &Pod, view: &View) -> HashMap<String, String> {
    let status = match view.phase {
        Phase::Created => "created",
        Phase::Starting => "starting",
        Phase::Running => "running",
        Phase::Stopped => "stopped",
    };
    let info = json!({"pid": view.pid, "processStatus": status, "runtimeType": RUNTIME_TYPE});
    let exit = view.exit.as_ref();
    // Of one that has ended, it is no news.
    let silence = pod.silence().filter(|_| view.phase == Phase::Running);
    let ours = json!({
        "folder": pod.dir(),
        "exitCode": exit.map(|exit| exit.code),
        "reason": exit.and_then(|exit| exit.reason.as_deref()),
        "memory": pod.shortage(),
        "guestSilent": silence.map(|silence| json!({
            "since": timestamp(silence.since).to_string(),
            "why": silence.why,
        })),
    });
    HashMap::from([("info".to_owned(), info.to_string()), ("kuasar".to_owned(), ours.to_string())])
}
