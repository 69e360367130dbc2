//! The program that sees an uplink's frames in its driver: where it is wanted, and can be.
//!
//! ```text
//!  off           ─► what is pinned is detached
//!  native, auto  ─► attached, pinned: it outlives the agent
//!                   pinned already: the program behind the link is replaced
//!  the interface or the kernel does not allow it ─► without: `from_netdev` does all of it, and why is told
//! ```
//! It is no other service than that of `from_netdev`, only sooner; so nothing here fails: what cannot be had is
//! reported, once, and the uplink works without.
//!
//! The kernel's own stead of a driver (generic XDP) is not used: on Linux 6.18 a SYN that had gone through it was not
//! translated by `from_netdev` behind it. Why is not known.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::ProgramFd;
use ebpf_maps::uplink::{XDP_NATIVE, XDP_OFF};
use gantry_cni::uplinks::Uplink;

use super::pods::attach_pinned;
use super::uplinks::unpin;
use super::{hooks, load, sys};
use crate::paths::Paths;

/// The function in `ebpf/programs/src/main.rs`.
pub(super) const PROGRAM: &str = "xdp_netdev";

/// Where frames from outside are looked at first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum XdpMode {
    /// Where the kernel has made packets of them (tc)
    #[default]
    Off,
    /// In the network card's driver
    Native,
    /// In the driver where it can, and where it cannot be that packets get lost by it
    Auto,
}

/// How an uplink's frames are looked at, and why not as it was wanted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct XdpStanding {
    /// The interface.
    pub interface: String,
    /// `off`, `native`.
    pub mode: &'static str,
    /// Why it is off, though it is wanted.
    pub reason: Option<String>,
}

/// The program, if it is wanted, and where it is.
pub(super) struct Xdp {
    links: PathBuf,
    mode: XdpMode,
    program: Result<ProgramFd, String>,
    standings: BTreeMap<u32, XdpStanding>,
}

impl Xdp {
    /// Loads the program, if it is wanted.
    pub(super) fn load(ebpf: &mut Ebpf, paths: &Paths, mode: XdpMode) -> Self {
        let program = match mode {
            XdpMode::Off => Err("it is switched off".to_owned()),
            _ => load::load_program(ebpf, PROGRAM)
                .map_err(|error| error.to_string())
                .and_then(|program| program.try_clone().map_err(|error| error.to_string())),
        };
        Self {
            links: hooks::directory(paths),
            mode,
            program,
            standings: BTreeMap::new(),
        }
    }

    /// Whether an uplink of this mode may stay as it is until it is attached again.
    pub(super) fn keeps(&self, mode: u8) -> bool {
        mode == self.wanted()
    }

    fn wanted(&self) -> u8 {
        match self.mode {
            XdpMode::Off => XDP_OFF,
            XdpMode::Native | XdpMode::Auto => XDP_NATIVE,
        }
    }

    /// Puts the program on an uplink of the calling thread's network namespace, or takes it off; the mode
    /// that it has now. Idempotent.
    pub(super) fn attach(&mut self, uplink: &Uplink) -> u8 {
        let outcome = self.try_attach(uplink);
        let (mode, reason) = match outcome {
            Ok(mode) => (mode, None),
            Err(reason) => {
                self.unpin(uplink.index);
                (XDP_OFF, Some(reason))
            }
        };
        let standing = XdpStanding {
            interface: uplink.name.clone(),
            mode: mode_name(mode),
            reason,
        };
        if self.standings.get(&uplink.index) != Some(&standing) {
            match &standing.reason {
                Some(reason) => tracing::warn!(
                    interface = uplink.name,
                    "XDP is off here, and Services work without it: {reason}"
                ),
                None if self.mode != XdpMode::Off => {
                    tracing::info!(interface = uplink.name, mode = standing.mode, "XDP");
                }
                None => {}
            }
            self.standings.insert(uplink.index, standing);
        }
        mode
    }

    fn try_attach(&self, uplink: &Uplink) -> Result<u8, String> {
        let mode = self.wanted();
        if mode == XDP_OFF {
            self.unpin(uplink.index);
            return Ok(mode);
        }
        let program = self.program.as_ref().map_err(Clone::clone)?;
        let vlans = fs::read_to_string("/proc/thread-self/net/vlan/config").unwrap_or_default();
        if let Some(reason) = unsuitable(uplink, self.mode, &vlans) {
            return Err(reason);
        }
        let pin = self.links.join(pin_name(uplink.index));
        attach(&pin, program.as_fd(), uplink.index).map_err(|error| words(&error))?;
        Ok(mode)
    }

