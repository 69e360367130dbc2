//! The measuring half of `cargo xtask bench`: one benchmark per run, figures to a JSON file.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};
use gantry_tests::bench::{self, control, probe, services};
use gantry_tests::cluster::Installation;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gantry-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<()> {
    match arguments {
        // No thread may have been started: a probe enters namespaces and clones itself.
        [probe, rest @ ..] if probe == "probe" => probe::main(rest),
        [name, out, options @ ..] if name == "services" && !out.starts_with('-') => {
            services::run(Path::new(out), &services::Options::parse(options)?)
        }
        [name, out, options @ ..] if name == "control" && !out.starts_with('-') => {
            control::run(Path::new(out), &control::Options::parse(options)?)
        }
        [name, out, options @ ..] if matches!(options, [] | [_]) && !out.starts_with('-') => {
            let size = match options {
                [] => bench::Size::Whole,
                [quick] if quick == "--quick" => bench::Size::Quick,
                other => bail!("{other:?}: the one option of {name} is --quick"),
            };
            let installation = Installation::find().map_err(anyhow::Error::msg)?;
            bench::run(name, size, &installation, Path::new(out))
        }
        _ => bail!(
            "this is a part of `cargo xtask bench`: gantry-bench NAME DIRECTORY [--quick], NAME one of {}, \
             services, control",
            bench::NAMES.join(", ")
        ),
    }
}
