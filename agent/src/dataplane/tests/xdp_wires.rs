//! XDP on an uplink between real namespaces: what a client outside reaches with it, that it is replaced and
//! removed without a trace, and that where it cannot be nothing changes.
//!
//! Packets of this machine have no sum yet where a veth hands them over, and are left to `from_netdev`; so
//! the client and the other node are told to make sums themselves, as network cards deliver them.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use aya::maps::{Map, PerCpuArray};
use ebpf_maps::counter::XDP_SENT;
use ebpf_maps::uplink::{UplinkValue, XDP_NATIVE, XDP_OFF};
use gantry_cni::uplinks::Uplink;
use nix::net::if_::if_nametoindex;

use super::bed::{SUMS, ip, set_offload};
use super::maps::Maps;
use super::outside::{CLIENT, MAC, NODE, Outside, REMOTE};
use super::wires::{SHORT, V4, V6, at, received};
use crate::dataplane::uplinks::UplinkPrograms;
use crate::dataplane::{XdpMode, hooks, load, remove_all, sys, xdp};

/// A new agent, which finds what is there, with such a flag.
fn restart(outside: &mut Outside, mode: XdpMode) {
    let mut ebpf = load::load(&outside.wires.paths).unwrap().ebpf;
    let uplinks = UplinkPrograms::take(&mut ebpf, &outside.wires.paths, mode);
    outside.wires.uplinks = uplinks.unwrap();
    outside.attach();
}

/// Sums are made by who sends, as network cards deliver them.
fn complete_sums(outside: &Outside) {
    for namespace in [&outside.client, &outside.other] {
        namespace.run(|| set_offload("eth0", SUMS, false));
    }
}

/// A veth takes frames of its other end's driver while it has a program itself: one that finds nothing to do.
fn take_frames(outside: &Outside) -> OwnedFd {
    let mut ebpf = load::open(&load::map_directory(&outside.wires.paths), true).unwrap();
    let program = load::load_program(&mut ebpf, xdp::PROGRAM).unwrap();
    let program = program.as_fd();
    outside.lan.run(|| {
        let ifindex = if_nametoindex("port1").unwrap();
        sys::link_create_xdp(program, ifindex).unwrap()
    })
}

fn sent_count(outside: &Outside) -> u64 {
    let counters = Map::PerCpuArray(outside.wires.data("COUNTERS"));
    let counters = PerCpuArray::<_, u64>::try_from(counters).unwrap();
    counters.get(&XDP_SENT, 0).unwrap().iter().sum()
}

/// What the kernel says is on the uplink: `xdp` and the program's number, as `ip` words it.
fn on_uplink(outside: &Outside) -> String {
    let shown = outside.wires.node.run(|| {
        let mut show = std::process::Command::new("ip");
        show.args(["-d", "link", "show", "eth0"]).output().unwrap()
    });
    String::from_utf8_lossy(&shown.stdout).into_owned()
}

fn pins(outside: &Outside) -> Vec<String> {
    let mut pins = outside.wires.pins();
    pins.retain(|pin| pin.contains("xdp"));
    pins
}

fn row(outside: &Outside) -> u8 {
    let uplinks = outside.wires.hash::<u32, UplinkValue>("UPLINKS");
    let ifindex = outside.wires.node.run(|| if_nametoindex("eth0").unwrap());
    uplinks.get(&ifindex, 0).unwrap().xdp
}

#[test]
fn a_client_outside_reaches_backends_everywhere() {
    let Some(mut outside) = Outside::new(None) else {
        return;
    };
    let _other_end = take_frames(&outside);
    restart(&mut outside, XdpMode::Native);
    assert!(
        on_uplink(&outside).contains(" xdp "),
        "{}",
        on_uplink(&outside)
    );
    for complete in [false, true] {
        if complete {
            complete_sums(&outside);
        }
        for family in [0, 1] {
            let before = sent_count(&outside);
            let backend = at([V4, V6][family][0], 8080);
            let frontend = outside.node_port(family, &[backend]);
            let seen = outside.reaches(frontend, &outside.wires.pods[0], backend);
            let client = at(CLIENT[family], 0).ip();
            assert!(seen.iter().all(|seen| seen.ip() == client), "{seen:?}");
            assert_eq!(sent_count(&outside), before, "its own pods' are left");
            let backend = at(REMOTE[family], 8080);
            let frontend = outside.node_port(family, &[backend]);
            let seen = outside.reaches(frontend, &outside.other, backend);
            let node = at(NODE[family], 0).ip();
            assert!(seen.iter().all(|seen| seen.ip() == node), "{seen:?}");
            let sent = sent_count(&outside) - before;
            assert_eq!(
                sent > 100,
                complete,
                "{sent} of packets whose sum is complete: {complete}"
            );
        }
    }
    for reason in ["flows_full", "malformed", "no_source", "ttl"] {
        assert_eq!(outside.wires.dropped(reason), 0, "{reason}");
    }
}

