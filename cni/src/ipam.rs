//! Address leases of one network on this node.
//!
//! ```text
//! /run/gantry/ipam/<network>/lock            flock: one writer at a time, also between processes
//!                            boot_id         the boot that these leases belong to
//!                            last_v4         the address handed out last
//!                            leases/10.244.1.7 -> <container id>/<interface>
//! ```
//! A lease is a symbolic link whose target names its owner: it appears and disappears in one system
//! call, so a crash leaves either a whole lease or none, and `ls -l` shows who has what.
//!
//! Invariants: an address has one owner; the first address of a range is the gateway and is never
//! leased; search starts after the address handed out last, so a freed address is reused last;
//! leases of another boot are void (a hard reboot kills every pod, so nothing can leak).

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::error::CniError;

/// At most this many addresses of one prefix are used: 64 Ki, one /16. Bounds the bitmap to 8 KiB.
pub const RANGE_SIZE_MAX: u64 = 1 << 16;

/// How long to wait for another process's allocation; it takes about a millisecond.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// Who holds a lease.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Owner {
    /// The CNI container id: in process the pod's UID. No `/`.
    pub container_id: String,
    /// The interface inside the container. No `/`.
    pub ifname: String,
}

impl Owner {
    fn to_target(&self) -> String {
        format!("{}/{}", self.container_id, self.ifname)
    }

    fn from_target(target: &Path) -> Option<Self> {
        let (container_id, ifname) = target.to_str()?.split_once('/')?;
        Some(Self {
            container_id: container_id.into(),
            ifname: ifname.into(),
        })
    }
}

/// What [`Ipam::allocate`] gave.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Allocation {
    /// One per range, in their order.
    pub addresses: Vec<IpAddr>,
    /// The owner had none before this call.
    pub new: bool,
}

/// One prefix to lease from. Offsets count from the network address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    prefix: IpNet,
    /// Offset of the first address that can be leased; the gateway is the one before it.
    first: u64,
    /// Offset of the last one.
    last: u64,
}

impl Range {
    /// The addresses of `prefix` that pods can have: without the network address, the gateway
    /// (first host) and, for IPv4, the broadcast address.
    ///
    /// # Errors
    /// When nothing is left: longer than /30 or /126.
    pub fn new(prefix: IpNet) -> Result<Self, CniError> {
        let prefix = prefix.trunc();
        let host_bits = u32::from(prefix.max_prefix_len() - prefix.prefix_len());
        let size = 1u64.checked_shl(host_bits).unwrap_or(0);
        let size = if size == 0 {
            RANGE_SIZE_MAX
        } else {
            size.min(RANGE_SIZE_MAX)
        };
        let reserved_at_end = u64::from(prefix.addr().is_ipv4());
        let (first, end) = (2, size.saturating_sub(reserved_at_end));
        if first >= end {
            return Err(CniError::Config {
                field: "subnets".into(),
                message: format!(
                    "{prefix} has no address for a pod beside network, gateway and broadcast: \
                     want /30 (IPv4) or /126 (IPv6) at least"
                ),
            });
        }
        let last = end - 1;
        Ok(Self {
            prefix,
            first,
            last,
        })
    }

    /// The first host address: the bridge's own.
    pub fn gateway(&self) -> IpAddr {
        self.address(self.first - 1)
    }

    /// The prefix.
    pub fn prefix(&self) -> IpNet {
        self.prefix
    }

    /// How many addresses can be leased.
    pub fn size(&self) -> u64 {
        self.last - self.first + 1
    }

    fn address(&self, offset: u64) -> IpAddr {
        // Offsets are below RANGE_SIZE_MAX and inside the prefix, so neither addition wraps.
        match self.prefix.network() {
            IpAddr::V4(base) => IpAddr::V4(Ipv4Addr::from(u32::from(base) + offset as u32)),
            IpAddr::V6(base) => IpAddr::V6(Ipv6Addr::from(u128::from(base) + u128::from(offset))),
        }
    }

    /// The offset of an address that can be leased from this range.
    fn offset(&self, address: IpAddr) -> Option<u64> {
        let offset = match (self.prefix.network(), address) {
            (IpAddr::V4(base), IpAddr::V4(address)) => {
                u64::from(u32::from(address).checked_sub(u32::from(base))?)
            }
            (IpAddr::V6(base), IpAddr::V6(address)) => {
                u64::try_from(u128::from(address).checked_sub(u128::from(base))?).ok()?
            }
            _ => return None,
        };
        (self.first..=self.last).contains(&offset).then_some(offset)
    }

