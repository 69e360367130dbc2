//! `gantry port-forward`: local ports that lead to a pod's own loopback.
//!
//! ```text
//! client ─► 127.0.0.1:LOCAL ─► one Forward call per connection ─► agent's stream ─► pod's netns: 127.0.0.1:REMOTE
//! ```
//! The end or failure of one connection is nobody else's: the listener goes on until Ctrl-C.

use crate::Global;
use crate::connection::{Session, Wire};
use crate::failure::Failure;
use crate::logs::resolve_pod;
use crate::names;
use clap::Args;
use gantry_api::kinds::{Kind, resolve};
use gantry_api::proto::pods_client::PodsClient;
use gantry_api::proto::{ForwardInput, ForwardStart, forward_input, forward_output};
use serde_json::Value;
use std::net::IpAddr;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

/// Messages on their way to the server, per connection.
const QUEUE: usize = 4;
/// One HTTP/2 frame.
const CHUNK_BYTES: usize = 16 * 1024;

#[derive(Args, Debug)]
pub(crate) struct PortForward {
    /// A pod, or type/name (svc/web, deploy/web)
    target: String,
    /// [LOCAL:]REMOTE; REMOTE may be a name; an empty or 0 LOCAL is a free port
    #[arg(required = true)]
    ports: Vec<String>,
    /// Local addresses to listen on (localhost, or IPs), comma separated
    #[arg(long, default_value = "localhost", value_delimiter = ',')]
    address: Vec<String>,
}

/// What a PORT argument asks for.
#[derive(Debug, PartialEq, Eq)]
struct Wanted<'a> {
    /// 0: any.
    local: Option<u16>,
    remote: &'a str,
}

fn wanted(text: &str) -> Result<Wanted<'_>, Failure> {
    let bad = || {
        Failure::Local(format!(
            "{text:?}: write [LOCAL:]REMOTE, for example 8080:80"
        ))
    };
    let (local, remote) = match text.split_once(':') {
        Some(("", remote)) => (Some(0), remote),
        Some((local, remote)) => (Some(local.parse().map_err(|_| bad())?), remote),
        None => (None, text),
    };
    let named = !remote.is_empty()
        && remote
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-');
    let number = remote
        .parse::<u32>()
        .map_or(named, |n| (1..=65535).contains(&n));
    if !number {
        return Err(bad());
    }
    Ok(Wanted { local, remote })
}

/// A port of the pod by the name that one of its containers gives it.
fn named(pod: &Value, name: &str) -> Option<u16> {
    let containers = pod.pointer("/spec/containers")?.as_array()?;
    let ports = containers
        .iter()
        .flat_map(|c| c["ports"].as_array())
        .flatten();
    let found = ports.into_iter().find(|p| p["name"] == name)?;
    u16::try_from(found["containerPort"].as_u64()?).ok()
}

/// The pod's port that `remote` means: of a Service, its target port.
fn pod_port(kind: &Kind, owner: &Value, pod: &Value, remote: &str) -> Result<u16, Failure> {
    let missing = |what: &str| Failure::Local(format!("{what} has no port {remote}"));
    if kind.kind != "Service" {
        let number = remote.parse().ok();
        return number
            .or_else(|| named(pod, remote))
            .ok_or_else(|| missing("the pod"));
    }
    let ports = owner.pointer("/spec/ports").and_then(Value::as_array);
    let number = remote.parse::<u64>().ok();
    let port = ports
        .into_iter()
        .flatten()
        .find(|p| p["name"] == remote || (number.is_some() && p["port"].as_u64() == number))
        .ok_or_else(|| missing("the Service"))?;
    let protocol = port["protocol"].as_str().unwrap_or("TCP");
    if protocol != "TCP" {
        let text = format!("port {remote} is {protocol}: only TCP can be forwarded");
        return Err(Failure::Local(text));
    }
    // A headless Service's ports are the pods' own.
    let own = port["port"].as_u64();
    let target = match &port["targetPort"] {
        Value::String(name) => named(pod, name),
        Value::Number(number) => number.as_u64().and_then(|n| u16::try_from(n).ok()),
        _ => own.and_then(|n| u16::try_from(n).ok()),
    };
    target.ok_or_else(|| missing("the pod behind the Service"))
}

/// The addresses that `--address` names.
fn addresses(words: &[String]) -> Result<Vec<IpAddr>, Failure> {
    let mut all = Vec::new();
    for word in words {
        match word.as_str() {
            "localhost" => all.extend([
                IpAddr::from([127, 0, 0, 1]),
                IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1_u16]),
            ]),
            word => all.push(word.parse().map_err(|_| {
                Failure::Local(format!(
                    "--address {word:?} is neither localhost nor an IP address"
                ))
            })?),
        }
    }
    Ok(all)
}

