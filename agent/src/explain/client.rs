//! The client's side: from the name to a packet that has left its pod, and the answer's way back.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ebpf_maps::event::IS_TRANSLATED;
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::proto;
use gantry_api::proto::backend::State;

use super::target::{Target, listed, resolve, service_port};
use super::words::{Story, bytes_of, drop_reason, is_refused, placed, policies, policy_drop};
use super::{ExplainError, Local, address};
use crate::dataplane::{DataplaneError, SYN, SYN_ACK, Trial, TrialPacket};
use crate::ids::PodUid;
use crate::services::index::{TCP, UDP};
use crate::view::{ServiceName, View};

/// The client's port: any that nothing else has is as good; a trial's flows are its own.
const CLIENT_PORT: u16 = 54_321;
/// Backends that are named.
const SHOWN_MAX: usize = 8;

/// What is known.
pub struct ClientFacts {
    /// The state that this node follows.
    pub view: Arc<View>,
    /// This node.
    pub node: String,
    /// The client.
    pub uid: PodUid,
    /// The pods in the packet path.
    pub local: Vec<Local>,
    /// The Service that is asked for, as the maps have it.
    pub programmed: Vec<proto::ProgrammedService>,
}

/// Where packets are sent to.
struct Destination {
    at: SocketAddr,
    protocol: u8,
    /// It is a frontend of this Service.
    frontend_of: Option<ServiceName>,
}

impl ClientFacts {
    fn pod(&self) -> Option<&Arc<Pod>> {
        self.view.pods.get(&self.uid)
    }

    fn namespace(&self) -> &str {
        let pod = self.pod();
        let namespace = pod.and_then(|pod| pod.metadata.namespace.as_deref());
        namespace.unwrap_or("default")
    }

    /// The Service that is meant, if one is.
    pub fn service(&self, request: &proto::ExplainClient) -> Option<ServiceName> {
        match resolve(&self.view, &request.service, self.namespace()) {
            Ok(Target::Service(name)) => Some(name),
            _ => None,
        }
    }
}

