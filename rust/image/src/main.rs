//! Builds, inspects and verifies guest images: initrd, disk image, DAX header.

fn main() {}
