//! PID 1 of the microVM: runs the pod's containers.
//!
//! The agent boots the guest, tells the host that it is ready, and serves containerd's Task API and the pod's
//! own `SandboxService`. One thread does it all, so nothing in it may block for long; what the kernel may
//! take its time for (mounts, files of the share) is done in threads that come and go.

pub mod auth;
pub mod boot;
pub mod calls;
pub mod cgroup;
pub mod cgroup_v1;
pub mod clock;
pub mod config;
pub mod console;
pub mod container;
pub mod devices;
pub mod error;
pub mod events;
pub mod forward;
pub mod guest_devices;
pub mod handshake;
pub mod hooks;
pub mod host_socket;
mod launch;
pub mod limits;
pub mod logging;
pub mod metrics;
pub mod netlink;
pub mod oom;
pub mod pid_namespace;
pub mod process;
pub mod reaper;
pub mod role;
pub mod runc;
pub mod sandbox;
pub mod sandbox_service;
pub mod serve;
pub mod spec;
pub mod stdio;
pub mod storage;
pub mod strangers;
pub mod streaming;
pub mod task_service;
pub mod tasks;
pub mod transport;
mod unified;
pub mod vm_process;
mod vm_size;
