//! What the programs tell of flows, for those who watch; see `ebpf_maps::event`.
//!
//! ```text
//!  watch ─► nobody else does ─► task: WATCH[0] = now + 3 s, each second
//!                                     EVENTS ─► the recent ones are kept ─► every watcher's queue
//!                                     BUDGETS ─► how many were not told
//!  the last watcher has gone ─► WATCH[0] = 0, the task ends, nothing is kept
//! ```
//! Invariants: without a watcher nothing is written, read or kept; an agent that dies while somebody
//! watches leaves programs that stop telling within three seconds. A watcher that does not keep up
//! loses the oldest, and is told how many.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{Array, MapData, MapError, PerCpuArray, RingBuf};
use ebpf_maps::event::{BUDGET_COUNT, Budget, FlowEvent};
use tokio::sync::broadcast;
use tokio::time::{MissedTickBehavior, interval};

use super::load::{take_map, unexpected};
use super::{DataplaneError, sys};

/// How long the programs go on telling without a word of the agent.
const WATCH_NS: u64 = 3_000_000_000;
/// How often it says that somebody watches, and asks what was not told.
const RENEWAL: Duration = Duration::from_secs(1);
/// Events that are kept while somebody watches, for who comes later.
const RECENT_MAX: usize = 1_024;
/// Events between the task and its slowest watcher.
const QUEUE: usize = 4_096;
/// Events read before others have their turn.
const READ_MAX: usize = 512;

/// News of the programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlowNews {
    /// Something happened to a flow.
    Event(FlowEvent),
    /// So many events were not told.
    NotTold(u64),
}

/// A watcher's place; dropping it ends the watch.
pub struct FlowWatch {
    /// The last that happened while others watched.
    pub recent: Vec<FlowEvent>,
    /// What happens from now on.
    pub news: broadcast::Receiver<FlowNews>,
}

/// WATCH, EVENTS and BUDGETS.
pub(super) struct Flows {
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    maps: Option<Maps>,
    sender: broadcast::Sender<FlowNews>,
    recent: VecDeque<FlowEvent>,
}

/// With the task while it runs.
struct Maps {
    watch: Array<MapData, u64>,
    events: RingBuf<MapData>,
    budgets: PerCpuArray<MapData, Budget>,
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    // Everything in it is whole between two statements.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Flows {
    /// Takes the maps out of a loaded object.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, DataplaneError> {
        let maps = Maps::take(ebpf)?;
        let (sender, _) = broadcast::channel(QUEUE);
        Ok(Self {
            shared: Arc::new(Mutex::new(Shared {
                maps: Some(maps),
                sender,
                recent: VecDeque::new(),
            })),
        })
    }

    /// Watches from now on. To be called within a runtime.
    pub(super) fn watch(&self) -> Result<FlowWatch, DataplaneError> {
        let mut shared = lock(&self.shared);
        let news = shared.sender.subscribe();
        let recent = shared.recent.iter().copied().collect();
        if let Some(mut maps) = shared.maps.take() {
            // Before anybody is told that the watch is on.
            if let Err(error) = maps.renew() {
                shared.maps = Some(maps);
                return Err(error);
            }
            tokio::spawn(run(self.shared.clone(), maps));
        }
        Ok(FlowWatch { recent, news })
    }
}

impl Maps {
    fn take(ebpf: &mut Ebpf) -> Result<Self, DataplaneError> {
        let watch = take_map(ebpf, "WATCH")?.try_into();
        let events = take_map(ebpf, "EVENTS")?.try_into();
        let budgets = take_map(ebpf, "BUDGETS")?.try_into();
        Ok(Self {
            watch: watch.map_err(|error: MapError| unexpected("WATCH", error))?,
            events: events.map_err(|error: MapError| unexpected("EVENTS", error))?,
            budgets: budgets.map_err(|error: MapError| unexpected("BUDGETS", error))?,
        })
    }

    fn renew(&mut self) -> Result<(), DataplaneError> {
        let until = sys::monotonic_ns().saturating_add(WATCH_NS);
        let written = self.watch.set(0, until, 0);
        written.map_err(|error| unexpected("WATCH", error))
    }

    /// Events that were not told, ever.
    fn missed(&self) -> u64 {
        let kinds = (0..BUDGET_COUNT).filter_map(|kind| self.budgets.get(&kind, 0).ok());
        kinds
            .flat_map(|cpus| cpus.iter().map(|budget| budget.missed).collect::<Vec<_>>())
            .fold(0, u64::wrapping_add)
    }

    fn read(&mut self) -> Option<FlowEvent> {
        let item = self.events.next()?;
        Some(sys::read_pod(&item).unwrap_or_default())
    }
}

/// Gives events to every watcher, and keeps them for later ones.
fn tell(shared: &Mutex<Shared>, events: &[FlowEvent]) {
    let mut shared = lock(shared);
    for event in events {
        if shared.recent.len() == RECENT_MAX {
            shared.recent.pop_front();
        }
        shared.recent.push_back(*event);
        let _ = shared.sender.send(FlowNews::Event(*event));
    }
}

/// The task: ends with its last watcher and gives the maps back.
async fn run(shared: Arc<Mutex<Shared>>, mut maps: Maps) {
    let mut missed = maps.missed();
    let mut renewal = interval(RENEWAL);
    renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let readable = sys::watch_events(&maps.events);
    let readable = match readable {
        Ok(readable) => Some(readable),
        Err(error) => {
            tracing::warn!(%error, "flows are read once a second only");
            None
        }
    };
    loop {
        let mut new = 0;
        // Cancel-safe: readiness stays, and a tick that is missed comes later.
        tokio::select! {
            ready = async { match &readable {
                Some(readable) => readable.readable().await,
                None => std::future::pending().await,
            } } => if let Ok(mut ready) = ready { ready.clear_ready() },
            _ = renewal.tick() => {
                if let Err(error) = maps.renew() {
                    tracing::warn!(%error, "flows are not told");
                }
                let now = maps.missed();
                new = now.wrapping_sub(missed);
                missed = now;
            }
        }
        loop {
            let events: Vec<FlowEvent> =
                std::iter::from_fn(|| maps.read()).take(READ_MAX).collect();
            tell(&shared, &events);
            if events.len() < READ_MAX {
                break;
            }
            tokio::task::yield_now().await;
        }
        let mut shared = lock(&shared);
        if new > 0 {
            let _ = shared.sender.send(FlowNews::NotTold(new));
        }
        if shared.sender.receiver_count() == 0 {
            if let Err(error) = maps.watch.set(0, 0, 0) {
                tracing::warn!(%error, "flows are told for three more seconds");
            }
            shared.recent.clear();
            // The next watcher is not shown what this one has left unread.
            while maps.read().is_some() {}
            drop(readable);
            shared.maps = Some(maps);
            return;
        }
    }
}
