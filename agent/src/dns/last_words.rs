//! What the holder of the sockets may say while there is no agent: the file `names` beside them.
//!
//! Written when Services, backends or upstream servers have changed, by rename, with a pause that keeps
//! the cost at a fiftieth of a CPU: 0.1 s on a small cluster, at most 2 s. Who asks in the agent's
//! absence gets what was true at most that long before it ended; the maps of Services are as old by
//! then. The format is the reader's: [`gantry_shim::names`].

use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use gantry_api::proto;
use gantry_shim::names::{DOMAIN, FILE, UPSTREAM};
use imbl::OrdMap;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::forward::Forwarder;
use super::zone::Zone;
use crate::view::{Backends, ServiceName, Settings, View};

/// Between two writes, however short they are.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// However long they are.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// The pause after a write, as a multiple of its time.
const PAUSE_FACTOR: u32 = 50;

/// Keeps the file up to date until `shutdown`.
pub(super) async fn keep(
    directory: PathBuf,
    mut view: watch::Receiver<Arc<View>>,
    forwarder: Arc<Forwarder>,
    shutdown: CancellationToken,
) {
    let work = async {
        let mut written = None;
        loop {
            let newest = view.borrow_and_update().clone();
            if newest.rev == 0 {
                match view.changed().await {
                    Ok(()) => continue,
                    Err(_) => return,
                }
            }
            let seen = Seen::of(&newest);
            let (directory, servers) = (directory.clone(), forwarder.order());
            // Thousands of Services are half a megabyte of text: not between questions.
            // Only the work counts, not the wait for a thread: on a busy machine that would be 2 s each time.
            let wrote = tokio::task::spawn_blocking(move || {
                let begun = Instant::now();
                let hash = write_changed(&directory, &Zone::new(newest), &servers, written);
                (hash, begun.elapsed())
            });
            let took = match wrote.await {
                Ok((Ok(hash), took)) => {
                    written = Some(hash);
                    took
                }
                Ok((Err(error), took)) => {
                    tracing::warn!(%error, "names for the agent's absence");
                    took
                }
                Err(_) => PAUSE_MAX,
            };
            let pause = took * PAUSE_FACTOR;
            tokio::time::sleep(pause.clamp(PAUSE_MIN, PAUSE_MAX)).await;
            tokio::select! {
                // Cancel-safe: both only wait.
                changed = view.wait_for(|view| !seen.is(view)) => if changed.is_err() { return },
                () = forwarder.servers_changed() => {}
            }
        }
    };
    // Cancel-safe: the file is replaced whole or not at all.
    shutdown.run_until_cancelled(work).await;
}

/// The parts of a view that the file is made of. Weakly: an old view is nobody's.
struct Seen {
    services: Weak<OrdMap<ServiceName, Arc<proto::Service>>>,
    backends: Weak<OrdMap<ServiceName, Arc<Backends>>>,
    settings: Weak<Settings>,
}

impl Seen {
    fn of(view: &View) -> Self {
        Self {
            services: Arc::downgrade(&view.services),
            backends: Arc::downgrade(&view.backends),
            settings: Arc::downgrade(&view.settings),
        }
    }

    fn is(&self, view: &View) -> bool {
        self.services.ptr_eq(&Arc::downgrade(&view.services))
            && self.backends.ptr_eq(&Arc::downgrade(&view.backends))
            && self.settings.ptr_eq(&Arc::downgrade(&view.settings))
    }
}

/// The hash of what the file holds then.
fn write_changed(
    directory: &Path,
    zone: &Zone,
    servers: &[SocketAddr],
    before: Option<u64>,
) -> io::Result<u64> {
    let text = render(zone, servers);
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let hash = hasher.finish();
    if before != Some(hash) {
        let temporary = directory.join("names.tmp");
        std::fs::write(&temporary, &text)?;
        std::fs::rename(&temporary, directory.join(FILE))?;
    }
    Ok(hash)
}

