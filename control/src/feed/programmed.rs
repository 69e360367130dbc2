//! The condition `Programmed` of Services: one that had no backend has one, and every node knows.
//!
//! ```text
//!  serving backends 0 -> 1, by revision R ─► wait for the floor R, 1 s at most ─► True
//!                   1 -> 0                ─────────────────────────────────────► False
//! ```
//! Nothing is held up by it: `Ready` is what causes programming, so it cannot wait for it. Whoever is about
//! to use a Service that he has just made asks for this condition (`gantry rollout status` does).
//!
//! [`Serving`] is the pure part, kept by the index. What it says of each Service replaces what it said before,
//! so the one who writes conditions is never behind by more than one write a Service.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::Service;
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use gantry_api::proto;
use gantry_api::status::{Reason, Status};
use tokio::time::{Instant, sleep_until};

use super::Inner;
use super::join::Name;

const PROGRAMMED: &str = "Programmed";
/// As long as a drain waits for the other direction of the same change.
const WAITED_MAX: Duration = Duration::from_secs(1);
/// Times that a write is tried when others write the same Service.
const ATTEMPTS: u32 = 5;
/// Before a write that failed is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// What became of a Service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Turn {
    /// Its first backend serves since this revision.
    First(u64),
    /// None does any more.
    Nobody,
}

/// Which backends serve, by Service.
#[derive(Default)]
pub(super) struct Serving {
    backends: BTreeMap<Name, BTreeSet<String>>,
    turns: BTreeMap<Name, Turn>,
}

impl Serving {
    /// A backend, by any key of its own, is this from now on, at `rev`; none: it has gone.
    pub(super) fn note(
        &mut self,
        service: &Name,
        key: &str,
        backend: Option<&proto::Backend>,
        rev: u64,
    ) {
        let serves = backend.is_some_and(|it| it.state() == proto::backend::State::Serving);
        if serves {
            let backends = self.backends.entry(service.clone()).or_default();
            let is_first = backends.is_empty();
            backends.insert(key.to_owned());
            if is_first {
                self.turns.insert(service.clone(), Turn::First(rev));
            }
            return;
        }
        let Some(backends) = self.backends.get_mut(service) else {
            return;
        };
        if backends.remove(key) && backends.is_empty() {
            self.backends.remove(service);
            self.turns.insert(service.clone(), Turn::Nobody);
        }
    }

    /// What has turned since the last call.
    pub(super) fn take(&mut self) -> BTreeMap<Name, Turn> {
        std::mem::take(&mut self.turns)
    }
}

/// Waits of one Service.
struct Wait {
    rev: u64,
    since: Instant,
}

/// Writes the conditions, for as long as the feed runs.
pub(super) async fn write(inner: &Arc<Inner>) {
    let (mut common, mut acked) = (inner.common.subscribe(), inner.acked.subscribe());
    common.mark_changed();
    let mut waits: BTreeMap<Name, Wait> = BTreeMap::new();
    let mut failed: BTreeMap<Name, Turn> = BTreeMap::new();
    let mut retry_at = Instant::now();
    loop {
        let due = waits.values().map(|wait| wait.since + WAITED_MAX).min();
        let due = due
            .into_iter()
            .chain((!failed.is_empty()).then_some(retry_at))
            .min();
        // Cancel-safe: all of it only waits.
        tokio::select! {
            changed = common.changed() => if changed.is_err() { return },
            changed = acked.changed(), if !waits.is_empty() => if changed.is_err() { return },
            () = sleep_until(due.unwrap_or(retry_at)), if due.is_some() => {}
        }
        let now = Instant::now();
        let mut turns = inner.index_mut().take_turns();
        if now >= retry_at {
            for (name, turn) in std::mem::take(&mut failed) {
                turns.entry(name).or_insert(turn);
            }
        }
        let mut wanted = Vec::new();
        for (name, turn) in turns {
            failed.remove(&name);
            match turn {
                Turn::First(rev) => {
                    waits.insert(name, Wait { rev, since: now });
                }
                Turn::Nobody => {
                    waits.remove(&name);
                    wanted.push((name, turn, nobody()));
                }
            }
        }
        if !waits.is_empty() {
            let floors = inner.floors();
            waits.retain(|name, wait| {
                let floor = floors.at(wait.rev);
                let took = now.saturating_duration_since(wait.since);
                let is_over = floor.missing.is_empty() || took >= WAITED_MAX;
                if is_over {
                    wanted.push((name.clone(), Turn::First(wait.rev), told(&floor, took)));
                }
                !is_over
            });
        }
        for (name, turn, condition) in wanted {
            if let Err(error) = store(inner, &name, &condition).await {
                let (namespace, name_) = (&name.0, &name.1);
                tracing::warn!(%namespace, name = %name_, %error, "condition Programmed is not written; trying again");
                failed.insert(name, turn);
                retry_at = Instant::now() + RETRY;
            }
        }
    }
}

