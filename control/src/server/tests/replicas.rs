//! Three control planes over three real etcd servers: whichever is asked, it is one cluster.

use std::collections::BTreeSet;

use tokio::time::Instant;

use super::*;
use crate::pki::local_names;
use crate::server::forwarded;
use crate::store::etcd_tests::members::Members;
use crate::store::{EtcdServers, EtcdTls, Txn};

struct Replicas {
    members: Members,
    dir: tempfile::TempDir,
    running: Vec<Option<(Control, CancellationToken)>>,
}

impl Replicas {
    /// The first leads.
    async fn start() -> Option<Replicas> {
        let members = Members::start()?;
        let mut replicas = Replicas {
            members,
            dir: tempfile::tempdir().unwrap(),
            running: vec![None, None, None],
        };
        replicas.run(0).await;
        // Nobody but it can lead yet.
        replicas.write(0, "first").await.unwrap();
        for index in 1..3 {
            replicas.take_pki(index);
            replicas.run(index).await;
        }
        Some(replicas)
    }

    fn data(&self, index: usize) -> std::path::PathBuf {
        self.dir.path().join(format!("{index}/data"))
    }

    /// As an operator copies it.
    fn take_pki(&self, index: usize) {
        let (from, to) = (self.data(0).join("pki"), self.data(index).join("pki"));
        std::fs::create_dir_all(&to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }

    async fn run(&mut self, index: usize) {
        let mut arguments = arguments(&self.dir.path().join(index.to_string()), "127.0.0.1:0");
        let store = format!("etcd://{}", self.members.places().join(","));
        let parsed = Arguments::parse_from(["gantry-control", "--store", &store]);
        arguments.etcd = parsed.etcd;
        let stop = CancellationToken::new();
        let control = Control::start(&arguments, &stop).await.unwrap();
        self.running[index] = Some((control, stop));
    }

    async fn stop(&mut self, index: usize) {
        let (control, stop) = self.running[index].take().unwrap();
        stop.cancel();
        control.drain().await.unwrap();
    }

    fn channel(&self, index: usize, credentials: Option<&Credentials>) -> Channel {
        let authority = Authority::open(&self.data(0)).unwrap();
        let ca = Certificate::from_pem(authority.certificate());
        let mut tls = ClientTlsConfig::new().ca_certificate(ca);
        if let Some(it) = credentials {
            tls = tls.identity(Identity::from_pem(&it.certificate, &it.key));
        }
        let address = self.running[index].as_ref().unwrap().0.address();
        let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap();
        endpoint.tls_config(tls).unwrap().connect_lazy()
    }

    fn client(&self, index: usize, user: &str, group: &str) -> Client {
        let authority = Authority::open(&self.data(0)).unwrap();
        let credentials = authority.client(user, group, 1).unwrap();
        ObjectsClient::new(self.channel(index, Some(&credentials)))
    }

    fn admin(&self, index: usize) -> Client {
        self.client(index, "tester", "system:masters")
    }

    /// A ConfigMap through this control plane; its version.
    async fn write(&self, index: usize, name: &str) -> Result<u64, tonic::Status> {
        let object = json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": name, "namespace": "default"}, "data": {"by": index.to_string()}});
        let reply = self
            .admin(index)
            .create(write("configmaps", &object))
            .await?;
        let written: Value = serde_json::from_slice(&reply.into_inner().json).unwrap();
        let version = written["metadata"]["resourceVersion"].as_str().unwrap();
        Ok(version.parse().unwrap())
    }

    async fn read(&self, index: usize, name: &str) -> Result<u64, tonic::Status> {
        let request = GetRequest {
            key: key("configmaps", "default", name),
        };
        let reply = self.admin(index).get(request).await?.into_inner();
        let read: Value = serde_json::from_slice(&reply.json).unwrap();
        let version = read["metadata"]["resourceVersion"].as_str().unwrap();
        Ok(version.parse().unwrap())
    }

    /// The names of ConfigMaps from here on, by a watch at this control plane.
    async fn watch(&self, index: usize, after: u64, count: usize) -> Vec<(String, u64)> {
        let request = WatchRequest {
            key: key("configmaps", "default", ""),
            resource_version: after.to_string(),
            ..WatchRequest::default()
        };
        let mut events = self.admin(index).watch(request).await.unwrap().into_inner();
        let mut seen = Vec::new();
        while seen.len() < count {
            let next = tokio::time::timeout(Duration::from_secs(10), events.message()).await;
            let event = next.unwrap().unwrap().unwrap();
            if event.r#type() == Type::Added {
                let object: Value = serde_json::from_slice(&event.json).unwrap();
                let name = object["metadata"]["name"].as_str().unwrap().to_owned();
                if name.starts_with("kube-") {
                    continue;
                }
                seen.push((name, event.resource_version.parse().unwrap()));
            }
        }
        seen
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_of_them_reads_writes_and_watches_and_all_say_the_same() {
    let Some(mut replicas) = Replicas::start().await else {
        return;
    };
    let began = replicas.read(1, "first").await.unwrap();
    assert_eq!(began, replicas.read(0, "first").await.unwrap());
    let mut written = Vec::new();
    for n in 0..12 {
        let name = format!("map-{n}");
        let version = replicas.write(n % 3, &name).await.unwrap();
        for index in 0..3 {
            // At once: nobody waits for another one to catch up.
            assert_eq!(replicas.read(index, &name).await.unwrap(), version);
        }
        written.push((name, version));
    }
    for index in 0..3 {
        assert_eq!(replicas.watch(index, began, 12).await, written);
    }
    // A watch goes on at another one.
    let half = replicas.watch(1, began, 5).await;
    let rest = replicas.watch(2, half[4].1, 7).await;
    assert_eq!([half, rest].concat(), written);
    // Also at one that has just started.
    replicas.stop(2).await;
    replicas.run(2).await;
    assert_eq!(replicas.watch(2, began, 12).await, written);
    for index in 0..3 {
        replicas.stop(index).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_is_known_where_it_is_decided_and_nobody_can_pretend() {
    let Some(mut replicas) = Replicas::start().await else {
        return;
    };
    let object = json!({"apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "x", "namespace": "default"}});
    for index in 0..3 {
        let mut jane = replicas.client(index, "jane", "dev");
        let refused = jane.create(write("configmaps", &object)).await.unwrap_err();
        assert!(refused.message().contains("\"jane\""), "{refused}");
        let mut nobody = ObjectsClient::new(replicas.channel(index, None));
        let refused = nobody.create(write("configmaps", &object)).await;
        assert_eq!(refused.unwrap_err().code(), tonic::Code::Unauthenticated);

        // With another one's certificate along, and none of a control plane's.
        let authority = Authority::open(&replicas.data(0)).unwrap();
        let admin = authority.client("tester", "system:masters", 1).unwrap();
        let pem = x509_parser::pem::Pem::iter_from_buffer(admin.certificate.as_bytes());
        let der = pem.last().unwrap().unwrap().contents;
        let mut request = tonic::Request::new(write("configmaps", &object));
        let value = tonic::metadata::MetadataValue::from_bytes(&der);
        request
            .metadata_mut()
            .insert_bin(forwarded::CERTIFICATE, value);
        let refused = jane.create(request).await.unwrap_err();
        assert!(refused.message().contains("\"jane\""), "{refused}");
    }
    // A control plane's certificate alone is nobody.
    let mut control = replicas.client(0, "x", identity::CONTROL_GROUP);
    let refused = control.create(write("configmaps", &object)).await;
    assert_eq!(refused.unwrap_err().code(), tonic::Code::Unauthenticated);
    // What was brought once is not brought on.
    let mut request = tonic::Request::new(write("configmaps", &object));
    let mark = tonic::metadata::MetadataValue::from_static("1");
    request.metadata_mut().insert(forwarded::MARK, mark);
    let refused = replicas.admin(1).create(request).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
    for index in 0..3 {
        replicas.stop(index).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_is_spoken_to_over_tls_with_a_certificate_of_ours() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open(dir.path()).unwrap();
    let served = authority.server(&local_names(&[])).unwrap();
    let ours = authority.client("gantry-control", "etcd", 1).unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let flags = [
        format!("--cert-file={}", file("s.crt", &served.certificate)),
        format!("--key-file={}", file("s.key", &served.key)),
        format!(
            "--trusted-ca-file={}",
            file("ca.crt", authority.certificate())
        ),
        "--client-cert-auth".to_owned(),
    ];
    let tls = |client| EtcdTls {
        ca: authority.certificate().to_owned(),
        client,
    };
    let with = tls(Some((ours.certificate.clone(), ours.key.clone())));
    let Some(members) = Members::start_with(Some(with), flags.into()) else {
        return;
    };
    let opened = members.lead("one").await;
    let txn = Txn::new().put("/a", "1");
    opened.store.commit(txn).await.unwrap();
    assert_eq!(opened.store.get("/a").unwrap().value, "1");
    let servers = EtcdServers {
        tls: Some(tls(None)),
        ..members.servers()
    };
    let (keys, token) = (members.keys(), CancellationToken::new());
    let opening = Store::open_etcd(servers, &keys, "tests", token.clone(), &token);
    let stranger = tokio::time::timeout(Duration::from_secs(2), opening).await;
    assert!(!matches!(stranger, Ok(Ok(_))), "without a certificate");
    opened.store.close().await;
}

/// Services through every control plane that runs; their addresses.
async fn services(replicas: &Replicas, prefix: &str) -> Vec<String> {
    let mut addresses = Vec::new();
    for n in 0..9 {
        let index = n % 3;
        if replicas.running[index].is_none() {
            continue;
        }
        let object = json!({"apiVersion": "v1", "kind": "Service",
            "metadata": {"name": format!("{prefix}-{n}"), "namespace": "default"},
            "spec": {"ports": [{"port": 80}]}});
        let reply = replicas
            .admin(index)
            .create(write("services", &object))
            .await;
        let reply = reply.unwrap().into_inner();
        let made: Value = serde_json::from_slice(&reply.json).unwrap();
        addresses.push(made["spec"]["clusterIP"].as_str().unwrap().to_owned());
    }
    addresses
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_leader_stops_another_one_takes_writes_and_no_address_is_given_twice() {
    let Some(mut replicas) = Replicas::start().await else {
        return;
    };
    let mut addresses = services(&replicas, "before").await;
    let after = replicas.read(1, "first").await.unwrap();
    let (mut next, mut pause) = (Vec::new(), Duration::MAX);
    for round in 0..2 {
        let began = Instant::now();
        let (control, stop) = replicas.running[round].take().unwrap();
        stop.cancel();
        for n in 0..200 {
            let name = format!("next-{round}-{n}");
            match replicas.write(2, &name).await {
                Ok(version) => {
                    next.push((name, version));
                    pause = began.elapsed();
                    break;
                }
                Err(status) => assert_eq!(status.code(), tonic::Code::Unavailable, "{status}"),
            }
        }
        control.drain().await.unwrap();
        eprintln!("leader {round} stopped: the next write was taken after {pause:?}");
        assert!(pause <= Duration::from_secs(5), "no write for {pause:?}");
        addresses.extend(services(&replicas, &format!("after-{round}")).await);
    }
    assert_eq!(next.len(), 2);
    assert_eq!(replicas.watch(2, after, 2).await, next);
    let different: BTreeSet<&String> = addresses.iter().collect();
    assert_eq!(different.len(), addresses.len(), "{addresses:?}");
    replicas.stop(2).await;
}