    /// Picks the next free offset after `previous`, cyclically. Pure.
    ///
    /// * `taken` – leased addresses, any order, of any range.
    /// * `previous` – the address handed out last, if known.
    pub fn pick<'a>(
        &self,
        taken: impl Iterator<Item = &'a IpAddr>,
        previous: Option<IpAddr>,
    ) -> Option<IpAddr> {
        let mut bitmap = vec![0u64; (self.last / 64 + 1) as usize];
        for offset in taken.filter_map(|address| self.offset(*address)) {
            bitmap[(offset / 64) as usize] |= 1 << (offset % 64);
        }
        let start = previous
            .and_then(|address| self.offset(address))
            .map_or(self.first, |offset| offset + 1);
        (start..=self.last)
            .chain(self.first..start.min(self.last + 1))
            .find(|offset| bitmap[(offset / 64) as usize] & (1 << (offset % 64)) == 0)
            .map(|offset| self.address(offset))
    }
}

/// The leases of one network. Every call takes the lock; calls block for about a millisecond.
#[derive(Clone, Debug)]
pub struct Ipam {
    network: String,
    dir: PathBuf,
    boot_id: String,
    ranges: Vec<Range>,
}

impl Ipam {
    /// Leases of `network` below `lease_dir`; nothing is touched yet.
    ///
    /// * `boot_id` – see [`boot_id`]; a parameter so that a test can reboot.
    pub fn new(lease_dir: &Path, network: &str, boot_id: &str, ranges: Vec<Range>) -> Self {
        Self {
            network: network.into(),
            dir: lease_dir.join(network),
            boot_id: boot_id.into(),
            ranges,
        }
    }

    /// One address per range for `owner`; the same again when it has them already. Also tells
    /// whether it had any before.
    ///
    /// # Errors
    /// [`CniError::Exhausted`] names the range; what this call leased before is given back.
    pub fn allocate(&self, owner: &Owner) -> Result<Allocation, CniError> {
        let _lock = self.lock()?;
        let mut leases = self.read()?;
        let mut addresses = Vec::with_capacity(self.ranges.len());
        let held: Vec<IpAddr> = (leases.iter())
            .filter(|(_, holder)| *holder == owner)
            .map(|(address, _)| *address)
            .collect();
        // An address outside every range is of a prefix this node had before: give it back.
        for address in &held {
            if !self
                .ranges
                .iter()
                .any(|range| range.offset(*address).is_some())
            {
                self.unlink(*address)?;
                leases.remove(address);
            }
        }
        let mut new = Vec::new();
        for range in &self.ranges {
            if let Some(address) = held.iter().find(|held| range.offset(**held).is_some()) {
                addresses.push(*address);
                continue;
            }
            match self.lease(range, &leases, owner) {
                Ok(address) => {
                    leases.insert(address, owner.clone());
                    new.push(address);
                    addresses.push(address);
                }
                Err(error) => {
                    for address in new {
                        self.unlink(address)?;
                    }
                    return Err(error);
                }
            }
        }
        Ok(Allocation {
            addresses,
            new: held.is_empty(),
        })
    }

    /// Leases these addresses to `owner` where they are free, of a range here, and `owner` has none
    /// of that range yet: what others were told of a pod stays true when it starts again. No
    /// promise: [`Ipam::allocate`] gives another address where one is not to be had.
    pub fn prefer(&self, owner: &Owner, wanted: &[IpAddr]) -> Result<(), CniError> {
        let _lock = self.lock()?;
        let leases = self.read()?;
        for range in &self.ranges {
            let of_range = |address: &IpAddr| range.offset(*address).is_some();
            let has_one = (leases.iter()).any(|(held, holder)| holder == owner && of_range(held));
            let free = |address: &&IpAddr| of_range(address) && !leases.contains_key(*address);
            if let (false, Some(address)) = (has_one, wanted.iter().find(free)) {
                self.link(*address, owner)?;
            }
        }
        Ok(())
    }

    /// Gives back everything `owner` has. Ok when it has nothing.
    pub fn release(&self, owner: &Owner) -> Result<Vec<IpAddr>, CniError> {
        self.retain(|holder| holder != owner)
    }

    /// Gives back the leases of every owner that `keep` refuses; returns their addresses.
    pub fn retain(&self, keep: impl Fn(&Owner) -> bool) -> Result<Vec<IpAddr>, CniError> {
        if !self.dir.exists() {
            return Ok(Vec::new());
        }
        let _lock = self.lock()?;
        let mut released = Vec::new();
        for (address, owner) in self.read()? {
            if !keep(&owner) {
                self.unlink(address)?;
                released.push(address);
            }
        }
        Ok(released)
    }

    /// Who has what, by address.
    pub fn leases(&self) -> Result<BTreeMap<IpAddr, Owner>, CniError> {
        if !self.dir.exists() {
            return Ok(BTreeMap::new());
        }
        let _lock = self.lock()?;
        self.read()
    }

    /// The ranges, one per family.
    pub fn ranges(&self) -> &[Range] {
        &self.ranges
    }

