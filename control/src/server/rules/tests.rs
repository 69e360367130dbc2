use gantry_api::kinds::by_plural;
use gantry_api::status::Reason;

use super::*;

fn kind(plural: &str) -> &'static Kind {
    by_plural("", plural).unwrap()
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

fn created(plural: &str, mut object: Value) -> Value {
    prepare_create(kind(plural), &mut object, "u-1", at(0));
    object["metadata"]["resourceVersion"] = json!("7");
    object
}

fn pod(node: &str) -> Value {
    created(
        "pods",
        json!({
            "metadata": {"name": "p", "namespace": "a"},
            "spec": {"nodeName": node, "terminationGracePeriodSeconds": 30},
            "status": {"phase": "Running"},
        }),
    )
}

fn delete(object: &Value, options: &DeleteOptions, second: i64) -> Outcome {
    let kind = kind("pods");
    prepare_delete(kind, object, options, at(second)).unwrap()
}

fn put(outcome: Outcome) -> Value {
    match outcome {
        Outcome::Put(object) => object,
        other => panic!("{other:?}"),
    }
}

fn grace(seconds: i64) -> DeleteOptions {
    DeleteOptions {
        grace_period_s: Some(seconds),
        ..DeleteOptions::default()
    }
}

#[test]
fn the_servers_fields_are_the_servers() {
    let created = created(
        "pods",
        json!({
            "metadata": {
                "name": "p", "uid": "mine", "generation": 9,
                "deletionTimestamp": "2020-01-01T00:00:00Z", "creationTimestamp": "2020-01-01T00:00:00Z",
            },
            "status": {"phase": "Succeeded"},
        }),
    );
    assert_eq!(
        created["metadata"],
        json!({
            "name": "p", "uid": "u-1", "generation": 1, "resourceVersion": "7",
            "creationTimestamp": time_text(at(0)),
        })
    );
    assert_eq!(
        created["status"],
        json!({"phase": "Pending", "qosClass": "BestEffort"})
    );
    let mut changed = created.clone();
    for field in [
        "uid",
        "creationTimestamp",
        "generation",
        "deletionTimestamp",
    ] {
        changed["metadata"][field] = json!("x");
    }
    assert_eq!(
        carry_over(kind("pods"), &created, changed, Part::Object),
        created
    );
}

#[test]
fn ephemeral_containers_come_by_their_own_door() {
    let old = pod("n");
    let mut new = old.clone();
    new["spec"]["ephemeralContainers"] = json!([{"name": "d", "image": "x"}]);
    let refused = super::check_ephemeral(kind("pods"), &old, &new).unwrap_err();
    assert!(
        refused.message.contains("spec.ephemeralContainers"),
        "{refused}"
    );
    // Nothing else gets in that way.
    new["spec"]["priority"] = json!(1);
    let taken = carry_over(kind("pods"), &old, new.clone(), Part::Ephemeral);
    assert_eq!(
        taken["spec"]["ephemeralContainers"],
        new["spec"]["ephemeralContainers"]
    );
    assert_eq!(taken["spec"]["priority"], old["spec"]["priority"]);
}

#[test]
fn object_and_status_are_written_apart() {
    let old = pod("n");
    let mut new = old.clone();
    new["spec"]["priority"] = json!(1);
    new["status"]["phase"] = json!("Failed");
    let object = carry_over(kind("pods"), &old, new.clone(), Part::Object);
    assert_eq!(
        (&object["spec"], &object["status"]),
        (&new["spec"], &old["status"])
    );
    let object = put(finish_update(kind("pods"), &old, object).unwrap());
    assert_eq!(object["metadata"]["generation"], 2);
    let status = carry_over(kind("pods"), &old, new.clone(), Part::Status);
    assert_eq!(
        (&status["spec"], &status["status"]),
        (&old["spec"], &new["status"])
    );
    let status = put(finish_update(kind("pods"), &old, status).unwrap());
    assert_eq!(status["metadata"]["generation"], 1);
    let same = finish_update(kind("pods"), &old, old.clone()).unwrap();
    assert_eq!(same, Outcome::Unchanged);
}

