//! Names for pods: the node's own resolver. No DNS pod, no hop to another node.
//!
//! ```text
//! pod ─ 10.96.0.10:53 ─(eBPF)─► 169.254.20.10:53 on lo ─► serve ─► respond ─┬► zone     cluster names, from the View
//!                                 │ also open in                           ├► search   a search list in one hop
//!                                 ▼                                        └► forward  the rest, cached, upstream
//!                          gantry-shim hold, which outlives the agent
//! ```
//! The pods' resolv.conf names the cluster's resolver address; every node's data plane sends that
//! to its own resolver. So names are answered while the control plane is gone, and an answer is as
//! new as the view that the same agent programs. While the agent is dead queries are answered by who
//! holds the sockets ([`hold`]) from the agent's last words ([`last_words`]); TCP waits in them, and
//! what was on its way upstream in a file ([`journal`]): none is refused, none is lost.
//!
//! [`zone`], [`search`], [`health`] and [`cache`] decide and are pure; the others act. Bounds:
//! datagrams in work, TCP connections, questions in flight upstream, cache entries and bytes; beyond
//! them a client gets SERVFAIL or no connection, and the agent no more work.

mod cache;
mod exchange;
mod figures;
mod forward;
mod health;
mod hold;
mod journal;
mod last_words;
mod respond;
mod search;
mod serve;
mod zone;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use gantry_cni::CniError;
use gantry_cni::netlink::{LOOPBACK_INDEX, Netlink};
use ipnet::IpNet;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub use forward::Upstreams;
pub use hold::{HoldConfig, end as end_holder};
pub use respond::ReadNode;
pub use zone::{Answer, Zone, answer};

use crate::network::node_resolv_conf;
use crate::view::View;
use figures::Counters;
use forward::Forwarder;
use hold::Holder;
use journal::Journal;
use respond::Responder;
use serve::Connections;

/// The node-local resolver's address, on `lo`.
pub const LISTEN_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 20, 10);
/// DNS.
pub const LISTEN_PORT: u16 = 53;

/// What may wait while the agent is dead: some thousands of queries. Memory is used only by those.
const UDP_BUFFER_BYTES: usize = 4 << 20;
/// Connections that may wait to be accepted.
const TCP_BACKLOG: u32 = 1024;
/// The file of queries in work, in the holder's directory.
const JOURNAL_FILE: &str = "in-flight";
/// How long to wait for the first view before answering that there is none.
const VIEW_PATIENCE: Duration = Duration::from_secs(3);

/// Where to listen and whom to ask.
#[derive(Clone, Debug)]
pub struct ResolverConfig {
    /// UDP and TCP; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Give `lo` that address first. It stays when the resolver ends: the next agent needs it.
    pub add_to_loopback: bool,
    /// For names outside the cluster.
    pub upstreams: Upstreams,
    /// Gives the node's resolv.conf as pods get it: their search lists end with its.
    pub node_resolv_conf: ReadNode,
    /// Who keeps the sockets when the agent dies; none: they die with it.
    pub hold: Option<HoldConfig>,
}

