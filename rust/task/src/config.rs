//! The agent's words of the kernel command line: `task.*` parameters as a typed [`TaskConfig`].
//!
//! A wrong parameter never keeps a pod from starting: the default is taken and one line says what was wrong.

use std::path::{Path, PathBuf};

use kuasar_common::constants::PORT_READY;
use log::LevelFilter;

/// The agent's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskConfig {
    /// `task.log_level`: least severe messages that are written.
    pub log_level: LevelFilter,
    /// `task.ready_port`: vsock port of the host that the agent calls when it is ready.
    pub ready_port: u32,
    /// `task.sharefs_type`: how the pod's shared folder comes into the guest.
    pub share: ShareFs,
    /// `task.cgroup`: version of the cgroups that containers see.
    pub cgroup: CgroupVersion,
    /// `task.debug`: log at debug level at least, and run processes outside containers when the host asks for
    /// it.
    pub debug: bool,
    /// `task.debug_shell`: absolute path of the debug console's shell. None: there is no debug console.
    pub debug_shell: Option<PathBuf>,
}

/// File systems that carry the pod's shared folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShareFs {
    /// virtiofs, served by a process beside the VMM.
    Virtiofs,
    /// 9p, served by QEMU itself.
    NineP,
    /// No shared folder: the image or initrd carries everything.
    None,
}

/// Versions of cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupVersion {
    /// One hierarchy.
    V2,
    /// One for each controller, for programs that know nothing else.
    V1,
}

/// The parameters there are, without `task.`.
const KNOWN: [&str; 6] = ["cgroup", "debug", "debug_shell", "log_level", "ready_port", "sharefs_type"];

impl Default for TaskConfig {
    fn default() -> Self {
        Self {
            log_level: LevelFilter::Warn,
            ready_port: PORT_READY,
            share: ShareFs::Virtiofs,
            cgroup: CgroupVersion::V2,
            debug: false,
            debug_shell: None,
        }
    }
}

impl TaskConfig {
    /// Reads the parameters of a kernel command line; returns what was wrong with them, one sentence each,
    /// beside.
    #[must_use]
    pub fn parse(cmdline: &str) -> (Self, Vec<String>) {
        let mut config = Self::default();
        let mut problems = Vec::new();
        for word in words(cmdline) {
            let (key, value) = match word.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (word, None),
            };
            let Some(name) = key.strip_prefix("task.") else { continue };
            if let Err(problem) = config.set(name, value.as_deref()) {
                problems.push(format!("kernel command line: {key}: {problem}"));
            }
        }
        if config.debug {
            config.log_level = config.log_level.max(LevelFilter::Debug);
        }
        (config, problems)
    }

    fn set(&mut self, name: &str, value: Option<&str>) -> Result<(), String> {
        match name {
            "log_level" => {
                let text = value.unwrap_or_default();
                self.log_level = text.parse().map_err(|_| {
                    format!(
                        "{text:?} is none of off, error, warn, info, debug, trace; using {}",
                        self.log_level.as_str().to_lowercase()
                    )
                })?;
            }
            "ready_port" => {
                let text = value.unwrap_or_default();
                self.ready_port = text
                    .parse()
                    .map_err(|_| format!("{text:?} is no port of vsock; using {}", self.ready_port))?;
            }
            "sharefs_type" => {
                self.share = match value.unwrap_or_default() {
                    "virtiofs" => ShareFs::Virtiofs,
                    "9p" => ShareFs::NineP,
                    "none" => ShareFs::None,
                    other => return Err(format!("{other:?} is none of virtiofs, 9p, none; using virtiofs")),
                }
            }
            "cgroup" => {
                self.cgroup = match value.unwrap_or_default() {
                    "v2" => CgroupVersion::V2,
                    "v1" => CgroupVersion::V1,
                    other => return Err(format!("{other:?} is neither v1 nor v2; using v2")),
                }
            }
            "debug" => {
                self.debug = match value {
                    None | Some("" | "true" | "1") => true,
                    Some("false" | "0") => false,
                    Some(other) => return Err(format!("{other:?} is neither true nor false; using false")),
                }
            }
            "debug_shell" => {
                let path = Path::new(value.unwrap_or_default());
                if !path.is_absolute() {
                    return Err(format!(
                        "{:?} is no absolute path; there is no debug console",
                        path.display()
                    ));
                }
                self.debug_shell = Some(path.to_owned());
            }
            // Known to other versions of the agent; said once, so that nobody waits for its effect.
            "enable_tracing" => return Err("has no effect in this agent".to_owned()),
            _ => return Err(format!("unknown parameter; {}", hint(name))),
        }
        Ok(())
    }
}

