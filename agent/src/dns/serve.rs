//! Datagrams and connections, so that none is lost when the agent is killed.
//!
//! ```text
//! UDP  look (MSG_PEEK) ─► decide ─► answer, or note in the journal ─► take it from the socket
//! TCP  accept ─► keep in the holder ─► look at a whole question ─► answer ─► take it ─► look …
//! ```
//! What has not been answered is where the next agent finds it: in the socket, or in the journal.
//! Killed between answer and taking, a query is answered twice, which clients do not mind. Two gaps
//! are left, both of TCP and some microseconds long: between `accept` and the holder's message, and
//! an answer that the socket's buffer takes only in part.
//!
//! A question that makes us panic is answered by silence and taken; it must not wait for the next.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, Shutdown, recv, send, shutdown};
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::hold::Holder;
use super::journal::{Journal, Left};
use super::respond::{Decision, Responder, Transport, too_busy};

/// TCP connections at the same time.
pub(super) const CONNECTION_COUNT_MAX: usize = 256;
/// A TCP client that says nothing for this long is let go.
const TCP_IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// A question is far smaller; longer datagrams are cut and then malformed, connections ended.
const REQUEST_SIZE_MAX: usize = 4096;
/// What an earlier agent's connections are called with the holder.
pub(super) const CONNECTION_PREFIX: &str = "connection ";

fn decide(responder: &Responder, bytes: &[u8], client: IpAddr, transport: Transport) -> Decision {
    let decided = catch_unwind(AssertUnwindSafe(|| {
        responder.decide(bytes, client, transport)
    }));
    decided.unwrap_or(Decision::Silent)
}

/// Serves datagrams; first those that an earlier agent has left.
pub(super) async fn datagrams(
    socket: Arc<UdpSocket>,
    responder: Arc<Responder>,
    (journal, left): (Arc<Journal>, Vec<Left>),
    shutdown: CancellationToken,
) {
    let work = shutdown.clone();
    for left in left {
        responder.counters.recovered.add();
        let (socket, responder) = (socket.clone(), responder.clone());
        tokio::spawn(work.clone().run_until_cancelled_owned(async move {
            let client = left.client;
            let answer = match decide(&responder, &left.request, client.ip(), Transport::Udp) {
                Decision::Silent => None,
                Decision::Reply(bytes) => Some(bytes),
                Decision::Ask(pending) => responder.finish(pending).await,
            };
            answer_to(&socket, client, answer).await;
            left.slot.clear();
        }));
    }
    let mut buffer = vec![0; REQUEST_SIZE_MAX];
    loop {
        // Cancel-safe: a look takes nothing.
        let looked = shutdown.run_until_cancelled(socket.peek_from(&mut buffer));
        let Some(looked) = looked.await else { return };
        // An error here is an earlier answer's (ICMP unreachable); the socket is as good as before.
        let Ok((size, client)) = looked else { continue };
        let request = &buffer[..size];
        match decide(&responder, request, client.ip(), Transport::Udp) {
            Decision::Silent => {}
            Decision::Reply(bytes) => answer_to(&socket, client, Some(bytes)).await,
            Decision::Ask(pending) => match journal.note(client, request) {
                Some(slot) => {
                    let (socket, responder) = (socket.clone(), responder.clone());
                    tokio::spawn(work.clone().run_until_cancelled_owned(async move {
                        let answer = responder.finish(pending).await;
                        answer_to(&socket, client, answer).await;
                        slot.clear();
                    }));
                }
                // Too much to do: told at once.
                None => answer_to(&socket, client, too_busy(&pending)).await,
            },
        }
        // Nobody else reads from it: this is the one that was looked at.
        drop(socket.try_recv_from(&mut [0; 1]));
    }
}

/// A client that is gone, or whose queue is full, asks again.
async fn answer_to(socket: &UdpSocket, client: SocketAddr, answer: Option<Vec<u8>>) {
    if let Some(answer) = answer {
        drop(socket.send_to(&answer, client).await);
    }
}

/// Connections, and who keeps them.
pub(super) struct Connections {
    responder: Arc<Responder>,
    holder: Option<Arc<Holder>>,
    next: AtomicU64,
    slots: Arc<Semaphore>,
    shutdown: CancellationToken,
}

