//! Jobs from their first pod to their last condition, in memory: with crashes, policies and indexes.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::json;

use super::indexes::{FAILURE_COUNT, Failures, INDEX, Indexes};
use super::observed::Tally;
use super::status::has_condition;
use super::*;
use crate::controllers::pods;

fn job(spec: serde_json::Value) -> Job {
    let mut job: Job = serde_json::from_value(json!({
        "metadata": {"name": "j", "uid": "job"}, "spec": spec,
        "status": {"startTime": "2026-01-01T00:00:00Z"},
    }))
    .unwrap();
    gantry_api::defaults::job(&mut job);
    job
}

fn pod(number: usize, phase: &str, index: Option<i32>) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": format!("p{number}"), "uid": format!("u{number}"),
            "finalizers": [TRACKING],
            "annotations": index.map(|i| json!({INDEX: i.to_string()}))},
        "spec": {"nodeName": "n", "containers": []},
        "status": {"phase": phase},
    }))
    .unwrap()
}

fn now() -> Timestamp {
    "2026-01-01T01:00:00Z".parse().unwrap()
}

/// The Job's pods, their ends, and the controller, in memory.
struct World {
    job: Job,
    pods: Vec<Arc<Pod>>,
    made: usize,
    /// Most pods at once that are active, or going and waited for.
    most_active: usize,
    /// Uids of pods that have failed, whatever became of them.
    failed: BTreeSet<String>,
}

impl World {
    fn new(job: Job) -> Self {
        Self {
            job,
            pods: Vec::new(),
            made: 0,
            most_active: 0,
            failed: BTreeSet::new(),
        }
    }

    fn tally(&self) -> Tally {
        let spec = self.job.spec.clone().unwrap();
        let observed = Observed {
            job: &self.job,
            spec: &spec,
            pods: &self.pods,
            now: now(),
        };
        observed.tally(&self.job.status.clone().unwrap())
    }

    /// One pass; `crash` stops it after so many steps.
    fn reconcile(&mut self, crash: usize) {
        if is_finished(&self.job) {
            return;
        }
        let spec = self.job.spec.clone().unwrap();
        let observed = Observed {
            job: &self.job,
            spec: &spec,
            pods: &self.pods,
            now: now(),
        };
        let settled = settle(&observed);
        if crash == 0 {
            return;
        }
        self.job.status = Some(settled.status);
        // A crash may also come in the middle of the releases.
        let released = match crash {
            1 => settled.release.len() / 2,
            _ => settled.release.len(),
        };
        let release: BTreeSet<&String> = settled.release.iter().take(released).collect();
        for pod in &mut self.pods {
            if release.contains(&uid(pod).to_owned()) {
                *pod = Arc::new(without_tracking(pod));
            }
        }
        if crash <= 2 {
            return;
        }
        let job = self.job.clone();
        let observed = Observed {
            job: &job,
            spec: &spec,
            pods: &self.pods,
            now: now(),
        };
        let mut status = job.status.clone().unwrap();
        count_ended(&observed, &mut status);
        let plan = plan(&observed, &status);
        let new: Vec<Pod> = plan
            .create
            .iter()
            .map(|new| pod::pod_of(&job, &spec, *new))
            .collect();
        finish_status(&observed, &mut status, &plan, plan.create.len());
        self.pods.retain(|pod| !plan.delete.contains(uid(pod)));
        for mut new in new {
            self.made += 1;
            let shape = pod(self.made, "Running", None);
            new.metadata.uid = shape.metadata.uid;
            new.metadata.name = shape.metadata.name;
            new.spec.get_or_insert_default().node_name = Some("n".to_owned());
            new.status = shape.status;
            self.pods.push(Arc::new(new));
        }
        self.job.status = Some(status);
        let waits = spec.pod_replacement_policy.as_deref() == Some("Failed");
        let held =
            |pod: &&Arc<Pod>| !pods::is_finished(pod) && (waits || !pods::is_terminating(pod));
        self.most_active = self.most_active.max(self.pods.iter().filter(held).count());
    }

