//! The part of an ordered drain that looks at the view and asks the control plane.
//!
//! ```text
//!  Action::Drain ──► what is the pod to Services? ──► nothing: no wait
//!                        │ a backend
//!                        ▼
//!                    no Service of this node's view sends to it any more, at revision R
//!                        ▼
//!                    floor(R): no Service of any node's view does ──► Drained::Acked
//! ```
//! [`part_of`] decides from one view, pure; [`ask`] only waits for the next one. What the answers
//! mean for the pod, and the cap on all this, are `state/drain.rs`'s. A deletion is seen at the very
//! revision that drains the pod; where the node itself ends a pod (shutdown, a container that is
//! restarted) the pod's status has to go up and come back first, and then the same holds.

use std::sync::Arc;
use std::time::Duration;

use gantry_api::proto;
use gantry_api::proto::backend::State;
use tokio::sync::watch;
use tokio::time::timeout;

use super::state::{DRAIN_CAP, Drained, Input};
use super::worker::{Inputs, Message};
use crate::feed::Reporter;
use crate::ids::PodUid;
use crate::view::{ServiceName, View};

/// What a pod is to the Services of its namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Some Service sends new connections to it.
    pub is_serving: bool,
    /// A headless Service has published its address: who has asked for the name may still use it.
    pub is_named: bool,
}

/// Nothing: it is no backend of any Service, or only of such as publish pods in every state.
pub fn part_of(view: &View, namespace: &str, pod: &PodUid) -> Option<Part> {
    let first = ServiceName {
        namespace: namespace.to_owned(),
        name: String::new(),
    };
    let mut part = None;
    for (name, backends) in view.backends.range(first..) {
        if name.namespace != namespace {
            break;
        }
        let Some(backend) = backends.get(pod.as_str()) else {
            continue;
        };
        let Some(service) = view.services.get(name) else {
            continue;
        };
        if service.publish_not_ready && backend.state() != State::Draining {
            continue; // its traffic goes on, whatever the pod's state: so it was asked for
        }
        let part = part.get_or_insert(Part {
            is_serving: false,
            is_named: false,
        });
        part.is_serving |= backend.state() == State::Serving;
        part.is_named |= service.cluster_ips.is_empty() && !service.publish_not_ready;
    }
    part
}

/// What an answer of the control plane means.
fn meaning(floor: &proto::Floor, part: Part) -> Drained {
    match floor.missing_count {
        0 => Drained::Acked {
            nodes: floor.nodes,
            is_named: part.is_named,
        },
        count => Drained::Missing {
            count,
            nodes: floor.nodes,
            names: floor.missing.clone(),
        },
    }
}

/// Finds out when nobody sends to the pod any more; every answer goes to `inputs`, with `number`.
pub(super) async fn ask(
    view: watch::Receiver<Arc<View>>,
    reporter: Reporter,
    namespace: String,
    pod: PodUid,
    number: u32,
    inputs: Inputs,
) {
    let teller = Teller { number, inputs };
    let asked = follow(view, &reporter, &namespace, &pod, &teller);
    // Whoever asked has gone on by then.
    if timeout(DRAIN_CAP * 2, asked).await.is_err() {
        tracing::debug!(%pod, "the drain has not ended by itself");
    }
}

/// The way back to the worker.
struct Teller {
    number: u32,
    inputs: Inputs,
}

impl Teller {
    async fn tell(&self, drained: Drained) {
        let input = Input::Drained(self.number, drained);
        let _ = self.inputs.send(Box::new(Message::Input(input))).await;
    }
}

