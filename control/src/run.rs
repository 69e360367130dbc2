//! Builds the control plane in one visible order, and takes it down again.
//!
//! ```text
//!  data dir ─► store (lock) ─► port ─► certificates ─► registry ─► feed ─► serve ─► scheduler, controllers
//! ```
//! Over etcd ([`replica`]) the part from the registry on belongs to the one that leads.
//! Everything that can fail for a reason on this machine comes before the port answers. Down: the port
//! stops taking requests, streams end, tasks end, the store closes, all within [`DRAIN_DEADLINE`].

mod replica;

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::certificates::{Certificates, Places, RENEWAL_INTERVAL, RenewalError};
use crate::config::{Arguments, ConfigError};
use crate::controllers::AddressPool;
use crate::controllers::api_service::ApiPlace;
use crate::controllers::{self, api_service};
use crate::feed::{self, Feed};
use crate::hold::{self, Hold};
use crate::joining::Joining;
use crate::pki::{Authority, PkiError};
use crate::scheduler;
use crate::server::audit::AuditLog;
use crate::server::registry::{Patience, Registry, Settings};
use crate::server::{AuditSettings, ServeError, Server, Tokens};
use crate::store::{Candidate, OpenError, RestoreError, STORE_FILE, Store, StoreError};

/// What a drain may take: open streams get a little time to end by themselves.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// Why the control plane could not start or serve.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory is not to be had.
    #[error(
        "cannot use the data directory {path}: {source}; give another one with --data-dir, or start as root"
    )]
    DataDir {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// A backup was not restored.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// What is given for etcd.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The store does not take what the start writes, or does not show what it has.
    #[error(transparent)]
    Write(#[from] StoreError),
    /// The certificates.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// What is made with the CA.
    #[error(transparent)]
    Certificates(#[from] RenewalError),
    /// The port is somebody else's.
    #[error(
        "port {port} on {ip} is taken by another program (find it with `ss -ltnp 'sport = :{port}'`): stop it, or choose another port with --listen",
        port = .0.port(), ip = .0.ip()
    )]
    PortTaken(SocketAddr),
    /// The address cannot be used.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The audit log cannot be opened.
    #[error("cannot write the audit log {path}: {source}; give another file with --audit-log")]
    Audit {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The first objects could not be written.
    #[error("cannot write the first objects: {0}")]
    Defaults(gantry_api::status::Status),
    /// The server.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// Signal handlers.
    #[error("cannot install signal handlers: {0}")]
    Signals(std::io::Error),
}

type Tasks = JoinSet<Result<(), ServeError>>;

/// A running control plane.
pub struct Control {
    registry: Registry,
    address: SocketAddr,
    tasks: Tasks,
    ended: watch::Receiver<bool>,
    certificates: Arc<Certificates>,
}

impl Control {
    /// Opens everything, serves and controls until `stop`; over etcd: leads or follows until `stop`.
    pub async fn start(
        arguments: &Arguments,
        stop: &CancellationToken,
    ) -> Result<Control, StartError> {
        if let Some(servers) = arguments.etcd.servers()? {
            return replica::start(arguments, servers, stop).await;
        }
        let (mut control, feed) = Control::open_with_feed(arguments, stop).await?;
        let Control {
            tasks,
            registry,
            certificates,
            address,
            ..
        } = &mut control;
        let led = Led {
            registry: registry.clone(),
            feed,
            ca_certificate: certificates.ca().to_owned(),
            address: *address,
            others: None,
        };
        led.act(arguments, tasks, stop);
        Ok(control)
    }

    /// Opens everything and serves; nothing acts on what is written.
    #[cfg(test)]
    pub(crate) async fn open(
        arguments: &Arguments,
        stop: &CancellationToken,
    ) -> Result<Control, StartError> {
        Ok(Control::open_with_feed(arguments, stop).await?.0)
    }

    async fn open_with_feed(
        arguments: &Arguments,
        stop: &CancellationToken,
    ) -> Result<(Control, Feed), StartError> {
        let store = open_store(&arguments.data_dir, &arguments.store_key())?;
        let authority = Authority::open(&arguments.data_dir)?;
        let (listener, address) = listen_at(arguments.listen).await?;
        let audit = open_audit(arguments)?;
        // After the store's lock: the credentials of the instance that serves, not of one that fails.
        let token_key = authority.token_key()?;
        let certificates = Arc::new(Certificates::open(authority, places(arguments, address))?);
        let tokens = tokens(arguments, &token_key);
        let Services {
            registry,
            feed,
            joining,
            server,
        } = Services::open(arguments, store, audit, &certificates, &tokens).await?;
        let mut tasks = JoinSet::new();
        let ended = spawn_server(&mut tasks, server, listener, stop);
        spawn_services(&mut tasks, &feed, joining, stop);
        spawn_renewal(&mut tasks, &certificates, stop);
        let control = Control {
            registry,
            address,
            tasks,
            ended,
            certificates,
        };
        Ok((control, feed))
    }

    /// Where the API listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The registry behind the API.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The digest of the CA's key, as `--ca-hash` takes it.
    pub fn ca_hash(&self) -> String {
        self.certificates.ca_hash()
    }

    /// Looks at the certificates now, as the timer does. Returns whether the next connection sees a
    /// new one.
    pub fn renew_certificates(&self) -> Result<bool, RenewalError> {
        self.certificates.renew()
    }

    /// Returns when the server has ended, asked or not.
    pub async fn ended(&self) {
        let mut ended = self.ended.clone();
        // The sender is dropped only with the server's task.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// After the stop: waits for every task, closes the store; gives up at the deadline.
    pub async fn drain(mut self) -> Result<(), StartError> {
        let mut failure = None;
        let tasks = async {
            while let Some(result) = self.tasks.join_next().await {
                match result {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => failure = Some(error),
                    Err(error) => tracing::error!(%error, "a task has failed"),
                }
            }
        };
        if tokio::time::timeout(DRAIN_DEADLINE, tasks).await.is_err() {
            tracing::warn!(?DRAIN_DEADLINE, "not everything ended in time");
            self.tasks.abort_all();
        }
        self.registry.store().close().await;
        self.registry.flush_audit().await;
        failure.map_or(Ok(()), |error| Err(error.into()))
    }
}

fn open_audit(arguments: &Arguments) -> Result<Option<AuditLog>, StartError> {
    let Some(path) = arguments.audit_log.clone() else {
        return Ok(None);
    };
    let settings = AuditSettings {
        file: path.clone(),
        bytes_max: arguments.audit_log_maxsize << 20,
        backup_count: usize::from(arguments.audit_log_maxbackup),
    };
    let opened = AuditLog::open(settings);
    opened
        .map(Some)
        .map_err(|source| StartError::Audit { path, source })
}

fn places(arguments: &Arguments, address: SocketAddr) -> Places {
    Places {
        sans: arguments.server_names(),
        agents: arguments.agent_credentials.clone(),
        kubeconfig: arguments.kubeconfig.clone(),
        server_url: Arguments::server_url(address),
    }
}

fn tokens(arguments: &Arguments, key: &rcgen::KeyPair) -> Tokens {
    let issuer = format!(
        "https://kubernetes.default.svc.{}",
        arguments.cluster_domain
    );
    Tokens::new(key, &issuer).with_lifetime_max(arguments.service_account_max_token_expiration_s)
}

fn registry_over(arguments: &Arguments, store: Store, audit: Option<AuditLog>) -> Registry {
    let settings = Settings {
        service_cidr: arguments.service_cidr,
        reserved_addresses: arguments.reserved_service_ips(),
    };
    Registry::new(store, &settings)
        .with_patience(Patience {
            not_ready_s: arguments.default_not_ready_toleration_seconds,
            unreachable_s: arguments.default_unreachable_toleration_seconds,
        })
        .with_audit_log(audit)
}

/// All that is served, over what the store holds now.
struct Services {
    registry: Registry,
    feed: Feed,
    joining: Joining,
    server: Server,
}

impl Services {
    async fn open(
        arguments: &Arguments,
        store: Store,
        audit: Option<AuditLog>,
        certificates: &Arc<Certificates>,
        tokens: &Tokens,
    ) -> Result<Services, StartError> {
        let registry = registry_over(arguments, store, audit);
        registry
            .ensure_defaults()
            .await
            .map_err(StartError::Defaults)?;
        let feed = Feed::new(registry.clone(), feed_settings(arguments, tokens.clone()));
        let life = Duration::from_secs(arguments.node_certificate_life_s);
        let joining = Joining::new(registry.clone(), feed.clone(), certificates.clone(), life);
        let (ca, serving) = (certificates.ca(), certificates.serving());
        let server = Server::new(&registry, &feed, ca, serving, tokens)?
            .with_joining(&joining)
            .with_maintenance(&registry, &arguments.data_dir, &arguments.store_key());
        Ok(Services {
            registry,
            feed,
            joining,
            server,
        })
    }
}

/// Returns what says when the server has ended.
fn spawn_server(
    tasks: &mut Tasks,
    server: Server,
    listener: TcpListener,
    stop: &CancellationToken,
) -> watch::Receiver<bool> {
    let (end, ended) = watch::channel(false);
    let token = stop.clone();
    tasks.spawn(async move {
        let result = server.serve(listener, token).await;
        end.send_replace(true);
        result
    });
    ended
}

/// What the services do by themselves.
fn spawn_services(tasks: &mut Tasks, feed: &Feed, joining: Joining, stop: &CancellationToken) {
    let (following, token) = (feed.clone(), stop.clone());
    tasks.spawn(async move {
        following.run(token).await;
        Ok(())
    });
    let token = stop.clone();
    tasks.spawn(async move {
        joining.run(token).await;
        Ok(())
    });
}

fn spawn_renewal(tasks: &mut Tasks, certificates: &Arc<Certificates>, stop: &CancellationToken) {
    let (own, token) = (certificates.clone(), stop.clone());
    tasks.spawn(async move {
        own.run(RENEWAL_INTERVAL, token).await;
        Ok(())
    });
}

/// What the loops of the one that leads need.
struct Led {
    registry: Registry,
    feed: Feed,
    ca_certificate: String,
    address: SocketAddr,
    /// Over etcd: who knows the other control planes.
    others: Option<Candidate>,
}

impl Led {
    /// Scheduler, controllers, and what else acts on what is written.
    fn act(self, arguments: &Arguments, tasks: &mut Tasks, stop: &CancellationToken) {
        let grace = Duration::from_secs(arguments.node_grace_period_s);
        let store = self.registry.store();
        let (hold, end) = Hold::of(store);
        let holding = hold::run(store.clone(), grace, end, stop.clone());
        tasks.spawn(async move {
            holding.await;
            Ok(())
        });
        let settings = controllers::Settings {
            cluster_cidr: arguments.cluster_cidr,
            node_prefix_len: arguments.node_cidr_prefix,
            node_prefix_len_v6: arguments.node_cidr_prefix_v6,
            node_grace_period: grace,
            hold,
            ca_certificate: self.ca_certificate,
            autoscale_interval: controllers::Settings::default().autoscale_interval,
            load_balancer_pool: AddressPool::new(arguments.load_balancer_pool.clone()),
        };
        let place = ApiPlace {
            cluster_ip: arguments.api_service_ip(),
            listen: self.address,
            advertise: arguments.advertise_address,
        };
        let remover: Arc<dyn controllers::VolumeRemover> = Arc::new(self.feed.clone());
        let usage: Arc<dyn controllers::UsageSource> = Arc::new(self.feed);
        let nodes = Nodes { remover, usage };
        let (own, others, token) = (self.registry.clone(), self.others, stop.clone());
        tasks.spawn(async move {
            api_service::run(own, place, others, token).await;
            Ok(())
        });
        spawn_loops(tasks, &self.registry, settings, nodes, stop);
    }
}

fn feed_settings(arguments: &Arguments, tokens: Tokens) -> feed::Settings {
    feed::Settings {
        cluster_domain: arguments.cluster_domain.clone(),
        dns_service_ip: arguments.dns_service_ip(),
        service_cidr: arguments.service_cidr,
        cluster_cidr: arguments.cluster_cidr,
        tokens,
    }
}

/// What controllers ask of nodes.
struct Nodes {
    remover: Arc<dyn controllers::VolumeRemover>,
    usage: Arc<dyn controllers::UsageSource>,
}

/// The loops that act on what the API takes.
fn spawn_loops(
    tasks: &mut Tasks,
    registry: &Registry,
    settings: controllers::Settings,
    nodes: Nodes,
    stop: &CancellationToken,
) {
    let (own, token) = (registry.clone(), stop.clone());
    tasks.spawn(async move {
        own.run_maintenance(token).await;
        Ok(())
    });
    let (own, hold, token) = (registry.clone(), settings.hold.clone(), stop.clone());
    tasks.spawn(async move {
        if token.run_until_cancelled(hold.over()).await.is_some() {
            scheduler::run(own, token).await;
        }
        Ok(())
    });
    let (own, token) = (registry.clone(), stop.clone());
    tasks.spawn(async move {
        controllers::run(own, settings, nodes.remover, nodes.usage, token).await;
        Ok(())
    });
}

fn data_dir_error(data_dir: &Path) -> impl Fn(std::io::Error) -> StartError {
    |source| StartError::DataDir {
        path: data_dir.to_owned(),
        source,
    }
}

/// Makes the directory if it is not there; nobody else may look into it.
pub(crate) fn make_data_dir(data_dir: &Path) -> Result<(), StartError> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(data_dir)
        .map_err(data_dir_error(data_dir))
}

fn open_store(data_dir: &Path, store_key: &Path) -> Result<Store, StartError> {
    let failed = data_dir_error(data_dir);
    make_data_dir(data_dir)?;
    let store = Store::open_sealed(&data_dir.join(STORE_FILE), store_key)?;
    // The file's name must survive a power cut as well as its content.
    std::fs::File::open(data_dir)
        .and_then(|directory| directory.sync_all())
        .map_err(failed)?;
    Ok(store)
}

async fn listen_at(address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let listener = listen(address).await?;
    let bound = listener.local_addr();
    let bound = bound.map_err(|source| StartError::Listen { address, source })?;
    Ok((listener, bound))
}

async fn listen(address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| match source.kind() {
            ErrorKind::AddrInUse => StartError::PortTaken(address),
            _ => StartError::Listen { address, source },
        })
}
