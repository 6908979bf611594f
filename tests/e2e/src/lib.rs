//! Black-box tests and demo over CRI.
