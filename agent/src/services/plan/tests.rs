use ebpf_maps::services::{BACKEND_RETIRED, SCOPE_ADDRESS, v4_mapped};
use proptest::prelude::*;

use super::*;
use crate::services::arena::QUARANTINE;

type Wanted = BTreeMap<ServiceName, Vec<BackendSet>>;

fn service(name: usize) -> ServiceName {
    ServiceName {
        namespace: "default".into(),
        name: format!("s{name}"),
    }
}

fn frontend(host: u8) -> FrontendKey {
    FrontendKey {
        addr: v4_mapped(u32::from_ne_bytes([10, 96, 0, host])),
        port_be: 80u16.to_be(),
        proto: 6,
        scope: SCOPE_ADDRESS,
    }
}

fn backend(host: u8) -> Backend {
    Backend {
        addr: v4_mapped(u32::from_ne_bytes([10, 244, 0, host])),
        port_be: 8080u16.to_be(),
        proto: 6,
        node_id: 1,
        pod_id: u64::from(host),
    }
}

fn set(frontends: &[u8], backends: &[u8]) -> BackendSet {
    BackendSet {
        name: SetName {
            port: "http".into(),
            proto: 6,
            v6: false,
            local: false,
        },
        frontends: frontends.iter().map(|host| frontend(*host)).collect(),
        backends: backends.iter().map(|host| backend(*host)).collect(),
        affinity_s: 0,
        least_connections: false,
    }
}

fn wanted(name: usize, sets: Vec<BackendSet>) -> Wanted {
    BTreeMap::from([(service(name), sets)])
}

/// The maps, as steps change them.
#[derive(Clone, Default)]
struct Maps {
    frontends: HashMap<FrontendKey, FrontendValue>,
    slots: BTreeMap<u32, BackendId>,
    backends: BTreeMap<BackendId, BackendValue>,
}

impl Maps {
    fn perform(&mut self, step: &Step) {
        match step {
            Step::WriteBackend { id, value } => {
                assert!(!self.is_held(*id), "written while it is used");
                self.backends.insert(*id, *value);
            }
            Step::WriteSlots { base, ids } => {
                for (slot, id) in (*base..).zip(ids) {
                    self.slots.insert(slot, *id);
                }
            }
            Step::SetFrontend { key, value } => {
                self.frontends.insert(*key, *value);
            }
            Step::RemoveFrontend { key } => {
                assert!(self.frontends.remove(key).is_some(), "removed twice");
            }
            Step::RetireBackend { id } => {
                self.backends.get_mut(id).unwrap().state = BACKEND_RETIRED;
            }
        }
    }

    fn is_held(&self, id: BackendId) -> bool {
        let mut ranges = self
            .frontends
            .values()
            .flat_map(|v| v.base..v.base + v.count);
        ranges.any(|slot| self.slots[&slot] == id)
    }

    /// What a program gets that holds this value: every slot, resolved as the program would.
    fn resolve(&self, value: &FrontendValue) -> BTreeSet<Backend> {
        (value.base..value.base + value.count)
            .map(|slot| {
                let found = &self.backends[&self.slots[&slot]];
                assert_eq!(
                    found.service_id, value.service_id,
                    "another Service's backend"
                );
                backend_of(found)
            })
            .collect()
    }

    fn backends_of(&self, key: &FrontendKey) -> Option<BTreeSet<Backend>> {
        self.frontends.get(key).map(|value| self.resolve(value))
    }

    fn found(&self) -> Found {
        let mut found = Found::default();
        for (key, value) in &self.frontends {
            found.frontends.push((*key, *value));
            let slots = (value.base..value.base + value.count).map(|slot| {
                let id = self.slots[&slot];
                (id, self.backends[&id])
            });
            found.backends.push(Some(slots.collect()));
        }
        found
    }
}

fn limits(frontends: u32, slots: u32, backends: u32) -> Limits {
    Limits {
        frontend_count: frontends,
        slot_count: slots,
        backend_count: backends,
    }
}

