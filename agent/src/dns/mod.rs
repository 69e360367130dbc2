//! Names for pods: the node's own resolver. No DNS pod, no hop to another node.
//!
//! ```text
//! pod ─ 10.96.0.10:53 ─(eBPF)─► 169.254.20.10:53 on lo ─► respond ─┬► zone     cluster names, from the View
//!                                                                  └► forward  the rest, cached, upstream
//! ```
//! The pods' resolv.conf names the cluster's resolver address; every node's data plane sends that
//! to its own resolver. So names are answered while the control plane is gone, and an answer is as
//! new as the view that the same agent programs.
//!
//! [`zone`] decides and is pure; this file and [`forward`] act. Bounds: datagrams in work, TCP
//! connections, questions in flight upstream, cache entries; beyond them a client gets SERVFAIL or
//! no connection, and the agent no more work.

mod cache;
mod forward;
mod respond;
mod zone;

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use gantry_cni::CniError;
use gantry_cni::netlink::{LOOPBACK_INDEX, Netlink};
use ipnet::IpNet;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub use forward::Upstreams;
pub use zone::{Answer, Zone, answer};

use crate::view::View;
use forward::{Forwarder, Transport};
use respond::Responder;

/// The node-local resolver's address, on `lo`.
pub const LISTEN_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 20, 10);
/// DNS.
pub const LISTEN_PORT: u16 = 53;

/// Datagrams in work at the same time.
const DATAGRAM_COUNT_MAX: usize = 1024;
/// TCP connections at the same time.
const CONNECTION_COUNT_MAX: usize = 256;
/// A TCP client that says nothing for this long is let go.
const TCP_IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// A datagram with a question is far smaller; longer ones are cut and then malformed.
const REQUEST_SIZE_MAX: usize = 4096;

/// Where to listen and whom to ask.
#[derive(Clone, Debug)]
pub struct ResolverConfig {
    /// UDP and TCP; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Give `lo` that address first. It stays when the resolver ends: the next agent needs it.
    pub add_to_loopback: bool,
    /// For names outside the cluster.
    pub upstreams: Upstreams,
}

impl ResolverConfig {
    /// The node's: 169.254.20.10:53, asking the servers of the node's resolv.conf.
    pub fn standard() -> Self {
        Self {
            listen: SocketAddr::from((LISTEN_ADDRESS, LISTEN_PORT)),
            add_to_loopback: true,
            upstreams: Upstreams::File("/etc/resolv.conf".into()),
        }
    }
}

/// Why the resolver cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ResolverError {
    /// `lo` did not take the address.
    #[error("resolver address {address} on lo: {source}")]
    Address {
        /// Which.
        address: IpAddr,
        /// The kernel's answer.
        source: CniError,
    },
    /// The port is taken, or the address is not there.
    #[error("resolver: listen on {listen} ({protocol}): {source}; is another resolver on it?")]
    Listen {
        /// Where.
        listen: SocketAddr,
        /// `udp` or `tcp`
        protocol: &'static str,
        /// The error of the call.
        source: io::Error,
    },
}

/// A running resolver. Ends when its shutdown token is cancelled.
pub struct Resolver {
    address: SocketAddr,
    tasks: Vec<JoinHandle<()>>,
}

