//! The two files a shim leaves beside each container run, and the intent of the agent.
//!
//! * `started` – written when gantry-rt has let init go: a run with it is never started again;
//! * `exit` – written when init was reaped and the log is complete on disk, before anyone is told.
//!
//! Both are `key=value` lines, written to a temporary name, synced and renamed, so a reader sees
//! a whole record or none, whatever was killed when.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// File name of [`Started`] in the run's directory.
pub const STARTED_FILE: &str = "started";
/// File name of [`Exit`] in the run's directory.
pub const EXIT_FILE: &str = "exit";

/// A container's init was started.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Started {
    /// Init's pid in the host's pid namespace.
    pub pid: i32,
    /// Field 22 of `/proc/<pid>/stat`: together with the pid it names one process of this boot.
    pub start_ticks: u64,
    /// Nanoseconds since 1970, taken just before init was let go.
    pub started_ns: u64,
    /// As in the spec's `cgroupsPath`.
    pub cgroup: String,
    /// The CRI log file.
    pub log_path: String,
    /// It has a terminal (whose master died with the shim).
    pub tty: bool,
    /// Its stdin is a FIFO that is held open.
    pub stdin: bool,
    /// The FIFO is closed when the first client that wrote to it has left.
    pub stdin_once: bool,
}

/// A container's init was reaped.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Exit {
    /// Exit code, 128 + signal when a signal ended it.
    pub code: i32,
    /// The signal, 0 when it exited by itself.
    pub signal: i32,
    /// The OOM killer's victims in the container's cgroup.
    pub oom_kill_count: u64,
    /// As in [`Started`].
    pub started_ns: u64,
    /// Nanoseconds since 1970, when init was reaped.
    pub finished_ns: u64,
    /// Nobody could read the status: the shim had died. The code is 137 then.
    pub unknown: bool,
    /// Log bytes that the file system refused to take.
    pub log_lost_bytes: u64,
}

impl Exit {
    /// From waitpid's status word.
    pub fn from_wait_status(status: i32) -> Self {
        let (code, signal) = if libc::WIFSIGNALED(status) {
            let signal = libc::WTERMSIG(status);
            (128 + signal, signal)
        } else {
            (libc::WEXITSTATUS(status), 0)
        };
        Self {
            code,
            signal,
            ..Self::default()
        }
    }

    /// The status was lost: 137 is what a SIGKILL would have given.
    pub fn lost() -> Self {
        Self {
            code: 137,
            unknown: true,
            ..Self::default()
        }
    }
}

impl Started {
    /// Makes it durable in `directory`.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        let text = format!(
            "pid={}\nstart_ticks={}\nstarted_ns={}\ncgroup={}\nlog_path={}\ntty={}\nstdin={}\nstdin_once={}\n",
            self.pid,
            self.start_ticks,
            self.started_ns,
            self.cgroup,
            self.log_path,
            u8::from(self.tty),
            u8::from(self.stdin),
            u8::from(self.stdin_once),
        );
        write_durably(directory, STARTED_FILE, &text)
    }

    /// None when the run was never started.
    pub fn read(directory: &Path) -> io::Result<Option<Self>> {
        let Some(text) = read_optional(&directory.join(STARTED_FILE))? else {
            return Ok(None);
        };
        Ok(Some(Self {
            pid: number(&text, "pid"),
            start_ticks: number(&text, "start_ticks"),
            started_ns: number(&text, "started_ns"),
            cgroup: field(&text, "cgroup").to_owned(),
            log_path: field(&text, "log_path").to_owned(),
            tty: number::<u8>(&text, "tty") != 0,
            stdin: number::<u8>(&text, "stdin") != 0,
            stdin_once: number::<u8>(&text, "stdin_once") != 0,
        }))
    }
}

impl Exit {
    /// Makes it durable in `directory`.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        let text = format!(
            "code={}\nsignal={}\noom_kill_count={}\nstarted_ns={}\nfinished_ns={}\nunknown={}\n\
             log_lost_bytes={}\n",
            self.code,
            self.signal,
            self.oom_kill_count,
            self.started_ns,
            self.finished_ns,
            u8::from(self.unknown),
            self.log_lost_bytes,
        );
        write_durably(directory, EXIT_FILE, &text)
    }

    /// None while the run has not ended.
    pub fn read(directory: &Path) -> io::Result<Option<Self>> {
        let Some(text) = read_optional(&directory.join(EXIT_FILE))? else {
            return Ok(None);
        };
        Ok(Some(Self {
            code: number(&text, "code"),
            signal: number(&text, "signal"),
            oom_kill_count: number(&text, "oom_kill_count"),
            started_ns: number(&text, "started_ns"),
            finished_ns: number(&text, "finished_ns"),
            unknown: number::<u8>(&text, "unknown") != 0,
            log_lost_bytes: number(&text, "log_lost_bytes"),
        }))
    }
}

/// Writes `<directory>/<name>` so that it is there whole or not at all.
pub fn write_durably(directory: &Path, name: &str, text: &str) -> io::Result<()> {
    let temporary = directory.join(format!("{name}.tmp"));
    let mut file = File::create(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_data()?;
    fs::rename(&temporary, directory.join(name))
}

fn read_optional(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn field<'a>(text: &'a str, key: &str) -> &'a str {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        .unwrap_or("")
}

fn number<T: std::str::FromStr + Default>(text: &str, key: &str) -> T {
    field(text, key).parse().unwrap_or_default()
}

/// Field 22 of `/proc/<pid>/stat`, the process's start time; none when there is no such process.
pub fn start_ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may hold blanks and parentheses; the fields after the last ')' may not.
    stat.rsplit_once(')')?
        .1
        .split_ascii_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_as_written() {
        let directory = std::env::temp_dir().join(format!("gantry-record-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        assert_eq!(Started::read(&directory).unwrap(), None);
        let started = Started {
            pid: 17,
            start_ticks: 99,
            started_ns: u64::MAX,
            cgroup: "/gantry/burstable/podx/web".into(),
            log_path: "/var/log/pods/a=b/0.log".into(),
            tty: true,
            stdin: false,
            stdin_once: true,
        };
        started.write(&directory).unwrap();
        assert_eq!(Started::read(&directory).unwrap(), Some(started));
        let exit = Exit {
            code: 137,
            signal: 9,
            oom_kill_count: 2,
            started_ns: 1,
            finished_ns: 2,
            unknown: false,
            log_lost_bytes: 3,
        };
        exit.write(&directory).unwrap();
        assert_eq!(Exit::read(&directory).unwrap(), Some(exit));
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_process_has_a_start_time_and_a_free_pid_has_none() {
        assert!(start_ticks(std::process::id() as i32).is_some());
        assert_eq!(start_ticks(i32::MAX), None);
    }
}
