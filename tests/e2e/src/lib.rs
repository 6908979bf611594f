//! Black-box tests and demo over CRI: a stock containerd and the daemon, started in a machine of their own,
//! driven the way the kubelet drives them.
//!
//! - [`machine`]: private mount, network and PID namespaces around everything, and the check that nothing is
//!   left
//! - [`paths`]: where the programs and artefacts under test are, and what to run when one is missing
//! - [`image`]: OCI images made from files, without a registry
//! - [`lab`]: containerd and the daemons in that machine
//! - [`conformance`]: the table of `docs/cri-conformance.md`, and what came out against it
//! - [`cri`]: the client, one method per call
//! - [`store`]: containerd's own list of sandboxes
//! - [`suite`]: test list to exit status
//! - [`trace`]: where the daemon says that time goes
//! - [`usage`]: what programs hold
//! - [`websocket`]: the client side of CRI's streams

pub mod conformance;
pub mod cri;
pub mod image;
pub mod lab;
pub mod leaks;
pub mod machine;
pub mod paths;
pub mod services;
pub mod suite;
pub mod trace;
pub mod usage;
pub mod websocket;
