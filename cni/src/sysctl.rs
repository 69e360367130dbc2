//! The few kernel settings that wiring needs, written below `/proc/sys`.
//!
//! `/proc/sys/net` shows the namespace of the thread that opens the file, so these act on the node
//! when called from a normal thread.

use std::fs;

use crate::error::CniError;

/// Forwarding of IPv4 packets between interfaces, for every interface of the node.
pub const IPV4_FORWARDING: &str = "net/ipv4/ip_forward";
/// Forwarding of IPv6 packets. Turns off the acceptance of router advertisements on links whose
/// `accept_ra` is 1, so it is set only when pods have IPv6 addresses.
pub const IPV6_FORWARDING: &str = "net/ipv6/conf/all/forwarding";

/// Reads a setting: `net/ipv4/ip_forward`.
pub fn read(name: &str) -> Result<String, CniError> {
    let path = format!("/proc/sys/{name}");
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.trim().to_string()),
        Err(error) => Err(CniError::io(format!("read {path}"))(error)),
    }
}

/// Writes a setting unless it has that value; returns the value that was replaced.
pub fn ensure(name: &str, value: &str) -> Result<Option<String>, CniError> {
    let before = read(name)?;
    if before == value {
        return Ok(None);
    }
    let path = format!("/proc/sys/{name}");
    fs::write(&path, value).map_err(CniError::io(format!("write {value} to {path}")))?;
    Ok(Some(before))
}
