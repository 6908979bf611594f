//! containerd sandbox controller that runs every pod in a microVM.
