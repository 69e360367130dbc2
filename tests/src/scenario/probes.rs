//! Probes, restarts and init containers.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic_health::ServingStatus;

use super::{accepts, sleeper};
use crate::cluster::{Cluster, is_ready};

const LIMIT: Duration = Duration::from_secs(60);

/// Readiness gates endpoints, liveness restarts, restart policies hold, init containers go first.
pub(super) fn probes_and_restarts(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(
        "apiVersion: v1
kind: Pod
metadata:
  name: gate
  labels: {app: gate}
spec:
  terminationGracePeriodSeconds: 1
  initContainers:
    - name: first
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sh\", \"-c\", \"echo made > /data/file\"]
      volumeMounts: [{name: work, mountPath: /data}]
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sh\", \"-c\", \"cat /data/file; exec httpd -f -p 8080 -h /data\"]
      env:
        - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
      ports: [{name: web, containerPort: 8080}]
      volumeMounts: [{name: work, mountPath: /data}]
      startupProbe: {tcpSocket: {port: web}, periodSeconds: 1}
      readinessProbe: {exec: {command: [\"test\", \"-e\", \"/data/ready\"]}, periodSeconds: 1}
      livenessProbe: {httpGet: {path: /file, port: web}, periodSeconds: 1, failureThreshold: 2}
  volumes: [{name: work, emptyDir: {}}]
---
apiVersion: v1
kind: Service
metadata: {name: gate}
spec:
  selector: {app: gate}
  ports: [{port: 80, targetPort: web}]
---
apiVersion: v1
kind: Pod
metadata: {name: fails-once}
spec:
  restartPolicy: OnFailure
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sh\", \"-c\", \"test -e /keep/seen && exit 0; touch /keep/seen; exit 3\"]
      volumeMounts: [{name: keep, mountPath: /keep}]
  volumes: [{name: keep, emptyDir: {}}]
",
    )?;
    cluster.wait_phase("default", "gate", "Running")?;
    let service = cluster.get(&["service", "gate"])?;
    let address = service["spec"]["clusterIP"]
        .as_str()
        .context("no cluster IP")?;
    let address: SocketAddr = format!("{address}:80").parse()?;
    std::thread::sleep(Duration::from_secs(3));
    let accepted = accepts(address, Duration::from_secs(1));
    ensure!(
        accepted.is_err(),
        "a pod that is not ready gets connections"
    );
    let name = cluster.ok(&[
        "exec",
        "gate",
        "--",
        "sh",
        "-c",
        "echo $POD; touch /data/ready",
    ])?;
    ensure!(name.trim() == "gate", "fieldRef: {name:?}");
    cluster.wait_ready("default", "gate")?;
    cluster.wait("the Service to answer", Duration::from_secs(10), |_| {
        accepts(address, Duration::from_secs(1))
    })?;
    ensure!(
        cluster.ok(&["logs", "gate"])?.starts_with("made"),
        "the init container was not first"
    );
    // Liveness fails: the container is restarted, alone.
    cluster.ok(&["exec", "gate", "--", "rm", "/data/file"])?;
    cluster.wait("a restart", Duration::from_secs(30), |c| {
        let pod = c.get(&["pod", "gate"])?;
        Ok(pod["status"]["containerStatuses"][0]["restartCount"].as_i64() >= Some(1))
    })?;
    cluster.wait_phase("default", "fails-once", "Succeeded")?;
    let pod = cluster.get(&["pod", "fails-once"])?;
    let status = &pod["status"]["containerStatuses"][0];
    ensure!(status["restartCount"] == 1, "{status}");
    ensure!(
        status["lastState"]["terminated"]["exitCode"] == 3,
        "{status}"
    );
    let previous = cluster.gantry(&["logs", "fails-once", "--previous"])?;
    ensure!(previous.code == 0, "{previous:?}");
    grpc(cluster)
}

/// A pod in the machine's network, whose health this process tells over gRPC: not ready, ready, not
/// ready, not alive, gone.
fn grpc(cluster: &Cluster) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let (health, service) = tonic_health::server::health_reporter();
    let tell = |service: &str, status: ServingStatus| {
        runtime.block_on(health.set_service_status(service, status));
    };
    tell("ready", ServingStatus::NotServing);
    tell("alive", ServingStatus::Serving);
    let listener = runtime.block_on(TcpListener::bind("0.0.0.0:0"))?;
    let port = listener.local_addr()?.port();
    let server = Server::builder().add_service(service);
    let serving = runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    cluster.apply_ok(&sleeper(
        "speaks-grpc",
        &format!(
            "      readinessProbe: {{grpc: {{port: {port}, service: ready}}, periodSeconds: 1}}
      livenessProbe: {{grpc: {{port: {port}, service: alive}}, periodSeconds: 1, failureThreshold: 2}}
  hostNetwork: true
"
        ),
    ))?;
    cluster.wait_phase("default", "speaks-grpc", "Running")?;
    let told = |words: &str| {
        cluster.wait(&format!("{words:?} in an event"), LIMIT, |c| {
            Ok(c.ok(&["describe", "pod", "speaks-grpc"])?.contains(words))
        })
    };
    told("Readiness probe failed: service unhealthy (responded with NOT_SERVING)")?;
    let is_ready = |c: &Cluster| Ok(is_ready(&c.get(&["pod", "speaks-grpc"])?));
    ensure!(!is_ready(cluster)?, "ready while its service says no");
    tell("ready", ServingStatus::Serving);
    cluster.wait("the pod to be ready", LIMIT, is_ready)?;
    tell("ready", ServingStatus::NotServing);
    cluster.wait("the pod to be unready", LIMIT, |c| Ok(!is_ready(c)?))?;
    let restarts = |c: &Cluster| -> Result<i64> {
        let pod = c.get(&["pod", "speaks-grpc"])?;
        let count = pod["status"]["containerStatuses"][0]["restartCount"].as_i64();
        count.context("no restartCount")
    };
    ensure!(restarts(cluster)? == 0, "readiness restarts nothing");
    tell("alive", ServingStatus::NotServing);
    cluster.wait("a restart", LIMIT, |c| Ok(restarts(c)? > 0))?;
    serving.abort();
    told("dial tcp")
}
