//! Reads what [`super::thresholds`] judges: `/proc`, the file systems, the cgroup of all pods.

use std::path::Path;

use super::thresholds::{Reading, Readings, Signal};
use crate::cgroups::Cgroups;

/// Where the machine's figures come from.
pub struct Sources {
    /// `/var/lib/gantry`: its file system is nodefs.
    pub lib: std::path::PathBuf,
    /// Where images lie: its file system is imagefs.
    pub images: std::path::PathBuf,
    /// The cgroup of all pods.
    pub cgroups: Cgroups,
}

impl Sources {
    /// Reads every signal; one that cannot be read is left out.
    pub fn read(&self) -> Readings {
        let mut readings = Readings {
            memory_stall_percent: stall(&text("/proc/pressure/memory")),
            ..Readings::default()
        };
        let mut add = |signal, reading: Option<Reading>| {
            readings.signals.extend(reading.map(|r| (signal, r)));
        };
        add(Signal::Memory, memory(&text("/proc/meminfo")));
        add(Signal::PodsMemory, self.pods_memory());
        let (bytes, inodes) = file_system(&self.lib);
        add(Signal::Nodefs, bytes);
        add(Signal::NodefsInodes, inodes);
        add(Signal::Imagefs, file_system(&self.images).0);
        add(
            Signal::Pids,
            pids(&text("/proc/loadavg"), &text("/proc/sys/kernel/pid_max")),
        );
        readings
    }

    /// What pods may still use below the limit of all of them.
    fn pods_memory(&self) -> Option<Reading> {
        let capacity = self.cgroups.policy().memory_allocatable_bytes;
        let stats = self.cgroups.pods_stats().ok().flatten()?;
        (capacity > 0).then_some(Reading {
            capacity,
            available: capacity.saturating_sub(stats.memory_working_set_bytes),
        })
    }
}

fn text(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn memory(meminfo: &str) -> Option<Reading> {
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    Some(Reading {
        capacity: field("MemTotal:")?.saturating_mul(1024),
        available: field("MemAvailable:")?.saturating_mul(1024),
    })
}

/// "full" of the last 10 s in whole percent; 0 without PSI.
fn stall(pressure: &str) -> u64 {
    let full = pressure.lines().find_map(|line| line.strip_prefix("full "));
    let avg10 = full.and_then(|rest| rest.split_whitespace().next()?.strip_prefix("avg10="));
    avg10
        .and_then(|value| value.split('.').next()?.parse().ok())
        .unwrap_or(0)
}

/// Tasks of the machine (the part after the slash in `/proc/loadavg`) against the highest pid.
fn pids(loadavg: &str, pid_max: &str) -> Option<Reading> {
    let tasks = loadavg.split_whitespace().nth(3)?.split('/').nth(1)?;
    let capacity: u64 = pid_max.trim().parse().ok()?;
    Some(Reading {
        capacity,
        available: capacity.saturating_sub(tasks.parse().ok()?),
    })
}

/// Bytes and inodes of the file system of a path, or of its nearest ancestor that exists.
fn file_system(path: &Path) -> (Option<Reading>, Option<Reading>) {
    let stat = path
        .ancestors()
        .find_map(|path| nix::sys::statvfs::statvfs(path).ok());
    let Some(stat) = stat else {
        return (None, None);
    };
    let block = stat.fragment_size();
    let bytes = Reading {
        capacity: stat.blocks().saturating_mul(block),
        available: stat.blocks_available().saturating_mul(block),
    };
    let inodes = Reading {
        capacity: stat.files(), // 0 where the file system has no fixed number
        available: stat.files_available(),
    };
    (Some(bytes), Some(inodes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_texts_are_read() {
        let meminfo = "MemTotal: 2048 kB\nMemFree: 1 kB\nMemAvailable: 1024 kB\n";
        let want = Reading {
            capacity: 2 << 20,
            available: 1 << 20,
        };
        assert_eq!(memory(meminfo), Some(want));
        assert_eq!(memory(""), None);
        let pressure = "some avg10=55.10 avg60=0 avg300=0 total=1\n\
                        full avg10=21.98 avg60=0 avg300=0 total=1\n";
        assert_eq!((stall(pressure), stall("")), (21, 0));
        let want = Reading {
            capacity: 1000,
            available: 660,
        };
        assert_eq!(pids("0.00 0.01 0.05 2/340 1234", "1000\n"), Some(want));
        let (bytes, _) = file_system(Path::new("/no/such/path"));
        assert!(bytes.is_some_and(|b| b.capacity >= b.available && b.capacity > 0));
    }
}
