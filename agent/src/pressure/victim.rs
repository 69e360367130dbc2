//! Which pod goes when the node is short of something, and why this one. Pure.
//!
//! Order, as the kubelet's rankMemoryPressure, rankDiskPressure and rankPIDPressure: first those
//! that use more than they requested (of memory and disk), then the lowest priority, then the
//! largest usage above the request, then the lower class. Static pods and those of a system-critical
//! priority are never chosen.
//!
//! Invariants, checked by `tests`: a pod within its request goes only when none exceeds; among
//! equals the one that frees most goes; the order of the input does not matter.

use std::cmp::Reverse;

use crate::cgroups::QosClass;
use crate::ids::PodUid;

use super::thresholds::{Resource, Shortage, Signal};

/// Priorities from here on are system-critical.
pub const CRITICAL_PRIORITY: i32 = 2_000_000_000;

/// A pod that runs here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// Which pod.
    pub uid: PodUid,
    /// `namespace/name`.
    pub title: String,
    /// Its class.
    pub class: QosClass,
    /// `spec.priority`
    pub priority: i32,
    /// Static or system-critical: never evicted.
    pub critical: bool,
    /// What it uses of the scarce resource.
    pub usage: u64,
    /// What it requested of it; 0 when nothing.
    pub request: u64,
}

impl Candidate {
    fn exceeds(&self) -> bool {
        self.usage > self.request
    }

    fn above(&self) -> i128 {
        i128::from(self.usage) - i128::from(self.request)
    }
}

/// The key by which the victim is the smallest.
fn rank(resource: Resource, pod: &Candidate) -> impl Ord + use<> {
    // BestEffort is the largest of the classes' order.
    let class = Reverse(pod.class);
    let exceeds = resource != Resource::Pids && pod.exceeds();
    let above = match resource {
        Resource::Pids => i128::from(pod.usage),
        _ => pod.above(),
    };
    (
        Reverse(exceeds),
        pod.priority,
        Reverse(above),
        class,
        pod.uid.clone(),
    )
}

/// The pod to evict; none when nobody may be.
pub fn choose(resource: Resource, pods: &[Candidate]) -> Option<&Candidate> {
    pods.iter()
        .filter(|pod| !pod.critical && pod.usage > 0)
        .min_by_key(|pod| rank(resource, pod))
}

/// The words of the eviction: what is short, what the pod used, and who would have been next.
pub fn explain(shortage: &Shortage, victim: &Candidate, pods: &[Candidate]) -> String {
    let resource = shortage.signal.resource();
    let show = |amount: u64| amount_text(resource, amount);
    // The kubelet's sentence first: people search for it.
    let mut words = format!(
        "The node was low on resource: {}. Threshold quantity: {} ({}), available: {}. ",
        resource.as_str(),
        signal_text(shortage.signal, shortage.threshold),
        shortage.signal.as_str(),
        signal_text(shortage.signal, shortage.available),
    );
    if let Some(percent) = shortage.stall_percent {
        words.push_str(&format!(
            "All tasks stood still for lack of memory {percent}% of the last 10 s. "
        ));
    }
    words.push_str(&format!(
        "This pod was using {}, its request is {}. Chosen of {} pods: ",
        show(victim.usage),
        show(victim.request),
        pods.len()
    ));
    words.push_str(&match resource {
        Resource::Pids => "lowest priority, then most processes".to_owned(),
        _ if victim.exceeds() => format!(
            "it uses more than it requested, has priority {} and is {} above its request",
            victim.priority,
            show(u64::try_from(victim.above()).unwrap_or(0)),
        ),
        _ => format!(
            "no pod exceeds its request; it has priority {}",
            victim.priority
        ),
    });
    let rest: Vec<Candidate> = pods
        .iter()
        .filter(|pod| pod.uid != victim.uid)
        .cloned()
        .collect();
    if let Some(next) = choose(resource, &rest) {
        words.push_str(&format!(
            "; next would be {} (priority {}, using {}, request {})",
            next.title,
            next.priority,
            show(next.usage),
            show(next.request)
        ));
    }
    words.push('.');
    words
}

fn signal_text(signal: Signal, amount: u64) -> String {
    match signal {
        Signal::NodefsInodes | Signal::Pids => amount.to_string(),
        _ => bytes_text(amount),
    }
}

