//! What programs hold, counted: what must not grow with use.

use std::{collections::BTreeMap, fmt, fs};

use anyhow::{Context, Result};

use crate::lab::Lab;

/// What one process holds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Open descriptors.
    pub descriptors: usize,
    /// Proportional share of its memory, in KiB.
    pub pss_kib: u64,
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} descriptors, {} KiB", self.descriptors, self.pss_kib)
    }
}

impl Usage {
    /// Of a process.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn of(pid: u32) -> Result<Self> {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))
            .with_context(|| format!("counting the descriptors of process {pid}"))?
            .count();
        let rollup = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&rollup).with_context(|| format!("reading {rollup}"))?;
        let pss = text.lines().find_map(|line| line.strip_prefix("Pss:"));
        let pss = pss.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
        Ok(Self { descriptors, pss_kib: pss.with_context(|| format!("{rollup} has no Pss"))? })
    }
}

/// Of containerd and the daemons, by name.
///
/// # Errors
/// When one of them is not running.
pub async fn of_programs(lab: &Lab) -> Result<BTreeMap<String, Usage>> {
    let programs = lab.programs().await;
    programs.into_iter().map(|(name, pid)| Ok((name, Usage::of(pid)?))).collect()
}

/// Processes whose command line starts with a program of that name and has all these words in it.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn processes(program: &str, words: &[&str]) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("reading /proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        let mut parts = line.split('\0');
        let name = parts.next().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
        let rest: Vec<_> = parts.collect();
        if name == program && words.iter().all(|word| rest.iter().any(|part| part.contains(word))) {
            found.push(pid);
        }
    }
    Ok(found)
}
