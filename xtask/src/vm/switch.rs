//! A small Ethernet switch: virtual machines on unix sockets, segments, a router between them, and the
//! faults that a network has.
//!
//! ```text
//!  QEMU -netdev stream ─► unix socket ─► reader ─► Fabric: learn, route, cut, lose ─► queue ─► writer ─► QEMU
//!   (4 bytes of length, then the frame)              (pure)                      (bounded; delay)
//! ```
//! No root, no tap: frames pass between the processes of one user. A machine whose QEMU ends keeps its
//! port; the next QEMU of that machine finds the socket where it was.
//!
//! Invariants: a frame leaves only by ports of its segment, or through the router; a queue is bounded
//! and what does not fit is dropped, as by any switch; frames of one port to another stay in order.
//!
//! Source: IEEE 802.1D 7.8 (learning); QEMU's `-netdev stream`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::pcap::Ring;
use super::router::{self, Host, Mac, Routed};

/// Frames that wait for one machine.
const QUEUE: usize = 1_024;
/// Longer than any frame of an interface without offloads; a length beyond it is no frame.
const FRAME_MAX: usize = 65_550;
const ETHERNET_LEN: usize = 14;
/// Addresses that are remembered; a guest that makes up more is flooded to, as by any switch.
const LEARNED_MAX: usize = 4_096;

/// Where one machine is plugged in.
#[derive(Clone, Copy, Debug)]
pub struct Plug {
    /// The machine.
    pub host: Host,
    /// Machines of a segment share a link.
    pub segment: u8,
}

/// Deciding: which ports get a frame.
struct Fabric {
    plugs: Vec<Plug>,
    hosts: Vec<Host>,
    learned: BTreeMap<(u8, Mac), usize>,
    /// Pairs, the smaller first, that do not hear each other.
    cut: BTreeSet<(usize, usize)>,
    /// Of each port, in percent, and where the count of its frames stands.
    loss: Vec<(u32, u32)>,
    delay: Vec<Duration>,
}

impl Fabric {
    fn new(plugs: Vec<Plug>) -> Self {
        Self {
            hosts: plugs.iter().map(|plug| plug.host).collect(),
            learned: BTreeMap::new(),
            cut: BTreeSet::new(),
            loss: vec![(0, 0); plugs.len()],
            delay: vec![Duration::ZERO; plugs.len()],
            plugs,
        }
    }

    /// The ports that get a frame from `from`, each with what it gets.
    fn forward(&mut self, from: usize, frame: &Arc<[u8]>) -> Vec<(usize, Arc<[u8]>)> {
        let (Some(plug), Some(header)) = (self.plugs.get(from).copied(), frame.first_chunk::<12>())
        else {
            return Vec::new();
        };
        if frame.len() < ETHERNET_LEN || self.loses(from) {
            return Vec::new();
        }
        let [d0, d1, d2, d3, d4, d5, source @ ..] = *header;
        let destination = [d0, d1, d2, d3, d4, d5];
        if source[0] & 1 == 0 {
            if self.learned.len() >= LEARNED_MAX {
                self.learned.clear();
            }
            self.learned.insert((plug.segment, source), from);
        }
        let mut out = match router::route(frame, plug.segment, &self.hosts) {
            Some(Routed::Back(reply)) => return vec![(from, reply.into())],
            Some(Routed::To(port, onward)) => vec![(port, onward.into())],
            None if destination == router::MAC => Vec::new(),
            None => {
                let known = self.learned.get(&(plug.segment, destination)).copied();
                let all = self.plugs.iter().enumerate();
                all.filter(|(port, other)| {
                    *port != from
                        && other.segment == plug.segment
                        && known.is_none_or(|known| known == *port)
                })
                .map(|(port, _)| (port, Arc::clone(frame)))
                .collect()
            }
        };
        out.retain(|(to, _)| !self.cut.contains(&pair(from, *to)));
        out
    }

    /// Every so many frames one is lost, evenly: no chance, so that a run repeats.
    fn loses(&mut self, from: usize) -> bool {
        let Some((percent, count)) = self.loss.get_mut(from) else {
            return false;
        };
        *count += *percent;
        let lost = *count >= 100;
        if lost {
            *count -= 100;
        }
        lost
    }
}

fn pair(a: usize, b: usize) -> (usize, usize) {
    (a.min(b), a.max(b))
}

type Queue = SyncSender<(Instant, Arc<[u8]>)>;

struct Shared {
    fabric: Fabric,
    /// Of each port; none while nobody is plugged in.
    queues: Vec<Option<Queue>>,
    ring: Ring,
    dropped: u64,
}

