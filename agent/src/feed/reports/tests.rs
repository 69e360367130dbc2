use proptest::prelude::*;

use super::*;

fn uid(i: u8) -> PodUid {
    PodUid::new(&format!("u{i}")).unwrap()
}

fn status(text: u8, is_final: bool, released: bool) -> Status {
    let json = Bytes::from(vec![text]);
    Status {
        namespace: "d".into(),
        name: "p".into(),
        json,
        is_final,
        released,
        is_mirror: false,
    }
}

/// Nothing but that this pod's record is a tombstone.
fn buried(uid: PodUid) -> Finished {
    Finished {
        buried: vec![(uid, 0)],
        ..Default::default()
    }
}

fn ack(report: &proto::StatusReport, outcome: Outcome) -> proto::StatusAck {
    let mut ack = proto::StatusAck {
        uid: report.uid.clone(),
        incarnation: report.incarnation,
        seq: report.seq,
        ..Default::default()
    };
    ack.set_outcome(outcome);
    ack
}

#[test]
fn only_the_newest_status_is_sent_and_one_at_a_time() {
    let mut reports = Reports::new(1, []);
    reports.status(&uid(0), status(1, false, false));
    let first = reports.take_next().unwrap();
    reports.status(&uid(0), status(2, false, false));
    reports.status(&uid(0), status(3, false, false));
    assert!(reports.take_next().is_none(), "one in flight per pod");
    reports.acked(&ack(&first, Outcome::Durable));
    let second = reports.take_next().unwrap();
    assert_eq!(second.status_json, vec![3]);
    assert!(second.seq > first.seq);
    reports.acked(&ack(&second, Outcome::Durable));
    assert!(
        !reports.status(&uid(0), status(3, false, false)),
        "nothing new"
    );
    assert!(reports.take_next().is_none());
}

#[test]
fn the_window_bounds_what_is_in_flight() {
    let mut reports = Reports::new(1, []);
    for i in 0..IN_FLIGHT_MAX + 9 {
        let uid = PodUid::new(&format!("u{i}")).unwrap();
        reports.status(&uid, status(1, false, false));
    }
    let sent: Vec<_> = std::iter::from_fn(|| reports.take_next()).collect();
    assert_eq!(sent.len(), IN_FLIGHT_MAX);
    reports.acked(&ack(&sent[0], Outcome::Durable));
    assert!(reports.take_next().is_some());
}

#[test]
fn a_broken_stream_sends_everything_again_that_is_not_durable() {
    let mut reports = Reports::new(1, []);
    reports.status(&uid(0), status(1, false, false));
    reports.status(&uid(1), status(1, false, false));
    let (first, second) = (reports.take_next().unwrap(), reports.take_next().unwrap());
    reports.acked(&ack(&first, Outcome::Durable));
    reports.broken();
    reports.acked(&ack(&second, Outcome::Durable)); // late, of the old stream: says nothing
    let again = reports.take_next().unwrap();
    assert_eq!(again.uid, second.uid);
    assert!(again.seq > second.seq);
    assert!(reports.take_next().is_none());
}

#[test]
fn a_final_status_is_not_sent_before_it_is_on_disk() {
    let mut reports = Reports::new(1, []);
    reports.status(&uid(0), status(1, true, false));
    assert!(reports.take_next().is_none());
    let written = reports.unpersisted();
    reports.status(&uid(0), status(1, true, true));
    reports.persisted(&written[0].0, &written[0].1);
    assert!(reports.take_next().is_none(), "an older form was written");
    let written = reports.unpersisted();
    reports.persisted(&written[0].0, &written[0].1);
    assert!(reports.take_next().unwrap().released);
}

/// Counterexample 7: a final status refused as not bound counted as acknowledged.
#[test]
fn not_bound_is_not_durable() {
    let mut reports = Reports::new(1, [(uid(0), status(1, true, true))]);
    let sent = reports.take_next().unwrap();
    reports.acked(&ack(&sent, Outcome::NotBound));
    assert!(reports.take_next().is_none(), "not again at once");
    assert!(reports.take_finished().is_empty(), "and not forgotten");
    // Later the pod is bound here after all.
    reports.committed(|_| Seen {
        in_view: true,
        changed: true,
        ..Default::default()
    });
    assert!(reports.take_next().is_some());
}

/// The level rule: the view says "bound here, no final status" and this node holds one.
#[test]
fn a_held_final_status_is_offered_again_when_the_store_lacks_it() {
    let mut reports = Reports::new(1, [(uid(0), status(1, true, true))]);
    let sent = reports.take_next().unwrap();
    reports.acked(&ack(&sent, Outcome::Durable));
    let in_view = Seen {
        in_view: true,
        changed: true,
        ended: true,
        deleting: false,
    };
    reports.committed(|_| in_view);
    assert!(reports.take_next().is_none(), "the store has it");
    reports.committed(|_| Seen {
        deleting: true,
        ..in_view
    });
    let again = reports
        .take_next()
        .expect("deleted after it had ended: the object waits for us");
    reports.acked(&ack(&again, Outcome::Durable));
    assert!(reports.take_finished().is_empty(), "still in the view");
    reports.committed(|_| Seen::default());
    assert_eq!(reports.take_finished(), buried(uid(0)));
}

