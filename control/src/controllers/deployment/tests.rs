//! The planner in a world where every other actor may be late: ReplicaSets act in two steps (look,
//! then write), the Deployment too, pods become ready at any time, templates change in between.

use std::collections::BTreeMap;
use std::sync::Arc;

use gantry_api::k8s_openapi::api::apps::v1::{
    Deployment, DeploymentSpec, DeploymentStatus, DeploymentStrategy, ReplicaSet,
    RollingUpdateDeployment,
};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use gantry_api::k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use gantry_api::k8s_openapi::jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;

use super::annotations::{desired, limits, size};
use super::plan::{Observed, Plan, plan};
use super::status;

fn now() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn new_deployment(replicas: i32, surge: i32, unavailable: i32, strategy: &str) -> Deployment {
    let mut deployment = Deployment::default();
    deployment.metadata.name = Some("web".to_owned());
    deployment.metadata.generation = Some(1);
    let rolling = RollingUpdateDeployment {
        max_surge: Some(IntOrString::Int(surge)),
        max_unavailable: Some(IntOrString::Int(unavailable)),
    };
    let mut spec = DeploymentSpec {
        replicas: Some(replicas),
        progress_deadline_seconds: Some(600),
        revision_history_limit: Some(2),
        strategy: Some(DeploymentStrategy {
            type_: Some(strategy.to_owned()),
            rolling_update: (strategy == "RollingUpdate").then_some(rolling),
        }),
        ..DeploymentSpec::default()
    };
    spec.selector.match_labels = Some(BTreeMap::from([("app".to_owned(), "web".to_owned())]));
    spec.template.metadata.get_or_insert_default().labels = spec.selector.match_labels.clone();
    deployment.spec = Some(spec);
    deployment
}

/// A ReplicaSet with its pods: ready or not.
#[derive(Debug, Clone)]
struct Set {
    object: ReplicaSet,
    pods: BTreeMap<u32, bool>,
    /// What its controller decided and has not written yet: pods to make, pods to delete, and the
    /// generation that was looked at.
    in_flight: Option<(i32, Vec<u32>, Option<i64>)>,
    version: u32,
}

impl Set {
    fn look(&mut self) {
        if self.in_flight.is_some() {
            return;
        }
        let missing = size(&self.object) - i32::try_from(self.pods.len()).unwrap();
        let mut by_use: Vec<(bool, u32)> =
            self.pods.iter().map(|(id, ready)| (*ready, *id)).collect();
        by_use.sort_unstable();
        let surplus = usize::try_from(-missing).unwrap_or(0);
        let victims = by_use.iter().take(surplus).map(|(_, id)| *id).collect();
        self.in_flight = Some((missing.max(0), victims, self.object.metadata.generation));
    }

    fn write(&mut self, next_pod: &mut u32) {
        let Some((missing, victims, generation)) = self.in_flight.take() else {
            return;
        };
        for _ in 0..missing {
            *next_pod += 1;
            self.pods.insert(*next_pod, false);
        }
        for victim in victims {
            self.pods.remove(&victim);
        }
        let ready = i32::try_from(self.pods.values().filter(|ready| **ready).count()).unwrap();
        let status = self.object.status.get_or_insert_default();
        status.observed_generation = generation;
        status.replicas = i32::try_from(self.pods.len()).unwrap();
        status.ready_replicas = Some(ready);
        status.available_replicas = Some(ready);
        self.version += 1;
    }
}

struct World {
    deployment: Deployment,
    sets: BTreeMap<String, Set>,
    /// What the Deployment controller decided, with the versions that it looked at.
    in_flight: Option<(Plan, BTreeMap<String, u32>)>,
    next_pod: u32,
    clock: Timestamp,
}

impl World {
    fn new(deployment: Deployment) -> Self {
        Self {
            deployment,
            sets: BTreeMap::new(),
            in_flight: None,
            next_pod: 0,
            clock: now(),
        }
    }

    fn look(&mut self) {
        let count = |n: usize| i32::try_from(n).unwrap();
        let observed: Vec<Observed> = self
            .sets
            .values()
            .map(|set| Observed {
                object: Arc::new(set.object.clone()),
                active: count(set.pods.len()),
                available: count(set.pods.values().filter(|ready| **ready).count()),
                running: !set.pods.is_empty(),
            })
            .collect();
        let versions = self
            .sets
            .iter()
            .map(|(name, set)| (name.clone(), set.version))
            .collect();
        let plan = plan(&self.deployment, &observed, self.clock).unwrap();
        self.in_flight = Some((plan, versions));
    }

