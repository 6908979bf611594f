//! A pod's record on disk, `pod.json`: all that a restarted daemon needs.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use kuasar_common::constants::pod_files;
use serde::{Deserialize, Serialize};

use super::{size::VmSize, spec::PodSpec};
use crate::{network::NetworkRecord, process::ProcessRecord, replace::replace, vmm::VmRecord};

/// Raised when an older daemon could not make sense of the record any more. Records of every version so far
/// are read: what a version added has a default.
///
/// 2: how big the VM is, why it ended, what annotations asked for.
pub(super) const VERSION: u32 = 2;

/// Phase of a pod's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Its folder is there.
    Created,
    /// Processes come up.
    Starting,
    /// Containers can run.
    Running,
    /// The VM is gone.
    Stopped,
}

/// A pod's end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ExitRecord {
    /// Status as containerd gets it.
    pub code: u32,
    /// Nanoseconds since the Unix epoch.
    pub at_ns: i64,
    /// Why, if nobody had asked for it and it is known.
    #[serde(default)]
    pub reason: Option<String>,
}

/// The file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PodRecord {
    /// See [`VERSION`].
    pub version: u32,
    /// The pod's id, and its folder's name.
    pub id: String,
    /// Its phase of life.
    pub phase: Phase,
    /// When it was created, in nanoseconds since the Unix epoch.
    pub created_ns: i64,
    /// The pod as containerd asked for it.
    pub spec: PodSpec,
    /// Everything that the daemon made in its network namespace.
    pub network: Option<NetworkRecord>,
    /// Its VM.
    pub vm: Option<VmRecord>,
    /// Its relay.
    pub relay: Option<ProcessRecord>,
    /// cgroups that were created for it, outermost first.
    #[serde(default)]
    pub cgroups: Vec<PathBuf>,
    /// Size of its VM.
    #[serde(default)]
    pub size: Option<VmSize>,
    /// User and group id of its processes, which no other pod is given; `None`: the daemon's.
    #[serde(default)]
    pub user: Option<u32>,
    /// Its end, once it has ended.
    pub exit: Option<ExitRecord>,
    /// The boot of the host in which it was written: process ids of another one say nothing.
    #[serde(default)]
    pub boot: Option<String>,
}

/// The kernel's name for the time since the host was started.
pub(super) fn boot_id() -> Option<String> {
    static ID: OnceLock<Option<String>> = OnceLock::new();
    let read = || Some(fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned());
    ID.get_or_init(read).clone()
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// Why a record could not be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum RecordError {
    /// There is none.
    #[error("there is no record")]
    Missing,
    /// It cannot be read.
    #[error("reading the record: {0}")]
    Io(#[from] io::Error),
    /// It is torn, or not ours.
    #[error("understanding the record: {0}")]
    Alien(String),
}

impl PodRecord {
    /// Replaces the record as a whole: a crash at any instruction leaves the old one or the new one.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        replace(&dir.join(pod_files::RECORD), &serde_json::to_vec_pretty(self)?)
    }

    /// Returns true if the host was restarted since. Older daemons did not write when it was.
    pub(super) fn is_of_another_boot(&self) -> bool {
        self.boot.is_some() && self.boot != boot_id()
    }

    /// Nothing that it names is there any more: processes, the network in its namespace, cgroups.
    pub(super) fn forget_processes(&mut self) {
        (self.vm, self.relay, self.network) = (None, None, None);
        self.cgroups.clear();
    }

    /// Reads the record of the pod with this folder.
    ///
    /// # Errors
    /// When there is none, or it is not one of ours.
    pub(super) fn read(dir: &Path) -> Result<Self, RecordError> {
        let text = match fs::read(dir.join(pod_files::RECORD)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(RecordError::Missing),
            read => read?,
        };
        Self::parse(&text, dir.file_name().and_then(|name| name.to_str()).unwrap_or_default())
    }

    /// Understands the record of the pod with this id.
    fn parse(text: &[u8], id: &str) -> Result<Self, RecordError> {
        // Before all else: what a later version means by the rest, nobody knows.
        let version: Version = serde_json::from_slice(text).map_err(|e| RecordError::Alien(e.to_string()))?;
        if !(1..=VERSION).contains(&version.version) {
            let why = format!("version {}, and this daemon reads 1 to {VERSION}", version.version);
            return Err(RecordError::Alien(why));
        }
        let record: Self = serde_json::from_slice(text).map_err(|e| RecordError::Alien(e.to_string()))?;
        if id != record.id {
            return Err(RecordError::Alien(format!("it is of pod {:?}", record.id)));
        }
        Ok(record)
    }
}

