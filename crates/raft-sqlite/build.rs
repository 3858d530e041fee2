//! Compiles proto/*.proto with protox, so that nobody needs protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    // First: it leaves an empty file for the package that it only refers to.
    let client = protox::compile(["proto/client.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .bytes(".")
        .extern_path(".raftsqlite.peer.v1", "crate::network::proto")
        .compile_fds(client)?;
    let peer = protox::compile(["proto/peer.proto"], ["proto"])?;
    tonic_prost_build::configure().bytes(".").compile_fds(peer)?;
    Ok(())
}