fn fresh(limits: Limits) -> Table {
    Table::adopt(Found::default(), limits, Duration::ZERO)
}

const T: Duration = Duration::from_secs(10);

#[test]
fn backends_then_slots_then_one_switch() {
    let mut table = fresh(Limits::default());
    let plan = table.plan(&wanted(1, vec![set(&[1, 2], &[1, 2, 3])]), 7, T);
    let kinds: Vec<&str> = plan.steps.iter().map(kind).collect();
    assert_eq!(
        kinds,
        ["backend", "backend", "backend", "slots", "set", "set"]
    );
    table.performed(T);
    let plan = table.plan(&wanted(1, vec![set(&[1, 2], &[1, 3, 4])]), 8, T);
    let kinds: Vec<&str> = plan.steps.iter().map(kind).collect();
    assert_eq!(kinds, ["backend", "slots", "set", "set", "retire"]);
    table.performed(T);
    let plan = table.plan(&wanted(1, vec![]), 9, T);
    let kinds: Vec<&str> = plan.steps.iter().map(kind).collect();
    assert_eq!(kinds, ["remove", "remove", "retire", "retire", "retire"]);
    assert_eq!((table.frontend_count(), table.backend_count()), (0, 0));
}

fn kind(step: &Step) -> &'static str {
    match step {
        Step::WriteBackend { .. } => "backend",
        Step::WriteSlots { .. } => "slots",
        Step::SetFrontend { .. } => "set",
        Step::RemoveFrontend { .. } => "remove",
        Step::RetireBackend { .. } => "retire",
    }
}

#[test]
fn a_changed_affinity_keeps_the_range() {
    let mut table = fresh(Limits::default());
    table.plan(&wanted(1, vec![set(&[1], &[1, 2])]), 1, T);
    let sticky = BackendSet {
        affinity_s: 60,
        least_connections: false,
        ..set(&[1], &[1, 2])
    };
    let plan = table.plan(&wanted(1, vec![sticky]), 2, T);
    assert!(
        matches!(plan.steps[..], [Step::SetFrontend { .. }]),
        "{:?}",
        plan.steps
    );
}

#[test]
fn a_frontend_moves_between_services_without_a_gap() {
    let mut table = fresh(Limits::default());
    table.plan(&wanted(1, vec![set(&[1], &[1])]), 1, T);
    let both = BTreeMap::from([(service(1), vec![]), (service(2), vec![set(&[1], &[2])])]);
    let plan = table.plan(&both, 2, T);
    assert!(plan.stuck.is_empty());
    assert!(
        plan.steps
            .iter()
            .all(|step| !matches!(step, Step::RemoveFrontend { .. }))
    );
}

#[test]
fn the_second_claim_on_a_frontend_is_stuck_until_the_first_lets_go() {
    let mut table = fresh(Limits::default());
    table.plan(&wanted(2, vec![set(&[1], &[1])]), 1, T);
    let plan = table.plan(&wanted(1, vec![set(&[1, 2], &[2])]), 2, T);
    assert_eq!(
        plan.stuck[&service(1)],
        "10.96.0.1:80 belongs to default/s2"
    );
    assert_eq!(table.frontend_count(), 2);
    table.plan(&wanted(2, vec![]), 3, T);
    let plan = table.plan(&wanted(1, vec![set(&[1, 2], &[2])]), 4, T);
    assert!(plan.stuck.is_empty());
    assert_eq!(table.frontend_count(), 2);
}

#[test]
fn a_full_arena_waits_for_the_quarantine_and_says_when() {
    let mut table = fresh(limits(10, 4, 5));
    table.plan(&wanted(1, vec![set(&[1], &[1, 2, 3])]), 1, T);
    table.performed(T);
    let plan = table.plan(&wanted(1, vec![set(&[1], &[4])]), 2, T);
    assert!(plan.stuck.is_empty());
    table.performed(T);
    let plan = table.plan(&wanted(1, vec![set(&[1], &[1, 2, 3])]), 3, T);
    assert_eq!(plan.retry_at, Some(T + QUARANTINE));
    assert_eq!(plan.stuck[&service(1)], "SLOTS is full (4 entries)");
    let plan = table.plan(&wanted(1, vec![set(&[1], &[1, 2, 3])]), 4, T + QUARANTINE);
    assert!(plan.stuck.is_empty(), "{plan:?}");
}