impl PortForward {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        let pods =
            resolve("pods").ok_or_else(|| Failure::local("this build does not know pods"))?;
        let words = [self.target.clone()];
        let (kind, name) = names::one(&words, Some(pods))?;
        let wanted: Vec<Wanted<'_>> = self
            .ports
            .iter()
            .map(|p| wanted(p))
            .collect::<Result<_, _>>()?;
        let addresses = addresses(&self.address)?;
        let session = Session::open(global).await?;
        let pod = resolve_pod(&session, kind, &name).await?;
        let owner = match kind.kind {
            "Service" => session.get(session.key(kind, &name)).await?,
            _ => Value::Null,
        };
        let text = |pointer| {
            pod.pointer(pointer)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        let phase = text("/status/phase");
        if phase != "Running" {
            let text = format!(
                "unable to forward port because pod is not running. Current status={phase}"
            );
            return Err(Failure::Local(text));
        }
        let mut listeners = JoinSet::new();
        for wanted in &wanted {
            let port = pod_port(kind, &owner, &pod, wanted.remote)?;
            let start = ForwardStart {
                namespace: text("/metadata/namespace").to_owned(),
                pod: text("/metadata/name").to_owned(),
                port: port.into(),
            };
            for listener in listen(&addresses, wanted.local.unwrap_or(port)).await? {
                println!("Forwarding from {} -> {port}", listener.local_addr()?);
                listeners.spawn(accept(listener, session.pods.clone(), start.clone()));
            }
        }
        tokio::select! {
            // Cancel-safe: both only wait.
            _ = tokio::signal::ctrl_c() => Ok(()),
            ended = listeners.join_next() => match ended {
                Some(Ok(error)) => Err(Failure::Local(format!("cannot accept connections: {error}"))),
                _ => Err(Failure::local("nothing to forward")),
            },
        }
    }
}

/// One port number on all addresses. Of localhost's two, one may be missing.
async fn listen(addresses: &[IpAddr], port: u16) -> Result<Vec<TcpListener>, Failure> {
    let mut listeners: Vec<TcpListener> = Vec::new();
    let mut last = None;
    for &address in addresses {
        // The first one's free port is asked for on the others too.
        let port = match listeners.first() {
            Some(first) => first.local_addr()?.port(),
            None => port,
        };
        match TcpListener::bind((address, port)).await {
            Ok(listener) => listeners.push(listener),
            Err(error) => last = Some(format!("unable to listen on {address}:{port}: {error}")),
        }
    }
    match (listeners.is_empty(), last) {
        (true, Some(error)) => Err(Failure::Local(error)),
        (true, None) => Err(Failure::local("no address to listen on")),
        (false, _) => Ok(listeners),
    }
}

async fn accept(
    listener: TcpListener,
    pods: PodsClient<Wire>,
    start: ForwardStart,
) -> std::io::Error {
    let port = listener.local_addr().map(|a| a.port()).unwrap_or_default();
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                println!("Handling connection for {port}");
                let (pods, start) = (pods.clone(), start.clone());
                tokio::spawn(async move {
                    if let Err(status) = carry(socket, pods, start).await {
                        eprintln!("error forwarding port {port}: {}", status.message());
                    }
                });
            }
            // The peer was faster, or this process has too many open: the next one may do.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => {}
            Err(error) => return error,
        }
    }
}

async fn carry(
    socket: TcpStream,
    mut pods: PodsClient<Wire>,
    start: ForwardStart,
) -> Result<(), tonic::Status> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let input = |input| ForwardInput { input: Some(input) };
    let _ = sender.send(input(forward_input::Input::Start(start))).await;
    let mut output = pods
        .forward(ReceiverStream::new(receiver))
        .await?
        .into_inner();
    let (mut from, mut to) = socket.into_split();
    let up = async {
        let mut buffer = vec![0; CHUNK_BYTES];
        while let Ok(n @ 1..) = from.read(&mut buffer).await {
            let data = forward_input::Input::Data(buffer[..n].to_vec().into());
            if sender.send(input(data)).await.is_err() {
                return;
            }
        }
        let _ = sender.send(input(forward_input::Input::Closed(true))).await;
        // The answer may still be on its way.
        std::future::pending::<()>().await;
    };
    let down = async {
        while let Some(message) = output.next().await {
            match message?.output {
                Some(forward_output::Output::Data(data)) => {
                    if to.write_all(&data).await.is_err() {
                        return Ok(());
                    }
                }
                _ => break,
            }
        }
        let _ = to.shutdown().await;
        Ok(())
    };
    tokio::select! {
        // The other side's end is the end: what is not sent by then nobody reads.
        done = down => done,
        () = up => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ports_are_read_as_kubectl_reads_them() {
        let got = |text| wanted(text).map(|w| (w.local, w.remote)).ok();
        assert_eq!(got("80"), Some((None, "80")));
        assert_eq!(got("8080:80"), Some((Some(8080), "80")));
        assert_eq!(got(":80"), Some((Some(0), "80")));
        assert_eq!(got("0:http"), Some((Some(0), "http")));
        for bad in [
            "", ":", "x:80", "80:", "70000", "1:70000", "0", "1:2:3", "a_b",
        ] {
            assert_eq!(got(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_services_port_leads_to_its_target_port() {
        let pod = json!({"spec": {"containers": [
            {"name": "a"}, {"name": "b", "ports": [{"name": "web", "containerPort": 8080}]}]}});
        let service = json!({"spec": {"ports": [
            {"name": "http", "port": 80, "targetPort": "web"},
            {"port": 81, "targetPort": 8081}, {"port": 82}, {"port": 83, "targetPort": "none"},
            {"port": 53, "protocol": "UDP"}]}});
        let (pods, services) = (resolve("po").unwrap(), resolve("svc").unwrap());
        let of_service = |port| pod_port(services, &service, &pod, port).ok();
        assert_eq!(of_service("http"), Some(8080));
        assert_eq!(of_service("80"), Some(8080));
        assert_eq!(of_service("81"), Some(8081));
        assert_eq!(of_service("82"), Some(82));
        for missing in ["83", "84", "53", "web"] {
            assert_eq!(of_service(missing), None, "{missing}");
        }
        assert_eq!(pod_port(pods, &Value::Null, &pod, "web").ok(), Some(8080));
        assert_eq!(pod_port(pods, &Value::Null, &pod, "9").ok(), Some(9));
        assert!(pod_port(pods, &Value::Null, &pod, "nope").is_err());
    }
}
