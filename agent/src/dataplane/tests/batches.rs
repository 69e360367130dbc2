//! Many frontends at once, as the maps get them.

use std::os::fd::AsFd;
use std::time::Instant;

use aya::maps::Map;
use aya::{Ebpf, EbpfLoader};
use ebpf_maps::services::{
    BACKEND_COUNT, BACKEND_IN_USE, BACKEND_ON_TRIAL, BackendValue, FRONTEND_COUNT_MAX, FrontendKey,
    FrontendValue, SCOPE_ADDRESS, v4_mapped,
};

use crate::dataplane::load;
use crate::dataplane::tables::Tables;
use crate::services::plan::{BackendId, Step};

/// The service maps of an object of its own; none, with the reason on stderr, without root.
fn tables() -> Option<(Ebpf, Tables)> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return None;
    }
    let mut ebpf = EbpfLoader::new().btf(None).load(load::OBJECT).unwrap();
    let tables = Tables::take(&mut ebpf).unwrap();
    Some((ebpf, tables))
}

fn switches(count: u32, generation: u64) -> Vec<Step> {
    let one = |number: u32| {
        let key = FrontendKey {
            addr: v4_mapped((0x0a60_0000 | number).to_be()),
            port_be: 80_u16.to_be(),
            proto: 6,
            scope: SCOPE_ADDRESS,
        };
        let value = FrontendValue {
            generation,
            check: key.check(),
            service_id: number,
            ..FrontendValue::default()
        };
        Step::SetFrontend { key, value }
    };
    (1..=count).map(one).collect()
}

/// Two generations of frontends and a removal behind them, as the maps have them then.
fn assert_written(tables: &mut Tables) {
    let mut steps = switches(2_500, 1);
    steps.extend(switches(1_500, 2));
    let Some(Step::SetFrontend { key: last, .. }) = steps.get(2_499).cloned() else {
        panic!("not a switch");
    };
    steps.push(Step::RemoveFrontend { key: last });
    tables.perform(&steps).unwrap();
    let mut found = tables.found().unwrap().frontends;
    found.sort_by_key(|(_, value)| value.service_id);
    assert_eq!(found.len(), 2_499);
    for (number, (key, value)) in (1..).zip(&found) {
        let generation = if number <= 1_500 { 2 } else { 1 };
        assert_eq!((value.service_id, value.generation), (number, generation));
        assert_eq!(value.check, key.check());
    }
}

#[test]
fn what_few_calls_write_is_what_was_to_be_written() {
    let Some((_ebpf, mut tables)) = tables() else {
        return;
    };
    assert_written(&mut tables);
}

#[test]
fn where_the_kernel_refuses_many_at_once_they_are_written_one_by_one() {
    let Some((ebpf, mut tables)) = tables() else {
        return;
    };
    // A map of a kind that has no such call, in place of a kernel that has none.
    let Some(Map::RingBuf(events)) = ebpf.map("EVENTS") else {
        panic!("EVENTS is no ring buffer");
    };
    tables.frontends_fd = events.fd().as_fd().try_clone_to_owned().unwrap();
    assert_written(&mut tables);
}

#[test]
fn what_fits_is_written_when_the_map_is_full_in_the_middle() {
    let Some((_ebpf, mut tables)) = tables() else {
        return;
    };
    let error = tables.perform(&switches(FRONTEND_COUNT_MAX + 10, 1));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("write FRONTENDS"), "{error}");
    let found = tables.found().unwrap().frontends.len();
    assert_eq!(found, FRONTEND_COUNT_MAX as usize);
}

#[test]
fn backends_are_found_by_their_state() {
    let Some((_ebpf, mut tables)) = tables() else {
        return;
    };
    let write = |id: u32, state: u8| Step::WriteBackend {
        id: BackendId(id),
        value: BackendValue {
            state,
            ..BackendValue::default()
        },
    };
    let last = BACKEND_COUNT - 1;
    let steps = [
        write(3, BACKEND_IN_USE),
        write(4, BACKEND_IN_USE),
        write(last, BACKEND_ON_TRIAL),
        Step::RetireBackend { id: BackendId(4) },
    ];
    tables.perform(&steps).unwrap();
    assert_eq!(tables.to_adopt().unwrap().in_use, [3, last].map(BackendId));
}

/// `cargo test --workspace --lib measure_switches -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn measure_switches() {
    let Some((_ebpf, mut tables)) = tables() else {
        return;
    };
    for round in 0..10 {
        let steps = switches(30_000, round);
        let begin = Instant::now();
        for step in &steps {
            tables.perform(std::slice::from_ref(step)).unwrap();
        }
        let one_by_one = begin.elapsed();
        let begin = Instant::now();
        tables.perform(&steps).unwrap();
        eprintln!(
            "30,000 frontends: one by one {one_by_one:?}, by few calls {:?}",
            begin.elapsed()
        );
    }
}
