//! Reads containerd's request to create a pod, and reduces it to what we need, or refuses it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use prost::Message;
use serde::{Deserialize, Serialize};

use super::{
    PodError,
    annotations::{Annotation, Wishes},
    cgroup::{Given, Limits},
};
use crate::protos::{
    controller::ControllerCreateRequest,
    cri::{
        DnsConfig, LinuxContainerResources, LinuxPodSandboxConfig, NamespaceMode, NamespaceOption,
        PodSandboxConfig,
    },
};

/// Type of the CRI's pod configuration in a Create request.
const CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";

/// containerd's namespace of the CRI.
const NAMESPACE: &str = "k8s.io";

/// sysctls that the CRI plugin promises for every pod and leaves to the sandbox.
const DEFAULT_SYSCTLS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];

/// A pod as asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodSpec {
    /// `<namespace>/<name>` in Kubernetes; for logs.
    pub name: String,
    /// The network namespace that CNI has filled.
    pub netns: PathBuf,
    /// Host name in the guest.
    pub hostname: String,
    /// Text of the guest's `/etc/resolv.conf`.
    pub resolv_conf: String,
    /// Its containers see each other's processes. (Records of before did not say.)
    #[serde(default)]
    pub shared_pids: bool,
    /// Set in the guest.
    pub sysctls: BTreeMap<String, String>,
    /// The pod's cgroup on the host, as kubelet names it; empty: none.
    pub cgroup_parent: String,
    /// Resources that the pod may use.
    pub resources: PodResources,
    /// OOM score that the pod itself asks for; kubelet gives scores to containers only, and this is 0.
    #[serde(default)]
    pub oom_score_adj: i64,
    /// Wishes for its VM that its annotations state.
    #[serde(default)]
    pub wishes: Wishes,
    /// Namespace of containerd in which the pod is listed. (Records of before knew one only.)
    #[serde(default = "namespace_of_cri")]
    pub namespace: String,
    /// Handed back to containerd, which replaces its own by them.
    pub labels: BTreeMap<String, String>,
}

/// Containerd's namespace of all pods that Kubernetes makes.
#[must_use]
pub fn namespace_of_cri() -> String {
    NAMESPACE.to_owned()
}

/// Limits of all containers of a pod together, as kubelet adds them up; 0 or less, or empty: unlimited or not
/// told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PodResources {
    /// Microseconds of CPU time per period.
    pub cpu_quota: i64,
    /// Microseconds.
    pub cpu_period: i64,
    /// Bytes.
    pub memory_limit: i64,
    /// Bytes, of the runtime class's overhead.
    pub memory_overhead: i64,
    /// Requested share of the CPUs, 1024 for each.
    pub cpu_shares: i64,
    /// CPUs that the pod may run on, as in `0-3,8`.
    pub cpuset_cpus: String,
    /// Memory nodes that it may use, likewise.
    pub cpuset_mems: String,
    /// Bytes of huge pages by their size, as in `2MB`.
    pub huge_pages: BTreeMap<String, u64>,
    /// Bytes that the pod's cgroup may use, with all that runs in it; 0: unlimited or not known.
    pub cgroup_memory: i64,
    /// Processes and threads that it may have; 0: unlimited or not known.
    pub pids_limit: i64,
}

impl PodResources {
    /// The part of it that the daemon sets in the pod's own cgroups; kubelet sets the rest in the one above.
    pub(super) fn limits(&self) -> Limits {
        Limits {
            cpus: self.cpuset_cpus.clone(),
            mems: self.cpuset_mems.clone(),
            huge_pages: self.huge_pages.clone(),
        }
    }

    /// Corrects what the CRI says by what the pod's cgroup has. A sum of limits is none if one container has
    /// no limit, and then kubelet leaves the cgroup unlimited.
    pub(super) fn correct(&mut self, given: &Given) {
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        match given.memory {
            None => {}
            Some(None) => self.memory_limit = 0,
            Some(Some(_)) if self.memory_limit > 0 => {}
            Some(Some(bytes)) => self.memory_limit = (signed(bytes) - self.memory_overhead.max(0)).max(1),
        }
        match given.cpu {
            None => {}
            Some(None) => self.cpu_quota = 0,
            Some(Some(_)) if self.cpu_quota > 0 => {}
            Some(Some((quota, period))) => {
                (self.cpu_quota, self.cpu_period) = (signed(quota), signed(period))
            }
        }
        self.bound(given);
    }

