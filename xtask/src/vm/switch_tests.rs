//! Frames in, frames out: of the deciding part alone, and through the sockets.

use std::net::Ipv4Addr;

use super::*;

const BROADCAST: Mac = [0xff; 6];

fn mac(number: u8) -> Mac {
    [0x52, 0x54, 0, 0, 9, number]
}

fn plug(number: u8, segment: u8) -> Plug {
    let address = Ipv4Addr::new(10, 0, segment, number);
    let host = Host {
        address,
        mac: mac(number),
    };
    Plug { host, segment }
}

fn frame(to: Mac, from: Mac) -> Arc<[u8]> {
    [&to[..], &from, &[0x88, 0xb5], b"words"].concat().into()
}

fn ports(fabric: &mut Fabric, from: usize, frame: &Arc<[u8]>) -> Vec<usize> {
    let out = fabric.forward(from, frame);
    out.into_iter().map(|(port, _)| port).collect()
}

#[test]
fn an_unknown_address_is_flooded_in_its_segment_and_then_learned() {
    let plugs = vec![plug(0, 1), plug(1, 1), plug(2, 1), plug(3, 2)];
    let mut fabric = Fabric::new(plugs);
    assert_eq!(ports(&mut fabric, 0, &frame(mac(1), mac(0))), [1, 2]);
    assert_eq!(ports(&mut fabric, 1, &frame(mac(0), mac(1))), [0]);
    assert_eq!(ports(&mut fabric, 0, &frame(mac(1), mac(0))), [1]);
    assert_eq!(ports(&mut fabric, 0, &frame(BROADCAST, mac(0))), [1, 2]);
    // It has moved to another port, and is found there.
    ports(&mut fabric, 2, &frame(BROADCAST, mac(1)));
    assert_eq!(ports(&mut fabric, 0, &frame(mac(1), mac(0))), [2]);
    // Nobody hears what is addressed to the sender's own port.
    assert_eq!(ports(&mut fabric, 2, &frame(mac(1), mac(2))), [0; 0]);
}

#[test]
fn a_guest_that_makes_up_addresses_takes_no_memory() {
    let mut fabric = Fabric::new(vec![plug(0, 1), plug(1, 1)]);
    for number in 0..20_000_u32 {
        let [_, _, a, b] = number.to_be_bytes();
        ports(&mut fabric, 0, &frame(BROADCAST, [0x52, 0x54, 9, 9, a, b]));
    }
    assert!(fabric.learned.len() <= LEARNED_MAX);
    // Who speaks is found all the same.
    ports(&mut fabric, 1, &frame(BROADCAST, mac(1)));
    assert_eq!(ports(&mut fabric, 0, &frame(mac(1), mac(0))), [1]);
}

#[test]
fn packets_cross_segments_through_the_router_only() {
    let mut fabric = Fabric::new(vec![plug(0, 1), plug(1, 2)]);
    assert_eq!(ports(&mut fabric, 0, &frame(mac(1), mac(0))), [0; 0]);
    let mut header = [
        0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 1, 0, 10, 0, 2, 1,
    ];
    header[10] = 1;
    let packet = [&router::MAC[..], &mac(0), &[8, 0], &header].concat();
    let out = fabric.forward(0, &packet.into());
    assert_eq!(out[0].0, 1);
    assert_eq!(out[0].1[..6], mac(1));
    // A cut holds between the ends, not between each end and the router.
    fabric.cut.insert((0, 1));
    let packet = [&router::MAC[..], &mac(0), &[8, 0], &header].concat();
    assert!(fabric.forward(0, &packet.into()).is_empty());
}

#[test]
fn a_cut_holds_in_both_directions_and_for_broadcasts() {
    let mut fabric = Fabric::new(vec![plug(0, 1), plug(1, 1), plug(2, 1)]);
    fabric.cut.insert(pair(1, 0));
    assert_eq!(ports(&mut fabric, 0, &frame(BROADCAST, mac(0))), [2]);
    assert_eq!(ports(&mut fabric, 1, &frame(BROADCAST, mac(1))), [2]);
    assert_eq!(ports(&mut fabric, 1, &frame(mac(0), mac(1))), [0; 0]);
    assert_eq!(ports(&mut fabric, 2, &frame(BROADCAST, mac(2))), [0, 1]);
}