    /// Somebody deletes a running pod: it runs on for its grace.
    fn delete_one(&mut self, choice: usize) {
        let running: Vec<usize> = (0..self.pods.len())
            .filter(|i| pods::is_active(&self.pods[*i]))
            .collect();
        if running.is_empty() {
            return;
        }
        let at = running[choice % running.len()];
        let mut going = Pod::clone(&self.pods[at]);
        going.metadata.deletion_timestamp =
            serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        let spec = self.job.spec.as_ref().unwrap();
        if spec.pod_replacement_policy.as_deref() != Some("Failed") {
            self.failed.insert(uid(&going).to_owned());
        }
        self.pods[at] = Arc::new(going);
    }

    /// The agent ends pods that go; those that nothing holds are no more.
    fn let_go(&mut self) {
        for pod in self.pods.iter_mut().filter(|pod| pods::is_terminating(pod)) {
            let mut ended = Pod::clone(pod);
            ended.status.as_mut().unwrap().phase = Some("Failed".to_owned());
            self.failed.insert(uid(&ended).to_owned());
            *pod = Arc::new(ended);
        }
        self.pods
            .retain(|pod| !pods::is_terminating(pod) || has_tracking(pod));
    }

    fn end_one(&mut self, choice: usize, phase: &str) {
        self.end_with(choice, phase, 1);
    }

    /// Ends a running pod; a failed one with this exit code.
    fn end_with(&mut self, choice: usize, phase: &str, code: i32) {
        let running: Vec<usize> = (0..self.pods.len())
            .filter(|i| pods::is_active(&self.pods[*i]))
            .collect();
        if running.is_empty() {
            return;
        }
        let at = running[choice % running.len()];
        let mut ended = Pod::clone(&self.pods[at]);
        let status = ended.status.as_mut().unwrap();
        status.phase = Some(phase.to_owned());
        if phase == "Failed" {
            self.failed.insert(uid(&self.pods[at]).to_owned());
            status.container_statuses = serde_json::from_value(json!([{
                "name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"terminated": {"exitCode": code}},
            }]))
            .unwrap();
        }
        self.pods[at] = Arc::new(ended);
    }

    fn condition(&self, type_: &str) -> Option<String> {
        let status = self.job.status.as_ref()?;
        let mut conditions = status.conditions.iter().flatten();
        let found = conditions.find(|c| c.type_ == type_ && c.status == "True")?;
        found.reason.clone()
    }
}

