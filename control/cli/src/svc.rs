//! `gantry svc`: Services as the nodes have them programmed, read from their eBPF maps.
//!
//! `list` has a line for each Service and node, `show` everything of one, `drops` what packets were
//! dropped for. What the API says of a Service is `gantry get service`; this is what connections meet.

use std::net::IpAddr;

use clap::{Args, Subcommand};
use gantry_api::proto::{NodeServices, ProgrammedService, ServicesRequest};

use crate::Global;
use crate::connection::Session;
use crate::failure::Failure;
use crate::output;

#[derive(Subcommand, Debug)]
pub(crate) enum Svc {
    /// A line for each Service and node
    #[command(visible_alias = "ls")]
    List(List),
    /// Frontends and backends of one Service, with what they were used for
    Show(Show),
    /// How many packets were dropped, by reason
    Drops(Drops),
}

#[derive(Args, Debug)]
pub(crate) struct Drops {
    /// This node only; all of them otherwise
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    node: String,
    /// Also the reasons that nothing was dropped for
    #[arg(long)]
    all: bool,
    /// No line with the columns' names
    #[arg(long)]
    no_headers: bool,
}

#[derive(Args, Debug)]
pub(crate) struct List {
    /// Services of all namespaces
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// This node only; all of them otherwise
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    node: String,
    /// No line with the columns' names
    #[arg(long)]
    no_headers: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Show {
    /// Its name
    name: String,
    /// This node only; all of them otherwise
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    node: String,
}

impl Svc {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        let session = Session::open(global).await?;
        let (node, name, all) = match self {
            Self::List(list) => (&list.node, "", list.all_namespaces),
            Self::Show(show) => (&show.node, show.name.as_str(), false),
            Self::Drops(drops) => (&drops.node, "", true),
        };
        let namespace = match all {
            true => String::new(),
            false => session.namespace.clone(),
        };
        let request = ServicesRequest {
            node: node.clone(),
            namespace: namespace.clone(),
            name: name.to_owned(),
            drops: matches!(self, Self::Drops(_)),
        };
        let nodes = ask(&session, request).await?;
        match self {
            Self::Drops(drops) => {
                output::print(&output::table_text(&drop_rows(&nodes, drops), &[]))
            }
            Self::List(list) => output::print(&output::table_text(&list_rows(&nodes, list), &[])),
            Self::Show(_) => {
                let found = nodes.iter().any(|node| !node.services.is_empty());
                if !found {
                    let text = format!("no node has Service {namespace}/{name} programmed");
                    return Err(Failure::Local(text));
                }
                output::print(&nodes.iter().map(describe).collect::<String>())
            }
        }
    }
}

/// Asks the agents; one answer for each node, which may come in parts.
async fn ask(session: &Session, request: ServicesRequest) -> Result<Vec<NodeServices>, Failure> {
    let reply = session
        .stats
        .clone()
        .services(session.request(request))
        .await?;
    let mut parts = reply.into_inner();
    let mut nodes: Vec<NodeServices> = Vec::new();
    while let Some(part) = parts.message().await? {
        if !part.error.is_empty() {
            eprintln!("Warning: no answer of node {}: {}", part.node, part.error);
            continue;
        }
        match nodes.iter_mut().find(|known| known.node == part.node) {
            Some(known) => known.services.extend(part.services),
            None => nodes.push(part),
        }
    }
    nodes.sort_by(|a, b| a.node.cmp(&b.node));
    Ok(nodes)
}

fn list_rows(nodes: &[NodeServices], list: &List) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    let mut row = |cells: [&str; 8]| {
        let cells = cells.into_iter().skip(usize::from(!list.all_namespaces));
        rows.push(cells.map(str::to_owned).collect());
    };
    if !list.no_headers {
        row([
            "NAMESPACE",
            "NAME",
            "NODE",
            "FRONTENDS",
            "BACKENDS",
            "HITS",
            "GENERATION",
            "STATE",
        ]);
    }
    for node in nodes {
        for service in &node.services {
            let name = match service.name.as_str() {
                "" => "<nobody's>",
                name => name,
            };
            row([
                &service.namespace,
                name,
                &node.node,
                &service.frontends.len().to_string(),
                &service.backends.len().to_string(),
                &service
                    .backends
                    .iter()
                    .map(|b| b.chosen)
                    .sum::<u64>()
                    .to_string(),
                &generation(service).to_string(),
                &state(service),
            ]);
        }
    }
    rows
}

/// The most frequent reasons of each node first.
fn drop_rows(nodes: &[NodeServices], drops: &Drops) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    if !drops.no_headers {
        rows.push(cells(["NODE", "REASON", "PACKETS"]));
    }
    for node in nodes {
        let shown = node.drops.iter().filter(|d| drops.all || d.packets > 0);
        let mut shown: Vec<_> = shown.collect();
        shown.sort_by(|a, b| (b.packets, &a.reason).cmp(&(a.packets, &b.reason)));
        for one in shown {
            rows.push(cells([&node.node, &one.reason, &one.packets.to_string()]));
        }
    }
    rows
}

