//! Compiles proto/peer.proto with protox, so that nobody needs protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = "proto/peer.proto";
    println!("cargo:rerun-if-changed={file}");
    let descriptors = protox::compile([file], ["proto"])?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