/// The story of one connection, as far as this node tells it.
pub fn decide(
    facts: &ClientFacts,
    request: &proto::ExplainClient,
    trial: impl FnOnce() -> Result<Box<dyn Trial>, DataplaneError>,
) -> Result<proto::ExplainHalf, ExplainError> {
    let absent = |what: &str| ExplainError::Absent(format!("pod {} {what}", facts.uid));
    let pod = facts.pod().ok_or_else(|| absent("is not on this node"))?;
    let has_host_network = pod.spec.as_ref().and_then(|s| s.host_network) == Some(true);
    let own = facts.local.iter().find(|local| local.uid == facts.uid);
    let addresses: Vec<IpAddr> = match own {
        Some(local) => local.addresses.clone(),
        None if has_host_network => {
            let node = facts.view.nodes.get(&facts.node);
            let all = node.into_iter().flat_map(|node| &node.addresses);
            all.filter_map(|bytes| address(bytes)).collect()
        }
        None => return Err(absent("has no network yet: it is starting, or has ended")),
    };
    let mut story = Story::default();
    let destination = match destination(facts, request, &addresses, &mut story) {
        Ok(destination) => destination,
        Err((about, text, conclusion)) => return Ok(story.bad(about, text, conclusion)),
    };
    let is_same = |address: &&IpAddr| address.is_ipv4() == destination.at.is_ipv4();
    let Some(source) = addresses.iter().find(is_same) else {
        let text = format!(
            "the pod has no address of the family of {}",
            destination.at.ip()
        );
        return Ok(story.bad("route", &*text, format!("cannot connect: {text}")));
    };
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let Some(own) = own else {
        return Ok(host_network(facts, &destination, *source, name, story));
    };
    let packet = TrialPacket {
        source: SocketAddr::new(*source, CLIENT_PORT),
        destination: destination.at,
        protocol: destination.protocol,
        flags: SYN,
    };
    let mut trial = trial()?;
    let tried = trial.sent(&own.interface, &packet)?;
    if is_refused(&tried) {
        let (text, conclusion) = nobody(facts, &destination);
        return Ok(story.bad("backend", text, conclusion));
    }
    let to = tried.event.map_or(destination.at, |event| {
        let ip = crate::services::index::ip_of(&event.destination);
        SocketAddr::new(ip, u16::from_be(event.destination_port_be))
    });
    let is_translated = tried
        .event
        .is_some_and(|event| event.flags & IS_TRANSLATED != 0);
    let (backend, node) = backend_at(&facts.view, to.ip());
    let shown = placed(&backend, to);
    match (&destination.frontend_of, is_translated) {
        (Some(_), true) => story.good(
            "backend",
            format!(
                "{shown} on node {}; each connection chooses anew",
                known(&node)
            ),
        ),
        // A frontend of this node's own, the resolver, or a pod that has the address.
        (Some(_), false) => story.good("backend", format!("{shown}, without translation")),
        (None, _) => story.good("destination", shown.clone()),
    }
    let policy = policies(
        &facts.view,
        pod,
        true,
        to,
        CLIENT_PORT,
        destination.protocol,
        &shown,
    );
    match (policy_drop(&tried), drop_reason(&tried)) {
        (Some(false), _) => {
            let conclusion = format!("dropped at egress: {}", policy.short);
            return Ok(story.bad("egress", policy.refused, conclusion));
        }
        // The backend is on this node, and its side of the story comes next.
        (Some(true), _) | (None, None) => story.good("egress", policy.allowed),
        (None, Some(reason)) => {
            let conclusion = format!("dropped at {name}: {reason}");
            return Ok(story.bad("egress", format!("dropped: {reason}"), conclusion));
        }
    }
    if own.addresses.contains(&to.ip()) {
        // Put back into it at once; no policy is asked, and nobody else sees it.
        story.good(
            "ingress",
            format!("{name} reaches itself: no policy is asked"),
        );
        story.backend(shown);
        return Ok(story.end());
    }
    let from = match policy_drop(&tried) {
        Some(_) => packet.source,
        None => tried.source,
    };
    let server = proto::ExplainServer {
        client: bytes_of(from.ip()),
        client_port: from.port().into(),
        server: bytes_of(to.ip()),
        server_port: to.port().into(),
        protocol: destination.protocol.into(),
        client_name: name.to_owned(),
        by_node: false,
    };
    let is_here = facts
        .local
        .iter()
        .any(|local| local.addresses.contains(&to.ip()));
    let next_node = if is_here { &facts.node } else { &node };
    if next_node.is_empty() {
        story.conclude(format!(
            "would leave for {shown}: what is beyond this node is not asked"
        ));
    }
    story.next(next_node, shown, server);
    if policy_drop(&tried).is_none() {
        let answer = TrialPacket {
            source: to,
            destination: from,
            protocol: destination.protocol,
            flags: SYN_ACK,
        };
        let back = trial.received(&own.interface, &answer, false)?;
        match drop_reason(&back) {
            None if back.source == destination.at => {
                story.good("answer", format!("reaches {name}, from {}", back.source));
            }
            None => {
                let text = format!(
                    "reaches {name} from {}, which it has not asked",
                    back.source
                );
                let conclusion = format!("the answer is lost: it {text}");
                return Ok(story.bad("answer", text, conclusion));
            }
            Some(reason) => {
                let text = format!("dropped at {name}: {reason}");
                return Ok(story.bad("answer", &*text, format!("the answer is {text}")));
            }
        }
    }
    Ok(story.end())
}