#[test]
fn a_stale_write_is_refused_in_kubernetes_words() {
    let old = pod("n");
    let mut new = old.clone();
    new["metadata"]["resourceVersion"] = json!("6");
    let status = check_identity(kind("pods"), &old, &new).unwrap_err();
    assert_eq!(status.reason, Reason::Conflict);
    assert_eq!(
        status.message,
        "Operation cannot be fulfilled on pods \"p\": the object has been modified; please apply \
         your changes to the latest version and try again"
    );
    new["metadata"]["resourceVersion"] = json!("seven");
    let status = check_identity(kind("pods"), &old, &new).unwrap_err();
    assert_eq!(status.reason, Reason::Invalid);
    new["metadata"] = json!({"name": "p", "uid": "other"});
    let status = check_identity(kind("pods"), &old, &new).unwrap_err();
    assert!(
        status.message.contains("UID in precondition: other"),
        "{status}"
    );
}

#[test]
fn a_bound_pod_waits_for_its_node_and_an_unbound_one_goes() {
    assert_eq!(
        delete(&pod(""), &DeleteOptions::default(), 5),
        Outcome::Remove
    );
    assert_eq!(delete(&pod("n"), &grace(0), 5), Outcome::Remove);
    let going = put(delete(&pod("n"), &DeleteOptions::default(), 5));
    let metadata = &going["metadata"];
    assert_eq!(metadata["deletionGracePeriodSeconds"], 30);
    assert_eq!(metadata["deletionTimestamp"], json!(time_text(at(35))));
    assert_eq!(metadata["generation"], 2);
    // A status report does not let it go, its node does.
    let mut reported = going.clone();
    reported["status"]["phase"] = json!("Succeeded");
    let reported = put(finish_update(kind("pods"), &going, reported).unwrap());
    assert_eq!(prepare_pod_removal(&reported, at(9)), Outcome::Remove);
}

#[test]
fn a_disruption_is_written_with_the_deletion_and_only_where_it_is_the_reason() {
    let options = DeleteOptions {
        disruption: Some(Disruption {
            reason: "PreemptionByScheduler",
            message: "room".to_owned(),
        }),
        ..DeleteOptions::default()
    };
    let condition = |pod: &Value| {
        let conditions = pod["status"]["conditions"].as_array().cloned();
        let mut conditions = conditions.unwrap_or_default().into_iter();
        conditions.find(|condition| condition["type"] == DISRUPTION_TARGET)
    };
    let mut running = pod("n");
    running["status"]["phase"] = json!("Running");
    running["status"]["conditions"] = json!([{"type": "Ready", "status": "True"}]);
    let going = put(delete(&running, &options, 5));
    assert_eq!(
        condition(&going).unwrap()["reason"],
        "PreemptionByScheduler"
    );
    assert_eq!(going["status"]["conditions"].as_array().unwrap().len(), 2);
    // Somebody else was faster, or the pod itself.
    let leaving = put(delete(&running, &DeleteOptions::default(), 5));
    assert_eq!(delete(&leaving, &options, 6), Outcome::Unchanged);
    let mut ended = running;
    ended["status"]["phase"] = json!("Failed");
    assert_eq!(condition(&put(delete(&ended, &options, 5))), None);
}

#[test]
fn a_grace_period_only_shrinks() {
    let going = put(delete(&pod("n"), &DeleteOptions::default(), 0));
    assert_eq!(delete(&going, &grace(60), 5), Outcome::Unchanged);
    assert_eq!(
        delete(&going, &DeleteOptions::default(), 5),
        Outcome::Unchanged
    );
    let sooner = put(delete(&going, &grace(10), 5));
    assert_eq!(sooner["metadata"]["deletionGracePeriodSeconds"], 10);
    assert_eq!(
        sooner["metadata"]["deletionTimestamp"],
        json!(time_text(at(10)))
    );
    assert_eq!(delete(&going, &grace(0), 5), Outcome::Remove);
    let negative = prepare_delete(kind("pods"), &going, &grace(-1), at(0)).unwrap_err();
    assert_eq!(negative.reason, Reason::BadRequest);
}

