//! What agent and shim say to each other over `/run/gantry/pods/<uid>/shim.sock`.
//!
//! The socket is `SOCK_SEQPACKET`: one message is one datagram, so there is no framing to get
//! wrong and descriptors (`SCM_RIGHTS`) belong to exactly one message. A message is text fields
//! separated by NUL, the verb first; no field can hold a NUL (paths, names, numbers, one line of
//! JSON). At most [`MESSAGE_BYTES_MAX`] bytes.
//!
//! ```text
//! connect        ◄── run <run> <phase> <pid> <started_ns>   one per known run
//!                ◄── ready <version>
//! start …        ──► … ◄── started <id> <pid> <started_ns>  | failed <id> <report>
//! exec … (fds)   ──► … ◄── exec-started <id> <pid>          | failed <id> <report>
//!                      ◄── exec-exited <id> <wait status>     to the connection that asked
//! attach … (fds) ──► … ◄── attached <id> (fd of stdin)    | failed <id> <report>
//!                      ◄── exec-exited <id> <wait status>     when the container has ended
//!                      ◄── failed <id> <report>               when the reader was too slow
//! signal, kill-exec, close-stdin, reopen-log, forget, shut-down ──► ◄── done <id> | failed <id> <report>
//!                ◄── exited <run>                             to every connection, unasked
//! ```
//! `<id>` is the asker's number for the request, unique on its connection; an exec is named by it
//! afterwards. `<run>` is `<container>/<attempt>`, a path below the sandbox's directory.

use std::str::FromStr;

/// Spoken by both sides; the agent restarts no shim because of it, so verbs are only ever added.
pub const VERSION: u32 = 1;
/// File name of the socket in the sandbox's directory.
pub const SOCKET_FILE: &str = "shim.sock";
/// FIFO in a run's directory that is the container's stdout, unless it has a terminal.
pub const STDOUT_FILE: &str = "stdout";
/// FIFO that is its stderr.
pub const STDERR_FILE: &str = "stderr";
/// Longest message. A start carries a handful of paths; argv and environment go by file.
pub const MESSAGE_BYTES_MAX: usize = 16 * 1024;
/// Descriptors that come with one message at most: stdin, stdout, stderr.
pub const FD_COUNT_MAX: usize = 3;

/// A message that is no message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WireError(pub String);

impl std::fmt::Display for WireError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "bad shim message: {}", self.0)
    }
}

impl std::error::Error for WireError {}

/// What a start needs beside the bundle in the run's directory.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Start {
    /// `<container>/<attempt>`
    pub run: String,
    /// As in the spec's `cgroupsPath`.
    pub cgroup: String,
    /// CRI log file; its directory exists.
    pub log_path: String,
    /// Compiled filters, empty for none.
    pub seccomp_path: String,
    /// Give init a terminal, whose output becomes the log.
    pub tty: bool,
    /// Give init a FIFO as stdin, else /dev/null.
    pub stdin: bool,
    /// Close the FIFO when the first client that wrote to it has left.
    pub stdin_once: bool,
}

/// A command beside init. Without a terminal its stdin, stdout and stderr come as descriptors.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Exec {
    /// `<container>/<attempt>`
    pub run: String,
    /// An OCI process document.
    pub process_path: String,
    /// Compiled filters, empty for none.
    pub seccomp_path: String,
    /// Where the terminal's master is to be sent; empty without a terminal.
    pub console_path: String,
}

