//! Relay between containerd's Task API and one pod's microVM.

fn main() {}
