//! The packet programs of uplinks: rows in the maps, then programs on the interface.
//!
//! ```text
//!  set       UPLINKS ─► to_netdev (egress), from_netdev (ingress), as `pods` attaches its own
//!                    ─► xdp_netdev, where it is wanted: see `xdp`
//!            an uplink no longer: pins and filters ─► UPLINKS
//!  announce  ANNOUNCED: the addresses on no interface that this node answers for ─► takeover
//!  masquerade  MASQUERADE, then its switch: whose packets leave from the node's own address
//! ```
//! The egress comes first: no packet is translated whose answer would not be. Links are found by
//! their pins, filters by the rows, so an agent that starts needs no other record.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use aya::programs::ProgramFd;
use ebpf_maps::services::Addr;
use ebpf_maps::uplink::{SWITCH_MASQUERADE, UplinkValue, XDP_OFF};
use gantry_cni::uplinks::Uplink;

use super::clsact::{self, Direction};
use super::load::{self, absent_is_fine, failed, program_fd, take_map, unexpected};
use super::pods::{Attachment, Hook, attach_tcx};
use super::takeover::{self, Takeovers, Uplinks};
use super::xdp::{Xdp, XdpMode, XdpStanding};
use super::{DataplaneError, hooks, sys};
use crate::paths::Paths;
use crate::policy::prefix::Prefix;
use crate::services::index::addr_of;

/// What an uplink has.
pub(super) const UPLINK_HOOKS: [Hook; 2] = [
    Hook {
        program: "to_netdev",
        direction: Direction::Egress,
    },
    Hook {
        program: "from_netdev",
        direction: Direction::Ingress,
    },
];

const PIN_PREFIX: &str = "uplink-";

/// The programs and maps of uplinks.
pub(super) struct UplinkPrograms {
    links: PathBuf,
    programs: Vec<(&'static Hook, ProgramFd)>,
    attachment: Attachment,
    uplinks: HashMap<MapData, u32, UplinkValue>,
    announced: HashMap<MapData, Addr, u32>,
    masquerade: LpmTrie<MapData, Addr, u32>,
    switches: Array<MapData, u32>,
    takeovers: Takeovers,
    xdp: Xdp,
}

impl UplinkPrograms {
    /// Takes maps and loaded programs out of the object.
    pub(super) fn take(
        ebpf: &mut Ebpf,
        paths: &Paths,
        xdp: XdpMode,
    ) -> Result<Self, DataplaneError> {
        let xdp = Xdp::load(ebpf, paths, xdp);
        let mut programs = Vec::new();
        for hook in &UPLINK_HOOKS {
            let program = program_fd(ebpf, hook.program)?.try_clone();
            let program = program.map_err(|error| DataplaneError::kernel(hook.program, &error))?;
            programs.push((hook, program));
        }
        let attachment = match programs.first() {
            Some((_, program)) => Attachment::probe(program.as_fd()),
            None => Attachment::Clsact,
        };
        let uplinks = take_map(ebpf, "UPLINKS")?.try_into();
        let announced = take_map(ebpf, "ANNOUNCED")?.try_into();
        let masquerade = take_map(ebpf, "MASQUERADE")?.try_into();
        let switches = take_map(ebpf, "SWITCHES")?.try_into();
        Ok(Self {
            links: hooks::directory(paths),
            programs,
            attachment,
            uplinks: uplinks.map_err(|error: MapError| unexpected("UPLINKS", error))?,
            announced: announced.map_err(|error: MapError| unexpected("ANNOUNCED", error))?,
            masquerade: masquerade.map_err(|error: MapError| unexpected("MASQUERADE", error))?,
            switches: switches.map_err(|error: MapError| unexpected("SWITCHES", error))?,
            takeovers: Takeovers::default(),
            xdp,
        })
    }

    /// By which means; tests compare both.
    #[cfg(test)]
    pub(super) fn attachment(&mut self) -> &mut Attachment {
        &mut self.attachment
    }

    /// See [`super::Dataplane::set_uplinks`].
    pub(super) fn set(&mut self, wanted: &[Uplink]) -> Result<(), DataplaneError> {
        let before = self.rows()?;
        let mut gone: BTreeSet<u32> = before.keys().copied().collect();
        gone.extend(pinned(&self.links));
        let mut first = Ok(());
        for uplink in wanted {
            gone.remove(&uplink.index);
            first = first.and(self.attach(uplink));
        }
        for ifindex in gone {
            first = first.and(self.detach(ifindex));
        }
        let (now, announced) = (self.rows()?, self.announced()?);
        self.takeovers.listen(&now, &announced);
        let is_new = |(index, value): &(&u32, &UplinkValue)| {
            let known = before.get(*index).map(UplinkValue::on_the_link);
            known != Some(value.on_the_link())
        };
        let new = now.iter().filter(is_new);
        takeover::tell(
            &new.map(|(index, value)| (*index, *value)).collect(),
            &announced,
        );
        first
    }