/// A final status that was taken, of a pod that has left the view.
fn ended(reports: &mut Reports, uid: &PodUid, status: Status) -> Finished {
    reports.status(uid, status.clone());
    reports.persisted(uid, &status);
    let sent = reports.take_next().unwrap();
    reports.acked(&ack(&sent, Outcome::Durable));
    reports.committed(|_| Seen::default());
    reports.take_finished()
}

#[test]
fn a_pod_that_has_ended_is_told_again_when_the_view_has_it_again() {
    let mut reports = Reports::new(1, []);
    let last = status(1, true, true);
    assert_eq!(ended(&mut reports, &uid(0), last.clone()), buried(uid(0)));
    assert_eq!(reports.ended_count(), 1);
    assert!(
        !reports.status(&uid(0), status(2, false, false)),
        "it does not run"
    );
    assert!(reports.buried([&uid(1)].into_iter()).is_empty());
    assert_eq!(reports.buried([&uid(0)].into_iter()), [(uid(0), 0)]);
    reports.revive(&uid(0), last.clone());
    assert_eq!(reports.final_status(&uid(0)), Some(&last));
    assert!(reports.buried([&uid(0)].into_iter()).is_empty(), "revived");
    assert!(reports.is_persisted_final(&uid(0)));
    let sent = reports.take_next().expect("the new history lacks it");
    assert!(sent.r#final);
    assert_eq!(reports.ended().0.len(), 1);
    // Held again, and gone again: remembered again.
    reports.acked(&ack(&sent, Outcome::Gone));
    assert_eq!(reports.take_finished(), buried(uid(0)));
}

#[test]
fn the_end_of_a_mirror_is_no_end_of_a_pod() {
    let mut reports = Reports::new(1, []);
    let last = Status {
        is_mirror: true,
        ..status(1, true, true)
    };
    let finished = ended(&mut reports, &uid(0), last);
    let removed = Finished {
        removed: vec![uid(0)],
        ..Default::default()
    };
    assert_eq!(finished, removed);
    assert_eq!(reports.ended_count(), 0);
    assert!(
        reports.status(&uid(0), status(2, false, false)),
        "the pod runs on"
    );
}

/// Counterexample 9: an agent crash resets the numbers and the final status looks old.
#[test]
fn a_new_start_orders_after_every_earlier_one() {
    let mut before = Reports::new(4, []);
    for i in 0..9 {
        before.status(&uid(i), status(1, false, false));
    }
    let last = std::iter::from_fn(|| before.take_next()).last().unwrap();
    let mut after = Reports::new(5, [(uid(0), status(9, true, true))]);
    let first = after.take_next().unwrap();
    assert!((first.incarnation, first.seq) > (last.incarnation, last.seq));
}

#[test]
fn a_pod_that_has_ended_stays_ended() {
    let mut reports = Reports::new(1, [(uid(0), status(1, true, true))]);
    assert!(!reports.status(&uid(0), status(2, false, false)));
    assert!(reports.final_status(&uid(0)).is_some());
}

#[derive(Clone, Debug)]
enum Op {
    Status(u8, u8),
    Send,
    /// The answer to the oldest message under way, perhaps lost with its stream.
    Answer,
    Break,
    NewLineage,
}

proptest! {
    /// However often streams break, once they hold the store has the newest status of every pod,
    /// and it never took an older one after a newer one.
    #[test]
    fn the_newest_status_gets_through_in_order(
        ops in proptest::collection::vec(prop_oneof![
            (0..3u8, any::<u8>()).prop_map(|(i, text)| Op::Status(i, text)),
            Just(Op::Send), Just(Op::Send), Just(Op::Answer), Just(Op::Break), Just(Op::NewLineage),
        ], 1..100)
    ) {
        let mut reports = Reports::new(1, []);
        let mut newest = BTreeMap::new();
        let mut store: BTreeMap<String, (u64, Bytes)> = BTreeMap::new();
        let mut under_way = std::collections::VecDeque::new();
        let arrive = |report: &proto::StatusReport, store: &mut BTreeMap<String, (u64, Bytes)>| {
            let stored = store.get(&report.uid).map_or(0, |(seq, _)| *seq);
            assert!(report.seq > stored, "sent in order");
            store.insert(report.uid.clone(), (report.seq, report.status_json.clone()));
        };
        for op in ops {
            match op {
                Op::Status(i, text) => {
                    reports.status(&uid(i), status(text, false, false));
                    newest.insert(uid(i).as_str().to_owned(), Bytes::from(vec![text]));
                }
                Op::Send => under_way.extend(reports.take_next()),
                Op::Answer => {
                    if let Some(report) = under_way.pop_front() {
                        arrive(&report, &mut store);
                        reports.acked(&ack(&report, Outcome::Durable));
                    }
                }
                Op::Break => { under_way.clear(); reports.broken(); }
                Op::NewLineage => {
                    under_way.clear(); store.clear(); reports.broken(); reports.new_lineage();
                }
            }
        }
        // The faults stop.
        loop {
            under_way.extend(reports.take_next());
            let Some(report) = under_way.pop_front() else { break };
            arrive(&report, &mut store);
            reports.acked(&ack(&report, Outcome::Durable));
        }
        let store: BTreeMap<_, _> = store.into_iter().map(|(uid, (_, json))| (uid, json)).collect();
        prop_assert_eq!(store, newest);
    }
}
