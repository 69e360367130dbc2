use ebpf_maps::services::{
    BACKEND_RETIRED, FRONTEND_TABLE, SCOPE_ADDRESS, SCOPE_OUTSIDE_ADDRESS, v4_mapped,
};
use proptest::prelude::*;

use super::*;
use crate::services::arena::QUARANTINE;
use crate::services::index::SourceRange;

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
        on_trial: false,
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
        direct_return: false,
        elsewhere: false,
        restricted: Vec::new(),
        source_ranges: Vec::new(),
    }
}

fn outside(host: u8) -> FrontendKey {
    FrontendKey {
        scope: SCOPE_OUTSIDE_ADDRESS,
        ..frontend(host)
    }
}

/// The same with a frontend for the outside beside each.
fn both_sides(set: BackendSet) -> BackendSet {
    let mut frontends = set.frontends.clone();
    frontends.extend(set.frontends.iter().map(|key| FrontendKey {
        scope: SCOPE_OUTSIDE_ADDRESS,
        ..*key
    }));
    BackendSet { frontends, ..set }
}

fn range(host: u8) -> SourceRange {
    SourceRange {
        addr: v4_mapped(u32::from_ne_bytes([192, 0, 2, host])),
        prefix: 128,
    }
}

/// The same with its frontends for the outside limited to these clients.
fn limited_to(set: BackendSet, clients: &[u8]) -> BackendSet {
    let restricted = set.frontends.iter().filter(|key| key.is_outside());
    BackendSet {
        restricted: restricted.copied().collect(),
        source_ranges: clients.iter().map(|host| range(*host)).collect(),
        ..set
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
    source_ranges: BTreeSet<(u32, SourceRange)>,
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
                assert!(!self.is_held(*id), "retired while it is used");
                self.backends.get_mut(id).unwrap().state = BACKEND_RETIRED;
            }
            Step::AddSourceRange { service_id, range } => {
                assert!(
                    self.source_ranges.insert((*service_id, *range)),
                    "added twice"
                );
            }
            Step::RemoveSourceRange { service_id, range } => {
                assert!(
                    self.source_ranges.remove(&(*service_id, *range)),
                    "removed twice"
                );
            }
        }
    }

    fn in_use(&self) -> impl Iterator<Item = BackendId> {
        let all = self.backends.iter();
        all.filter(|(_, value)| value.state != BACKEND_RETIRED)
            .map(|(id, _)| *id)
    }

    fn is_held(&self, id: BackendId) -> bool {
        let ranges = self.frontends.values().map(|v| v.base..v.base + v.count);
        let mut slots = ranges.flat_map(|range| self.slots.range(range));
        slots.any(|(_, held)| *held == id)
    }

    /// What a program gets that holds this value: every slot, resolved as the program would.
    fn resolve(&self, value: &FrontendValue) -> BTreeSet<Backend> {
        let slots = self.slots.range(value.base..value.base + value.count);
        let ids: BTreeSet<BackendId> = slots.map(|(_, id)| *id).collect();
        let resolved = ids.iter().map(|id| {
            let found = &self.backends[id];
            let (owner, own) = (found.service_id, value.service_id);
            assert_eq!(owner, own, "another Service's backend");
            backend_of(found)
        });
        resolved.collect()
    }

    fn backends_of(&self, key: &FrontendKey) -> Option<BTreeSet<Backend>> {
        self.frontends.get(key).map(|value| self.resolve(value))
    }

    /// Whether a client may use a frontend; none: there is no such frontend.
    fn admits(&self, key: &FrontendKey, host: u8) -> Option<bool> {
        let value = self.frontends.get(key)?;
        let is_open = value.flags & FRONTEND_RESTRICTED == 0;
        Some(
            is_open
                || self
                    .source_ranges
                    .contains(&(value.service_id, range(host))),
        )
    }

    fn found(&self) -> Found {
        let mut found = Found {
            source_ranges: self.source_ranges.iter().copied().collect(),
            in_use: self.in_use().collect(),
            ..Found::default()
        };
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
        source_range_count: 4096,
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
        Step::AddSourceRange { .. } => "allow",
        Step::RemoveSourceRange { .. } => "disallow",
    }
}

