//! Statuses on their way up: exactly once in effect, however often the stream breaks.
//!
//! ```text
//!  status() ──► dirty ──send──► in flight(seq) ──durable──► clean
//!                 ▲                  │ stream broken, new lineage, newer status meanwhile
//!                 └──────────────────┘
//! ```
//! One entry per pod UID with its newest status only; at most one is in flight per UID, 256 in all.
//! `seq` grows with every send and `(incarnation, seq)` orders the sends of all agent starts, so a
//! late or repeated one does no harm. A *final* status (every container has ended for good) is on
//! disk before it is sent and stays there until the control plane holds it *and* the pod has left
//! the view: should the pod be bound here without a final status after all (a restore), or be
//! deleted after it had ended, the record is offered again (the level rule). Then it is a tombstone
//! ([`super::tombstones`]): should the pod be in the view again, it is revived.
//!
//! Pure: no clock and no I/O. [`super::Reporter`] is the handle; `finals.rs` does the disk.

use std::collections::BTreeMap;

use bytes::Bytes;
use gantry_api::proto;
use gantry_api::proto::status_ack::Outcome;
use gantry_api::rules::{self, Rule};

use super::tombstones::{Tombstone, Tombstones};
use crate::ids::PodUid;
use crate::view::View;

/// Statuses sent and not yet acknowledged.
pub(super) const IN_FLIGHT_MAX: usize = 256;

/// One status as the pod worker gave it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Status {
    pub(super) namespace: String,
    pub(super) name: String,
    /// A PodStatus.
    pub(super) json: Bytes,
    /// Every container has ended for good.
    pub(super) is_final: bool,
    /// Nothing of the pod is left on this node.
    pub(super) released: bool,
    /// The last word on an object that shows a static pod, which runs on: no pod's end.
    pub(super) is_mirror: bool,
}

/// How the view shows a pod after a commit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Seen {
    /// Bound to this node.
    pub(super) in_view: bool,
    /// This commit added or changed it.
    pub(super) changed: bool,
    /// Its status in the store is Succeeded or Failed.
    pub(super) ended: bool,
    /// It has a deletionTimestamp.
    pub(super) deleting: bool,
}

struct Entry {
    status: Status,
    dirty: bool,
    in_flight: Option<u64>,
    /// Acknowledged as durable, in this form.
    durable: bool,
    /// A final status of this form is on disk; always true for one that is not final.
    persisted: bool,
    /// The pod was in the view at the last commit.
    in_view: bool,
}

impl Entry {
    /// Of a final status that is on disk.
    fn of_disk(status: Status) -> Self {
        Self {
            status,
            dirty: true,
            in_flight: None,
            durable: false,
            persisted: true,
            in_view: true, // not known before the next commit: keep
        }
    }
}

/// See the module.
pub(super) struct Reports {
    incarnation: u64,
    seq: u64,
    in_flight: usize,
    entries: BTreeMap<PodUid, Entry>,
    tombstones: Tombstones,
}

/// What [`Reports::take_finished`] leaves to do on the disk.
#[derive(PartialEq, Eq, Debug, Default)]
pub(super) struct Finished {
    /// Records that are tombstones from now on.
    pub(super) buried: Vec<Tombstone>,
    /// Records that nobody needs.
    pub(super) removed: Vec<PodUid>,
    /// Tombstones that had to make room.
    pub(super) forgotten: Vec<Tombstone>,
}