    /// Makes the announced addresses exactly these. Those that are new are told to the link, in the
    /// namespace of the calling thread.
    pub(super) fn announce(&mut self, wanted: &BTreeSet<Addr>) -> Result<(), DataplaneError> {
        let there = self.announced()?;
        if wanted.is_empty() && there.is_empty() {
            return Ok(());
        }
        let uplinks = self.rows()?;
        for addr in there.difference(wanted) {
            absent_is_fine(self.announced.remove(addr))
                .map_err(|error| failed("remove from ANNOUNCED", &error))?;
        }
        for addr in wanted.difference(&there) {
            (self.announced.insert(addr, 1, 0))
                .map_err(|error| failed("write ANNOUNCED", &error))?;
        }
        // Who asks is answered by now.
        self.takeovers.listen(&uplinks, wanted);
        let new: BTreeSet<Addr> = wanted.difference(&there).copied().collect();
        takeover::tell(&uplinks, &new);
        Ok(())
    }

    /// Tells the link once more of all of them.
    pub(super) fn announce_again(&self) -> Result<(), DataplaneError> {
        takeover::tell(&self.rows()?, &self.announced()?);
        Ok(())
    }

    fn announced(&self) -> Result<BTreeSet<Addr>, DataplaneError> {
        let there: Result<BTreeSet<Addr>, MapError> = self.announced.keys().collect();
        there.map_err(|error| failed("read ANNOUNCED", &error))
    }

    /// Whether pods' packets to the outside leave from the node's address, by what is in the kernel.
    pub(super) fn is_masquerading(&self) -> Result<bool, DataplaneError> {
        let on = self.switches.get(&SWITCH_MASQUERADE, 0);
        on.map(|on| on != 0)
            .map_err(|error| failed("read SWITCHES", &error))
    }

    /// Makes MASQUERADE exactly these rows; none: it is not done at all.
    pub(super) fn masquerade(
        &mut self,
        wanted: Option<&BTreeMap<Prefix, u32>>,
    ) -> Result<(), DataplaneError> {
        if wanted.is_none() {
            self.switch(SWITCH_MASQUERADE, false)?;
        }
        let nothing = BTreeMap::new();
        let rows = wanted.unwrap_or(&nothing);
        let there: Result<BTreeMap<Prefix, u32>, MapError> = (self.masquerade.iter())
            .map(|row| {
                row.map(|(key, value)| (Prefix::from_key(&key.data(), key.prefix_len()), value))
            })
            .collect();
        let there = there.map_err(|error| failed("read MASQUERADE", &error))?;
        let key = |prefix: &Prefix| Key::new(prefix.bits(), prefix.addr());
        for (prefix, value) in rows {
            if there.get(prefix) != Some(value) {
                (self.masquerade.insert(&key(prefix), value, 0))
                    .map_err(|error| failed("write MASQUERADE", &error))?;
            }
        }
        for prefix in there.keys().filter(|prefix| !rows.contains_key(prefix)) {
            absent_is_fine(self.masquerade.remove(&key(prefix)))
                .map_err(|error| failed("remove from MASQUERADE", &error))?;
        }
        match wanted {
            Some(_) => self.switch(SWITCH_MASQUERADE, true),
            None => Ok(()),
        }
    }

    /// Whether something (`ebpf_maps::uplink::SWITCH_*`) is done at all.
    pub(super) fn switch(&mut self, switch: u32, on: bool) -> Result<(), DataplaneError> {
        (self.switches.set(switch, u32::from(on), 0))
            .map_err(|error| failed("write SWITCHES", &error))
    }

    fn rows(&self) -> Result<Uplinks, DataplaneError> {
        let rows: Result<_, MapError> = self.uplinks.iter().collect();
        rows.map_err(|error| failed("read UPLINKS", &error))
    }

    /// How each uplink's frames are looked at.
    pub(super) fn xdp(&self) -> Vec<XdpStanding> {
        self.xdp.standings()
    }

