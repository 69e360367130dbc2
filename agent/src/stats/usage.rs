//! Two readings to usage with rates. Pure.

use std::time::Duration;

use gantry_api::proto;

use super::sample::{ContainerSample, Network, NodeSample, PodSample, Sample};
use crate::cgroups::stats::{Pressure, Stats};

/// Usage of the whole node at `now`, rates since `before`. What was not there before, or was
/// restarted meanwhile, counts from its own beginning.
pub fn between(node: &str, before: &Sample, now: &Sample) -> proto::NodeUsage {
    let window = now.at.saturating_duration_since(before.at);
    let pods = now.pods.iter().map(|pod| {
        let old = before.pods.iter().find(|old| old.uid == pod.uid);
        pod_usage(old, pod, window)
    });
    proto::NodeUsage {
        node: node.to_owned(),
        usage: Some(node_usage(&before.node, &now.node, window)),
        pods: pods.collect(),
        ..proto::NodeUsage::default()
    }
}

fn per_second(before: u64, now: u64, window: Duration) -> u64 {
    // A counter that fell has begun anew.
    let grown = if now >= before { now - before } else { now };
    let millis = window.as_millis().max(1);
    u64::try_from(u128::from(grown) * 1000 / millis).unwrap_or(u64::MAX)
}

fn stalls(pressure: Option<&Pressure>) -> Option<proto::Stalls> {
    pressure.map(|p| proto::Stalls {
        cpu: p.cpu.some_avg10,
        memory: p.memory.some_avg10,
        io: p.io.some_avg10,
    })
}

fn network(before: Option<&Network>, now: &Network, window: Duration) -> proto::Network {
    let old = before.copied().unwrap_or(*now);
    proto::Network {
        receive_bytes: now.receive[0],
        transmit_bytes: now.transmit[0],
        receive_bytes_per_s: per_second(old.receive[0], now.receive[0], window),
        transmit_bytes_per_s: per_second(old.transmit[0], now.transmit[0], window),
    }
}

fn millis(window: Duration) -> u64 {
    u64::try_from(window.as_millis()).unwrap_or(u64::MAX)
}

fn node_usage(before: &NodeSample, now: &NodeSample, window: Duration) -> proto::Usage {
    proto::Usage {
        cpu_nanocores: per_second(before.cpu_usage_ns, now.cpu_usage_ns, window),
        window_ms: millis(window),
        cpu_usage_ns: now.cpu_usage_ns,
        memory_working_set_bytes: now.memory_working_set_bytes,
        task_count: now.task_count,
        stalls: stalls(now.pressure.as_ref()),
        network: Some(network(Some(&before.network), &now.network, window)),
        ..proto::Usage::default()
    }
}

fn usage(before: Option<&Stats>, now: &Stats, window: Duration) -> proto::Usage {
    let old = before.copied().unwrap_or(*now);
    let periods = now.cpu_periods.saturating_sub(old.cpu_periods);
    let throttled = now
        .cpu_throttled_periods
        .saturating_sub(old.cpu_throttled_periods);
    proto::Usage {
        cpu_nanocores: per_second(old.cpu_usage_ns, now.cpu_usage_ns, window),
        window_ms: millis(window),
        cpu_usage_ns: now.cpu_usage_ns,
        throttled_percent: (throttled.saturating_mul(100))
            .checked_div(periods)
            .unwrap_or(0)
            .min(100),
        memory_working_set_bytes: now.memory_working_set_bytes,
        memory_rss_bytes: now.memory_rss_bytes,
        memory_usage_bytes: now.memory_usage_bytes,
        task_count: now.task_count,
        stalls: stalls(now.pressure.as_ref()),
        network: None,
        disk_bytes: None,
    }
}

fn pod_usage(before: Option<&PodSample>, now: &PodSample, window: Duration) -> proto::PodUsage {
    let old = |name: &str| -> Option<&ContainerSample> {
        before?.containers.iter().find(|old| old.name == name)
    };
    let containers: Vec<proto::ContainerUsage> = now
        .containers
        .iter()
        .map(|container| proto::ContainerUsage {
            name: container.name.clone(),
            usage: Some(usage(
                old(&container.name).map(|old| &old.stats),
                &container.stats,
                window,
            )),
        })
        .collect();
    let mut whole = usage(before.map(|old| &old.stats), &now.stats, window);
    // A quota stands at containers as well as at the pod: the worst of them is what is felt.
    let worst = containers
        .iter()
        .filter_map(|c| Some(c.usage.as_ref()?.throttled_percent));
    whole.throttled_percent = worst.max().unwrap_or(0).max(whole.throttled_percent);
    whole.network = now
        .network
        .as_ref()
        .map(|now| network(before.and_then(|old| old.network.as_ref()), now, window));
    whole.disk_bytes = Some(now.disk_bytes);
    proto::PodUsage {
        uid: now.uid.to_string(),
        namespace: now.namespace.clone(),
        name: now.name.clone(),
        usage: Some(whole),
        containers,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::PodUid;
    use std::time::Instant;

    fn pod(cpu_ns: u64, periods: (u64, u64), bytes: u64) -> PodSample {
        let stats = Stats {
            cpu_usage_ns: cpu_ns,
            cpu_periods: periods.0,
            cpu_throttled_periods: periods.1,
            memory_working_set_bytes: 7,
            ..Stats::default()
        };
        PodSample {
            uid: PodUid::new("u").unwrap(),
            namespace: "default".into(),
            name: "web".into(),
            cgroup: "/gantry/burstable/podu".into(),
            stats,
            network: Some(Network {
                receive: [bytes, 0, 0, 0],
                transmit: [0; 4],
            }),
            disk_bytes: 11,
            oom_kills: 0,
            containers: vec![ContainerSample {
                name: "main".into(),
                image: "i".into(),
                cgroup: "/gantry/burstable/podu/main".into(),
                stats,
            }],
        }
    }

    #[test]
    fn rates_are_those_of_the_window() {
        let at = Instant::now();
        let before = Sample {
            at,
            node: NodeSample::default(),
            pods: vec![pod(1_000_000_000, (10, 0), 1000)],
        };
        let now = Sample {
            at: at + Duration::from_secs(2),
            node: NodeSample::default(),
            pods: vec![pod(2_000_000_000, (30, 5), 5000)],
        };
        let got = between("n", &before, &now);
        let usage = got.pods[0].usage.unwrap();
        assert_eq!(usage.cpu_nanocores, 500_000_000);
        assert_eq!(usage.throttled_percent, 25);
        assert_eq!(usage.disk_bytes, Some(11));
        let network = usage.network.unwrap();
        assert_eq!(
            (network.receive_bytes, network.receive_bytes_per_s),
            (5000, 2000)
        );
        // Nothing known from before: no rate, and no nonsense.
        let fresh = between(
            "n",
            &Sample {
                at,
                ..Sample::default()
            },
            &now,
        );
        assert_eq!(fresh.pods[0].usage.unwrap().cpu_nanocores, 0);
        // Restarted meanwhile.
        let restarted = between(
            "n",
            &now,
            &Sample {
                at: now.at,
                ..before
            },
        );
        assert!(restarted.pods[0].usage.is_some());
    }
}