impl ResolverConfig {
    /// The node's: 169.254.20.10:53, asking the servers of the node's resolv.conf.
    pub fn standard(hold: HoldConfig) -> Self {
        Self {
            listen: SocketAddr::from((LISTEN_ADDRESS, LISTEN_PORT)),
            add_to_loopback: true,
            upstreams: Upstreams::File("/etc/resolv.conf".into()),
            node_resolv_conf,
            hold: Some(hold),
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

/// Gives the resolver's figures as Prometheus text.
pub type Metrics = Arc<dyn Fn() -> String + Send + Sync>;

/// A running resolver. Ends when its shutdown token is cancelled.
pub struct Resolver {
    address: SocketAddr,
    responder: Arc<Responder>,
    tasks: Vec<JoinHandle<()>>,
}

impl Resolver {
    /// Listens and serves: on the sockets of an earlier agent where there are any.
    ///
    /// * `view` – the newest is answered from; before the first commit cluster names get SERVFAIL.
    /// * `shutdown` – cancelled: stop answering. What is in work waits for the next agent.
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
        let (holder, mut kept) = reach_holder(config.hold.as_ref()).await;
        let names = ["tcp", "udp"].map(|protocol| format!("{protocol} {}", config.listen));
        let [tcp, udp] = names.each_ref().map(|name| kept.remove(name));
        let sockets = Sockets::take_or_bind(config.listen, tcp, udp)?;
        let address = sockets.address;
        if let Some(holder) = &holder {
            let [tcp, udp] = names;
            holder.keep(tcp, sockets.tcp.clone()).await;
            holder.keep(udp, sockets.udp.clone()).await;
        }
        let journal = open_journal(config.hold.as_ref());

        let counters = Arc::new(Counters::default());
        let forwarder = Forwarder::new(config.upstreams, ip, view.clone(), counters.clone());
        let responder = Arc::new(Responder::new(
            view.clone(),
            forwarder,
            config.node_resolv_conf,
            ip,
            counters,
        ));
        let next = kept.keys().filter_map(|name| connection_number(name));
        let next = next.max().map_or(0, |last| last + 1);
        let connections =
            Connections::new(responder.clone(), holder.clone(), next, shutdown.clone());
        let mut tasks = Vec::new();
        if let Some(hold) = config.hold {
            let forwarder = responder.forwarder.clone();
            let words = last_words::keep(hold.directory, view.clone(), forwarder, shutdown.clone());
            tasks.push(tokio::spawn(words));
        }
        if let Some(holder) = holder {
            tasks.push(tokio::spawn(holder.follow(shutdown.clone())));
        }
        let (tcp, udp, serving) = (sockets.tcp, sockets.udp, responder.clone());
        tasks.push(tokio::spawn(async move {
            // What has waited for an agent can wait for its view.
            let _ = tokio::time::timeout(VIEW_PATIENCE, until_known(view)).await;
            take_up(&connections, kept).await;
            tokio::join!(
                connections.serve(tcp),
                serve::datagrams(udp, serving, journal, shutdown)
            );
        }));
        tracing::info!(%address, "resolver listens");
        Ok(Self {
            address,
            responder,
            tasks,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its figures.
    pub fn metrics(&self) -> Metrics {
        let (responder, address) = (self.responder.clone(), self.address.to_string());
        Arc::new(move || {
            let domain = responder.zone().domain();
            responder
                .counters
                .render(&address, &domain, &responder.forwarder)
        })
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

async fn until_known(mut view: watch::Receiver<Arc<View>>) {
    // An error: nobody will ever know.
    let _ = view.wait_for(|view| view.rev > 0).await;
}

/// The holder and what it has. Without one names are answered all the same.
async fn reach_holder(
    config: Option<&HoldConfig>,
) -> (Option<Arc<Holder>>, BTreeMap<String, OwnedFd>) {
    let Some(config) = config else {
        return (None, BTreeMap::new());
    };
    let (holder, kept) = Holder::open(config.clone()).await;
    (Some(holder), kept)
}

fn open_journal(config: Option<&HoldConfig>) -> (Arc<Journal>, Vec<journal::Left>) {
    let Some(config) = config else {
        return (Journal::none(), Vec::new());
    };
    let path = config.directory.join(JOURNAL_FILE);
    Journal::open(&path).unwrap_or_else(|error| {
        tracing::warn!(%error, path = %path.display(), "queries in work would not survive this agent");
        (Journal::none(), Vec::new())
    })
}

struct Sockets {
    address: SocketAddr,
    tcp: Arc<TcpListener>,
    udp: Arc<UdpSocket>,
}

impl Sockets {
    fn take_or_bind(
        listen: SocketAddr,
        tcp: Option<OwnedFd>,
        udp: Option<OwnedFd>,
    ) -> Result<Self, ResolverError> {
        let failed = |listen, protocol| {
            move |source| ResolverError::Listen {
                listen,
                protocol,
                source,
            }
        };
        let tcp = match tcp {
            Some(tcp) => TcpListener::from_std(tcp.into()),
            None => bind_tcp(listen),
        };
        let tcp = tcp.map_err(failed(listen, "tcp"))?;
        let address = tcp.local_addr().map_err(failed(listen, "tcp"))?;
        let udp = match udp {
            Some(udp) => UdpSocket::from_std(udp.into()),
            None => bind_udp(address),
        };
        let udp = udp.map_err(failed(address, "udp"))?;
        Ok(Self {
            address,
            tcp: Arc::new(tcp),
            udp: Arc::new(udp),
        })
    }
}

fn bind_tcp(listen: SocketAddr) -> io::Result<TcpListener> {
    let socket = match listen {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    // Connections of an earlier agent may linger.
    socket.set_reuseaddr(true)?;
    socket.bind(listen)?;
    socket.listen(TCP_BACKLOG)
}

fn bind_udp(listen: SocketAddr) -> io::Result<UdpSocket> {
    let socket = std::net::UdpSocket::bind(listen)?;
    socket.set_nonblocking(true)?;
    // Refused without CAP_NET_ADMIN: then it has the system's default.
    let _ = setsockopt(&socket, sockopt::RcvBufForce, &UDP_BUFFER_BYTES);
    UdpSocket::from_std(socket)
}

fn connection_number(name: &str) -> Option<u64> {
    name.strip_prefix(serve::CONNECTION_PREFIX)?.parse().ok()
}

/// Goes on with an earlier agent's connections; whatever else was kept is closed.
async fn take_up(connections: &Arc<Connections>, kept: BTreeMap<String, OwnedFd>) {
    for (name, fd) in kept {
        match TcpStream::from_std(fd.into()) {
            Ok(stream) if connection_number(&name).is_some() => {
                connections.take_up(name, stream).await;
            }
            _ => connections.let_go(&name).await,
        }
    }
}

#[cfg(test)]
mod tests;