/// What the agent asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// Create and start a container; asked again while it is being created: one answer each.
    Start(Start),
    /// Run a command in a running container.
    Exec(Exec),
    /// Send a signal to init. Done also when it has ended.
    Signal {
        /// Which.
        run: String,
        /// Its number.
        signal: i32,
    },
    /// Copy what the container writes from now on to two descriptors, stdout and stderr.
    Attach {
        /// Which.
        run: String,
    },
    /// A client's stdin has ended: with `stdin_once` the container's ends too.
    CloseStdin {
        /// Which.
        run: String,
    },
    /// SIGKILL to a command, or the end of an attachment, by the id of its request.
    KillExec {
        /// The request's id.
        exec: u64,
    },
    /// The log file was renamed: go on in a new one of the old name.
    ReopenLog {
        /// Which.
        run: String,
    },
    /// The run has ended and its records are about to be removed.
    Forget {
        /// Which.
        run: String,
    },
    /// End, if no container runs.
    ShutDown,
}

/// Where a run is, as told on connect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// gantry-rt is at work.
    Creating,
    /// Init runs.
    Running,
    /// The exit record is on disk.
    Ended,
}

/// What the shim says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    /// On connect: a run it knows.
    Run {
        /// Which.
        run: String,
        /// Where it is.
        phase: Phase,
        /// Init's pid, 0 unless running.
        pid: i32,
        /// Nanoseconds since 1970, 0 while creating.
        started_ns: u64,
    },
    /// On connect: all runs were told.
    Ready {
        /// [`VERSION`] of the shim.
        version: u32,
    },
    /// Init was let go.
    Started {
        /// The request.
        id: u64,
        /// Init's pid.
        pid: i32,
        /// Nanoseconds since 1970.
        started_ns: u64,
    },
    /// The command runs.
    ExecStarted {
        /// The request.
        id: u64,
        /// Its pid.
        pid: i32,
    },
    /// The output is copied; the message carries where stdin is written, if the container has one:
    /// a FIFO or a terminal's master.
    Attached {
        /// The request.
        id: u64,
    },
    /// The command was reaped, or the container that was attached to.
    ExecExited {
        /// The request.
        id: u64,
        /// waitpid's word.
        wait_status: i32,
    },
    /// As asked.
    Done {
        /// The request.
        id: u64,
    },
    /// Not done.
    Failed {
        /// The request.
        id: u64,
        /// gantry-rt's JSON line, or the shim's own words.
        report: String,
    },
    /// Init was reaped, the log is complete and the exit record is on disk.
    Exited {
        /// Which.
        run: String,
    },
}

impl Request {
    /// The datagram for this request under `id`.
    pub fn encode(&self, id: u64) -> Vec<u8> {
        let id = id.to_string();
        let flag = |on: bool| if on { "1" } else { "0" };
        match self {
            Self::Start(s) => join(&[
                "start",
                &id,
                &s.run,
                &s.cgroup,
                &s.log_path,
                &s.seccomp_path,
                flag(s.tty),
                flag(s.stdin),
                flag(s.stdin_once),
            ]),
            Self::Exec(e) => join(&[
                "exec",
                &id,
                &e.run,
                &e.process_path,
                &e.seccomp_path,
                &e.console_path,
            ]),
            Self::Signal { run, signal } => join(&["signal", &id, run, &signal.to_string()]),
            Self::Attach { run } => join(&["attach", &id, run]),
            Self::CloseStdin { run } => join(&["close-stdin", &id, run]),
            Self::KillExec { exec } => join(&["kill-exec", &id, &exec.to_string()]),
            Self::ReopenLog { run } => join(&["reopen-log", &id, run]),
            Self::Forget { run } => join(&["forget", &id, run]),
            Self::ShutDown => join(&["shut-down", &id]),
        }
    }

