//! Reads the demands of an Update.

use serde::Deserialize;

use crate::{
    pod::{PodError, PodResources},
    protos::{
        controller::ControllerUpdateRequest,
        cri::{HugepageLimit, LinuxContainerResources},
    },
};

/// The field of a sandbox in which the CRI's updates come, alone.
const FIELD: &str = "extensions";
/// The extension that has a pod's new resources.
const KEY: &str = "updated-resources";

/// As containerd 2.3 and later write it; of other fields nothing here depends.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct UpdatedResources {
    overhead: Option<Resources>,
    resources: Option<Resources>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Resources {
    cpu_period: i64,
    cpu_quota: i64,
    cpu_shares: i64,
    memory_limit_in_bytes: i64,
    cpuset_cpus: String,
    cpuset_mems: String,
    hugepage_limits: Vec<HugePages>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct HugePages {
    page_size: String,
    limit: u64,
}

impl From<Resources> for LinuxContainerResources {
    fn from(from: Resources) -> Self {
        let limits = from.hugepage_limits.into_iter();
        Self {
            cpu_period: from.cpu_period,
            cpu_quota: from.cpu_quota,
            cpu_shares: from.cpu_shares,
            memory_limit_in_bytes: from.memory_limit_in_bytes,
            cpuset_cpus: from.cpuset_cpus,
            cpuset_mems: from.cpuset_mems,
            hugepage_limits: limits
                .map(|limit| HugepageLimit { page_size: limit.page_size, limit: limit.limit })
                .collect(),
            ..Self::default()
        }
    }
}

/// The resources that a request has; `None` when it has none, and so nothing is to be done.
///
/// # Errors
/// When it wants another field of the sandbox changed, or its JSON is not as containerd writes it.
pub(super) fn resources(request: &ControllerUpdateRequest) -> Result<Option<PodResources>, PodError> {
    if let Some(field) = request.fields.iter().find(|field| !is_ours(field)) {
        return Err(PodError::Invalid(format!(
            "the field {field:?} of a sandbox cannot be updated; {FIELD}.{KEY} can"
        )));
    }
    let extension = request.sandbox.as_ref().and_then(|sandbox| sandbox.extensions.get(KEY));
    let Some(extension) = extension else { return Ok(None) };
    let updated: UpdatedResources = serde_json::from_slice(&extension.value)
        .map_err(|error| PodError::Invalid(format!("reading {FIELD}.{KEY}: {error}")))?;
    let Some(resources) = updated.resources else { return Ok(None) };
    Ok(Some(PodResources::new(resources.into(), &updated.overhead.unwrap_or_default().into())))
}

fn is_ours(field: &str) -> bool {
    field == FIELD || field.strip_prefix(FIELD).is_some_and(|rest| rest.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protos::types::Sandbox;

    fn request(fields: &[&str], json: Option<&str>) -> ControllerUpdateRequest {
        let extension = json.map(|json| {
            let type_url = "io.containerd.cri.v1/UpdatedResources".to_owned();
            (KEY.to_owned(), prost_types::Any { type_url, value: json.as_bytes().to_vec() })
        });
        ControllerUpdateRequest {
            sandbox: Some(Sandbox { extensions: extension.into_iter().collect(), ..Sandbox::default() }),
            fields: fields.iter().map(|field| (*field).to_owned()).collect(),
            ..ControllerUpdateRequest::default()
        }
    }

    #[test]
    fn what_containerd_writes_is_read() {
        let json = r#"{"Overhead":{"memory_limit_in_bytes":7},"Resources":{"cpu_period":100000,"cpu_quota":50000,
            "cpu_shares":512,"memory_limit_in_bytes":1073741824,"oom_score_adj":5,"cpuset_cpus":"0-1",
            "hugepage_limits":[{"page_size":"2MB","limit":4194304}],"unified":{"memory.oom.group":"1"}}}"#;
        let read = resources(&request(&["extensions"], Some(json))).unwrap().unwrap();
        assert_eq!((read.cpu_quota, read.cpu_period, read.cpu_shares), (50_000, 100_000, 512));
        assert_eq!((read.memory_limit, read.memory_overhead), (1 << 30, 7));
        assert_eq!((read.cpuset_cpus.as_str(), read.huge_pages["2MB"]), ("0-1", 4 << 20));
    }

    #[test]
    fn nothing_to_do_is_no_error() {
        for json in [None, Some("{}"), Some(r#"{"Overhead":null,"Resources":null}"#)] {
            assert_eq!(resources(&request(&["extensions"], json)).unwrap(), None);
        }
    }

    #[test]
    fn what_cannot_be_updated_is_named() {
        let error = resources(&request(&["extensions", "labels"], None)).unwrap_err().to_string();
        assert!(error.starts_with("the field \"labels\" of a sandbox cannot be updated"), "{error}");
        let error = resources(&request(&["extensions"], Some("{\"Resources\":7}"))).unwrap_err();
        assert!(matches!(error, PodError::Invalid(_)), "{error}");
        assert!(error.to_string().starts_with("reading extensions.updated-resources: "), "{error}");
    }
}
