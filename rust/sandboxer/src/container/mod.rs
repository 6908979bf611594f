//! The host's part of a container: its spec rewritten for the VM, its root file system and volumes below the
//! pod's shared folder.

mod disks;
mod error;
mod exports;
mod host_disk;
mod host_mount;
mod layers;
pub mod mount;
pub mod mountinfo;
mod nodes;
mod plan;
pub mod remove;
mod sockets;
pub mod spec;
mod storage;
mod tree;
mod volumes;

pub(crate) use self::storage::write_new;
pub use self::{
    disks::{Disks, Room},
    plan::Plan,
    sockets::HostSocket,
    storage::{Storage, StorageError, is_safe_id},
};

#[cfg(test)]
mod hostile_tests;
