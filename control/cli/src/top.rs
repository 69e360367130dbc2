//! `gantry top`: what nodes and pods use now, as their agents measure it.
//!
//! Columns are kubectl's; `-o wide` adds what kubectl cannot show: throttling, PSI (share of the last
//! 10 s in which some task waited), network, disk and tasks. `<none>`: the kernel does not keep it.

use std::collections::BTreeSet;

use clap::{Args, Subcommand};
use gantry_api::kinds::resolve;
use gantry_api::proto::{ListRequest, NodeUsage, PodUsage, Usage, UsageRequest};
use serde_json::Value;

use crate::Global;
use crate::connection::Session;
use crate::failure::Failure;
use crate::output;

const WIDE: [&str; 8] = [
    "THROTTLED",
    "PSI(cpu)",
    "PSI(memory)",
    "PSI(io)",
    "RECEIVE/s",
    "TRANSMIT/s",
    "DISK(bytes)",
    "TASKS",
];

#[derive(Subcommand, Debug)]
pub(crate) enum Top {
    /// Usage of pods
    #[command(visible_aliases = ["pod", "po"])]
    Pods(Pods),
    /// Usage of nodes
    #[command(visible_aliases = ["node", "no"])]
    Nodes(Nodes),
}

#[derive(Args, Debug)]
pub(crate) struct Show {
    /// cpu or memory: the largest first
    #[arg(long, value_parser = ["cpu", "memory"])]
    sort_by: Option<String>,
    /// wide: also throttling, pressure, network, disk
    #[arg(short, long, default_value = "", hide_default_value = true, value_parser = ["", "wide"])]
    output: String,
    /// No line with the columns' names
    #[arg(long)]
    no_headers: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Pods {
    /// One pod
    name: Option<String>,
    /// Pods of all namespaces
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Each container by itself
    #[arg(long)]
    containers: bool,
    /// Label selector
    #[arg(short = 'l', long)]
    selector: Option<String>,
    #[command(flatten)]
    show: Show,
}

#[derive(Args, Debug)]
pub(crate) struct Nodes {
    /// One node
    name: Option<String>,
    #[command(flatten)]
    show: Show,
}

impl Top {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        let session = Session::open(global).await?;
        match self {
            Self::Pods(pods) => pods.run(&session).await,
            Self::Nodes(nodes) => nodes.run(&session).await,
        }
    }
}

/// Asks all agents, or one; says which did not answer.
async fn usage(session: &Session, node: &str) -> Result<Vec<NodeUsage>, Failure> {
    let request = UsageRequest {
        node: node.to_owned(),
    };
    let reply = session
        .stats
        .clone()
        .usage(session.request(request))
        .await?;
    let reply = reply.into_inner();
    for missing in &reply.missing {
        eprintln!("Warning: no figures of node {missing}");
    }
    if reply.nodes.is_empty() && !reply.missing.is_empty() {
        return Err(Failure::local("no node has answered"));
    }
    Ok(reply.nodes)
}

impl Pods {
    async fn run(&self, session: &Session) -> Result<(), Failure> {
        let selected = match &self.selector {
            Some(selector) => Some(self.selected(session, selector).await?),
            None => None,
        };
        let nodes = usage(session, "").await?;
        let mut pods: Vec<PodUsage> = nodes.into_iter().flat_map(|node| node.pods).collect();
        pods.retain(|pod| {
            (self.all_namespaces || pod.namespace == session.namespace)
                && self.name.as_ref().is_none_or(|name| pod.name == *name)
                && selected.as_ref().is_none_or(|uids| uids.contains(&pod.uid))
        });
        if let (Some(name), true) = (&self.name, pods.is_empty()) {
            let text = format!(
                "no figures of pod {}/{name}: it does not run",
                session.namespace
            );
            return Err(Failure::Local(text));
        }
        let rows = self.rows(&pods);
        output::print(&output::table_text(&rows, &[]))
    }

