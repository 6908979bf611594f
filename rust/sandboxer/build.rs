//! Compiles the gRPC protocols into `OUT_DIR` with a compiler in Rust: no `protoc`, and the source tree may
//! be read-only.

use std::{env, error::Error, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=protos");
    let out = env::var("OUT_DIR")?;
    let descriptors = protox::compile(
        ["controller.proto", "store.proto", "cri.proto", "cgroups_v1.proto", "cgroups_v2.proto"],
        ["protos"],
    )?;
    tonic_prost_build::configure()
        // Of the list of sandboxes the daemon is a client, and of the controller its tests are.
        .build_client(true)
        .build_transport(false)
        .include_file("protos.rs")
        .out_dir(Path::new(&out))
        .compile_fds(descriptors)?;
    Ok(())
}
