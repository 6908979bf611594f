//! Generates the clients of CRI and containerd from the trimmed protos, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files =
        protox::compile(["proto/containers.proto", "proto/cri.proto", "proto/sandbox.proto"], ["proto"])?;
    tonic_prost_build::configure().build_server(false).compile_fds(files)?;
    Ok(())
}
