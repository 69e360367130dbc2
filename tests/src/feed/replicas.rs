//! An agent whose stream goes through a control plane that follows, and goes on when the leader goes.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use clap::Parser as _;
use gantry_control::config::Arguments;
use gantry_control::run::Control as Whole;

use super::*;

/// One server of etcd; dropping it ends it.
struct Etcd {
    child: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

impl Etcd {
    /// None, with the reason on stderr, without an installed one.
    fn start() -> Option<Etcd> {
        let dir = tempfile::tempdir().unwrap();
        let (port, peer_port) = (free_port(), free_port());
        let url = format!("http://127.0.0.1:{port}");
        let peer = format!("http://127.0.0.1:{peer_port}");
        let child = Command::new("etcd")
            .args(["--name", "one", "--logger", "zap", "--data-dir"])
            .arg(dir.path())
            .args(["--listen-client-urls", &url])
            .args(["--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("one={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(child) = child else {
            eprintln!("skipped: etcd is not installed (Debian: etcd-server)");
            return None;
        };
        Some(Etcd {
            child,
            port,
            _dir: dir,
        })
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn start(etcd: &Etcd, dir: &Path) -> (Whole, CancellationToken) {
    let path = |name: &str| dir.join(name).display().to_string();
    let arguments = Arguments::parse_from([
        "gantry-control",
        "--store",
        &format!("etcd://127.0.0.1:{}", etcd.port),
        "--listen",
        "127.0.0.1:0",
        "--data-dir",
        &path("data"),
        "--kubeconfig",
        &path("admin.kubeconfig"),
        "--agent-credentials",
        &format!("{}:n1", path("agent")),
    ]);
    let stop = CancellationToken::new();
    let control = Whole::start(&arguments, &stop).await.unwrap();
    (control, stop)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_is_served_by_one_that_follows_and_goes_on_when_the_leader_goes() {
    let Some(etcd) = Etcd::start() else {
        return;
    };
    let (dir, lib) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first_dir, second_dir) = (dir.path().join("1"), dir.path().join("2"));
    let (first, stop_first) = start(&etcd, &first_dir).await;
    let pod = |name: &str| -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "default"},
            "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]}}))
        .unwrap()
    };
    let pki = second_dir.join("data/pki");
    std::fs::create_dir_all(&pki).unwrap();
    for entry in std::fs::read_dir(first_dir.join("data/pki")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, pki.join(path.file_name().unwrap())).unwrap();
    }
    eventually("the first leads", || {
        let name = "default";
        let found = first
            .registry()
            .get::<gantry_api::k8s_openapi::api::core::v1::Namespace>("", name);
        found.unwrap()
    })
    .await;
    let (second, stop_second) = start(&etcd, &second_dir).await;

    // Nobody is at the first of its servers.
    let servers = format!(
        "https://127.0.0.1:{},https://{}",
        free_port(),
        second.address()
    );
    let agent = Agent::with_credentials(&servers, "n1", lib.path(), &second_dir.join("agent"));
    agent.live().await;
    let arrives = |name: &'static str| {
        move |view: &View| {
            let mut pods = view.pods.values();
            pods.any(|pod| pod.metadata.name.as_deref() == Some(name))
                .then_some(())
        }
    };
    first.registry().create(&pod("before")).await.unwrap();
    agent.until("the pod arrives", arrives("before")).await;

    stop_first.cancel();
    eventually("the stream breaks", || {
        let live = matches!(&*agent.handle.link.borrow(), Link::Live { .. });
        (!live).then_some(())
    })
    .await;
    first.drain().await.unwrap();
    agent.live().await;
    second.registry().create(&pod("after")).await.unwrap();
    agent.until("the next pod arrives", arrives("after")).await;
    agent.stop().await;
    stop_second.cancel();
    second.drain().await.unwrap();
}
