//! containerd sandbox controller that runs every pod in a microVM.
//!
//! `controller` speaks gRPC with containerd, `pod` owns a pod's life, `container` what a container needs on the host,
//! `vmm` and `network` the VM. Imports go down in that order.

pub mod config;
pub mod container;
pub mod network;
pub mod process;
pub mod protos;
pub mod vmm;
