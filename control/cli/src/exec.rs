//! `gantry exec`: a command in a container, with its terminal, signals by keys, and exit code.
//!
//! The terminal is made raw only while the command runs, by a guard that restores it on every way
//! out: end of the command, error, panic, SIGTERM and SIGHUP.

use crate::Global;
use crate::connection::Session;
use crate::failure::Failure;
use crate::logs::{default_container, resolve_pod};
use crate::names;
use clap::Args;
use gantry_api::kinds::resolve;
use gantry_api::proto::{ExecInput, ExecOutput, ExecStart, TerminalSize, exec_input, exec_output};
use rustix::termios::{self, OptionalActions, Termios};
use serde_json::Value;
use std::io::{Read as _, Write as _};
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

/// Bytes of stdin in one message.
const STDIN_CHUNK_BYTES: usize = 16 * 1024;
/// Messages on their way to the server.
const INPUT_QUEUE: usize = 16;
/// Exit code when the command cannot be started, as shells have it.
const NOT_STARTED: u8 = 126;

#[derive(Args, Debug)]
pub(crate) struct Exec {
    /// A pod, or type/name (deploy/web)
    #[arg(required = true, num_args = 1..=2, value_name = "POD|TYPE/NAME")]
    words: Vec<String>,
    /// Container
    #[arg(short, long)]
    container: Option<String>,
    /// Pass stdin to the command
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Nothing but the command's own output
    #[arg(short, long)]
    quiet: bool,
    /// The command and its arguments, after --
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// A raw terminal that becomes what it was when this is dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn enter() -> std::io::Result<Self> {
        let stdin = std::io::stdin();
        let before = termios::tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may be gone (hang-up): then there is nothing to restore.
        let _ = termios::tcsetattr(std::io::stdin(), OptionalActions::Now, &self.before);
    }
}

fn terminal_size() -> Option<TerminalSize> {
    let size = termios::tcgetwinsize(std::io::stdout()).ok()?;
    Some(TerminalSize {
        columns: u32::from(size.ws_col),
        rows: u32::from(size.ws_row),
    })
    .filter(|size| size.columns > 0 && size.rows > 0)
}

fn input(input: exec_input::Input) -> ExecInput {
    ExecInput { input: Some(input) }
}

impl Exec {
    pub(crate) async fn run(&self, global: &Global) -> Result<ExitCode, Failure> {
        let pods =
            resolve("pods").ok_or_else(|| Failure::local("this build does not know pods"))?;
        let (kind, name) = names::one(&self.words, Some(pods))?;
        let session = Session::open(global).await?;
        let pod = resolve_pod(&session, kind, &name).await?;
        let start = self.start(&session, &pod)?;
        let raw = if start.tty && start.stdin {
            Some(RawTerminal::enter()?)
        } else {
            None
        };
        let result = self.stream(&session, start).await;
        drop(raw);
        result
    }

    fn start(&self, session: &Session, pod: &Value) -> Result<ExecStart, Failure> {
        let text = |pointer: &str| {
            pod.pointer(pointer)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        let phase = text("/status/phase");
        if matches!(phase, "Succeeded" | "Failed") {
            let text = format!(
                "cannot exec into a container in a completed pod; current phase is {phase}"
            );
            return Err(Failure::Local(text));
        }
        let is_terminal = termios::isatty(std::io::stdin());
        if self.tty && self.stdin && !is_terminal && !self.quiet {
            eprintln!("Unable to use a TTY - input is not a terminal or the right kind of file");
        }
        let tty = self.tty && (is_terminal || !self.stdin);
        Ok(ExecStart {
            namespace: match text("/metadata/namespace") {
                "" => session.namespace.clone(),
                namespace => namespace.to_owned(),
            },
            pod: text("/metadata/name").to_owned(),
            container: self
                .container
                .clone()
                .unwrap_or_else(|| default_container(pod)),
            command: self.command.clone(),
            stdin: self.stdin,
            tty,
            size: if tty { terminal_size() } else { None },
        })
    }

    async fn stream(&self, session: &Session, start: ExecStart) -> Result<ExitCode, Failure> {
        let (sender, receiver) = mpsc::channel(INPUT_QUEUE);
        let tty = start.tty;
        let with_stdin = start.stdin;
        let closed = |_| Failure::local("the connection to the server closed");
        sender
            .send(input(exec_input::Input::Start(start)))
            .await
            .map_err(closed)?;
        if with_stdin {
            read_stdin(sender.clone());
        }
        let mut output = session
            .pods
            .clone()
            .exec(ReceiverStream::new(receiver))
            .await?
            .into_inner();
        let mut resized = signal(SignalKind::window_change())?;
        let mut terminated = signal(SignalKind::terminate())?;
        let mut hung_up = signal(SignalKind::hangup())?;
        loop {
            // Every arm is cancel-safe: a signal and a message are each taken whole or not at all.
            tokio::select! {
                message = output.next() => match message {
                    Some(message) => {
                        if let Some(code) = handle(message?)? {
                            return Ok(code);
                        }
                    }
                    None => {
                        let text = "the connection closed before the command ended";
                        return Err(Failure::local(text));
                    }
                },
                _ = resized.recv(), if tty => {
                    if let Some(size) = terminal_size() {
                        // A full queue means more input is on its way: the next resize wins.
                        let _ = sender.try_send(input(exec_input::Input::Resize(size)));
                    }
                }
                _ = terminated.recv() => return Ok(ExitCode::from(128 + 15)),
                _ = hung_up.recv() => return Ok(ExitCode::from(128 + 1)),
            }
        }
    }
}

/// Writes what the command wrote; its exit code when it has ended.
fn handle(message: ExecOutput) -> Result<Option<ExitCode>, Failure> {
    match message.output {
        Some(exec_output::Output::Stdout(data)) => {
            let mut out = std::io::stdout().lock();
            out.write_all(&data)?;
            out.flush()?;
            Ok(None)
        }
        Some(exec_output::Output::Stderr(data)) => {
            std::io::stderr().lock().write_all(&data)?;
            Ok(None)
        }
        Some(exec_output::Output::Exit(exit)) if !exit.message.is_empty() => {
            // Raw terminals need the carriage return.
            eprint!("error: {}\r\n", exit.message);
            let code = u8::try_from(exit.code).ok().filter(|code| *code != 0);
            Ok(Some(ExitCode::from(code.unwrap_or(NOT_STARTED))))
        }
        Some(exec_output::Output::Exit(exit)) => {
            if exit.code != 0 && !termios::isatty(std::io::stdin()) {
                eprintln!("command terminated with exit code {}", exit.code);
            }
            Ok(Some(ExitCode::from(u8::try_from(exit.code).unwrap_or(1))))
        }
        None => Ok(None),
    }
}

/// Reads stdin on a thread of its own: a blocked read cannot be cancelled, and this one ends with
/// the process.
fn read_stdin(sender: mpsc::Sender<ExecInput>) {
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = vec![0; STDIN_CHUNK_BYTES];
        loop {
            match stdin.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    let data = buffer[..count].to_vec().into();
                    if sender
                        .blocking_send(input(exec_input::Input::Stdin(data)))
                        .is_err()
                    {
                        return;
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        let _ = sender.blocking_send(input(exec_input::Input::StdinClosed(true)));
    });
}
