//! Logs, exec, attach, forwarded ports and what concerns the whole node: each is one more stream of
//! this node's own outgoing connection.
//!
//! ```text
//! OpenTunnel(id, target) ─► Feed.Tunnel: TunnelOpened(id), then LogsChunk…, or ExecOutput… ExecExit, or ForwardOutput…
//!                                        ◄── ExecInput… or ForwardInput…; its end means that the client has left
//! ```
//! Flow control is per stream: a stalled reader stops its own producer and nothing else. Ending
//! either side drops the session, which kills the command.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use gantry_api::proto;
use gantry_api::proto::feed_client::FeedClient;
use gantry_api::proto::{
    exec_input, exec_output, forward_input, forward_output, images_answer, images_input,
    open_tunnel, tunnel_down, tunnel_up,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use super::TunnelTarget;
use crate::ids::PodUid;
use crate::runtime::ExecSession;

/// Tunnels of one node at a time.
pub(super) const TUNNELS_MAX: usize = 64;
/// Chunks between a producer and the connection.
const QUEUE: usize = 4;
/// One HTTP/2 frame, so that tunnels and the feed take turns.
const CHUNK_BYTES: usize = 16 << 10;
/// Services in one message; one with a thousand backends has some 100 KiB.
const SERVICES_PER_PART: usize = 100;

type Up = mpsc::Sender<proto::TunnelUp>;

/// Serves one tunnel to its end. `busy`: refuse it, this node has enough of them.
pub(super) async fn serve(
    channel: Channel,
    target: Arc<dyn TunnelTarget>,
    open: proto::OpenTunnel,
    busy: bool,
) {
    let (up, queue) = mpsc::channel(QUEUE);
    let mut client = FeedClient::new(channel);
    let id = open.id.clone();
    let produce = produce(target, open, up, busy);
    let answered = client.tunnel(ReceiverStream::new(queue));
    // The first message travels while the answer is awaited: both have to make progress.
    let (handle, down) = tokio::join!(produce, answered);
    let (Some(work), Ok(down)) = (handle, down) else {
        return;
    };
    tracing::debug!(id, "tunnel open");
    work.run(down.into_inner()).await;
    tracing::debug!(id, "tunnel closed");
}

/// An accepted target and the way up.
enum Work {
    Logs(BoxStream<'static, Result<Bytes, super::TunnelError>>, Up),
    Exec(ExecSession, Up),
    Forward(TcpStream, Up),
    /// One answer, known already.
    Usage(Box<proto::NodeUsage>, Up),
    /// Begun only now: a large directory takes longer than opening may.
    RemoveVolume(Arc<dyn TunnelTarget>, String, Up),
    Images(Arc<dyn TunnelTarget>, Box<proto::ImagesRequest>, Up),
    /// Known already.
    Services(Vec<proto::ProgrammedService>, Up),
    Drops(Vec<proto::DroppedPackets>, Up),
    /// Known already.
    Explain(Box<proto::ExplainHalf>, Up),
    Flows(BoxStream<'static, proto::NodeFlows>, Up),
}

async fn send(up: &Up, message: tunnel_up::Message) -> bool {
    up.send(proto::TunnelUp {
        message: Some(message),
    })
    .await
    .is_ok()
}

fn exec_message(output: exec_output::Output) -> tunnel_up::Message {
    tunnel_up::Message::Exec(proto::ExecOutput {
        output: Some(output),
    })
}

/// Reaches the target and sends the first message. None: the tunnel is over already.
async fn produce(
    target: Arc<dyn TunnelTarget>,
    open: proto::OpenTunnel,
    up: Up,
    busy: bool,
) -> Option<Work> {
    let uid = PodUid::new(&open.pod_uid).map_err(|error| error.to_string());
    let reached = match (uid, open.target) {
        _ if busy => Err(format!("this node serves {TUNNELS_MAX} streams already")),
        // The whole node is meant, and no pod.
        (_, Some(open_tunnel::Target::Usage(_))) => {
            let usage = target.usage().await;
            usage
                .map(|usage| Work::Usage(Box::new(usage), up.clone()))
                .map_err(|error| error.to_string())
        }
        (_, Some(open_tunnel::Target::Services(request))) if request.drops => {
            let drops = target.drops();
            drops
                .map(|drops| Work::Drops(drops, up.clone()))
                .map_err(|error| error.to_string())
        }
        (_, Some(open_tunnel::Target::Services(request))) => {
            let services = target.services(&request).await;
            services
                .map(|services| Work::Services(services, up.clone()))
                .map_err(|error| error.to_string())
        }
        (_, Some(open_tunnel::Target::Flows(request))) => {
            let flows = target.flows(&request);
            flows
                .map(|flows| Work::Flows(flows, up.clone()))
                .map_err(|error| error.to_string())
        }
        (_, Some(open_tunnel::Target::ExplainServer(request))) => {
            let half = target.explain_server(request).await;
            half.map(|half| Work::Explain(Box::new(half), up.clone()))
                .map_err(|error| error.to_string())
        }
        (_, Some(open_tunnel::Target::RemoveVolume(volume))) => {
            Ok(Work::RemoveVolume(target, volume.name, up.clone()))
        }
        (_, Some(open_tunnel::Target::Images(request))) => {
            Ok(Work::Images(target, Box::new(request), up.clone()))
        }
        (Err(error), _) => Err(error),
        (Ok(uid), Some(open_tunnel::Target::Logs(request))) => {
            let logs = target.logs(request, uid).await;
            logs.map(|logs| Work::Logs(logs, up.clone()))
                .map_err(|error| error.to_string())
        }
        (Ok(uid), Some(open_tunnel::Target::ExplainClient(request))) => {
            let half = target.explain_client(request, uid).await;
            half.map(|half| Work::Explain(Box::new(half), up.clone()))
                .map_err(|error| error.to_string())
        }
        (Ok(uid), Some(open_tunnel::Target::Exec(start))) => {
            let session = target.exec(start, uid).await;
            session
                .map(|exec| Work::Exec(exec, up.clone()))
                .map_err(|error| error.to_string())
        }
        (Ok(uid), Some(open_tunnel::Target::Forward(start))) => match u16::try_from(start.port) {
            Ok(port) if port > 0 => {
                let socket = target.forward(port, uid).await;
                socket
                    .map(|socket| Work::Forward(socket, up.clone()))
                    .map_err(|error| error.to_string())
            }
            _ => Err(format!("{} is no port", start.port)),
        },
        (Ok(_), None) => Err("this agent does not know that kind of tunnel".into()),
    };
    let error = reached.as_ref().err().cloned().unwrap_or_default();
    let opened = proto::TunnelOpened { id: open.id, error };
    send(&up, tunnel_up::Message::Opened(opened))
        .await
        .then_some(())?;
    reached.ok()
}

impl Work {
    async fn run(self, down: Streaming<proto::TunnelDown>) {
        match self {
            Self::Logs(logs, up) => run_logs(logs, up, down).await,
            Self::Exec(session, up) => run_exec(session, up, down).await,
            Self::Forward(socket, up) => run_forward(socket, up, down).await,
            Self::Usage(usage, up) => {
                send(&up, tunnel_up::Message::Usage(*usage)).await;
                end(up, down).await;
            }
            Self::Services(services, up) => {
                send_services(services, &up).await;
                end(up, down).await;
            }
            Self::Drops(drops, up) => {
                let part = proto::NodeServices {
                    drops,
                    last: true,
                    ..Default::default()
                };
                send(&up, tunnel_up::Message::Services(part)).await;
                end(up, down).await;
            }
            Self::Explain(half, up) => {
                send(&up, tunnel_up::Message::Explain(*half)).await;
                end(up, down).await;
            }
            Self::Flows(flows, up) => run_flows(flows, up, down).await,
            Self::RemoveVolume(target, name, up) => {
                let removed = target.remove_volume(&name).await;
                let error = removed.err().map(|e| e.to_string()).unwrap_or_default();
                let removed = proto::VolumeRemoved { error };
                send(&up, tunnel_up::Message::VolumeRemoved(removed)).await;
                end(up, down).await;
            }
            Self::Images(target, request, up) => run_images(&*target, *request, up, down).await,
        }
    }
}

/// In parts that are well below what a message may be; the last one says so.
async fn send_services(mut rest: Vec<proto::ProgrammedService>, up: &Up) {
    loop {
        let more = rest.split_off(rest.len().min(SERVICES_PER_PART));
        let last = more.is_empty();
        let part = proto::NodeServices {
            services: std::mem::replace(&mut rest, more),
            last,
            ..Default::default()
        };
        if !send(up, tunnel_up::Message::Services(part)).await || last {
            return;
        }
    }
}

/// Leaving now would reset the stream and lose what is under way: the other side ends it.
async fn end(up: Up, mut down: Streaming<proto::TunnelDown>) {
    drop(up);
    closed(&mut down).await;
}

async fn run_logs(
    logs: BoxStream<'static, Result<Bytes, super::TunnelError>>,
    up: Up,
    mut down: Streaming<proto::TunnelDown>,
) {
    tokio::select! {
        () = copy_logs(logs, &up) => {}
        () = closed(&mut down) => return,
    }
    end(up, down).await;
}

async fn run_flows(
    mut flows: BoxStream<'static, proto::NodeFlows>,
    up: Up,
    mut down: Streaming<proto::TunnelDown>,
) {
    let output = async {
        while let Some(part) = flows.next().await {
            if !send(&up, tunnel_up::Message::Flows(part)).await {
                return;
            }
        }
    };
    tokio::select! {
        () = output => {}
        () = closed(&mut down) => return,
    }
    drop(flows); // nobody watches any more, while the other side takes its time
    end(up, down).await;
}

/// An empty chunk is the end of the log; without it the other side knows that something is missing.
async fn copy_logs(mut logs: BoxStream<'static, Result<Bytes, super::TunnelError>>, up: &Up) {
    while let Some(chunk) = logs.next().await {
        let mut data = match chunk {
            Ok(data) => data,
            Err(error) => return tracing::warn!(%error, "a log stream ends early"),
        };
        while !data.is_empty() {
            let data = data.split_to(data.len().min(CHUNK_BYTES));
            if !send(up, tunnel_up::Message::Logs(proto::LogsChunk { data })).await {
                return;
            }
        }
    }
    send(up, tunnel_up::Message::Logs(proto::LogsChunk::default())).await;
}

/// Returns when the other side has ended the tunnel.
async fn closed(down: &mut Streaming<proto::TunnelDown>) {
    while let Ok(Some(_)) = down.message().await {}
}

async fn run_exec(session: ExecSession, up: Up, mut down: Streaming<proto::TunnelDown>) {
    let ExecSession {
        stdin,
        stdout,
        stderr,
        exit,
        resize,
    } = session;
    let output = async {
        let stdout = copy_output(stdout, &up, exec_output::Output::Stdout);
        let stderr = async {
            if let Some(stderr) = stderr {
                copy_output(stderr, &up, exec_output::Output::Stderr).await;
            }
        };
        // All output first, then the code: the client stops at the code.
        tokio::join!(stdout, stderr);
        let exit = match exit.await {
            Ok(Ok(code)) => proto::ExecExit {
                code,
                message: String::new(),
            },
            Ok(Err(error)) => proto::ExecExit {
                code: 126,
                message: error.to_string(),
            },
            Err(_) => proto::ExecExit {
                code: 137,
                message: "the runtime ended".into(),
            },
        };
        send(&up, exec_message(exec_output::Output::Exit(exit))).await;
    };
    // Either end drops what is left of the session, which kills the command.
    tokio::select! {
        () = output => {}
        () = copy_input(&mut down, stdin, resize) => return,
    }
    end(up, down).await;
}

async fn copy_output(
    mut from: Box<dyn AsyncRead + Send + Unpin>,
    up: &Up,
    wrap: fn(Bytes) -> exec_output::Output,
) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK_BYTES);
        let mut limited = (&mut from).take(CHUNK_BYTES as u64);
        match limited.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => return, // a terminal ends with EIO
            Ok(_) => {
                if !send(up, exec_message(wrap(buffer.split().freeze()))).await {
                    return;
                }
            }
        }
    }
}

