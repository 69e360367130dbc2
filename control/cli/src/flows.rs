//! `gantry flows`: what happens to connections on the nodes, as their eBPF programs tell it.
//!
//! ```text
//! 15:04:05.123 shop/client:43210 -> shop/web:80 (web-7f-x:8080) TCP forwarded
//! 15:04:05.224 shop/client:43212 -> shop/db-0:5432 TCP dropped policy (ingress)
//! ... 1,203 events not shown
//! ```
//! A flow is a line where it begins: at the socket that is sent on to a backend, and where its first packet
//! leaves a pod or is delivered to one. What is refused or dropped is a line each time. The programs tell
//! only while somebody watches, and some hundred lines per second and CPU at most.

use std::io::Write as _;
use std::net::IpAddr;

use clap::{Args, ValueEnum};
use gantry_api::proto::{Flow, FlowEnd, FlowsRequest, NodeFlows};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Value, json};

use crate::Global;
use crate::connection::Session;
use crate::failure::Failure;
use crate::output;

/// Columns of a line; longer names are shortened in the middle.
const WIDTH: usize = 100;
/// The shortest that an end is made.
const END_MIN: usize = 12;

#[derive(Args, Debug)]
pub(crate) struct Flows {
    /// Go on with what happens; otherwise one second of it, with what is known of the time before
    #[arg(short, long)]
    follow: bool,
    /// Flows of all namespaces; otherwise those with an end in the request's namespace
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Only flows of this pod: name, or namespace/name
    #[arg(long, default_value = "", hide_default_value = true)]
    pod: String,
    /// This node only; all of them otherwise
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    node: String,
    /// Only what came to this end
    #[arg(long, value_delimiter = ',')]
    verdict: Vec<Verdict>,
    /// The last so many; with --follow of those that began before
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    /// json: an object per line
    #[arg(short, long, default_value = "", hide_default_value = true, value_parser = ["", "json"])]
    output: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Verdict {
    /// Passed on its way
    Forwarded,
    /// Sent on from a Service to a backend, at the socket
    Translated,
    /// Refused at once: nobody serves it
    Refused,
    /// Dropped, with a reason
    Dropped,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Forwarded => "forwarded",
            Self::Translated => "translated",
            Self::Refused => "refused",
            Self::Dropped => "dropped",
        }
    }
}

impl Flows {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        let session = Session::open(global).await?;
        let request = self.request(&session.namespace)?;
        let reply = session.stats.clone().flows(session.request(request)).await;
        let mut parts = reply?.into_inner();
        if self.follow && self.last.is_none() {
            while let Some(part) = parts.message().await? {
                self.print(std::slice::from_ref(&part))?;
            }
            return Ok(());
        }
        // In the order of time, whatever node answers first.
        let mut nodes: Vec<NodeFlows> = Vec::new();
        let mut first = self.follow.then(|| tokio::time::Instant::now() + GATHER);
        loop {
            let part = match first {
                // Cancel-safe: a message that has not come is not lost.
                Some(until) => match tokio::time::timeout_at(until, parts.message()).await {
                    Ok(part) => part?,
                    Err(_) => {
                        self.print(&self.recent(std::mem::take(&mut nodes)))?;
                        first = None;
                        continue;
                    }
                },
                None => parts.message().await?,
            };
            let Some(part) = part else { break };
            match self.follow && first.is_none() {
                true => self.print(std::slice::from_ref(&part))?,
                false => nodes.push(part),
            }
        }
        self.print(&self.recent(nodes))
    }

    fn request(&self, namespace: &str) -> Result<FlowsRequest, Failure> {
        let (pod_namespace, pod) = match self.pod.split_once('/') {
            Some((namespace, pod)) => (Some(namespace), pod),
            None => (None, self.pod.as_str()),
        };
        if self.all_namespaces && pod_namespace.is_some() {
            let text = format!("--pod {} names a namespace, -A means all of them", self.pod);
            return Err(Failure::Local(text));
        }
        let namespace = match self.all_namespaces {
            true => "",
            false => pod_namespace.unwrap_or(namespace),
        };
        Ok(FlowsRequest {
            node: self.node.clone(),
            namespace: namespace.to_owned(),
            pod: pod.to_owned(),
            verdicts: self.verdict.iter().map(|v| v.name().to_owned()).collect(),
            follow: self.follow,
        })
    }

    /// The last ones of all nodes as one, each as a part of its own.
    fn recent(&self, nodes: Vec<NodeFlows>) -> Vec<NodeFlows> {
        let mut parts = Vec::new();
        let (mut not_shown, mut errors) = (0, Vec::new());
        for mut node in nodes {
            not_shown += node.not_shown;
            for flow in std::mem::take(&mut node.flows) {
                parts.push(NodeFlows {
                    node: node.node.clone(),
                    flows: vec![flow],
                    ..Default::default()
                });
            }
            if !node.error.is_empty() {
                node.not_shown = 0;
                errors.push(node);
            }
        }
        parts.sort_by_key(|part| part.flows.first().map(|flow| flow.time_us));
        let surplus = parts.len().saturating_sub(self.last.unwrap_or(usize::MAX));
        parts.drain(..surplus);
        parts.extend(errors);
        parts.push(NodeFlows {
            not_shown,
            ..Default::default()
        });
        parts
    }

    fn print(&self, parts: &[NodeFlows]) -> Result<(), Failure> {
        let mut text = String::new();
        for part in parts {
            for flow in &part.flows {
                match self.output.as_str() {
                    "json" => text.push_str(&object(flow, &part.node).to_string()),
                    _ => text.push_str(&line(flow, &TimeZone::system())),
                }
                text.push('\n');
            }
            if part.not_shown > 0 {
                match self.output.as_str() {
                    "json" => {
                        let value = json!({"node": part.node, "notShown": part.not_shown});
                        text.push_str(&value.to_string());
                    }
                    _ => {
                        text.push_str(&format!("... {} events not shown", grouped(part.not_shown)))
                    }
                }
                text.push('\n');
            }
            if !part.error.is_empty() {
                let _ = std::io::stdout().flush();
                eprintln!("Warning: no flows of node {}: {}", part.node, part.error);
            }
        }
        match text.is_empty() {
            true => Ok(()),
            false => output::print(&text),
        }
    }
}

