//! `healthCheckNodePort`: whether this node has a backend of a Service, for load balancers outside.
//!
//! ```text
//!  View ─► Wanted (pure: port ─► Service, how many backends here) ─► one listener per port and address
//!                                                                    GET ─► 200 or 503, and the count
//! ```
//! A listener reads the answer anew for each request, so a changed count needs no new listener. A
//! port that is taken is told once and tried again at every change and after a while.
//!
//! Limits: a request has 8 KiB and 5 s, a port 32 at a time; more wait.
//!
//! Source: Kubernetes `pkg/proxy/healthcheck/service_health.go` (status, headers, body).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use gantry_api::proto::backend::State;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::services::changed::{Shared, changed};
use crate::view::{Backends, ServiceName, View};

const REQUEST_TIME: Duration = Duration::from_secs(5);
const REQUEST_BYTES_MAX: usize = 8 * 1024;
const REQUEST_COUNT_MAX: usize = 32;
const RETRY: Duration = Duration::from_secs(10);

/// What one port says.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Health {
    service: ServiceName,
    /// Serving backends on this node.
    count: usize,
}

/// The ports of this view's Services. A port that two Services have, which the control plane does not
/// give out, is the first one's.
#[derive(Default)]
struct Ports {
    last: Shared,
    by_service: BTreeMap<ServiceName, (u16, usize)>,
}

impl Ports {
    /// Follows the view; costs what has changed.
    fn follow(&mut self, view: &View, node: &str) {
        for name in changed(&self.last, view) {
            let service = view.services.get(&name);
            let port = service.and_then(|s| u16::try_from(s.health_check_node_port).ok());
            match port.filter(|port| *port != 0) {
                None => drop(self.by_service.remove(&name)),
                Some(port) => {
                    let backends = view.backends.get(&name).map(AsRef::as_ref);
                    let count = count_here(backends, node);
                    self.by_service.insert(name, (port, count));
                }
            }
        }
        self.last = Shared::of(view);
    }

    fn health(&self) -> BTreeMap<u16, Health> {
        let mut ports = BTreeMap::new();
        for (service, (port, count)) in &self.by_service {
            ports.entry(*port).or_insert_with(|| Health {
                service: service.clone(),
                count: *count,
            });
        }
        ports
    }
}

fn count_here(backends: Option<&Backends>, node: &str) -> usize {
    let backends = backends.into_iter().flat_map(Backends::values);
    let here = backends.filter(|backend| backend.node == node);
    here.filter(|backend| backend.state() == State::Serving)
        .count()
}

/// The answer to any request.
fn response(health: &Health) -> String {
    let status = if health.count > 0 {
        "200 OK"
    } else {
        "503 Service Unavailable"
    };
    let (ServiceName { namespace, name }, count) = (&health.service, health.count);
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{namespace}\",\n\t\t\"name\": \"{name}\"\n\t}},\n\t\
         \"localEndpoints\": {count},\n\t\"serviceProxyHealthy\": true\n}}"
    );
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n\
         X-Load-Balancing-Endpoint-Weight: {count}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

type Answers = Arc<RwLock<BTreeMap<u16, Health>>>;

/// Serves the health check ports of the view at these addresses until shutdown.
pub async fn run(
    node: String,
    addresses: Vec<IpAddr>,
    mut view: watch::Receiver<Arc<View>>,
    shutdown: CancellationToken,
) {
    let mut ports = Ports::default();
    let answers = Answers::default();
    let mut listeners: BTreeMap<SocketAddr, AbortHandle> = BTreeMap::new();
    // Dropped at the end, which ends all listeners.
    let mut tasks = JoinSet::new();
    let mut told: BTreeSet<SocketAddr> = BTreeSet::new();
    loop {
        let newest = view.borrow_and_update().clone();
        ports.follow(&newest, &node);
        let health = ports.health();
        let wanted: BTreeSet<SocketAddr> = health
            .keys()
            .flat_map(|port| {
                addresses
                    .iter()
                    .map(|address| SocketAddr::new(*address, *port))
            })
            .collect();
        *answers.write().unwrap_or_else(PoisonError::into_inner) = health;
        listeners.retain(|address, listener| {
            let keep = wanted.contains(address) && !listener.is_finished();
            if !keep {
                listener.abort();
            }
            keep
        });
        told.retain(|address| wanted.contains(address));
        let mut all = true;
        for address in &wanted {
            if listeners.contains_key(address) {
                continue;
            }
            match TcpListener::bind(address).await {
                Ok(listener) => {
                    let serving = serve(listener, answers.clone());
                    listeners.insert(*address, tasks.spawn(serving));
                    told.remove(address);
                }
                Err(error) => {
                    all = false;
                    if told.insert(*address) {
                        tracing::warn!(%address, %error, "a health check port cannot be served");
                    }
                }
            }
        }
        while tasks.try_join_next().is_some() {}
        let retry = async {
            match all {
                true => std::future::pending().await,
                false => tokio::time::sleep(RETRY).await,
            }
        };
        tokio::select! {
            // Cancel-safe: all only wait.
            () = shutdown.cancelled() => return,
            changed = view.changed() => if changed.is_err() { return },
            () = retry => {}
        }
    }
}