/// What went wrong: about what, in a sentence, as a conclusion.
type Failure = (&'static str, String, String);

fn destination(
    facts: &ClientFacts,
    request: &proto::ExplainClient,
    own: &[IpAddr],
    story: &mut Story,
) -> Result<Destination, Failure> {
    let failed = |about, text: String| (about, text.clone(), format!("cannot connect: {text}"));
    let text = &request.service;
    let target = resolve(&facts.view, text, facts.namespace());
    let name = match target.map_err(|text| failed("name", text))? {
        Target::Service(name) => name,
        Target::Address(ip) => {
            let port = request.port.parse::<u16>().ok().filter(|port| *port > 0);
            let text = format!("{ip} has no named ports: give a number");
            let port = port.ok_or_else(|| failed("port", text))?;
            story.good("name", format!("{ip} is no Service's address"));
            return Ok(Destination {
                at: SocketAddr::new(ip, port),
                protocol: if request.udp { UDP } else { TCP },
                frontend_of: None,
            });
        }
    };
    let words = format!("Service {}/{}", name.namespace, name.name);
    let service = facts.view.services.get(&name);
    let service = service.ok_or_else(|| failed("name", format!("there is no {words}")))?;
    if service.r#type == "ExternalName" {
        let text = format!("{words} is an alias of {}, outside", service.external_name);
        return Err(failed("name", text));
    }
    let port = service_port(service, &request.port, request.udp);
    let port = port.map_err(|text| failed("port", text))?;
    let protocol = u8::try_from(port.protocol).unwrap_or(TCP);
    let number = u16::try_from(port.port).unwrap_or_default();
    let asked = text.trim_matches(['[', ']']).parse::<IpAddr>().ok();
    let all: Vec<IpAddr> = service
        .cluster_ips
        .iter()
        .filter_map(|b| address(b))
        .collect();
    let usable = |ip: &&IpAddr| own.iter().any(|own| own.is_ipv4() == ip.is_ipv4());
    let Some(ip) = asked.or_else(|| all.iter().find(usable).copied()) else {
        return headless(facts, &name, port, own, story).map_err(|text| {
            let conclusion = format!("refused: {text}");
            ("name", text, conclusion)
        });
    };
    match asked {
        Some(ip) => story.good("name", format!("{ip} is an address of {words}")),
        None => story.good("name", format!("{words} has cluster IP {ip}")),
    }
    let at = SocketAddr::new(ip, number);
    let found = facts.programmed.iter().find_map(|programmed| {
        let is_it = |f: &&proto::ProgrammedFrontend| {
            address(&f.address) == Some(ip)
                && f.port == port.port
                && f.protocol == port.protocol
                && f.scope.is_empty()
        };
        Some((programmed, programmed.frontends.iter().find(is_it)?))
    });
    let Some((programmed, frontend)) = found else {
        let stuck = facts.programmed.iter().find(|p| !p.stuck.is_empty());
        let why = stuck.map_or("not there yet".to_owned(), |p| p.stuck.clone());
        let text = format!("{at} is not programmed on node {}: {why}", facts.node);
        return Err(failed("frontend", text));
    };
    let backends = programmed.backends.iter().filter(|b| b.set == frontend.set);
    let shown = backends.map(|backend| {
        let ip = address(&backend.address);
        let ip = ip.map_or("?".to_owned(), |ip| ip.to_string());
        format!(
            "{} {ip}:{} {}",
            known(&backend.pod),
            backend.port,
            backend.state
        )
    });
    let mut shown: Vec<String> = shown.collect();
    let more = shown.len().saturating_sub(SHOWN_MAX);
    shown.truncate(SHOWN_MAX);
    if more > 0 {
        shown.push(format!("and {more} more"));
    }
    let affinity = match frontend.affinity_s {
        0 => String::new(),
        seconds => format!("; a client keeps its backend for {seconds} s (not tried here)"),
    };
    story.good(
        "frontend",
        format!(
            "{at} is programmed (generation {}), backends {}: {}{affinity}",
            frontend.generation,
            frontend.backend_count,
            listed(&shown)
        ),
    );
    Ok(Destination {
        at,
        protocol,
        frontend_of: Some(name),
    })
}

/// The name leads to the backends themselves.
fn headless(
    facts: &ClientFacts,
    name: &ServiceName,
    port: &proto::ServicePort,
    own: &[IpAddr],
    story: &mut Story,
) -> Result<Destination, String> {
    let backends = facts.view.backends.get(name);
    let serving = backends.into_iter().flat_map(|all| all.values());
    let serving = serving.filter(|backend| backend.state() == State::Serving);
    let place = |backend: &Arc<proto::Backend>| {
        let ports = backend.ports.iter();
        let mut ports = ports.filter(|p| p.name == port.name && p.protocol == port.protocol);
        let number = u16::try_from(ports.next()?.port).ok()?;
        let addresses = backend.addresses.iter().filter_map(|bytes| address(bytes));
        let mut usable = addresses.filter(|ip| own.iter().any(|own| own.is_ipv4() == ip.is_ipv4()));
        Some(SocketAddr::new(usable.next()?, number))
    };
    let places: Vec<SocketAddr> = serving.filter_map(place).collect();
    let words = format!("Service {}/{} is headless", name.namespace, name.name);
    let Some(first) = places.first() else {
        return Err(format!(
            "{words}, and no endpoint is ready: {}",
            endpoints(facts, name)
        ));
    };
    let text = format!(
        "{words}: its name has {} addresses, {first} among them",
        places.len()
    );
    story.good("name", text);
    Ok(Destination {
        at: *first,
        protocol: u8::try_from(port.protocol).unwrap_or(TCP),
        frontend_of: None,
    })
}

