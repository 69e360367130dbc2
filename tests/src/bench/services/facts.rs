//! The machine and the programs that were measured.

use std::path::Path;
use std::process::Command;

/// Name and value; what cannot be found out says so.
pub(super) fn facts(loaders: &[&[&str]]) -> Vec<(&'static str, String)> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = row(&cpu, "model name");
    let count = cpu.lines().filter(|line| line.starts_with("processor"));
    let memory = row(&read("/proc/meminfo"), "MemTotal");
    let mut facts = vec![
        ("when", said(&["date", "-u", "+%Y-%m-%d %H:%M UTC"])),
        ("commit", commit()),
        ("kernel", said(&["uname", "-srvm"])),
        ("processor", format!("{} x {model}", count.count())),
        ("memory", memory),
        ("build", profile().into()),
        ("load before", load()),
    ];
    for loader in loaders {
        if let Some(program) = loader.first() {
            facts.push((
                "beside",
                format!("{program}: {}", said(&[program, "--version"])),
            ));
        }
    }
    facts
}

/// Averages of 1, 5 and 15 minutes: whether somebody else was at work.
pub(super) fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

fn profile() -> &'static str {
    match cfg!(debug_assertions) {
        true => "for tests: no figure of it counts",
        false => "release",
    }
}

/// `cargo xtask bench` knows; it runs in the repository.
fn commit() -> String {
    std::env::var("GANTRY_COMMIT").unwrap_or_else(|_| "unknown".into())
}

fn said(words: &[&str]) -> String {
    let Some((program, arguments)) = words.split_first() else {
        return String::new();
    };
    let program = ["", "/usr/sbin/", "/sbin/"]
        .map(|directory| format!("{directory}{program}"))
        .into_iter()
        .find(|path| Path::new(path).is_file())
        .unwrap_or_else(|| (*program).into());
    let output = Command::new(program).args(arguments).output();
    let output = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    match output {
        Ok(text) if !text.is_empty() => text.lines().next().unwrap_or_default().into(),
        _ => "unknown".into(),
    }
}

/// The value of the first row `name : value`.
fn row(text: &str, name: &str) -> String {
    let row = text.lines().find_map(|line| line.strip_prefix(name));
    let value = row.and_then(|row| row.trim_start().strip_prefix(':'));
    value.map_or_else(|| "unknown".into(), |value| value.trim().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_and_what_is_missing_is_said() {
        let text = "processor\t: 0\nmodel name\t: AMD EPYC\nMemTotal:  24681 kB\n";
        assert_eq!(row(text, "model name"), "AMD EPYC");
        assert_eq!(row(text, "MemTotal"), "24681 kB");
        assert_eq!(row(text, "flags"), "unknown");
        assert_eq!(said(&["/nonexistent/program"]), "unknown");
    }
}
