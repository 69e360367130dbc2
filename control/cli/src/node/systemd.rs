//! The units of both daemons: their texts, and what systemctl is asked.

use std::path::Path;
use std::process::Command;

use super::Places;
use crate::failure::Failure;

/// The control plane's.
pub(super) const CONTROL: &str = "gantry-control.service";
/// The agent's.
pub(super) const AGENT: &str = "gantry-agent.service";
/// Ends pods in order when the machine goes down.
pub(super) const SHUTDOWN: &str = "gantry-shutdown.service";
const DIRECTORY: &str = "/etc/systemd/system";
const SHUTDOWN_TEXT: &str = include_str!("../../../../agent/systemd/gantry-shutdown.service");
/// Where that text has the agent.
const SHUTDOWN_AGENT: &str = "/usr/local/bin/gantry-agent";

/// A word of a command line as systemd reads it.
fn quoted(word: &str) -> String {
    let word = word.replace('\\', "\\\\").replace('"', "\\\"");
    let word = word.replace('%', "%%").replace('$', "$$");
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-=:,@%$".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word;
    }
    format!("\"{word}\"")
}

fn command_line(program: &Path, arguments: &[String]) -> String {
    let program = quoted(&program.display().to_string());
    let words = arguments.iter().map(|word| quoted(word));
    std::iter::once(program)
        .chain(words)
        .collect::<Vec<_>>()
        .join(" ")
}

/// The text of the control plane's unit.
pub(super) fn control(program: &Path, arguments: &[String]) -> String {
    let start = command_line(program, arguments);
    format!(
        "# Made by gantry init; gantry reset removes it.
[Unit]
Description=Gantry's control plane
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={start}
WatchdogSec=60
Restart=always
RestartSec=1
LimitNOFILE=1048576
OOMScoreAdjust=-999

[Install]
WantedBy=multi-user.target
"
    )
}

/// The text of the agent's unit. Pods outlive the agent (KillMode), whose cgroups are its own (Delegate).
pub(super) fn agent(program: &Path, arguments: &[String]) -> String {
    let start = command_line(program, arguments);
    format!(
        "# Made by gantry init or gantry join; gantry reset removes it.
[Unit]
Description=Gantry's node agent
Wants=network-online.target
After=network-online.target gantry-control.service
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={start}
WatchdogSec=60
Restart=always
RestartSec=1
KillMode=process
Delegate=yes
FileDescriptorStoreMax=64
TasksMax=infinity
LimitNOFILE=1048576
OOMScoreAdjust=-999

[Install]
WantedBy=multi-user.target
"
    )
}

/// The text of the unit that ends pods in order.
pub(super) fn shutdown(agent: &Path) -> String {
    SHUTDOWN_TEXT.replace(SHUTDOWN_AGENT, &quoted(&agent.display().to_string()))
}

/// Writes a unit; whether it was not there like that.
pub(super) fn write(places: &Places, name: &str, text: &str) -> Result<bool, Failure> {
    let directory = places.at(DIRECTORY);
    let path = directory.join(name);
    if std::fs::read_to_string(&path).is_ok_and(|old| old == text) {
        return Ok(false);
    }
    let failed =
        |error: std::io::Error| Failure::local(format!("cannot write {}: {error}", path.display()));
    std::fs::create_dir_all(&directory).map_err(failed)?;
    let draft = directory.join(format!(".{name}.new"));
    std::fs::write(&draft, text).map_err(failed)?;
    std::fs::rename(&draft, &path).map_err(failed)?;
    Ok(true)
}

/// Where a unit is.
pub(super) fn path(places: &Places, name: &str) -> std::path::PathBuf {
    places.at(DIRECTORY).join(name)
}

/// Runs systemctl, whose own words go to the terminal.
pub(super) fn ask(arguments: &[&str]) -> Result<(), Failure> {
    let line = arguments.join(" ");
    let ended = Command::new("systemctl")
        .args(arguments)
        .status()
        .map_err(|error| Failure::local(format!("cannot run systemctl {line}: {error}")))?;
    if ended.success() {
        return Ok(());
    }
    let unit = arguments.last().copied().unwrap_or_default();
    Err(Failure::local(format!(
        "systemctl {line} has failed; see: journalctl -u {unit} -n 50"
    )))
}

/// Whether a unit is active.
pub(super) fn is_active(name: &str) -> bool {
    let mut asked = Command::new("systemctl");
    let asked = asked.args(["is-active", "--quiet", name]).status();
    asked.is_ok_and(|ended| ended.success())
}

/// Starts a unit now and at every boot; one whose text is new is started anew.
pub(super) fn start(name: &str, is_new: bool) -> Result<(), Failure> {
    ask(&["daemon-reload"])?;
    ask(&["enable", name])?;
    ask(&[if is_new { "restart" } else { "start" }, name])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_what_a_daemon_with_pods_needs() {
        let words = ["run".to_owned(), "--san".to_owned(), "a b%c".to_owned()];
        let unit = agent(Path::new("/opt/my gantry/gantry-agent"), &words);
        for line in [
            "Type=notify",
            "WatchdogSec=60",
            "KillMode=process",
            "Delegate=yes",
            "FileDescriptorStoreMax=64",
            "ExecStart=\"/opt/my gantry/gantry-agent\" run --san \"a b%%c\"",
        ] {
            assert!(unit.lines().any(|own| own == line), "{line} in\n{unit}");
        }
        let unit = control(Path::new("/usr/bin/gantry-control"), &[]);
        assert!(
            unit.contains("\nType=notify\nExecStart=/usr/bin/gantry-control\n"),
            "{unit}"
        );
        assert!(!unit.contains("KillMode"), "it has no pods");
        let unit = shutdown(Path::new("/usr/bin/gantry-agent"));
        assert!(
            unit.contains("ExecStop=/usr/bin/gantry-agent shutdown"),
            "{unit}"
        );
        assert!(!unit.contains("ExecStart="), "it runs no other program");
        assert_eq!(quoted(""), "\"\"");
        assert_eq!(quoted("a\"$x"), "\"a\\\"$$x\"");
    }

    #[test]
    fn a_unit_is_written_once() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places {
            root: dir.path().to_owned(),
            bin: "/usr/bin".into(),
        };
        assert!(write(&places, AGENT, "text").unwrap());
        assert!(!write(&places, AGENT, "text").unwrap());
        assert!(write(&places, AGENT, "other").unwrap());
        assert_eq!(
            std::fs::read_to_string(path(&places, AGENT)).unwrap(),
            "other"
        );
    }
}
