//! The kernel's words on an OOM kill, put together from several records of its log. Pure.
//!
//! ```text
//! memory: usage 16384kB, limit 16384kB, failcnt 27
//! Tasks state (memory values in pages):
//! [  pid  ]   uid  tgid total_vm      rss rss_anon rss_file rss_shmem pgtables_bytes swapents oom_score_adj name
//! [   4242]     0  4242     4500     4001     3800      200         0    73728        0           999 tail
//! oom-kill:constraint=CONSTRAINT_MEMCG,...,oom_memcg=/gantry/x,task_memcg=/gantry/x/y,task=tail,pid=4242,uid=0
//! Memory cgroup out of memory: Killed process 4242 (tail) total-vm:18000kB, anon-rss:15200kB, ...
//! ```
//! Columns are found by the header's names, since kernels add and move them. Source:
//! `mm/oom_kill.c` (dump_tasks, dump_oom_summary), `mm/memcontrol.c`. Texts of 6.1 and 6.18 are in
//! the tests.

/// How many of the largest processes a report names.
const LARGEST_MAX: usize = 3;
/// Processes of one dump that are looked at; the kernel prints them all.
const PROCESSES_MAX: usize = 16_384;
const PAGE_BYTES: u64 = 4_096;

/// A process in the kernel's list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Process {
    /// In the host's pid namespace.
    pub pid: u32,
    /// At most 15 characters.
    pub name: String,
    /// Resident memory.
    pub rss_bytes: u64,
}

/// One OOM kill.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct OomReport {
    /// The victim's cgroup.
    pub victim_cgroup: String,
    /// The cgroup whose limit was hit; none: the machine had no memory.
    pub limit_cgroup: Option<String>,
    /// Who was killed.
    pub victim_pid: u32,
    /// Its name.
    pub victim_name: String,
    /// Its anonymous memory.
    pub victim_anon_bytes: u64,
    /// Limit and usage of the cgroup, bytes.
    pub limit_and_usage: Option<(u64, u64)>,
    /// The largest processes, largest first.
    pub largest: Vec<Process>,
}

/// What the kernel's log told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Report {
    /// A process was killed for memory.
    Oom(OomReport),
    /// fork() was refused by the pid limit of this cgroup or one above; told once per cgroup.
    ForkRefused(String),
}

/// The kernel's words when it refuses a fork. Source: `kernel/cgroup/pids.c`.
const FORK_REFUSED: &str = "cgroup: fork rejected by pids controller in ";

/// Collects records until a report is whole.
#[derive(Default, Debug)]
pub struct Assembler {
    columns: Option<Columns>,
    processes: Vec<Process>,
    limit_and_usage: Option<(u64, u64)>,
    report: Option<OomReport>,
}

#[derive(Clone, Copy, Debug)]
struct Columns {
    rss: usize,
    name: usize,
}

impl Assembler {
    /// Takes one record of `/dev/kmsg` (`6,819,1163310442,-;text`); returns a report when this
    /// record ends it.
    pub fn push(&mut self, record: &str) -> Option<Report> {
        let text = record.split_once(';').map_or(record, |(_, text)| text);
        // Continuation lines are the record's dictionary, not its text.
        let text = text.lines().next().unwrap_or_default().trim_end();
        if text.contains(" invoked oom-killer:") {
            *self = Self::default();
        } else if let Some(rest) = text.strip_prefix("memory: usage ") {
            self.limit_and_usage = limit_and_usage(rest);
        } else if text.starts_with("[  pid  ]") {
            self.columns = columns(text);
        } else if text.starts_with('[') {
            self.take_process(text);
        } else if let Some(rest) = text.strip_prefix("oom-kill:") {
            self.take_summary(rest);
        } else if text.contains(": Killed process ") {
            return self.finish(text).map(Report::Oom);
        } else if let Some(cgroup) = text.strip_prefix(FORK_REFUSED) {
            return Some(Report::ForkRefused(cgroup.trim().to_owned()));
        }
        None
    }

    fn take_process(&mut self, text: &str) {
        let Some(columns) = self.columns else {
            return;
        };
        let found = process(text, columns);
        if self.processes.len() < PROCESSES_MAX {
            self.processes.extend(found);
        }
    }

    fn take_summary(&mut self, rest: &str) {
        let value = |key: &str| {
            rest.split(',')
                .find_map(|part| part.strip_prefix(key)?.strip_prefix('='))
                .map(str::to_owned)
        };
        let mut largest = std::mem::take(&mut self.processes);
        largest.sort_by(|a, b| b.rss_bytes.cmp(&a.rss_bytes).then(a.pid.cmp(&b.pid)));
        largest.truncate(LARGEST_MAX);
        self.columns = None;
        self.report = Some(OomReport {
            victim_cgroup: value("task_memcg").unwrap_or_default(),
            // A global OOM prints "global_oom" instead.
            limit_cgroup: value("oom_memcg"),
            victim_pid: value("pid").and_then(|p| p.parse().ok()).unwrap_or(0),
            victim_name: value("task").unwrap_or_default(),
            limit_and_usage: self.limit_and_usage.take(),
            largest,
            ..OomReport::default()
        });
    }

    /// With `memory.oom.group` each member is named by a line of its own; the first ends the report.
    fn finish(&mut self, text: &str) -> Option<OomReport> {
        let mut report = self.report.take()?;
        let anon = text
            .split_once("anon-rss:")
            .and_then(|(_, rest)| kib(rest.split("kB").next()?));
        report.victim_anon_bytes = anon.unwrap_or(0);
        Some(report)
    }
}

