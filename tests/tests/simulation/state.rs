//! What the simulation knows beside the processes: the seed's choices, the machines, the trace, what went
//! wrong. One thread, so one thread-local; never borrowed across an `await`.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::path::PathBuf;

use gantry_agent::ids::PodUid;

use super::history::History;
use super::host;
use super::wire::Net;

/// Milliseconds as nanoseconds.
pub const MS: u64 = 1_000_000;
/// Seconds as nanoseconds.
pub const S: u64 = 1_000 * MS;

/// The choices of one seed: splitmix64.
pub struct Choices(u64);

impl Choices {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0xd134_2543_de82_ef95) ^ 0x2545_f491_4f6c_dd1d)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    /// True so many times in a hundred.
    pub fn percent(&mut self, chance: u64) -> bool {
        self.next() % 100 < chance
    }
}

/// What the kernel of a node's machine holds while agents come and go.
pub struct Machine {
    pub name: String,
    pub dir: PathBuf,
    /// Which boot this is: 1, 2, ...
    pub boot: u32,
    /// When it lost its power last.
    pub stopped_at: u64,
    pub containers: BTreeMap<PodUid, Container>,
    /// What is programmed: of each Service the backends that get new connections.
    pub plane: BTreeMap<String, BTreeSet<PodUid>>,
    /// Everything common up to here is programmed, in this boot and in this history.
    pub programmed: Option<(String, u64)>,
    /// A commit was taken since the machine started.
    pub is_back: bool,
    /// The newest view that was published, and of which history.
    pub seen: Option<(String, u64)>,
    /// Pods that have ended here, with their last word on the disk.
    pub ended: BTreeSet<PodUid>,
    pub addresses: u32,
}

/// A pod's processes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Container {
    pub namespace: String,
    pub name: String,
    pub address: String,
    pub exited: Option<i32>,
}

pub struct State {
    pub choices: Choices,
    pub machines: Vec<Machine>,
    pub history: History,
    pub net: Net,
    /// Every UID that was started, with the nodes it was started on.
    pub started: BTreeMap<PodUid, BTreeSet<usize>>,
    /// Pods that were ended after every node had said that it sends to them no more.
    pub ended_by_floor: BTreeSet<PodUid>,
    /// Drains, by how they ended.
    pub drained: BTreeMap<&'static str, u32>,
    pub violations: Vec<String>,
    pub digest_mismatches: u64,
    /// The agent dies where a pod ends next.
    pub dies_at_end: bool,
    /// Machines that lose their power when another one ends a pod by floor, and for how long.
    pub reboots_at_floor: BTreeMap<usize, u64>,
    /// A backup is to be taken as soon as a pod waits for its node: into this file.
    pub backup_of_unbound: Option<PathBuf>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    event_count: u64,
    is_shown: bool,
    trace_hash: u64,
    trace_lines: u64,
}

/// What is due at a time.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Event {
    /// Something may be read from this connection, by this side.
    Readable { connection: usize, side: usize },
    /// The next step of the plan.
    Step(usize),
    /// A machine starts its agent.
    AgentStarts(usize),
    /// A machine loses its power, for so long.
    LosesPower(usize, u64),
    /// A machine has started.
    Boots(usize),
    /// The control plane starts.
    ControlStarts,
    /// A machine's net is whole again.
    Heals(usize),
    /// The control plane's disk has room again.
    DiskHasRoom,
}

thread_local! {
    static STATE: RefCell<Option<State>> = const { RefCell::new(None) };
}

/// Begins a simulation with these choices.
pub fn begin(seed: u64, is_shown: bool) {
    let state = State {
        choices: Choices::new(seed),
        machines: Vec::new(),
        history: History::default(),
        net: Net::default(),
        started: BTreeMap::new(),
        ended_by_floor: BTreeSet::new(),
        drained: BTreeMap::new(),
        violations: Vec::new(),
        digest_mismatches: 0,
        dies_at_end: false,
        reboots_at_floor: BTreeMap::new(),
        backup_of_unbound: None,
        events: BinaryHeap::new(),
        event_count: 0,
        is_shown,
        trace_hash: 0xcbf2_9ce4_8422_2325,
        trace_lines: 0,
    };
    STATE.with(|cell| *cell.borrow_mut() = Some(state));
}

/// Looks at the state.
pub fn with<T>(look: impl FnOnce(&mut State) -> T) -> T {
    STATE.with(|cell| {
        look(
            cell.borrow_mut()
                .as_mut()
                .expect("the simulation has begun"),
        )
    })
}

/// A line of the trace.
pub fn trace(text: impl AsRef<str>) {
    with(|state| state.trace(text.as_ref()));
}

/// An invariant does not hold.
pub fn violated(text: impl Into<String>) {
    with(|state| state.violated(text));
}

impl State {
    pub fn trace(&mut self, text: &str) {
        let at = host::now_ns() / 1_000;
        let line = format!("{:>4}.{:06} {text}", at / 1_000_000, at % 1_000_000);
        for byte in line.bytes() {
            self.trace_hash = (self.trace_hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
        self.trace_lines += 1;
        if self.is_shown {
            println!("{line}");
        }
    }

    pub fn violated(&mut self, text: impl Into<String>) {
        let text = text.into();
        self.trace(&format!("VIOLATED {text}"));
        if self.violations.len() < 20 {
            self.violations.push(text);
        }
    }

    /// The same for the same seed, whatever the machine.
    pub fn fingerprint(&self) -> String {
        format!("{:016x} ({} lines)", self.trace_hash, self.trace_lines)
    }

    pub fn at(&mut self, ns: u64, event: Event) {
        self.event_count += 1;
        self.events.push(Reverse((ns, self.event_count, event)));
    }

    pub fn after(&mut self, ns: u64, event: Event) {
        self.at(host::now_ns() + ns, event);
    }

    /// When the first event is due.
    pub fn next_event_at(&self) -> Option<u64> {
        self.events.peek().map(|Reverse((at, ..))| *at)
    }

    /// An event that is due now.
    pub fn take_due(&mut self) -> Option<Event> {
        if self.next_event_at()? > host::now_ns() {
            return None;
        }
        self.events.pop().map(|Reverse((_, _, event))| event)
    }
}