    /// UIDs of the pods that a selector selects.
    async fn selected(
        &self,
        session: &Session,
        selector: &str,
    ) -> Result<BTreeSet<String>, Failure> {
        let kind = resolve("pods").ok_or_else(|| Failure::local("this build knows no pods"))?;
        let mut key = session.key(kind, "");
        if self.all_namespaces {
            key.namespace.clear();
        }
        let request = ListRequest {
            key: Some(key),
            label_selector: selector.to_owned(),
            ..ListRequest::default()
        };
        let (pods, _) = session.list(request).await?;
        let uid = |pod: &Value| Some(pod.pointer("/metadata/uid")?.as_str()?.to_owned());
        Ok(pods.iter().filter_map(uid).collect())
    }

    fn rows(&self, pods: &[PodUsage]) -> Vec<Vec<String>> {
        let mut lines: Vec<(Vec<String>, Usage)> = Vec::new();
        for pod in pods {
            let mut names = Vec::new();
            if self.all_namespaces {
                names.push(pod.namespace.clone());
            }
            names.push(pod.name.clone());
            if !self.containers {
                lines.push((names, pod.usage.unwrap_or_default()));
                continue;
            }
            for container in &pod.containers {
                let mut names = names.clone();
                names.push(container.name.clone());
                lines.push((names, container.usage.unwrap_or_default()));
            }
        }
        self.show.sort(&mut lines);
        let mut header: Vec<&str> = Vec::new();
        if self.all_namespaces {
            header.push("NAMESPACE");
        }
        header.extend(match self.containers {
            true => ["POD", "NAME"].as_slice(),
            false => ["NAME"].as_slice(),
        });
        header.extend(["CPU(cores)", "MEMORY(bytes)"]);
        let cells = |usage: &Usage| vec![cpu(usage), memory(usage)];
        self.show.table(header, lines, cells)
    }
}

impl Nodes {
    async fn run(&self, session: &Session) -> Result<(), Failure> {
        let mut nodes = usage(session, self.name.as_deref().unwrap_or_default()).await?;
        nodes.sort_by(|a, b| a.node.cmp(&b.node));
        if let (Some(name), true) = (&self.name, nodes.is_empty()) {
            return Err(Failure::Local(format!("no node {name}")));
        }
        let rows = self.rows(&nodes);
        output::print(&output::table_text(&rows, &[]))
    }

    fn rows(&self, nodes: &[NodeUsage]) -> Vec<Vec<String>> {
        let line = |node: &NodeUsage| {
            let usage = node.usage.unwrap_or_default();
            let millicores = usage.cpu_nanocores / 1_000_000;
            let names = vec![
                node.node.clone(),
                cpu(&usage),
                percent(millicores, node.allocatable_cpu_millicores),
                memory(&usage),
                percent(
                    usage.memory_working_set_bytes,
                    node.allocatable_memory_bytes,
                ),
            ];
            (names, usage)
        };
        let mut lines: Vec<_> = nodes.iter().map(line).collect();
        self.show.sort(&mut lines);
        let header = vec!["NAME", "CPU(cores)", "CPU(%)", "MEMORY(bytes)", "MEMORY(%)"];
        self.show.table(header, lines, |_| Vec::new())
    }
}

impl Show {
    fn sort(&self, lines: &mut [(Vec<String>, Usage)]) {
        match self.sort_by.as_deref() {
            Some("cpu") => lines.sort_by_key(|(_, u)| std::cmp::Reverse(u.cpu_nanocores)),
            Some(_) => lines.sort_by_key(|(_, u)| std::cmp::Reverse(u.memory_working_set_bytes)),
            None => lines.sort_by(|a, b| a.0.cmp(&b.0)),
        }
    }

    fn table(
        &self,
        mut header: Vec<&str>,
        lines: Vec<(Vec<String>, Usage)>,
        cells: impl Fn(&Usage) -> Vec<String>,
    ) -> Vec<Vec<String>> {
        let wide = self.output == "wide";
        if wide {
            header.extend(WIDE);
        }
        let header = header.into_iter().map(str::to_owned).collect();
        let mut rows = match self.no_headers {
            true => Vec::new(),
            false => vec![header],
        };
        rows.extend(lines.into_iter().map(|(mut row, usage)| {
            row.extend(cells(&usage));
            if wide {
                row.extend(wide_cells(&usage));
            }
            row
        }));
        rows
    }
}

fn cpu(usage: &Usage) -> String {
    format!("{}m", usage.cpu_nanocores.div_ceil(1_000_000))
}

fn memory(usage: &Usage) -> String {
    format!("{}Mi", usage.memory_working_set_bytes >> 20)
}

