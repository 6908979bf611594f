//! A thin pool of the device mapper, for containerd's devmapper snapshotter; where the kernel has one, as
//! that of `tests/lab/machine` has.

use std::{fs, path::Path};

use anyhow::Result;
use tokio::process::Command;

use super::program::run;
use crate::machine::Machine;

const LOSETUP: &str = "/sbin/losetup";
const DMSETUP: &str = "/sbin/dmsetup";
/// Has the tools make nodes of devices themselves: a lab has a `/run` of its own, and in it no udev that
/// would.
pub(super) const NO_UDEV: (&str, &str) = ("DM_DISABLE_UDEV", "1");
/// Bytes of a sector, which is what sizes are counted in.
const SECTOR: u64 = 512;
const DATA: u64 = 256 << 20;
const METADATA: u64 = 4 << 20;

/// Reason why there is none; `None` where there is one.
#[must_use]
pub fn missing() -> Option<String> {
    let wanted = [LOSETUP, DMSETUP, "/sbin/mkfs.ext4", "/dev/mapper/control"];
    if let Some(missing) = wanted.iter().find(|path| !Path::new(path).exists()) {
        return Some(format!("there is no {missing}; tests/lab/machine has one"));
    }
    let targets = std::process::Command::new(DMSETUP).arg("targets").envs([NO_UDEV]).output();
    let known = targets.is_ok_and(|said| {
        String::from_utf8_lossy(&said.stdout).lines().any(|name| name.starts_with("thin-pool "))
    });
    (!known).then(|| "the kernel has no thin pools: load dm_thin_pool, as tests/lab/machine does".to_owned())
}

/// The pool.
#[derive(Debug)]
pub(super) struct ThinPool {
    name: String,
    loops: Vec<String>,
}

fn dmsetup() -> Command {
    let mut command = Command::new(DMSETUP);
    command.envs([NO_UDEV]);
    command
}

/// Its name, which is this lab's alone.
pub(super) fn name_in(machine: &Machine) -> String {
    machine.root.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

impl ThinPool {
    pub(super) async fn make(machine: &Machine) -> Result<Self> {
        let mut pool = Self { name: name_in(machine), loops: Vec::new() };
        for (file, size) in [("thin-metadata", METADATA), ("thin-data", DATA)] {
            let file = machine.root.join(file);
            fs::File::create(&file)?.set_len(size)?;
            let made = run(Command::new(LOSETUP).args(["--find", "--show"]).arg(&file)).await?;
            pool.loops.push(String::from_utf8_lossy(&made).trim().to_owned());
        }
        // Blocks of 64 KiB; the pool says when it has 8 MiB left.
        let table = format!("0 {} thin-pool {} 128 128", DATA / SECTOR, pool.loops.join(" "));
        if let Err(error) = run(dmsetup().args(["create", &pool.name, "--table", &table])).await {
            let _ = pool.free_loops().await;
            return Err(error.context("making a thin pool"));
        }
        Ok(pool)
    }

    /// With all that containerd has made of it; containerd has ended.
    pub(super) async fn remove(&self) -> Result<()> {
        let listed = run(dmsetup().args(["info", "--columns", "--noheadings", "-o", "name"])).await?;
        let listed = String::from_utf8_lossy(&listed).into_owned();
        let prefix = format!("{}-", self.name);
        let devices = listed.lines().map(str::trim).filter(|name| name.starts_with(&prefix));
        for device in devices.chain([&*self.name]) {
            run(dmsetup().args(["remove", device])).await?;
        }
        self.free_loops().await
    }

    async fn free_loops(&self) -> Result<()> {
        for device in &self.loops {
            run(Command::new(LOSETUP).args(["--detach", device])).await?;
        }
        Ok(())
    }
}