async fn follow(
    mut view: watch::Receiver<Arc<View>>,
    reporter: &Reporter,
    namespace: &str,
    pod: &PodUid,
    teller: &Teller,
) {
    let (part, rev) = loop {
        let newest = view.borrow_and_update().clone();
        match part_of(&newest, namespace, pod) {
            None => return teller.tell(Drained::NoBackend).await,
            Some(part) if !part.is_serving => break (part, newest.rev),
            Some(_) if reporter.is_cut_off() => return teller.tell(Drained::CutOff).await,
            Some(_) => {}
        }
        let looked = timeout(Duration::from_millis(100), view.changed()).await;
        if matches!(looked, Ok(Err(_))) {
            return; // the feed has ended, and this agent with it
        }
    };
    let mut answers = reporter.floor(rev);
    loop {
        let floor = answers.borrow_and_update().clone();
        if let Some(floor) = floor {
            let drained = meaning(&floor, part);
            let is_last = matches!(drained, Drained::Acked { .. });
            teller.tell(drained).await;
            if is_last {
                return;
            }
        } else if reporter.is_cut_off() {
            return teller.tell(Drained::CutOff).await;
        }
        let looked = timeout(Duration::from_millis(100), answers.changed()).await;
        if matches!(looked, Ok(Err(_))) && answers.borrow().is_none() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use imbl::OrdMap;
    use proptest::prelude::*;

    use super::*;

    fn uid() -> PodUid {
        PodUid::new("u1").unwrap()
    }

    /// A Service "web" in `namespace` with our pod in this state.
    fn view(namespace: &str, service: proto::Service, state: Option<State>) -> View {
        let name = ServiceName {
            namespace: namespace.into(),
            name: "web".into(),
        };
        let mut backends = OrdMap::new();
        if let Some(state) = state {
            let mut backend = proto::Backend::default();
            backend.set_state(state);
            backends.insert("u1".to_owned(), Arc::new(backend));
        }
        View {
            rev: 1,
            services: Arc::new([(name.clone(), Arc::new(service))].into_iter().collect()),
            backends: Arc::new([(name, Arc::new(backends))].into_iter().collect()),
            ..View::default()
        }
    }

    fn balanced() -> proto::Service {
        proto::Service {
            cluster_ips: vec![vec![10, 96, 0, 1].into()],
            ..Default::default()
        }
    }

    fn headless() -> proto::Service {
        proto::Service::default()
    }

    #[test]
    fn what_a_pod_is_to_its_services() {
        let part = |is_serving, is_named| {
            Some(Part {
                is_serving,
                is_named,
            })
        };
        let publishes = |service| proto::Service {
            publish_not_ready: true,
            ..service
        };
        let cases = [
            ("no backend", balanced(), None, None),
            (
                "serving",
                balanced(),
                Some(State::Serving),
                part(true, false),
            ),
            (
                "draining",
                balanced(),
                Some(State::Draining),
                part(false, false),
            ),
            (
                "not ready",
                balanced(),
                Some(State::NotReady),
                part(false, false),
            ),
            (
                "headless",
                headless(),
                Some(State::Draining),
                part(false, true),
            ),
            (
                "always published",
                publishes(balanced()),
                Some(State::Serving),
                None,
            ),
            (
                "published and going",
                publishes(balanced()),
                Some(State::Draining),
                part(false, false),
            ),
            (
                "its name stays",
                publishes(headless()),
                Some(State::Draining),
                part(false, false),
            ),
        ];
        for (what, service, state, wanted) in cases {
            let view = view("default", service, state);
            assert_eq!(part_of(&view, "default", &uid()), wanted, "{what}");
        }
    }

    proptest! {
        /// A pod is a backend in its own namespace only, and serving by any Service is serving.
        #[test]
        fn the_parts_of_all_services_add_up(
            services in prop::collection::btree_map(
                ("[ab]", "[a-e]"),
                (0usize..4, any::<bool>()),
                0..8,
            ),
        ) {
            let states = [None, Some(State::Serving), Some(State::Draining), Some(State::NotReady)];
            let mut all = View { rev: 1, ..View::default() };
            for ((namespace, name), (state, is_headless)) in &services {
                let service = if *is_headless { headless() } else { balanced() };
                let one = view(namespace, service, states[*state]);
                let name = ServiceName { namespace: namespace.clone(), name: name.clone() };
                let of = one.services.values().next().unwrap().clone();
                Arc::make_mut(&mut all.services).insert(name.clone(), of);
                let of = one.backends.values().next().unwrap().clone();
                Arc::make_mut(&mut all.backends).insert(name, of);
            }
            let ours: Vec<_> = services.iter()
                .filter(|((namespace, _), (state, _))| namespace == "a" && *state != 0)
                .map(|(_, (state, is_headless))| (*state, *is_headless))
                .collect();
            let wanted = (!ours.is_empty()).then(|| Part {
                is_serving: ours.iter().any(|(state, _)| *state == 1),
                is_named: ours.iter().any(|(_, is_headless)| *is_headless),
            });
            prop_assert_eq!(part_of(&all, "a", &uid()), wanted);
        }
    }
}
