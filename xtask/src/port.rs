//! Who listens on a TCP port of this machine: the name for "the port is taken".
//!
//! Source: `/proc/net/tcp` and `tcp6` (columns as in proc(5)) name the socket's inode, `/proc/PID/fd`
//! who holds it. `ss` would tell the same and is not on every machine.

use std::fs;

/// State of a listening socket in `/proc/net/tcp`, hexadecimal.
const LISTEN: &str = "0A";

/// Process id and name of a process that listens on `port`; none when nobody does, or when its
/// owner is in another PID namespace.
pub fn listener(port: u16) -> Option<(u32, String)> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"];
    let sockets: Vec<String> = tables
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .flat_map(|table| inodes(&table, port))
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    let processes = fs::read_dir("/proc").ok()?.flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .find(|pid| holds(*pid, &sockets))
        .map(|pid: u32| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            (pid, name.trim().to_owned())
        })
}

/// The inodes of sockets that listen on `port` in one table.
fn inodes(table: &str, port: u16) -> Vec<String> {
    let port = format!("{port:04X}");
    let listening = table.lines().skip(1).filter_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let (local, state, inode) = (columns.get(1)?, columns.get(3)?, columns.get(9)?);
        let on_port = local.rsplit_once(':').is_some_and(|(_, p)| p == port);
        (on_port && *state == LISTEN).then(|| (*inode).to_owned())
    });
    listening.collect()
}

fn holds(pid: u32, sockets: &[String]) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"));
    descriptors.into_iter().flatten().flatten().any(|entry| {
        let target = fs::read_link(entry.path());
        target.is_ok_and(|target| sockets.iter().any(|s| target.as_os_str() == s.as_str()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listeners_on_the_port_are_found() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
             0: 00000000:192B 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1 0 100 0 0 10 0\n\
             1: 0100007F:192B 0100007F:0016 01 00000000:00000000 00:00000000 00000000     0        0 12 1 0 100 0 0 10 0\n\
             2: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 13 1 0 100 0 0 10 0\n";
        assert_eq!(inodes(table, 6443), ["11"]);
        assert!(inodes("", 6443).is_empty());
    }

    #[test]
    fn a_listener_of_this_process_is_named() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let port = socket.local_addr().expect("address").port();
        let (pid, name) = listener(port).expect("somebody listens");
        assert_eq!(pid, std::process::id());
        assert!(!name.is_empty());
    }
}
