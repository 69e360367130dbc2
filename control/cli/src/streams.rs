//! The streams of `exec`, `attach` and `run`: stdin up, stdout and stderr down, the terminal's size.
//!
//! The terminal is made raw only while the stream is open, by a guard that restores it on every way
//! out: end of the command, error, panic, SIGTERM and SIGHUP.

use crate::connection::Session;
use crate::failure::Failure;
use crate::logs::resolve_pod;
use crate::{Global, names};
use clap::Args;
use gantry_api::kinds::resolve;
use gantry_api::proto::{
    ExecExit, ExecInput, ExecOutput, ExecStart, TerminalSize, exec_input, exec_output,
};
use rustix::termios::{self, OptionalActions, Termios};
use serde_json::Value;
use std::io::{Read as _, Write as _};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

/// Bytes of stdin in one message.
pub(crate) const STDIN_CHUNK_BYTES: usize = 16 * 1024;
/// Messages on their way to the server.
const INPUT_QUEUE: usize = 16;
/// Exit code when the command cannot be started, as shells have it.
const NOT_STARTED: i32 = 126;

/// The pod that a verb works with.
#[derive(Args, Debug)]
pub(crate) struct PodArgs {
    /// A pod, or type/name (deploy/web)
    #[arg(required = true, num_args = 1..=2, value_name = "POD|TYPE/NAME")]
    words: Vec<String>,
}

impl PodArgs {
    /// Connects and finds it.
    pub(crate) async fn find(&self, global: &Global) -> Result<(Session, Value), Failure> {
        let pods =
            resolve("pods").ok_or_else(|| Failure::local("this build does not know pods"))?;
        let (kind, name) = names::one(&self.words, Some(pods))?;
        let session = Session::open(global).await?;
        let pod = resolve_pod(&session, kind, &name).await?;
        Ok((session, pod))
    }
}

/// How a verb connects this process's own streams.
#[derive(Args, Debug, Clone, Copy, Default)]
pub(crate) struct StreamArgs {
    /// Pass stdin to the container; one that is made for it keeps its stdin open
    #[arg(short = 'i', long)]
    pub(crate) stdin: bool,
    /// Use a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Nothing but the container's own output
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

impl StreamArgs {
    /// Whether a terminal can be had; says so when one was asked for in vain.
    pub(crate) fn use_terminal(self) -> bool {
        let is_terminal = termios::isatty(std::io::stdin());
        if self.tty && self.stdin && !is_terminal && !self.quiet {
            eprintln!("Unable to use a TTY - input is not a terminal or the right kind of file");
        }
        self.tty && (is_terminal || !self.stdin)
    }
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

pub(crate) fn terminal_size() -> Option<TerminalSize> {
    let size = termios::tcgetwinsize(std::io::stdout()).ok()?;
    Some(TerminalSize {
        columns: u32::from(size.ws_col),
        rows: u32::from(size.ws_row),
    })
    .filter(|size| size.columns > 0 && size.rows > 0)
}

pub(crate) fn input(input: exec_input::Input) -> ExecInput {
    ExecInput { input: Some(input) }
}

/// An open stream to a command or a container.
pub(crate) struct Remote {
    pub(crate) input: mpsc::Sender<ExecInput>,
    pub(crate) output: Streaming<ExecOutput>,
}

impl Remote {
    pub(crate) async fn open(session: &Session, start: ExecStart) -> Result<Self, Failure> {
        let (sender, receiver) = mpsc::channel(INPUT_QUEUE);
        sender
            .send(input(exec_input::Input::Start(start)))
            .await
            .map_err(|_| Failure::local("the connection to the server closed"))?;
        let mut pods = session.pods.clone();
        let output = pods.exec(ReceiverStream::new(receiver)).await?;
        Ok(Self {
            output: output.into_inner(),
            input: sender,
        })
    }
}

/// Connects this process's own streams until the other side has ended; tells how.
pub(crate) async fn run(session: &Session, start: ExecStart) -> Result<ExecExit, Failure> {
    let raw = match start.tty && start.stdin && termios::isatty(std::io::stdin()) {
        true => Some(RawTerminal::enter()?),
        false => None,
    };
    let result = carry(session, start).await;
    drop(raw);
    result
}

async fn carry(session: &Session, start: ExecStart) -> Result<ExecExit, Failure> {
    let (tty, with_stdin) = (start.tty, start.stdin);
    let mut remote = Remote::open(session, start).await?;
    if with_stdin {
        read_stdin(remote.input.clone());
    }
    let mut resized = signal(SignalKind::window_change())?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut hung_up = signal(SignalKind::hangup())?;
    let ended_by = |signal| ExecExit {
        code: 128 + signal,
        message: String::new(),
    };
    loop {
        // Every arm is cancel-safe: a signal and a message are each taken whole or not at all.
        tokio::select! {
            message = remote.output.next() => match message {
                Some(message) => {
                    if let Some(exit) = write(message?)? {
                        return Ok(exit);
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
                    let _ = remote.input.try_send(input(exec_input::Input::Resize(size)));
                }
            }
            _ = terminated.recv() => return Ok(ended_by(15)),
            _ = hung_up.recv() => return Ok(ended_by(1)),
        }
    }
}

/// Writes what the command wrote; how it ended when it has.
fn write(message: ExecOutput) -> Result<Option<ExecExit>, Failure> {
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
        Some(exec_output::Output::Exit(mut exit)) => {
            if !exit.message.is_empty() && exit.code == 0 {
                exit.code = NOT_STARTED;
            }
            Ok(Some(exit))
        }
        None => Ok(None),
    }
}

/// The exit code of this process for that of another.
pub(crate) fn code(exit: &ExecExit) -> std::process::ExitCode {
    u8::try_from(exit.code).unwrap_or(1).into()
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
