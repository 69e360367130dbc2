//! The feed end to end: a real store, registry and feed on a loopback port, and the agent's feed.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use gantry_agent::feed::{self, Link, TunnelError, TunnelTarget, node_info};
use gantry_agent::ids::PodUid;
use gantry_agent::paths::Paths;
use gantry_agent::runtime::ExecSession;
use gantry_agent::view::View;
use gantry_api::digest::{Digest, item_hash};
use gantry_api::k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, PodStatus, Secret, Service};
use gantry_api::k8s_openapi::api::discovery::v1::EndpointSlice;
use gantry_api::k8s_openapi::api::networking::v1::NetworkPolicy;
use gantry_api::proto;
use gantry_api::proto::feed_client::FeedClient;
use gantry_api::proto::feed_server;
use gantry_api::proto::pods_client::PodsClient;
use gantry_api::proto::stats_client::StatsClient;
use gantry_api::proto::{down, exec_input, exec_output, up};
use gantry_control::feed::{Feed, Settings};
use gantry_control::pki::{Authority, ServerName};
use gantry_control::server::identity::{Identity, MASTERS_GROUP, NODES_GROUP};
use gantry_control::server::registry::{self, DeleteOptions};
use gantry_control::server::{Registry, Server, ServingCertificate, Tokens};
use gantry_control::store::Store;
use serde_json::json;
use tokio::io::AsyncReadExt as _;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;

mod joining;
mod policies;
mod replicas;
mod restores;

const WAIT: Duration = Duration::from_secs(20);

