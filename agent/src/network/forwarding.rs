//! The kernel setting that makes this node a router for its pods, and its undoing.
//!
//! The value that was there before is kept in `/run/gantry/network/`, so `gantry down` gives the
//! machine back as it was.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use gantry_cni::config::BridgeNetwork;
use gantry_cni::sysctl;

use super::NetworkError;
use super::pod_networks::from_cni;

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
    for range in &network.ranges {
        let name = if range.gateway().is_ipv4() {
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

/// Puts back what [`ensure`] replaced. Idempotent.
pub(super) fn restore(run: &Path) -> Result<(), NetworkError> {
    for name in [sysctl::IPV4_FORWARDING, sysctl::IPV6_FORWARDING] {
        let path = saved(run, name);
        match fs::read_to_string(&path) {
            Ok(before) => {
                sysctl::ensure(name, before.trim()).map_err(from_cni)?;
                fs::remove_file(&path).map_err(|error| io_error("remove", &path, error))?;
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(io_error("read", &path, error)),
        }
    }
    Ok(())
}