    /// Takes it off an interface that is no uplink any longer.
    pub(super) fn detach(&mut self, ifindex: u32) {
        self.unpin(ifindex);
        self.standings.remove(&ifindex);
    }

    /// How each uplink's frames are looked at.
    pub(super) fn standings(&self) -> Vec<XdpStanding> {
        self.standings.values().cloned().collect()
    }

    fn unpin(&self, ifindex: u32) {
        let pin = self.links.join(pin_name(ifindex));
        if let Err(error) = unpin(&pin) {
            tracing::warn!(pin = %pin.display(), "XDP is not taken off: {error}");
        }
    }
}

/// `uplink-2-xdp_netdev`, beside the links of `uplinks`.
fn pin_name(ifindex: u32) -> String {
    format!("uplink-{ifindex}-{PROGRAM}")
}

fn mode_name(mode: u8) -> &'static str {
    match mode {
        XDP_NATIVE => "native",
        _ => "off",
    }
}

/// Why this uplink is better off without it.
///
/// * `vlans` – `/proc/net/vlan/config`: `NAME | ID | INTERFACE`.
fn unsuitable(uplink: &Uplink, mode: XdpMode, vlans: &str) -> Option<String> {
    if uplink.kind == "vxlan" {
        return Some("it is the tunnel between nodes, which has no driver".into());
    }
    let vlan = vlans.lines().find_map(|line| {
        let mut columns = line.split('|').map(str::trim);
        let name = columns.next()?;
        (columns.nth(1)? == uplink.name).then_some(name)
    });
    if let Some(vlan) = vlan {
        return Some(format!(
            "{vlan} is a VLAN on it, whose frames may come without their tag. Remove the VLAN, or move it \
             to another interface"
        ));
    }
    if uplink.kind == "bond" {
        return Some(
            "a bond's frames come by the interfaces below it, which are no uplinks".into(),
        );
    }
    if mode == XdpMode::Auto && uplink.kind == "veth" {
        return Some(
            "it is a veth, which loses what is sent by it unless its other end has an XDP program too. If it \
             has, say --xdp native"
                .into(),
        );
    }
    None
}

fn words(error: &io::Error) -> String {
    let remedy = match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::EINVAL) => {
            "; its driver has no XDP, or not together with what is switched on (LRO, a large MTU)"
        }
        Some(libc::EBUSY | libc::EEXIST) => {
            "; another XDP program is on it (`ip link show` names it)"
        }
        Some(libc::ERANGE) => "; its MTU is too large for its driver's XDP",
        Some(libc::ENOMEM | libc::ENOSPC) => {
            "; it has too few queues for XDP (`ethtool -L` changes them)"
        }
        _ => "",
    };
    format!("{error}{remedy}")
}

fn attach(pin: &Path, program: BorrowedFd<'_>, ifindex: u32) -> io::Result<()> {
    attach_pinned(pin, program, ifindex, || {
        sys::link_create_xdp(program, ifindex)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uplink(kind: &str) -> Uplink {
        Uplink {
            index: 2,
            name: "eth0".into(),
            kind: kind.into(),
            mac: [2, 0, 0, 0, 0, 1],
            addresses: Vec::new(),
        }
    }

    #[test]
    fn what_would_lose_frames_or_has_none_is_left_alone() {
        const VLANS: &str = "VLAN Dev name    | VLAN ID\n\
            Name-Type: VLAN_NAME_TYPE_RAW_PLUS_VID_NO_PAD\n\
            eth1.5         | 5  | eth1\n\
            storage        | 7  | eth0\n";
        let auto = |kind, vlans| unsuitable(&uplink(kind), XdpMode::Auto, vlans);
        assert_eq!(auto("", ""), None);
        assert!(auto("vxlan", "").is_some());
        assert!(auto("veth", "").is_some());
        assert!(auto("bond", "").is_some());
        assert!(auto("", VLANS).is_some_and(|reason| reason.starts_with("storage ")));
        let native = unsuitable(&uplink("veth"), XdpMode::Native, "");
        assert_eq!(native, None, "somebody has said so");
    }
}