proptest! {
    /// Whatever ends when, and wherever the controller dies: each end counts once, never more pods run
    /// than allowed, and the Job completes after exactly the completions asked for.
    #[test]
    fn every_end_counts_exactly_once(
        completions in 1_i32..8, parallelism in 1_i32..5, indexed in any::<bool>(),
        waits in any::<bool>(),
        steps in proptest::collection::vec((0_usize..8, 0_usize..5, 0_u8..8), 1..80),
    ) {
        let mode = if indexed { "Indexed" } else { "NonIndexed" };
        let replaced = if waits { "Failed" } else { "TerminatingOrFailed" };
        let mut world = World::new(job(json!({
            "completions": completions, "parallelism": parallelism, "completionMode": mode,
            "backoffLimit": 1000, "podReplacementPolicy": replaced, "template": {},
        })));
        for (choice, crash, what) in steps {
            match what {
                0 => world.end_one(choice, "Succeeded"),
                1 => world.end_one(choice, "Failed"),
                2 => world.delete_one(choice),
                3 => world.let_go(),
                _ => world.reconcile(crash),
            }
            let tally = world.tally();
            let succeeded = world.pods.iter().filter(|p| pods::phase(p) == "Succeeded").count();
            prop_assert_eq!(usize::try_from(tally.succeeded).unwrap(), succeeded);
            prop_assert_eq!(usize::try_from(tally.failed).unwrap(), world.failed.len());
        }
        prop_assert!(world.most_active <= usize::try_from(parallelism).unwrap());
        for round in 0..100 {
            world.reconcile(9);
            if is_finished(&world.job) { break; }
            world.let_go();
            world.end_one(round, "Succeeded");
        }
        prop_assert!(has_condition(&world.job, "Complete"));
        let status = world.job.status.unwrap();
        prop_assert_eq!(status.succeeded, Some(completions));
        if indexed {
            let done = Indexes::parse(&status.completed_indexes.unwrap(), completions);
            prop_assert_eq!(done.count(), completions);
        }
    }

    /// Whatever ends how, and wherever the controller dies: an index is tried as often as it may be and
    /// no more, each failure counts for it once, ignored ones do not, and the Job's end fits its indexes.
    #[test]
    fn every_index_has_its_own_limit(
        completions in 1_i32..6, parallelism in 1_i32..4, limit in 0_i32..3,
        max_failed in proptest::option::of(0_i32..4),
        steps in proptest::collection::vec((0_usize..8, 0_usize..6, 0_u8..8), 1..150),
    ) {
        let rule = |action: &str, code: i32| {
            json!({"action": action, "onExitCodes": {"operator": "In", "values": [code]}})
        };
        let mut world = World::new(job(json!({
            "completions": completions, "parallelism": parallelism, "completionMode": "Indexed",
            "backoffLimitPerIndex": limit, "maxFailedIndexes": max_failed.map(|m| m.min(completions)),
            "podFailurePolicy": {"rules": [rule("Ignore", 7), rule("FailIndex", 8)]}, "template": {},
        })));
        let mut before = Tally::default();
        let finish = (0..400).map(|round| (round, 9, if round % 2 == 0 { 7 } else { 0 }));
        for (choice, crash, what) in steps.into_iter().chain(finish) {
            match what {
                0 => world.end_with(choice, "Succeeded", 0),
                1 | 2 => world.end_with(choice, "Failed", 1),
                3 => world.end_with(choice, "Failed", 7),
                4 => world.end_with(choice, "Failed", 8),
                _ => world.reconcile(crash),
            }
            if is_finished(&world.job) { break; }
            let tally = world.tally();
            prop_assert_eq!(tally.completed.count_shared(&tally.failed_indexes), 0);
            prop_assert!(tally.failed >= before.failed && tally.succeeded >= before.succeeded);
            before = tally;
        }
        prop_assert!(is_finished(&world.job), "{:?}", world.job.status);
        prop_assert!(world.most_active <= usize::try_from(parallelism).unwrap());
        let status = world.job.status.clone().unwrap();
        let read = |text: Option<String>| Indexes::parse(&text.unwrap_or_default(), completions);
        let (done, given_up) = (read(status.completed_indexes), read(status.failed_indexes));
        let mut failures: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
        let mut counted = 0;
        for pod in world.pods.iter().filter(|pod| pods::phase(pod) == "Failed") {
            let containers = &pod.status.as_ref().unwrap().container_statuses;
            let state = containers.as_ref().unwrap()[0].state.as_ref().unwrap();
            if state.terminated.as_ref().unwrap().exit_code == 7 { continue; }
            counted += 1;
            let number = Failures::before(pod).counted;
            failures.entry(indexes::index_of(pod).unwrap()).or_default().push(number);
        }
        for (index, numbers) in &mut failures {
            numbers.sort_unstable();
            let in_a_row: Vec<i32> = (0..i32::try_from(numbers.len()).unwrap()).collect();
            prop_assert_eq!(&*numbers, &in_a_row, "index {}: each failure knows those before", index);
            prop_assert!(numbers.len() <= usize::try_from(limit + 1).unwrap());
        }
        let gone_on = status.failed.unwrap_or(0) - counted;
        prop_assert!((0..=parallelism).contains(&gone_on), "{}: those that ran at the end", gone_on);
        match world.condition("Failed") {
            None => prop_assert_eq!(done.count(), completions),
            Some(reason) if reason == "FailedIndexes" => {
                prop_assert_eq!(done.count() + given_up.count(), completions);
                prop_assert!(given_up.count() > 0 && gone_on == 0);
            }
            Some(reason) => {
                prop_assert_eq!(reason, "MaxFailedIndexesExceeded");
                prop_assert!(given_up.count() > max_failed.unwrap());
            }
        }
    }
}

