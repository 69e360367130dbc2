//! One question to one server: over UDP, over TCP when the answer does not fit.
//!
//! Each question has a socket, a port and an id of its own, and only an answer from that server to
//! that question counts (RFC 5452). What the client has asked for beyond the question (its EDNS
//! size, cookies) is between it and us; upstream sees our own.

use std::io;
use std::net::{IpAddr, SocketAddr};

use hickory_proto::op::{Edns, Message, MessageType, Query, ResponseCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

use super::cache::Question;
use super::respond::UDP_SIZE_MAX;

/// Longer than what we say that we take; a server that does not listen may still fit.
const DATAGRAM_SIZE_MAX: usize = 4096;

/// Asks; the caller bounds the time. A truncated answer comes only when TCP failed as well.
pub(super) async fn ask(
    server: SocketAddr,
    query: &Query,
    question: &Question,
) -> io::Result<Message> {
    let answer = ask_udp(server, &message(query, question, true)).await?;
    let answer = match answer.metadata.response_code {
        // Older than EDNS (RFC 6891, 7).
        ResponseCode::FormErr | ResponseCode::NotImp => {
            ask_udp(server, &message(query, question, false)).await?
        }
        _ => answer,
    };
    if !answer.metadata.truncation {
        return Ok(answer);
    }
    Ok(ask_tcp(server, &message(query, question, true))
        .await
        .unwrap_or(answer))
}

/// With an id of its own.
fn message(query: &Query, question: &Question, with_edns: bool) -> Message {
    let mut message = Message::query();
    message.metadata.id = rand::random();
    message.metadata.recursion_desired = true;
    message.metadata.checking_disabled = question.checking_disabled;
    message.add_query(query.clone());
    if with_edns {
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_SIZE_MAX as u16);
        edns.set_dnssec_ok(question.dnssec_ok);
        message.set_edns(edns);
    }
    message
}

/// True when `answer` answers `asked`. A server that could not read the question need not repeat it.
fn belongs(answer: &Message, asked: &Message) -> bool {
    let code = answer.metadata.response_code;
    answer.metadata.id == asked.metadata.id
        && answer.metadata.message_type == MessageType::Response
        && answer.metadata.op_code == asked.metadata.op_code
        && (answer.queries == asked.queries
            || answer.queries.is_empty() && code != ResponseCode::NoError)
}

fn encode(message: &Message) -> io::Result<Vec<u8>> {
    message
        .to_vec()
        .map_err(|error| io::Error::other(format!("question: {error}")))
}

async fn ask_udp(server: SocketAddr, asked: &Message) -> io::Result<Message> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => IpAddr::from([0; 4]),
        SocketAddr::V6(_) => IpAddr::from([0; 16]),
    };
    // The kernel takes a random port.
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(&encode(asked)?).await?;
    let mut buffer = vec![0; DATAGRAM_SIZE_MAX];
    loop {
        let size = socket.recv(&mut buffer).await?;
        match Message::from_vec(&buffer[..size]) {
            Ok(answer) if belongs(&answer, asked) => return Ok(answer),
            // A late or forged one: the right one may still come.
            _ => {}
        }
    }
}

async fn ask_tcp(server: SocketAddr, asked: &Message) -> io::Result<Message> {
    let bytes = encode(asked)?;
    let size = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    let mut stream = TcpStream::connect(server).await?;
    let mut framed = size.to_be_bytes().to_vec();
    framed.extend_from_slice(&bytes);
    stream.write_all(&framed).await?;
    let mut buffer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut buffer).await?;
    match Message::from_vec(&buffer) {
        Ok(answer) if belongs(&answer, asked) => Ok(answer),
        Ok(_) => Err(io::Error::other("answered another question")),
        Err(error) => Err(io::Error::other(format!("malformed answer: {error}"))),
    }
}
