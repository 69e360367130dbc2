//! Joining end to end: a whole control plane on a loopback port, `gantry-agent join`, and the agent's feed.

use clap::Parser as _;
use gantry_agent::join::{self, CaHash, Join, JoinError};
use gantry_api::bootstrap_token::{self, BootstrapToken};
use gantry_api::k8s_openapi::ByteString;
use gantry_control::config::Arguments;
use gantry_control::run::Control as Whole;

use super::*;

const TOKEN: &str = "abcdef.fedcba9876543210";

struct Bed {
    control: Whole,
    stop: CancellationToken,
    dir: tempfile::TempDir,
}

async fn bed(more: &[&str]) -> Bed {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (data, config) = (path("data"), path("admin.kubeconfig"));
    let fixed = [
        "gantry-control",
        "--listen",
        "127.0.0.1:0",
        "--data-dir",
        &data,
    ];
    let fixed = [&fixed[..], &["--kubeconfig", &config]].concat();
    let arguments = Arguments::parse_from([&fixed[..], more].concat());
    let stop = CancellationToken::new();
    let control = Whole::start(&arguments, &stop).await.unwrap();
    let token = BootstrapToken::parse(TOKEN).unwrap();
    let data = [
        (bootstrap_token::HASH_KEY, token.hash()),
        (bootstrap_token::AUTHENTICATION_KEY, "true".into()),
        (bootstrap_token::USES_KEY, "10".into()),
    ];
    let data = data.map(|(key, text)| (key.to_owned(), ByteString(text.into_bytes())));
    let mut secret = Secret {
        type_: Some(bootstrap_token::SECRET_TYPE.into()),
        data: Some(data.into_iter().collect()),
        ..Secret::default()
    };
    secret.metadata.name = Some(token.secret_name());
    secret.metadata.namespace = Some(bootstrap_token::NAMESPACE.into());
    control.registry().create(&secret).await.unwrap();
    Bed { control, stop, dir }
}

impl Bed {
    fn join(&self, node: &str) -> Join {
        Join {
            server: self.control.address().to_string(),
            token: TOKEN.into(),
            ca_hash: self.control.ca_hash().parse().unwrap(),
            node: node.into(),
            credentials: self.dir.path().join(node),
            machine_id: format!("machine of {node}"),
            incarnation: 0,
        }
    }

    fn agent(&self, node: &str) -> Agent {
        let url = format!("https://{}", self.control.address());
        let lib = self.dir.path().join(format!("{node}-lib"));
        Agent::with_credentials(&url, node, &lib, &self.dir.path().join(node))
    }