    /// Takes over only what the CRI does not say.
    pub(super) fn bound(&mut self, given: &Given) {
        let signed =
            |limit: Option<Option<u64>>| i64::try_from(limit.flatten().unwrap_or(0)).unwrap_or(i64::MAX);
        self.cgroup_memory = signed(given.memory);
        self.pids_limit = signed(given.pids);
    }

    /// From the CRI's.
    #[must_use]
    pub fn new(limits: LinuxContainerResources, overhead: &LinuxContainerResources) -> Self {
        let huge_pages = limits.hugepage_limits.into_iter();
        Self {
            cpu_quota: limits.cpu_quota,
            cpu_period: limits.cpu_period,
            memory_limit: limits.memory_limit_in_bytes,
            memory_overhead: overhead.memory_limit_in_bytes,
            cpu_shares: limits.cpu_shares,
            cpuset_cpus: limits.cpuset_cpus,
            cpuset_mems: limits.cpuset_mems,
            huge_pages: huge_pages.map(|limit| (limit.page_size, limit.limit)).collect(),
            ..Self::default()
        }
    }
}

impl PodSpec {
    /// Reads a Create request.
    ///
    /// # Errors
    /// When it cannot be read, or asks for what a VM cannot give or what is not allowed.
    pub fn from_request(request: &ControllerCreateRequest, allowed: &[Annotation]) -> Result<Self, PodError> {
        let config = match &request.options {
            None => PodSandboxConfig::default(),
            Some(any) if any.type_url.rsplit('/').next() == Some(CONFIG_TYPE) => {
                PodSandboxConfig::decode(any.value.as_slice())
                    .map_err(|e| PodError::Invalid(format!("reading options ({CONFIG_TYPE}): {e}")))?
            }
            Some(any) => {
                let why = format!("options are of type {:?}, expected {CONFIG_TYPE}", any.type_url);
                return Err(PodError::Invalid(why));
            }
        };
        let linux = config.linux.clone().unwrap_or_default();
        refuse_namespaces(&linux, &request.netns_path)?;
        let mut sysctls: BTreeMap<String, String> =
            DEFAULT_SYSCTLS.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        sysctls.extend(linux.sysctls.clone());
        let metadata = config.metadata.unwrap_or_default();
        let labels = request.sandbox.as_ref().map(|sandbox| sandbox.labels.clone()).unwrap_or_default();
        Ok(Self {
            name: format!("{}/{}", metadata.namespace, metadata.name),
            netns: PathBuf::from(&request.netns_path),
            hostname: if config.hostname.is_empty() { host_name() } else { config.hostname },
            resolv_conf: resolv_conf(config.dns_config.as_ref()),
            shared_pids: namespace_options(&linux).is_some_and(|options| is(options.pid, NamespaceMode::Pod)),
            sysctls,
            cgroup_parent: linux.cgroup_parent.clone(),
            oom_score_adj: linux.resources.as_ref().map_or(0, |resources| resources.oom_score_adj),
            resources: PodResources::new(
                linux.resources.unwrap_or_default(),
                &linux.overhead.unwrap_or_default(),
            ),
            wishes: Wishes::read(&config.annotations, allowed)?,
            namespace: namespace_of_cri(),
            labels: labels.into_iter().collect(),
        })
    }
}

impl PodSpec {
    /// Corrects the pod's resources by the cgroup that kubelet has made for it.
    pub(super) fn look_at_cgroup(&mut self, root: &Path) {
        self.resources.correct(&Given::of_pod(root, &self.cgroup_parent));
    }
}

/// Absent options are all POD, but only to clients that do not care, who get what kubelet asks for by
/// default.
fn namespace_options(linux: &LinuxPodSandboxConfig) -> Option<&NamespaceOption> {
    linux.security_context.as_ref().and_then(|context| context.namespace_options.as_ref())
}

fn is(mode: i32, wanted: NamespaceMode) -> bool {
    mode == i32::from(wanted)
}

