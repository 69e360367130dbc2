//! That the simulation can fail: for each rule the words by which it is found missing when it is switched
//! off. What a seed does changes with the programs, so none is written down here: seeds are tried in turn, up to
//! [`SEED_COUNT`], and the one that finds it is told. A rule that none finds missing is a test that cannot
//! fail.

use gantry_api::rules::Rule;

/// Seeds that are tried for each.
pub const SEED_COUNT: u64 = 60;

/// Rule, what is found.
pub const RULES: [(Rule, &str); 6] = [
    (Rule::BatchIsWhole, "I5"),
    (Rule::AckAfterFlip, "I1"),
    (Rule::JoinInFeed, "I2"),
    (Rule::LogFirst, "I4"),
    (Rule::Incarnation, "I6"),
    (Rule::DurableFirst, "was answered, the store has come back"),
];