fn percent(part: u64, whole: u64) -> String {
    match part.saturating_mul(100).checked_div(whole) {
        Some(percent) => format!("{percent}%"),
        None => "<unknown>".to_owned(),
    }
}

fn wide_cells(usage: &Usage) -> Vec<String> {
    const NONE: &str = "<none>";
    let hundredths = |value: u64| format!("{}.{:02}%", value / 100, value % 100);
    let stall = |of: fn(&gantry_api::proto::Stalls) -> u64| {
        let stalls = usage.stalls.as_ref();
        stalls.map_or_else(|| NONE.to_owned(), |stalls| hundredths(of(stalls)))
    };
    let network = |of: fn(&gantry_api::proto::Network) -> u64| {
        let network = usage.network.as_ref();
        network.map_or_else(|| NONE.to_owned(), |network| bytes(of(network)))
    };
    vec![
        format!("{}%", usage.throttled_percent),
        stall(|s| s.cpu),
        stall(|s| s.memory),
        stall(|s| s.io),
        network(|n| n.receive_bytes_per_s),
        network(|n| n.transmit_bytes_per_s),
        usage.disk_bytes.map_or_else(|| NONE.to_owned(), bytes),
        usage.task_count.to_string(),
    ]
}

fn bytes(count: u64) -> String {
    match count {
        0..=9_999 => count.to_string(),
        10_000..=10_485_759 => format!("{}Ki", count >> 10),
        _ => format!("{}Mi", count >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_api::proto::{ContainerUsage, Network, Stalls};

    fn show(wide: bool) -> Show {
        Show {
            sort_by: Some("cpu".into()),
            output: if wide { "wide" } else { "" }.into(),
            no_headers: false,
        }
    }

    fn pods(wide: bool, containers: bool) -> Pods {
        Pods {
            name: None,
            all_namespaces: true,
            containers,
            selector: None,
            show: show(wide),
        }
    }

    fn pod(name: &str, millicores: u64) -> PodUsage {
        let usage = Usage {
            cpu_nanocores: millicores * 1_000_000,
            memory_working_set_bytes: 5 << 20,
            throttled_percent: 40,
            stalls: Some(Stalls {
                cpu: 1205,
                memory: 0,
                io: 7,
            }),
            network: Some(Network {
                receive_bytes_per_s: 20_480,
                ..Network::default()
            }),
            task_count: 3,
            ..Usage::default()
        };
        PodUsage {
            uid: name.into(),
            namespace: "shop".into(),
            name: name.into(),
            usage: Some(usage),
            containers: vec![ContainerUsage {
                name: "main".into(),
                usage: Some(usage),
            }],
        }
    }

    #[test]
    fn pods_are_shown_like_kubectl_does_and_wide_adds_pressure() {
        let rows = pods(false, false).rows(&[pod("small", 3), pod("large", 900)]);
        assert_eq!(
            rows[0],
            ["NAMESPACE", "NAME", "CPU(cores)", "MEMORY(bytes)"]
        );
        assert_eq!(rows[1], ["shop", "large", "900m", "5Mi"]);
        let rows = pods(false, true).rows(&[pod("web", 3)]);
        assert_eq!(rows[0][1..3], ["POD", "NAME"]);
        assert_eq!(rows[1][1..3], ["web", "main"]);
        let rows = pods(true, false).rows(&[pod("web", 3)]);
        assert_eq!(
            rows[1][4..],
            [
                "40%", "12.05%", "0.00%", "0.07%", "20Ki", "0", "<none>", "3"
            ]
        );
    }

    #[test]
    fn nodes_show_their_share_of_allocatable() {
        let node = NodeUsage {
            node: "n".into(),
            usage: Some(Usage {
                cpu_nanocores: 500_000_000,
                memory_working_set_bytes: 1 << 30,
                ..Usage::default()
            }),
            allocatable_cpu_millicores: 2000,
            allocatable_memory_bytes: 0,
            pods: Vec::new(),
        };
        let nodes = Nodes {
            name: None,
            show: show(false),
        };
        let rows = nodes.rows(&[node]);
        assert_eq!(rows[1], ["n", "500m", "25%", "1024Mi", "<unknown>"]);
    }
}