    fn write(&mut self) {
        let Some((plan, versions)) = self.in_flight.take() else {
            return;
        };
        if let Some(mut object) = plan.create {
            object.metadata.generation = Some(1);
            self.clock += SignedDuration::from_secs(1);
            object.metadata.creation_timestamp = Some(Time(self.clock));
            let name = object.metadata.name.clone().unwrap();
            assert!(!self.sets.contains_key(&name));
            let set = Set {
                object,
                pods: BTreeMap::new(),
                in_flight: None,
                version: 0,
            };
            self.sets.insert(name, set);
        }
        for (mut object, _) in plan.update {
            let name = object.metadata.name.clone().unwrap();
            let set = self.sets.get_mut(&name).unwrap();
            if versions.get(&name) != Some(&set.version) {
                return; // A conflict: the rest of the plan is not carried out either.
            }
            if size(&object) != size(&set.object) {
                object.metadata.generation = object.metadata.generation.map(|g| g + 1);
            }
            object.status = set.object.status.clone();
            set.object = object;
            set.version += 1;
        }
        for gone in plan.delete {
            let set = self
                .sets
                .remove(gone.metadata.name.as_ref().unwrap())
                .unwrap();
            assert!(set.pods.is_empty(), "history with pods was deleted");
        }
        self.deployment.status = Some(plan.status);
    }

    fn change_template(&mut self, image: u8) {
        let spec = self.deployment.spec.as_mut().unwrap();
        spec.template.spec.get_or_insert_default().hostname = Some(format!("v{image}"));
        let generation = self.deployment.metadata.generation.map(|g| g + 1);
        self.deployment.metadata.generation = generation;
    }

    fn resize(&mut self, replicas: i32) {
        self.deployment.spec.as_mut().unwrap().replicas = Some(replicas);
        let generation = self.deployment.metadata.generation.map(|g| g + 1);
        self.deployment.metadata.generation = generation;
    }

    fn set(&mut self, pick: usize) -> Option<&mut Set> {
        let index = pick.checked_rem(self.sets.len())?;
        self.sets.values_mut().nth(index)
    }

    fn make_ready(&mut self, pick: usize) {
        let mut waiting: Vec<&mut bool> = self
            .sets
            .values_mut()
            .flat_map(|set| set.pods.values_mut())
            .filter(|r| !**r)
            .collect();
        if let Some(index) = pick.checked_rem(waiting.len()) {
            *waiting[index] = true;
        }
    }

    fn pod_count(&self) -> i32 {
        i32::try_from(self.sets.values().map(|set| set.pods.len()).sum::<usize>()).unwrap()
    }

    fn available_count(&self) -> i32 {
        let ready = self
            .sets
            .values()
            .flat_map(|set| set.pods.values())
            .filter(|ready| **ready);
        i32::try_from(ready.count()).unwrap()
    }

    /// Lets everyone act in turn until nothing changes any more.
    fn settle(&mut self) {
        let mut last = (0, String::new());
        for round in 0..400 {
            // Everything that can change, the clock aside.
            let state = format!("{:?} {:?}", self.sets, self.deployment.status);
            if state != last.1 {
                last = (round, state);
            } else if round > last.0 + 2 {
                return;
            }
            self.look();
            self.write();
            for index in 0..self.sets.len() {
                let mut next_pod = self.next_pod;
                let set = self.set(index).unwrap();
                set.look();
                set.write(&mut next_pod);
                self.next_pod = next_pod;
            }
            self.make_ready(0);
        }
    }

    fn is_complete(&self) -> bool {
        let wanted = desired(&self.deployment);
        let sizes: Vec<i32> = self
            .sets
            .values()
            .map(|set| size(&set.object))
            .filter(|size| *size > 0)
            .collect();
        let expected = if wanted == 0 {
            Vec::new()
        } else {
            vec![wanted]
        };
        let status = self.deployment.status.clone().unwrap_or_default();
        let conditions = status.conditions.unwrap_or_default();
        let reason = status::find(&conditions, "Progressing").and_then(|c| c.reason.clone());
        sizes == expected
            && self.pod_count() == wanted
            && self.available_count() == wanted
            && status.updated_replicas == Some(wanted)
            && reason.as_deref() == Some("NewReplicaSetAvailable")
    }
}

#[derive(Debug, Clone)]
enum Step {
    DeploymentLooks,
    DeploymentWrites,
    SetLooks(usize),
    SetWrites(usize),
    PodReady(usize),
    Template(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => Just(Step::DeploymentLooks),
        6 => Just(Step::DeploymentWrites),
        8 => (0_usize..8).prop_map(Step::SetLooks),
        8 => (0_usize..8).prop_map(Step::SetWrites),
        8 => (0_usize..64).prop_map(Step::PodReady),
        1 => (0_u8..4).prop_map(Step::Template),
    ]
}