/// Why a frontend has no backend: in a sentence, and as a conclusion.
fn nobody(facts: &ClientFacts, destination: &Destination) -> (String, String) {
    let why = match &destination.frontend_of {
        Some(name) => endpoints(facts, name),
        None => "none is known".to_owned(),
    };
    (
        format!("no endpoint is ready ({why}): the connection is refused at once"),
        "refused: no endpoint is ready".to_owned(),
    )
}

/// The endpoints of a Service with their states.
fn endpoints(facts: &ClientFacts, name: &ServiceName) -> String {
    let backends = facts.view.backends.get(name);
    let all = backends.into_iter().flat_map(|all| all.values());
    let all = all.map(|backend| {
        let state = match backend.state() {
            State::Serving => "ready",
            State::Draining => "ending",
            State::NotReady => "not ready",
        };
        format!("{} is {state}", known(&backend.pod_name))
    });
    let mut all: Vec<String> = all.collect();
    let more = all.len().saturating_sub(SHOWN_MAX);
    all.truncate(SHOWN_MAX);
    if more > 0 {
        all.push(format!("and {more} more"));
    }
    match all.as_slice() {
        [] => "its selector finds no pod".to_owned(),
        all => all.join(", "),
    }
}

/// Sockets of such pods are translated like everybody's; there is no packet program at them.
fn host_network(
    facts: &ClientFacts,
    destination: &Destination,
    source: IpAddr,
    name: &str,
    mut story: Story,
) -> proto::ExplainHalf {
    let of = |programmed: &proto::ProgrammedService| {
        let mut frontends = programmed.frontends.iter();
        let frontend = frontends.find(|f| {
            address(&f.address) == Some(destination.at.ip())
                && f.port == u32::from(destination.at.port())
        })?;
        let mut backends = programmed.backends.iter();
        let backend = backends.find(|b| b.set == frontend.set && b.state == "in use")?;
        let port = u16::try_from(backend.port).ok()?;
        Some(SocketAddr::new(address(&backend.address)?, port))
    };
    let to = match destination.frontend_of {
        None => Some(destination.at),
        Some(_) => facts.programmed.iter().find_map(of),
    };
    let Some(to) = to else {
        let (text, conclusion) = nobody(facts, destination);
        return story.bad("backend", text, conclusion);
    };
    let (backend, node) = backend_at(&facts.view, to.ip());
    let shown = placed(&backend, to);
    story.good(
        "backend",
        format!("one of them, say {shown} on node {}", known(&node)),
    );
    story.good(
        "egress",
        format!("{name} has the node's network: its sockets are translated, no policy selects it"),
    );
    let server = proto::ExplainServer {
        client: bytes_of(source),
        client_port: CLIENT_PORT.into(),
        server: bytes_of(to.ip()),
        server_port: to.port().into(),
        protocol: destination.protocol.into(),
        client_name: name.to_owned(),
        by_node: node == facts.node,
    };
    story.next(&node, shown, server);
    story.end()
}

/// Whose address this is, as Services know it: `namespace/name` of the pod, and its node.
fn backend_at(view: &View, ip: IpAddr) -> (String, String) {
    let all = view.backends.values().flat_map(|all| all.values());
    let mut at = all.filter(|backend| backend.addresses.iter().any(|b| address(b) == Some(ip)));
    match at.next() {
        Some(backend) if backend.pod_name.is_empty() => (String::new(), backend.node.clone()),
        Some(backend) => (
            format!("{}/{}", backend.pod_namespace, backend.pod_name),
            backend.node.clone(),
        ),
        None => Default::default(),
    }
}

fn known(name: &str) -> &str {
    if name.is_empty() { "(unknown)" } else { name }
}