/// Returns when the other side has ended the tunnel.
async fn copy_input(
    down: &mut Streaming<proto::TunnelDown>,
    mut stdin: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    resize: mpsc::Sender<(u16, u16)>,
) {
    while let Ok(Some(message)) = down.message().await {
        let Some(tunnel_down::Message::Exec(input)) = message.message else {
            continue;
        };
        match input.input {
            Some(exec_input::Input::Stdin(data)) => {
                let Some(open) = &mut stdin else { continue };
                let written = async {
                    open.write_all(&data).await?;
                    open.flush().await
                };
                if written.await.is_err() {
                    stdin = None; // the command reads no more; its output goes on
                }
            }
            Some(exec_input::Input::StdinClosed(true)) => stdin = None,
            Some(exec_input::Input::Resize(size)) => {
                let clamp = |cells: u32| u16::try_from(cells).unwrap_or(u16::MAX);
                // A full queue means that newer sizes are on their way.
                let _ = resize.try_send((clamp(size.columns), clamp(size.rows)));
            }
            Some(exec_input::Input::StdinClosed(false) | exec_input::Input::Start(_)) | None => {}
        }
    }
}

/// Carries one connection until the pod's side has ended and everything of it was sent.
async fn run_forward(socket: TcpStream, up: Up, mut down: Streaming<proto::TunnelDown>) {
    let (mut from, mut to) = socket.into_split();
    let output = async {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(CHUNK_BYTES);
            let mut limited = (&mut from).take(CHUNK_BYTES as u64);
            match limited.read_buf(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {
                    let data = forward_output::Output::Data(buffer.split().freeze());
                    if !send(&up, forward_message(data)).await {
                        return;
                    }
                }
            }
        }
        send(&up, forward_message(forward_output::Output::Closed(true))).await;
    };
    let input = async {
        let mut open = true;
        while let Ok(Some(message)) = down.message().await {
            let Some(tunnel_down::Message::Forward(input)) = message.message else {
                continue;
            };
            match input.input {
                Some(forward_input::Input::Data(data)) if open => {
                    // A reset shows up in the other direction too.
                    open = to.write_all(&data).await.is_ok();
                }
                Some(forward_input::Input::Closed(true)) => {
                    open = false;
                    let _ = to.shutdown().await;
                }
                _ => {}
            }
        }
    };
    tokio::select! {
        () = output => {}
        () = input => return,
    }
    end(up, down).await;
}

