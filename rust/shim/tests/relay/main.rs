//! The relay as containerd sees it, between a guest and a daemon that are not.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that cannot go on fails"
)]

mod failures;
#[path = "../fake/mod.rs"]
mod fake;
mod fifos;
mod hostile;
mod io;
mod life;
mod pod;
mod sockets;
mod streams;
