//! Counts the netfilter rules of this network namespace, so that `up` can show that it adds none.
//!
//! nf_tables rules (iptables-nft's too) by one netlink dump; the legacy tables by their sizes in
//! /proc. A kernel without nf_tables has no such rules: the dump's error counts as zero.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

const NLMSG_HEADER_BYTES: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETRULE: u16 = 7;

/// All rules: nf_tables' and the legacy tables'.
pub fn rule_count() -> Result<usize> {
    Ok(nf_tables().context("nf_tables rules")? + legacy())
}

fn nf_tables() -> Result<usize> {
    let Ok(socket) = open() else { return Ok(0) };
    let kind = (NFNL_SUBSYS_NFTABLES << 8) | NFT_MSG_GETRULE;
    let mut request = Vec::with_capacity(NLMSG_HEADER_BYTES + 4);
    request.extend((NLMSG_HEADER_BYTES as u32 + 4).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend(NLM_F_REQUEST_DUMP.to_ne_bytes());
    request.extend(1u32.to_ne_bytes()); // sequence number
    request.extend(0u32.to_ne_bytes()); // to the kernel
    request.extend([0u8; 4]); // nfgenmsg: every family
    send(socket.as_raw_fd(), &request, MsgFlags::empty())?;
    let mut count = 0;
    let mut buffer = vec![0u8; 64 * 1024];
    loop {
        let read = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let (rules, more) = rules_in(buffer.get(..read).unwrap_or_default());
        count += rules;
        if !more {
            return Ok(count);
        }
    }
}

fn open() -> nix::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(5))?;
    Ok(socket)
}

/// Counts the messages of one datagram that are rules; false when the dump has ended.
fn rules_in(mut datagram: &[u8]) -> (usize, bool) {
    let mut count = 0;
    while let Some(header) = datagram.get(..NLMSG_HEADER_BYTES) {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        if kind == NLMSG_DONE || kind == NLMSG_ERROR {
            return (count, false);
        }
        count += 1;
        let next = length.max(NLMSG_HEADER_BYTES).next_multiple_of(4);
        datagram = datagram.get(next..).unwrap_or_default();
    }
    (count, true)
}

/// Tables of legacy iptables hold only built-in chains when their size is that of an empty table;
/// their rules are counted by `iptables-legacy-save` where it exists.
fn legacy() -> usize {
    ["iptables-legacy-save", "ip6tables-legacy-save"]
        .iter()
        .filter(|_| {
            let tables = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
            !tables("/proc/net/ip_tables_names").is_empty()
                || !tables("/proc/net/ip6_tables_names").is_empty()
        })
        .filter_map(|save| {
            let path = crate::run::which(save)?;
            crate::run::captured(&mut std::process::Command::new(path)).ok()
        })
        .map(|said| said.lines().filter(|line| line.starts_with("-A")).count())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = ((NLMSG_HEADER_BYTES + body.len()) as u32)
            .to_ne_bytes()
            .to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn rules_are_counted_until_the_dump_ends() {
        let two = [message(0xa06, b"one"), message(0xa06, b"rule two")].concat();
        assert_eq!(rules_in(&two), (2, true));
        let end = [message(0xa06, b"one"), message(NLMSG_DONE, &[0; 4])].concat();
        assert_eq!(rules_in(&end), (1, false));
        assert_eq!(rules_in(&[1, 2, 3]), (0, true));
    }
}