/// Polls until `probe` gives a value.
async fn eventually<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let polled = tokio::time::timeout(WAIT, async {
        loop {
            if let Some(value) = probe() {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    polled
        .await
        .unwrap_or_else(|_| panic!("did not happen in {WAIT:?}: {what}"))
}

fn tokens(dir: &Path) -> Tokens {
    let key = Authority::open(dir).unwrap().token_key().unwrap();
    Tokens::new(&key, "https://kubernetes.default.svc.cluster.local")
}

fn open(dir: &Path) -> Store {
    Store::open_sealed(&dir.join("store.redb"), &dir.join("store.key")).unwrap()
}

/// One run of a control plane. Dropping it without `stop` is a crash of its connections.
struct Control {
    registry: Registry,
    feed: Feed,
    address: SocketAddr,
    token: CancellationToken,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Control {
    async fn start(dir: &Path, address: &str, user: &str, group: &str) -> Self {
        let store = open(dir);
        let settings = registry::Settings {
            service_cidr: "10.96.0.0/16".parse().unwrap(),
            reserved_addresses: vec![("10.96.0.10".parse().unwrap(), "the resolver".to_owned())],
        };
        let registry = Registry::new(store, &settings);
        registry.ensure_defaults().await.unwrap();
        let settings = Settings {
            cluster_domain: "cluster.local".into(),
            dns_service_ip: "10.96.0.10".parse().unwrap(),
            service_cidr: "10.96.0.0/16".parse().unwrap(),
            cluster_cidr: "10.244.0.0/16".parse().unwrap(),
            tokens: tokens(dir),
        };
        let feed = Feed::new(registry.clone(), settings);
        let token = CancellationToken::new();
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let identify = |user: &str, group: &str| {
            let identity = Identity {
                user: user.into(),
                groups: vec![group.into()],
                impersonated_by: None,
            };
            move |mut request: tonic::Request<()>| {
                request.extensions_mut().insert(identity.clone());
                Ok::<_, tonic::Status>(request)
            }
        };
        // Who asks of pods is a person, whoever the nodes' stream is of.
        let (node, person) = (identify(user, group), identify("admin", MASTERS_GROUP));
        let server = tonic::transport::Server::builder()
            .add_service(InterceptedService::new(feed.feed_server(), node))
            .add_service(InterceptedService::new(feed.pods_server(), person.clone()))
            .add_service(InterceptedService::new(feed.stats_server(), person))
            .serve_with_incoming_shutdown(
                TcpListenerStream::new(listener),
                token.clone().cancelled_owned(),
            );
        let (follower, follow_token) = (feed.clone(), token.clone());
        let tasks = vec![
            tokio::spawn(async move { server.await.unwrap() }),
            tokio::spawn(async move { follower.run(follow_token).await }),
            tokio::spawn(allocate_prefixes(registry.clone())),
        ];
        Self {
            registry,
            feed,
            address,
            token,
            tasks,
        }
    }

    async fn admin(dir: &Path, address: &str) -> Self {
        Self::start(dir, address, "admin", MASTERS_GROUP).await
    }

    /// Ends as a process does: nothing is served any more, the store is closed.
    async fn stop(mut self) {
        self.token.cancel();
        self.tasks.pop().unwrap().abort();
        for task in self.tasks.drain(..) {
            tokio::time::timeout(WAIT, task).await.unwrap().unwrap();
        }
        self.registry.store().close().await;
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn pod(&self, name: &str) -> Option<Pod> {
        self.registry.get::<Pod>("default", name).unwrap()
    }

    /// Bound to the node; with "" to none.
    async fn create_pod(&self, name: &str, node: &str) -> PodUid {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "default", "labels": {"app": "web"}},
            "spec": {"containers": [{"name": "c", "image": "x",
                "envFrom": [{"configMapRef": {"name": "settings", "optional": true}}]}]},
        }))
        .unwrap();
        let pod = self.registry.create(&pod).await.unwrap();
        let uid = pod.metadata.uid.unwrap();
        if !node.is_empty() {
            let bind = self.registry.bind("default", name, &uid, node);
            bind.await.unwrap();
        }
        PodUid::new(&uid).unwrap()
    }
}

/// What the node controller does: every node gets a prefix.
async fn allocate_prefixes(registry: Registry) {
    loop {
        for mut node in registry
            .list::<Node>(None)
            .map(|(_, nodes)| nodes)
            .unwrap_or_default()
        {
            let spec = node.spec.get_or_insert_default();
            if spec.pod_cidr.is_none() {
                spec.pod_cidr = Some("10.244.7.0/24".into());
                let _ = registry.update(&node).await; // a conflict is met again
            }
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Pods that exist on paper: logs are three lines, exec is `cat`.
#[derive(Default)]
struct FakePods {
    /// One entry per exec that was dropped.
    killed: Arc<Mutex<u32>>,
    /// Watches of flows that are open.
    watches: Arc<Mutex<u32>>,
}

/// Counts while it lives.
struct OpenWatch(Arc<Mutex<u32>>);

impl OpenWatch {
    fn new(watches: &Arc<Mutex<u32>>) -> Self {
        *watches.lock().unwrap() += 1;
        Self(watches.clone())
    }
}

impl Drop for OpenWatch {
    fn drop(&mut self) {
        *self.0.lock().unwrap() -= 1;
    }
}

#[tonic::async_trait]
impl TunnelTarget for FakePods {
    async fn logs(
        &self,
        request: proto::LogsRequest,
        _pod: PodUid,
    ) -> Result<BoxStream<'static, Result<Bytes, TunnelError>>, TunnelError> {
        if request.previous {
            return Err(TunnelError(
                "previous terminated container \"c\" not found".into(),
            ));
        }
        let lines = futures_util::stream::iter(["one\n", "two\n", "three\n"]);
        let lines = lines.map(|line| Ok(Bytes::from_static(line.as_bytes())));
        if request.follow {
            return Ok(lines.chain(futures_util::stream::pending()).boxed());
        }
        Ok(lines.boxed())
    }

    async fn services(
        &self,
        request: &proto::ServicesRequest,
    ) -> Result<Vec<proto::ProgrammedService>, TunnelError> {
        let service = |number: u32| proto::ProgrammedService {
            namespace: request.namespace.clone(),
            name: format!("s{number}"),
            ..Default::default()
        };
        Ok((0..250).map(service).collect())
    }

    fn drops(&self) -> Result<Vec<proto::DroppedPackets>, TunnelError> {
        Ok(vec![proto::DroppedPackets {
            reason: "policy".into(),
            packets: 3,
        }])
    }

    /// Two flows, and with `follow` nothing more, for ever.
    fn flows(
        &self,
        request: &proto::FlowsRequest,
    ) -> Result<BoxStream<'static, proto::NodeFlows>, TunnelError> {
        let part = |verdict: &str, last| proto::NodeFlows {
            flows: vec![proto::Flow {
                verdict: verdict.into(),
                ..Default::default()
            }],
            last,
            ..Default::default()
        };
        let parts = [part("forwarded", false), part("dropped", !request.follow)];
        let open = OpenWatch::new(&self.watches);
        let rest = match request.follow {
            true => futures_util::stream::pending().left_stream(),
            false => futures_util::stream::empty().right_stream(),
        };
        let all = futures_util::stream::iter(parts).chain(rest);
        Ok(all
            .map(move |part| {
                let _held = &open;
                part
            })
            .boxed())
    }

    async fn explain_client(
        &self,
        request: proto::ExplainClient,
        _pod: PodUid,
    ) -> Result<proto::ExplainHalf, TunnelError> {
        Ok(proto::ExplainHalf {
            ok: true,
            next_node: "n2".into(),
            next: Some(proto::ExplainServer::default()),
            backend: request.service,
            ..Default::default()
        })
    }

    async fn explain_server(
        &self,
        _request: proto::ExplainServer,
    ) -> Result<proto::ExplainHalf, TunnelError> {
        Ok(proto::ExplainHalf {
            conclusion: "dropped at ingress".into(),
            ..Default::default()
        })
    }

    async fn forward(&self, port: u16, _pod: PodUid) -> Result<tokio::net::TcpStream, TunnelError> {
        let socket = tokio::net::TcpStream::connect(("127.0.0.1", port)).await;
        socket.map_err(|error| TunnelError(error.to_string()))
    }

    async fn exec(
        &self,
        start: proto::ExecStart,
        _pod: PodUid,
    ) -> Result<ExecSession, TunnelError> {
        let (stdin, mut input) = tokio::io::duplex(1024);
        let (mut output, stdout) = tokio::io::duplex(1024);
        let (exit_tx, exit) = oneshot::channel();
        let (resize, mut sizes) = mpsc::channel(4);
        let killed = self.killed.clone();
        tokio::spawn(async move {
            let work = async {
                let mut text = String::new();
                let _ = input.read_to_string(&mut text).await;
                let text = format!("{}:{text}", start.command.join(" "));
                let _ = tokio::io::AsyncWriteExt::write_all(&mut output, text.as_bytes()).await;
                drop(output);
                exit_tx.send(Ok(7)).is_err()
            };
            // The parts of a dropped session go one after the other: any of them tells.
            let dropped = async { while sizes.recv().await.is_some() {} };
            let is_killed = tokio::select! {
                nobody_listens = work => nobody_listens,
                () = dropped => true,
            };
            if is_killed {
                *killed.lock().unwrap() += 1;
            }
        });
        Ok(ExecSession {
            stdin: Some(Box::new(stdin)),
            stdout: Box::new(stdout),
            stderr: None,
            exit,
            resize,
        })
    }
}

struct Agent {
    handle: feed::Handle,
    token: CancellationToken,
    killed: Arc<Mutex<u32>>,
    watches: Arc<Mutex<u32>>,
}

impl Agent {
    fn start(server: &str, node: &str, lib: &Path) -> Self {
        Self::with_credentials(server, node, lib, Path::new(""))
    }

    fn with_credentials(server: &str, node: &str, lib: &Path, credentials: &Path) -> Self {
        let mut paths = Paths::standard(lib.join("bin"));
        (paths.lib, paths.run) = (lib.into(), lib.join("run"));
        let mut config = feed::Config::new(server.into(), credentials.into(), node.into(), &paths);
        config.beat = Duration::from_millis(200);
        config.backoff_max = Duration::from_millis(300);
        config.linger = Duration::from_secs(3);
        let identity = node_info::NodeIdentity::new(node.into());
        let own = node_info::OwnAddress::default();
        let info =
            Arc::new(move || node_info::read(&identity, Path::new("/"), &own, &Default::default()));
        let (token, pods) = (CancellationToken::new(), FakePods::default());
        let (killed, watches) = (pods.killed.clone(), pods.watches.clone());
        let handle = feed::run(config, info, Arc::new(pods), token.clone()).unwrap();
        Self {
            handle,
            token,
            killed,
            watches,
        }
    }

    async fn stop(self) {
        self.token.cancel();
        tokio::time::timeout(WAIT, self.handle.task)
            .await
            .unwrap()
            .unwrap();
    }

    /// Ends as SIGKILL does.
    async fn kill(self) {
        self.handle.task.abort();
        let _ = self.handle.task.await;
        self.token.cancel();
    }

    fn view(&self) -> Arc<View> {
        self.handle.view.borrow().clone()
    }

    async fn until<T>(&self, what: &str, probe: impl Fn(&View) -> Option<T>) -> T {
        eventually(what, || probe(&self.view())).await
    }

    async fn live(&self) {
        let live = || matches!(&*self.handle.link.borrow(), Link::Live { .. }).then_some(());
        eventually("the agent is live", live).await;
    }

    fn report(&self, uid: &PodUid, name: &str, phase: &str, is_final: bool) {
        let status = PodStatus {
            phase: Some(phase.into()),
            ..Default::default()
        };
        self.handle
            .reporter
            .status(uid, "default", name, &status, is_final, is_final);
    }
}

fn phase(pod: &Pod) -> Option<&str> {
    pod.status.as_ref()?.phase.as_deref()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_arrives_runs_and_goes() {
    let (store, lib) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let control = Control::admin(store.path(), "127.0.0.1:0").await;
    let agent = Agent::start(&control.url(), "n1", lib.path());
    agent.live().await;
    let settings = agent.view().settings.clone();
    assert_eq!(settings.pod_cidr, Some("10.244.7.0/24".parse().unwrap()));
    assert_eq!(settings.cluster_domain, "cluster.local");

    let node = control.registry.get::<Node>("", "n1").unwrap().unwrap();
    assert_eq!(node.metadata.labels.unwrap()["kubernetes.io/os"], "linux");
    let conditions = node.status.unwrap().conditions.unwrap();
    assert!(
        conditions
            .iter()
            .any(|c| c.type_ == "Ready" && c.status == "True")
    );

    let uid = control.create_pod("web", "n1").await;
    agent
        .until("the pod arrives", |view| view.pods.get(&uid).cloned())
        .await;
    let settings: ConfigMap = serde_json::from_value(json!({
        "metadata": {"name": "settings", "namespace": "default"}, "data": {"a": "1"}}))
    .unwrap();
    control.registry.create(&settings).await.unwrap();
    agent
        .until("what it names follows", |view| {
            (view.blobs.len() == 1).then_some(())
        })
        .await;

    agent.report(&uid, "web", "Running", false);
    eventually("the status is stored", || {
        control
            .pod("web")
            .filter(|pod| phase(pod) == Some("Running"))
    })
    .await;
    control
        .registry
        .delete::<Pod>("default", "web", &DeleteOptions::default())
        .await
        .unwrap();
    agent
        .until("the deletion arrives", |view| {
            view.pods.get(&uid)?.metadata.deletion_timestamp.clone()
        })
        .await;
    agent.report(&uid, "web", "Succeeded", true);
    agent.handle.reporter.final_persisted(&uid).await;
    eventually("the object goes", || {
        control.pod("web").is_none().then_some(())
    })
    .await;
    agent
        .until("the view empties", |view| {
            view.pods.is_empty().then_some(())
        })
        .await;
    let finals = lib.path().join("feed/final");
    eventually("the record goes", || {
        std::fs::read_dir(&finals)
            .unwrap()
            .next()
            .is_none()
            .then_some(())
    })
    .await;
    assert_eq!(agent.handle.reporter.counters().digest_mismatches, 0);
    agent.stop().await;
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_sides_may_die_at_any_time() {
    let (store, lib) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let control = Control::admin(store.path(), "127.0.0.1:0").await;
    let (address, url) = (control.address.to_string(), control.url());
    let agent = Agent::start(&url, "n1", lib.path());
    agent.live().await;
    let (a, b) = (
        control.create_pod("a", "n1").await,
        control.create_pod("b", "n1").await,
    );
    agent
        .until("both arrive", |view| (view.pods.len() == 2).then_some(()))
        .await;

    // The control plane dies; what ends meanwhile is kept.
    control.stop().await;
    agent.report(&a, "a", "Running", false);
    agent.report(&b, "b", "Failed", true);
    agent.handle.reporter.final_persisted(&b).await;
    assert_eq!(agent.view().pods.len(), 2, "the view stays in force");

    // So does the agent; it starts alone, from disk, and knows who has ended.
    agent.kill().await;
    let agent = Agent::start(&url, "n1", lib.path());
    assert_eq!(agent.view().pods.len(), 2, "the view is there at once");
    assert_eq!(agent.view().settings.cluster_domain, "cluster.local");
    assert_eq!(*agent.handle.link.borrow(), Link::Offline);
    let status = agent.handle.reporter.final_status(&b).unwrap();
    assert_eq!(status.phase.as_deref(), Some("Failed"));

    let control = Control::admin(store.path(), &address).await;
    agent.live().await;
    eventually("the kept final status is stored", || {
        control.pod("b").filter(|pod| phase(pod) == Some("Failed"))
    })
    .await;
    agent.report(&a, "a", "Running", false);
    eventually("and so is the new one", || {
        control.pod("a").filter(|pod| phase(pod) == Some("Running"))
    })
    .await;
    // Deleted after it had ended: the held record lets the object go, nobody else has to act.
    control
        .registry
        .delete::<Pod>("default", "b", &DeleteOptions::default())
        .await
        .unwrap();
    eventually("the object goes", || {
        control.pod("b").is_none().then_some(())
    })
    .await;
    assert_eq!(agent.handle.reporter.counters().digest_mismatches, 0);
    agent.stop().await;
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_cluster_costs_one_commit_after_a_restart_of_either_side() {
    let (store, lib) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let control = Control::admin(store.path(), "127.0.0.1:0").await;
    let (address, url) = (control.address.to_string(), control.url());
    let agent = Agent::start(&url, "n1", lib.path());
    agent.live().await;
    let uid = control.create_pod("a", "n1").await;
    agent
        .until("the pod arrives", |view| view.pods.get(&uid).cloned())
        .await;
    let before = agent.view();
    control.stop().await;
    let control = Control::admin(store.path(), &address).await;
    let rev = control.registry.store().revision();
    agent
        .until("a commit of the new process", |view| {
            (view.rev > rev).then_some(())
        })
        .await;
    let after = agent.view();
    assert!(
        Arc::ptr_eq(&before.pods, &after.pods),
        "the pod was not sent again"
    );
    agent.stop().await;
    control.stop().await;
}

/// Sends a Hello and returns the stream down.
async fn hello(
    url: &str,
    node: &str,
    incarnation: u64,
) -> Result<(mpsc::Sender<proto::Up>, tonic::Streaming<proto::Down>), tonic::Status> {
    let mut client = FeedClient::connect(url.to_owned()).await.unwrap();
    let (up, queue) = mpsc::channel(4);
    let hello = proto::Hello {
        node: node.into(),
        incarnation,
        ..Default::default()
    };
    up.send(proto::Up {
        message: Some(up::Message::Hello(hello)),
    })
    .await
    .unwrap();
    Ok((
        up,
        client
            .session(ReceiverStream::new(queue))
            .await?
            .into_inner(),
    ))
}

/// The next message that is neither a batch nor a commit.
async fn next_word(stream: &mut tonic::Streaming<proto::Down>) -> Option<down::Message> {
    loop {
        let message = tokio::time::timeout(WAIT, stream.message()).await.unwrap();
        match message.ok()??.message {
            Some(down::Message::Batch(_) | down::Message::Commit(_)) => {}
            other => return other,
        }
    }
}

async fn leaves_with(stream: &mut tonic::Streaming<proto::Down>, text: &str) {
    match next_word(stream).await {
        Some(down::Message::GoAway(go_away)) => {
            assert!(go_away.reason.contains(text), "{}", go_away.reason);
        }
        other => panic!("want a GoAway with {text:?}, got {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_session_ends_the_older_and_an_older_agent_start_is_refused() {
    let store = tempfile::tempdir().unwrap();
    let control = Control::admin(store.path(), "127.0.0.1:0").await;
    let (_first_up, mut first) = hello(&control.url(), "n1", 5).await.unwrap();
    let Some(down::Message::Welcome(welcome)) = next_word(&mut first).await else {
        panic!()
    };
    assert_eq!(welcome.mode(), proto::welcome::Mode::Full);
    let (_second_up, mut second) = hello(&control.url(), "n1", 6).await.unwrap();
    leaves_with(&mut first, "newer session").await;
    let Some(down::Message::Welcome(newer)) = next_word(&mut second).await else {
        panic!()
    };
    assert!(newer.session > welcome.session);
    // The older start comes back, also to a control plane that has forgotten everything.
    let address = control.address.to_string();
    drop(second);
    control.stop().await;
    let control = Control::admin(store.path(), &address).await;
    let (_stale_up, mut stale) = hello(&control.url(), "n1", 5).await.unwrap();
    leaves_with(&mut stale, "newer start of the agent").await;
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_speaks_for_itself_only() {
    let store = tempfile::tempdir().unwrap();
    let control = Control::start(store.path(), "127.0.0.1:0", "system:node:n1", NODES_GROUP).await;
    let status = hello(&control.url(), "n2", 1).await.err().unwrap();
    assert_eq!(status.code(), tonic::Code::PermissionDenied, "{status}");
    let (_up, mut stream) = hello(&control.url(), "n1", 1).await.unwrap();
    assert!(matches!(
        next_word(&mut stream).await,
        Some(down::Message::Welcome(_))
    ));
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_for_a_pod_of_another_node_is_not_taken() {
    let (store, lib) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let control = Control::admin(store.path(), "127.0.0.1:0").await;
    let other: Node = serde_json::from_value(json!({"metadata": {"name": "n2"}})).unwrap();
    control.registry.create(&other).await.unwrap();
    let agent = Agent::start(&control.url(), "n1", lib.path());
    agent.live().await;
    let foreign = control.create_pod("foreign", "n2").await;
    agent.report(&foreign, "foreign", "Running", false);
    let own = control.create_pod("own", "n1").await;
    agent.report(&own, "own", "Running", false);
    eventually("its own is stored", || {
        control
            .pod("own")
            .filter(|pod| phase(pod) == Some("Running"))
    })
    .await;
    assert_eq!(phase(&control.pod("foreign").unwrap()), Some("Pending"));
    assert!(!agent.view().pods.contains_key(&foreign));
    agent.stop().await;
    control.stop().await;
}

/// A slow reader: two commits are open, then nothing is sent until one is taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_agent_gets_the_latest_state_in_few_commits() {
    let store = tempfile::tempdir().unwrap();
    let control = Control::admin(store.path(), "127.0.0.1:0").await;
    let (up, mut stream) = hello(&control.url(), "n1", 1).await.unwrap();
    assert!(matches!(
        next_word(&mut stream).await,
        Some(down::Message::Welcome(_))
    ));
    let service: Service = serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": "default"}, "spec": {"ports": [{"port": 80}]}}))
    .unwrap();
    let mut service = control.registry.create(&service).await.unwrap();
    for port in 1..=200 {
        service.metadata.resource_version = None;
        service.spec.as_mut().unwrap().ports.as_mut().unwrap()[0].port = port;
        service = control.registry.update(&service).await.unwrap();
    }
    let rev = service
        .metadata
        .resource_version
        .unwrap()
        .parse::<u64>()
        .unwrap();
    let (mut commits, mut last_port) = (0, 0);
    loop {
        let message = tokio::time::timeout(WAIT, stream.message())
            .await
            .unwrap()
            .unwrap();
        match message.unwrap().message {
            Some(down::Message::Batch(batch)) => {
                for item in batch.items {
                    let item = <proto::Item as prost::Message>::decode(item).unwrap();
                    if let Some(proto::item::Value::Service(service)) = item.value {
                        last_port = service.ports[0].port;
                    }
                }
            }
            Some(down::Message::Commit(commit)) => {
                commits += 1;
                let ack = proto::Ack {
                    applied: commit.rev,
                    ..Default::default()
                };
                up.send(proto::Up {
                    message: Some(up::Message::Ack(ack)),
                })
                .await
                .unwrap();
                if commit.rev >= rev {
                    break;
                }
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(last_port, 200);
    assert!(commits <= 4, "{commits} commits for 201 changes");
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_floor_is_answered_when_every_node_has_programmed_it() {
    let (store, lib) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let control = Control::admin(store.path(), "127.0.0.1:0").await;
    let agent = Agent::start(&control.url(), "n1", lib.path());
    agent.live().await;
    let (up, mut owner) = hello(&control.url(), "n2", 1).await.unwrap();
    let Some(down::Message::Welcome(welcome)) = next_word(&mut owner).await else {
        panic!()
    };
    let rev = welcome.session;
    let wait = proto::Up {
        message: Some(up::Message::FloorWait(proto::FloorWait { rev })),
    };
    up.send(wait).await.unwrap();
    let view = agent
        .until("n1 knows", |view| {
            (view.nodes.len() == 2).then_some(view.rev)
        })
        .await;
    agent.handle.reporter.programmed(view, Vec::new());
    let early = tokio::time::timeout(Duration::from_millis(300), next_word(&mut owner)).await;
    assert!(early.is_err(), "n2 itself has programmed nothing yet");
    let Some(down::Message::Floor(named)) = next_word(&mut owner).await else {
        panic!()
    };
    assert_eq!(
        (named.waited, named.missing.as_slice()),
        (rev, &["n2 (not yet back)".to_owned()][..]),
        "who waits in vain is told for whom"
    );
    let rev_now = control.registry.store().revision();
    let ack = proto::Ack {
        rev: rev_now,
        applied: rev_now,
        ..Default::default()
    };
    up.send(proto::Up {
        message: Some(up::Message::Ack(ack)),
    })
    .await
    .unwrap();
    let Some(down::Message::Floor(floor)) = next_word(&mut owner).await else {
        panic!()
    };
    assert!(floor.rev >= rev);
    assert_eq!((floor.nodes, floor.missing.len()), (2, 0));
    agent.stop().await;
    control.stop().await;
}

/// The next answer to a wait for a floor.
async fn answer(
    waits: &mut tokio::sync::watch::Receiver<Option<proto::Floor>>,
) -> Option<proto::Floor> {
    tokio::time::timeout(WAIT, waits.changed())
        .await
        .unwrap()
        .ok()?;
    waits.borrow_and_update().clone()
}

/// Two agents: the owner of a pod asks, the other is silent, then acks; the control plane dies in the
/// middle of a second wait and is asked again.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_is_answered_names_who_is_missing_and_survives_a_failover() {
    let store = tempfile::tempdir().unwrap();
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let control = Control::admin(store.path(), "127.0.0.1:0").await;
    let (address, url) = (control.address.to_string(), control.url());
    let (owner, other) = (
        Agent::start(&url, "n1", one.path()),
        Agent::start(&url, "n2", two.path()),
    );
    owner.live().await;
    other.live().await;
    let both = |view: &View| (view.nodes.len() == 2).then_some(view.rev);
    let rev = owner.until("both are known", both).await;
    let ack = |agent: &Agent| {
        let rev = agent.view().rev;
        agent.handle.reporter.programmed(rev, Vec::new());
    };
    ack(&owner);
    let mut waits = owner.handle.reporter.floor(rev);
    let floor = answer(&mut waits).await.unwrap();
    assert_eq!((floor.missing_count, floor.nodes), (1, 2), "{floor:?}");
    other
        .until("the other follows", |view| (view.rev >= rev).then_some(()))
        .await;
    ack(&other);
    let floor = answer(&mut waits).await.unwrap();
    assert_eq!((floor.missing_count, floor.waited), (0, rev), "{floor:?}");

    // Asked anew, since an answer is not kept; the control plane dies before the next change is
    // programmed anywhere, and its successor knows of the acks only what agents say.
    let service: Service =
        serde_json::from_value(json!({"metadata": {"name": "s", "namespace": "default"},
        "spec": {"ports": [{"port": 80}]}}))
        .unwrap();
    control.registry.create(&service).await.unwrap();
    let named = |view: &View| {
        let name = |n: &gantry_agent::view::ServiceName| n.name == "s";
        view.services.keys().any(name).then_some(view.rev)
    };
    let rev = owner.until("the Service arrives", named).await;
    other.until("the Service arrives", named).await;
    let mut waits = owner.handle.reporter.floor(rev);
    control.stop().await;
    let control = Control::admin(store.path(), &address).await;
    owner.live().await;
    other.live().await;
    ack(&owner);
    ack(&other);
    let floor = loop {
        let floor = answer(&mut waits).await.unwrap();
        if floor.missing_count == 0 {
            break floor;
        }
    };
    assert_eq!((floor.waited, floor.nodes), (rev, 2));
    assert!(!owner.handle.reporter.is_cut_off());
    owner.stop().await;
    other.stop().await;
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn flows_come_from_every_node_until_nobody_listens() {
    let store = tempfile::tempdir().unwrap();
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let control = Control::admin(store.path(), "127.0.0.1:0").await;
    let first = Agent::start(&control.url(), "n1", one.path());
    let second = Agent::start(&control.url(), "n2", two.path());
    first.live().await;
    second.live().await;
    let mut client = StatsClient::connect(control.url()).await.unwrap();
    let mut parts = client
        .flows(proto::FlowsRequest::default())
        .await
        .unwrap()
        .into_inner();
    let mut verdicts = BTreeMap::new();
    while let Some(part) = parts.message().await.unwrap() {
        assert_eq!(part.error, "");
        let own: &mut Vec<String> = verdicts.entry(part.node).or_default();
        own.extend(part.flows.into_iter().map(|flow| flow.verdict));
    }
    let both = vec!["forwarded".to_owned(), "dropped".to_owned()];
    assert_eq!(
        verdicts,
        BTreeMap::from([("n1".into(), both.clone()), ("n2".into(), both)])
    );
    // A quiet node is left when its reader leaves, and not with the next flow.
    let follow = proto::FlowsRequest {
        node: "n1".into(),
        follow: true,
        ..Default::default()
    };
    let mut parts = client.flows(follow.clone()).await.unwrap().into_inner();
    for _ in 0..2 {
        assert!(!parts.message().await.unwrap().unwrap().last);
    }
    assert_eq!(*first.watches.lock().unwrap(), 1);
    drop(parts);
    eventually("the watch ends", || {
        (*first.watches.lock().unwrap() == 0).then_some(())
    })
    .await;
    // A node that goes is told of.
    let mut parts = client.flows(follow).await.unwrap().into_inner();
    parts.message().await.unwrap().unwrap();
    first.stop().await;
    let last = loop {
        let part = parts.message().await.unwrap().unwrap();
        if part.last {
            break part;
        }
    };
    assert_eq!(last.node, "n1");
    assert!(!last.error.is_empty());
    second.stop().await;
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_explanation_is_asked_of_both_nodes() {
    let store = tempfile::tempdir().unwrap();
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let control = Control::admin(store.path(), "127.0.0.1:0").await;
    let first = Agent::start(&control.url(), "n1", one.path());
    let second = Agent::start(&control.url(), "n2", two.path());
    first.live().await;
    second.live().await;
    control.create_pod("client", "n1").await;
    let mut client = StatsClient::connect(control.url()).await.unwrap();
    let request = |pod: &str| proto::ExplainRequest {
        pod: pod.into(),
        service: "web".into(),
        port: "80".into(),
        ..Default::default()
    };
    let reply = client
        .explain(request("client"))
        .await
        .unwrap()
        .into_inner();
    let told = (reply.connects, reply.conclusion.as_str());
    assert_eq!(told, (false, "dropped at ingress"));
    let absent = client.explain(request("nobody")).await.unwrap_err();
    assert_eq!(absent.code(), tonic::Code::NotFound);
    second.stop().await;
    eventually("it has left", || {
        (!control.feed.is_connected("n2")).then_some(())
    })
    .await;
    let reply = client
        .explain(request("client"))
        .await
        .unwrap()
        .into_inner();
    assert!(!reply.connects && reply.conclusion.starts_with("unknown: node n2"));
    first.stop().await;
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn programmed_services_come_from_every_node_in_parts() {
    let store = tempfile::tempdir().unwrap();
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let control = Control::admin(store.path(), "127.0.0.1:0").await;
    let (first, second) = (
        Agent::start(&control.url(), "n1", one.path()),
        Agent::start(&control.url(), "n2", two.path()),
    );
    first.live().await;
    second.live().await;
    let mut client = StatsClient::connect(control.url()).await.unwrap();
    let ask = |node: &str| proto::ServicesRequest {
        node: node.into(),
        namespace: "shop".into(),
        ..Default::default()
    };
    let mut parts = client.services(ask("")).await.unwrap().into_inner();
    let mut counts = BTreeMap::new();
    while let Some(part) = parts.message().await.unwrap() {
        assert_eq!(part.error, "");
        assert!(
            part.services
                .iter()
                .all(|service| service.namespace == "shop")
        );
        *counts.entry(part.node).or_insert(0) += part.services.len();
    }
    assert_eq!(
        counts,
        BTreeMap::from([("n1".into(), 250), ("n2".into(), 250)])
    );
    let drops = proto::ServicesRequest {
        node: "n2".into(),
        drops: true,
        ..Default::default()
    };
    let mut parts = client.services(drops).await.unwrap().into_inner();
    let part = parts.message().await.unwrap().unwrap();
    assert_eq!((part.drops[0].packets, part.services.len()), (3, 0));
    let unknown = client.services(ask("n3")).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);
    // One that is away says so, the other answers.
    second.stop().await;
    eventually("it has left", || {
        (!control.feed.is_connected("n2")).then_some(())
    })
    .await;
    let mut parts = client.services(ask("")).await.unwrap().into_inner();
    let (mut errors, mut count) = (Vec::new(), 0);
    while let Some(part) = parts.message().await.unwrap() {
        count += part.services.len();
        errors.extend((!part.error.is_empty()).then_some(part.node));
    }
    assert_eq!((count, errors), (250, vec!["n2".to_owned()]));
    first.stop().await;
    control.stop().await;
}

/// The same with real certificates: what `gantry-control` makes is what the agent dials with.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dials_with_its_certificate_and_for_its_own_name_only() {
    let dir = tempfile::tempdir().unwrap();
    let control = Control::admin(dir.path(), "127.0.0.1:0").await;
    let authority = Authority::open(dir.path()).unwrap();
    let names = [ServerName::Address("127.0.0.1".parse().unwrap())];
    let credentials = authority.server(&names).unwrap();
    let server = Server::new(
        &control.registry,
        &control.feed,
        authority.certificate(),
        ServingCertificate::new(&credentials).unwrap(),
        &tokens(dir.path()),
    )
    .unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let serving = tokio::spawn(server.serve(listener, control.token.clone()));
    let files = dir.path().join("agent");
    authority.ensure_agent(&files, "n1").unwrap();

    let agent = Agent::with_credentials(&url, "n1", &dir.path().join("lib"), &files);
    agent.live().await;
    agent.stop().await;
    let other = Agent::with_credentials(&url, "n2", &dir.path().join("lib2"), &files);
    eventually("n2 is refused", || {
        (other.handle.reporter.counters().streams_broken > 1).then_some(())
    })
    .await;
    assert_eq!(*other.handle.link.borrow(), Link::Offline);
    assert!(control.registry.get::<Node>("", "n2").unwrap().is_none());
    other.stop().await;
    control.stop().await;
    serving.await.unwrap().unwrap();
}

async fn exec_input(input: exec_input::Input) -> proto::ExecInput {
    proto::ExecInput { input: Some(input) }
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_and_exec_ride_the_agents_own_connection() {
    let (store, lib) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let control = Control::admin(store.path(), "127.0.0.1:0").await;
    let agent = Agent::start(&control.url(), "n1", lib.path());
    agent.live().await;
    control.create_pod("web", "n1").await;
    let mut client = PodsClient::connect(control.url()).await.unwrap();

    let request = |container: &str, previous| proto::LogsRequest {
        namespace: "default".into(),
        pod: "web".into(),
        container: container.into(),
        previous,
        ..Default::default()
    };
    let mut logs = client.logs(request("", false)).await.unwrap().into_inner();
    let mut text = Vec::new();
    while let Some(chunk) = logs.message().await.unwrap() {
        text.extend(chunk.data);
    }
    assert_eq!(text, b"one\ntwo\nthree\n");
    let status = client.logs(request("x", false)).await.err().unwrap();
    assert_eq!(status.message(), "container \"x\" is not valid for pod web");
    let status = client.logs(request("", true)).await.err().unwrap();
    assert_eq!(
        status.message(),
        "previous terminated container \"c\" not found"
    );
    let missing = proto::LogsRequest {
        pod: "nope".into(),
        ..request("", false)
    };
    assert_eq!(
        client.logs(missing).await.err().unwrap().code(),
        tonic::Code::NotFound
    );

    let start = proto::ExecStart {
        namespace: "default".into(),
        pod: "web".into(),
        command: vec!["cat".into()],
        stdin: true,
        ..Default::default()
    };
    let (input, queue) = mpsc::channel(4);
    input
        .send(exec_input(exec_input::Input::Start(start.clone())).await)
        .await
        .unwrap();
    let mut output = client
        .exec(ReceiverStream::new(queue))
        .await
        .unwrap()
        .into_inner();
    input
        .send(exec_input(exec_input::Input::Stdin("hi".into())).await)
        .await
        .unwrap();
    input
        .send(exec_input(exec_input::Input::StdinClosed(true)).await)
        .await
        .unwrap();
    let (mut stdout, mut code) = (Vec::new(), None);
    while let Some(message) = output.message().await.unwrap() {
        match message.output {
            Some(exec_output::Output::Stdout(data)) => stdout.extend(data),
            Some(exec_output::Output::Exit(exit)) => code = Some(exit.code),
            _ => {}
        }
    }
    assert_eq!((stdout.as_slice(), code), (b"cat:hi".as_slice(), Some(7)));

    // A client that leaves takes its command with it.
    let (input, queue) = mpsc::channel(4);
    input
        .send(exec_input(exec_input::Input::Start(start)).await)
        .await
        .unwrap();
    let output = client.exec(ReceiverStream::new(queue)).await.unwrap();
    let before = *agent.killed.lock().unwrap();
    drop((output, input));
    eventually("the command is killed", || {
        (*agent.killed.lock().unwrap() > before).then_some(())
    })
    .await;

    agent.stop().await;
    eventually("the session ends", || {
        (!control.feed.is_connected("n1")).then_some(())
    })
    .await;
    let status = client.logs(request("", false)).await.err().unwrap();
    assert_eq!(status.message(), "node n1 is not connected");
    control.stop().await;
}

/// A control plane fed by hand: every session is given to the test.
struct HandFed {
    sessions: mpsc::Sender<HandFedSession>,
}

struct HandFedSession {
    hello: proto::Hello,
    up: tonic::Streaming<proto::Up>,
    down: mpsc::Sender<Result<proto::Down, tonic::Status>>,
}

#[tonic::async_trait]
impl feed_server::Feed for HandFed {
    type SessionStream = ReceiverStream<Result<proto::Down, tonic::Status>>;
    type TunnelStream = ReceiverStream<Result<proto::TunnelDown, tonic::Status>>;

    async fn session(
        &self,
        request: tonic::Request<tonic::Streaming<proto::Up>>,
    ) -> Result<tonic::Response<Self::SessionStream>, tonic::Status> {
        let mut up = request.into_inner();
        let Some(up::Message::Hello(hello)) = up.message().await?.unwrap().message else {
            panic!("the first message is Hello")
        };
        let (down, stream) = mpsc::channel(16);
        self.sessions
            .send(HandFedSession { hello, up, down })
            .await
            .unwrap();
        Ok(tonic::Response::new(ReceiverStream::new(stream)))
    }

    async fn tunnel(
        &self,
        _: tonic::Request<tonic::Streaming<proto::TunnelUp>>,
    ) -> Result<tonic::Response<Self::TunnelStream>, tonic::Status> {
        Err(tonic::Status::unimplemented("no tunnels here"))
    }

    async fn issue_token(
        &self,
        _: tonic::Request<proto::TokenRequest>,
    ) -> Result<tonic::Response<proto::IssuedToken>, tonic::Status> {
        Err(tonic::Status::unimplemented("no tokens here"))
    }
}

async fn hand_fed() -> (String, mpsc::Receiver<HandFedSession>) {
    let (sessions, receiver) = mpsc::channel(1);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = tonic::transport::Server::builder()
        .add_service(feed_server::FeedServer::new(HandFed { sessions }));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (url, receiver)
}

impl HandFedSession {
    async fn next(sessions: &mut mpsc::Receiver<HandFedSession>) -> Self {
        tokio::time::timeout(WAIT, sessions.recv())
            .await
            .unwrap()
            .unwrap()
    }

    async fn send(&self, message: down::Message) {
        self.down
            .send(Ok(proto::Down {
                message: Some(message),
            }))
            .await
            .unwrap();
    }

    async fn welcome(&self, mode: proto::welcome::Mode, counter: u64, id: &str) {
        let lineage = Some(proto::Lineage {
            counter,
            id: id.into(),
        });
        let mut welcome = proto::Welcome {
            session: 1,
            lineage,
            ..Default::default()
        };
        welcome.set_mode(mode);
        self.send(down::Message::Welcome(welcome)).await;
    }

    /// Sends these items and a commit for what they should have been.
    async fn commit(&self, rev: u64, sent: &[Bytes], meant: &[Bytes]) {
        let items = sent.to_vec();
        self.send(down::Message::Batch(proto::Batch { items }))
            .await;
        let digest: Digest = meant.iter().map(|item| item_hash(item)).collect();
        let commit = proto::Commit {
            rev,
            common_digest: digest.value(),
            ..Default::default()
        };
        self.send(down::Message::Commit(commit)).await;
    }

    async fn applied(&mut self) -> u64 {
        loop {
            let message = tokio::time::timeout(WAIT, self.up.message())
                .await
                .unwrap()
                .unwrap();
            if let Some(up::Message::Ack(ack)) = message.unwrap().message {
                return ack.applied;
            }
        }
    }
}

fn service_item(uid: &str) -> Bytes {
    let service = proto::Service {
        uid: uid.into(),
        ..Default::default()
    };
    let value = Some(proto::item::Value::Service(service));
    let item = proto::Item {
        key: "service/default/web".into(),
        rev: 0,
        value,
    };
    prost::Message::encode_to_vec(&item).into()
}

fn service_uid(view: &View) -> Option<String> {
    view.services
        .values()
        .next()
        .map(|service| service.uid.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_found_at_its_commit_and_healed() {
    let lib = tempfile::tempdir().unwrap();
    let (url, mut sessions) = hand_fed().await;
    let agent = Agent::start(&url, "n1", lib.path());
    let mut session = HandFedSession::next(&mut sessions).await;
    session.welcome(proto::welcome::Mode::Full, 1, "a").await;
    session
        .commit(3, &[service_item("good")], &[service_item("good")])
        .await;
    assert_eq!(session.applied().await, 3);
    session
        .commit(4, &[service_item("goof")], &[service_item("better")])
        .await;

    let session = HandFedSession::next(&mut sessions).await;
    assert_eq!(
        (session.hello.common_rev, session.hello.private.len()),
        (0, 0)
    );
    assert_eq!(
        service_uid(&agent.view()).as_deref(),
        Some("good"),
        "the last good view holds"
    );
    session.welcome(proto::welcome::Mode::Full, 1, "a").await;
    session
        .commit(4, &[service_item("better")], &[service_item("better")])
        .await;
    agent
        .until("healed", |view| {
            (service_uid(view)? == "better").then_some(())
        })
        .await;
    assert_eq!(agent.handle.reporter.counters().digest_mismatches, 1);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_takes_effect_before_its_commit_and_an_older_history_is_refused() {
    let lib = tempfile::tempdir().unwrap();
    let (url, mut sessions) = hand_fed().await;
    let agent = Agent::start(&url, "n1", lib.path());
    let mut session = HandFedSession::next(&mut sessions).await;
    session.welcome(proto::welcome::Mode::Full, 7, "new").await;
    session
        .commit(3, &[service_item("a")], &[service_item("a")])
        .await;
    assert_eq!(session.applied().await, 3);
    // A batch whose commit never comes.
    let items = vec![service_item("b")];
    session
        .send(down::Message::Batch(proto::Batch { items }))
        .await;
    drop(session);

    let session = HandFedSession::next(&mut sessions).await;
    assert_eq!(service_uid(&agent.view()).as_deref(), Some("a"));
    assert_eq!(session.hello.common_rev, 3);
    session
        .welcome(
            proto::welcome::Mode::Full,
            7,
            "another with the same number",
        )
        .await;
    eventually("refused", || {
        matches!(&*agent.handle.link.borrow(), Link::Refused(_)).then_some(())
    })
    .await;
    let session = HandFedSession::next(&mut sessions).await;
    session
        .welcome(proto::welcome::Mode::Full, 8, "restored")
        .await;
    session
        .commit(2, &[service_item("c")], &[service_item("c")])
        .await;
    agent
        .until("a newer history", |view| {
            (service_uid(view)? == "c").then_some(())
        })
        .await;
    assert_eq!(agent.view().rev, 2, "a revision of the new history");
    agent.stop().await;
}

/// The content of a view as text, without its revision.
fn content(view: &View) -> String {
    let pods: BTreeMap<_, _> = view.pods.iter().collect();
    format!(
        "{:?} {:?} {:?} {pods:?} {:?} {:?} {:?}",
        view.services, view.backends, view.nodes, view.blobs, view.policies, view.peers
    )
}

/// One random write; conflicts and absences are part of the game.
async fn random_write(registry: &Registry, seed: u64) {
    let (what, i, x) = (seed % 9, (seed / 9) % 4, (seed / 36) % 5);
    let options = DeleteOptions {
        grace_period_s: Some(x as i64 % 2 * 30),
        ..Default::default()
    };
    let name = format!("o{i}");
    let meta = json!({"name": name, "namespace": "default"});
    match what {
        0 => {
            let service = json!({"metadata": meta, "spec": {"ports": [{"port": 80 + x}]}});
            let service: Service = serde_json::from_value(service).unwrap();
            if registry.create(&service).await.is_err() {
                let _ = registry.update(&service).await;
            }
        }
        1 => {
            let pods = registry.list::<Pod>(Some("default")).unwrap().1;
            let endpoints: Vec<_> = pods
                .iter()
                .take(x as usize)
                .map(|pod| {
                    json!({"addresses": [format!("10.244.7.{}", x + 2)], "targetRef": {
                        "kind": "Pod", "namespace": "default",
                        "name": pod.metadata.name, "uid": pod.metadata.uid}})
                })
                .collect();
            let slice = json!({"metadata": {"name": name, "namespace": "default",
                    "labels": {"kubernetes.io/service-name": format!("o{}", x % 4)}},
                "addressType": "IPv4", "endpoints": endpoints, "ports": [{"port": 8080}]});
            let slice: EndpointSlice = serde_json::from_value(slice).unwrap();
            if registry.create(&slice).await.is_err() {
                let _ = registry.update(&slice).await;
            }
        }
        2 => {
            let pod = json!({"metadata": meta, "spec": {
                "nodeName": if x % 2 == 0 { "n1" } else { "" },
                "containers": [{"name": "c", "image": "i",
                    "envFrom": [{"secretRef": {"name": format!("o{}", x % 4)}}]}]}});
            let pod: Pod = serde_json::from_value(pod).unwrap();
            let _ = registry.create(&pod).await;
        }
        3 => {
            let secret = json!({"metadata": meta, "stringData": {"v": x.to_string()},
                "data": {"w": "eA=="}, "type": "Opaque"});
            let secret: Secret = serde_json::from_value(secret).unwrap();
            if registry.create(&secret).await.is_err() {
                let _ = registry.update(&secret).await;
            }
        }
        4 => drop(registry.delete::<Pod>("default", &name, &options).await),
        5 => drop(registry.delete::<Service>("default", &name, &options).await),
        6 => {
            let to = if x % 2 == 0 {
                json!({"namespaceSelector": {}})
            } else {
                json!({"podSelector": {}})
            };
            let policy = json!({"metadata": meta, "spec": {"podSelector": {},
                "policyTypes": ["Egress"], "egress": [{"to": [to], "ports": [{"port": 50 + x}]}]}});
            let policy: NetworkPolicy = serde_json::from_value(policy).unwrap();
            if registry.create(&policy).await.is_err() {
                let _ = registry.update(&policy).await;
            }
        }
        7 => drop(
            registry
                .delete::<NetworkPolicy>("default", &name, &options)
                .await,
        ),
        _ => drop(registry.delete::<Secret>("default", &name, &options).await),
    }
}

/// Random history, random ends of either side: no digest ever differs, and when the faults stop an
/// agent that lived through it has exactly what one with an empty disk gets.
#[tokio::test(flavor = "multi_thread")]
async fn after_any_history_an_old_agent_has_what_a_new_one_gets() {
    let (store, lib, fresh) = (
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
    );
    let mut control = Control::admin(store.path(), "127.0.0.1:0").await;
    let address = control.address.to_string();
    let mut agent = Agent::start(&control.url(), "n1", lib.path());
    agent.live().await;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut mismatches = 0;
    for round in 0..300u32 {
        // xorshift64: a fixed seed, so that a failure comes again.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random_write(&control.registry, random >> 8).await;
        if round % 40 == 13 {
            mismatches += agent.handle.reporter.counters().digest_mismatches;
            if round % 80 == 13 {
                agent.kill().await
            } else {
                agent.stop().await
            }
            agent = Agent::start(&control.url(), "n1", lib.path());
        }
        if round % 90 == 50 {
            control.stop().await;
            control = Control::admin(store.path(), &address).await;
        }
    }
    agent.live().await;
    let rev = control.registry.store().revision();
    mismatches += agent.handle.reporter.counters().digest_mismatches;
    assert_eq!(mismatches, 0);
    // A last change that both must have.
    let marker: Service = serde_json::from_value(json!({
        "metadata": {"name": "marker", "namespace": "default"}, "spec": {"ports": [{"port": 1}]}}))
    .unwrap();
    control.registry.create(&marker).await.unwrap();
    agent
        .until("the last change", |view| (view.rev > rev).then_some(()))
        .await;
    let has_marker = |view: &View| {
        view.services
            .keys()
            .any(|s| s.name == "marker")
            .then_some(())
    };
    agent.until("the marker", has_marker).await;
    let old = content(&agent.view());
    agent.stop().await;

    std::fs::create_dir_all(fresh.path().join("feed")).unwrap();
    std::fs::copy(
        lib.path().join("feed/incarnation"),
        fresh.path().join("feed/incarnation"),
    )
    .unwrap();
    let agent = Agent::start(&control.url(), "n1", fresh.path());
    agent.live().await;
    agent.until("the marker", has_marker).await;
    assert_eq!(content(&agent.view()), old);
    assert!(old.contains("Backend"), "the history has made backends");
    assert!(old.contains("Policy {"), "the history has made policies");
    agent.stop().await;
    control.stop().await;
}
