//! That the simulation can fail: for each rule the words by which it is found missing when it is switched
//! off, and a seed that finds it. What a seed does changes with the programs: when the named one finds nothing
//! any more, others are tried in turn, up to [`SEED_COUNT`], and the one that does is told. A rule that none
//! finds missing is a test that cannot fail.

use gantry_api::rules::Rule;

/// Seeds that are tried for each.
pub const SEED_COUNT: u64 = 300;

/// Rule, what is found, the seed that is tried first.
pub const RULES: [(Rule, &str, u64); 16] = [
    (Rule::BatchIsWhole, "I5", 1),
    (Rule::JoinInFeed, "I2", 2),
    (Rule::Digest, "I2", 3),
    (Rule::LogFirst, "I4", 5),
    (Rule::AckAfterFlip, "I4", 2),
    (Rule::GraceAfterReboot, "I1", 80),
    (Rule::RebootVoidsAck, "I4", 3),
    (Rule::FloorOfAbsent, "I1", 10),
    (Rule::Incarnation, "I6", 5),
    (Rule::FinalStays, "I6", 13),
    (Rule::FinalOnDisk, "I3", 36),
    (Rule::Tombstones, "I3", 45),
    (Rule::Hold, "I3", 161),
    (Rule::Adopt, "I3", 21),
    (
        Rule::DurableFirst,
        "was answered, the store has come back",
        10,
    ),
    (Rule::BoundOnce, "I3", 13),
];

/// Rules that nothing can be missed by alone, and why.
pub const SECOND: [(Rule, &str); 4] = [
    (
        Rule::Lineage,
        "the revisions of a restored store begin a billion above every one that was given, so a cursor of \
         the old history is older than what the new one can tell the difference to",
    ),
    (
        Rule::FloorIsAnswer,
        "an owner asks within milliseconds of its own ack, which every floor waits for: what a remembered \
         floor would say then, no other node can have taken back by a reboot and a contact since",
    ),
    (
        Rule::StatusOrder,
        "sessions of a node are fenced: a new one waits for the writes of the one before and nothing more is \
         read from that, so no status comes late; either guard is enough",
    ),
    (
        Rule::NotBoundIsKept,
        "what runs or has ended is adopted before the session begins, so a status finds its pod bound; the \
         level rule, which sends it once more when the view shows it, is the third guard",
    ),
];
