//! The net: connections from each machine to the control plane, as TCP would have them.
//!
//! ```text
//!  write ─► chunk, due after the latency ─► read       in order, once each, while the connection lives
//!              │ cut: held until the net heals          (what was sent over an old connection may thus
//!              │ broken: lost, or read late              arrive after a new one has been opened)
//! ```
//! Whoever holds an end and dies closes it; a machine that loses its power says nothing.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use bytes::{Buf as _, Bytes};
use gantry_agent::feed::{Dialer, Wire};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tonic::transport::server::Connected;

use super::host;
use super::state::{Event, MS, State, with};

/// The two ends.
pub const AGENT: usize = 0;
pub const CONTROL: usize = 1;
/// Not before the net heals.
const HELD: u64 = u64::MAX;

#[derive(Default)]
pub struct Net {
    connections: Vec<Connection>,
    /// Where the control plane takes connections.
    listener: Option<mpsc::UnboundedSender<io::Result<End>>>,
    /// Machines that nothing comes from, or goes to.
    cut: [BTreeSet<usize>; 2],
    /// Machines to which the next key of a backend goes with a bit flipped.
    flips: BTreeSet<usize>,
    /// Bits that were flipped.
    pub flipped: u64,
}

struct Connection {
    node: usize,
    /// To be read by the agent, by the control plane.
    pipes: [Pipe; 2],
    /// Ends that are gone.
    is_gone: [bool; 2],
}

#[derive(Default)]
struct Pipe {
    chunks: VecDeque<(u64, Bytes)>,
    /// When, and with an error or as an end.
    end: Option<(u64, bool)>,
    last_due: u64,
    reader: Option<Waker>,
}

impl State {
    fn latency(&mut self) -> u64 {
        match self.choices.percent(3) {
            true => self.choices.between(5 * MS, 120 * MS),
            false => self.choices.between(MS / 10, 2 * MS),
        }
    }

    fn send(&mut self, connection: usize, from: usize, bytes: Option<Bytes>, is_error: bool) {
        let to = 1 - from;
        let node = self.net.connections[connection].node;
        let is_cut = self.net.cut[from].contains(&node);
        let due = match is_cut {
            true => HELD,
            false => host::now_ns() + self.latency(),
        };
        let pipe = &mut self.net.connections[connection].pipes[to];
        if pipe.end.is_some() {
            return;
        }
        let due = due.max(pipe.last_due);
        pipe.last_due = due;
        match bytes {
            Some(bytes) => {
                let is_damaged = from == CONTROL && self.net.flips.contains(&node);
                let damaged = is_damaged.then(|| flip(&bytes)).flatten();
                if damaged.is_some() {
                    self.net.flips.remove(&node);
                    self.net.flipped += 1;
                }
                pipe.chunks.push_back((due, damaged.unwrap_or(bytes)));
            }
            None => pipe.end = Some((due, is_error)),
        }
        if due != HELD {
            self.at(
                due,
                Event::Readable {
                    connection,
                    side: to,
                },
            );
        }
    }

    /// A bit of the next key of a backend that goes to this machine is another one there.
    pub fn flip_bit(&mut self, node: usize) {
        self.net.flips.insert(node);
    }

    /// Nothing comes from this machine any more (`side` AGENT), or nothing reaches it (CONTROL).
    pub fn cut(&mut self, node: usize, side: usize) {
        self.net.cut[side].insert(node);
        for connection in self.net.connections.iter_mut().filter(|c| c.node == node) {
            let pipe = &mut connection.pipes[1 - side];
            for (due, _) in &mut pipe.chunks {
                if *due > host::now_ns() {
                    *due = HELD;
                    pipe.last_due = HELD;
                }
            }
        }
    }

    /// The net of this machine is whole; what was held arrives.
    pub fn heal(&mut self, node: usize) {
        self.net.cut.iter_mut().for_each(|cut| {
            cut.remove(&node);
        });
        for connection in 0..self.net.connections.len() {
            if self.net.connections[connection].node != node {
                continue;
            }
            for side in [AGENT, CONTROL] {
                let mut due = host::now_ns() + self.choices.between(MS, 200 * MS);
                let pipe = &mut self.net.connections[connection].pipes[side];
                let end = pipe.end.as_mut().map(|(at, _)| at);
                let mut is_held = false;
                for at in pipe.chunks.iter_mut().map(|(at, _)| at).chain(end) {
                    if *at == HELD {
                        (*at, is_held) = (due, true);
                        due += MS / 100;
                    }
                }
                if is_held {
                    pipe.last_due = due;
                    self.at(due, Event::Readable { connection, side });
                }
            }
        }
    }

