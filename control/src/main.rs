//! `gantry-control`: logging, configuration, build, serve, signal, drain.
//!
//! Exit codes: 0 stopped by a signal, 1 could not start or serve, 64 (EX_USAGE) bad configuration.

#![forbid(unsafe_code)]

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser as _;
use gantry_api::service_manager::ServiceManager;
use gantry_control::config::{Arguments, Command};
use gantry_control::run::{Control, StartError};
use gantry_control::{open_files, restore};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

const EXIT_FAILED: u8 = 1;
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are no errors; a closed terminal is none of ours.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { EXIT_USAGE } else { 0 });
        }
    };
    if let Err(code) = check(&arguments) {
        return code;
    }
    if let Some(Command::Restore(arguments)) = &arguments.command {
        return match restore::run(arguments) {
            Ok(words) => {
                // Nobody reading it is fine: it is done.
                let _ = std::io::stdout().write_all(words.as_bytes());
                ExitCode::SUCCESS
            }
            Err(error) => fail(&error.to_string(), EXIT_FAILED),
        };
    }
    open_files::raise();
    // Every TLS user of this process takes the same provider; a second call could only repeat it.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("cannot start threads: {error}"), EXIT_FAILED),
    };
    match runtime.block_on(serve(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error.to_string(), EXIT_FAILED),
    }
}

fn check(arguments: &Arguments) -> Result<(), ExitCode> {
    let filter = EnvFilter::try_new(&arguments.log).map_err(|error| {
        let text = format!("--log {}: {error}", arguments.log);
        fail(&text, EXIT_USAGE)
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    arguments
        .check()
        .map_err(|error| fail(&error.to_string(), EXIT_USAGE))
}

async fn serve(arguments: &Arguments) -> Result<(), StartError> {
    let stop = CancellationToken::new();
    // Before anything is started, so that a signal during the start is not lost.
    let signals = Signals::install()?;
    let control = Control::start(arguments, &stop).await?;
    let address = control.address();
    let ready = format!(
        "gantry-control ready: {}, revision {}, kubeconfig {}\n",
        Arguments::server_url(address),
        control.registry().store().revision(),
        arguments.kubeconfig.display(),
    );
    // The one line on stdout; nobody reading it is fine.
    let _ = std::io::stdout().write_all(ready.as_bytes());
    let manager = Arc::new(ServiceManager::from_environment());
    manager.ready(ready.trim_end());
    tokio::spawn(keep_alive(manager.clone(), stop.clone()));
    tokio::select! {
        // Cancel safe: a signal stays pending, `ended` only observes.
        name = signals.wait() => tracing::info!(signal = name, "stopping"),
        () = control.ended() => tracing::error!("the server has ended by itself"),
    }
    manager.stopping();
    stop.cancel();
    control.drain().await
}

/// Tells the service manager that this runtime still gets its turns.
async fn keep_alive(manager: Arc<ServiceManager>, stop: CancellationToken) {
    let Some(interval) = manager.interval() else {
        return;
    };
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // Cancel safe: a tick that is not taken comes again.
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        manager.alive();
    }
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn install() -> Result<Signals, StartError> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Signals {
            terminate: signal(SignalKind::terminate()).map_err(StartError::Signals)?,
            interrupt: signal(SignalKind::interrupt()).map_err(StartError::Signals)?,
        })
    }

    async fn wait(mut self) -> &'static str {
        tokio::select! {
            // Both arms are cancel safe.
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

fn fail(text: &str, code: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "gantry-control: {text}");
    ExitCode::from(code)
}
