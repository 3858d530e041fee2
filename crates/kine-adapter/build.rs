//! Compiles the etcd v3 API in proto/ with protox, so that nobody needs protoc: messages, clients, servers, and the
//! descriptors that gRPC reflection serves.

use std::{env, fs, path::PathBuf};

const FILES: [&str; 5] = [
    "mvccpb/kv.proto",
    "authpb/auth.proto",
    "etcdserverpb/rpc.proto",
    "v3lockpb/v3lock.proto",
    "v3electionpb/v3election.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true).open_files(FILES)?;
    let descriptors = compiler.file_descriptor_set();
    compiler.include_source_info(false);
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("etcd_descriptors.bin"), compiler.encode_file_descriptor_set())?;
    // `bytes`: keys and values are slices of what was received, never copies.
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
