//! Which of several machines this is, by the kernel's command line, and what makes it that machine.
//!
//! `gantry.node=2 gantry.segments=1,1,2`: node-2 of three; the third is behind the router. Addresses are
//! 10.0.SEGMENT.(10 + number) and fd00:10:SEGMENT::(10 + number); the router (xtask/src/vm/router.rs) is
//! 10.0.SEGMENT.1, and none for IPv6.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};

/// A worker's disk; node-1 has none.
const DISK: &str = "/dev/vda";
/// A device appears a moment after its driver.
const DEVICE_LIMIT: Duration = Duration::from_secs(10);

/// One of several machines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// From 1 on.
    pub number: u8,
    /// The segment of each machine.
    pub segments: Vec<u8>,
    /// The cluster stays up at the end.
    pub keep: bool,
    /// Scenarios that earlier boots have run.
    pub told: Vec<String>,
}

impl Place {
    /// Reads the kernel's command line; `None`: there is only this machine.
    pub fn parse(command_line: &str) -> Option<Self> {
        let word = |key: &str| {
            command_line
                .split_whitespace()
                .find_map(|word| word.strip_prefix(key))
        };
        let number: u8 = word("gantry.node=")?.parse().ok()?;
        let segments = word("gantry.segments=")?.split(',');
        let segments: Vec<u8> = segments.map(str::parse).collect::<Result<_, _>>().ok()?;
        (1..=segments.len())
            .contains(&number.into())
            .then_some(())?;
        let told = word("gantry.told=").unwrap_or_default().split(',');
        Some(Self {
            number,
            segments,
            told: told.map(str::to_owned).collect(),
            keep: command_line.split_whitespace().any(|w| w == "gantry.keep"),
        })
    }

    /// The name of a machine, which is its node's.
    pub fn name(number: u8) -> String {
        format!("node-{number}")
    }

    /// The segment of a machine.
    pub fn segment(&self, number: u8) -> u8 {
        let index = usize::from(number).saturating_sub(1);
        self.segments.get(index).copied().unwrap_or(1)
    }

    /// The address of a machine.
    pub fn address(&self, number: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, self.segment(number), 10 + number)
    }

    /// Its IPv6 address, for machines of its own segment.
    pub fn address_v6(&self, number: u8) -> Ipv6Addr {
        let segment = u16::from(self.segment(number));
        Ipv6Addr::new(0xfd00, 0x10, segment, 0, 0, 0, 0, u16::from(10 + number))
    }

    /// All of them.
    pub fn numbers(&self) -> impl Iterator<Item = u8> + use<> {
        1..=u8::try_from(self.segments.len()).unwrap_or(u8::MAX)
    }

    /// Name, links, addresses, and the disk of a worker.
    pub fn set_up(&self) -> Result<()> {
        nix::unistd::sethostname(Self::name(self.number))?;
        if self.number > 1 {
            self.mount_disk().context("this machine's disk")?;
        }
        let own = self.address(self.number);
        fs::write(
            "/etc/hosts",
            format!(
                "127.0.0.1 localhost\n::1 localhost\n{own} {}\n",
                Self::name(self.number)
            ),
        )?;
        let router = Ipv4Addr::new(10, 0, self.segment(self.number), 1);
        let mut lines = vec![
            "link set eth0 up".to_owned(),
            format!("address add {own}/24 broadcast + dev eth0"),
            format!("route add default via {router}"),
            format!(
                "-6 address add {}/64 dev eth0",
                self.address_v6(self.number)
            ),
        ];
        if self.keep && self.number == 1 {
            // By this one the host reaches the API.
            lines.extend([
                "link set eth1 up".into(),
                "address add 10.0.9.15/24 dev eth1".into(),
            ]);
        }
        for line in lines {
            let mut ip = Command::new("/bin/busybox");
            let status = ip.arg("ip").args(line.split(' ')).status()?;
            ensure!(status.success(), "ip {line}: {status}");
        }
        Ok(())
    }

    /// What a machine keeps without power: `/var/lib`, and `/etc` as it was at its first start.
    fn mount_disk(&self) -> Result<()> {
        let began = Instant::now();
        while !Path::new(DISK).exists() {
            ensure!(began.elapsed() < DEVICE_LIMIT, "no {DISK}");
            std::thread::sleep(Duration::from_millis(20));
        }
        let none = None::<&str>;
        mount(Some(DISK), "/var/lib", Some("ext4"), MsFlags::empty(), none)?;
        let kept = Path::new("/var/lib/machine/etc");
        if !kept.exists() {
            fs::create_dir_all("/var/lib/machine")?;
            let mut copy = Command::new("/bin/busybox");
            let status = copy.args(["cp", "-a", "/etc"]).arg(kept).status()?;
            ensure!(status.success(), "copy /etc: {status}");
        }
        mount(Some(kept), "/etc", none, MsFlags::MS_BIND, none)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_finds_its_place_by_the_command_line() {
        let line = "console=ttyS0 gantry.node=3 gantry.segments=1,1,2 gantry.keep\n";
        let place = Place::parse(line).unwrap();
        assert_eq!((place.number, place.keep), (3, true));
        assert_eq!(place.address(2), Ipv4Addr::new(10, 0, 1, 12));
        assert_eq!(place.address(3), Ipv4Addr::new(10, 0, 2, 13));
        assert_eq!(place.numbers().collect::<Vec<_>>(), [1, 2, 3]);
    }

    #[test]
    fn a_machine_alone_has_no_place() {
        for line in [
            "",
            "gantry.scenario=all",
            "gantry.node=2 gantry.segments=1",
            "gantry.node=0 gantry.segments=1",
            "gantry.node=1 gantry.segments=x",
        ] {
            assert_eq!(Place::parse(line), None, "{line}");
        }
    }
}
