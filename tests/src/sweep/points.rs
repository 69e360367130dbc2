//! Where a kill can hit: from a trace to the system calls in it, and which of them are tried. Pure.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Context as _, Result};

/// Points of a sample from each program: what a run of all tests has time for.
const SAMPLE_COUNT: usize = 3;

/// Which points are tried.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Choice {
    /// Every one of them: hours.
    All,
    /// Every one of a program.
    Of(Program),
    /// Some of each program, drawn by this seed.
    Sample(u64),
    /// As printed before each try: `shim:openat:3`.
    Only(Vec<Point>),
}

impl Choice {
    /// `all`, a program, a number, or points separated by commas, as `cargo xtask test --sweep` passes it on.
    ///
    /// # Errors
    /// None of these.
    pub fn parse(text: &str) -> Result<Self> {
        if text == "all" {
            return Ok(Self::All);
        }
        if let Some(program) = Program::ALL.into_iter().find(|p| p.word() == text) {
            return Ok(Self::Of(program));
        }
        if let Ok(seed) = text.parse() {
            return Ok(Self::Sample(seed));
        }
        let points: Option<Vec<Point>> = text.split(',').map(Point::parse).collect();
        points.map(Self::Only).with_context(|| {
            format!("--sweep {text:?}: want `all`, `rt`, `shim`, `agent-creates`, `agent-deletes`, a number, or points as `rt:openat:3`")
        })
    }
}

/// Whose system calls. The agent's differ by what it does meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Program {
    /// gantry-rt while a container is made.
    Rt,
    /// gantry-shim, for all of a pod's life.
    Shim,
    /// gantry-agent while a pod is made.
    AgentCreates,
    /// gantry-agent while a pod is deleted.
    AgentDeletes,
}

impl Program {
    /// All of them, in the order of trying.
    pub const ALL: [Self; 4] = [Self::Rt, Self::Shim, Self::AgentCreates, Self::AgentDeletes];

    fn word(self) -> &'static str {
        match self {
            Self::Rt => "rt",
            Self::Shim => "shim",
            Self::AgentCreates => "agent-creates",
            Self::AgentDeletes => "agent-deletes",
        }
    }
}

/// The `nth` invocation of one call by one task.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Point {
    /// Whose.
    pub program: Program,
    /// The system call's name.
    pub call: String,
    /// From 1 on.
    pub nth: usize,
}

impl Point {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.trim().split(':');
        let word = words.next()?;
        let program = Program::ALL.into_iter().find(|p| p.word() == word)?;
        let (call, nth) = (words.next()?, words.next()?.parse().ok()?);
        words.next().is_none().then(|| Self {
            program,
            call: call.to_owned(),
            nth,
        })
    }
}

impl std::fmt::Display for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}:{}", self.program.word(), self.call, self.nth)
    }
}

/// The points of a trace of strace: each line that begins a call, counted per task (named first
/// with `-f`) as strace's injection counts it. Tasks that make the same calls give the same points once.
/// Left out are those of a child on its way to becoming another program: strace would kill every
/// such child, so that nothing could be started any more.
pub fn points(program: Program, trace: &str) -> Vec<Point> {
    let mut counts: HashMap<(&str, &str), usize> = HashMap::new();
    let mut points: Vec<Point> = Vec::new();
    let mut highest: HashMap<&str, usize> = HashMap::new();
    // The first line may be strace's own start of the program.
    let others: HashSet<&str> = trace
        .lines()
        .skip(1)
        .map(task_and_call)
        .filter(|(_, rest)| rest.starts_with("execve("))
        .map(|(task, _)| task)
        .collect();
    for (task, rest) in trace.lines().map(task_and_call) {
        if others.contains(task) {
            continue;
        }
        let Some((call, _)) = rest.split_once('(') else {
            continue; // an exit, a signal, a resumed call
        };
        let is_call = call.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        // An exit is no place to be killed at, and the first execve is strace's own.
        if call.is_empty() || !is_call || call.starts_with("exit") || call == "execve" {
            continue;
        }
        let nth = counts.entry((task, call)).or_default();
        *nth += 1;
        // strace kills the first task that comes to its nth call of that name.
        let highest = highest.entry(call).or_default();
        if *nth > *highest {
            *highest = *nth;
            let (call, nth) = (call.to_owned(), *nth);
            points.push(Point { program, call, nth });
        }
    }
    points
}