impl Finished {
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Reports {
    /// * `incarnation` – larger than that of every earlier start of this agent.
    /// * `finals` – the records that an earlier start left on disk.
    pub(super) fn new(
        incarnation: u64,
        finals: impl IntoIterator<Item = (PodUid, Status)>,
    ) -> Self {
        let entries = finals
            .into_iter()
            .map(|(uid, status)| (uid, Entry::of_disk(status)));
        Self {
            incarnation,
            seq: 0,
            in_flight: 0,
            entries: entries.collect(),
            tombstones: Tombstones::default(),
        }
    }

    /// The same with what earlier starts have left of pods that ended.
    pub(super) fn remembering(mut self, tombstones: Tombstones) -> Self {
        self.tombstones = tombstones;
        self
    }

    /// Takes a pod's newest status. Returns whether it differs from the one before.
    pub(super) fn status(&mut self, uid: &PodUid, status: Status) -> bool {
        let is_final = status.is_final;
        match self.entries.get_mut(uid) {
            Some(entry) if entry.status == status => false,
            // A pod that has ended stays so, whatever a worker that lost its memory says.
            Some(entry)
                if entry.status.is_final && !is_final && !rules::is_off(Rule::FinalStays) =>
            {
                false
            }
            Some(entry) => {
                entry.status = status;
                entry.dirty = true;
                entry.durable = false;
                entry.persisted = !is_final;
                true
            }
            None if !is_final && self.tombstones.of(uid).is_some() => false,
            None => {
                let entry = Entry {
                    status,
                    dirty: true,
                    in_flight: None,
                    durable: false,
                    persisted: !is_final,
                    in_view: true,
                };
                self.entries.insert(uid.clone(), entry);
                true
            }
        }
    }

    /// The next status to send, if one may be sent now.
    pub(super) fn take_next(&mut self) -> Option<proto::StatusReport> {
        if self.in_flight >= IN_FLIGHT_MAX {
            return None;
        }
        let ready = |entry: &Entry| entry.dirty && entry.persisted && entry.in_flight.is_none();
        // Final ones first: the removal of an object waits for them.
        let next = self
            .entries
            .iter_mut()
            .filter(|(_, entry)| ready(entry))
            .min_by_key(|(_, entry)| !entry.status.is_final);
        let (uid, entry) = next?;
        self.seq += 1;
        self.in_flight += 1;
        entry.dirty = false;
        entry.in_flight = Some(self.seq);
        Some(proto::StatusReport {
            uid: uid.as_str().into(),
            incarnation: self.incarnation,
            seq: self.seq,
            namespace: entry.status.namespace.clone(),
            name: entry.status.name.clone(),
            status_json: entry.status.json.clone(),
            r#final: entry.status.is_final,
            released: entry.status.released,
        })
    }

    /// Takes the control plane's answer to one send; answers to other sends are ignored.
    pub(super) fn acked(&mut self, ack: &proto::StatusAck) {
        let Ok(uid) = PodUid::new(&ack.uid) else {
            return;
        };
        let Some(entry) = self.entries.get_mut(&uid) else {
            return;
        };
        if ack.incarnation != self.incarnation || entry.in_flight != Some(ack.seq) {
            return;
        }
        entry.in_flight = None;
        self.in_flight -= 1;
        match ack.outcome() {
            Outcome::Durable => entry.durable = !entry.dirty,
            // Not durable: kept, and offered again when the view shows the pod, or after a reconnect.
            Outcome::NotBound => entry.durable |= rules::is_off(Rule::NotBoundIsKept),
            Outcome::Gone => {
                entry.dirty = false;
                entry.durable = true;
                entry.in_view = false;
            }
        }
    }

    /// The stream broke: what was in flight has to be sent again.
    pub(super) fn broken(&mut self) {
        self.in_flight = 0;
        for entry in self.entries.values_mut() {
            entry.in_flight = None;
            entry.dirty |= !entry.durable;
        }
    }

    /// Another history of the store: nothing is known to be durable in it.
    pub(super) fn new_lineage(&mut self) {
        for entry in self.entries.values_mut() {
            entry.durable = false;
            entry.dirty = true;
        }
    }

    /// A commit was applied. `seen` tells of each pod how the view shows it now.
    pub(super) fn committed(&mut self, seen: impl Fn(&PodUid) -> Seen) {
        for (uid, entry) in &mut self.entries {
            let seen = seen(uid);
            entry.in_view = seen.in_view;
            let lacks_final =
                entry.status.is_final && (!seen.ended || (seen.deleting && entry.status.released));
            if seen.changed && (lacks_final || !entry.durable) {
                entry.dirty = true;
            }
        }
    }

    /// Final records that are to be written to disk.
    pub(super) fn unpersisted(&self) -> Vec<(PodUid, Status)> {
        let entries = self.entries.iter().filter(|(_, entry)| !entry.persisted);
        entries
            .map(|(uid, entry)| (uid.clone(), entry.status.clone()))
            .collect()
    }

    /// This form of a final record is on disk now.
    pub(super) fn persisted(&mut self, uid: &PodUid, status: &Status) {
        if let Some(entry) = self
            .entries
            .get_mut(uid)
            .filter(|entry| entry.status == *status)
        {
            entry.persisted = true;
        }
    }

    /// Whether the newest status of a pod is final and on disk, or was and is needed no more.
    pub(super) fn is_persisted_final(&self, uid: &PodUid) -> bool {
        self.entries
            .get(uid)
            .is_none_or(|entry| entry.status.is_final && entry.persisted)
    }

    /// Nothing waits to be sent or answered.
    pub(super) fn is_settled(&self) -> bool {
        self.in_flight == 0 && self.entries.values().all(|entry| !entry.dirty)
    }

    /// Forgets entries that nobody needs any more: held by the control plane, pod not in the view.
    /// A pod that has ended is remembered by its tombstone.
    pub(super) fn take_finished(&mut self) -> Finished {
        let mut finished = Finished::default();
        let (entries, tombstones) = (&mut self.entries, &mut self.tombstones);
        entries.retain(|uid, entry| {
            let needed = entry.in_view || !entry.durable || entry.in_flight.is_some();
            if needed || !entry.status.is_final {
                return needed;
            }
            if entry.status.is_mirror {
                finished.removed.push(uid.clone());
            } else {
                finished.forgotten.extend(tombstones.set(uid.clone()));
                finished.buried.push((uid.clone(), tombstones.hour()));
            }
            false
        });
        finished
    }

    /// One hour more has passed; returns it.
    pub(super) fn next_hour(&mut self) -> u64 {
        self.tombstones.next_hour()
    }

    /// Of these pods those that ended here and are no longer spoken of.
    pub(super) fn buried<'a>(&self, pods: impl Iterator<Item = &'a PodUid>) -> Vec<Tombstone> {
        if rules::is_off(Rule::Tombstones) {
            return Vec::new();
        }
        let buried = |uid: &PodUid| Some((uid.clone(), self.tombstones.of(uid)?));
        pods.filter_map(buried).collect()
    }