/// Suggests the parameter that was probably meant: the one known parameter that is close, or else all of
/// them.
fn hint(name: &str) -> String {
    let close = KNOWN.into_iter().map(|known| (strsim::levenshtein(name, known), known)).min();
    match close {
        Some((distance, known)) if distance <= known.len() / 3 => format!("did you mean task.{known}?"),
        _ => format!("known are {}", KNOWN.map(|known| format!("task.{known}")).join(", ")),
    }
}

/// Splits a command line as the kernel does: at white space outside double quotes, which are dropped.
pub(crate) fn words(cmdline: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in cmdline.chars() {
        match c {
            '"' => quoted = !quoted,
            c if c.is_ascii_whitespace() && !quoted => words.push(String::new()),
            c => {
                if let Some(word) = words.last_mut() {
                    word.push(c);
                }
            }
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_read_and_others_left_alone() {
        let (config, problems) = TaskConfig::parse(
            "console=ttyS0 root=/dev/pmem0p1 task.log_level=info task.sharefs_type=9p task.cgroup=v1 task.debug task.debug_shell=/bin/sh task.ready_port=77 quiet\n",
        );
        assert_eq!(problems, Vec::<String>::new());
        assert_eq!(
            config,
            TaskConfig {
                log_level: LevelFilter::Debug,
                ready_port: 77,
                share: ShareFs::NineP,
                cgroup: CgroupVersion::V1,
                debug: true,
                debug_shell: Some("/bin/sh".into())
            }
        );
        assert_eq!(TaskConfig::parse("").0, TaskConfig::default());
    }

    #[test]
    fn quotes_keep_words_together() {
        assert_eq!(words("a \"b c\"=1 task.log_level=\"info\""), ["a", "b c=1", "task.log_level=info"]);
        assert_eq!(TaskConfig::parse("x=\" task.debug \"").0, TaskConfig::default());
    }

    #[test]
    fn wrong_values_are_reported_and_defaults_kept() {
        let (config, problems) = TaskConfig::parse(
            "task.log_level=loud task.sharefs_type=nfs task.debug=maybe task.colour=red task.debug_shell=sh task.loglevel=info task.cgroup=v3 task.ready_port=-1",
        );
        assert_eq!(config, TaskConfig::default());
        assert_eq!(
            problems,
            [
                "kernel command line: task.log_level: \"loud\" is none of off, error, warn, info, debug, trace; using warn",
                "kernel command line: task.sharefs_type: \"nfs\" is none of virtiofs, 9p, none; using virtiofs",
                "kernel command line: task.debug: \"maybe\" is neither true nor false; using false",
                "kernel command line: task.colour: unknown parameter; known are task.cgroup, task.debug, task.debug_shell, task.log_level, task.ready_port, task.sharefs_type",
                "kernel command line: task.debug_shell: \"sh\" is no absolute path; there is no debug console",
                "kernel command line: task.loglevel: unknown parameter; did you mean task.log_level?",
                "kernel command line: task.cgroup: \"v3\" is neither v1 nor v2; using v2",
                "kernel command line: task.ready_port: \"-1\" is no port of vsock; using 4294967294",
            ]
        );
    }
}