/// `100 read(3, ...) = 1` is task 100 and its call; without `-f` no task is named.
fn task_and_call(line: &str) -> (&str, &str) {
    let is_task = |word: &str| word.bytes().all(|b| b.is_ascii_digit());
    match line.split_once(' ') {
        Some((word, rest)) if is_task(word) => (word, rest.trim_start()),
        _ => ("", line),
    }
}

/// Draws from each program alike, spread over its trace: a seed names its points.
pub fn choose(all: &BTreeMap<Program, Vec<Point>>, choice: &Choice) -> Vec<Point> {
    let seed = match choice {
        Choice::All => return all.values().flatten().cloned().collect(),
        Choice::Of(program) => return all.get(program).cloned().unwrap_or_default(),
        Choice::Only(points) => return points.clone(),
        Choice::Sample(seed) => *seed,
    };
    let mut chosen = Vec::new();
    for (program, points) in all {
        let count = SAMPLE_COUNT.min(points.len());
        for part in 0..count {
            // One of each part of the trace, so that early and late calls are met.
            let from = part * points.len() / count;
            let to = (part + 1) * points.len() / count;
            let salt = (part as u64) << 8 | *program as u64;
            let index = from + (mix(seed ^ salt) as usize) % (to - from).max(1);
            chosen.extend(points.get(index).cloned());
        }
    }
    chosen
}

/// SplitMix64: the seed of a sample needs no more.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_counted_per_task_and_call_and_met_once() {
        let trace = "\
100 brk(NULL) = 0x1
100 openat(AT_FDCWD, \"a\", O_RDONLY) = 3
101 openat(AT_FDCWD, \"b\", O_RDONLY <unfinished ...>
100 openat(AT_FDCWD, \"c\", O_RDONLY) = 4
101 <... openat resumed>) = 3
101 --- SIGCHLD {si_signo=SIGCHLD} ---
102 rt_sigaction(SIGINT, 0) = 0
102 execve(\"other\", [], 0) = 0
101 exit_group(0) = ?
101 +++ exited with 0 +++
";
        let found = points(Program::Rt, trace);
        let found: Vec<_> = found.iter().map(|p| (p.call.as_str(), p.nth)).collect();
        assert_eq!(found, [("brk", 1), ("openat", 1), ("openat", 2)]);
        let one_task = points(Program::Rt, "brk(NULL) = 0x1\nread(3, \"a b\", 3) = 3\n");
        assert_eq!(one_task.len(), 2);
    }

    #[test]
    fn a_seed_names_its_points_and_each_program_has_some() {
        let many = |program| {
            let point = |nth| Point {
                program,
                call: "read".into(),
                nth,
            };
            (program, (1..1000).map(point).collect())
        };
        let all: BTreeMap<_, _> = Program::ALL.map(many).into();
        let one = choose(&all, &Choice::Sample(1));
        assert_eq!(one, choose(&all, &Choice::Sample(1)));
        assert_ne!(one, choose(&all, &Choice::Sample(2)));
        assert_eq!(one.len(), SAMPLE_COUNT * Program::ALL.len());
        for program in Program::ALL {
            let of: Vec<_> = one.iter().filter(|p| p.program == program).collect();
            assert_eq!(of.len(), SAMPLE_COUNT);
            assert!(
                of[0].nth < 334 && of[2].nth >= 666,
                "early and late: {of:?}"
            );
        }
        assert_eq!(choose(&all, &Choice::All).len(), 4 * 999);
        assert_eq!(choose(&all, &Choice::Of(Program::Shim)).len(), 999);
    }

    #[test]
    fn a_printed_point_is_read_back() {
        let point = Point {
            program: Program::AgentDeletes,
            call: "write".into(),
            nth: 7,
        };
        let read = Choice::parse(&format!("{point},rt:openat:1")).unwrap();
        assert!(matches!(read, Choice::Only(points) if points.len() == 2 && points[0] == point));
        assert_eq!(Choice::parse("all").unwrap(), Choice::All);
        assert_eq!(Choice::parse("shim").unwrap(), Choice::Of(Program::Shim));
        assert_eq!(Choice::parse("12").unwrap(), Choice::Sample(12));
        for bad in ["", "some", "rt:openat", "kubelet:read:1", "rt:read:1:2"] {
            assert!(Choice::parse(bad).is_err(), "{bad}");
        }
    }
}