impl Resolver {
    /// Listens and serves.
    ///
    /// * `view` – the newest is answered from; before the first commit cluster names get SERVFAIL.
    /// * `shutdown` – cancelled: stop listening; questions in work are dropped.
    pub async fn start(
        config: ResolverConfig,
        view: watch::Receiver<Arc<View>>,
        shutdown: CancellationToken,
    ) -> Result<Self, ResolverError> {
        let ip = config.listen.ip();
        if config.add_to_loopback {
            let added = async {
                let host = Netlink::open()?;
                host.set_up(LOOPBACK_INDEX).await?;
                host.ensure_address(LOOPBACK_INDEX, IpNet::from(ip)).await
            };
            added.await.map_err(|source| ResolverError::Address {
                address: ip,
                source,
            })?;
        }
        let failed = |listen, protocol| {
            move |source| ResolverError::Listen {
                listen,
                protocol,
                source,
            }
        };
        let tcp = TcpListener::bind(config.listen)
            .await
            .map_err(failed(config.listen, "tcp"))?;
        let address = tcp.local_addr().map_err(failed(config.listen, "tcp"))?;
        let udp = UdpSocket::bind(address)
            .await
            .map_err(failed(address, "udp"))?;

        let mut own = vec![ip];
        own.extend(view.borrow().settings.dns_service_ip);
        let forwarder = Forwarder::new(config.upstreams, own);
        let responder = Arc::new(Responder::new(view, forwarder));
        let tasks = vec![
            tokio::spawn(serve_udp(
                Arc::new(udp),
                responder.clone(),
                shutdown.clone(),
            )),
            tokio::spawn(serve_tcp(tcp, responder, shutdown)),
        ];
        tracing::info!(%address, "resolver listens");
        Ok(Self { address, tasks })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until it has ended, after its shutdown token was cancelled.
    pub async fn ended(self) {
        for task in self.tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "resolver task");
            }
        }
    }
}

async fn serve_udp(socket: Arc<UdpSocket>, responder: Arc<Responder>, shutdown: CancellationToken) {
    let slots = Arc::new(Semaphore::new(DATAGRAM_COUNT_MAX));
    let mut buffer = vec![0; REQUEST_SIZE_MAX];
    loop {
        // Both arms are cancel safe: a datagram is received whole or stays in the socket.
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            () = shutdown.cancelled() => return,
        };
        // An error here is an earlier answer's (ICMP unreachable); the socket is as good as before.
        let Ok((size, client)) = received else {
            continue;
        };
        // Too much to do: the client asks again after its timeout.
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            continue;
        };
        let (request, socket) = (buffer[..size].to_vec(), socket.clone());
        let responder = responder.clone();
        tokio::spawn(async move {
            if let Some(response) = responder.respond(&request, Transport::Udp).await {
                // The client is gone or its queue is full: it asks again.
                drop(socket.send_to(&response, client).await);
            }
            drop(slot);
        });
    }
}

async fn serve_tcp(listener: TcpListener, responder: Arc<Responder>, shutdown: CancellationToken) {
    let slots = Arc::new(Semaphore::new(CONNECTION_COUNT_MAX));
    loop {
        // Accepted only when there is room; the backlog waits. Both arms are cancel safe.
        let accepted = tokio::select! {
            accepted = async {
                let slot = slots.clone().acquire_owned().await;
                (listener.accept().await, slot)
            } => accepted,
            () = shutdown.cancelled() => return,
        };
        let (Ok((stream, _)), Ok(slot)) = accepted else {
            // Out of descriptors: give others time to close theirs.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (responder, shutdown) = (responder.clone(), shutdown.clone());
        tokio::spawn(async move {
            tokio::select! {
                // The error is the client's: it went away.
                served = serve_connection(stream, &responder) => drop(served),
                () = shutdown.cancelled() => {}
            }
            drop(slot);
        });
    }
}

/// Question after question until the client closes or is silent.
async fn serve_connection(mut stream: TcpStream, responder: &Responder) -> io::Result<()> {
    loop {
        let read = async {
            let size = usize::from(stream.read_u16().await?);
            let mut request = vec![0; size];
            stream.read_exact(&mut request).await?;
            io::Result::Ok(request)
        };
        let request = tokio::time::timeout(TCP_IDLE_TIMEOUT, read).await??;
        let Some(response) = responder.respond(&request, Transport::Tcp).await else {
            return Ok(());
        };
        let Ok(size) = u16::try_from(response.len()) else {
            return Ok(());
        };
        let mut framed = size.to_be_bytes().to_vec();
        framed.extend_from_slice(&response);
        tokio::time::timeout(TCP_IDLE_TIMEOUT, stream.write_all(&framed)).await??;
    }
}

#[cfg(test)]
mod tests;