/// With `--last` and `--follow`: how long the nodes have for what is known of the time before.
const GATHER: std::time::Duration = std::time::Duration::from_millis(500);

/// One line of at most [`WIDTH`] columns.
fn line(flow: &Flow, zone: &TimeZone) -> String {
    let time = Timestamp::from_microsecond(flow.time_us).unwrap_or_default();
    let time = time.to_zoned(zone.clone()).strftime("%H:%M:%S%.3f");
    let (source, destination) = ends(flow);
    let end = match flow.reason.as_str() {
        "" => format!("{} {}", protocol(flow.protocol), flow.verdict),
        reason => format!("{} {} {reason}", protocol(flow.protocol), flow.verdict),
    };
    let time = time.to_string();
    let taken = time.chars().count() + end.chars().count() + " ".len() * 2 + " -> ".len();
    let (source, destination) = fit(&source, &destination, WIDTH.saturating_sub(taken));
    format!("{time} {source} -> {destination} {end}")
}

/// Both ends in words: `shop/client:4000`, `shop/web:80 (web-1:8080)`.
fn ends(flow: &Flow) -> (String, String) {
    let nobody = FlowEnd::default();
    let source = place(flow.source.as_ref().unwrap_or(&nobody), "");
    let destination = match (&flow.frontend, &flow.destination) {
        (Some(frontend), Some(backend)) => {
            let inner = place(backend, &frontend.namespace);
            format!("{} ({inner})", place(frontend, ""))
        }
        (Some(frontend), None) => place(frontend, ""),
        (None, Some(destination)) => place(destination, ""),
        (None, None) => "?".to_owned(),
    };
    (source, destination)
}

/// A name, or an address where there is none, and the port.
///
/// * `around` – the namespace that needs not be said.
fn place(end: &FlowEnd, around: &str) -> String {
    let address = address(end);
    let mut text = match (end.name.as_str(), end.namespace.as_str()) {
        ("", _) => match address {
            Some(IpAddr::V6(v6)) if end.port != 0 => format!("[{v6}]"),
            Some(address) => address.to_string(),
            None => "?".to_owned(),
        },
        (name, "") => name.to_owned(),
        (name, namespace) if namespace == around => name.to_owned(),
        (name, namespace) => format!("{namespace}/{name}"),
    };
    if end.port != 0 {
        text.push_str(&format!(":{}", end.port));
    }
    text
}

