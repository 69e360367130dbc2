//! `gantry autoscale`: a HorizontalPodAutoscaler for a workload, in kubectl's words.

use crate::Global;
use crate::apply::{DryRun, Write};
use crate::connection::{Session, key};
use crate::failure::Failure;
use crate::files::Manifest;
use crate::names::targets;
use clap::Args;
use gantry_api::kinds::{Kind, resolve};
use gantry_api::proto::WriteReply;
use gantry_api::quantity::Quantity;
use serde_json::{Value, json};

#[derive(Args, Debug)]
pub(crate) struct Autoscale {
    /// Types and names: deploy/web, rs web
    #[arg(required = true, value_name = "TYPE|TYPE/NAME")]
    words: Vec<String>,
    /// Fewest replicas
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(i32).range(1..))]
    min: i32,
    /// Most replicas
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..))]
    max: i32,
    /// CPU to aim at: a percentage of the requests (80%) or an amount per pod (500m)
    #[arg(long)]
    cpu: Option<String>,
    /// The same as --cpu=N%
    #[arg(long, conflicts_with = "cpu", value_parser = clap::value_parser!(i32).range(1..))]
    cpu_percent: Option<i32>,
    /// Memory to aim at: a percentage of the requests (60%) or an amount per pod (200Mi)
    #[arg(long)]
    memory: Option<String>,
    /// The scaler's name; the workload's where it is left out
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    write: Write,
}

/// `80%` or an amount, as a metric of this resource.
fn metric(resource: &str, text: &str) -> Result<Value, Failure> {
    let wrong = || {
        let text = format!(
            "invalid --{resource} {text:?}: use a percentage of the requests, for example 80%, or an \
             amount per pod, for example 500m or 200Mi"
        );
        Failure::Local(text)
    };
    let target = match text.strip_suffix('%') {
        Some(percent) => {
            let percent: i32 = percent.parse().map_err(|_| wrong())?;
            if percent < 1 {
                return Err(wrong());
            }
            json!({"type": "Utilization", "averageUtilization": percent})
        }
        None => {
            let amount = Quantity::parse(text).map_err(|_| wrong())?;
            if amount <= Quantity::from_units(0) {
                return Err(wrong());
            }
            json!({"type": "AverageValue", "averageValue": text})
        }
    };
    Ok(json!({"type": "Resource", "resource": {"name": resource, "target": target}}))
}

impl Autoscale {
    fn metrics(&self) -> Result<Vec<Value>, Failure> {
        let percent = self.cpu_percent.map(|percent| format!("{percent}%"));
        let cpu = self.cpu.as_ref().or(percent.as_ref());
        let named = [("cpu", cpu), ("memory", self.memory.as_ref())];
        let given = named.into_iter();
        given
            .filter_map(|(name, text)| Some(metric(name, text?)))
            .collect()
    }

    fn scaler(&self, kind: &Kind, namespace: &str, workload: &str) -> Result<Value, Failure> {
        let name = self.name.as_deref().unwrap_or(workload);
        let mut scaler = json!({
            "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "minReplicas": self.min, "maxReplicas": self.max,
                "scaleTargetRef": {"apiVersion": kind.api_version(), "kind": kind.kind, "name": workload},
            },
        });
        let metrics = self.metrics()?;
        if !metrics.is_empty() {
            scaler["spec"]["metrics"] = Value::Array(metrics);
        }
        Ok(scaler)
    }

    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        if self.max < self.min {
            return Err(Failure::local("--max must be larger or equal to --min"));
        }
        let targets = targets(&self.words)?;
        if targets.iter().any(|t| t.names.is_empty()) {
            return Err(Failure::local(
                "name the workload to scale, for example deploy/web",
            ));
        }
        let scalers =
            resolve("hpa").ok_or_else(|| Failure::local("this version knows no autoscalers"))?;
        let session = Session::open(global).await?;
        for target in &targets {
            for name in &target.names {
                // One that does not exist is a mistake more often than a plan.
                session.get(session.key(target.kind, name)).await?;
                let object = self.scaler(target.kind, &session.namespace, name)?;
                let manifest = Manifest {
                    kind: scalers,
                    object,
                    source: name.clone(),
                };
                let reply = if self.write.dry_run == DryRun::Client {
                    WriteReply {
                        json: manifest.object.to_string().into(),
                        ..WriteReply::default()
                    }
                } else {
                    let mut request = self.write.request(&manifest, &session.namespace);
                    request.key = Some(key(scalers, &session.namespace, ""));
                    let mut objects = session.objects.clone();
                    objects.create(session.request(request)).await?.into_inner()
                };
                self.write.report(&manifest, reply, "autoscaled")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_aim_at_is_a_percentage_or_an_amount() {
        assert_eq!(
            metric("cpu", "80%").unwrap()["resource"]["target"],
            json!({"type": "Utilization", "averageUtilization": 80})
        );
        assert_eq!(
            metric("memory", "200Mi").unwrap()["resource"]["target"],
            json!({"type": "AverageValue", "averageValue": "200Mi"})
        );
        for text in ["", "0%", "-1%", "many", "0", "5%%"] {
            let failure = metric("cpu", text).unwrap_err().to_string();
            assert!(failure.contains("invalid --cpu"), "{failure}");
        }
    }
}
