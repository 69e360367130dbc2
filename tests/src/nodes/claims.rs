//! What must be so between nodes, whatever joins them.

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use gantry_agent::policy::PolicyName;
use gantry_agent::view::ServiceName;
use gantry_api::proto;
use gantry_cni::netlink::{Netlink, Route};
use gantry_cni::netns::Netns;
use rustix::net::sockopt::{Ipv4PathMtuDiscovery, ip_mtu, set_ip_mtu_discover};

use super::{
    Joined, Lab, Node, PORT, SHORT, SOON, ask, ask_within, eventually, insert_node, inside, octets,
    serve, within,
};

/// Where the Service of node b's pod is.
const CLUSTER_IP: &str = "10.96.0.17";
const NODE_PORT: u16 = 30080;

/// What IPv4 and UDP take of a packet.
const HEADERS: u32 = 28;

/// All of them, one after the other, on one set of nodes; and `more`, once Services reach their backends.
pub fn all(joined: Joined, more: impl FnOnce(&mut Lab) -> Result<()>) -> Result<()> {
    let mut lab = Lab::new(joined)?;
    every_pod_reaches_every_other_by_its_own_address(&lab).context("pods")?;
    a_node_reaches_pods_of_others(&lab).context("node to pod")?;
    a_pod_reaches_the_addresses_of_nodes(&lab).context("pod to node")?;
    services_reach_backends_elsewhere(&mut lab, joined).context("services")?;
    more(&mut lab)?;
    policies_hold_on_the_node_that_receives(&mut lab).context("policy")?;
    if joined == Joined::Router {
        nobody_speaks_through_the_tunnel_for_who_is_not_behind_it(&lab).context("forged")?;
    }
    packets_have_the_size_that_fits(&lab, joined).context("size of packets")?;
    both_families_have_routes(&mut lab).context("IPv6")?;
    routes_are_made_and_kept(&mut lab).context("routes")?;
    nothing_is_left(&lab).context("clean up")
}

/// From each to each, with the client's address, and much data.
pub fn every_pod_reaches_every_other_by_its_own_address(lab: &Lab) -> Result<()> {
    for from in &lab.nodes {
        for to in lab.nodes.iter().filter(|to| to.name != from.name) {
            let server = to.pod.server();
            let seen = from.in_pod(false, || ask(server));
            let seen = seen.with_context(|| format!("{} to {}", from.name, to.name))?;
            ensure!(seen == from.pod.address, "{} is seen as {seen}", from.name);
        }
    }
    Ok(())
}

/// A process of the node itself.
pub fn a_node_reaches_pods_of_others(lab: &Lab) -> Result<()> {
    for from in &lab.nodes {
        for to in lab.nodes.iter().filter(|to| to.name != from.name) {
            let server = to.pod.server();
            let asked = from
                .space
                .run(async move { tokio::task::spawn_blocking(move || ask(server)).await? });
            let seen = asked.with_context(|| format!("{} to {}", from.name, to.name))?;
            // On a link it is the node's address; in the tunnel its pods' gateway, for the answer to come
            // back through the tunnel.
            let own = [from.address, gateway(from)];
            ensure!(own.contains(&seen), "{} is seen as {seen}", from.name);
        }
    }
    Ok(())
}

