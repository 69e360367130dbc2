//! What happens to flows on this node, for `gantry flows`.
//!
//! ```text
//!  dataplane::flows (events) ─► shown: names of both ends (names), verdict, filter ─► parts ─► tunnel
//! ```
//! Everything here lives as long as somebody watches: the names are made of the view when the first event
//! needs them, and again when the view has changed, at most once a second.

mod names;
mod shown;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ebpf_maps::event::FlowEvent;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use gantry_api::proto;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::dataplane::{Dataplane, DataplaneError, FlowNews, FlowWatch, PodPlaces};
use crate::view::View;

pub use self::names::{Names, Namespaces};
pub use self::shown::{Clock, Filter, show};

/// Flows in one message.
const PART_MAX: usize = 100;
/// How long events are gathered before they are sent on: what a reader does not notice.
const GATHER: Duration = Duration::from_millis(50);
/// How long one look takes that does not follow.
const LOOK: Duration = Duration::from_secs(1);
/// How old names may be when an end has none.
const NAMES_AGE: Duration = Duration::from_secs(1);

/// Where names come from.
#[derive(Clone)]
pub struct Sources {
    /// This node's name.
    pub node: String,
    /// `<run>/pods`: the pods' network namespaces.
    pub pods: PathBuf,
    /// Everything else.
    pub view: watch::Receiver<Arc<View>>,
    /// Which pods are where.
    pub dataplane: Arc<dyn Dataplane>,
}

/// Flows as they happen, in parts; without `follow` those of a second and what is known of the time
/// before, and the last part says that it is the last.
///
/// # Errors
/// The kernel's.
pub fn watch(
    sources: Sources,
    request: &proto::FlowsRequest,
) -> Result<BoxStream<'static, proto::NodeFlows>, DataplaneError> {
    let FlowWatch { recent, news } = sources.dataplane.watch_flows()?;
    let state = Watcher {
        filter: Filter::of(request),
        clock: Clock::now(),
        names: Named::new(sources),
        news,
        ends_at: (!request.follow).then(|| Instant::now() + LOOK),
        recent: Some(recent),
        is_over: false,
    };
    Ok(stream::unfold(state, |mut state| async {
        let part = state.part().await?;
        Some((part, state))
    })
    .boxed())
}

struct Watcher {
    filter: Filter,
    clock: Clock,
    names: Named,
    news: tokio::sync::broadcast::Receiver<FlowNews>,
    ends_at: Option<Instant>,
    recent: Option<Vec<FlowEvent>>,
    is_over: bool,
}

impl Watcher {
    /// The next part; none: the last one was given.
    async fn part(&mut self) -> Option<proto::NodeFlows> {
        if self.is_over {
            return None;
        }
        let mut part = proto::NodeFlows::default();
        for event in self.recent.take().unwrap_or_default() {
            self.add(&mut part, &event).await;
        }
        if !part.flows.is_empty() {
            return Some(part);
        }
        let mut until = self.ends_at;
        while part.flows.len() < PART_MAX {
            // Cancel-safe: an event is taken out when it is received.
            let news = tokio::select! {
                news = self.news.recv() => news,
                () = at(until) => break,
            };
            match news {
                Ok(FlowNews::Event(event)) => self.add(&mut part, &event).await,
                Ok(FlowNews::NotTold(count)) | Err(RecvError::Lagged(count)) => {
                    part.not_shown = part.not_shown.saturating_add(count);
                }
                Err(RecvError::Closed) => {
                    self.is_over = true;
                    break;
                }
            }
            if !part.flows.is_empty() || part.not_shown > 0 {
                let soon = Instant::now() + GATHER;
                until = Some(until.map_or(soon, |until| until.min(soon)));
            }
        }
        self.is_over |= self.ends_at.is_some_and(|end| Instant::now() >= end);
        part.last = self.is_over;
        Some(part)
    }

    async fn add(&mut self, part: &mut proto::NodeFlows, event: &FlowEvent) {
        let names = self.names.of(event).await;
        let flow = show(event, names, &self.clock);
        if self.filter.wants(&flow) {
            part.flows.push(flow);
        }
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// The names, as new as they have to be.
struct Named {
    sources: Sources,
    names: Names,
    made: Option<Instant>,
    namespaces: Namespaces,
    places: PodPlaces,
}

impl Named {
    fn new(sources: Sources) -> Self {
        Self {
            sources,
            names: Names::default(),
            made: None,
            namespaces: Namespaces::default(),
            places: PodPlaces::default(),
        }
    }

    async fn of(&mut self, event: &FlowEvent) -> &Names {
        let is_young = self.made.is_some_and(|made| made.elapsed() < NAMES_AGE);
        let has_changed = self.sources.view.has_changed().unwrap_or(false);
        let is_known = self.names.knows(event);
        if self.made.is_some() && (is_young || is_known && !has_changed) {
            return &self.names;
        }
        self.made = Some(Instant::now());
        let is_call = event.netns_cookie != 0;
        if is_call && !is_known {
            self.namespaces.look(&self.sources.pods).await;
        }
        let places = self.sources.dataplane.pod_places();
        // Most of those without a name are somebody outside, and nothing is new.
        if has_changed || is_call || places != self.places || self.names.is_empty() {
            let view = self.sources.view.borrow_and_update().clone();
            self.names = Names::new(&self.sources.node, &view, &places, &self.namespaces);
            self.places = places;
        }
        &self.names
    }
}
