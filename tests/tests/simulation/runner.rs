//! Runs seeds, each in a process of its own, as many at once as there are processors, and tells of them
//! in libtest's words.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use gantry_api::rules::{self, Rule};
use gantry_control::pki::Authority;
use gantry_control::server::Tokens;

use super::plan::Plan;
use super::{host, missed, world};

const NAME: &str = "simulation";
/// How many seeds are run when nobody says otherwise: a third of a second of processor time each.
const SEED_COUNT: u64 = 1_000;
/// How many of them are run once more.
const TWICE_COUNT: u64 = 8;
/// Of what a violation says: all of them must fit into a pipe.
const LINE_CHARS_MAX: usize = 2_500;
/// Processor time after which a seed is taken for one that does not end.
const CPU_SECONDS_MAX: u64 = 60;

static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// One run.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Job {
    seed: u64,
    /// Switched off.
    rule: Option<Rule>,
}

/// How a run has ended.
struct Outcome {
    violations: Vec<String>,
    fingerprint: String,
}

pub fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        println!("{NAME}: test");
        return ExitCode::SUCCESS;
    }
    // libtest's filter: all seeds are one test.
    let mut filters = arguments
        .iter()
        .filter(|argument| !argument.starts_with("--"));
    // `cargo xtask test` runs it beside the other programs of tests, by a cargo of its own.
    let is_elsewhere = std::env::var_os("GANTRY_SIM_BESIDE").is_some();
    let is_other = |filter: &String| !NAME.contains(filter.as_str());
    if is_elsewhere || filters.next().is_some_and(is_other) {
        println!("test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out");
        return ExitCode::SUCCESS;
    }
    // The agent keeps Secrets in memory only.
    let memory = Path::new("/dev/shm");
    let directory = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    let directory = directory.expect("a temporary directory");
    let key = Authority::open(directory.path()).and_then(|authority| authority.token_key());
    let key = key.expect("a key for tokens");
    let tokens = Tokens::new(&key, "https://kubernetes.default.svc.cluster.local");
    let shown = std::env::var("GANTRY_SIM_SEED").ok();
    if let Some(text) = shown {
        let seed: u64 = text.parse().expect("GANTRY_SIM_SEED is a number");
        let rule = rule_off();
        let filter = std::env::var("GANTRY_SIM_LOG").unwrap_or_else(|_| "warn".to_owned());
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .without_time()
            .with_writer(std::io::stdout)
            .init();
        let outcome = one(&Job { seed, rule }, directory.path(), &tokens, true);
        for violation in &outcome.violations {
            println!("seed {seed}: {violation}");
        }
        println!("seed {seed}: fingerprint {}", outcome.fingerprint);
        return match outcome.violations.is_empty() {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        };
    }
    if let Ok(text) = std::env::var("GANTRY_SIM_SEEDS") {
        let range = text.split_once('-');
        let range = range.and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        let (first, last) = range.expect("GANTRY_SIM_SEEDS is two numbers, as 1-1000");
        let seeds = (first..=last).map(|seed| Job {
            seed,
            rule: rule_off(),
        });
        return report(&seeds.collect::<Vec<_>>(), directory.path(), &tokens);
    }
    let mut jobs: Vec<Job> = (1..=SEED_COUNT)
        .map(|seed| Job { seed, rule: None })
        .collect();
    // The same once more: a seed is always the same run.
    jobs.extend((1..=TWICE_COUNT).map(|seed| Job { seed, rule: None }));
    let all_kept = report(&jobs, directory.path(), &tokens);
    match all_missed(directory.path(), &tokens) {
        true => all_kept,
        false => ExitCode::FAILURE,
    }
}

/// The rule that `GANTRY_SIM_RULE_OFF` names.
fn rule_off() -> Option<Rule> {
    let name = std::env::var("GANTRY_SIM_RULE_OFF").ok()?;
    let mut all = rules::ALL.iter().copied();
    let found = all.find(|rule| format!("{rule:?}") == name);
    Some(found.unwrap_or_else(|| panic!("GANTRY_SIM_RULE_OFF is one of {:?}", rules::ALL)))
}

/// Whether each rule is missed by some seed when it is switched off.
fn all_missed(directory: &Path, tokens: &Tokens) -> bool {
    println!("running {} tests", missed::RULES.len());
    let began = std::time::Instant::now();
    let named = missed::RULES.map(|(rule, _, _)| rule);
    let second = missed::SECOND.map(|(rule, _)| rule);
    let unnamed = rules::ALL.iter();
    let mut unnamed = unnamed.filter(|rule| !named.contains(rule) && !second.contains(rule));
    let is_whole = unnamed.next().is_none();
    let job = |seed, rule| Job {
        seed,
        rule: Some(rule),
    };
    // Those that are named, all rules at once.
    let jobs = missed::RULES.map(|(rule, _, seed)| job(seed, rule));
    let mut finders = Vec::new();
    all(&jobs, directory, tokens, |job, outcome| {
        finders.extend(finds(job, &outcome));
    });
    let mut failed = usize::from(!is_whole);
    for (rule, words, _) in missed::RULES {
        let mut found = finders.iter().find(|(of, _)| *of == rule).copied();
        let jobs: Vec<Job> = (1..=missed::SEED_COUNT)
            .map(|seed| job(seed, rule))
            .collect();
        // The others, a few at a time.
        let mut chunks = jobs.chunks(4);
        while let (None, Some(jobs)) = (found, chunks.next()) {
            all(jobs, directory, tokens, |job, outcome| {
                found = found.or(finds(job, &outcome));
            });
        }
        match found {
            Some((_, seed)) => println!("test simulation::without {rule:?}, seed {seed} ... ok"),
            None => {
                failed += 1;
                println!("test simulation::without {rule:?} ... FAILED");
                let count = missed::SEED_COUNT;
                println!("    none of {count} seeds finds {words:?} without the rule {rule:?}");
            }
        }
    }
    if !is_whole {
        println!("    a rule is in neither table of missed.rs");
    }
    tell_result((missed::RULES.len()).saturating_sub(failed), failed, began)
}

