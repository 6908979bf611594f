//! The parts of the relay between containerd's Task API and one pod's microVM.
//!
//! One small process per pod, which outlives the daemon: containerd connects to a Task endpoint once per
//! container and never again, so the process that serves it must live as long as the pod. It passes calls on
//! to the agent in the guest, copies stdio, and asks the daemon for a container's needs of the host. It holds
//! no policy and reads no OCI configuration.
//!
//! Nothing of a guest's is passed on as it came: answers, events, figures and errors are values of known
//! types about this pod, built anew from what could be understood.
//!
//! Public is what the program needs, and what the fuzz targets reach.

mod answer;
pub mod args;
mod bucket;
mod caller;
mod create;
mod delete;
mod events;
mod fifo;
pub mod figures;
mod forward;
pub mod guest;
mod host;
mod host_socket;
mod life;
mod log;
pub mod oneshot;
mod pids;
pub mod probe;
mod pump;
mod registry;
mod rights;
pub mod serve;
mod stdio;
mod streams;
mod stuck;
mod task;
mod vm;
