//! Figures, ratios, targets and the judgement of balance.

use super::*;
use proptest::prelude::*;

const ONE: Size = Size {
    services: 1,
    endpoints: 3,
};
const MANY: Size = Size {
    services: 10_000,
    endpoints: 3,
};

fn measured() -> Figures {
    let mut figures = Figures {
        sizes: vec![ONE, MANY],
        ..Figures::default()
    };
    for (size, slower) in [(ONE, 1.01), (MANY, 1.05)] {
        // A neighbour spoils the second round for both alike.
        for spoiled in [1.0, 9.0, 1.0] {
            figures.add(Measure::ConnectP50, Case::Direct, size, 30.0 * spoiled);
            figures.add(
                Measure::ConnectP50,
                Case::GantrySocket,
                size,
                30.0 * spoiled * slower,
            );
        }
        figures.add(Measure::ChangeP99, Case::Gantry, size, 2.0);
        figures.add(Measure::ChangeP99, Case::Nftables, size, 300.0);
    }
    figures
}

#[test]
fn ratios_are_of_the_same_round_and_medians_over_rounds() {
    let figures = measured();
    let ratio = figures.ratio(Measure::ConnectP50, Case::GantrySocket, ONE);
    assert!((ratio.unwrap() - 1.01).abs() < 1e-9);
    assert_eq!(
        figures.value(Measure::ConnectP50, Case::Direct, ONE),
        Some(30.0)
    );
    let times = figures.ratio(Measure::ChangeP99, Case::Nftables, ONE);
    assert_eq!(times, Some(150.0), "of Gantry's");
    assert_eq!(figures.ratio(Measure::Crr, Case::GantrySocket, ONE), None);
    assert_eq!(
        figures.cases(Measure::ChangeP99),
        [Case::Gantry, Case::Nftables]
    );
}

#[test]
fn promises_are_judged_by_size_and_by_growth() {
    let mut figures = measured();
    figures.judge();
    let judged: Vec<(String, bool)> = figures
        .targets
        .iter()
        .map(|target| (target.what.clone(), target.is_met()))
        .collect();
    let wanted = [
        ("Gantry, socket / direct, connect(), p50, 1", true),
        ("endpoint change, p99, ms, 1", true),
        ("Gantry, socket / direct, connect(), p50, 10000", false),
        ("endpoint change, p99, ms, 10000", true),
        ("connect() with 10000 services / with 1", false),
    ];
    assert_eq!(judged, wanted.map(|(what, met)| (what.to_owned(), met)));
}

#[test]
fn the_document_has_every_round_and_says_how() {
    let document = measured().to_json();
    let connect = &document["measures"]["connect_p50"];
    assert_eq!(connect["unit"], "us");
    let socket = &connect["cases"]["gantry_socket"]["10000"];
    assert_eq!(socket["rounds"], json!([31.5, 283.5, 31.5]));
    assert_eq!(
        (&socket["value"], &socket["ratio"]),
        (&json!(31.5), &json!(1.05))
    );
    assert!(connect["how"].as_str().unwrap().contains("one processor"));
    assert!(document["measures"].get("crr").is_none(), "not measured");
}

#[test]
fn a_layout_that_leaves_an_endpoint_out_or_prefers_one_is_found() {
    let of = |counts: &[f64]| Balance::of(ONE, Case::Nftables, counts);
    assert!(of(&[100.0, 110.0, 90.0]).is_even());
    assert!(!of(&[150.0, 150.0]).is_even());
    assert!(!of(&[200.0, 50.0, 50.0]).is_even());
    // With two degrees of freedom, exactly, once in 3.5 million times is at 2 ln 3.5e6 = 30.1; the
    // approximation is on the generous side.
    assert!((30.0..34.0).contains(&of(&[1.0; 3]).chi_square_max));
}

#[test]
fn labels_fit_their_column_and_keys_differ() {
    assert!(Case::ALL.iter().all(|case| case.label().len() <= 24));
    let keys: std::collections::BTreeSet<_> = Case::ALL.iter().map(|case| case.key()).collect();
    assert_eq!(keys.len(), Case::ALL.len());
    let keys: std::collections::BTreeSet<_> = Measure::ALL.iter().map(|m| m.key()).collect();
    assert_eq!(keys.len(), Measure::ALL.len());
}

proptest! {
    #[test]
    fn an_even_choice_is_judged_even(seed: u64, endpoints in 2..50_usize) {
        let mut state = seed | 1;
        let mut counts = vec![0.0; endpoints];
        for _ in 0..endpoints * 40 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            counts[(state >> 33) as usize % endpoints] += 1.0;
        }
        let size = Size { services: 1, endpoints };
        prop_assert!(Balance::of(size, Case::Nftables, &counts).is_even());
    }
}