fn render(zone: &Zone, servers: &[SocketAddr]) -> String {
    let domain = zone.domain();
    let mut text = format!("{DOMAIN}{}\n", domain.trim_end_matches('.'));
    for server in servers {
        let _ = writeln!(text, "{UPSTREAM}{server}");
    }
    zone.each_name(|name, words| {
        let _ = writeln!(text, "{name} {}", words.join(" "));
    });
    text
}

#[cfg(test)]
mod tests {
    use gantry_shim::names::{Answer, answer};
    use hickory_proto::op::{Message, Query};
    use hickory_proto::rr::{Name, RecordType};
    use proptest::prelude::*;

    use super::super::zone::{self, tests::view};
    use super::*;

    proptest! {
        /// Whatever is asked for: what is said without the agent is what the agent says, or that it
        /// is not known.
        #[test]
        fn nothing_else_is_said_without_the_agent(
            labels in proptest::collection::vec(
                prop::sample::select(vec![
                    "web", "db", "ext", "db-0", "Shop", "shop", "svc", "pod", "10-244-2-6", "10-244-2-7",
                    "_http", "_tcp", "no",
                ]),
                0..5,
            ),
            kind in prop::sample::select(vec![
                RecordType::A, RecordType::AAAA, RecordType::SRV, RecordType::TXT,
            ]),
            below in any::<bool>(),
        ) {
            let end = if below { "cluster.local." } else { "example.org." };
            let end: Name = end.parse().unwrap();
            let labels = Name::from_labels(labels.iter().map(|l| l.as_bytes())).unwrap();
            let name = labels.append_domain(&end).unwrap();
            let query = Query::query(name, kind);
            let mut message = Message::query();
            message.add_query(query.clone());
            let zone = Zone::new(view());
            let text = render(&zone, &[]);
            let said = answer(&text, &message.to_vec().unwrap());
            match zone.answer(&query) {
                zone::Answer::Forward => prop_assert_eq!(said, Answer::Relay),
                told => {
                    let Answer::Reply(bytes) = said else {
                        return Err(TestCaseError::fail("no reply"));
                    };
                    let reply = Message::from_vec(&bytes).unwrap();
                    let code = u16::from(reply.metadata.response_code);
                    let data = |records: &[hickory_proto::rr::Record]| {
                        let mut data: Vec<_> = records.iter().map(|r| r.data.to_string()).collect();
                        data.sort();
                        data
                    };
                    match told {
                        _ if code == 2 => {}
                        zone::Answer::Found { answers, .. } => {
                            // A namespace alone and the version are not in the file.
                            prop_assert!(code == 0 || answers.is_empty() || kind == RecordType::TXT);
                            prop_assert_eq!(data(&reply.answers), data(&answers));
                        }
                        zone::Answer::NoName => prop_assert_eq!(code, 3),
                        other => return Err(TestCaseError::fail(format!("{other:?}"))),
                    }
                }
            }
        }
    }

    #[test]
    fn the_file_is_written_once_for_the_same_content() {
        let directory = tempfile::tempdir().unwrap();
        let zone = Zone::new(view());
        let servers = ["192.0.2.53:53".parse().unwrap()];
        let hash = write_changed(directory.path(), &zone, &servers, None).unwrap();
        let path = directory.path().join(FILE);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(
            text.starts_with("domain cluster.local\nupstream 192.0.2.53:53\n"),
            "{text}"
        );
        assert!(text.contains("\nweb.shop 10.96.0.7 fd96::7 *\n"), "{text}");
        assert!(text.contains("\ndb-0.db.shop 10.244.1.5\n"), "{text}");
        assert!(text.contains("\next.shop =\n"), "{text}");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(
            write_changed(directory.path(), &zone, &servers, Some(hash)).unwrap(),
            hash
        );
        assert!(!path.exists());
    }
}