    async fn end(self) {
        self.stop.cancel();
        self.control.drain().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_joins_by_token_and_pin_and_nothing_else() {
    let bed = bed(&[]).await;
    let refused = |outcome: Result<join::Joined, JoinError>, words: &str| {
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert!(!error.contains("fedcba9876543210"), "{error}");
    };
    let other: CaHash = format!("sha256:{}", "0".repeat(64)).parse().unwrap();
    let wrong = Join {
        ca_hash: other,
        ..bed.join("n1")
    };
    let error = join::join(&wrong).await.unwrap_err().to_string();
    assert!(
        error.contains(&bed.control.ca_hash()) && error.contains(&other.to_string()),
        "{error}"
    );
    let text = |token: &str| Join {
        token: token.into(),
        ..bed.join("n1")
    };
    refused(join::join(&text("abcdef")).await, "malformed");
    refused(
        join::join(&text("abcdef.aaaaaaaaaaaaaaaa")).await,
        "is wrong",
    );
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nowhere = Join {
        server: closed.local_addr().unwrap().to_string(),
        ..bed.join("n1")
    };
    drop(closed);
    refused(join::join(&nowhere).await, "cannot be reached");
    let unnamed = Join {
        server: format!("127.0.0.9:{}", bed.control.address().port()),
        ..bed.join("n1")
    };
    // Nobody listens there: the server has one address.
    refused(join::join(&unnamed).await, "cannot be reached");

    // Of several one that answers is enough, and the agent gets all.
    let several = Join {
        server: format!("{},{}", nowhere.server, bed.control.address()),
        ..bed.join("n3")
    };
    let joined = join::join(&several).await.unwrap();
    let urls = format!(
        "https://{},https://{}",
        nowhere.server,
        bed.control.address()
    );
    assert_eq!(joined.server, urls);
    let kept = gantry_agent::credentials::server(&several.credentials);
    assert_eq!(kept, Some(urls));
    assert!(join::join(&several).await.unwrap().before);

    let joined = join::join(&bed.join("n1")).await.unwrap();
    assert!(!joined.before);
    let again = join::join(&bed.join("n1")).await.unwrap();
    assert!(again.before, "the second time there is nothing to do");
    let renamed = Join {
        node: "n9".into(),
        ..bed.join("n1")
    };
    refused(join::join(&renamed).await, "gantry reset");

    let agent = bed.agent("n1");
    agent.live().await;
    agent
        .until("the node has its pod prefix", |view| view.settings.pod_cidr)
        .await;
    let taken = Join {
        credentials: bed.dir.path().join("thief"),
        ..bed.join("n1")
    };
    refused(join::join(&taken).await, "alive");
    let other = Join {
        machine_id: "another".into(),
        ..bed.join("n1")
    };
    assert!(
        join::join(&other).await.unwrap().before,
        "the machine's own files come first"
    );

    // It speaks for its own name only.
    let lib = bed.dir.path().join("n2-lib");
    let url = format!("https://{}", bed.control.address());
    let other = Agent::with_credentials(&url, "n2", &lib, &bed.dir.path().join("n1"));
    eventually("n2 is refused", || {
        (other.handle.reporter.counters().streams_broken > 1).then_some(())
    })
    .await;
    let registry = bed.control.registry();
    assert!(registry.get::<Node>("", "n2").unwrap().is_none());
    other.stop().await;

    // Deleted: the stream ends, and nothing brings the node back but another join.
    registry
        .delete::<Node>("", "n1", &DeleteOptions::default())
        .await
        .unwrap();
    eventually("n1 is refused", || {
        let link = agent.handle.link.borrow().clone();
        matches!(link, Link::Refused(reason) if reason.contains("gantry join")).then_some(())
    })
    .await;
    // It tries again meanwhile.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(
        registry.get::<Node>("", "n1").unwrap().is_none(),
        "it did not make itself again"
    );
    assert!(
        matches!(&*agent.handle.link.borrow(), Link::Refused(reason) if reason.contains("gantry join"))
    );
    assert!(!join::join(&bed.join("n1")).await.unwrap().before);
    agent.live().await;
    agent.stop().await;
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_moves_to_renewed_certificates_before_theirs_end() {
    let bed = bed(&["--node-certificate-life-s", "6"]).await;
    let joined = join::join(&bed.join("n1")).await.unwrap();
    let agent = bed.agent("n1");
    agent.live().await;
    let first = agent.handle.link.borrow().clone();
    // Through three lives: a stream that stayed on its certificate would have been ended at it.
    let until = std::time::Instant::now() + Duration::from_secs(18);
    let mut links = vec![first];
    while std::time::Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let link = agent.handle.link.borrow().clone();
        if matches!(link, Link::Live { .. }) && links.last() != Some(&link) {
            links.push(link);
        }
    }
    assert!(
        (4..=8).contains(&links.len()),
        "a new session for each: {links:?}"
    );
    let held = gantry_agent::credentials::joined(&bed.dir.path().join("n1"))
        .unwrap()
        .unwrap();
    assert!(held.not_after_s > joined.not_after_s + 8, "{held:?}");
    let node = bed
        .control
        .registry()
        .get::<Node>("", "n1")
        .unwrap()
        .unwrap();
    let keys = &node.metadata.annotations.unwrap()[gantry_control::joining::KEYS_ANNOTATION];
    assert_eq!(keys.split(',').count(), 2, "{keys}");
    agent.live().await;
    agent.stop().await;
    bed.end().await;
}

/// A session that does not move is ended with its certificate.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_ends_with_its_certificate() {
    let bed = bed(&["--node-certificate-life-s", "5"]).await;
    join::join(&bed.join("n1")).await.unwrap();
    let files = bed.dir.path().join("n1");
    let pem = gantry_agent::credentials::read(&files).unwrap();
    let tls = tonic::transport::ClientTlsConfig::new()
        .ca_certificate(tonic::transport::Certificate::from_pem(pem.ca))
        .identity(tonic::transport::Identity::from_pem(
            pem.certificate,
            pem.key,
        ));
    let url = format!("https://{}", bed.control.address());
    let endpoint = tonic::transport::Endpoint::from_shared(url).unwrap();
    let channel = endpoint.tls_config(tls).unwrap().connect().await.unwrap();
    let (up, queue) = mpsc::channel(4);
    let hello = proto::Hello {
        node: "n1".into(),
        incarnation: 1,
        ..Default::default()
    };
    up.send(proto::Up {
        message: Some(up::Message::Hello(hello)),
    })
    .await
    .unwrap();
    let mut stream = FeedClient::new(channel)
        .session(ReceiverStream::new(queue))
        .await
        .unwrap()
        .into_inner();
    let welcome = next_word(&mut stream).await;
    assert!(
        matches!(welcome, Some(down::Message::Welcome(_))),
        "{welcome:?}"
    );
    leaves_with(&mut stream, "certificate of this connection has ended").await;
    bed.end().await;
}