/// For `tests/fuzz`: the record, written anew, if it is one.
pub(crate) fn parse_record(text: &[u8], id: &str) -> Option<Vec<u8>> {
    serde_json::to_vec(&PodRecord::parse(text, id).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip_and_others_are_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("p1");
        fs::create_dir(&dir).unwrap();
        assert!(matches!(PodRecord::read(&dir), Err(RecordError::Missing)));
        let record = PodRecord {
            version: VERSION,
            id: "p1".into(),
            phase: Phase::Running,
            created_ns: 5,
            spec: PodSpec::default(),
            network: Some(NetworkRecord::default()),
            vm: None,
            relay: Some(ProcessRecord { pid: 4, start_time: 5 }),
            cgroups: Vec::new(),
            size: Some(VmSize { vcpus: 1, memory_mib: 512 }),
            user: Some(1_900_000_007),
            exit: Some(ExitRecord { code: 1, at_ns: 2, reason: Some("stopped".into()) }),
            boot: boot_id(),
        };
        record.write(&dir).unwrap();
        assert_eq!(PodRecord::read(&dir).unwrap(), record);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2, "the record, and the room for the next one");
        // A reader that has the old one open reads it to its end: it is replaced, not written over.
        let old = root.path().join("old");
        fs::hard_link(dir.join(pod_files::RECORD), &old).unwrap();
        let text = fs::read(&old).unwrap();
        PodRecord { phase: Phase::Stopped, ..record.clone() }.write(&dir).unwrap();
        assert_eq!(PodRecord::read(&dir).unwrap().phase, Phase::Stopped);
        assert_eq!(fs::read(&old).unwrap(), text);
        record.write(&dir).unwrap();
        let other = root.path().join("p2");
        fs::rename(&dir, &other).unwrap();
        assert!(PodRecord::read(&other).unwrap_err().to_string().contains("it is of pod \"p1\""));
        fs::write(other.join(pod_files::RECORD), "{\"version\":1").unwrap();
        assert!(matches!(PodRecord::read(&other), Err(RecordError::Alien(_))));
        fs::write(other.join(pod_files::RECORD), "{\"version\":3,\"id\":{}}").unwrap();
        let text = PodRecord::read(&other).unwrap_err().to_string();
        assert_eq!(text, "understanding the record: version 3, and this daemon reads 1 to 2");
    }

    /// As the first version wrote it.
    #[test]
    fn records_of_version_1_are_read() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("p1");
        fs::create_dir(&dir).unwrap();
        let text = r#"{
            "version": 1, "id": "p1", "phase": "stopped", "created_ns": 5,
            "spec": {
                "name": "prod/web", "netns": "/run/netns/x", "hostname": "web", "resolv_conf": "", "sysctls": {},
                "cgroup_parent": "/kubepods/podu", "labels": {},
                "resources": {"cpu_quota": 0, "cpu_period": 0, "memory_limit": 7, "memory_overhead": 0}
            },
            "network": null, "relay": {"pid": 4, "start_time": 5}, "cgroups": ["/sys/fs/cgroup/kubepods/podu/kuasar-p1"],
            "vm": {"dir": "/run/p1", "vmm": {"pid": 3, "start_time": 4}, "companions": {}, "cid": null, "buses": []},
            "exit": {"code": 137, "at_ns": 6}
        }"#;
        fs::write(dir.join(pod_files::RECORD), text).unwrap();
        let record = PodRecord::read(&dir).unwrap();
        assert_eq!((record.spec.resources.memory_limit, record.spec.namespace.as_str()), (7, "k8s.io"));
        assert!(!record.is_of_another_boot(), "nobody knows");
        assert_eq!((record.size, record.exit.map(|exit| exit.code)), (None, Some(137)));
    }
}