#[test]
fn finalizers_hold_an_object_until_they_are_gone() {
    let mut held = pod("n");
    held["metadata"]["finalizers"] = json!(["example.com/x"]);
    let going = put(delete(&held, &grace(0), 5));
    let released = put(prepare_pod_removal(&going, at(6)));
    let mut more = released.clone();
    more["metadata"]["finalizers"] = json!(["example.com/x", "example.com/y"]);
    let status = finish_update(kind("pods"), &released, more).unwrap_err();
    assert!(
        status.message.contains("no new finalizers can be added"),
        "{status}"
    );
    let mut free = released.clone();
    free["metadata"]["finalizers"] = json!([]);
    assert_eq!(
        finish_update(kind("pods"), &released, free).unwrap(),
        Outcome::Remove
    );
}

#[test]
fn propagation_is_a_finalizer() {
    let owner = created(
        "configmaps",
        json!({"metadata": {"name": "c", "namespace": "a"}}),
    );
    let kind = kind("configmaps");
    let with = |propagation| DeleteOptions {
        propagation,
        ..DeleteOptions::default()
    };
    let gone = prepare_delete(kind, &owner, &with(Propagation::Background), at(0)).unwrap();
    assert_eq!(gone, Outcome::Remove);
    let held = put(prepare_delete(kind, &owner, &with(Propagation::Foreground), at(0)).unwrap());
    assert_eq!(
        held["metadata"]["finalizers"],
        json!([FOREGROUND_FINALIZER])
    );
    let held = put(prepare_delete(kind, &held, &with(Propagation::Orphan), at(1)).unwrap());
    assert_eq!(held["metadata"]["finalizers"], json!([ORPHAN_FINALIZER]));
    assert_eq!(
        held["metadata"]["deletionTimestamp"],
        json!(time_text(at(0)))
    );
}

#[test]
fn a_namespace_terminates_until_its_content_is_gone() {
    let kind = kind("namespaces");
    let space = created("namespaces", json!({"metadata": {"name": "a"}}));
    assert_eq!(
        space["metadata"]["labels"],
        json!({"kubernetes.io/metadata.name": "a"})
    );
    let going = put(prepare_delete(kind, &space, &DeleteOptions::default(), at(0)).unwrap());
    assert_eq!(going["status"]["phase"], "Terminating");
    let mut empty = going.clone();
    empty["spec"]["finalizers"] = json!([]);
    let empty = carry_over(kind, &going, empty, Part::Object);
    assert_eq!(finish_update(kind, &going, empty).unwrap(), Outcome::Remove);
    // While it is alive nobody takes its finalizer.
    let mut stripped = space.clone();
    stripped["spec"]["finalizers"] = json!([]);
    assert_eq!(carry_over(kind, &space, stripped, Part::Object), space);
}

#[test]
fn a_pod_is_bound_once() {
    let kind = kind("pods");
    let bound = put(prepare_bind(kind, &pod(""), "u-1", "n", at(3)).unwrap());
    assert_eq!(bound["spec"]["nodeName"], "n");
    assert_eq!(bound["status"]["conditions"][0]["type"], "PodScheduled");
    for (pod, uid) in [(&bound, "u-1"), (&pod(""), "u-2")] {
        let status = prepare_bind(kind, pod, uid, "m", at(4)).unwrap_err();
        assert_eq!(status.reason, Reason::Conflict);
    }
}

#[test]
fn generated_names_fit_into_a_label() {
    let name = generated_name(&"x".repeat(80));
    assert_eq!(name.len(), 63);
    let names: std::collections::BTreeSet<String> =
        (0..100).map(|_| generated_name("web-")).collect();
    assert!(names.len() > 95 && names.iter().all(|n| n.len() == 9));
}
