//! Compiles the gRPC protocols into `OUT_DIR` with a compiler in Rust: no `protoc`, and the source tree may be read-only.

use std::{env, error::Error, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=protos");
    let out = env::var("OUT_DIR")?;
    let descriptors = protox::compile(["controller.proto", "cri.proto"], ["protos"])?;
    tonic_prost_build::configure()
        // Tests drive the server with the client; unused in the daemon, the linker drops it.
        .build_client(true)
        .build_transport(false)
        .include_file("protos.rs")
        .out_dir(Path::new(&out))
        .compile_fds(descriptors)?;
    Ok(())
}