fn kib(text: &str) -> Option<u64> {
    text.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// `16384kB, limit 16384kB, failcnt 27`
fn limit_and_usage(rest: &str) -> Option<(u64, u64)> {
    let (usage, rest) = rest.split_once("kB, limit ")?;
    let limit = rest.split("kB").next()?;
    Some((kib(limit)?, kib(usage)?))
}

/// Positions after the bracketed pid.
fn columns(header: &str) -> Option<Columns> {
    let (_, names) = header.split_once(']')?;
    let at = |name: &str| names.split_whitespace().position(|n| n == name);
    Some(Columns {
        rss: at("rss")?,
        name: at("name")?,
    })
}

fn process(text: &str, columns: Columns) -> Option<Process> {
    let (pid, rest) = text.strip_prefix('[')?.split_once(']')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let pages: u64 = fields.get(columns.rss)?.parse().ok()?;
    Some(Process {
        pid: pid.trim().parse().ok()?,
        // A name may have spaces: it is the last column.
        name: fields.get(columns.name..)?.join(" "),
        rss_bytes: pages.checked_mul(PAGE_BYTES)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LINUX_6_1: &str = "\
tail invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=999
CPU: 0 PID: 4242 Comm: tail Not tainted 6.1.0-30-cloud-amd64 #1
memory: usage 16384kB, limit 16384kB, failcnt 27
swap: usage 0kB, limit 0kB, failcnt 0
Memory cgroup stats for /gantry/burstable/podu/main:
Tasks state (memory values in pages):
[  pid  ]   uid  tgid total_vm      rss pgtables_bytes swapents oom_score_adj name
[   4241]     0  4241      660      120    45056        0           999 sh
[   4242]     0  4242     4500     4001    73728        0           999 tail -f x
oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=main,mems_allowed=0,oom_memcg=/gantry/burstable/podu/main,task_memcg=/gantry/burstable/podu/main,task=tail,pid=4242,uid=0
Memory cgroup out of memory: Killed process 4242 (tail) total-vm:18000kB, anon-rss:15200kB, file-rss:800kB, shmem-rss:0kB, UID:0 pgtables:72kB oom_score_adj:999
Tasks in /gantry/burstable/podu/main are going to be killed due to memory.oom.group set
Memory cgroup out of memory: Killed process 4241 (sh) total-vm:2640kB, anon-rss:80kB, file-rss:400kB";

    const LINUX_6_18_GLOBAL: &str = "\
java invoked oom-killer: gfp_mask=0x140cca(GFP_HIGHUSER_MOVABLE|__GFP_COMP), order=0, oom_score_adj=0
Tasks state (memory values in pages):
[  pid  ]   uid  tgid total_vm      rss rss_anon rss_file rss_shmem pgtables_bytes swapents oom_score_adj name
[      9]     0     9    45000    20010    20000       10         0   200000        0             0 java
oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,task_memcg=/gantry/besteffort/podv/app,task=java,pid=9,uid=0
Out of memory: Killed process 9 (java) total-vm:180000kB, anon-rss:80000kB, file-rss:40kB, shmem-rss:0kB, UID:0 pgtables:195kB oom_score_adj:0";

    fn reports(log: &str) -> Vec<OomReport> {
        let mut assembler = Assembler::default();
        log.lines()
            .filter_map(|line| assembler.push(&format!("4,1,1,-;{line}\n SUBSYSTEM=x\n")))
            .filter_map(|report| match report {
                Report::Oom(report) => Some(report),
                Report::ForkRefused(_) => None,
            })
            .collect()
    }

    #[test]
    fn a_limit_of_a_cgroup_names_it_and_the_largest() {
        let found = reports(LINUX_6_1);
        assert_eq!(found.len(), 1, "one report for a killed group");
        let report = &found[0];
        let main = "/gantry/burstable/podu/main";
        assert_eq!(report.limit_cgroup.as_deref(), Some(main));
        assert_eq!(report.victim_cgroup, main);
        assert_eq!(
            (report.victim_pid, report.victim_anon_bytes),
            (4242, 15200 << 10)
        );
        assert_eq!(report.limit_and_usage, Some((16 << 20, 16 << 20)));
        let names: Vec<&str> = report.largest.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["tail -f x", "sh"]);
        assert_eq!(report.largest[0].rss_bytes, 4001 * 4096);
    }

    #[test]
    fn a_machine_without_memory_has_no_limiting_cgroup() {
        let found = reports(LINUX_6_18_GLOBAL);
        assert_eq!(found[0].limit_cgroup, None);
        assert_eq!(found[0].victim_cgroup, "/gantry/besteffort/podv/app");
        assert_eq!(found[0].largest[0].rss_bytes, 20010 * 4096);
    }

    #[test]
    fn a_refused_fork_names_the_cgroup() {
        let line =
            "6,1,1,-;cgroup: fork rejected by pids controller in /gantry/besteffort/podx/main\n";
        let told = Assembler::default().push(line);
        assert_eq!(
            told,
            Some(Report::ForkRefused("/gantry/besteffort/podx/main".into()))
        );
    }

    proptest! {
        #[test]
        fn no_text_makes_it_fail(lines in prop::collection::vec("[ -~]{0,80}", 0..20)) {
            let mut assembler = Assembler::default();
            let known = LINUX_6_1.lines().chain(lines.iter().map(String::as_str));
            for line in known.chain(LINUX_6_18_GLOBAL.lines()) {
                let _ = assembler.push(line);
            }
        }
    }
}