/// Answers one request. The other side's leaving ends it: a pull keeps what it has verified.
async fn run_images(
    target: &dyn TunnelTarget,
    request: proto::ImagesRequest,
    up: Up,
    mut down: Streaming<proto::TunnelDown>,
) {
    let (archive, received) = mpsc::channel(QUEUE);
    let (answers, mut answered) = mpsc::channel(QUEUE);
    let work = async {
        let done = target.images(request, received, answers).await;
        done.err()
            .map(|e| images_answer::Answer::Error(e.to_string()))
    };
    let output = async {
        let pass_on = async {
            while let Some(answer) = answered.recv().await {
                send(&up, images_message(answer)).await;
            }
        };
        if let (Some(error), ()) = tokio::join!(work, pass_on) {
            send(&up, images_message(error)).await;
        }
    };
    let input = async {
        while let Ok(Some(message)) = down.message().await {
            if let Some(tunnel_down::Message::Images(input)) = message.message
                && let Some(images_input::Input::Archive(data)) = input.input
            {
                // What nobody wants any more is read all the same: the answer says why.
                let _ = archive.send(data).await;
            }
        }
    };
    // Cancel-safe: whichever ends first, the other is of no use any more.
    tokio::select! {
        () = output => {}
        () = input => return,
    }
    end(up, down).await;
}

fn images_message(answer: images_answer::Answer) -> tunnel_up::Message {
    tunnel_up::Message::Images(proto::ImagesAnswer {
        answer: Some(answer),
    })
}

fn forward_message(output: forward_output::Output) -> tunnel_up::Message {
    tunnel_up::Message::Forward(proto::ForwardOutput {
        output: Some(output),
    })
}
