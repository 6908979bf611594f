//! Counts of the things that programs hold and that must not grow with use.

use std::{collections::BTreeMap, fmt, fs};

use anyhow::{Context, Result};

use crate::lab::Lab;

/// Things that one process holds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Proportional share of its memory, in KiB.
    pub pss_kib: u64,
    /// The part of that which is of no file: what a leak would grow.
    pub anonymous_kib: u64,
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { descriptors, threads, pss_kib, anonymous_kib } = self;
        write!(
            f,
            "{descriptors} descriptors, {threads} threads, {pss_kib} KiB, of these {anonymous_kib} anonymous"
        )
    }
}

impl Usage {
    /// Of a process.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn of(pid: u32) -> Result<Self> {
        let count = |folder: &str| -> Result<usize> {
            let path = format!("/proc/{pid}/{folder}");
            Ok(fs::read_dir(&path).with_context(|| format!("reading {path}"))?.count())
        };
        let (descriptors, threads) = (count("fd")?, count("task")?);
        let rollup = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&rollup).with_context(|| format!("reading {rollup}"))?;
        let value = |key: &str| -> Result<u64> {
            let rest = text.lines().find_map(|line| line.strip_prefix(key));
            let value = rest.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
            value.with_context(|| format!("{rollup} has no {key}"))
        };
        Ok(Self { descriptors, threads, pss_kib: value("Pss:")?, anonymous_kib: value("Pss_Anon:")? })
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