fn amount_text(resource: Resource, amount: u64) -> String {
    match resource {
        Resource::Pids => format!("{amount} processes"),
        Resource::Memory | Resource::Disk => bytes_text(amount),
    }
}

/// Bytes as people write them: `250Mi`.
pub fn bytes_text(bytes: u64) -> String {
    match bytes {
        0 => "0".to_owned(),
        b if b < 1 << 20 => format!("{}Ki", b.div_ceil(1 << 10)),
        b => format!("{}Mi", b >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pod(name: &str, class: QosClass, priority: i32, usage: u64, request: u64) -> Candidate {
        Candidate {
            uid: PodUid::new(name).unwrap(),
            title: format!("default/{name}"),
            class,
            priority,
            critical: false,
            usage,
            request,
        }
    }

    #[test]
    fn who_exceeds_goes_first_then_priority_then_the_excess() {
        let within = pod("within", QosClass::Guaranteed, -5, 900, 1000);
        let important = pod("important", QosClass::BestEffort, 100, 800, 0);
        let small = pod("small", QosClass::BestEffort, 0, 50, 0);
        let large = pod("large", QosClass::Burstable, 0, 500, 100);
        let pods = [within, important, small, large];
        let name = |pods: &[Candidate]| choose(Resource::Memory, pods).map(|p| p.uid.to_string());
        assert_eq!(name(&pods), Some("large".into()));
        assert_eq!(name(&pods[..3]), Some("small".into()));
        assert_eq!(name(&pods[..2]), Some("important".into()));
        assert_eq!(name(&pods[..1]), Some("within".into()));
        let pids = choose(Resource::Pids, &pods).map(|p| p.uid.to_string());
        assert_eq!(pids, Some("within".into()));
    }

    #[test]
    fn the_words_have_the_figures() {
        let pods = [
            pod("a", QosClass::BestEffort, 0, 300 << 20, 0),
            pod("b", QosClass::Burstable, 0, 200 << 20, 100 << 20),
        ];
        let shortage = Shortage {
            signal: Signal::Memory,
            threshold: 100 << 20,
            available: 60 << 20,
            stall_percent: None,
        };
        let words = explain(&shortage, &pods[0], &pods);
        for part in [
            "low on resource: memory",
            "Threshold quantity: 100Mi (memory.available), available: 60Mi",
            "using 300Mi, its request is 0",
            "next would be default/b (priority 0, using 200Mi, request 100Mi)",
        ] {
            assert!(words.contains(part), "{words}");
        }
    }

    fn any_pod() -> impl Strategy<Value = Candidate> {
        (
            0u32..1000,
            0usize..3,
            -3i32..3,
            any::<bool>(),
            0u64..8,
            0u64..8,
        )
            .prop_map(
                |(id, class, priority, critical, usage, request)| Candidate {
                    critical,
                    ..pod(
                        &format!("p{id}"),
                        QosClass::ALL[class],
                        priority,
                        usage,
                        request,
                    )
                },
            )
    }

    proptest! {
        #[test]
        fn the_choice_keeps_the_rules(mut pods in prop::collection::vec(any_pod(), 0..12)) {
            pods.sort_by(|a, b| a.uid.cmp(&b.uid));
            pods.dedup_by(|a, b| a.uid == b.uid);
            for resource in Resource::ALL {
                let victim = choose(resource, &pods).cloned();
                let may: Vec<&Candidate> =
                    pods.iter().filter(|p| !p.critical && p.usage > 0).collect();
                prop_assert_eq!(victim.is_some(), !may.is_empty());
                let Some(victim) = victim else { continue };
                prop_assert!(!victim.critical);
                if resource != Resource::Pids {
                    let any_exceeds = may.iter().any(|p| p.exceeds());
                    prop_assert_eq!(victim.exceeds(), any_exceeds);
                    for other in may.iter().filter(|p| p.exceeds() == any_exceeds) {
                        prop_assert!(victim.priority <= other.priority);
                    }
                }
                let mut reversed = pods.clone();
                reversed.reverse();
                prop_assert_eq!(choose(resource, &reversed), Some(&victim));
            }
        }
    }
}
