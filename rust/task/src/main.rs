//! PID 1 of the microVM: runs the pod's containers.

fn main() {}