fn address(end: &FlowEnd) -> Option<IpAddr> {
    let bytes: &[u8] = &end.address;
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(v4.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

/// Shortens the longer one first, then both.
fn fit(source: &str, destination: &str, room: usize) -> (String, String) {
    let (s, d) = (source.chars().count(), destination.chars().count());
    if s + d <= room {
        return (source.to_owned(), destination.to_owned());
    }
    let half = room / 2;
    let (s, d) = match (s <= half, d <= half) {
        (true, _) => (s, room - s),
        (_, true) => (room - d, d),
        _ => (half, room - half),
    };
    (
        shortened(source, s.max(END_MIN)),
        shortened(destination, d.max(END_MIN)),
    )
}

/// With what is in the middle left out: both the beginning and the port tell most.
fn shortened(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length <= width {
        return text.to_owned();
    }
    let tail = (width - 1) * 2 / 3;
    let head: String = text.chars().take(width - 1 - tail).collect();
    let tail: String = text.chars().skip(length - tail).collect();
    format!("{head}…{tail}")
}

fn protocol(number: u32) -> String {
    match number {
        1 => "ICMP".into(),
        6 => "TCP".into(),
        17 => "UDP".into(),
        58 => "ICMPv6".into(),
        132 => "SCTP".into(),
        0 => "-".into(),
        other => other.to_string(),
    }
}

/// 1203 -> "1,203"
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn object(flow: &Flow, node: &str) -> Value {
    let time = Timestamp::from_microsecond(flow.time_us).unwrap_or_default();
    let end = |end: &Option<FlowEnd>| {
        end.as_ref().map(|end| {
            json!({
                "kind": end.kind,
                "namespace": end.namespace,
                "name": end.name,
                "address": address(end).map(|address| address.to_string()),
                "port": end.port,
            })
        })
    };
    json!({
        "time": time.to_string(),
        "node": node,
        "source": end(&flow.source),
        "destination": end(&flow.destination),
        "service": end(&flow.frontend),
        "protocol": protocol(flow.protocol),
        "verdict": flow.verdict,
        "reason": flow.reason,
        "point": flow.point,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn end(namespace: &str, name: &str, port: u32) -> Option<FlowEnd> {
        Some(FlowEnd {
            address: vec![10, 0, 0, 7].into(),
            port,
            kind: "pod".into(),
            namespace: namespace.into(),
            name: name.into(),
        })
    }

    fn flow() -> Flow {
        Flow {
            time_us: 1_700_000_000_123_456,
            source: end("shop", "client", 43_210),
            destination: end("shop", "web-7f-x", 8_080),
            frontend: None,
            protocol: 6,
            verdict: "forwarded".into(),
            reason: String::new(),
            point: "from-pod".into(),
        }
    }

    #[test]
    fn a_flow_is_a_line() {
        let shown = |flow: &Flow| line(flow, &TimeZone::UTC);
        let mut flow = flow();
        let expected = "22:13:20.123 shop/client:43210 -> shop/web-7f-x:8080 TCP forwarded";
        assert_eq!(shown(&flow), expected);
        flow.frontend = end("shop", "web", 80);
        flow.source = Some(FlowEnd {
            address: vec![0; 16].into(),
            port: 9,
            ..Default::default()
        });
        let expected = "22:13:20.123 [::]:9 -> shop/web:80 (web-7f-x:8080) TCP forwarded";
        assert_eq!(shown(&flow), expected);
        flow.destination = None;
        flow.source = None;
        flow.verdict = "refused".into();
        flow.reason = "no_backend".into();
        let expected = "22:13:20.123 ? -> shop/web:80 TCP refused no_backend";
        assert_eq!(shown(&flow), expected);
    }

    #[test]
    fn numbers_are_grouped_and_the_last_ones_are_shown() {
        assert_eq!(grouped(7), "7");
        assert_eq!(grouped(1_203), "1,203");
        assert_eq!(grouped(1_234_567), "1,234,567");
        let at = |node: &str, time_us| NodeFlows {
            node: node.into(),
            flows: vec![Flow { time_us, ..flow() }],
            not_shown: 2,
            ..Default::default()
        };
        let flows = Flows {
            follow: false,
            all_namespaces: true,
            pod: String::new(),
            node: String::new(),
            verdict: vec![],
            last: Some(2),
            output: String::new(),
        };
        let recent = flows.recent(vec![at("a", 3), at("b", 1), at("c", 2)]);
        let nodes: Vec<&str> = recent.iter().map(|part| part.node.as_str()).collect();
        assert_eq!(nodes, ["c", "a", ""]);
        assert_eq!(recent[2].not_shown, 6);
    }

    #[test]
    fn a_pod_is_named_with_its_namespace_or_without() {
        let mut flows = Flows {
            follow: true,
            all_namespaces: false,
            pod: "shop/web".into(),
            node: String::new(),
            verdict: vec![Verdict::Dropped],
            last: None,
            output: String::new(),
        };
        let request = flows.request("default").unwrap();
        let asked = (request.namespace.as_str(), request.pod.as_str());
        assert_eq!(asked, ("shop", "web"));
        assert_eq!(request.verdicts, ["dropped"]);
        flows.pod = "web".into();
        assert_eq!(flows.request("default").unwrap().namespace, "default");
        flows.all_namespaces = true;
        assert_eq!(flows.request("default").unwrap().namespace, "");
        flows.pod = "shop/web".into();
        assert!(flows.request("default").is_err());
    }

    proptest! {
        /// Whatever the names are, a line fits, and says verdict and reason whole.
        #[test]
        fn a_line_fits(
            names in proptest::array::uniform6("[a-zé0-9-]{0,63}"),
            reason in proptest::sample::select(vec!["", "policy (ingress)", "source_address"]),
            translated: bool,
        ) {
            let [a, b, c, d, e, f] = names;
            let flow = Flow {
                source: end(&a, &b, 65_535),
                destination: end(&c, &d, 65_535),
                frontend: if translated { end(&e, &f, 65_535) } else { None },
                reason: reason.into(),
                verdict: "translated".into(),
                protocol: 58,
                ..flow()
            };
            let line = line(&flow, &TimeZone::UTC);
            prop_assert!(line.chars().count() <= WIDTH, "{line}");
            let tail = format!("translated {reason}");
            prop_assert!(line.ends_with(tail.trim_end()), "{line}");
        }
    }
}