    /// Removes the network's directory with every lease in it.
    pub fn remove_all(&self) -> Result<(), CniError> {
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(CniError::io(format!(
                "remove {}",
                self.dir.display()
            ))(error)),
            _ => Ok(()),
        }
    }

    fn lease(
        &self,
        range: &Range,
        leases: &BTreeMap<IpAddr, Owner>,
        owner: &Owner,
    ) -> Result<IpAddr, CniError> {
        let last_path = self.dir.join(match range.prefix.addr() {
            IpAddr::V4(_) => "last_v4",
            IpAddr::V6(_) => "last_v6",
        });
        let previous = fs::read_to_string(&last_path).ok();
        let previous = previous.and_then(|text| text.trim().parse().ok());
        let Some(address) = range.pick(leases.keys(), previous) else {
            return Err(CniError::Exhausted {
                network: self.network.clone(),
                range: range.prefix.to_string(),
                size: range.size(),
            });
        };
        // The order matters only for a crash in between: then an address is skipped once.
        write_whole(&last_path, &address.to_string())?;
        self.link(address, owner)?;
        Ok(address)
    }

    fn link(&self, address: IpAddr, owner: &Owner) -> Result<(), CniError> {
        let path = self.lease_path(address);
        symlink(owner.to_target(), &path)
            .map_err(CniError::io(format!("create lease {}", path.display())))
    }

    fn lease_path(&self, address: IpAddr) -> PathBuf {
        self.dir.join("leases").join(address.to_string())
    }

    fn unlink(&self, address: IpAddr) -> Result<(), CniError> {
        let path = self.lease_path(address);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(CniError::io(format!(
                "remove lease {}",
                path.display()
            ))(error)),
            _ => Ok(()),
        }
    }

    fn read(&self) -> Result<BTreeMap<IpAddr, Owner>, CniError> {
        let dir = self.dir.join("leases");
        let mut leases = BTreeMap::new();
        let failed = |error| CniError::io(format!("read leases in {}", dir.display()))(error);
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let address = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            let target = fs::read_link(entry.path()).ok();
            let owner = target.and_then(|target| Owner::from_target(&target));
            match (address, owner) {
                (Some(address), Some(owner)) => {
                    leases.insert(address, owner);
                }
                // Not ours: nobody's address depends on it.
                _ => tracing::warn!(path = %entry.path().display(), "no lease; ignored"),
            }
        }
        Ok(leases)
    }

    /// Takes the lock and voids the leases of an earlier boot. Callers of this process queue for it
    /// without looking at the file again and again: an agent has a hundred when as many pods begin.
    fn lock(&self) -> Result<(MutexGuard<'static, ()>, Flock<File>), CniError> {
        static IN_PROCESS: Mutex<()> = Mutex::new(());
        // It guards the file, not memory: a panic has spoiled nothing.
        let alone = IN_PROCESS.lock().unwrap_or_else(PoisonError::into_inner);
        let leases = self.dir.join("leases");
        fs::create_dir_all(&leases)
            .map_err(CniError::io(format!("create {}", leases.display())))?;
        let lock = self.flock()?;
        let boot_path = self.dir.join("boot_id");
        if fs::read_to_string(&boot_path).ok().as_deref() != Some(self.boot_id.as_str()) {
            for address in self.read()?.into_keys() {
                self.unlink(address)?;
            }
            write_whole(&boot_path, &self.boot_id)?;
        }
        Ok((alone, lock))
    }

    fn flock(&self) -> Result<Flock<File>, CniError> {
        let path = self.dir.join("lock");
        let mut options = OpenOptions::new();
        let mut file = (options.create(true).truncate(false).write(true).open(&path))
            .map_err(CniError::io(format!("open {}", path.display())))?;
        let begun = Instant::now();
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((unlocked, Errno::EWOULDBLOCK | Errno::EINTR)) => {
                    file = unlocked;
                    if begun.elapsed() > LOCK_WAIT {
                        return Err(CniError::Locked {
                            path: path.display().to_string(),
                            waited_ms: LOCK_WAIT.as_millis() as u64,
                        });
                    }
                    std::thread::sleep(Duration::from_micros(200));
                }
                Err((_, errno)) => {
                    return Err(CniError::io(format!("lock {}", path.display()))(
                        errno.into(),
                    ));
                }
            }
        }
    }
}

/// Writes a small file so that a reader or a crash sees the old or the new content, whole.
fn write_whole(path: &Path, content: &str) -> Result<(), CniError> {
    let temporary = path.with_extension("new");
    let result: io::Result<()> =
        fs::write(&temporary, content).and_then(|()| fs::rename(&temporary, path));
    result.map_err(CniError::io(format!("write {}", path.display())))
}

/// The kernel's random id of this boot.
pub fn boot_id() -> Result<String, CniError> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(path).map_err(CniError::io(format!("read {path}")))?;
    Ok(text.trim().to_string())
}

#[cfg(test)]
mod tests;