/// What the worker of a pod would be told by the view of `agent`.
fn has_pod(agent: &Agent, uid: &PodUid) -> bool {
    agent.view().pods.contains_key(uid)
}

/// A node falls silent: its pod is evicted by its taint and removed. It comes back from its disk, which has
/// the pod still, and learns before anything that it is not its own any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_returns_has_lost_the_pod_that_was_given_away() {
    let bed = bed(&[
        "--node-grace-period-s",
        "10",
        "--default-unreachable-toleration-seconds",
        "2",
    ])
    .await;
    for node in ["n1", "n2"] {
        join::join(&bed.join(node)).await.unwrap();
    }
    let (first, second) = (bed.agent("n1"), bed.agent("n2"));
    first.live().await;
    second.live().await;
    let registry = bed.control.registry();
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "p", "namespace": "default"},
        "spec": {"nodeName": "n1", "automountServiceAccountToken": false,
            "containers": [{"name": "c", "image": "x"}]},
    }))
    .unwrap();
    let pod = registry.create(&pod).await.unwrap();
    let tolerations = pod.spec.as_ref().unwrap().tolerations.clone().unwrap();
    let unreachable = tolerations
        .iter()
        .find(|one| one.key.as_deref() == Some("node.kubernetes.io/unreachable"));
    assert_eq!(unreachable.unwrap().toleration_seconds, Some(2));
    let uid = PodUid::new(pod.metadata.uid.as_deref().unwrap()).unwrap();
    eventually("the pod arrives", || has_pod(&first, &uid).then_some(())).await;
    first.kill().await;
    let began = std::time::Instant::now();
    let evicted = eventually("the pod is evicted", || {
        let pod = registry.get::<Pod>("default", "p").unwrap().unwrap();
        pod.metadata.deletion_timestamp.is_some().then_some(pod)
    })
    .await;
    assert!(
        began.elapsed() >= Duration::from_secs(11),
        "{:?}",
        began.elapsed()
    );
    let conditions = evicted.status.unwrap().conditions.unwrap();
    let target = conditions
        .iter()
        .find(|one| one.type_ == "DisruptionTarget")
        .unwrap();
    assert_eq!(target.reason.as_deref(), Some("DeletionByTaintManager"));
    let node = registry.get::<Node>("", "n1").unwrap().unwrap();
    let taints = node.spec.unwrap().taints.unwrap();
    assert_eq!(taints.len(), 2, "{taints:?}");
    let force = DeleteOptions {
        grace_period_s: Some(0),
        ..DeleteOptions::default()
    };
    registry
        .delete::<Pod>("default", "p", &force)
        .await
        .unwrap();

    let first = bed.agent("n1");
    assert!(has_pod(&first, &uid), "the disk has it");
    assert!(!matches!(&*first.handle.link.borrow(), Link::Live { .. }));
    first.live().await;
    assert!(!has_pod(&first, &uid), "with the first commit it is gone");
    eventually("the node is as before", || {
        let node = registry.get::<Node>("", "n1").unwrap().unwrap();
        node.spec
            .unwrap()
            .taints
            .unwrap_or_default()
            .is_empty()
            .then_some(())
    })
    .await;
    first.stop().await;
    second.stop().await;
    bed.end().await;
}
