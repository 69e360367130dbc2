//! That the simulation can fail: for each rule a seed that finds it missing when it is switched off, and by
//! which words. A seed that no longer does is a test that cannot fail: look for another with
//! `GANTRY_SIM_RULE_OFF=Rule GANTRY_SIM_SEEDS=1-1000`.

use gantry_api::rules::Rule;

/// Rule, seed, what is found.
pub const RULES: [(Rule, u64, &str); 6] = [
    (Rule::BatchIsWhole, 2, "I5"),
    (Rule::AckAfterFlip, 2, "I1"),
    (Rule::JoinInFeed, 2, "I2"),
    (Rule::LogFirst, 4, "I4"),
    (Rule::Incarnation, 6, "I6"),
    (
        Rule::DurableFirst,
        5,
        "was answered, the store has come back",
    ),
];