#[test]
fn a_removal_succeeds_also_in_a_full_arena() {
    let mut table = fresh(limits(10, 3, 10));
    let mut maps = Maps::default();
    for step in table
        .plan(&wanted(1, vec![set(&[1], &[1, 2, 3])]), 1, T)
        .steps
    {
        maps.perform(&step);
    }
    let plan = table.plan(&wanted(1, vec![set(&[1], &[1, 3])]), 2, T);
    assert!(
        plan.stuck.contains_key(&service(1)),
        "uneven until there is room"
    );
    plan.steps.iter().for_each(|step| maps.perform(step));
    let left = BTreeSet::from([backend(1), backend(3)]);
    assert_eq!(maps.backends_of(&frontend(1)), Some(left));
    let plan = table.plan(&wanted(1, vec![set(&[1], &[])]), 3, T);
    plan.steps.iter().for_each(|step| maps.perform(step));
    assert_eq!(maps.backends_of(&frontend(1)), Some(BTreeSet::new()));
}

#[test]
fn too_many_frontends_are_stuck_and_the_others_work() {
    let mut table = fresh(limits(1, 10, 10));
    let both = BTreeMap::from([
        (service(1), vec![set(&[1], &[1])]),
        (service(2), vec![set(&[2], &[2])]),
    ]);
    let plan = table.plan(&both, 1, T);
    assert_eq!(plan.stuck[&service(2)], "FRONTENDS is full (1 entries)");
    assert_eq!((table.frontend_count(), table.backend_count()), (1, 1));
}

#[test]
fn a_torn_entry_is_written_anew() {
    let key = frontend(1);
    let value = FrontendValue {
        check: key.check() ^ 1,
        base: 5,
        count: 2,
        ..Default::default()
    };
    let found = Found {
        frontends: vec![(key, value)],
        backends: vec![None],
    };
    let mut table = Table::adopt(found, Limits::default(), Duration::ZERO);
    let plan = table.plan(&wanted(1, vec![set(&[1], &[])]), 1, T);
    assert!(
        matches!(plan.steps[..], [Step::SetFrontend { .. }]),
        "{:?}",
        plan.steps
    );
}

/// Frontends, backends, affinity.
type Drawn = (Vec<u8>, Vec<u8>, u32);

/// One change of a random history: which Service, its sets, and how long after the one before.
#[derive(Clone, Debug)]
enum Change {
    Apply {
        services: Vec<(usize, Option<Drawn>)>,
        after_ms: u64,
    },
    RestartAgent,
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let hosts = |max: u8| prop::collection::btree_set(1..max, 0..6);
    let sets = (
        prop::collection::btree_set(1u8..12, 1..4),
        hosts(9),
        0u32..2,
    );
    let sets = sets.prop_map(|(frontends, backends, affinity_s)| {
        (
            frontends.into_iter().collect(),
            backends.into_iter().collect(),
            affinity_s,
        )
    });
    let services = prop::collection::vec((0usize..5, prop::option::weighted(0.8, sets)), 1..4);
    let apply = (services, 0u64..1500)
        .prop_map(|(services, after_ms)| Change::Apply { services, after_ms });
    prop::collection::vec(
        prop_oneof![9 => apply, 1 => Just(Change::RestartAgent)],
        1..40,
    )
}

/// The whole wanted state, and what each frontend should resolve to under first-come claims.
#[derive(Default)]
struct Model {
    services: Wanted,
}

/// What programs may still hold: (read at, value, what it resolved to then).
type Readers = Vec<(Duration, FrontendValue, BTreeSet<Backend>)>;

