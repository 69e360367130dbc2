//! `gantry-bridge`: the bridge CNI plugin, for container runtimes other than the agent.
//!
//! The agent calls the same code in process. One thread, no logging: stdout belongs to CNI.

use std::io::{Read, Write};
use std::process::ExitCode;

use gantry_cni::plugin::{Environment, run};

/// A network configuration with its prevResult is a few KiB.
const STDIN_SIZE_MAX: u64 = 1 << 20;

fn main() -> ExitCode {
    let environment =
        Environment::new(std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        }));
    let mut stdin = Vec::new();
    let read = std::io::stdin()
        .lock()
        .take(STDIN_SIZE_MAX)
        .read_to_end(&mut stdin);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let (runtime, _) = match (runtime, read) {
        (Ok(runtime), Ok(size)) => (runtime, size),
        (Err(error), _) | (_, Err(error)) => {
            eprintln!("gantry-bridge: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(run(&environment, &stdin));
    if let Some(output) = &outcome.output {
        let written = writeln!(std::io::stdout().lock(), "{output:#}");
        if written.is_err() {
            return ExitCode::FAILURE;
        }
    }
    if outcome.success {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
