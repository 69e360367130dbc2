//! Processes that SIGKILL does not end: what they are and where in the kernel they wait, in words.
//!
//! A process in uninterruptible sleep (a disk or a network file system that does not answer), or in a
//! freezer of cgroup v1, takes its signal when it wakes up. Nobody can help it but who has stopped it, so
//! people are told where to look. Source: proc(5), `stat` and `wchan`.

use std::fs;
use std::path::Path;

/// So many are named; of the others the number is told.
const NAMED_COUNT_MAX: usize = 5;

/// `12 (dd), state D in nfs_wait_on_request, and 3 more`.
pub(super) fn words(pids: &[i32]) -> String {
    let named: Vec<String> = pids
        .iter()
        .take(NAMED_COUNT_MAX)
        .map(|pid| described(Path::new("/proc"), *pid))
        .collect();
    let more = match pids.len().saturating_sub(NAMED_COUNT_MAX) {
        0 => String::new(),
        count => format!(", and {count} more"),
    };
    named.join(", ") + &more
}

fn described(proc: &Path, pid: i32) -> String {
    let read = |file: &str| fs::read_to_string(proc.join(pid.to_string()).join(file)).ok();
    let stat = read("stat").unwrap_or_default();
    // The name stands in parentheses and may hold any byte, `)` as well.
    let parts = stat
        .split_once('(')
        .and_then(|(_, rest)| rest.rsplit_once(')'));
    let Some((name, rest)) = parts else {
        return pid.to_string();
    };
    let state = rest.split_whitespace().next().unwrap_or("?");
    let place = read("wchan").filter(|place| !matches!(place.trim(), "" | "0"));
    match place {
        Some(place) => format!("{pid} ({name}), state {state} in {}", place.trim()),
        None => format!("{pid} ({name}), state {state}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_with_its_state_and_place() {
        let proc = tempfile::tempdir().unwrap();
        for (pid, stat, wchan) in [
            (7, "7 (a) b (c)) D 1 7 7 0", "nfs_wait_on_request"),
            (8, "8 (sleep) S 1 8 8 0", "0"),
            (9, "nonsense", ""),
        ] {
            let directory = proc.path().join(pid.to_string());
            fs::create_dir(&directory).unwrap();
            fs::write(directory.join("stat"), stat).unwrap();
            fs::write(directory.join("wchan"), wchan).unwrap();
        }
        let of = |pid| described(proc.path(), pid);
        assert_eq!(of(7), "7 (a) b (c)), state D in nfs_wait_on_request");
        assert_eq!(of(8), "8 (sleep), state S");
        assert_eq!((of(9), of(10)), ("9".into(), "10".into()));
    }

    #[test]
    fn many_are_counted() {
        let words = words(&[i32::MAX; 8]);
        assert!(words.ends_with(", and 3 more"), "{words}");
    }
}