    /// The connections of this machine break; what it has sent may still arrive, late.
    pub fn break_connections(&mut self, node: usize) {
        for connection in 0..self.net.connections.len() {
            let held = &self.net.connections[connection];
            if held.node != node || held.is_gone[AGENT] || held.is_gone[CONTROL] {
                continue;
            }
            let late = self.choices.percent(50).then(|| {
                let delay = self.choices.between(10 * MS, 4_000 * MS);
                host::now_ns() + delay
            });
            for side in [AGENT, CONTROL] {
                let now = host::now_ns();
                let pipe = &mut self.net.connections[connection].pipes[side];
                let at = match late.filter(|_| side == CONTROL) {
                    None => {
                        pipe.chunks.retain(|(due, _)| *due <= now);
                        now
                    }
                    Some(late) => {
                        for (due, _) in &mut pipe.chunks {
                            if *due > now && *due != HELD {
                                *due = late;
                            }
                        }
                        late + 1
                    }
                };
                pipe.end.get_or_insert((at, true));
                self.at(at, Event::Readable { connection, side });
            }
        }
    }

    /// The machine has lost its power: its ends are gone without a word.
    pub fn forget_ends(&mut self, node: usize, is_silent: bool) {
        for connection in 0..self.net.connections.len() {
            let held = &mut self.net.connections[connection];
            if held.node == node && !held.is_gone[AGENT] {
                held.is_gone[AGENT] = true;
                if !is_silent {
                    self.send(connection, AGENT, None, true);
                }
            }
        }
    }

    /// The control plane takes no connections any more.
    pub fn stop_listening(&mut self) {
        self.net.listener = None;
    }

    /// Wakes who reads there.
    pub fn wake(&mut self, connection: usize, side: usize) -> usize {
        let held = &mut self.net.connections[connection];
        if let Some(reader) = held.pipes[side].reader.take() {
            reader.wake();
        }
        held.node
    }
}

/// These bytes with one bit flipped, in the first digit of the first backend's UID among the keys.
fn flip(bytes: &Bytes) -> Option<Bytes> {
    const KEY: &[u8] = b"backend/default/web/";
    let at = bytes.windows(KEY.len()).position(|window| window == KEY)? + KEY.len();
    let uid = bytes.get(at..at + 36)?;
    let digit = uid.iter().position(u8::is_ascii_digit)?;
    let mut damaged = bytes.to_vec();
    damaged[at + digit] ^= 1;
    Some(damaged.into())
}

/// The control plane takes connections here from now on.
pub fn listen() -> mpsc::UnboundedReceiver<io::Result<End>> {
    let (sender, receiver) = mpsc::unbounded_channel();
    with(|state| state.net.listener = Some(sender));
    receiver
}

/// What an agent on this machine dials with.
pub fn dialer(node: usize) -> Dialer {
    Dialer::new(move || {
        Box::pin(async move {
            // Nothing answers beyond a cut: the dialler's patience ends it.
            while with(|state| state.net.cut.iter().any(|cut| cut.contains(&node))) {
                tokio::time::sleep(std::time::Duration::from_millis(500)).await;
            }
            let delay = with(|state| 2 * state.latency());
            tokio::time::sleep(std::time::Duration::from_nanos(delay)).await;
            let ends = with(|state| {
                let listener = state.net.listener.clone()?;
                let number = state.net.connections.len();
                state.net.connections.push(Connection {
                    node,
                    pipes: Default::default(),
                    is_gone: [false; 2],
                });
                let end = |side| End { number, side };
                Some((listener, end(AGENT), end(CONTROL)))
            });
            let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
            let (listener, ours, theirs) = ends.ok_or_else(refused)?;
            listener.send(Ok(theirs)).map_err(|_| refused())?;
            Ok(Box::new(ours) as Box<dyn Wire>)
        })
    })
}

/// One end of a connection.
pub struct End {
    number: usize,
    side: usize,
}

impl Connected for End {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for End {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        with(|state| {
            let pipe = &mut state.net.connections[self.number].pipes[self.side];
            let now = host::now_ns();
            if let Some((due, bytes)) = pipe.chunks.front_mut() {
                if *due <= now {
                    let count = bytes.len().min(buffer.remaining());
                    buffer.put_slice(&bytes[..count]);
                    bytes.advance(count);
                    if bytes.is_empty() {
                        pipe.chunks.pop_front();
                    }
                    return Poll::Ready(Ok(()));
                }
            } else if let Some((_, is_error)) = pipe.end.filter(|(at, _)| *at <= now) {
                return Poll::Ready(match is_error {
                    true => Err(io::ErrorKind::ConnectionReset.into()),
                    false => Ok(()),
                });
            }
            pipe.reader = Some(context.waker().clone());
            Poll::Pending
        })
    }
}

impl AsyncWrite for End {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if host::is_killed() {
            return Poll::Ready(Ok(bytes.len()));
        }
        with(|state| {
            let held = &state.net.connections[self.number];
            // The other side is gone, and its word of that has come.
            let ended = held.pipes[self.side].end;
            if ended.is_some_and(|(at, is_error)| is_error && at <= host::now_ns()) {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            if !held.is_gone[1 - self.side] {
                let copy = Bytes::copy_from_slice(bytes);
                state.send(self.number, self.side, Some(copy), false);
            }
            Poll::Ready(Ok(bytes.len()))
        })
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        with(|state| state.send(self.number, self.side, None, false));
        Poll::Ready(Ok(()))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        with(|state| {
            let held = &mut state.net.connections[self.number];
            if !std::mem::replace(&mut held.is_gone[self.side], true) {
                state.send(self.number, self.side, None, true);
            }
        });
    }
}
