//! Pods and containers under test.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use super::{Lab, QEMU, folder_of};
use crate::{
    cri::{
        ContainerConfig, ContainerMetadata, ImageSpec, LinuxContainerConfig, LinuxContainerSecurityContext,
        NamespaceMode, NamespaceOption, PodSandboxConfig,
    },
    leaks,
};

/// A pod under test.
#[derive(Debug)]
pub struct Pod<'a> {
    pub(super) lab: &'a Lab,
    /// Its id.
    pub id: String,
    /// Configuration that it was made from.
    pub config: PodSandboxConfig,
}

impl Pod<'_> {
    /// The lab that it is in.
    #[must_use]
    pub fn lab(&self) -> &Lab {
        self.lab
    }

    /// Creates and starts a container that runs `command` of `image`.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn container(&self, name: &str, image: &str, command: &[&str]) -> Result<String> {
        let id = self.create(container(name, image, command)).await?;
        self.lab.cri.start(&id).await.map_err(|e| anyhow!("starting {name}: {}", e.message()))?;
        Ok(id)
    }

    /// Creates a container.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn create(&self, mut config: ContainerConfig) -> Result<String> {
        let pods = self.config.linux.as_ref().and_then(|linux| linux.security_context.clone());
        // As kubelet: a pod that shares its processes says so of each of its containers.
        if let (Some(linux), Some(pods)) = (&mut config.linux, pods) {
            linux.security_context.get_or_insert_default().namespace_options = pods.namespace_options;
        }
        let created = self.lab.cri.create(&self.id, &self.config, config).await;
        created.map_err(|e| anyhow!("creating a container: {}", e.message()))
    }

    /// Everything a container wrote, by stream, from its log file.
    ///
    /// # Errors
    /// When the log is missing or a line of it is torn.
    pub fn output(&self, name: &str) -> Result<(Vec<u8>, Vec<u8>)> {
        let path = Path::new(&self.config.log_directory).join(format!("{name}.log"));
        let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        parse_log(&text).with_context(|| format!("parsing {}", path.display()))
    }

    /// Returns the daemon's record of it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn record(&self) -> Result<Value> {
        let path = folder_of(QEMU).join(&self.id).join("pod.json");
        let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(serde_json::from_slice(&text)?)
    }

    /// The pid at a path of that record, like `/vm/vmm/pid`.
    ///
    /// # Errors
    /// When there is none.
    pub fn recorded_pid(&self, path: &str) -> Result<i32> {
        let record = self.record()?;
        let pid = record.pointer(path).and_then(Value::as_i64);
        Ok(i32::try_from(pid.with_context(|| format!("no {path} in {record}"))?)?)
    }

    /// Its own cgroup in each hierarchy.
    #[must_use]
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let parent = self.config.linux.as_ref().map(|linux| linux.cgroup_parent.as_str()).unwrap_or_default();
        let below = Path::new(parent.trim_start_matches('/')).join(format!("kuasar-{}", self.id));
        leaks::hierarchies().into_iter().map(|hierarchy| hierarchy.join(&below)).collect()
    }

    /// Stops and removes the pod.
    ///
    /// # Errors
    /// As containerd says.
    pub async fn remove(self) -> Result<()> {
        self.lab.cri.stop_pod(&self.id).await.map_err(|e| anyhow!("stopping the pod: {}", e.message()))?;
        self.lab.cri.remove_pod(&self.id).await.map_err(|e| anyhow!("removing the pod: {}", e.message()))
    }
}

/// A container that runs `command` of `image`.
#[must_use]
pub fn container(name: &str, image: &str, command: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(ImageSpec { image: image.to_owned() }),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(own_pids()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Options that the kubelet sends unless a pod shares its processes; the protocol's zero means the opposite.
#[must_use]
pub fn own_pids() -> NamespaceOption {
    NamespaceOption { pid: NamespaceMode::Container.into(), ..Default::default() }
}

/// CRI's log lines: time, stream, `F` or `P` (the line goes on), text.
fn parse_log(text: &[u8]) -> Result<(Vec<u8>, Vec<u8>)> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        let Some(line) = line.strip_suffix(b"\n") else { bail!("the last line has no end") };
        let mut words = line.splitn(4, |&byte| byte == b' ');
        let (_, stream, tag, data) = (words.next(), words.next(), words.next(), words.next());
        let sink = match stream {
            Some(b"stdout") => &mut stdout,
            Some(b"stderr") => &mut stderr,
            _ => bail!("a line of no stream: {}", String::from_utf8_lossy(line)),
        };
        sink.extend_from_slice(data.unwrap_or_default());
        match tag {
            Some(b"F") => sink.push(b'\n'),
            Some(b"P") => {}
            _ => bail!("a line that is neither whole nor part: {}", String::from_utf8_lossy(line)),
        }
    }
    Ok((stdout, stderr))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_put_together_by_stream() {
        let log = b"t stdout F one\nt stderr F two\nt stdout P thr\nt stdout F ee\nt stdout F \n";
        let (stdout, stderr) = parse_log(log).unwrap();
        assert_eq!(stdout, b"one\nthree\n\n");
        assert_eq!(stderr, b"two\n");
    }

    #[test]
    fn a_torn_log_is_seen() {
        assert!(parse_log(b"t stdout F one\nt stdout F tw").is_err());
        assert!(parse_log(b"t stdout X one\n").is_err());
        assert!(parse_log(b"t nowhere F one\n").is_err());
    }
}