    /// A pod that ended here is in the view again: its last word waits for the control plane once more.
    pub(super) fn revive(&mut self, uid: &PodUid, status: Status) {
        self.tombstones.take(uid);
        let entry = || Entry::of_disk(status);
        self.entries.entry(uid.clone()).or_insert_with(entry);
    }

    /// How many [`Reports::ended`] tells of.
    pub(super) fn ended_count(&self) -> usize {
        let (held, buried) = (self.held_ended().count(), self.tombstones.len());
        match rules::is_off(Rule::Tombstones) {
            true => 0,
            false => held + buried,
        }
    }

    fn held_ended(&self) -> impl Iterator<Item = (&PodUid, &Entry)> {
        let ended = |entry: &Entry| entry.status.is_final && !entry.status.is_mirror;
        self.entries.iter().filter(move |(_, entry)| ended(entry))
    }

    /// Every pod that ended here: those that are still spoken of, as namespace and name have them, and the
    /// tombstones.
    pub(super) fn ended(&self) -> (Vec<proto::HeldPod>, Vec<Tombstone>) {
        let held = self.held_ended().map(|(uid, entry)| proto::HeldPod {
            uid: uid.as_str().into(),
            namespace: entry.status.namespace.clone(),
            name: entry.status.name.clone(),
        });
        (held.collect(), self.tombstones.all().collect())
    }

    /// The last status given for a pod that ended on this node.
    pub(super) fn final_status(&self, uid: &PodUid) -> Option<&Status> {
        Some(&self.entries.get(uid)?.status).filter(|status| status.is_final)
    }
}

/// Stands for the last word of a pod that can be read no more: that it has ended is known.
pub(super) fn lost(view: &View, uid: &PodUid) -> Status {
    let pod = view.pods.get(uid).map(|pod| &pod.metadata);
    let text = |field: Option<&String>| field.cloned().unwrap_or_default();
    let status = serde_json::json!({
        "phase": "Failed",
        "reason": "StatusLost",
        "message": "the pod has ended on this node before; its last status cannot be read any more",
    });
    Status {
        namespace: text(pod.and_then(|metadata| metadata.namespace.as_ref())),
        name: text(pod.and_then(|metadata| metadata.name.as_ref())),
        json: status.to_string().into(),
        is_final: true,
        released: true,
        is_mirror: false,
    }
}

#[cfg(test)]
mod tests;
