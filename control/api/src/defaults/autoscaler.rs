//! Defaults of a HorizontalPodAutoscaler. Source: Kubernetes' `pkg/apis/autoscaling/v2/defaults.go`.

use k8s_openapi::api::autoscaling::v2::{
    HPAScalingPolicy, HPAScalingRules, HorizontalPodAutoscaler, MetricSpec, MetricTarget,
    ResourceMetricSource,
};

/// Percent of the CPU requests that is aimed at where nothing is said.
const CPU_UTILIZATION: i32 = 80;

fn policy(type_: &str, value: i32) -> HPAScalingPolicy {
    HPAScalingPolicy {
        period_seconds: 15,
        type_: type_.to_owned(),
        value,
    }
}

fn rules(rules: &mut HPAScalingRules, policies: Vec<HPAScalingPolicy>) {
    super::text(&mut rules.select_policy, "Max");
    rules.policies.get_or_insert(policies);
}

/// At least one replica, CPU as the metric, and how fast it may go.
pub fn horizontal_pod_autoscaler(scaler: &mut HorizontalPodAutoscaler) {
    let spec = &mut scaler.spec;
    spec.min_replicas.get_or_insert(1);
    let metrics = spec.metrics.get_or_insert_default();
    if metrics.is_empty() {
        metrics.push(MetricSpec {
            type_: "Resource".to_owned(),
            resource: Some(ResourceMetricSource {
                name: "cpu".to_owned(),
                target: MetricTarget {
                    type_: "Utilization".to_owned(),
                    average_utilization: Some(CPU_UTILIZATION),
                    ..MetricTarget::default()
                },
            }),
            ..MetricSpec::default()
        });
    }
    // Only where something is said: what is not there may get other defaults one day.
    if let Some(behavior) = &mut spec.behavior {
        let up = behavior.scale_up.get_or_insert_default();
        rules(up, vec![policy("Pods", 4), policy("Percent", 100)]);
        up.stabilization_window_seconds.get_or_insert(0);
        let down = behavior.scale_down.get_or_insert_default();
        rules(down, vec![policy("Percent", 100)]);
    }
}