/// The rule and the seed, if the run has found it missing.
fn finds(job: &Job, outcome: &Outcome) -> Option<(Rule, u64)> {
    let mut rules = missed::RULES.iter();
    let (rule, words, _) = rules.find(|(rule, _, _)| Some(*rule) == job.rule)?;
    let found = outcome.violations.iter().any(|text| text.contains(words));
    found.then_some((*rule, job.seed))
}

/// Whether all passed.
fn tell_result(passed: usize, failed: usize, began: std::time::Instant) -> bool {
    let result = if failed == 0 { "ok" } else { "FAILED" };
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "test result: {result}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out; finished in {seconds:.2}s"
    );
    failed == 0
}

/// Runs the jobs and tells of those that were not as they had to be.
fn report(jobs: &[Job], directory: &Path, tokens: &Tokens) -> ExitCode {
    println!("running {} tests", jobs.len());
    let (mut failed, mut fingerprints) = (0, BTreeMap::<String, String>::new());
    let began = std::time::Instant::now();
    all(jobs, directory, tokens, |job, outcome| {
        let mut complaints = outcome.violations;
        if let Some(first) = fingerprints.insert(format!("{job:?}"), outcome.fingerprint.clone())
            && first != outcome.fingerprint
        {
            complaints.push(format!(
                "the second run is another one: {first}, {}",
                outcome.fingerprint
            ));
        }
        if !complaints.is_empty() {
            failed += 1;
            println!(
                "test simulation::seed {} {:?} ... FAILED",
                job.seed, job.rule
            );
            for complaint in &complaints {
                println!("    {complaint}");
            }
            let rule = job
                .rule
                .map(|rule| format!("GANTRY_SIM_RULE_OFF={rule:?} "));
            println!(
                "    again: {}GANTRY_SIM_SEED={} cargo test --package gantry-tests --test simulation",
                rule.unwrap_or_default(),
                job.seed
            );
        }
    });
    match tell_result(jobs.len() - failed, failed, began) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// In the forked process: the run, on a thread that has known no other.
fn one(job: &Job, directory: &Path, tokens: &Tokens, is_shown: bool) -> Outcome {
    let directory = directory.join(format!("{}-{:?}", job.seed, job.rule));
    std::fs::create_dir_all(&directory).expect("a directory of the seed's own");
    host::begin(job.seed);
    job.rule.into_iter().for_each(rules::switch_off);
    gantry_control::store::write_in_a_task();
    gantry_agent::blocking::in_turn();
    // Tasks that panic are caught by the runtime, or by the controllers: none may.
    std::panic::set_hook(Box::new(|panic| {
        let mut all = PANICS.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(format!("panic: {panic}"));
    }));
    let (seed, tokens, dir) = (job.seed, tokens.clone(), directory.clone());
    let run = move || world::run(seed, Plan::draw(seed), &dir, tokens, is_shown);
    let thread = std::thread::Builder::new().stack_size(64 << 20).spawn(run);
    let ended = thread.expect("a thread").join();
    let _ = std::fs::remove_dir_all(&directory);
    let (mut violations, fingerprint) = ended.unwrap_or_default();
    violations.append(&mut PANICS.lock().unwrap_or_else(PoisonError::into_inner));
    Outcome {
        violations,
        fingerprint,
    }
}

/// Runs all jobs; `tell` hears of each as it ends.
fn all(jobs: &[Job], directory: &Path, tokens: &Tokens, mut tell: impl FnMut(&Job, Outcome)) {
    let slots = std::thread::available_parallelism().map_or(1, |count| count.get());
    let mut running = BTreeMap::new();
    let mut waiting = jobs.iter();
    loop {
        while running.len() < slots {
            let Some(job) = waiting.next() else { break };
            let (reader, writer) = std::io::pipe().expect("a pipe");
            let pid = host::fork(|| {
                host::limit_cpu(CPU_SECONDS_MAX);
                let outcome = one(job, directory, tokens, false);
                let mut text = outcome.fingerprint;
                for violation in &outcome.violations {
                    text.push('\n');
                    let line = violation.replace('\n', " ");
                    text.extend(line.chars().take(LINE_CHARS_MAX));
                }
                let mut writer = &writer;
                let _ = std::io::Write::write_all(&mut writer, text.as_bytes());
                0
            });
            running.insert(pid.expect("a process"), (job, reader));
        }
        if running.is_empty() {
            return;
        }
        let (pid, status) = host::wait().expect("a child");
        let Some((job, mut reader)) = running.remove(&pid) else {
            continue;
        };
        let mut text = String::new();
        let _ = reader.read_to_string(&mut text);
        let mut lines = text.lines().map(str::to_owned);
        let fingerprint = lines.next().unwrap_or_default();
        let mut violations: Vec<String> = lines.collect();
        if status != 0 {
            violations.push(format!("its process has ended with status {status:#x}"));
        }
        tell(
            job,
            Outcome {
                violations,
                fingerprint,
            },
        );
    }
}
