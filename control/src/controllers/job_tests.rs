use super::*;
use proptest::prelude::*;
use serde_json::json;

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
    most_active: usize,
}

impl World {
    fn new(job: Job) -> Self {
        Self {
            job,
            pods: Vec::new(),
            made: 0,
            most_active: 0,
        }
    }

    /// One reconcile; `crash` stops it after so many steps.
    fn reconcile(&mut self, crash: usize) {
        let spec = self.job.spec.clone().unwrap();
        let observe = |job, pods| Observed {
            job,
            spec: &spec,
            pods,
            now: now(),
        };
        if is_finished(&self.job) {
            return;
        }
        let (job, pods) = (self.job.clone(), self.pods.clone());
        let status = note_ended(&observe(&job, &pods));
        if crash == 0 {
            return;
        }
        self.job.status = Some(status);
        if crash == 1 {
            return;
        }
        // Only what the status lists, or knows as counted, loses its finalizer.
        for pod in &mut self.pods {
            if has_tracking(pod) && ended(&spec, pod).is_some() {
                let mut new = Pod::clone(pod);
                new.metadata.finalizers = None;
                *pod = Arc::new(new);
            }
        }
        if crash == 2 {
            return;
        }
        let mut status = self.job.status.clone().unwrap();
        let tracked = self.pods.iter().filter(|pod| has_tracking(pod));
        count_ended(&mut status, &tracked.map(|pod| uid(pod)).collect());
        let job = self.job.clone();
        let observed = observe(&job, &self.pods);
        let plan = plan(&observed, &status);
        finish_status(&observed, &mut status, &plan, plan.create.len());
        self.pods
            .retain(|pod| !plan.delete.iter().any(|victim| victim == uid(pod)));
        for index in &plan.create {
            self.made += 1;
            let mut new = pod(self.made, "Running", *index);
            new.metadata.labels = Some([("made".to_owned(), "1".to_owned())].into());
            self.pods.push(Arc::new(new));
        }
        self.job.status = Some(status);
        let active = self.pods.iter().filter(|pod| pods::is_active(pod)).count();
        self.most_active = self.most_active.max(active);
    }

    fn end_one(&mut self, choice: usize, phase: &str) {
        let running: Vec<usize> = (0..self.pods.len())
            .filter(|i| pods::is_active(&self.pods[*i]))
            .collect();
        if running.is_empty() {
            return;
        }
        let at = running[choice % running.len()];
        let mut ended = Pod::clone(&self.pods[at]);
        ended.status.as_mut().unwrap().phase = Some(phase.to_owned());
        self.pods[at] = Arc::new(ended);
    }
}

proptest! {
    /// Whatever ends when, and wherever the controller dies: each end counts once, never more pods run
    /// than allowed, and the Job completes after exactly the completions asked for.
    #[test]
    fn every_end_counts_exactly_once(
        completions in 1_i32..8, parallelism in 1_i32..5, indexed in any::<bool>(),
        steps in proptest::collection::vec((0_usize..8, 0_usize..5, 0_u8..4), 1..80),
    ) {
        let mode = if indexed { "Indexed" } else { "NonIndexed" };
        let mut world = World::new(job(json!({
            "completions": completions, "parallelism": parallelism, "completionMode": mode,
            "backoffLimit": 1000, "template": {},
        })));
        for (choice, crash, what) in steps {
            match what {
                0 => world.end_one(choice, "Succeeded"),
                1 => world.end_one(choice, "Failed"),
                _ => world.reconcile(crash),
            }
            let (succeeded, failed) = ends(world.job.status.as_ref().unwrap());
            let ended = |phase| world.pods.iter().filter(|p| pods::phase(p) == phase).count();
            prop_assert!(usize::try_from(succeeded).unwrap() <= ended("Succeeded"));
            prop_assert!(usize::try_from(failed).unwrap() <= ended("Failed"));
        }
        prop_assert!(world.most_active <= usize::try_from(parallelism).unwrap());
        for round in 0..100 {
            world.reconcile(9);
            if is_finished(&world.job) { break; }
            world.end_one(round, "Succeeded");
        }
        prop_assert!(has_condition(&world.job, "Complete"));
        let status = world.job.status.unwrap();
        prop_assert_eq!(status.succeeded, Some(completions));
        if indexed {
            let all: BTreeSet<i32> = (0..completions).collect();
            prop_assert_eq!(parse_indexes(&status.completed_indexes.unwrap()), all);
        }
    }

    #[test]
    fn indexes_survive_their_text(indexes in proptest::collection::btree_set(0_i32..60, 0..40)) {
        prop_assert_eq!(parse_indexes(&format_indexes(&indexes)), indexes);
    }
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
    assert_eq!(ends(world.job.status.as_ref().unwrap()), (0, 0));
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
    let status = note_ended(&observed);
    let plan = plan(&observed, &status);
    assert!(plan.create.is_empty());
    assert_eq!(plan.again, Some(Duration::from_secs(5)));
}
