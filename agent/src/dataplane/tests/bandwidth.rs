//! Pods that are held to a bandwidth, by TCP between namespaces, and what it costs pods without one.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::wires::{GATEWAY, Namespace, V4, V6, Wires, at, interface, tcp_between};
use crate::dataplane::Bandwidth;

const TIME: Duration = Duration::from_millis(2000);
/// The SYN may meet a bucket that the measure before has emptied.
const PATIENCE: Duration = Duration::from_secs(10);

/// The bits per second that `to` gets from `from` by one connection.
fn rate(from: &Namespace, to: &Namespace, server: SocketAddr) -> f64 {
    let listener = to.listen(server);
    let mut client = from
        .run(|| TcpStream::connect_timeout(&server, PATIENCE))
        .unwrap();
    let (mut accepted, _) = listener.accept().unwrap();
    let end = Instant::now() + TIME;
    client.set_write_timeout(Some(TIME)).unwrap();
    let writer = std::thread::spawn(move || {
        let block = vec![7_u8; 64 * 1024];
        while Instant::now() < end && client.write(&block).is_ok() {}
    });
    accepted.set_read_timeout(Some(TIME)).unwrap();
    let (begun, mut received) = (Instant::now(), 0_u64);
    let mut buffer = vec![0; 256 * 1024];
    while Instant::now() < end {
        match accepted.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(length) => received += length as u64,
        }
    }
    let seconds = begun.elapsed().max(TIME).as_secs_f64();
    drop(accepted);
    writer.join().unwrap();
    received as f64 * 8.0 / seconds
}

/// Pod 0 with these limits.
fn limit(wires: &mut Wires, bandwidth: Bandwidth) {
    let programs = &mut wires.programs;
    wires.node.run(|| {
        let mut limited = interface(0);
        limited.bandwidth = bandwidth;
        programs.attach(&limited).unwrap();
    });
}

const BITS: [u64; 2] = [20_000_000, 100_000_000];

#[test]
fn a_pod_is_held_to_its_bandwidth_in_each_direction() {
    let Some(mut wires) = Wires::attached() else {
        return;
    };
    let (mut port, mut shown) = (9000, Vec::new());
    let mut measure = |wires: &Wires, is_sender: bool, family: usize| {
        port += 1;
        let [own, other] = &wires.pods;
        let addresses = [V4, V6][family];
        match is_sender {
            true => rate(own, other, at(addresses[1], port)),
            false => rate(other, own, at(addresses[0], port)),
        }
    };
    let free = [true, false].map(|is_sender| measure(&wires, is_sender, 0));
    for (family, bits) in BITS.into_iter().enumerate() {
        for is_sender in [true, false] {
            let only = Some(bits);
            limit(
                &mut wires,
                match is_sender {
                    true => Bandwidth {
                        egress: only,
                        ..Bandwidth::default()
                    },
                    false => Bandwidth {
                        ingress: only,
                        ..Bandwidth::default()
                    },
                },
            );
            let own = measure(&wires, is_sender, family) / bits as f64;
            let other = measure(&wires, !is_sender, family) / bits as f64;
            shown.push((bits, is_sender, own, other));
        }
    }
    eprintln!("free {free:?}; bits/s, sender, of the limit, the other way: {shown:?}");
    for (bits, is_sender, own, other) in shown {
        assert!(
            (0.25..1.5).contains(&own),
            "{bits} {is_sender}: {own} of the limit"
        );
        // Acknowledgements are of a direction too, and few.
        assert!(other > 1.5, "{bits} {is_sender}: {other} the other way");
    }
    assert!(wires.dropped("bandwidth") > 0);
    // What comes through the node's network is counted like that of another pod.
    let ingress = Some(BITS[0]);
    limit(
        &mut wires,
        Bandwidth {
            ingress,
            ..Bandwidth::default()
        },
    );
    let own = rate(&wires.node, &wires.pods[0], at(V4[0], 9100)) / BITS[0] as f64;
    assert!((0.25..1.5).contains(&own), "from the node: {own}");
    // The annotation has gone, and so has the limit; nothing stays behind.
    limit(&mut wires, Bandwidth::default());
    let own = rate(&wires.pods[0], &wires.pods[1], at(V4[1], 9101));
    assert!(own > 2.0 * BITS[1] as f64, "{own}");
    let before = wires.dropped("bandwidth");
    tcp_between(&wires.pods[0], &wires.node, at(GATEWAY, 9102)).unwrap();
    assert_eq!(wires.dropped("bandwidth"), before);
    assert_eq!(rows(&wires), 0);
}

fn rows(wires: &Wires) -> usize {
    use super::maps::Maps;
    use ebpf_maps::bandwidth::{BandwidthKey, BandwidthValue};
    let map = wires.hash::<BandwidthKey, BandwidthValue>("BANDWIDTH");
    map.keys().count()
}

#[test]
fn a_limit_ends_with_its_pod() {
    let Some(mut wires) = Wires::attached() else {
        return;
    };
    let both = Bandwidth {
        ingress: Some(BITS[0]),
        egress: Some(BITS[0]),
    };
    limit(&mut wires, both);
    limit(&mut wires, both);
    assert_eq!(rows(&wires), 2);
    wires.programs.retain(std::iter::empty()).unwrap();
    assert_eq!(rows(&wires), 0);
}
