//! One connection between two machines, measured: new connections, round trips, bytes.
//!
//! ```text
//!  client: one byte says what is measured ─► server: `C` closes, `E` sends every byte back,
//!                                                    `S` takes all bytes and says how many they were
//! ```
//! Both ends are this program, on the machine or in a pod's network namespace, so that what differs
//! between two measurements is the network alone.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

const PATIENCE: Duration = Duration::from_secs(120);
/// As much as one write hands over.
const CHUNK: usize = 64 << 10;

/// Serves until it is killed.
pub fn serve(port: u16) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || {
            // A client that has gone is not answered.
            let _ = answer(stream);
        });
    }
    Ok(())
}

fn answer(mut stream: TcpStream) -> Result<()> {
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    stream.set_nodelay(true)?;
    match kind[0] {
        b'C' => stream.write_all(b"c")?,
        b'E' => {
            let mut byte = [0];
            while stream.read(&mut byte)? > 0 {
                stream.write_all(&byte)?;
            }
        }
        b'S' => {
            let (mut chunk, mut total) = (vec![0; CHUNK], 0_u64);
            loop {
                match stream.read(&mut chunk)? {
                    0 => break,
                    count => total += count as u64,
                }
            }
            stream.write_all(&total.to_be_bytes())?;
        }
        other => bail!("nobody measures {other}"),
    }
    Ok(())
}

/// What one measurement says: connections per second, microseconds a round trip (median), MB/s.
pub fn measure(kind: &str, to: SocketAddr, during: Duration) -> Result<f64> {
    match kind {
        "rate" => rate(to, during),
        "rtt" => round_trip(to, during),
        "throughput" => throughput(to, during),
        _ => bail!("{kind}: one of rate, rtt, throughput"),
    }
}

/// Until somebody answers at `to`.
pub fn first_answer(to: SocketAddr) -> Result<()> {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        if let Ok(mut stream) = TcpStream::connect_timeout(&to, Duration::from_millis(500)) {
            let asked = stream
                .write_all(b"C")
                .and_then(|()| stream.read_exact(&mut [0]));
            if asked.is_ok() {
                return Ok(());
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    bail!("nobody answers at {to}")
}

fn open(to: SocketAddr, kind: u8) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE).with_context(|| to.to_string())?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&[kind])?;
    Ok(stream)
}

fn rate(to: SocketAddr, during: Duration) -> Result<f64> {
    let (began, mut count) = (Instant::now(), 0_u32);
    while began.elapsed() < during {
        open(to, b'C')?.read_exact(&mut [0])?;
        count += 1;
    }
    Ok(f64::from(count) / began.elapsed().as_secs_f64())
}

fn round_trip(to: SocketAddr, during: Duration) -> Result<f64> {
    let mut stream = open(to, b'E')?;
    let (began, mut took) = (Instant::now(), Vec::new());
    while began.elapsed() < during {
        let sent = Instant::now();
        stream.write_all(&[0])?;
        stream.read_exact(&mut [0])?;
        took.push(sent.elapsed());
    }
    took.sort();
    let median = took.get(took.len() / 2).context("no round trip")?;
    Ok(median.as_secs_f64() * 1e6)
}

fn throughput(to: SocketAddr, during: Duration) -> Result<f64> {
    let mut stream = open(to, b'S')?;
    let chunk = vec![0; CHUNK];
    let (began, mut sent) = (Instant::now(), 0_u64);
    while began.elapsed() < during {
        sent += stream.write(&chunk)? as u64;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut arrived = [0; 8];
    stream.read_exact(&mut arrived)?;
    let took = began.elapsed().as_secs_f64();
    let arrived = u64::from_be_bytes(arrived);
    ensure!(arrived == sent, "{sent} bytes were sent, {arrived} arrived");
    Ok(arrived as f64 / took / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_measures_something_and_loses_no_byte() {
        let port = 47_100;
        std::thread::spawn(move || serve(port));
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        first_answer(to).unwrap();
        for kind in ["rate", "rtt", "throughput"] {
            let got = measure(kind, to, Duration::from_millis(50)).unwrap();
            assert!(got > 0.0, "{kind}: {got}");
        }
        assert!(measure("dance", to, Duration::ZERO).is_err());
    }
}