#[test]
fn a_failure_with_a_code_of_the_policy_ends_the_job_before_its_pod_is_let_go() {
    let mut world = World::new(job(json!({
        "completions": 3, "parallelism": 2, "template": {},
        "podFailurePolicy": {"rules": [
            {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [42]}}]},
    })));
    world.reconcile(9);
    world.end_with(0, "Failed", 42);
    world.reconcile(1);
    assert_eq!(
        world.condition("FailureTarget").as_deref(),
        Some("PodFailurePolicy")
    );
    // The pod that says why is gone: the fate stays.
    world.pods.retain(|pod| pods::phase(pod) != "Failed");
    world.reconcile(9);
    assert!(world.pods.is_empty(), "the other is stopped");
    assert!(!is_finished(&world.job), "not before that is seen");
    world.reconcile(9);
    assert_eq!(
        world.condition("Failed").as_deref(),
        Some("PodFailurePolicy")
    );
    assert_eq!(
        world.job.status.unwrap().failed,
        Some(2),
        "it takes the other along"
    );
}

#[test]
fn a_success_policy_is_met_by_the_indexes_that_it_names() {
    let mut world = World::new(job(json!({
        "completions": 5, "parallelism": 5, "completionMode": "Indexed", "template": {},
        "successPolicy": {"rules": [{"succeededIndexes": "1-3", "succeededCount": 2}]},
    })));
    world.reconcile(9);
    let end = |world: &mut World, index: i32| {
        let running: Vec<&Arc<Pod>> = world
            .pods
            .iter()
            .filter(|pod| pods::is_active(pod))
            .collect();
        let at = running
            .iter()
            .position(|pod| indexes::index_of(pod) == Some(index));
        world.end_one(at.unwrap(), "Succeeded");
        world.reconcile(9);
    };
    end(&mut world, 0);
    end(&mut world, 2);
    assert_eq!(world.condition("SuccessCriteriaMet"), None);
    end(&mut world, 3);
    assert_eq!(
        world.condition("SuccessCriteriaMet").as_deref(),
        Some("SuccessPolicy")
    );
    world.reconcile(9);
    assert_eq!(
        world.condition("Complete").as_deref(),
        Some("SuccessPolicy")
    );
    let status = world.job.status.clone().unwrap();
    assert_eq!(status.completed_indexes.as_deref(), Some("0,2,3"));
    assert_eq!(
        (status.succeeded, status.failed),
        (Some(3), None),
        "who is stopped has not failed"
    );
}

#[test]
fn an_index_that_pauses_lets_the_others_go_on() {
    let mut failed = pod(0, "Failed", Some(0));
    let annotations = failed.metadata.annotations.as_mut().unwrap();
    annotations.insert(FAILURE_COUNT.to_owned(), "1".to_owned());
    failed.status.as_mut().unwrap().container_statuses = serde_json::from_value(json!([{
        "name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
        "state": {"terminated": {"exitCode": 1, "finishedAt": "2026-01-01T00:59:55Z"}},
    }]))
    .unwrap();
    let job = job(
        json!({"completions": 2, "parallelism": 1, "completionMode": "Indexed",
        "backoffLimitPerIndex": 5, "template": {}}),
    );
    let spec = job.spec.clone().unwrap();
    let pods = [Arc::new(failed)];
    let observed = Observed {
        job: &job,
        spec: &spec,
        pods: &pods,
        now: now(),
    };
    let settled = settle(&observed);
    assert!(settled.release.is_empty(), "it is needed for its number");
    let plan = plan(&observed, &settled.status);
    let made: Vec<Option<i32>> = plan.create.iter().map(|new| new.index).collect();
    assert_eq!(made, [Some(1)]);
    assert_eq!(
        plan.again,
        Some(Duration::from_secs(15)),
        "the second failure: 20 s"
    );
}