    /// The request's id and the request.
    pub fn decode(message: &[u8]) -> Result<(u64, Self), WireError> {
        let mut fields = Fields::of(message)?;
        let verb = fields.text()?;
        let id = fields.number()?;
        let request = match verb {
            "start" => Self::Start(Start {
                run: fields.run()?,
                cgroup: fields.text()?.to_owned(),
                log_path: fields.text()?.to_owned(),
                seccomp_path: fields.text()?.to_owned(),
                tty: fields.text()? == "1",
                stdin: fields.text()? == "1",
                // An older agent does not say.
                stdin_once: fields.text() == Ok("1"),
            }),
            "exec" => Self::Exec(Exec {
                run: fields.run()?,
                process_path: fields.text()?.to_owned(),
                seccomp_path: fields.text()?.to_owned(),
                console_path: fields.text()?.to_owned(),
            }),
            "signal" => Self::Signal {
                run: fields.run()?,
                signal: fields.number()?,
            },
            "attach" => Self::Attach { run: fields.run()? },
            "close-stdin" => Self::CloseStdin { run: fields.run()? },
            "kill-exec" => Self::KillExec {
                exec: fields.number()?,
            },
            "reopen-log" => Self::ReopenLog { run: fields.run()? },
            "forget" => Self::Forget { run: fields.run()? },
            "shut-down" => Self::ShutDown,
            other => return Err(WireError(format!("unknown verb {other:?}"))),
        };
        Ok((id, request))
    }
}

impl Phase {
    fn word(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Running => "running",
            Self::Ended => "ended",
        }
    }
}

impl Reply {
    /// The datagram for this reply; a report that is too long is cut.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Run {
                run,
                phase,
                pid,
                started_ns,
            } => join(&[
                "run",
                run,
                phase.word(),
                &pid.to_string(),
                &started_ns.to_string(),
            ]),
            Self::Ready { version } => join(&["ready", &version.to_string()]),
            Self::Started {
                id,
                pid,
                started_ns,
            } => join(&[
                "started",
                &id.to_string(),
                &pid.to_string(),
                &started_ns.to_string(),
            ]),
            Self::ExecStarted { id, pid } => {
                join(&["exec-started", &id.to_string(), &pid.to_string()])
            }
            Self::Attached { id } => join(&["attached", &id.to_string()]),
            Self::ExecExited { id, wait_status } => {
                join(&["exec-exited", &id.to_string(), &wait_status.to_string()])
            }
            Self::Done { id } => join(&["done", &id.to_string()]),
            Self::Failed { id, report } => {
                let id = id.to_string();
                let room = MESSAGE_BYTES_MAX - id.len() - "failed".len() - 2;
                let end = report.floor_char_boundary(room);
                join(&["failed", &id, &report[..end]])
            }
            Self::Exited { run } => join(&["exited", run]),
        }
    }

    /// The reply in a datagram.
    pub fn decode(message: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::of(message)?;
        Ok(match fields.text()? {
            "run" => Self::Run {
                run: fields.run()?,
                phase: match fields.text()? {
                    "creating" => Phase::Creating,
                    "running" => Phase::Running,
                    "ended" => Phase::Ended,
                    other => return Err(WireError(format!("unknown phase {other:?}"))),
                },
                pid: fields.number()?,
                started_ns: fields.number()?,
            },
            "ready" => Self::Ready {
                version: fields.number()?,
            },
            "started" => Self::Started {
                id: fields.number()?,
                pid: fields.number()?,
                started_ns: fields.number()?,
            },
            "exec-started" => Self::ExecStarted {
                id: fields.number()?,
                pid: fields.number()?,
            },
            "attached" => Self::Attached {
                id: fields.number()?,
            },
            "exec-exited" => Self::ExecExited {
                id: fields.number()?,
                wait_status: fields.number()?,
            },
            "done" => Self::Done {
                id: fields.number()?,
            },
            "failed" => Self::Failed {
                id: fields.number()?,
                report: fields.text()?.to_owned(),
            },
            "exited" => Self::Exited { run: fields.run()? },
            other => return Err(WireError(format!("unknown reply {other:?}"))),
        })
    }
}

fn join(fields: &[&str]) -> Vec<u8> {
    fields.join("\0").into_bytes()
}

struct Fields<'a>(std::str::Split<'a, char>);

impl<'a> Fields<'a> {
    fn of(message: &'a [u8]) -> Result<Self, WireError> {
        let text = std::str::from_utf8(message)
            .map_err(|error| WireError(format!("not UTF-8 at byte {}", error.valid_up_to())))?;
        Ok(Self(text.split('\0')))
    }