fn refuse_namespaces(linux: &LinuxPodSandboxConfig, netns: &str) -> Result<(), PodError> {
    const FIELD: &str = "linux.security_context.namespace_options";
    let way_out = "or give the pod a runtime class that does not use VMs";
    if let Some(options) = namespace_options(linux) {
        for (mode, name, kubernetes) in [
            (options.network, "network", "hostNetwork"),
            (options.pid, "pid", "hostPID"),
            (options.ipc, "ipc", "hostIPC"),
        ] {
            if is(mode, NamespaceMode::Node) {
                return Err(PodError::Refused(format!(
                    "{FIELD}.{name} is NODE ({kubernetes}: true), and a VM cannot join a namespace of the host; \
                     set {kubernetes}: false, {way_out}"
                )));
            }
        }
        // Absent is NODE, but within it an absent mode is POD.
        if options.userns_options.as_ref().is_some_and(|users| !is(users.mode, NamespaceMode::Node)) {
            return Err(PodError::Refused(format!(
                "{FIELD}.userns_options.mode is not NODE (hostUsers: false), and user namespaces are not supported in the VM; \
                 set hostUsers: true, {way_out}"
            )));
        }
    }
    if netns.is_empty() {
        return Err(PodError::Refused(format!(
            "netns_path is empty (hostNetwork: true), and a VM cannot use the host's network; \
             set hostNetwork: false, {way_out}"
        )));
    }
    Ok(())
}

fn host_name() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()).unwrap_or_default()
}

