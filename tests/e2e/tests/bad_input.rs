//! Bad input: every refusal is one that a person can act on.

fn main() {}
