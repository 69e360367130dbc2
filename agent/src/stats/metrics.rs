//! A reading as Prometheus text, under the names that cAdvisor and the kubelet use. Pure.
//!
//! Labels are those dashboards filter by: `namespace`, `pod`, `container`, `image`, `id`. A pod's
//! own cgroup has an empty `container`, as cAdvisor's has. Names: `docs/storage/prometheus.md` of
//! cAdvisor, `pkg/kubelet/metrics` of Kubernetes.

use std::fmt::Write as _;

use gantry_api::proto::{ProgrammedBackend, ProgrammedService};

use super::sample::{PodSample, Sample};
use crate::cgroups::stats::{Pressure, Stats};
use crate::dataplane::{Counts, XdpStanding};
use crate::services::index::{ip_of, parse_address};
use crate::services::shown::Fill;

/// The content type of the answer.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What the agent counts itself.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct AgentFigures {
    /// Evictions since the agent's start.
    pub evictions: u64,
    /// Conditions that are True: memory, disk, pids.
    pub pressures: [bool; 3],
    /// The agent's own resident memory, bytes.
    pub resident_bytes: u64,
    /// Revision of the view in force.
    pub revision: u64,
    /// Sockets ended because their backend had gone.
    pub sockets_ended: u64,
    /// Backends left out because they did not answer, and those that came back.
    pub ejections: [u64; 2],
    /// How full the maps of Services are.
    pub fill: Vec<Fill>,
    /// Services as they are programmed, with what each backend was used for.
    pub services: Vec<ProgrammedService>,
    /// What the eBPF programs counted.
    pub counts: Counts,
    /// How each uplink's frames are looked at.
    pub xdp: Vec<XdpStanding>,
    /// Prefixes of other nodes' pods that are reached directly, and by the tunnel.
    pub routes: (usize, usize),
    /// Problems with routes to other nodes' pods.
    pub unreached: usize,
    /// The resolver's families, as text.
    pub names: String,
}

/// One family: its header and lines.
struct Family<'a> {
    text: &'a mut String,
    name: &'static str,
}

fn family<'a>(text: &'a mut String, name: &'static str, kind: &str, help: &str) -> Family<'a> {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    Family { text, name }
}

impl Family<'_> {
    fn line(&mut self, labels: &[(&str, &str)], value: f64) {
        self.text.push_str(self.name);
        if !labels.is_empty() {
            self.text.push('{');
            for (i, (name, value)) in labels.iter().enumerate() {
                let comma = if i > 0 { "," } else { "" };
                let _ = write!(self.text, "{comma}{name}=\"{}\"", escaped(value));
            }
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }
}

fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// A cgroup that is shown: its labels and figures.
struct Row<'a> {
    labels: Vec<(&'a str, &'a str)>,
    stats: &'a Stats,
}

fn rows(pod: &PodSample) -> Vec<Row<'_>> {
    let label = |container, image, id| {
        vec![
            ("container", container),
            ("id", id),
            ("image", image),
            ("namespace", pod.namespace.as_str()),
            ("pod", pod.name.as_str()),
        ]
    };
    let mut rows = vec![Row {
        labels: label("", "", &pod.cgroup),
        stats: &pod.stats,
    }];
    rows.extend(pod.containers.iter().map(|c| Row {
        labels: label(&c.name, &c.image, &c.cgroup),
        stats: &c.stats,
    }));
    rows
}

const NS: f64 = 1e9;
const US: f64 = 1e6;