    fn text(&mut self) -> Result<&'a str, WireError> {
        self.0
            .next()
            .ok_or_else(|| WireError("a field is missing".into()))
    }

    fn number<T: FromStr>(&mut self) -> Result<T, WireError> {
        let text = self.text()?;
        text.parse()
            .map_err(|_| WireError(format!("{text:?} is no number in range")))
    }

    /// `<container>/<attempt>`: it becomes a path below the sandbox, so nothing else may pass.
    fn run(&mut self) -> Result<String, WireError> {
        let text = self.text()?;
        if is_run(text) {
            Ok(text.to_owned())
        } else {
            Err(WireError(format!("{text:?} is no <container>/<attempt>")))
        }
    }
}

/// Whether `text` is `<container>/<attempt>` with a DNS label or subdomain as container name.
pub fn is_run(text: &str) -> bool {
    let Some((name, attempt)) = text.split_once('/') else {
        return false;
    };
    let label = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    (1..=253).contains(&name.len())
        && name.bytes().all(label)
        && !name.starts_with('.')
        && attempt.parse::<u32>().is_ok()
        && attempt.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_come_back_as_sent() {
        for request in [
            Request::Start(Start {
                run: "web/0".into(),
                cgroup: "/gantry/x".into(),
                log_path: "/var/log/pods/a b/0.log".into(),
                seccomp_path: String::new(),
                tty: true,
                stdin: false,
                stdin_once: true,
            }),
            Request::Attach {
                run: "web/0".into(),
            },
            Request::CloseStdin {
                run: "web/0".into(),
            },
            Request::Exec(Exec {
                run: "web/12".into(),
                process_path: "/p".into(),
                seccomp_path: "/s".into(),
                console_path: String::new(),
            }),
            Request::Signal {
                run: "a/0".into(),
                signal: 15,
            },
            Request::KillExec { exec: 7 },
            Request::ReopenLog { run: "a/0".into() },
            Request::Forget { run: "a/0".into() },
            Request::ShutDown,
        ] {
            assert_eq!(Request::decode(&request.encode(5)), Ok((5, request)));
        }
    }

    #[test]
    fn replies_come_back_as_sent() {
        for reply in [
            Reply::Run {
                run: "web/0".into(),
                phase: Phase::Running,
                pid: 4,
                started_ns: 5,
            },
            Reply::Ready { version: VERSION },
            Reply::Started {
                id: 1,
                pid: 2,
                started_ns: 3,
            },
            Reply::ExecStarted { id: 1, pid: 2 },
            Reply::Attached { id: 3 },
            Reply::ExecExited {
                id: 1,
                wait_status: 256,
            },
            Reply::Done { id: 9 },
            Reply::Failed {
                id: 9,
                report: "no".into(),
            },
            Reply::Exited {
                run: "web/0".into(),
            },
        ] {
            assert_eq!(Reply::decode(&reply.encode()), Ok(reply));
        }
    }

    #[test]
    fn a_run_never_leaves_the_sandbox() {
        assert!(is_run("web/0") && is_run("a.b-c/4294967295"));
        for bad in [
            "",
            "web",
            "web/",
            "/0",
            "../0",
            "..",
            "web/../x",
            "web/0/1",
            "WEB/0",
            "web/-1",
            "web/+1",
            "web/4294967296",
            ".hidden/0",
        ] {
            assert!(!is_run(bad), "{bad}");
        }
    }

    #[test]
    fn a_long_report_is_cut_at_a_character() {
        let reply = Reply::Failed {
            id: u64::MAX,
            report: "é".repeat(MESSAGE_BYTES_MAX),
        };
        let message = reply.encode();
        assert!(message.len() <= MESSAGE_BYTES_MAX);
        assert!(Reply::decode(&message).is_ok());
    }
}
