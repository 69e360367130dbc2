//! Pods that are no ports of a bridge: their packets are put into each other past the node's stack, as
//! on a bridge, and everybody else comes by the node's routes.

use super::bed::ip;
use super::outside::{Outside, reaches_everywhere};
use super::passage::{NODE, reaches, reaches_itself};
use super::wires::{
    SHORT, V4, V6, Wires, at, everything_passes, interface, received, tcp_between, udp_between,
};

/// Whether the node sends on what is for somebody else.
fn forward(wires: &Wires, is_on: bool) {
    let value = if is_on { "1" } else { "0" };
    wires.node.run(|| {
        for name in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            std::fs::write(format!("/proc/sys/net/{name}"), value).unwrap();
        }
    });
}

#[test]
fn routed_pods_reach_each_other_past_the_nodes_stack() {
    let Some(mut wires) = Wires::routed() else {
        return;
    };
    everything_passes(&wires);
    // The stack would not do it: what passes now was put into the pod.
    forward(&wires, false);
    everything_passes(&wires);
    // Not at once, as at a third party's wiring: then it is the stack that does it.
    let programs = &mut wires.programs;
    wires.node.run(|| {
        for pod in [0, 1] {
            let mut interface = interface(pod);
            interface.direct = false;
            programs.attach(&interface).unwrap();
        }
    });
    let [a, b] = &wires.pods;
    for server in [at(V4[1], 8085), at(V6[1], 8085)] {
        udp_between(a, b, server).unwrap_err();
    }
    forward(&wires, true);
    everything_passes(&wires);
}

#[test]
fn services_lead_routed_pods_to_another_to_the_node_and_to_themselves() {
    let Some(wires) = Wires::routed() else {
        return;
    };
    for family in [0, 1] {
        reaches(&wires, family, &wires.pods[1], [V4, V6][family][1], 8080);
        reaches(&wires, family, &wires.node, NODE[family], 8085);
    }
    reaches_itself(&wires);
    assert_eq!(wires.dropped("flows_full") + wires.dropped("malformed"), 0);
}

#[test]
fn a_client_outside_reaches_routed_pods() {
    let outside = Wires::routed().and_then(|wires| Outside::around(wires, None));
    if let Some(outside) = outside {
        reaches_everywhere(&outside);
    }
}

#[test]
fn a_routed_pod_cannot_send_with_an_address_of_another() {
    let Some(wires) = Wires::routed() else {
        return;
    };
    let [a, b] = &wires.pods;
    a.run(|| {
        ip("addr add 10.244.0.99/32 dev eth0");
        ip("addr add fd00:244::99/128 dev eth0 nodad");
    });
    for (server, client) in [(V4[1], "10.244.0.99:0"), (V6[1], "[fd00:244::99]:0")] {
        let before = wires.dropped("source_address");
        let server = at(server, 9090);
        let receiver = b.bind(server);
        receiver.set_read_timeout(Some(SHORT)).unwrap();
        let sender = a.bind(client);
        sender.send_to(b"forged", server).unwrap();
        received(&receiver, &mut [0; 8]).unwrap_err();
        assert!(wires.dropped("source_address") > before, "{client}");
    }
    tcp_between(b, a, at(V4[0], 9091)).unwrap();
}