type Figure = (&'static str, &'static str, &'static str, fn(&Stats) -> f64);

/// Name, type, help, value.
const CONTAINER: [Figure; 9] = [
    (
        "container_cpu_usage_seconds_total",
        "counter",
        "Cumulative cpu time consumed in seconds.",
        |s| s.cpu_usage_ns as f64 / NS,
    ),
    (
        "container_cpu_cfs_periods_total",
        "counter",
        "Number of elapsed enforcement period intervals.",
        |s| s.cpu_periods as f64,
    ),
    (
        "container_cpu_cfs_throttled_periods_total",
        "counter",
        "Number of throttled period intervals.",
        |s| s.cpu_throttled_periods as f64,
    ),
    (
        "container_cpu_cfs_throttled_seconds_total",
        "counter",
        "Total time duration the container has been throttled.",
        |s| s.cpu_throttled_ns as f64 / NS,
    ),
    (
        "container_memory_usage_bytes",
        "gauge",
        "Current memory usage in bytes, including all memory regardless of when it was accessed.",
        |s| s.memory_usage_bytes as f64,
    ),
    (
        "container_memory_working_set_bytes",
        "gauge",
        "Current working set in bytes.",
        |s| s.memory_working_set_bytes as f64,
    ),
    (
        "container_memory_rss",
        "gauge",
        "Size of RSS in bytes.",
        |s| s.memory_rss_bytes as f64,
    ),
    (
        "container_memory_cache",
        "gauge",
        "Number of bytes of page cache memory.",
        |s| s.memory_cache_bytes as f64,
    ),
    (
        "container_threads",
        "gauge",
        "Number of threads running inside the container.",
        |s| s.task_count as f64,
    ),
];

type Stall = (&'static str, &'static str, fn(&Pressure) -> u64);

const PRESSURE: [Stall; 6] = [
    (
        "container_pressure_cpu_waiting_seconds_total",
        "Total time duration tasks in the container have waited due to CPU congestion.",
        |p| p.cpu.some_total_us,
    ),
    (
        "container_pressure_cpu_stalled_seconds_total",
        "Total time duration no tasks in the container could make progress due to CPU congestion.",
        |p| p.cpu.full_total_us,
    ),
    (
        "container_pressure_memory_waiting_seconds_total",
        "Total time duration tasks in the container have waited due to memory congestion.",
        |p| p.memory.some_total_us,
    ),
    (
        "container_pressure_memory_stalled_seconds_total",
        "Total time duration no tasks in the container could make progress due to memory congestion.",
        |p| p.memory.full_total_us,
    ),
    (
        "container_pressure_io_waiting_seconds_total",
        "Total time duration tasks in the container have waited due to IO congestion.",
        |p| p.io.some_total_us,
    ),
    (
        "container_pressure_io_stalled_seconds_total",
        "Total time duration no tasks in the container could make progress due to IO congestion.",
        |p| p.io.full_total_us,
    ),
];

/// The whole answer.
pub fn render(sample: &Sample, agent: &AgentFigures) -> String {
    let mut text = String::new();
    for (name, kind, help, value) in CONTAINER {
        let mut family = family(&mut text, name, kind, help);
        for pod in &sample.pods {
            for row in rows(pod) {
                family.line(&row.labels, value(row.stats));
            }
        }
    }
    for (name, help, value) in PRESSURE {
        let mut family = family(&mut text, name, "counter", help);
        for row in sample.pods.iter().flat_map(rows) {
            if let Some(pressure) = &row.stats.pressure {
                family.line(&row.labels, value(pressure) as f64 / US);
            }
        }
    }
    pods(&mut text, sample);
    network(&mut text, sample);
    node(&mut text, sample, agent);
    services(&mut text, agent);
    counts(&mut text, &agent.counts);
    xdp(&mut text, &agent.xdp);
    text.push_str(&agent.names);
    text
}

fn of_pod(pod: &PodSample) -> [(&str, &str); 2] {
    [("namespace", &pod.namespace), ("pod", &pod.name)]
}

fn pods(text: &mut String, sample: &Sample) {
    let help = "Count of out of memory events observed for the pod.";
    let mut oom = family(text, "container_oom_events_total", "counter", help);
    for pod in &sample.pods {
        oom.line(&of_pod(pod), pod.oom_kills as f64);
    }
    let help = "Number of bytes that are consumed by the pod on the node's file system.";
    let mut disk = family(text, "container_fs_usage_bytes", "gauge", help);
    for pod in &sample.pods {
        disk.line(&of_pod(pod), pod.disk_bytes as f64);
    }
}

fn network(text: &mut String, sample: &Sample) {
    const NAMES: [(&str, &str); 4] = [
        (
            "container_network_receive_bytes_total",
            "container_network_transmit_bytes_total",
        ),
        (
            "container_network_receive_packets_total",
            "container_network_transmit_packets_total",
        ),
        (
            "container_network_receive_errors_total",
            "container_network_transmit_errors_total",
        ),
        (
            "container_network_receive_packets_dropped_total",
            "container_network_transmit_packets_dropped_total",
        ),
    ];
    for (i, (receive, transmit)) in NAMES.into_iter().enumerate() {
        for (name, transmits) in [(receive, false), (transmit, true)] {
            let help = "Cumulative count, all interfaces of the pod.";
            let mut family = family(text, name, "counter", help);
            for pod in &sample.pods {
                if let Some(network) = &pod.network {
                    let side = if transmits {
                        &network.transmit
                    } else {
                        &network.receive
                    };
                    family.line(&of_pod(pod), side[i] as f64);
                }
            }
        }
    }
}

fn node(text: &mut String, sample: &Sample, agent: &AgentFigures) {
    let containers: usize = sample.pods.iter().map(|pod| pod.containers.len()).sum();
    let single: [(&'static str, &str, &str, f64); 10] = [
        (
            "node_cpu_usage_seconds_total",
            "counter",
            "Cumulative cpu time consumed by the node in core-seconds",
            sample.node.cpu_usage_ns as f64 / NS,
        ),
        (
            "node_memory_working_set_bytes",
            "gauge",
            "Current working set of the node in bytes",
            sample.node.memory_working_set_bytes as f64,
        ),
        (
            "kubelet_running_pods",
            "gauge",
            "Number of pods that have a running pod sandbox",
            sample.pods.len() as f64,
        ),
        (
            "kubelet_running_containers",
            "gauge",
            "Number of containers currently running",
            containers as f64,
        ),
        (
            "kubelet_evictions",
            "counter",
            "Cumulative number of pod evictions",
            agent.evictions as f64,
        ),
        (
            "process_resident_memory_bytes",
            "gauge",
            "Resident memory size of the agent in bytes.",
            agent.resident_bytes as f64,
        ),
        (
            "gantry_view_revision",
            "gauge",
            "Revision of the control plane's state that is in force on this node.",
            agent.revision as f64,
        ),
        (
            "gantry_sockets_ended_total",
            "counter",
            "Sockets that were ended because their backend had gone.",
            agent.sockets_ended as f64,
        ),
        (
            "gantry_backends_ejected_total",
            "counter",
            "Times a backend was left out on this node because it did not answer.",
            agent.ejections[0] as f64,
        ),
        (
            "gantry_backends_returned_total",
            "counter",
            "Times a backend that was left out answered again.",
            agent.ejections[1] as f64,
        ),
    ];
    for (name, kind, help, value) in single {
        family(text, name, kind, help).line(&[], value);
    }
    let help = "Whether the node is short of a resource.";
    let mut pressure = family(text, "gantry_node_pressure", "gauge", help);
    for (name, is) in ["memory", "disk", "pids"].into_iter().zip(agent.pressures) {
        pressure.line(&[("resource", name)], f64::from(u8::from(is)));
    }
    let help = "Prefixes of other nodes' pods with a route, by the way to them.";
    let mut routes = family(text, "gantry_node_routes", "gauge", help);
    routes.line(&[("way", "direct")], agent.routes.0 as f64);
    routes.line(&[("way", "vxlan")], agent.routes.1 as f64);
    let help = "Problems with routes to other nodes' pods: condition RoutesDegraded says which.";
    let mut problems = family(text, "gantry_node_route_problems", "gauge", help);
    problems.line(&[], agent.unreached as f64);
}

/// Backends that were never used are left out: there may be many.
fn services(text: &mut String, agent: &AgentFigures) {
    let help = "Share of a map of Services that is used.";
    let mut fill = family(text, "gantry_service_map_used_ratio", "gauge", help);
    for one in &agent.fill {
        let ratio = f64::from(one.used) / f64::from(one.limit.max(1));
        fill.line(&[("map", one.map)], ratio);
    }
    let help = "Connections of this node that went to a backend, since it was programmed.";
    backends(
        text,
        "gantry_service_backend_connections_total",
        "counter",
        help,
        agent,
        |b| b.chosen,
    );
    let help = "Sockets of this node connected to a backend, where its Service counts them.";
    backends(
        text,
        "gantry_service_backend_open_connections",
        "gauge",
        help,
        agent,
        |b| b.connections,
    );
    refusing(text, agent);
}

/// Every name is there from the start, at 0: a rate over a series that has just begun misses its
/// first events.
fn counts(text: &mut String, counts: &Counts) {
    let help = "Packets that were dropped, by reason; since the data plane's maps were made.";
    let mut drops = family(text, "gantry_drop_packets_total", "counter", help);
    for (reason, packets) in &counts.drops {
        drops.line(&[("reason", reason)], *packets as f64);
    }
    let help = "What the eBPF programs did, by kind; since the data plane's maps were made.";
    let mut events = family(text, "gantry_dataplane_events_total", "counter", help);
    for (event, times) in &counts.events {
        events.line(&[("event", event)], *times as f64);
    }
}

/// Where each uplink's frames are looked at first. Why it is off is in the log.
fn xdp(text: &mut String, standings: &[XdpStanding]) {
    let help = "1 for each interface towards the outside and how XDP is on it: off, native.";
    let mut uplinks = family(text, "gantry_uplink_xdp", "gauge", help);
    for standing in standings {
        let labels = [
            ("interface", standing.interface.as_str()),
            ("mode", standing.mode),
        ];
        uplinks.line(&labels, 1.0);
    }
}

/// Services that this node refuses: nobody is ready.
fn refusing(text: &mut String, agent: &AgentFigures) {
    let help = "1 for each Service that is programmed and has a frontend without backends.";
    let mut family = family(text, "gantry_service_without_backends", "gauge", help);
    for service in &agent.services {
        if service.frontends.iter().any(|f| f.backend_count == 0) {
            let labels = [
                ("namespace", service.namespace.as_str()),
                ("service", &service.name),
            ];
            family.line(&labels, 1.0);
        }
    }
}

fn backends(
    text: &mut String,
    name: &'static str,
    kind: &str,
    help: &str,
    agent: &AgentFigures,
    value: impl Fn(&ProgrammedBackend) -> u64,
) {
    let mut family = family(text, name, kind, help);
    for service in &agent.services {
        for backend in service.backends.iter().filter(|backend| value(backend) > 0) {
            let place = match parse_address(&backend.address) {
                Some(addr) => format!("{}:{}", ip_of(&addr), backend.port),
                None => continue,
            };
            let protocol = if backend.protocol == 17 { "udp" } else { "tcp" };
            let labels = [
                ("namespace", service.namespace.as_str()),
                ("service", &service.name),
                ("backend", &place),
                ("protocol", protocol),
                ("pod", &backend.pod),
            ];
            family.line(&labels, value(backend) as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use gantry_api::proto::ProgrammedFrontend;

    use super::super::sample::ContainerSample;
    use super::*;
    use crate::ids::PodUid;

    #[test]
    fn what_the_programs_counted_and_refuse_is_shown() {
        let frontend = |backend_count| ProgrammedFrontend {
            backend_count,
            ..Default::default()
        };
        let service = |name: &str, frontends| ProgrammedService {
            namespace: "shop".into(),
            name: name.into(),
            frontends,
            ..Default::default()
        };
        let agent = AgentFigures {
            counts: Counts {
                drops: vec![("policy", 12), ("ttl", 0)],
                events: vec![("translated", 7)],
            },
            xdp: vec![XdpStanding {
                interface: "eth0".into(),
                mode: "native",
                reason: None,
            }],
            services: vec![
                service("web", vec![frontend(2)]),
                service("db", vec![frontend(1), frontend(0)]),
            ],
            ..AgentFigures::default()
        };
        let text = render(&Sample::default(), &agent);
        for line in [
            "gantry_drop_packets_total{reason=\"policy\"} 12",
            "gantry_drop_packets_total{reason=\"ttl\"} 0",
            "gantry_dataplane_events_total{event=\"translated\"} 7",
            "gantry_uplink_xdp{interface=\"eth0\",mode=\"native\"} 1",
            "gantry_service_without_backends{namespace=\"shop\",service=\"db\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
        assert!(!text.contains("service=\"web\""), "{text}");
    }

    #[test]
    fn names_and_labels_are_those_of_dashboards() {
        let stats = Stats {
            cpu_usage_ns: 1_500_000_000,
            memory_working_set_bytes: 4096,
            pressure: Some(Pressure::default()),
            ..Stats::default()
        };
        let pod = PodSample {
            uid: PodUid::new("u").unwrap(),
            namespace: "shop".into(),
            name: "web".into(),
            cgroup: "/gantry/burstable/podu".into(),
            stats,
            network: None,
            disk_bytes: 5,
            oom_kills: 2,
            containers: vec![ContainerSample {
                name: "main".into(),
                image: "a\"b".into(),
                cgroup: "/gantry/burstable/podu/main".into(),
                stats,
            }],
        };
        let sample = Sample {
            pods: vec![pod],
            ..Sample::default()
        };
        let text = render(&sample, &AgentFigures::default());
        for line in [
            "container_cpu_usage_seconds_total{container=\"main\",id=\"/gantry/burstable/podu/main\",\
             image=\"a\\\"b\",namespace=\"shop\",pod=\"web\"} 1.5",
            "container_oom_events_total{namespace=\"shop\",pod=\"web\"} 2",
            "kubelet_running_pods 1",
            "gantry_node_pressure{resource=\"pids\"} 0",
            "# TYPE container_memory_working_set_bytes gauge",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
        // Every family once, every line with a number: what a scraper asks for.
        let families: Vec<&str> = text.lines().filter(|l| l.starts_with("# TYPE")).collect();
        let mut unique = families.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), families.len());
        for line in text.lines().filter(|l| !l.starts_with('#')) {
            let value = line.rsplit(' ').next().unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
    }
}