/// A running switch. Its threads end with the machines' connections, or with the process.
pub struct Switch {
    shared: Arc<Mutex<Shared>>,
    directory: PathBuf,
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Switch {
    /// Listens for every machine on a socket of its own in `directory`.
    pub fn start(directory: &Path, plugs: Vec<Plug>) -> Result<Self> {
        let count = plugs.len();
        let shared = Arc::new(Mutex::new(Shared {
            fabric: Fabric::new(plugs),
            queues: vec![None; count],
            ring: Ring::default(),
            dropped: 0,
        }));
        for port in 0..count {
            let path = socket(directory, port);
            let listener = UnixListener::bind(&path)
                .with_context(|| format!("listen on {}", path.display()))?;
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    // Ends with the machine, whose next start connects again.
                    if let Err(error) = serve(&shared, port, &stream) {
                        println!("    switch: port {port}: {error}");
                    }
                    lock(&shared).queues[port] = None;
                }
            });
        }
        Ok(Self {
            shared,
            directory: directory.to_owned(),
        })
    }

    /// Where a machine's QEMU connects to.
    pub fn socket(&self, port: usize) -> PathBuf {
        socket(&self.directory, port)
    }

    /// Nothing passes between the two any more.
    pub fn cut(&self, a: usize, b: usize) {
        lock(&self.shared).fabric.cut.insert(pair(a, b));
    }

    /// Nothing passes between that one and any other.
    pub fn isolate(&self, port: usize) {
        let mut shared = lock(&self.shared);
        let others = (0..shared.fabric.plugs.len()).filter(|other| *other != port);
        let cut: Vec<_> = others.map(|other| pair(port, other)).collect();
        shared.fabric.cut.extend(cut);
    }

    /// Every frame to that port takes so much longer.
    pub fn delay(&self, port: usize, by: Duration) {
        if let Some(delay) = lock(&self.shared).fabric.delay.get_mut(port) {
            *delay = by;
        }
    }

    /// So many of a hundred frames from that port are lost.
    pub fn lose(&self, port: usize, percent: u32) {
        if let Some(loss) = lock(&self.shared).fabric.loss.get_mut(port) {
            *loss = (percent.min(100), 0);
        }
    }

    /// As if there had been no fault.
    pub fn heal(&self) {
        let fabric = &mut lock(&self.shared).fabric;
        fabric.cut.clear();
        fabric.loss.fill((0, 0));
        fabric.delay.fill(Duration::ZERO);
    }

    /// A capture begins anew.
    pub fn forget(&self) {
        lock(&self.shared).ring.clear();
    }

    /// Whether a frame had these bytes, in what is kept of it.
    pub fn has_passed(&self, wanted: &[u8]) -> bool {
        lock(&self.shared).ring.holds(wanted)
    }

    /// Writes the last frames.
    pub fn capture(&self, to: &Path) -> Result<()> {
        let file = File::create(to).with_context(|| to.display().to_string())?;
        let shared = lock(&self.shared);
        shared.ring.write(BufWriter::new(file))?;
        Ok(())
    }

    /// Frames that found a full queue.
    pub fn dropped(&self) -> u64 {
        lock(&self.shared).dropped
    }
}

fn socket(directory: &Path, port: usize) -> PathBuf {
    directory.join(format!("port-{port}"))
}

/// One machine, from its connection to the end of it.
fn serve(shared: &Arc<Mutex<Shared>>, port: usize, stream: &UnixStream) -> io::Result<()> {
    let (queue, frames) = sync_channel(QUEUE);
    lock(shared).queues[port] = Some(queue);
    let out = stream.try_clone()?;
    std::thread::spawn(move || write_frames(&frames, out));
    let mut reader = BufReader::new(stream);
    while let Some(frame) = read_frame(&mut reader)? {
        deliver(&mut lock(shared), port, &frame);
    }
    Ok(())
}

fn deliver(shared: &mut Shared, from: usize, frame: &Arc<[u8]>) {
    shared.ring.put(frame);
    let now = Instant::now();
    for (to, frame) in shared.fabric.forward(from, frame) {
        let due = now + shared.fabric.delay[to];
        let Some(queue) = &shared.queues[to] else {
            continue;
        };
        if queue.try_send((due, frame)).is_err() {
            shared.dropped += 1;
        }
    }
}

/// The next frame; none at the end of the connection.
fn read_frame(reader: &mut impl Read) -> io::Result<Option<Arc<[u8]>>> {
    let mut length = [0; 4];
    match reader.read_exact(&mut length) {
        Ok(()) => {}
        // A machine without power says no farewell.
        Err(_) => return Ok(None),
    }
    let length = u32::from_be_bytes(length) as usize;
    if length > FRAME_MAX {
        return Err(io::Error::other(format!("a frame of {length} bytes")));
    }
    let mut frame = vec![0; length];
    Ok(reader.read_exact(&mut frame).ok().map(|()| frame.into()))
}

fn write_frames(frames: &Receiver<(Instant, Arc<[u8]>)>, mut out: impl Write) {
    for (due, frame) in frames {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let length = u32::try_from(frame.len()).unwrap_or_default();
        let whole = [&length.to_be_bytes()[..], &frame].concat();
        if out.write_all(&whole).is_err() {
            return;
        }
    }
}

#[cfg(test)]
#[path = "switch_tests.rs"]
mod tests;
