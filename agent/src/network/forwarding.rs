//! The kernel settings that make this node a router for its pods, and their undoing: forwarding, and no
//! socket of the node gets by itself a port that connections of others leave from with its address.
//!
//! The value that was there before is kept in `/run/gantry/network/`, so `gantry down` gives the
//! machine back as it was.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use gantry_cni::config::BridgeNetwork;
use gantry_cni::sysctl;

use ebpf_maps::uplink::{SOURCE_PORT_COUNT, SOURCE_PORT_MIN};

use super::NetworkError;
use super::pod_networks::from_cni;

/// From where to where the kernel gives ports to sockets that ask for none.
const PORT_RANGE: &str = "net/ipv4/ip_local_port_range";
/// Those of them that it does not.
const RESERVED_PORTS: &str = "net/ipv4/ip_local_reserved_ports";

fn dir(run: &Path) -> PathBuf {
    run.join("network")
}

/// `net/ipv4/ip_forward` -> `net.ipv4.ip_forward`
fn saved(run: &Path, name: &str) -> PathBuf {
    dir(run).join(name.replace('/', "."))
}

fn io_error(verb: &str, path: &Path, source: std::io::Error) -> NetworkError {
    NetworkError::Io {
        context: format!("{verb} {}", path.display()),
        source,
    }
}

/// Turns forwarding on for the families of `network`. Idempotent.
pub(super) fn ensure(run: &Path, network: &BridgeNetwork) -> Result<(), NetworkError> {
    let families = network.ranges.iter();
    let families = families.map(|range| range.gateway().is_ipv4());
    ensure_families(run, &families.collect())
}

/// Turns forwarding on for these families: true is IPv4. Idempotent.
pub(super) fn ensure_families(run: &Path, families: &BTreeSet<bool>) -> Result<(), NetworkError> {
    for is_v4 in families {
        let name = if *is_v4 {
            sysctl::IPV4_FORWARDING
        } else {
            sysctl::IPV6_FORWARDING
        };
        let before = sysctl::read(name).map_err(from_cni)?;
        if before == "1" {
            continue;
        }
        let path = saved(run, name);
        // Saved first: a crash in between saves what is still true.
        fs::create_dir_all(dir(run))
            .and_then(|()| fs::write(&path, &before))
            .map_err(|error| io_error("write", &path, error))?;
        sysctl::ensure(name, "1").map_err(from_cni)?;
    }
    Ok(())
}

/// Keeps the node's sockets from the ports that the packet programs take. Mostly nothing is to be done:
/// those that the kernel gives out end below. Idempotent.
pub fn reserve_ports(run: &Path) -> Result<(), NetworkError> {
    let range = sysctl::read(PORT_RANGE).map_err(from_cni)?;
    let before = sysctl::read(RESERVED_PORTS).map_err(from_cni)?;
    let Some(after) = reserved(&range, &before) else {
        return Ok(());
    };
    let path = saved(run, RESERVED_PORTS);
    // As above; a later start finds them reserved, or an administrator's new list.
    fs::create_dir_all(dir(run))
        .and_then(|()| fs::write(&path, &before))
        .map_err(|error| io_error("write", &path, error))?;
    sysctl::ensure(RESERVED_PORTS, &after).map_err(from_cni)?;
    Ok(())
}

/// The list of reserved ports that is needed, if not all of ours are out of reach already.
///
/// * `range` – from where to where the kernel gives out ports.
/// * `before` – the list as it is: `8080,9000-9010`.
fn reserved(range: &str, before: &str) -> Option<String> {
    let last: u32 = range.split_whitespace().nth(1)?.parse().ok()?;
    let ours = (SOURCE_PORT_MIN, SOURCE_PORT_MIN + SOURCE_PORT_COUNT - 1);
    let is_ours = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first = first.trim().parse().is_ok_and(|first: u32| first <= ours.0);
        first && last.trim().parse().is_ok_and(|last: u32| last >= ours.1)
    };
    if last < ours.0 || before.split(',').any(is_ours) {
        return None;
    }
    let separator = if before.is_empty() { "" } else { "," };
    Some(format!("{before}{separator}{}-{}", ours.0, ours.1))
}

/// Puts back what [`ensure`] and [`reserve_ports`] replaced. Idempotent.
pub(super) fn restore(run: &Path) -> Result<(), NetworkError> {
    let names = [
        sysctl::IPV4_FORWARDING,
        sysctl::IPV6_FORWARDING,
        RESERVED_PORTS,
    ];
    for name in names {
        let path = saved(run, name);
        match fs::read_to_string(&path) {
            Ok(before) => {
                // An empty list needs a line: of nothing at all nothing is written.
                let before = match before.trim() {
                    "" => "\n",
                    before => before,
                };
                sysctl::ensure(name, before).map_err(from_cni)?;
                fs::remove_file(&path).map_err(|error| io_error("remove", &path, error))?;
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(io_error("read", &path, error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::reserved;

    #[test]
    fn ports_are_reserved_only_where_the_kernel_would_give_them_out() {
        assert_eq!(reserved("32768\t60999", ""), None);
        let all = Some("61000-65535".to_owned());
        assert_eq!(reserved("1024\t65535", ""), all);
        let more = Some("8080,9000-9010,61000-65535".to_owned());
        assert_eq!(reserved("1024\t65535", "8080,9000-9010"), more);
        for there in ["61000-65535", "8080,60000-65535"] {
            assert_eq!(reserved("1024\t65535", there), None);
        }
        assert!(reserved("1024\t65535", "61001-65535").is_some());
        assert_eq!(reserved("", ""), None, "what cannot be read is left alone");
    }
}