/// Plans and performs step by step, looking at every frontend after each.
fn perform(
    table: &mut Table,
    maps: &mut Maps,
    readers: &mut Readers,
    changed: &Wanted,
    generation: u64,
    now: &mut Duration,
) -> Result<Plan, TestCaseError> {
    let before = maps.clone();
    let plan = table.plan(changed, generation, *now);
    let mut after = maps.clone();
    plan.steps.iter().for_each(|step| after.perform(step));
    for step in &plan.steps {
        maps.perform(step);
        *now += Duration::from_micros(10);
        for key in (1..12).map(frontend) {
            let seen = maps.backends_of(&key);
            let (old, new) = (before.backends_of(&key), after.backends_of(&key));
            // The exception of the module's header: fewer of the old ones, but never none.
            let fewer = match (&seen, &old) {
                (Some(seen), Some(old)) => !seen.is_empty() && seen.is_subset(old),
                _ => false,
            };
            prop_assert!(
                seen == old || seen == new || (fewer && !plan.stuck.is_empty()),
                "{} is half-programmed after {step:?}",
                describe(&key)
            );
            if let (Some(value), Some(seen)) = (maps.frontends.get(&key), seen) {
                readers.push((*now, *value, seen));
            }
        }
        readers.retain(|(read_at, ..)| *now < *read_at + Duration::from_millis(900));
        for (_, value, seen) in readers.iter() {
            // Fewer only where a removal found the arena full for a moment.
            prop_assert!(
                maps.resolve(value).is_subset(seen),
                "changed under a reader"
            );
        }
    }
    table.performed(*now);
    Ok(plan)
}

fn check_history(history: &[Change], limits: Limits) -> Result<(), TestCaseError> {
    let mut table = fresh(limits);
    let mut maps = Maps::default();
    let mut model = Model::default();
    let mut now = T;
    let mut readers = Vec::new();
    for (generation, change) in (1u64..).zip(history) {
        let changed: Wanted = match change {
            Change::RestartAgent => {
                table = Table::adopt(maps.found(), limits, now + QUARANTINE);
                model.services.clone()
            }
            Change::Apply { services, after_ms } => {
                now += Duration::from_millis(*after_ms);
                let sets = services.iter().map(|(name, wanted)| {
                    let sets = wanted
                        .iter()
                        .map(|(frontends, backends, affinity_s)| BackendSet {
                            affinity_s: *affinity_s,
                            least_connections: *affinity_s % 2 == 1,
                            ..set(frontends, backends)
                        });
                    (service(*name), sets.collect())
                });
                sets.collect()
            }
        };
        model.services.extend(changed.clone());
        let mut plan = perform(
            &mut table,
            &mut maps,
            &mut readers,
            &changed,
            generation,
            &mut now,
        )?;
        while let Some(retry_at) = plan.retry_at {
            now = now.max(retry_at);
            plan = perform(
                &mut table,
                &mut maps,
                &mut readers,
                &changed,
                generation,
                &mut now,
            )?;
        }
        check_outcome(&table, &maps, &plan, &changed)?;
        let again = table.plan(&changed, generation, now);
        prop_assert!(again.steps.is_empty(), "not idempotent: {:?}", again.steps);
    }
    Ok(())
}

/// Every frontend that belongs to a changed Service resolves to what that Service wants.
fn check_outcome(
    table: &Table,
    maps: &Maps,
    plan: &Plan,
    changed: &Wanted,
) -> Result<(), TestCaseError> {
    for (name, sets) in changed {
        for set in sets {
            let wanted: BTreeSet<Backend> = set.backends.iter().copied().collect();
            for key in &set.frontends {
                if table.claims.get(key) == Some(name) {
                    prop_assert_eq!(maps.backends_of(key), Some(wanted.clone()));
                } else {
                    prop_assert!(plan.stuck.contains_key(name));
                }
            }
        }
    }
    prop_assert_eq!(table.frontends.len(), maps.frontends.len());
    for key in maps.frontends.keys() {
        prop_assert!(
            table.claims.contains_key(key),
            "{} belongs to nobody",
            describe(key)
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn no_intermediate_state_is_half_programmed(history in changes()) {
        check_history(&history, limits(64, 4096, 4096))?;
    }
}
