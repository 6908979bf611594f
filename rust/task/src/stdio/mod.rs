//! Standard streams of containers, each on a connection of its own to guest port 1026 (see
//! [`kuasar_common::stdio`]).

pub mod console;
pub mod fd;
pub mod listener;
pub mod output;
pub mod process_io;
pub mod registry;
pub mod stdin;
