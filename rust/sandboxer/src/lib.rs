//! containerd sandbox controller that runs every pod in a microVM.
//!
//! [`controller`] speaks gRPC with containerd, [`pod`] owns a pod's life, [`container`] what a container
//! needs on the host, [`containerd`] asks containerd, [`guest`] talks to the agent; [`vmm`], [`network`] and
//! [`process`] are below all of them.

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "tests work in folders of their own"))]

pub mod args;
mod clock;
pub mod config;
pub mod container;
pub mod containerd;
pub mod controller;
mod crash;
pub mod daemon;
mod file_system;
mod frugal;
#[doc(hidden)]
pub mod fuzz;
pub mod guest;
mod incoming;
pub mod network;
mod notify;
mod place;
pub mod pod;
pub mod process;
pub mod protos;
mod replace;
#[cfg(test)]
mod testing;
pub mod trace;
pub mod vmm;