async fn serve(listener: TcpListener, answers: Answers) {
    let slots = Arc::new(Semaphore::new(REQUEST_COUNT_MAX));
    let Ok(port) = listener.local_addr().map(|address| address.port()) else {
        return;
    };
    let mut requests = JoinSet::new();
    loop {
        while requests.try_join_next().is_some() {}
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, most likely: not for long.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let answers = answers.clone();
        requests.spawn(async move {
            let _ = tokio::time::timeout(REQUEST_TIME, answer(stream, port, &answers)).await;
            drop(slot);
        });
    }
}

async fn answer(mut stream: TcpStream, port: u16, answers: &Answers) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        if request.len() >= REQUEST_BYTES_MAX || stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let health = {
        let answers = answers.read().unwrap_or_else(PoisonError::into_inner);
        answers.get(&port).cloned()
    };
    if let Some(health) = health {
        stream.write_all(response(&health).as_bytes()).await?;
        stream.shutdown().await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use gantry_api::proto;

    use super::*;

    fn view(port: u16, backends: &[(&str, State)]) -> View {
        let mut view = View::default();
        let name = ServiceName {
            namespace: "shop".into(),
            name: "web".into(),
        };
        let service = proto::Service {
            health_check_node_port: u32::from(port),
            ..proto::Service::default()
        };
        let backends = backends.iter().enumerate().map(|(number, (node, state))| {
            let backend = proto::Backend {
                node: (*node).into(),
                state: *state as i32,
                ..proto::Backend::default()
            };
            (number.to_string(), Arc::new(backend))
        });
        let backends: Backends = backends.collect();
        Arc::make_mut(&mut view.services).insert(name.clone(), Arc::new(service));
        Arc::make_mut(&mut view.backends).insert(name, Arc::new(backends));
        view
    }

    #[test]
    fn serving_backends_of_this_node_are_counted() {
        let mut ports = Ports::default();
        let mixed = [
            ("here", State::Serving),
            ("here", State::Draining),
            ("here", State::NotReady),
            ("there", State::Serving),
        ];
        ports.follow(&view(30_100, &mixed), "here");
        assert_eq!(ports.health()[&30_100].count, 1);
        ports.follow(&view(30_100, &mixed[1..]), "here");
        assert_eq!(ports.health()[&30_100].count, 0);
        ports.follow(&view(0, &mixed), "here");
        assert!(ports.health().is_empty());
    }

    #[test]
    fn the_answer_is_kubernetes_own() {
        let health = |count| Health {
            service: ServiceName {
                namespace: "shop".into(),
                name: "web".into(),
            },
            count,
        };
        let answer = response(&health(2));
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("X-Load-Balancing-Endpoint-Weight: 2\r\n"));
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        let wanted = serde_json::json!({"service": {"namespace": "shop", "name": "web"},
            "localEndpoints": 2, "serviceProxyHealthy": true});
        assert_eq!(body, wanted);
        assert!(response(&health(0)).starts_with("HTTP/1.1 503 "));
    }

    fn ask(address: SocketAddr) -> std::io::Result<String> {
        let mut stream = std::net::TcpStream::connect(address)?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn ports_come_and_go_with_the_view() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let port = address.port();
        let (sender, receiver) = watch::channel(Arc::new(view(port, &[])));
        let shutdown = CancellationToken::new();
        let addresses = vec![address.ip()];
        let running = tokio::spawn(run("here".into(), addresses, receiver, shutdown.clone()));
        let until = |what: &'static str, done: fn(&std::io::Result<String>) -> bool| async move {
            for _ in 0..500 {
                let answer = tokio::task::spawn_blocking(move || ask(address))
                    .await
                    .unwrap();
                if done(&answer) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            panic!("not in time: {what}");
        };
        until("503", |a| {
            a.as_ref().is_ok_and(|a| a.starts_with("HTTP/1.1 503"))
        })
        .await;
        sender.send_replace(Arc::new(view(port, &[("here", State::Serving)])));
        until("200", |a| {
            a.as_ref().is_ok_and(|a| a.starts_with("HTTP/1.1 200"))
        })
        .await;
        sender.send_replace(Arc::new(View::default()));
        until("closed", Result::is_err).await;
        shutdown.cancel();
        running.await.unwrap();
    }
}
