use std::sync::atomic::{AtomicUsize, Ordering};

use gantry_api::k8s_openapi::api::core::v1::{Container, TCPSocketAction};
use gantry_api::k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use proptest::prelude::*;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;

use super::*;
use crate::ids::{ContainerRun, PodUid};
use crate::paths::Paths;
use crate::runtime::shim::ShimRuntime;

fn probe(success: i32, failure: i32) -> Probe {
    Probe {
        success_threshold: Some(success),
        failure_threshold: Some(failure),
        ..Probe::default()
    }
}

#[test]
fn failures_count_only_in_a_row() {
    let mut threshold = Threshold::new(&probe(1, 3), Some(true), 0);
    let verdicts = [false, false, true, false, false, false, false];
    let changes: Vec<_> = verdicts.iter().map(|v| threshold.take(*v)).collect();
    assert_eq!(changes, [None, None, None, None, None, Some(false), None]);
}

#[test]
fn a_state_known_before_is_not_reported_again() {
    let mut threshold = Threshold::new(&probe(1, 1), Some(true), 0);
    assert_eq!(threshold.take(true), None);
    let mut fresh = Threshold::new(&probe(1, 1), Some(false), 0);
    assert_eq!(fresh.take(true), Some(true));
}

/// A listener that counts who is connected at the same time.
async fn crowd() -> (u16, Arc<AtomicUsize>, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counters = (now.clone(), most.clone());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (now, most) = counters.clone();
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::spawn(async move {
                let _ = stream.read(&mut [0]).await;
                now.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
    (port, now, most)
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// Two thousand containers with a readiness probe each, on one thread of one runtime: all become
/// ready, never more than the limit connect at once, and no thread is added.
#[tokio::test]
async fn thousands_probe_in_one_runtime_within_the_limit() {
    const COUNT: usize = 2_000;
    let (port, _, most) = crowd().await;
    let limits = Arc::new(Limits::default());
    let runtime = Arc::new(ShimRuntime::new(Paths::standard("/nowhere".into())));
    let (inputs, mut inbox) = mpsc::channel(64);
    let before = threads();
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..COUNT {
        let config = Container {
            readiness_probe: Some(Probe {
                tcp_socket: Some(TCPSocketAction {
                    port: IntOrString::Int(port.into()),
                    host: None,
                }),
                timeout_seconds: Some(30),
                period_seconds: Some(3600),
                ..probe(1, 3)
            }),
            ..Container::default()
        };
        let prober = Prober {
            target: Target {
                run: ContainerRun {
                    pod: PodUid::new("u1").unwrap(),
                    name: format!("c{number}"),
                    attempt: 0,
                },
                config,
                address: [127, 0, 0, 1].into(),
                runtime: runtime.clone(),
            },
            inputs: inputs.clone(),
            limits: limits.clone(),
            known: Probed::default(),
            began: Instant::now(),
            adopted: false,
        };
        tasks.spawn(prober.watch());
    }
    let mut ready = std::collections::BTreeSet::new();
    while ready.len() < COUNT {
        match *inbox.recv().await.unwrap() {
            Message::Input(Input::Probe(run, ProbeKind::Readiness, true)) => {
                ready.insert(run.name);
            }
            Message::Unhealthy(_, words) => panic!("{words}"),
            _ => {}
        }
    }
    assert!(
        most.load(Ordering::SeqCst) <= 2 * NETWORK_COUNT_MAX,
        "{most:?}"
    );
    assert!(
        threads() <= before + 8,
        "threads: {before} -> {}",
        threads()
    );
}

proptest! {
    #[test]
    fn reports_alternate(
        success in 1i32..4,
        failure in 1i32..4,
        verdicts in prop::collection::vec(any::<bool>(), 0..60),
    ) {
        let mut threshold = Threshold::new(&probe(success, failure), None, 0);
        let reports: Vec<bool> = verdicts.iter().filter_map(|v| threshold.take(*v)).collect();
        prop_assert!(reports.windows(2).all(|w| w[0] != w[1]));
    }

    /// An agent that dies at any moment and comes back reports what one that lived would have.
    #[test]
    fn a_restart_changes_no_report(
        success in 1i32..4,
        failure in 1i32..4,
        known in any::<bool>(),
        verdicts in prop::collection::vec((any::<bool>(), any::<bool>()), 0..60),
    ) {
        let probe = probe(success, failure);
        let mut lived = Threshold::new(&probe, Some(known), 0);
        let mut restarted = lived;
        for (verdict, restart) in verdicts {
            if restart {
                restarted = Threshold::new(&probe, restarted.reported, restarted.against());
            }
            prop_assert_eq!(lived.take(verdict), restarted.take(verdict));
        }
    }
}
