//! Puts the eBPF object where the agent embeds it from, building it first if need be.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[allow(dead_code, reason = "shared with xtask, which uses the rest")]
#[path = "../xtask/src/ebpf.rs"]
mod ebpf;

fn main() -> ExitCode {
    match embed().and_then(|()| plugin_apis()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Cargo prints each such line as an error of this crate, without a panic's noise.
            for line in error.to_string().lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

/// Generates the APIs of plugins, without an installed protoc.
fn plugin_apis() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = [
        "proto/csi.proto",
        "proto/deviceplugin.proto",
        "proto/pluginregistration.proto",
    ];
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}

fn embed() -> Result<(), Box<dyn std::error::Error>> {
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?);
    let root = root
        .parent()
        .ok_or("the agent's crate has no parent directory")?;
    println!("cargo::rerun-if-env-changed={}", ebpf::OBJECT_VARIABLE);
    println!(
        "cargo::rerun-if-changed={}",
        root.join("xtask/src/ebpf.rs").display()
    );
    for source in ebpf::SOURCES {
        println!("cargo::rerun-if-changed={}", root.join(source).display());
    }
    // Program logs belong to debug builds: each call costs kilobytes of code.
    let debug = std::env::var("PROFILE").is_ok_and(|profile| profile == "debug");
    let variant = if debug {
        ebpf::Variant::Logging
    } else {
        ebpf::Variant::Release
    };
    let object = ebpf::build(root, variant)?;
    println!("cargo::rerun-if-changed={}", object.display());
    std::fs::copy(
        object,
        Path::new(&std::env::var("OUT_DIR")?).join("gantry.o"),
    )?;
    Ok(())
}