#[test]
fn as_many_are_lost_as_was_asked_for() {
    let mut fabric = Fabric::new(vec![plug(0, 1), plug(1, 1)]);
    fabric.loss[0] = (30, 0);
    let arrived = (0..100).filter(|_| !ports(&mut fabric, 0, &frame(BROADCAST, mac(0))).is_empty());
    assert_eq!(arrived.count(), 70);
}

#[test]
fn no_bytes_break_it() {
    let mut fabric = Fabric::new(vec![plug(0, 1), plug(1, 2)]);
    for length in 0..64 {
        for byte in [0, 0x45, 0xff] {
            fabric.forward(0, &vec![byte; length].into());
            let mut to_router = vec![byte; length];
            for (at, own) in to_router.iter_mut().zip(router::MAC) {
                *at = own;
            }
            fabric.forward(0, &to_router.into());
        }
    }
    assert!(fabric.forward(7, &frame(BROADCAST, mac(0))).is_empty());
}

/// A machine's end of the wire.
struct Machine(UnixStream);

impl Machine {
    fn plug_in(switch: &Switch, port: usize) -> Self {
        let stream = UnixStream::connect(switch.socket(port)).unwrap();
        let limit = Duration::from_secs(5);
        stream.set_read_timeout(Some(limit)).unwrap();
        // The switch takes it a moment later; before that, frames to it go nowhere.
        let began = Instant::now();
        while lock(&switch.shared).queues[port].is_none() {
            assert!(began.elapsed() < limit, "port {port} was not taken");
            std::thread::yield_now();
        }
        Self(stream)
    }

    fn send(&mut self, frame: &[u8]) {
        let length = u32::try_from(frame.len()).unwrap();
        self.0.write_all(&length.to_be_bytes()).unwrap();
        self.0.write_all(frame).unwrap();
    }

    fn receive(&mut self) -> Arc<[u8]> {
        read_frame(&mut self.0).unwrap().expect("a frame")
    }
}

/// A directory of this test, removed at its end.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("gantry-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn machines_hear_each_other_until_they_are_cut_and_again_when_healed() {
    let directory = Directory::new("switch");
    let plugs = vec![plug(0, 1), plug(1, 1), plug(2, 1)];
    let switch = Switch::start(&directory.0, plugs).unwrap();
    let [mut a, mut b, mut c] = [0, 1, 2].map(|port| Machine::plug_in(&switch, port));
    let hello = frame(mac(1), mac(0));
    a.send(&hello);
    assert_eq!(b.receive(), hello);
    assert_eq!(c.receive(), hello, "flooded");

    switch.isolate(1);
    let lost = frame(BROADCAST, mac(0));
    a.send(&lost);
    assert_eq!(c.receive(), lost);
    switch.heal();
    switch.delay(1, Duration::from_millis(150));
    let began = Instant::now();
    let late: Arc<[u8]> = [&lost[..], b"late"].concat().into();
    a.send(&late);
    assert_eq!(b.receive(), late, "what was cut off came nevertheless");
    assert!(began.elapsed() >= Duration::from_millis(150), "not delayed");

    let capture = directory.0.join("capture.pcap");
    switch.capture(&capture).unwrap();
    let bytes = std::fs::read(&capture).unwrap();
    let found = bytes.windows(late.len()).any(|w| w == &late[..]);
    assert!(found, "the capture lacks a frame");
}

#[test]
fn a_machine_without_power_keeps_its_port_and_fills_no_memory() {
    let directory = Directory::new("power");
    let switch = Switch::start(&directory.0, vec![plug(0, 1), plug(1, 1)]).unwrap();
    let mut a = Machine::plug_in(&switch, 0);
    drop(Machine::plug_in(&switch, 1));
    let began = Instant::now();
    while lock(&switch.shared).queues[1].is_some() {
        assert!(began.elapsed() < Duration::from_secs(5));
        std::thread::yield_now();
    }
    let hello = frame(mac(1), mac(0));
    a.send(&hello);
    // It reads nothing: its queue fills, and the switch goes on.
    let b = Machine::plug_in(&switch, 1);
    let big = [&hello[..], &[0; 1400]].concat();
    for _ in 0..8 * QUEUE {
        a.send(&big);
    }
    let began = Instant::now();
    while switch.dropped() == 0 {
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "nothing was dropped"
        );
        std::thread::yield_now();
    }
    drop(b);
}