    fn attach(&mut self, uplink: &Uplink) -> Result<(), DataplaneError> {
        let of_family = |v6: bool| {
            let first = uplink
                .addresses
                .iter()
                .find(|address| address.is_ipv6() == v6);
            first.map_or([0; 4], |address: &IpAddr| addr_of(*address))
        };
        // Others send by it what has come in their drivers, until it is known that they cannot.
        let before = self
            .uplinks
            .get(&uplink.index, 0)
            .map_or(XDP_OFF, |row| row.xdp);
        let value = UplinkValue {
            v4: of_family(false),
            v6: of_family(true),
            mac: uplink.mac,
            xdp: if self.xdp.keeps(before) {
                before
            } else {
                XDP_OFF
            },
            _pad: 0,
        };
        (self.uplinks.insert(uplink.index, value, 0))
            .map_err(|error| failed("write UPLINKS", &error))?;
        for (hook, program) in &self.programs {
            let attached = match self.attachment {
                Attachment::Tcx => {
                    let pin = self.links.join(pin_name(uplink.index, hook));
                    attach_tcx(&pin, hook.direction, program.as_fd(), uplink.index)
                }
                Attachment::Clsact => {
                    let (direction, name) = (hook.direction, hook.program);
                    clsact::attach(uplink.index, direction, name, program.as_fd())
                }
            };
            attached.map_err(|error| {
                let what = format!(
                    "attach program {} to interface {}",
                    hook.program, uplink.name
                );
                DataplaneError::kernel(what, &error)
            })?;
        }
        // The last: what it leaves is theirs.
        let xdp = self.xdp.attach(uplink);
        if xdp != value.xdp {
            (self
                .uplinks
                .insert(uplink.index, UplinkValue { xdp, ..value }, 0))
            .map_err(|error| failed("write UPLINKS", &error))?;
        }
        Ok(())
    }

    fn detach(&mut self, ifindex: u32) -> Result<(), DataplaneError> {
        // Ingress first, the other way round.
        self.xdp.detach(ifindex);
        for hook in UPLINK_HOOKS.iter().rev() {
            let pin = self.links.join(pin_name(ifindex, hook));
            unpin(&pin).map_err(|error| {
                DataplaneError::kernel(format!("detach {}", pin.display()), &error)
            })?;
            if self.attachment == Attachment::Clsact {
                clsact::detach(ifindex, hook.direction).map_err(|error| {
                    let what = format!("detach {} from interface {ifindex}", hook.program);
                    DataplaneError::kernel(what, &error)
                })?;
            }
        }
        absent_is_fine(self.uplinks.remove(&ifindex))
            .map_err(|error| failed("remove from UPLINKS", &error))
    }
}

/// Takes the filters of all uplinks away that the pinned rows tell of: they outlive every pin.
pub(super) fn remove_filters(paths: &Paths) -> io::Result<()> {
    let directories = load::other_map_directories(paths);
    for directory in directories.into_iter().chain([load::map_directory(paths)]) {
        let Ok(data) = MapData::from_pin(directory.join("UPLINKS")) else {
            continue; // no agent of that layout, or one before uplinks
        };
        let Ok(uplinks) = HashMap::<_, u32, UplinkValue>::try_from(Map::HashMap(data)) else {
            continue;
        };
        for ifindex in uplinks.keys().filter_map(Result::ok) {
            for hook in UPLINK_HOOKS.iter().rev() {
                clsact::detach(ifindex, hook.direction)?;
            }
        }
    }
    Ok(())
}

/// Ends a pinned link now: the kernel does it some time later when only the pin goes.
pub(super) fn unpin(pin: &Path) -> io::Result<()> {
    match sys::open_pinned(pin).and_then(|link| sys::link_detach(link.as_fd())) {
        // No link, or its interface is gone and the attachment with it.
        Err(error)
            if error.kind() != io::ErrorKind::NotFound
                && error.raw_os_error() != Some(libc::ENOLINK) =>
        {
            return Err(error);
        }
        _ => {}
    }
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// `uplink-2-from_netdev`: bpffs allows no dot in a name.
fn pin_name(ifindex: u32, hook: &Hook) -> String {
    format!("{PIN_PREFIX}{ifindex}-{}", hook.program)
}

fn pinned(links: &Path) -> BTreeSet<u32> {
    let pins = fs::read_dir(links).into_iter().flatten().flatten();
    pins.filter_map(|pin| uplink_of_pin(pin.file_name().to_str()?))
        .collect()
}

fn uplink_of_pin(name: &str) -> Option<u32> {
    let (ifindex, _) = name.strip_prefix(PIN_PREFIX)?.split_once('-')?;
    ifindex.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_tells_its_uplink() {
        for hook in &UPLINK_HOOKS {
            assert_eq!(uplink_of_pin(&pin_name(7, hook)), Some(7));
        }
        assert_eq!(uplink_of_pin("pod-0000000000000007-to_pod"), None);
    }
}