impl Connections {
    /// * `next` – no connection of an earlier agent has this number or a greater one.
    pub(super) fn new(
        responder: Arc<Responder>,
        holder: Option<Arc<Holder>>,
        next: u64,
        shutdown: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self {
            responder,
            holder,
            next: AtomicU64::new(next),
            slots: Arc::new(Semaphore::new(CONNECTION_COUNT_MAX)),
            shutdown,
        })
    }

    /// Accepts until `shutdown`.
    pub(super) async fn serve(self: Arc<Self>, listener: Arc<TcpListener>) {
        loop {
            // Accepted only when there is room; the backlog waits. Cancel-safe: both only wait.
            let accepted = self.shutdown.run_until_cancelled(async {
                let slot = self.slots.clone().acquire_owned().await;
                (listener.accept().await, slot)
            });
            let (stream, slot) = match accepted.await {
                None => return,
                Some((Ok((stream, _)), Ok(slot))) => (stream, slot),
                Some(_) => {
                    // Out of descriptors: give others time to close theirs.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let (name, stream) = (format!("{CONNECTION_PREFIX}{number}"), Arc::new(stream));
            if let Some(holder) = &self.holder {
                holder.keep(name.clone(), stream.clone()).await;
            }
            tokio::spawn(self.clone().run(name, stream, slot));
        }
    }

    /// Goes on with one that an earlier agent had accepted.
    pub(super) async fn take_up(self: &Arc<Self>, name: String, stream: TcpStream) {
        self.responder.counters.recovered.add();
        let Ok(slot) = self.slots.clone().try_acquire_owned() else {
            return self.let_go(&name).await;
        };
        let stream = Arc::new(stream);
        if let Some(holder) = &self.holder {
            holder.keep(name.clone(), stream.clone()).await;
        }
        tokio::spawn(self.clone().run(name, stream, slot));
    }

    /// Has the holder close what nobody will serve.
    pub(super) async fn let_go(&self, name: &str) {
        if let Some(holder) = &self.holder {
            holder.forget(name).await;
        }
    }

    async fn run(
        self: Arc<Self>,
        name: String,
        stream: Arc<TcpStream>,
        slot: OwnedSemaphorePermit,
    ) {
        // The error is the client's: it went away.
        let served = self.converse(&stream);
        if self.shutdown.run_until_cancelled(served).await.is_none() {
            // For the next agent, from the holder.
            return;
        }
        self.let_go(&name).await;
        // The holder may have it open still: that must not keep the client waiting for its end.
        let _ = shutdown(stream.as_raw_fd(), Shutdown::Both);
        drop(slot);
    }

    /// Question after question until the client closes or is silent.
    async fn converse(&self, stream: &TcpStream) -> io::Result<()> {
        let client = stream.peer_addr()?.ip();
        let mut buffer = vec![0; 2];
        loop {
            let look = look_at_question(stream, &mut buffer);
            if !tokio::time::timeout(TCP_IDLE_TIMEOUT, look).await?? {
                return Ok(());
            }
            let answer = match decide(&self.responder, &buffer[2..], client, Transport::Tcp) {
                Decision::Silent => None,
                Decision::Reply(bytes) => Some(bytes),
                Decision::Ask(pending) => self.responder.finish(pending).await,
            };
            let Some(answer) = answer else {
                return Ok(());
            };
            let size = u16::try_from(answer.len()).map_err(io::Error::other)?;
            let mut framed = size.to_be_bytes().to_vec();
            framed.extend_from_slice(&answer);
            let sent = send_all(stream, &framed);
            tokio::time::timeout(TCP_IDLE_TIMEOUT, sent).await??;
            take(stream, buffer.len()).await?;
        }
    }
}

/// Waits for a whole question and copies it with its length; false: the client has closed.
async fn look_at_question(stream: &TcpStream, buffer: &mut Vec<u8>) -> io::Result<bool> {
    buffer.resize(2, 0);
    if !look(stream, buffer).await? {
        return Ok(false);
    }
    let size = usize::from(u16::from_be_bytes([buffer[0], buffer[1]]));
    if size > REQUEST_SIZE_MAX {
        return Ok(false);
    }
    buffer.resize(2 + size, 0);
    look(stream, buffer).await
}

/// Waits until so many bytes are there, and takes none.
async fn look(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<bool> {
    let looked = stream.async_io(Interest::READABLE, || {
        match recv(stream.as_raw_fd(), buffer, MsgFlags::MSG_PEEK)? {
            0 => Ok(false),
            // The next segment wakes us; a client that ends in the middle runs into the timeout.
            part if part < buffer.len() => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(true),
        }
    });
    looked.await
}

/// Takes what was looked at.
async fn take(stream: &TcpStream, mut size: usize) -> io::Result<()> {
    let mut buffer = [0; REQUEST_SIZE_MAX + 2];
    while size > 0 {
        let taken = stream.async_io(Interest::READABLE, || {
            let part = recv(stream.as_raw_fd(), &mut buffer[..size], MsgFlags::empty())?;
            Ok(part)
        });
        match taken.await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            part => size -= part,
        }
    }
    Ok(())
}

async fn send_all(stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let sent = stream.async_io(Interest::WRITABLE, || {
            Ok(send(stream.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)?)
        });
        bytes = &bytes[sent.await?..];
    }
    Ok(())
}
