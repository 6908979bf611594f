//! Protocols, constants and shared records of Kuasar for Nix.
//!
//! Nothing in here knows a host or a guest: daemon, relay, agent and tools all build on it.

pub mod address;
pub mod api;
pub mod console;
pub mod constants;
pub mod forward;
pub mod handshake;
pub mod host_socket;
pub mod netlink;
pub mod nftables;
pub mod param;
pub mod stdio;
pub mod storage;
pub mod streaming;
pub mod text;