#[test]
fn indexes_that_were_scaled_away_go_and_count_no_more() {
    let mut world = World::new(job(json!({
        "completions": 4, "parallelism": 4, "completionMode": "Indexed", "template": {},
    })));
    world.reconcile(9);
    world.end_one(3, "Succeeded");
    world.reconcile(9);
    assert_eq!(world.job.status.as_ref().unwrap().succeeded, Some(1));
    let spec = world.job.spec.as_mut().unwrap();
    (spec.completions, spec.parallelism) = (Some(2), Some(2));
    world.reconcile(9);
    let left = world.pods.iter().filter(|pod| pods::is_active(pod));
    let left: Vec<Option<i32>> = left.map(|pod| indexes::index_of(pod)).collect();
    assert_eq!(left, [Some(0), Some(1)]);
    assert_eq!(world.job.status.as_ref().unwrap().succeeded, None);
    assert!(!is_finished(&world.job));
}

#[test]
fn a_pass_notes_so_many_ends_and_the_job_is_not_finished_before_all_are_counted() {
    let mut world = World::new(job(
        json!({"completions": 700, "parallelism": 700, "template": {}}),
    ));
    world.pods = (0..700)
        .map(|i| Arc::new(pod(i, "Succeeded", None)))
        .collect();
    world.reconcile(2);
    let noted = world
        .job
        .status
        .as_ref()
        .unwrap()
        .uncounted_terminated_pods
        .clone();
    assert_eq!(noted.unwrap().succeeded.unwrap().len(), 500);
    world.reconcile(9);
    assert!(is_finished(&world.job));
    assert_eq!(world.job.status.unwrap().succeeded, Some(700));
}

#[test]
fn too_many_failures_and_the_deadline_end_a_job() {
    let failed: Vec<Arc<Pod>> = (0..2).map(|i| Arc::new(pod(i, "Failed", None))).collect();
    let mut world = World::new(job(json!({"backoffLimit": 1, "template": {}})));
    world.pods = failed;
    world.reconcile(9);
    assert!(
        has_condition(&world.job, "Failed"),
        "{:?}",
        world.job.status
    );

    let mut world = World::new(job(json!({"activeDeadlineSeconds": 60, "template": {}})));
    world.pods = vec![Arc::new(pod(0, "Running", None))];
    world.reconcile(9);
    assert!(world.pods.is_empty(), "the running pod is stopped");
    world.reconcile(9);
    let status = world.job.status.unwrap();
    let failed = status
        .conditions
        .unwrap()
        .into_iter()
        .find(|c| c.type_ == "Failed");
    assert_eq!(failed.unwrap().reason.unwrap(), "DeadlineExceeded");
}

#[test]
fn suspension_stops_pods_and_counts_none_of_them() {
    let mut world = World::new(job(
        json!({"completions": 2, "parallelism": 2, "template": {}}),
    ));
    world.reconcile(9);
    assert_eq!(world.pods.len(), 2);
    world.job.spec.as_mut().unwrap().suspend = Some(true);
    world.reconcile(9);
    assert!(world.pods.is_empty() && has_condition(&world.job, "Suspended"));
    assert_eq!(world.tally(), Tally::default());
    world.job.spec.as_mut().unwrap().suspend = Some(false);
    world.reconcile(9);
    assert_eq!(world.pods.len(), 2);
    assert!(!has_condition(&world.job, "Suspended"));
}

#[test]
fn a_failure_is_followed_by_a_pause_that_doubles() {
    let mut first = pod(0, "Failed", None);
    first.status.as_mut().unwrap().container_statuses = serde_json::from_value(json!([{
        "name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
        "state": {"terminated": {"exitCode": 1, "finishedAt": "2026-01-01T00:59:55Z"}},
    }]))
    .unwrap();
    let job = job(json!({"template": {}}));
    let spec = job.spec.clone().unwrap();
    let pods = [Arc::new(first)];
    let observed = Observed {
        job: &job,
        spec: &spec,
        pods: &pods,
        now: now(),
    };
    let plan = plan(&observed, &settle(&observed).status);
    assert!(plan.create.is_empty());
    assert_eq!(plan.again, Some(Duration::from_secs(5)));
}
