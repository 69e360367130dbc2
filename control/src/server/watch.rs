//! One client's watch: the state first, then every change, as objects or as table rows.
//!
//! ```text
//!  no version given:  Initial ──ADDED for each──► BOOKMARK ──► Live
//!  a version given:                               BOOKMARK ──► Live ──► stop, gone, client left
//! ```
//! The stream is pulled: nothing is read from the store before the client has room for it, so a slow
//! client costs a position in the shared history, no queue. Selectors make a change appear as ADDED
//! or DELETED when the object starts or stops to match.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, Stream};
use gantry_api::proto::watch_event::Type;
use gantry_api::proto::{WatchEvent, WatchRequest};
use gantry_api::status::Status;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::object::present;
use super::table::Renderer;
use super::view::View;
use crate::store::{Change, Compacted, Entry, Revision, Store, Watch};

/// Pause between bookmarks of a quiet watch: what a client resumes from stays in the history.
const BOOKMARK_PAUSE: Duration = Duration::from_secs(60);

enum Phase {
    Initial {
        entries: std::vec::IntoIter<Arc<Entry>>,
        revision: Revision,
    },
    Live,
    Ended,
}

struct Session {
    view: View,
    phase: Phase,
    watch: Watch,
    /// Renders rows when the client wants a table.
    renderer: Option<Renderer>,
    columns_are_sent: bool,
    bookmark_at: Instant,
    stop: CancellationToken,
}

/// Opens the watch that a request asks for.
pub(super) fn open(
    store: &Store,
    view: View,
    request: &WatchRequest,
    stop: CancellationToken,
) -> Result<impl Stream<Item = Result<WatchEvent, tonic::Status>> + use<>, Status> {
    let renderer = request
        .as_table
        .then(|| Renderer::new(view.kind, request.wide, request.with_namespace));
    let (phase, watch) = start(store, &view, &request.resource_version)?;
    let session = Session {
        view,
        phase,
        watch,
        renderer,
        columns_are_sent: false,
        bookmark_at: Instant::now() + BOOKMARK_PAUSE,
        stop,
    };
    Ok(stream::unfold(session, |mut session| async move {
        let item = session.next().await?;
        if item.is_err() {
            session.phase = Phase::Ended;
        }
        Some((item.map_err(tonic::Status::from), session))
    }))
}

fn start(store: &Store, view: &View, version: &str) -> Result<(Phase, Watch), Status> {
    if version.is_empty() || version == "0" {
        let (revision, entries) = store.list(&view.prefix);
        let entries = entries.into_iter();
        let watch = store.watch(&view.prefix, revision).map_err(|e| gone(&e))?;
        return Ok((Phase::Initial { entries, revision }, watch));
    }
    let revision = version
        .parse()
        .map_err(|_| Status::bad_request(format!("resourceVersion {version:?} is not a number")))?;
    let watch = store.watch(&view.prefix, revision).map_err(|e| gone(&e))?;
    let entries = Vec::new().into_iter();
    Ok((Phase::Initial { entries, revision }, watch))
}

fn gone(error: &Compacted) -> Status {
    Status::gone(format!("too old resource version: {error}"))
}

impl Session {
    async fn next(&mut self) -> Option<Result<WatchEvent, Status>> {
        match &mut self.phase {
            Phase::Initial { entries, revision } => {
                for entry in entries {
                    match self.view.has(&entry) {
                        Ok(true) => {
                            let revision = entry.mod_revision;
                            return Some(self.event(Type::Added, &entry, revision));
                        }
                        Ok(false) => {}
                        Err(status) => return Some(Err(status)),
                    }
                }
                let revision = *revision;
                self.phase = Phase::Live;
                Some(Ok(bookmark(revision)))
            }
            Phase::Live => self.next_live().await,
            Phase::Ended => None,
        }
    }

    async fn next_live(&mut self) -> Option<Result<WatchEvent, Status>> {
        loop {
            tokio::select! {
                // In this order: a bookmark only when no change is waiting. All arms are cancel safe.
                biased;
                () = self.stop.cancelled() => {
                    return Some(Err(Status::unavailable("the server is stopping: watch again")));
                }
                change = self.watch.next() => {
                    let Some(change) = change else {
                        return self.watch.ended().map(|error| Err(gone(error)));
                    };
                    match self.event_of(&change) {
                        Ok(None) => {}
                        Ok(Some(event)) => return Some(Ok(event)),
                        Err(status) => return Some(Err(status)),
                    }
                }
                () = tokio::time::sleep_until(self.bookmark_at) => {
                    self.bookmark_at = Instant::now() + BOOKMARK_PAUSE;
                    return Some(Ok(bookmark(self.watch.revision())));
                }
            }
        }
    }

    /// What a change is to this client; `None` when it concerns an object that is not meant.
    fn event_of(&mut self, change: &Change) -> Result<Option<WatchEvent>, Status> {
        let revision = change.revision();
        let previous = change.previous();
        let was = previous.map_or(Ok(false), |entry| self.view.has(entry))?;
        let (kind, entry) = match change {
            Change::Put { entry, .. } => match (was, self.view.has(entry)?) {
                (false, true) => (Type::Added, Some(entry)),
                (true, true) => (Type::Modified, Some(entry)),
                (true, false) => (Type::Deleted, previous),
                (false, false) => (Type::Deleted, None),
            },
            Change::Delete { previous, .. } => (Type::Deleted, was.then_some(previous)),
        };
        entry
            .map(|entry| self.event(kind, entry, revision))
            .transpose()
    }

    fn event(
        &mut self,
        kind: Type,
        entry: &Entry,
        revision: Revision,
    ) -> Result<WatchEvent, Status> {
        let mut event = WatchEvent {
            r#type: kind.into(),
            resource_version: revision.to_string(),
            ..WatchEvent::default()
        };
        match &self.renderer {
            Some(renderer) => {
                event.row = Some(renderer.row(entry)?);
                if !self.columns_are_sent {
                    event.columns = renderer.columns();
                    self.columns_are_sent = true;
                }
            }
            None => event.json = present(entry, revision),
        }
        Ok(event)
    }
}

fn bookmark(revision: Revision) -> WatchEvent {
    WatchEvent {
        r#type: Type::Bookmark.into(),
        resource_version: revision.to_string(),
        ..WatchEvent::default()
    }
}
