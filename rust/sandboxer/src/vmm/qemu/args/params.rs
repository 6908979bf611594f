//! QEMU's options, one struct each.

use std::{
    os::fd::RawFd,
    path::{Path, PathBuf},
};

use kuasar_common::param::{bool_to_on_off, escape_commas, vec_to_string};
use kuasar_derive::{CmdLineParamSet, CmdLineParams};

/// All of it, in this order.
#[derive(Debug, CmdLineParamSet)]
pub(in super::super) struct CommandLine {
    pub(super) name: Name,
    pub(super) no_user_config: bool,
    pub(super) nodefaults: bool,
    pub(super) no_reboot: bool,
    pub(super) display: &'static str,
    pub(super) sandbox: Sandbox,
    pub(super) add_fds: Vec<AddFd>,
    pub(super) machine: MachineType,
    pub(super) accel: AccelType,
    pub(super) global: Option<&'static str>,
    pub(super) cpu: String,
    pub(super) smp: Smp,
    #[param(key = "m")]
    pub(super) memory: String,
    pub(super) kernel: String,
    pub(super) initrd: Option<String>,
    pub(super) append: String,
    pub(super) objects: Vec<Object>,
    pub(super) chardevs: Vec<Chardev>,
    pub(super) mons: Vec<Mon>,
    pub(super) blockdevs: Vec<Blockdev>,
    pub(super) fsdev: Option<Fsdev>,
    pub(super) netdevs: Vec<Netdev>,
    pub(super) devices: Vec<Device>,
}

#[derive(Debug, CmdLineParams)]
pub(super) struct Name {
    #[property(generator = "escape_commas")]
    pub(super) guest: String,
    #[property(generator = "bool_to_on_off")]
    pub(super) debug_threads: bool,
}

/// QEMU's sandbox: system calls that a QEMU that a guest has taken over may not make.
#[derive(Debug, CmdLineParams)]
pub(super) struct Sandbox {
    #[property(ignore_key, generator = "bool_to_on_off")]
    pub(super) on: bool,
    pub(super) obsolete: &'static str,
    pub(super) elevateprivileges: &'static str,
    pub(super) spawn: &'static str,
    pub(super) resourcecontrol: &'static str,
}

#[derive(Debug, CmdLineParams)]
#[params("machine")]
pub(super) struct MachineType {
    #[property(ignore_key)]
    pub(super) kind: &'static str,
    pub(super) memory_backend: &'static str,
    /// Options that leave out parts that a microVM has no use for, and the firmware would spend time on.
    #[property(ignore_key)]
    pub(super) without: &'static str,
}

/// A descriptor that QEMU inherits, as `/dev/fdset/<set>`.
#[derive(Debug, CmdLineParams)]
pub(super) struct AddFd {
    pub(super) fd: RawFd,
    pub(super) set: usize,
    #[property(generator = "escape_commas")]
    pub(super) opaque: String,
}

#[derive(Debug, CmdLineParams)]
#[params("accel")]
pub(super) struct AccelType {
    #[property(ignore_key)]
    pub(super) kind: &'static str,
    pub(super) device: Option<String>,
}

#[derive(Debug, CmdLineParams)]
pub(super) struct Smp {
    pub(super) cpus: u32,
    /// One CPU each: the firmware's table, which the guest reads without ACPI, lists sockets only.
    pub(super) sockets: u32,
    pub(super) cores: u32,
    pub(super) threads: u32,
}

#[derive(Debug, CmdLineParams)]
pub(super) struct Object {
    #[property(ignore_key)]
    pub(super) kind: &'static str,
    pub(super) id: &'static str,
    #[property(generator = "path")]
    pub(super) mem_path: Option<PathBuf>,
    pub(super) size: String,
    #[property(generator = "bool_to_on_off")]
    pub(super) share: bool,
    #[property(generator = "bool_to_on_off")]
    pub(super) readonly: Option<bool>,
}

#[derive(Debug, CmdLineParams)]
pub(super) struct Chardev {
    #[property(ignore_key)]
    pub(super) kind: &'static str,
    pub(super) id: &'static str,
    pub(super) fd: RawFd,
    #[property(generator = "bool_to_on_off")]
    pub(super) server: Option<bool>,
    #[property(generator = "bool_to_on_off")]
    pub(super) wait: Option<bool>,
}

#[derive(Debug, CmdLineParams)]
pub(super) struct Mon {
    pub(super) chardev: &'static str,
    pub(super) mode: &'static str,
}

/// A file's bytes as a disk. Unlike `-drive`, it is opened once, in the mode in which it is given.
#[derive(Debug, CmdLineParams)]
pub(super) struct Blockdev {
    pub(super) driver: &'static str,
    #[property(generator = "escape_commas")]
    pub(super) node_name: String,
    #[property(generator = "bool_to_on_off")]
    pub(super) read_only: bool,
    #[property(key = "file.driver")]
    pub(super) file_driver: &'static str,
    #[property(key = "file.filename")]
    pub(super) filename: String,
}

#[derive(Debug, CmdLineParams)]
pub(super) struct Fsdev {
    #[property(ignore_key)]
    pub(super) driver: &'static str,
    pub(super) id: &'static str,
    #[property(generator = "path")]
    pub(super) path: PathBuf,
    #[property(key = "security_model")]
    pub(super) security_model: &'static str,
    pub(super) multidevs: &'static str,
}

#[derive(Debug, CmdLineParams)]
pub(super) struct Netdev {
    #[property(ignore_key)]
    pub(super) kind: &'static str,
    #[property(generator = "escape_commas")]
    pub(super) id: String,
    #[property(generator = "vec_to_string")]
    pub(super) fds: Vec<RawFd>,
    #[property(generator = "bool_to_on_off")]
    pub(super) vhost: Option<bool>,
    #[property(generator = "vec_to_string")]
    pub(super) vhostfds: Option<Vec<RawFd>>,
}

#[derive(Debug, Default, CmdLineParams)]
pub(super) struct Device {
    #[property(ignore_key)]
    pub(super) driver: String,
    #[property(generator = "escape_commas")]
    pub(super) id: String,
    pub(super) bus: Option<String>,
    pub(super) addr: Option<String>,
    pub(super) memdev: Option<&'static str>,
    pub(super) chardev: Option<&'static str>,
    pub(super) tag: Option<&'static str>,
    pub(super) fsdev: Option<&'static str>,
    #[property(key = "mount_tag")]
    pub(super) mount_tag: Option<&'static str>,
    pub(super) guest_cid: Option<u32>,
    pub(super) vhostfd: Option<RawFd>,
    #[property(generator = "escape_commas")]
    pub(super) drive: Option<String>,
    #[property(generator = "escape_commas")]
    pub(super) netdev: Option<String>,
    pub(super) mac: Option<String>,
    #[property(generator = "bool_to_on_off")]
    pub(super) mq: Option<bool>,
    pub(super) vectors: Option<usize>,
    #[property(generator = "escape_commas")]
    pub(super) serial: Option<String>,
    #[property(key = "chassis_nr")]
    pub(super) chassis_nr: Option<u32>,
    #[property(generator = "bool_to_on_off")]
    pub(super) shpc: Option<bool>,
    #[property(generator = "bool_to_on_off")]
    pub(super) free_page_reporting: Option<bool>,
    /// Empty: no boot ROM.
    pub(super) romfile: Option<&'static str>,
}

fn path(path: &Path) -> String {
    escape_commas(&path.display())
}