#[test]
fn agents_come_and_go_while_a_client_is_served() {
    let Some(mut outside) = Outside::new(None) else {
        return;
    };
    complete_sums(&outside);
    let _other_end = take_frames(&outside);
    restart(&mut outside, XdpMode::Native);
    let backend = at(REMOTE[0], 8080);
    let frontend = outside.node_port(0, &[backend]);
    let server = outside.other.bind(backend);
    server.set_read_timeout(Some(SHORT)).unwrap();
    let client = outside.client.bind("0.0.0.0:0");
    client.set_read_timeout(Some(SHORT)).unwrap();
    let pin = hooks::directory(&outside.wires.paths).join(&pins(&outside)[0]);
    let link = || sys::link_info(sys::open_pinned(&pin).unwrap().as_fd()).unwrap();
    let first = link();
    let (answered, lost) = (AtomicU32::new(0), AtomicU32::new(0));
    let (ends, all_asked) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        // It ends after the client: else the last question of all may have nobody to answer it.
        scope.spawn(|| {
            let mut buffer = [0; 16];
            while !all_asked.load(Ordering::Relaxed) {
                if let Ok((_, from)) = received(&server, &mut buffer) {
                    server.send_to(b"answer", from).unwrap();
                }
            }
        });
        scope.spawn(|| {
            let mut buffer = [0; 16];
            while !ends.load(Ordering::Relaxed) {
                client.send_to(b"question", frontend).unwrap();
                match received(&client, &mut buffer) {
                    Ok(_) => answered.fetch_add(1, Ordering::Relaxed),
                    Err(_) => lost.fetch_add(1, Ordering::Relaxed),
                };
            }
            all_asked.store(true, Ordering::Relaxed);
        });
        for _ in 0..10 {
            restart(&mut outside, XdpMode::Native);
        }
        ends.store(true, Ordering::Relaxed);
    });
    let last = link();
    assert_eq!(last.id, first.id, "it is the same link");
    assert_ne!(last.program_id, first.program_id, "with another program");
    let [answered, lost] = [answered, lost].map(AtomicU32::into_inner);
    assert!(
        answered > 20 && lost == 0,
        "{answered} answered, {lost} lost"
    );
    assert!(sent_count(&outside) > u64::from(answered));
}

#[test]
fn it_goes_with_its_flag_with_its_uplink_and_with_everything() {
    let Some(mut outside) = Outside::new(None) else {
        return;
    };
    assert!(pins(&outside).is_empty(), "off is the default");
    restart(&mut outside, XdpMode::Native);
    assert_eq!((pins(&outside).len(), row(&outside)), (1, XDP_NATIVE));
    assert!(
        on_uplink(&outside).contains(" xdp "),
        "{}",
        on_uplink(&outside)
    );
    // Of a veth nobody knows where its other end is.
    for mode in [XdpMode::Off, XdpMode::Auto] {
        restart(&mut outside, XdpMode::Native);
        restart(&mut outside, mode);
        assert_eq!((pins(&outside).len(), row(&outside)), (0, XDP_OFF));
        assert!(
            !on_uplink(&outside).contains("xdp"),
            "{}",
            on_uplink(&outside)
        );
        let standing = &outside.wires.uplinks.xdp()[0];
        assert_eq!(
            standing.reason.is_some(),
            mode == XdpMode::Auto,
            "{standing:?}"
        );
    }
    restart(&mut outside, XdpMode::Native);
    let (node, uplinks) = (&outside.wires.node, &mut outside.wires.uplinks);
    node.run(|| uplinks.set(&[]).unwrap());
    assert!(pins(&outside).is_empty());
    assert!(
        !on_uplink(&outside).contains("xdp"),
        "{}",
        on_uplink(&outside)
    );
    restart(&mut outside, XdpMode::Native);
    remove_all(&outside.wires.paths).unwrap();
    assert!(
        !on_uplink(&outside).contains("xdp"),
        "{}",
        on_uplink(&outside)
    );
}

#[test]
fn where_it_cannot_be_services_are_reached_without() {
    let Some(mut outside) = Outside::new(None) else {
        return;
    };
    let uplink = |name: &str| {
        outside.wires.node.run(|| Uplink {
            index: if_nametoindex(name).unwrap(),
            name: name.into(),
            kind: String::new(),
            mac: MAC,
            addresses: NODE.map(|text| text.parse().unwrap()).into(),
        })
    };
    let uplinks = [uplink("eth0"), uplink("gantry0")];
    // A bridge has no driver that could run a program; and a VLAN comes onto the other.
    restart(&mut outside, XdpMode::Native);
    let (node, programs) = (&outside.wires.node, &mut outside.wires.uplinks);
    node.run(|| {
        programs.set(&uplinks).unwrap();
    });
    let standings = programs.xdp();
    let modes: Vec<&str> = standings.iter().map(|standing| standing.mode).collect();
    assert_eq!(
        modes.iter().filter(|mode| **mode == "native").count(),
        1,
        "{standings:?}"
    );
    let bridge = standings
        .iter()
        .find(|standing| standing.interface == "gantry0")
        .unwrap();
    assert!(
        bridge.reason.as_ref().unwrap().contains("driver"),
        "{bridge:?}"
    );
    let has_vlans = node.run(|| {
        let made = super::bed::try_ip("link add link eth0 name storage type vlan id 7");
        programs.set(&uplinks[..1]).unwrap();
        made
    });
    match has_vlans {
        Ok(()) => {
            let standing = &programs.xdp()[0];
            assert_eq!(standing.mode, "off");
            assert!(
                standing.reason.as_ref().unwrap().starts_with("storage "),
                "{standing:?}"
            );
            assert!(
                !on_uplink(&outside).contains("xdp"),
                "{}",
                on_uplink(&outside)
            );
            outside.wires.node.run(|| ip("link del storage"));
        }
        Err(reason) => eprintln!("skipped: no VLANs: {reason}"),
    }
    let backend = at(REMOTE[0], 8080);
    let frontend = outside.node_port(0, &[backend]);
    let listener = outside.other.listen(backend);
    outside.connect(frontend).unwrap();
    drop(listener);
}