/// As the CRI plugin's own sandboxes do it: no DNS configuration means the host's.
fn resolv_conf(dns: Option<&DnsConfig>) -> String {
    let Some(dns) = dns else { return fs::read_to_string("/etc/resolv.conf").unwrap_or_default() };
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protos::cri::{LinuxSandboxSecurityContext, PodSandboxMetadata, UserNamespace};

    fn request(config: &PodSandboxConfig) -> ControllerCreateRequest {
        ControllerCreateRequest {
            sandbox_id: "p".into(),
            netns_path: "/var/run/netns/cni-1".into(),
            options: Some(prost_types::Any { type_url: CONFIG_TYPE.into(), value: config.encode_to_vec() }),
            ..ControllerCreateRequest::default()
        }
    }

    fn from(request: &ControllerCreateRequest) -> Result<PodSpec, PodError> {
        PodSpec::from_request(request, &[])
    }

    fn with_namespaces(options: NamespaceOption) -> PodSandboxConfig {
        let security_context =
            Some(LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() });
        PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig { security_context, ..Default::default() }),
            ..Default::default()
        }
    }

    fn kubelets() -> NamespaceOption {
        NamespaceOption { pid: NamespaceMode::Container.into(), ..Default::default() }
    }

    #[test]
    fn a_pod_of_kubelet_is_understood() {
        let mut config = with_namespaces(kubelets());
        config.hostname = "web-0".into();
        config.metadata =
            Some(PodSandboxMetadata { name: "web".into(), namespace: "prod".into(), ..Default::default() });
        config.dns_config = Some(DnsConfig {
            servers: vec!["10.96.0.10".into()],
            searches: vec!["a.svc".into(), "svc".into()],
            options: vec!["ndots:5".into()],
        });
        let linux = config.linux.as_mut().unwrap();
        linux.cgroup_parent = "/kubepods/podu".into();
        linux.sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "1024".into());
        linux.resources = Some(LinuxContainerResources {
            memory_limit_in_bytes: 1 << 30,
            cpuset_cpus: "0-1".into(),
            ..Default::default()
        });
        let spec = from(&request(&config)).unwrap();
        assert_eq!(spec.name, "prod/web");
        assert_eq!(spec.resolv_conf, "search a.svc svc\nnameserver 10.96.0.10\noptions ndots:5\n");
        assert_eq!(spec.sysctls["net.ipv4.ip_unprivileged_port_start"], "1024");
        assert_eq!(spec.sysctls["net.ipv4.ping_group_range"], "0 2147483647");
        assert_eq!((spec.resources.memory_limit, spec.resources.cpuset_cpus.as_str()), (1 << 30, "0-1"));
        assert_eq!(spec.cgroup_parent, "/kubepods/podu");
    }

    #[test]
    fn the_cgroup_says_whether_a_sum_of_limits_is_one() {
        let corrected = |memory_limit, cpu_quota, given: &Given| {
            let of_overhead = PodResources { memory_overhead: 100, ..PodResources::default() };
            let mut resources = PodResources { memory_limit, cpu_quota, cpu_period: 100_000, ..of_overhead };
            resources.correct(given);
            (resources.memory_limit, resources.cpu_quota, resources.cgroup_memory)
        };
        // A sidecar with limits beside a container without: kubelet's cgroup has none.
        let unlimited = Given { memory: Some(None), cpu: Some(None), pids: Some(None) };
        assert_eq!(corrected(64, 20_000, &unlimited), (0, 0, 0));
        // All containers have some.
        let limited =
            Given { memory: Some(Some(164)), cpu: Some(Some((45_000, 100_000))), pids: Some(Some(7)) };
        assert_eq!(corrected(64, 20_000, &limited), (64, 20_000, 164));
        // Of the pod as a whole, and of no container.
        assert_eq!(corrected(0, 0, &limited), (64, 45_000, 164));
        // Nobody has made it yet, or the hierarchy has no such controller.
        assert_eq!(corrected(64, 20_000, &Given::default()), (64, 20_000, 0));
        let huge = Given { memory: Some(Some(u64::MAX)), cpu: Some(Some((u64::MAX, 0))), pids: None };
        assert_eq!(corrected(0, 0, &huge), (i64::MAX - 100, i64::MAX, i64::MAX));
    }

    #[test]
    fn no_dns_configuration_is_the_hosts_and_no_hostname_too() {
        let spec = from(&request(&PodSandboxConfig::default())).unwrap();
        assert_eq!(spec.resolv_conf, fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
        assert!(!spec.hostname.is_empty());
    }

    #[test]
    fn processes_are_shared_only_by_who_asks_for_it() {
        let shared = |config: &PodSandboxConfig| from(&request(config)).unwrap().shared_pids;
        assert!(shared(&with_namespaces(NamespaceOption::default())));
        assert!(!shared(&with_namespaces(kubelets())));
        assert!(!shared(&PodSandboxConfig::default()));
    }

    #[test]
    fn namespaces_that_a_vm_cannot_have_are_refused_by_field_with_a_way_out() {
        let node = i32::from(NamespaceMode::Node);
        for (options, field, way_out) in [
            (
                NamespaceOption { network: node, ..kubelets() },
                "namespace_options.network is NODE",
                "hostNetwork: false",
            ),
            (NamespaceOption { pid: node, ..kubelets() }, "namespace_options.pid is NODE", "hostPID: false"),
            (NamespaceOption { ipc: node, ..kubelets() }, "namespace_options.ipc is NODE", "hostIPC: false"),
            (
                NamespaceOption { userns_options: Some(UserNamespace::default()), ..kubelets() },
                "namespace_options.userns_options.mode is not NODE",
                "hostUsers: true",
            ),
        ] {
            let error = from(&request(&with_namespaces(options))).unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, PodError::Refused(_)), "{text}");
            assert!(text.contains(field) && text.contains(way_out), "{text}");
        }
        let users = NamespaceOption { userns_options: Some(UserNamespace { mode: node }), ..kubelets() };
        from(&request(&with_namespaces(users))).unwrap();
        let mut request = request(&with_namespaces(kubelets()));
        request.netns_path.clear();
        let text = from(&request).unwrap_err().to_string();
        assert!(text.starts_with("netns_path is empty (hostNetwork: true)"), "{text}");
    }

    #[test]
    fn annotations_for_the_vm_are_refused_unless_allowed() {
        let mut config = with_namespaces(kubelets());
        config.annotations.insert("io.kuasar.vm.memory_mib".into(), "300".into());
        let error = from(&request(&config)).unwrap_err();
        assert!(matches!(error, PodError::Refused(_)) && error.to_string().contains("memory_mib"), "{error}");
        let allowed = PodSpec::from_request(&request(&config), &[Annotation::MemoryMib]).unwrap();
        assert_eq!(allowed.wishes.memory_mib, Some(300));
    }

    #[test]
    fn options_of_another_kind_are_refused() {
        let mut other = request(&PodSandboxConfig::default());
        other.options.as_mut().unwrap().type_url = "x.Y".into();
        assert!(from(&other).unwrap_err().to_string().contains("\"x.Y\""));
        other.options.as_mut().unwrap().type_url = CONFIG_TYPE.into();
        other.options.as_mut().unwrap().value = vec![0xff];
        assert!(matches!(from(&other), Err(PodError::Invalid(_))));
    }
}