fn nobody() -> Condition {
    condition("False", "NoBackend", "no backend serves".to_owned())
}

fn told(floor: &proto::Floor, took: Duration) -> Condition {
    let (nodes, missing) = (floor.nodes, floor.missing_count);
    let programmed = nodes.saturating_sub(missing);
    let took = took.as_millis();
    match missing {
        0 => condition(
            "True",
            "EveryNode",
            format!("programmed on {programmed}/{nodes} nodes in {took} ms"),
        ),
        _ => condition(
            "True",
            "Capped",
            format!(
                "programmed on {programmed}/{nodes} nodes; not waited any longer for {}",
                floor.missing.join(", ")
            ),
        ),
    }
}

fn condition(status: &str, reason: &str, message: String) -> Condition {
    Condition {
        type_: PROGRAMMED.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        last_transition_time: Time(jiff::Timestamp::now()),
        observed_generation: None,
    }
}

/// The Service with this condition; none: it says so already.
fn with_condition(service: &Service, condition: &Condition) -> Option<Service> {
    let mut service = service.clone();
    let status = service.status.get_or_insert_default();
    let conditions = status.conditions.get_or_insert_default();
    match conditions.iter_mut().find(|it| it.type_ == condition.type_) {
        Some(old) if old.status == condition.status => return None,
        Some(old) => *old = condition.clone(),
        None => conditions.push(condition.clone()),
    }
    Some(service)
}

async fn store(inner: &Inner, name: &Name, condition: &Condition) -> Result<(), Status> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        // With the revision that was read: whoever was faster is not undone.
        let Some(service) = inner.registry.get::<Service>(&name.0, &name.1)? else {
            return Ok(());
        };
        let Some(service) = with_condition(&service, condition) else {
            return Ok(());
        };
        match inner.registry.update_status(&service).await {
            Err(status) if status.reason == Reason::NotFound => return Ok(()),
            Err(status) if status.reason == Reason::Conflict && attempt < ATTEMPTS => {}
            other => return other.map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(state: proto::backend::State) -> proto::Backend {
        let mut backend = proto::Backend::default();
        backend.set_state(state);
        backend
    }

    #[test]
    fn only_the_first_and_the_last_turn_a_service() {
        use proto::backend::State::{Draining, NotReady, Serving as Serves};
        let web: Name = ("d".into(), "web".into());
        let mut serving = Serving::default();
        let turned = |serving: &mut Serving| serving.take().remove(&web);
        serving.note(&web, "a", Some(&backend(NotReady)), 3);
        assert_eq!(turned(&mut serving), None);
        serving.note(&web, "a", Some(&backend(Serves)), 4);
        serving.note(&web, "b", Some(&backend(Serves)), 5);
        assert_eq!(turned(&mut serving), Some(Turn::First(4)));
        serving.note(&web, "a", Some(&backend(Draining)), 6);
        serving.note(&web, "c", None, 6);
        assert_eq!(turned(&mut serving), None, "b serves");
        serving.note(&web, "b", None, 7);
        assert_eq!(turned(&mut serving), Some(Turn::Nobody));
        // What was not told yet is told as it is now.
        serving.note(&web, "c", Some(&backend(Serves)), 8);
        serving.note(&web, "c", None, 9);
        assert_eq!(turned(&mut serving), Some(Turn::Nobody));
        assert!(serving.backends.is_empty());
    }

    #[test]
    fn a_condition_is_written_when_it_turns_and_others_stay() {
        let mut service = Service::default();
        let ready = told(&floor(3, &[]), Duration::from_millis(4));
        assert_eq!(ready.message, "programmed on 3/3 nodes in 4 ms");
        service = with_condition(&service, &ready).unwrap();
        assert_eq!(with_condition(&service, &ready), None);
        let mut other = ready.clone();
        other.type_ = "Other".into();
        service = with_condition(&service, &other).unwrap();
        service = with_condition(&service, &nobody()).unwrap();
        let conditions = service.status.unwrap().conditions.unwrap();
        let shown: Vec<(&str, &str)> = conditions
            .iter()
            .map(|it| (it.type_.as_str(), it.status.as_str()))
            .collect();
        assert_eq!(shown, [("Programmed", "False"), ("Other", "True")]);
        let capped = told(&floor(3, &["n7"]), WAITED_MAX);
        assert_eq!(capped.reason, "Capped");
        assert_eq!(
            capped.message,
            "programmed on 2/3 nodes; not waited any longer for n7"
        );
    }

    fn floor(nodes: u32, missing: &[&str]) -> proto::Floor {
        proto::Floor {
            nodes,
            missing_count: missing.len() as u32,
            missing: missing.iter().map(|name| (*name).to_owned()).collect(),
            ..Default::default()
        }
    }
}