#[test]
fn a_changed_affinity_keeps_the_range() {
    let mut table = fresh(Limits::default());
    table.plan(&wanted(1, vec![set(&[1], &[1, 2])]), 1, T);
    let sticky = BackendSet {
        affinity_s: 60,
        least_connections: false,
        direct_return: false,
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
fn what_an_agent_left_and_did_not_retire_is_retired_by_the_next() {
    let mut table = fresh(Limits::default());
    let mut maps = Maps::default();
    let first = table.plan(&wanted(1, vec![set(&[1], &[1, 2])]), 1, T);
    first.steps.iter().for_each(|step| maps.perform(step));
    table.performed(T);
    let second = table.plan(&wanted(1, vec![set(&[1], &[2])]), 2, T);
    let (retire, done) = second.steps.split_last().unwrap();
    assert_eq!(kind(retire), "retire");
    done.iter().for_each(|step| maps.perform(step));

    let mut table = Table::adopt(maps.found(), Limits::default(), T);
    let plan = table.plan(&wanted(1, vec![set(&[1], &[2])]), 3, T);
    assert_eq!(plan.steps, std::slice::from_ref(retire));
    // Its id is another's only after the quarantine.
    table.performed(T);
    let plan = table.plan(&wanted(1, vec![set(&[1], &[2, 3])]), 4, T + QUARANTINE / 2);
    let Some(Step::WriteBackend { id, .. }) = plan.steps.first() else {
        panic!("{:?}", plan.steps);
    };
    assert!(*retire != Step::RetireBackend { id: *id });
}

#[test]
fn ids_that_no_backend_can_have_are_left_alone() {
    let found = Found {
        in_use: [0, 5, 64, u32::MAX].map(BackendId).to_vec(),
        ..Found::default()
    };
    let mut table = Table::adopt(found, limits(10, 10, 64), Duration::ZERO);
    let plan = table.plan(&Wanted::new(), 1, T);
    assert_eq!(plan.steps, [Step::RetireBackend { id: BackendId(5) }]);
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
        ..Found::default()
    };
    let mut table = Table::adopt(found, Limits::default(), Duration::ZERO);
    let plan = table.plan(&wanted(1, vec![set(&[1], &[])]), 1, T);
    assert!(
        matches!(plan.steps[..], [Step::SetFrontend { .. }]),
        "{:?}",
        plan.steps
    );
}

#[test]
fn a_few_backends_share_one_range_and_many_have_a_table() {
    let mut table = fresh(Limits::default());
    let mut maps = Maps::default();
    let few: Vec<u8> = (1..9).collect();
    let plan = table.plan(&wanted(1, vec![both_sides(set(&[1], &few))]), 1, T);
    plan.steps.iter().for_each(|step| maps.perform(step));
    assert_eq!(
        maps.frontends[&frontend(1)].base,
        maps.frontends[&outside(1)].base
    );
    assert_eq!(maps.frontends[&outside(1)].flags, 0);
    let many: Vec<u8> = (1..13).collect();
    let plan = table.plan(&wanted(1, vec![both_sides(set(&[1], &many))]), 2, T);
    plan.steps.iter().for_each(|step| maps.perform(step));
    let (inside, value) = (maps.frontends[&frontend(1)], maps.frontends[&outside(1)]);
    assert_eq!((inside.count, inside.flags), (12, 0));
    assert_eq!((value.count, value.flags), (4093, FRONTEND_TABLE));
    let new = plan
        .steps
        .iter()
        .filter(|step| matches!(step, Step::WriteBackend { .. }));
    assert_eq!(new.count(), 4, "lists and tables share their backends");
    assert_eq!(
        maps.backends_of(&frontend(1)),
        maps.backends_of(&outside(1))
    );
    table.performed(T);
    let mut table = Table::adopt(maps.found(), Limits::default(), T);
    let again = table.plan(&wanted(1, vec![both_sides(set(&[1], &many))]), 3, T);
    assert_eq!(again.steps, []);
    let plan = table.plan(&wanted(1, vec![both_sides(set(&[1], &few))]), 4, T);
    plan.steps.iter().for_each(|step| maps.perform(step));
    assert_eq!(
        maps.frontends[&frontend(1)].base,
        maps.frontends[&outside(1)].base
    );
}

#[test]
fn where_no_table_fits_the_list_serves_the_outside_too() {
    let mut table = fresh(limits(10, 100, 100));
    let many: Vec<u8> = (1..13).collect();
    let wanted = wanted(1, vec![both_sides(set(&[1], &many))]);
    let plan = table.plan(&wanted, 1, T);
    assert_eq!(plan.stuck[&service(1)], "SLOTS is full (100 entries)");
    let mut maps = Maps::default();
    plan.steps.iter().for_each(|step| maps.perform(step));
    assert_eq!(
        maps.frontends[&frontend(1)].base,
        maps.frontends[&outside(1)].base
    );
    assert_eq!(table.plan(&wanted, 2, T).steps, []);
}

#[test]
fn source_ranges_are_there_before_the_frontend_and_go_after_it() {
    let mut table = fresh(Limits::default());
    let limited =
        |clients: &[u8]| wanted(1, vec![limited_to(both_sides(set(&[1], &[1])), clients)]);
    let kinds = |plan: &Plan| plan.steps.iter().map(kind).collect::<Vec<_>>();
    let plan = table.plan(&limited(&[1, 2]), 1, T);
    assert_eq!(
        kinds(&plan),
        ["allow", "allow", "backend", "slots", "set", "set"]
    );
    assert_eq!(
        kinds(&table.plan(&limited(&[2, 3]), 2, T)),
        ["allow", "disallow"]
    );
    let open = wanted(1, vec![both_sides(set(&[1], &[1]))]);
    assert_eq!(
        kinds(&table.plan(&open, 3, T)),
        ["set", "disallow", "disallow"]
    );
    table.plan(&limited(&[1]), 4, T);
    let plan = table.plan(&wanted(1, vec![]), 5, T);
    assert_eq!(kinds(&plan), ["remove", "remove", "retire", "disallow"]);
}

#[test]
fn source_ranges_that_do_not_fit_let_nobody_in() {
    let few = Limits {
        source_range_count: 1,
        ..Limits::default()
    };
    let mut table = fresh(few);
    let limited = limited_to(both_sides(set(&[1], &[1])), &[1, 2]);
    let plan = table.plan(&wanted(1, vec![limited]), 1, T);
    assert_eq!(plan.stuck[&service(1)], "SOURCE_RANGES is full (1 entries)");
    let mut maps = Maps::default();
    plan.steps.iter().for_each(|step| maps.perform(step));
    assert_eq!(maps.frontends[&outside(1)].count, 0);
    assert_eq!(maps.admits(&outside(1), 1), Some(false));
    assert_eq!(
        maps.backends_of(&frontend(1)).unwrap().len(),
        1,
        "the nodes' own clients"
    );
}

#[test]
fn without_a_backend_here_the_outside_is_dropped_or_refused() {
    let mut table = fresh(Limits::default());
    let elsewhere = BackendSet {
        elsewhere: true,
        ..both_sides(set(&[1], &[]))
    };
    let both = [(elsewhere, FRONTEND_DROP), (both_sides(set(&[1], &[])), 0)];
    for (generation, (set, flags)) in (1..).zip(both) {
        table.plan(&wanted(1, vec![set]), generation, T);
        assert_eq!(table.frontends[&outside(1)].flags, flags);
        assert_eq!(table.frontends[&frontend(1)].flags, 0);
    }
}

/// Frontends, backends, affinity, clients that may come from outside.
type Drawn = (Vec<u8>, Vec<u8>, u32, Vec<u8>);

/// One change of a random history: which Service, its sets, and how long after the one before.
#[derive(Clone, Debug)]
enum Change {
    Apply {
        services: Vec<(usize, Option<Drawn>)>,
        after_ms: u64,
        /// The agent dies when it has written so many steps, and another one goes on.
        dies_after: Option<usize>,
    },
    RestartAgent,
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let few = prop::collection::btree_set(1u8..9, 0..6);
    let many = prop::collection::btree_set(1u8..16, 9..11);
    let sets = (
        prop::collection::btree_set(1u8..12, 1..4),
        prop_oneof![4 => few, 1 => many],
        0u32..2,
        prop::collection::btree_set(1u8..4, 0..3),
    );
    let sets = sets.prop_map(|(frontends, backends, affinity_s, clients)| {
        (
            frontends.into_iter().collect(),
            backends.into_iter().collect(),
            affinity_s,
            clients.into_iter().collect(),
        )
    });
    let services = prop::collection::vec((0usize..5, prop::option::weighted(0.8, sets)), 1..4);
    let dies_after = prop::option::weighted(0.2, 0usize..12);
    let apply = (services, 0u64..1500, dies_after).prop_map(|(services, after_ms, dies_after)| {
        Change::Apply {
            services,
            after_ms,
            dies_after,
        }
    });
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

/// What programs may still hold: the value, when it was read last and what it resolved to then.
type Readers = HashMap<FrontendValue, (Duration, BTreeSet<Backend>)>;

/// The steps in the order in which they are written; of switches that are written at once, each is one.
fn as_written(steps: &[Step], most: usize) -> Vec<Step> {
    let mut written = Vec::new();
    let all: Result<(), ()> = in_batches(steps, most, |write| {
        match write {
            Write::Switches(keys, values) => {
                assert!(!keys.is_empty() && keys.len() <= most && keys.len() == values.len());
                let switches = keys.iter().copied().zip(values.iter().copied());
                written.extend(switches.map(|(key, value)| Step::SetFrontend { key, value }));
            }
            Write::One(step) => written.push(step.clone()),
        }
        Ok(())
    });
    all.unwrap();
    assert_eq!(written.len(), steps.len());
    written
}

/// Plans and performs so many steps one by one, looking at every frontend after each. No plan: there were more.
fn perform(
    table: &mut Table,
    maps: &mut Maps,
    readers: &mut Readers,
    changed: &Wanted,
    generation: u64,
    now: &mut Duration,
    step_count_max: usize,
) -> Result<Option<Plan>, TestCaseError> {
    let before = maps.clone();
    let plan = table.plan(changed, generation, *now);
    let mut after = maps.clone();
    plan.steps.iter().for_each(|step| after.perform(step));
    let most = [1, 3, 1_000][generation as usize % 3];
    let written = as_written(&plan.steps, most);
    for step in written.iter().take(step_count_max) {
        maps.perform(step);
        *now += Duration::from_micros(10);
        for key in (1..12).map(outside) {
            for host in 1..4 {
                let seen = maps.admits(&key, host);
                let (old, new) = (before.admits(&key, host), after.admits(&key, host));
                // One that comes or goes may meet the ranges that its set had or gets.
                let by_set = maps.frontends.get(&key).map(|value| {
                    let id = (value.service_id, range(host));
                    before.source_ranges.contains(&id) || after.source_ranges.contains(&id)
                });
                prop_assert!(
                    [old, new, by_set].contains(&seen),
                    "client {host} after {step:?}"
                );
            }
        }
        for key in (1..12).flat_map(|host| [frontend(host), outside(host)]) {
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
                readers.insert(*value, (*now, seen));
            }
        }
        readers.retain(|_, (read_at, _)| *now < *read_at + Duration::from_millis(900));
        for (value, (_, seen)) in readers.iter() {
            // Fewer only where a removal found the arena full for a moment.
            prop_assert!(
                maps.resolve(value).is_subset(seen),
                "changed under a reader"
            );
        }
    }
    if written.len() > step_count_max {
        return Ok(None);
    }
    table.performed(*now);
    Ok(Some(plan))
}

fn check_history(history: &[Change], limits: Limits) -> Result<(), TestCaseError> {
    let mut table = fresh(limits);
    let mut maps = Maps::default();
    let mut model = Model::default();
    let mut now = T;
    let mut readers = Readers::new();
    for (generation, change) in (1u64..).zip(history) {
        let mut left = usize::MAX;
        let mut changed: Wanted = match change {
            Change::RestartAgent => {
                table = Table::adopt(maps.found(), limits, now + QUARANTINE);
                model.services.clone()
            }
            Change::Apply {
                services,
                after_ms,
                dies_after,
            } => {
                now += Duration::from_millis(*after_ms);
                left = dies_after.unwrap_or(usize::MAX);
                let sets = services.iter().map(|(name, wanted)| {
                    let sets = wanted
                        .iter()
                        .map(|(frontends, backends, affinity_s, clients)| {
                            let set = both_sides(BackendSet {
                                affinity_s: *affinity_s,
                                least_connections: *affinity_s % 2 == 1,
                                direct_return: *affinity_s % 3 == 1,
                                ..set(frontends, backends)
                            });
                            if clients.is_empty() {
                                set
                            } else {
                                limited_to(set, clients)
                            }
                        });
                    (service(*name), sets.collect())
                });
                sets.collect()
            }
        };
        model.services.extend(changed.clone());
        let plan = loop {
            let performed = perform(
                &mut table,
                &mut maps,
                &mut readers,
                &changed,
                generation,
                &mut now,
                std::mem::replace(&mut left, usize::MAX),
            )?;
            match performed {
                None => {
                    table = Table::adopt(maps.found(), limits, now + QUARANTINE);
                    changed = model.services.clone();
                }
                Some(Plan {
                    retry_at: Some(retry_at),
                    ..
                }) => now = now.max(retry_at),
                Some(plan) => break plan,
            }
        };
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
                if table.owner(key) == Some(name) {
                    prop_assert_eq!(maps.backends_of(key), Some(wanted.clone()));
                    for host in 1..4 {
                        let admits = !set.restricted.contains(key)
                            || set.source_ranges.contains(&range(host));
                        prop_assert_eq!(maps.admits(key, host), Some(admits));
                    }
                } else {
                    prop_assert!(plan.stuck.contains_key(name));
                }
            }
        }
    }
    prop_assert_eq!(table.frontends.len(), maps.frontends.len());
    for id in maps.in_use() {
        prop_assert!(maps.is_held(id), "{id:?} is in use for nobody");
    }
    for (id, range) in &maps.source_ranges {
        prop_assert!(
            table.service_ids_in_use.contains(id),
            "{range:?} is nobody's"
        );
    }
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
        check_history(&history, limits(64, 16_384, 4096))?;
    }
}