impl World {
    fn take(&mut self, step: &Step) {
        match step {
            Step::DeploymentLooks => self.look(),
            Step::DeploymentWrites => self.write(),
            Step::SetLooks(pick) => {
                if let Some(set) = self.set(*pick) {
                    set.look();
                }
            }
            Step::SetWrites(pick) => {
                let mut next_pod = self.next_pod;
                if let Some(set) = self.set(*pick) {
                    set.write(&mut next_pod);
                }
                self.next_pod = next_pod;
            }
            Step::PodReady(pick) => self.make_ready(*pick),
            Step::Template(image) => self.change_template(*image),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_rolling_update_never_leaves_its_limits(
        replicas in 1_i32..8, surge in 0_i32..4, unavailable in 0_i32..4,
        steps in proptest::collection::vec(step(), 0..250),
    ) {
        let mut world = World::new(new_deployment(replicas, surge, unavailable, "RollingUpdate"));
        world.settle();
        prop_assert!(world.is_complete(), "the first rollout ends");
        let (surge, unavailable) = limits(&world.deployment);
        world.change_template(9);
        for step in &steps {
            world.take(step);
            prop_assert!(world.available_count() >= replicas - unavailable, "too few after {:?}", step);
            prop_assert!(world.pod_count() <= replicas + surge, "too many after {:?}", step);
        }
        world.write();
        world.settle();
        prop_assert!(world.is_complete(), "the last rollout ends");
        let old = world.sets.values().filter(|set| size(&set.object) == 0).count();
        prop_assert!(old <= 2, "history is kept short");
    }

    #[test]
    fn recreate_never_mixes_templates(
        replicas in 1_i32..5, steps in proptest::collection::vec(step(), 0..150),
    ) {
        let mut world = World::new(new_deployment(replicas, 0, 0, "Recreate"));
        world.settle();
        world.change_template(9);
        for step in &steps {
            world.take(step);
            let running = world.sets.values().filter(|set| !set.pods.is_empty()).count();
            prop_assert!(running <= 1, "two templates run after {:?}", step);
        }
        world.write();
        world.settle();
        prop_assert!(world.is_complete());
    }

    #[test]
    fn any_size_is_reached_also_in_the_middle_of_a_rollout(
        first in 0_i32..8, second in 0_i32..12, steps in proptest::collection::vec(step(), 0..80),
    ) {
        let mut world = World::new(new_deployment(first, 2, 1, "RollingUpdate"));
        world.settle();
        world.change_template(9);
        steps.iter().for_each(|step| world.take(step));
        world.resize(second);
        steps.iter().rev().for_each(|step| world.take(step));
        world.write();
        world.settle();
        prop_assert!(world.is_complete(), "{:?}", world.deployment.status);
    }
}

#[test]
fn a_paused_deployment_scales_but_does_not_roll() {
    let mut world = World::new(new_deployment(2, 1, 0, "RollingUpdate"));
    world.settle();
    world.deployment.spec.as_mut().unwrap().paused = Some(true);
    world.change_template(1);
    world.resize(4);
    world.settle();
    assert_eq!(world.sets.len(), 1, "no new ReplicaSet");
    assert_eq!(world.pod_count(), 4);
    world.deployment.spec.as_mut().unwrap().paused = Some(false);
    world.settle();
    assert!(world.is_complete());
    assert_eq!(world.sets.len(), 2);
}

#[test]
fn a_rollout_without_progress_is_reported_after_its_deadline() {
    let mut world = World::new(new_deployment(2, 1, 0, "RollingUpdate"));
    world.settle();
    world.change_template(1);
    world.look();
    world.write(); // The new set is made; its pod never becomes ready.
    for set in world.sets.values_mut() {
        set.look();
        set.write(&mut world.next_pod);
    }
    world.look();
    world.write();
    let reason = |status: &Option<DeploymentStatus>| {
        let conditions = status.clone().unwrap().conditions.unwrap();
        let progressing = status::find(&conditions, "Progressing").unwrap();
        (
            progressing.status.clone(),
            progressing.reason.clone().unwrap(),
        )
    };
    assert_eq!(reason(&world.deployment.status).0, "True");
    world.clock += SignedDuration::from_secs(300);
    world.look();
    let again = world.in_flight.as_ref().unwrap().0.again.unwrap().as_secs();
    assert!(
        (295..=305).contains(&again),
        "looks again when the deadline ends: {again} s"
    );
    world.clock += SignedDuration::from_secs(310);
    world.look();
    world.write();
    let expected = ("False".to_owned(), "ProgressDeadlineExceeded".to_owned());
    assert_eq!(reason(&world.deployment.status), expected);
    assert_eq!(world.available_count(), 2, "the old pods go on serving");
}

#[test]
fn scaling_in_the_middle_of_a_rollout_is_proportional() {
    // The example of Kubernetes' documentation: 10 replicas, surge 3, unavailable 2, stuck at 8 old
    // and 5 new; scaled to 15 the 5 more are spread over both.
    let mut world = World::new(new_deployment(10, 3, 2, "RollingUpdate"));
    world.settle();
    world.change_template(1);
    for _ in 0..20 {
        world.look();
        world.write();
        for set in world.sets.values_mut() {
            set.look();
            set.write(&mut world.next_pod);
        }
    }
    let sizes = |world: &World| {
        let mut sizes: Vec<i32> = world.sets.values().map(|set| size(&set.object)).collect();
        sizes.sort_unstable();
        sizes
    };
    assert_eq!(sizes(&world), [5, 8]);
    world.resize(15);
    world.look();
    world.write();
    assert_eq!(sizes(&world), [7, 11]);
}
