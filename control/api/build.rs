//! Generates the gRPC code from `proto/` without an installed protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "proto/gantry/v1/objects.proto",
        "proto/gantry/v1/feed.proto",
        "proto/gantry/v1/stats.proto",
        "proto/gantry/v1/images.proto",
        "proto/gantry/v1/joining.proto",
        "proto/gantry/v1/access.proto",
        "proto/gantry/v1/store.proto",
    ];
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure()
        .bytes(".")
        .compile_fds(descriptors)?;
    Ok(())
}
