//! One of several control planes over one etcd: all of them serve, one leads.
//!
//! ```text
//!  store (reads, watches) ─► port ─► certificates ─► registry to read ─► Front ─► serve
//!                                   ├─ nobody leads ─► term ─► a registry over all that was written ─► feed
//!                                   │                           ─► scheduler, controllers ─► Front leads
//!                                   └─ lost: the process ends, and follows when it is started again
//! ```
//! What a leader knows beside the store (addresses in use, quotas, sessions) begins with its term, from the
//! store as the last leader left it, and ends with the process: nothing of an old term can be mistaken for
//! one of a new.

use tokio_util::sync::CancellationToken;

use super::*;
use crate::pki::key_hash;
use crate::server::Front;
use crate::store::{EtcdServers, Replica};

/// Serves, and leads when nobody else does.
pub(super) async fn start(
    arguments: &Arguments,
    servers: EtcdServers,
    stop: &CancellationToken,
) -> Result<Control, StartError> {
    make_data_dir(&arguments.data_dir)?;
    let authority = Authority::open(&arguments.data_dir)?;
    let token_key = authority.token_key()?;
    let cluster = cluster_of(&authority, &token_key);
    let (lost, store_key) = (CancellationToken::new(), arguments.store_key());
    let opening = Store::open_etcd(servers, &store_key, &cluster, lost.clone(), stop);
    let (store, candidate) = opening.await?;
    let (listener, address) = listen_at(arguments.listen).await?;
    let audit = open_audit(arguments)?;
    let certificates = Arc::new(Certificates::open(authority, places(arguments, address))?);
    let tokens = tokens(arguments, &token_key);
    let registry = registry_over(arguments, store.clone(), audit.clone());
    let us = Replica {
        name: name(address),
        url: api_service::reached_at(address, arguments.advertise_address),
    };
    let (ca, serving) = (certificates.ca(), certificates.serving());
    let server = Server::reader(&registry, ca, serving, &tokens)?.with_maintenance(
        &registry,
        &arguments.data_dir,
        &store_key,
    );
    let front = Front::new(store, candidate.leader(), &us, &certificates, stop);
    let mut tasks = JoinSet::new();
    let server = server.behind(&front);
    let served = spawn_server(&mut tasks, server, listener, stop);
    spawn_renewal(&mut tasks, &certificates, stop);
    let (announced, replica) = (candidate.clone(), us.clone());
    tasks.spawn(async move {
        announced.announce(&replica).await;
        Ok(())
    });
    let leader = Lead {
        arguments: arguments.clone(),
        us,
        candidate,
        front,
        audit,
        certificates: certificates.clone(),
        tokens,
        store: registry.store().clone(),
        address,
    };
    let (end, ended) = watch::channel(false);
    let token = stop.clone();
    tasks.spawn(async move {
        let mut served = served;
        let result = tokio::select! {
            // All arms are cancel safe: what a start leaves half done is what the next leader finds.
            result = leader.run(&token) => {
                result.map_err(|error| ServeError::Ended(format!("this control plane cannot lead: {error}")))
            }
            () = lost.cancelled() => {
                let reason = "this control plane does not lead any more, or the store is another one";
                Err(ServeError::Ended(reason.to_owned()))
            }
            _ = served.wait_for(|ended| *ended) => Ok(()),
        };
        end.send_replace(true);
        result
    });
    Ok(Control {
        registry,
        address,
        tasks,
        ended,
        certificates,
    })
}

/// What it takes to lead.
struct Lead {
    arguments: Arguments,
    us: Replica,
    candidate: Candidate,
    front: Front,
    audit: Option<AuditLog>,
    certificates: Arc<Certificates>,
    tokens: Tokens,
    store: Store,
    address: SocketAddr,
}

impl Lead {
    /// Waits for the term, and acts until `stop`.
    async fn run(self, stop: &CancellationToken) -> Result<(), StartError> {
        let result = self.lead(stop).await;
        // A stop gives the place back at once: what was still to be written then is refused.
        result.or_else(|error| match stop.is_cancelled() {
            true => Ok(()),
            false => Err(error),
        })
    }

    async fn lead(self, stop: &CancellationToken) -> Result<(), StartError> {
        self.candidate.stand(&self.us).await?;
        let Services {
            registry,
            feed,
            joining,
            server,
        } = Services::open(
            &self.arguments,
            self.store,
            self.audit,
            &self.certificates,
            &self.tokens,
        )
        .await?;
        let mut tasks = JoinSet::new();
        spawn_services(&mut tasks, &feed, joining, stop);
        self.front.lead(server);
        let led = Led {
            registry,
            feed,
            ca_certificate: self.certificates.ca().to_owned(),
            address: self.address,
            others: Some(self.candidate),
        };
        led.act(&self.arguments, &mut tasks, stop);
        while let Some(ended) = tasks.join_next().await {
            match ended {
                Ok(result) => result?,
                Err(error) => tracing::error!(%error, "a task has failed"),
            }
        }
        Ok(())
    }
}

/// What control planes of one cluster have in common beside the store's key.
fn cluster_of(authority: &Authority, token_key: &rcgen::KeyPair) -> String {
    let mut both = authority.certificate().as_bytes().to_vec();
    both.extend_from_slice(token_key.public_key_raw());
    key_hash(&both)
}

/// By which the others name this control plane.
fn name(address: SocketAddr) -> String {
    let host = nix::unistd::gethostname();
    let host = host.map_or_else(|_| "?".into(), |host| host.to_string_lossy().into_owned());
    format!("{host} ({address}, process {})", std::process::id())
}
