//! Derive macros that turn structs into command lines.