/// A process of the node itself is asked: by the pod's own address, or by its node's where the answer would
/// come by the tunnel.
pub fn a_pod_reaches_the_addresses_of_nodes(lab: &Lab) -> Result<()> {
    for to in &lab.nodes {
        let server = SocketAddr::new(to.address, PORT + 1);
        serve(&to.space.netns, server)?;
        for from in lab.nodes.iter().filter(|from| from.name != to.name) {
            let is_direct = from
                .routes
                .borrow()
                .reached
                .iter()
                .any(|it| it.node == to.name && it.is_direct);
            let expected = if is_direct {
                from.pod.address
            } else {
                from.address
            };
            eventually("a pod to reach a node", || {
                let seen = from.in_pod(false, || ask(server))?;
                ensure!(
                    seen == expected,
                    "{} to {} is seen as {seen}",
                    from.name,
                    to.name
                );
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// The link of the node that has an address goes down; a client is served by another one, and by the first
/// again when it is back. Needs `ip` and `bridge`; without them the scenario `nodes-lb-power-cut` shows it.
pub fn a_balancer_address_moves_when_its_node_has_gone(lab: &mut Lab) -> Result<()> {
    let name = ServiceName {
        namespace: "default".into(),
        name: "web".into(),
    };
    let services = Arc::make_mut(&mut lab.view.services);
    let mut service = proto::Service::clone(services.get(&name).context("no Service")?);
    let addresses = (200..216).map(|last| IpAddr::from([192, 0, 2, last]));
    let addresses: Vec<IpAddr> = addresses.collect();
    service.r#type = "LoadBalancer".into();
    service.load_balancer_ips = addresses.iter().map(|it| octets(*it).into()).collect();
    services.insert(name.clone(), Arc::new(service));
    lab.publish()?;
    // The backend is on b, and sees by whom a client has come.
    let by = |address: IpAddr| inside(&lab.client.netns, || ask(SocketAddr::new(address, 80)));
    let all = || -> Result<Vec<IpAddr>> {
        run(&lab.client.netns, "ip", &["neigh", "flush", "dev", "eth0"])?;
        let asked = addresses.iter();
        asked
            .map(|it| eventually("an address to answer", || by(*it)))
            .collect()
    };
    let first = all()?;
    // Longer than a node that has gone is believed to be there.
    std::thread::sleep(Duration::from_secs(3));
    let then = all()?;
    ensure!(
        first == then,
        "{first:?} became {then:?} though everybody is there"
    );
    let mut found = addresses.iter().zip(&then).filter_map(|(address, seen)| {
        let node = lab.nodes.iter().find(|node| node.address == *seen)?;
        Some((*address, node))
    });
    let (address, node) = found.next().context("b has all addresses")?;
    let port = format!("to-{}", node.name);
    let set = |state: &str| run(&lab.middle.netns, "ip", &["link", "set", &port, state]);
    // A switch that does not notice: else what is sent to the node floods, and any node takes it.
    let mac: Vec<String> = octets(node.address)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let mac = format!("02:00:{}", mac.join(":"));
    let fdb = |verb: &str| {
        run(
            &lab.middle.netns,
            "bridge",
            &["fdb", verb, &mac, "dev", &port, "master", "static"],
        )
    };
    fdb("replace")?;
    set("down")?;
    let began = Instant::now();
    let reached = || {
        let at = SocketAddr::new(address, 80);
        let limit = Duration::from_millis(200);
        inside(&lab.client.netns, || {
            Ok(TcpStream::connect_timeout(&at, limit)?)
        })
    };
    while reached().is_err() {
        ensure!(
            began.elapsed() < Duration::from_secs(20),
            "nobody took {address} over"
        );
    }
    let silence = began.elapsed();
    eprintln!(
        "{address} of {} was silent for {} ms",
        node.name,
        silence.as_millis()
    );
    // Three seconds, and what a loaded machine adds.
    ensure!(silence < Duration::from_secs(6), "{silence:?}");
    let seen = by(address).context("after the take-over")?;
    ensure!(seen != node.address, "by {seen}, whose link is down");
    set("up")?;
    fdb("del")?;
    // A connection that the move cuts in two is given up soon: there is time for others.
    within(SOON * 4, "the address to be back", || {
        let at = SocketAddr::new(address, 80);
        let seen = inside(&lab.client.netns, || ask_within(SHORT, at))?;
        ensure!(seen == node.address, "by {seen}");
        Ok(())
    })?;
    let services = Arc::make_mut(&mut lab.view.services);
    let mut service = proto::Service::clone(services.get(&name).context("no Service")?);
    service.load_balancer_ips.clear();
    services.insert(name, Arc::new(service));
    lab.publish()
}

fn run(netns: &Netns, program: &str, words: &[&str]) -> Result<()> {
    inside(netns, || {
        let output = Command::new(program).args(words).output();
        let output = output.with_context(|| program.to_owned())?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.success(),
            "{program} {}: {said}",
            words.join(" ")
        );
        Ok(())
    })
}

fn gateway(node: &Node) -> IpAddr {
    match node.prefix.network() {
        IpAddr::V4(net) => (u32::from(net) + 1).to_be_bytes().into(),
        v6 => v6,
    }
}

/// By the hooks at sockets, by the packet's way, and by a node port from outside.
pub fn services_reach_backends_elsewhere(lab: &mut Lab, joined: Joined) -> Result<()> {
    let b = lab.node("b");
    let service = proto::Service {
        cluster_ips: vec![octets(CLUSTER_IP.parse()?).into()],
        ports: vec![proto::ServicePort {
            protocol: 6,
            port: 80,
            node_port: NODE_PORT.into(),
            ..Default::default()
        }],
        r#type: "NodePort".into(),
        ..Default::default()
    };
    let backend = proto::Backend {
        addresses: vec![octets(b.pod.address).into()],
        ports: vec![proto::BackendPort {
            protocol: 6,
            port: PORT.into(),
            ..Default::default()
        }],
        node: "b".into(),
        pod_uid: b.pod.uid.to_string(),
        ..Default::default()
    };
    let name = ServiceName {
        namespace: "default".into(),
        name: "web".into(),
    };
    let backends = std::iter::once(("b".to_owned(), Arc::new(backend))).collect();
    Arc::make_mut(&mut lab.view.services).insert(name.clone(), Arc::new(service));
    Arc::make_mut(&mut lab.view.backends).insert(name, Arc::new(backends));
    lab.publish()?;
    let frontend = SocketAddr::new(CLUSTER_IP.parse()?, 80);
    for from in ["a", "c", "b"] {
        let from = lab.node(from);
        for by_socket in [true, false] {
            let how = if by_socket { "socket" } else { "packets" };
            let seen = from.in_pod(by_socket, || ask(frontend));
            let seen = seen.with_context(|| format!("{} by {how}", from.name))?;
            ensure!(
                from.name == "b" || seen == from.pod.address,
                "{} by {how}: {seen}",
                from.name
            );
        }
    }
    // The node that was asked is who the backend sees elsewhere.
    let port = |node: &Node| SocketAddr::new(node.address, NODE_PORT);
    let from_outside = |server: SocketAddr| inside(&lab.client.netns, || ask(server));
    let (a, b) = (lab.node("a"), lab.node("b"));
    let expected = match joined {
        Joined::Link => a.address,
        Joined::Router => gateway(a),
    };
    let seen = eventually("node port", || from_outside(port(a)))?;
    ensure!(
        seen == expected,
        "node port of a: seen as {seen}, want {expected}"
    );
    let seen = from_outside(port(b)).context("node port where the backend is")?;
    ensure!(
        seen == "192.0.2.99".parse::<IpAddr>()?,
        "node port of b: seen as {seen}"
    );
    Ok(())
}

/// Node b lets only the pod of node a in.
pub fn policies_hold_on_the_node_that_receives(lab: &mut Lab) -> Result<()> {
    let peer = proto::PolicyPeer {
        addresses: vec![octets(lab.node("a").pod.address).into()],
        ports: Vec::new(),
    };
    let members = std::iter::once(("default/a".to_owned(), Arc::new(peer))).collect();
    Arc::make_mut(&mut lab.view.peers).insert("a".into(), Arc::new(members));
    let policy = proto::Policy {
        pod_selector_json: br#"{"matchLabels":{"app":"b"}}"#.as_slice().to_vec().into(),
        ingress: true,
        incoming: vec![proto::PolicyRule {
            sets: vec!["a".into()],
            any_port: true,
            ..Default::default()
        }],
        ..Default::default()
    };
    let name = PolicyName {
        namespace: "default".into(),
        name: "only-a".into(),
    };
    Arc::make_mut(&mut lab.view.policies).insert(name.clone(), Arc::new(policy));
    lab.publish()?;
    let server = lab.node("b").pod.server();
    let seen = lab
        .node("a")
        .in_pod(false, || ask(server))
        .context("who is allowed")?;
    ensure!(seen == lab.node("a").pod.address);
    if let Ok(seen) = lab.node("c").in_pod(false, || ask(server)) {
        bail!("c is not allowed and was let in as {seen}");
    }
    // By the Service too: it is the pod's own address that counts.
    let frontend = SocketAddr::new(CLUSTER_IP.parse()?, 80);
    lab.node("a")
        .in_pod(true, || ask(frontend))
        .context("allowed, by the Service")?;
    if lab.node("c").in_pod(true, || ask(frontend)).is_ok() {
        bail!("c is let in by the Service");
    }
    Arc::make_mut(&mut lab.view.policies).remove(&name);
    lab.publish()
}

/// A machine that is no node sends to the tunnel's port of node a, as if it were a pod.
pub fn nobody_speaks_through_the_tunnel_for_who_is_not_behind_it(lab: &Lab) -> Result<()> {
    let (a, b, c) = (lab.node("a"), lab.node("b"), lab.node("c"));
    let server = inside(&a.pod.netns, || Ok(UdpSocket::bind((a.pod.address, 0))?))?;
    server.set_read_timeout(Some(SHORT))?;
    let to = server.local_addr()?;
    let said = |source: IpAddr| -> Result<bool> {
        let frame = encapsulated(a, source, to)?;
        let sender = inside(&lab.client.netns, || Ok(UdpSocket::bind("0.0.0.0:0")?))?;
        sender.send_to(&frame, (a.address, 4789))?;
        Ok(server.recv(&mut [0; 64]).is_ok())
    };
    // The packet is a good one: from behind the tunnel it would have come.
    ensure!(said(b.pod.address)?, "not even a pod of b is heard");
    for forged in [
        c.pod.address,
        a.pod.address,
        c.address,
        "192.0.2.99".parse()?,
    ] {
        ensure!(!said(forged)?, "{forged} is believed");
    }
    Ok(())
}

/// A datagram to a pod of `node`, as a peer's tunnel would send it.
fn encapsulated(node: &Node, source: IpAddr, to: SocketAddr) -> Result<Vec<u8>> {
    let payload = b"forged";
    let udp_length = 8 + payload.len() as u16;
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_length).to_be_bytes());
    ip.extend([0, 1, 0, 0, 64, 17, 0, 0]);
    ip.extend(octets(source));
    ip.extend(octets(to.ip()));
    let words = ip
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let vni = gantry_cni::tunnel::VNI_DEFAULT << 8;
    let mut frame = vec![8, 0, 0, 0];
    frame.extend(vni.to_be_bytes());
    frame.extend(gantry_cni::tunnel::mac_of_node(node.address));
    frame.extend([0x0e, 0x47, 9, 9, 9, 9, 8, 0]);
    frame.extend(ip);
    for word in [40_000, to.port(), udp_length, 0] {
        frame.extend(word.to_be_bytes());
    }
    frame.extend(payload);
    Ok(frame)
}

/// Nothing larger than what every way carries is sent, and who does so is told.
pub fn packets_have_the_size_that_fits(lab: &Lab, joined: Joined) -> Result<()> {
    let expected = match joined {
        Joined::Link => 1500,
        Joined::Router => 1450,
    };
    for node in &lab.nodes {
        eventually("size of a pod's packets", || {
            let mtu = node.pod_mtu()?;
            ensure!(mtu == expected, "{}: {mtu}, want {expected}", node.name);
            Ok(())
        })?;
    }
    let (a, b) = (lab.node("a"), lab.node("b"));
    at_the_edge(a, b, expected)?;
    // A pod that sends larger ones is told so by its node, policy or not.
    a.set_pod_mtu(9000)?;
    is_told(a, b, expected).context("a pod with larger packets")?;
    a.set_pod_mtu(expected)?;
    // The uplink takes smaller packets from now on: so do the pods that run.
    for node in &lab.nodes {
        node.set_uplink_mtu(1400)?;
    }
    let smaller = expected - 100;
    for node in &lab.nodes {
        eventually("smaller packets", || {
            let mtu = node.pod_mtu()?;
            ensure!(mtu == smaller, "{}: {mtu}, want {smaller}", node.name);
            Ok(())
        })?;
    }
    at_the_edge(a, b, smaller)?;
    every_pod_reaches_every_other_by_its_own_address(lab)?;
    for node in &lab.nodes {
        node.set_uplink_mtu(1500)?;
    }
    for node in &lab.nodes {
        eventually("larger packets again", || {
            let mtu = node.pod_mtu()?;
            ensure!(mtu == expected, "{}: {mtu}, want {expected}", node.name);
            Ok(())
        })?;
    }
    at_the_edge(a, b, expected)
}

/// UDP sockets of two pods; the first one's packets must not be fragmented.
fn datagrams(from: &Node, to: &Node) -> Result<(UdpSocket, UdpSocket)> {
    let server = inside(&to.pod.netns, || Ok(UdpSocket::bind((to.pod.address, 0))?))?;
    let client = inside(&from.pod.netns, || {
        Ok(UdpSocket::bind((from.pod.address, 0))?)
    })?;
    set_ip_mtu_discover(&client, Ipv4PathMtuDiscovery::DO)?;
    client.connect(server.local_addr()?)?;
    server.set_read_timeout(Some(SHORT))?;
    Ok((client, server))
}

/// The largest packet arrives whole, and one byte more is refused to its sender.
fn at_the_edge(from: &Node, to: &Node, mtu: u32) -> Result<()> {
    let (client, server) = datagrams(from, to)?;
    let largest = vec![7; (mtu - HEADERS) as usize];
    client
        .send(&largest)
        .with_context(|| format!("{mtu} bytes"))?;
    let mut buffer = vec![0; 10_000];
    let length = server
        .recv(&mut buffer)
        .with_context(|| format!("{mtu} bytes"))?;
    ensure!(length == largest.len(), "{length} of {}", largest.len());
    let more = [largest.as_slice(), &[7]].concat();
    match client.send(&more) {
        Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => Ok(()),
        other => bail!("{} bytes were not refused: {other:?}", mtu + 1),
    }
}

/// Packets that are too large for the way: an ICMP error comes back, and the socket knows the size.
fn is_told(from: &Node, to: &Node, mtu: u32) -> Result<()> {
    let (client, server) = datagrams(from, to)?;
    eventually("an ICMP error reaches the pod", || {
        // Refused is what we wait for.
        drop(client.send(&vec![7; (mtu + 1 - HEADERS) as usize]));
        let known = path_mtu(&client)?;
        ensure!(known == mtu, "the pod knows {known}, want {mtu}");
        Ok(())
    })?;
    // The error is also the socket's own until somebody has taken it.
    client.take_error()?;
    let largest = vec![7; (mtu - HEADERS) as usize];
    client.send(&largest)?;
    let mut buffer = vec![0; 10_000];
    let length = server.recv(&mut buffer).context("what fits")?;
    ensure!(length == largest.len(), "{length} of {}", largest.len());
    Ok(())
}

/// What a connected socket knows of its way.
fn path_mtu(socket: &UdpSocket) -> Result<u32> {
    Ok(ip_mtu(socket)?)
}

/// Pods have no IPv6 addresses yet; their nodes' gateways stand for them.
pub fn both_families_have_routes(lab: &mut Lab) -> Result<()> {
    if !std::path::Path::new("/proc/net/if_inet6").exists() {
        println!("skipped: IPv6 between nodes: the kernel has none");
        return Ok(());
    }
    let before = lab.view.clone();
    for (index, node) in lab.nodes.iter().enumerate() {
        let last = index + 1;
        // A node behind the router has no IPv6 address: its pods' IPv6 goes in the tunnel over IPv4.
        let is_near = node.address.to_string().starts_with("192.0.2.");
        let mut own = vec![("gantry0", format!("fd00:{last}::1/64"))];
        own.extend(is_near.then(|| ("eth0", format!("2001:db8::{last}/64"))));
        node.space.run(async move {
            let host = Netlink::open()?;
            for (name, address) in own {
                let link = host
                    .link_by_name(name)
                    .await?
                    .with_context(|| name.to_owned())?;
                host.ensure_address(link.index, address.parse()?).await?;
            }
            Ok(())
        })?;
        let v6 = is_near
            .then(|| format!("2001:db8::{last}").parse())
            .transpose()?;
        let addresses = std::iter::once(node.address).chain(v6);
        let route = proto::NodeRoute {
            pod_cidr: format!("{},fd00:{last}::/64", node.prefix),
            addresses: addresses.map(|it| octets(it).into()).collect(),
            ..Default::default()
        };
        Arc::make_mut(&mut lab.view.nodes).insert(node.name.into(), Arc::new(route));
    }
    lab.publish()?;
    for (from, to, last) in [("a", "b", 2), ("b", "c", 3), ("a", "c", 3), ("c", "b", 2)] {
        let server: SocketAddr = format!("[fd00:{last}::1]:{PORT}").parse()?;
        super::serve_once(&lab.node(to).space, server)?;
        let from = lab.node(from);
        let asked = eventually("an answer", || {
            from.space
                .run(async move { tokio::task::spawn_blocking(move || ask(server)).await? })
        });
        asked.with_context(|| format!("{} to {to}, {:?}", from.name, from.own_routes()))?;
    }
    lab.view.nodes = before.nodes;
    lab.publish()?;
    let a = lab.node("a");
    eventually("IPv6 routes go", || {
        let ours = a.own_routes()?;
        ensure!(ours.len() == 2, "{ours:?}");
        Ok(())
    })
}

/// Before the look that comes now and then, also after somebody has removed one; foreign ones are left alone; a node that goes has
/// none; without an agent they stay.
pub fn routes_are_made_and_kept(lab: &mut Lab) -> Result<()> {
    let server = lab.node("b").pod.server();
    let prefix = lab.node("b").prefix.to_string();
    // Somebody removes it.
    lab.node("a").space.run(async move {
        let host = Netlink::open()?;
        for route in host.routes().await? {
            if route.destination.to_string() == prefix {
                host.remove_route(&route).await?;
            }
        }
        Ok(())
    })?;
    let began = Instant::now();
    eventually("a removed route is back", || {
        lab.node("a").in_pod(false, || ask(server))
    })?;
    println!("a removed route is back after {:?}", began.elapsed());

    // A foreign route, and one that is in the way of a node that comes.
    let foreign = Route {
        destination: "10.244.7.0/24".parse()?,
        gateway: Some("192.0.2.254".parse()?),
        protocol: 4,
        ..Route::default()
    };
    let made = foreign.clone();
    lab.node("a")
        .space
        .run(async move { Ok(Netlink::open()?.create_route(&made).await?) })?;
    let stranger = proto::NodeRoute {
        pod_cidr: "10.244.7.0/24".into(),
        addresses: vec![octets("192.0.2.7".parse()?).into()],
        ..Default::default()
    };
    Arc::make_mut(&mut lab.view.nodes).insert("d".into(), Arc::new(stranger));
    lab.publish()?;
    let a = lab.node("a");
    eventually("the problem is said", || {
        let problems = a.routes.borrow().problems.join("; ");
        let is_said = problems.contains("10.244.7.0/24 via 192.0.2.254 dev eth0 (proto 4)");
        ensure!(is_said, "{problems}");
        Ok(())
    })?;
    let again = foreign.clone();
    a.space.run(async move {
        let host = Netlink::open()?;
        let there = host.routes().await?;
        ensure!(
            there
                .iter()
                .any(|it| it.protocol == 4 && it.destination == again.destination)
        );
        Ok(host.remove_route(&again).await?)
    })?;
    eventually("what was in the way has gone", || {
        let ours = a.own_routes()?;
        ensure!(
            ours.iter().any(|it| it.starts_with("10.244.7.0/24")),
            "{ours:?}"
        );
        Ok(())
    })?;
    Arc::make_mut(&mut lab.view.nodes).remove("d");
    lab.publish()?;
    let a = lab.node("a");
    eventually("a node that goes has no route", || {
        let ours = a.own_routes()?;
        ensure!(
            !ours.iter().any(|it| it.starts_with("10.244.7.0/24")),
            "{ours:?}"
        );
        Ok(())
    })?;

    // A node leaves and comes back.
    Arc::make_mut(&mut lab.view.nodes).remove("b");
    lab.publish()?;
    let a = lab.node("a");
    eventually("b has gone", || {
        ensure!(a.own_routes()?.len() == 1);
        Ok(())
    })?;
    let b = lab.node("b");
    let mut view = lab.view.clone();
    insert_node(&mut view, b);
    lab.view = view;
    lab.publish()?;
    let began = Instant::now();
    let a = lab.node("a");
    eventually("b is back", || {
        ensure!(a.own_routes()?.len() == 2);
        Ok(())
    })?;
    println!(
        "a node that comes has its route after {:?}",
        began.elapsed()
    );
    eventually("and answers", || a.in_pod(false, || ask(server)))?;

    // Nobody follows any more.
    lab.nodes.iter().for_each(Node::kill_agent);
    std::thread::sleep(SHORT);
    every_pod_reaches_every_other_by_its_own_address(lab).context("without an agent")
}

/// As `gantry-agent cleanup` does it.
pub fn nothing_is_left(lab: &Lab) -> Result<()> {
    for node in &lab.nodes {
        let left = node.clean_up()?;
        ensure!(left.is_empty(), "{}: {left:?}", node.name);
        let ours = node.own_routes()?;
        ensure!(ours.is_empty(), "{}: {ours:?}", node.name);
        let default = node
            .space
            .run(async { Ok(Netlink::open()?.uplink_mtu().await?) })?;
        ensure!(
            default.is_some(),
            "the default route of {} is gone",
            node.name
        );
    }
    Ok(())
}
