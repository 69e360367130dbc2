//! Which pods end when, and how long each of them has. Pure.
//!
//! ```text
//!  |<------------------------- --shutdown-grace-period ------------------------->|
//!  |  all others: min(their own grace, what is left of the period)  |  critical  |
//!                                  --shutdown-grace-period-critical-pods |<------>|
//! ```
//! A round that is over early gives its time to nobody: the machine is down sooner. Source:
//! Kubernetes `pkg/kubelet/nodeshutdown`.

use std::time::Duration;

use crate::ids::PodUid;
use crate::pressure::victim::CRITICAL_PRIORITY;

/// The two flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Periods {
    /// For everything.
    pub all: Duration,
    /// The end of it, for critical pods.
    pub critical: Duration,
}

impl Periods {
    /// Why these cannot be.
    pub fn check(&self) -> Result<(), String> {
        if self.critical > self.all {
            return Err(format!(
                "--shutdown-grace-period-critical-pods ({} s) is a part of --shutdown-grace-period \
                 and cannot be longer ({} s)",
                self.critical.as_secs(),
                self.all.as_secs()
            ));
        }
        Ok(())
    }
}

/// A pod of this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ending {
    /// Which.
    pub uid: PodUid,
    /// `spec.priority`
    pub priority: i32,
    /// A static pod counts as critical.
    pub is_static: bool,
    /// `spec.terminationGracePeriodSeconds`
    pub grace_s: u64,
}

impl Ending {
    fn is_critical(&self) -> bool {
        self.is_static || self.priority >= CRITICAL_PRIORITY
    }
}

/// Pods that end together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Round {
    /// Each with its seconds between SIGTERM and SIGKILL.
    pub pods: Vec<(PodUid, u64)>,
    /// The next round begins after this at the latest.
    pub at_most: Duration,
}

/// The rounds, in order; those without pods are left out.
pub fn rounds(pods: &[Ending], periods: Periods) -> Vec<Round> {
    let round = |is_critical: bool, at_most: Duration| Round {
        pods: pods
            .iter()
            .filter(|pod| pod.is_critical() == is_critical)
            .map(|pod| (pod.uid.clone(), pod.grace_s.min(at_most.as_secs())))
            .collect(),
        at_most,
    };
    let critical = periods.critical.min(periods.all);
    [
        round(false, periods.all.saturating_sub(critical)),
        round(true, critical),
    ]
    .into_iter()
    .filter(|round| !round.pods.is_empty())
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn pod(name: &str, priority: i32, is_static: bool, grace_s: u64) -> Ending {
        Ending {
            uid: PodUid::new(name).unwrap(),
            priority,
            is_static,
            grace_s,
        }
    }

    #[test]
    fn critical_pods_are_last_and_nobody_has_more_than_its_share() {
        let pods = [
            pod("dns", CRITICAL_PRIORITY, false, 30),
            pod("web", 0, false, 60),
            pod("quick", 1000, false, 2),
            pod("fixed", 0, true, 5),
        ];
        let periods = Periods {
            all: Duration::from_secs(30),
            critical: Duration::from_secs(10),
        };
        let rounds = rounds(&pods, periods);
        let graces = |round: &Round| -> Vec<(String, u64)> {
            let pods = round.pods.iter();
            pods.map(|(uid, grace)| (uid.to_string(), *grace)).collect()
        };
        assert_eq!(rounds.len(), 2);
        assert_eq!(
            graces(&rounds[0]),
            [("web".into(), 20), ("quick".into(), 2)]
        );
        assert_eq!(
            graces(&rounds[1]),
            [("dns".into(), 10), ("fixed".into(), 5)]
        );
        let wrong = Periods {
            all: Duration::from_secs(1),
            critical: Duration::from_secs(2),
        };
        assert!(wrong.check().unwrap_err().contains("cannot be longer"));
        assert!(periods.check().is_ok());
    }

    proptest! {
        #[test]
        fn every_pod_ends_once_in_time_and_in_order(
            given in proptest::collection::vec((0_i32..3, any::<bool>(), 0_u64..100), 0..20),
            all in 0_u64..100, critical in 0_u64..100,
        ) {
            let levels = [-5, 0, CRITICAL_PRIORITY];
            let pods: Vec<Ending> = given.iter().enumerate().map(|(index, (level, fixed, grace))| {
                pod(&format!("p{index}"), levels[*level as usize], *fixed, *grace)
            }).collect();
            let periods = Periods {
                all: Duration::from_secs(all),
                critical: Duration::from_secs(critical),
            };
            let rounds = rounds(&pods, periods);
            let total: Duration = rounds.iter().map(|round| round.at_most).sum();
            prop_assert!(total <= periods.all);
            let mut seen = BTreeSet::new();
            let mut critical_before = false;
            for round in &rounds {
                for (uid, grace) in &round.pods {
                    prop_assert!(seen.insert(uid.clone()));
                    let own = pods.iter().find(|pod| pod.uid == *uid).unwrap();
                    prop_assert!(*grace <= own.grace_s && *grace <= round.at_most.as_secs());
                    prop_assert!(own.is_critical() || !critical_before);
                }
                critical_before |= round.pods.iter().any(|(uid, _)| {
                    pods.iter().any(|pod| pod.uid == *uid && pod.is_critical())
                });
            }
            prop_assert_eq!(seen.len(), pods.len());
        }
    }
}
