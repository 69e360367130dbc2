//! kill -9 at random moments: what was acknowledged is there, revisions only grow.
//!
//! The writer is this test binary started again with only [`crash_writer`] selected; it prints each
//! write after its commit has returned.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::*;

const DIRECTORY: &str = "GANTRY_TEST_CRASH_DIRECTORY";
const ROUND_COUNT: usize = 8;

/// Not a test by itself: the process that is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crash_writer() {
    let Some(dir) = std::env::var_os(DIRECTORY) else {
        return;
    };
    let store = open(Path::new(&dir));
    let writers = (0..8).map(|writer| {
        let store = store.clone();
        tokio::spawn(async move {
            for n in 0_u64.. {
                let value = format!("{writer}-{n}");
                let name = format!("/w{writer}/{}", n % 50);
                let revision = store
                    .commit(Txn::new().put(name.as_str(), value.clone()))
                    .await
                    .unwrap();
                // One write call per line: a kill cuts lines off, but mixes none.
                let line = format!("acked {revision} {name} {value}\n");
                std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
}

#[test]
fn kill_9_loses_nothing_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let mut acked: BTreeMap<String, (Revision, String)> = BTreeMap::new();
    let mut highest = 0;
    let mut total = 0;
    for round in 0..ROUND_COUNT {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "store::tests::crash::crash_writer",
                "--exact",
                "--nocapture",
            ])
            .env(DIRECTORY, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = child.stdout.take().unwrap();
        let reader = std::thread::spawn(move || {
            let lines = BufReader::new(output).lines().map_while(Result::ok);
            lines.collect::<Vec<_>>()
        });
        std::thread::sleep(Duration::from_millis(rand::random_range(150..600)));
        child.kill().unwrap();
        child.wait().unwrap();
        let lines = reader.join().unwrap();
        let mut first = Revision::MAX;
        for line in lines.iter().filter_map(|line| line.split("acked ").nth(1)) {
            let fields: Vec<&str> = line.split(' ').collect();
            let [revision, key, value] = fields[..] else {
                continue;
            };
            let revision: Revision = revision.parse().unwrap();
            first = first.min(revision);
            total += 1;
            let latest = acked.entry(key.to_owned()).or_default();
            if revision > latest.0 {
                *latest = (revision, value.to_owned());
            }
        }
        assert!(
            first > highest,
            "round {round}: revision {first} was given before"
        );

        let store = open(dir.path());
        highest = store.revision();
        for (key, (revision, value)) in &acked {
            let entry = store.get(key).unwrap_or_else(|| panic!("{key} is lost"));
            // A later write may have become durable without its answer.
            assert!(entry.mod_revision >= *revision, "{key} went back");
            if entry.mod_revision == *revision {
                assert_eq!(entry.value, value.as_bytes());
            }
            assert!(*revision <= highest);
        }
        let (_, entries) = store.list("/");
        assert!(entries.iter().all(|e| e.mod_revision <= highest));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(store.close());
    }
    assert!(total > ROUND_COUNT, "the writer wrote {total} times in all");
}