/// The newest change of the Service that this node has programmed.
fn generation(service: &ProgrammedService) -> u64 {
    service
        .frontends
        .iter()
        .map(|f| f.generation)
        .max()
        .unwrap_or(0)
}

fn state(service: &ProgrammedService) -> String {
    if !service.stuck.is_empty() {
        return format!("stuck: {}", service.stuck);
    }
    match service.frontends.iter().all(|f| f.backend_count > 0) {
        true => "programmed".into(),
        false => "refuses".into(),
    }
}

fn describe(node: &NodeServices) -> String {
    let mut text = String::new();
    for service in &node.services {
        let head = format!(
            "Node:       {}\nService:    {}/{}\nState:      {}\nGeneration: {}\n",
            node.node,
            service.namespace,
            service.name,
            state(service),
            generation(service),
        );
        text.push_str(&head);
        let mut rows = vec![cells(["FRONTEND", "SET", "BACKENDS", "GENERATION", "FOR"])];
        for f in &service.frontends {
            let place = place(&f.address, f.port, f.protocol);
            let (set, count) = (f.set.to_string(), f.backend_count.to_string());
            rows.push(cells([
                &place,
                &set,
                &count,
                &f.generation.to_string(),
                &f.scope,
            ]));
        }
        text.push_str(&output::table_text(&rows, &[]));
        let header = [
            "BACKEND",
            "SET",
            "STATE",
            "HITS",
            "CONNECTIONS",
            "POD",
            "NODE",
        ];
        let mut rows = vec![cells(header)];
        for b in &service.backends {
            rows.push(cells([
                &place(&b.address, b.port, b.protocol),
                &b.set.to_string(),
                &b.state,
                &b.chosen.to_string(),
                &b.connections.to_string(),
                &b.pod,
                &b.node,
            ]));
        }
        text.push_str(&output::table_text(&rows, &[]));
        text.push('\n');
    }
    text
}

fn cells<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.into_iter().map(str::to_owned).collect()
}

fn place(address: &[u8], port: u32, protocol: u32) -> String {
    let protocol = match protocol {
        6 => "TCP",
        17 => "UDP",
        _ => "?",
    };
    let address = match (<[u8; 4]>::try_from(address), <[u8; 16]>::try_from(address)) {
        (Ok(v4), _) => IpAddr::from(v4).to_string(),
        (_, Ok(v6)) => format!("[{}]", IpAddr::from(v6)),
        _ => "?".to_owned(),
    };
    format!("{address}:{port}/{protocol}")
}

#[cfg(test)]
mod tests {
    use gantry_api::proto::{DroppedPackets, ProgrammedBackend, ProgrammedFrontend};

    use super::*;

    fn service(count: u32, stuck: &str) -> ProgrammedService {
        ProgrammedService {
            namespace: "shop".into(),
            name: "web".into(),
            frontends: vec![ProgrammedFrontend {
                address: vec![10, 96, 0, 1].into(),
                port: 80,
                protocol: 6,
                generation: 42,
                set: 7,
                backend_count: count,
                ..Default::default()
            }],
            backends: vec![ProgrammedBackend {
                address: vec![0; 16].into(),
                port: 8080,
                protocol: 17,
                chosen: 5,
                pod: "web-1".into(),
                ..Default::default()
            }],
            stuck: stuck.into(),
        }
    }

    #[test]
    fn a_service_is_a_line_and_its_parts_are_tables() {
        let node = NodeServices {
            node: "n1".into(),
            services: vec![service(1, "")],
            ..Default::default()
        };
        let list = List {
            all_namespaces: false,
            node: String::new(),
            no_headers: true,
        };
        let rows = list_rows(std::slice::from_ref(&node), &list);
        assert_eq!(rows, [["web", "n1", "1", "1", "5", "42", "programmed"]]);
        let text = describe(&node);
        assert!(text.contains("10.96.0.1:80/TCP"), "{text}");
        assert!(
            text.contains("[::]:8080/UDP") && text.contains("web-1"),
            "{text}"
        );
    }

    #[test]
    fn what_most_was_dropped_for_comes_first() {
        let drop = |reason: &str, packets| DroppedPackets {
            reason: reason.into(),
            packets,
        };
        let node = NodeServices {
            node: "n1".into(),
            drops: vec![drop("ttl", 0), drop("malformed", 2), drop("policy", 31)],
            ..Default::default()
        };
        let mut drops = Drops {
            node: String::new(),
            all: false,
            no_headers: true,
        };
        let rows = drop_rows(std::slice::from_ref(&node), &drops);
        assert_eq!(rows, [["n1", "policy", "31"], ["n1", "malformed", "2"]]);
        drops.all = true;
        assert_eq!(drop_rows(&[node], &drops).len(), 3);
    }

    #[test]
    fn what_is_wrong_is_said() {
        assert_eq!(state(&service(0, "")), "refuses");
        assert_eq!(state(&service(1, "SLOTS is full")), "stuck: SLOTS is full");
    }
}
