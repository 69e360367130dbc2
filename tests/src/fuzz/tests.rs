//! Every target over its corpus and seeded mutations of it: a short run, the same on every machine.
//! `GANTRY_FUZZ_ROUNDS` makes it longer, `GANTRY_FUZZ_SEED` another one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use super::*;

/// Mutations per target in a short run.
const ROUNDS: u64 = 3_000;
/// A store file is opened with each: a round costs more.
const STORE_ROUNDS: u64 = 150;

/// splitmix64.
struct Choices(u64);

impl Choices {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

fn corpus(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(name);
    let mut paths: Vec<_> = std::fs::read_dir(&dir)
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    let read = |path: PathBuf| {
        let content = std::fs::read(&path).unwrap();
        (path, content)
    };
    paths.into_iter().map(read).collect()
}

/// Bytes and words that mean something to what is read here.
const WORDS: [&[u8]; 24] = [
    b"\0",
    b"\xff\xff\xff\xff",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b"null",
    b"-1",
    b"0",
    b": ",
    b"\n---\n",
    b"9223372036854775807",
    b"1e400",
    b"$patch",
    b"metadata",
    b"&a ",
    b"*a",
    b"!",
    b" in (",
    b",",
    b"Ki",
    b"/",
    b"~1",
];

fn mutate(choices: &mut Choices, all: &[(PathBuf, Vec<u8>)]) -> Vec<u8> {
    let mut data = all[choices.below(all.len())].1.clone();
    for _ in 0..=choices.below(4) {
        let at = choices.below(data.len() + 1);
        let end = (at + choices.below(24)).min(data.len());
        match choices.below(7) {
            0 if at < data.len() => data[at] ^= 1 << choices.below(8),
            1 if at < data.len() => data[at] = choices.next() as u8,
            2 => drop(data.drain(at..end)),
            3 => {
                let part = data[at..end].to_vec();
                let to = choices.below(data.len() + 1);
                data.splice(to..to, part);
            }
            4 => {
                let other = &all[choices.below(all.len())].1;
                let from = choices.below(other.len() + 1);
                let to = (from + choices.below(64)).min(other.len());
                data.splice(at..end, other[from..to].iter().copied());
            }
            _ => {
                let word = WORDS[choices.below(WORDS.len())];
                data.splice(at..at, word.iter().copied());
            }
        }
    }
    data
}

fn number(name: &str, otherwise: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

fn run(name: &str) {
    let (_, target) = TARGETS.iter().find(|(of, _)| *of == name).unwrap();
    let check = |what: &str, data: &[u8]| {
        if catch_unwind(AssertUnwindSafe(|| target(data))).is_err() {
            let path = std::env::temp_dir().join(format!("gantry-fuzz-{name}"));
            std::fs::write(&path, data).unwrap();
            let shown = String::from_utf8_lossy(&data[..data.len().min(2_000)]);
            panic!(
                "{name}: {what} of {} bytes panics: {shown:?}\nput {} into tests/fuzz/corpus/{name}",
                data.len(),
                path.display()
            );
        }
    };
    let all = corpus(name);
    assert!(!all.is_empty(), "{name} has no corpus");
    for (path, data) in &all {
        check(&path.display().to_string(), data);
    }
    let rounds = if name == "store_files" {
        STORE_ROUNDS
    } else {
        ROUNDS
    };
    let mut choices = Choices(number("GANTRY_FUZZ_SEED", 1));
    for round in 0..number("GANTRY_FUZZ_ROUNDS", rounds) {
        check(&format!("round {round}"), &mutate(&mut choices, &all));
    }
}

#[test]
fn manifests_never_panic() {
    run("manifests");
}

#[test]
fn patches_never_panic() {
    run("patches");
}

#[test]
fn selectors_never_panic() {
    run("selectors");
}

#[test]
fn quantities_never_panic() {
    run("quantities");
}

#[test]
fn store_files_never_panic() {
    run("store_files");
}

#[test]
fn feed_messages_never_panic() {
    run("feed_messages");
}

/// The loop can find something.
#[test]
fn a_target_that_panics_is_found() {
    let all = corpus("quantities");
    let mut choices = Choices(1);
    let found = (0..2_000).any(|_| mutate(&mut choices, &all).contains(&b'{'));
    assert!(found);
}
