//! Options of an NFS mount, as people write them: pure.
//!
//! | option | by mount.nfs | by the kernel alone |
//! |---|---|---|
//! | ro, nosuid, noatime and their like | passed on | flags of mount(2) |
//! | vers, nfsvers, v4.1, minorversion | passed on | tried; none: 4.2, 4.1, 4.0 |
//! | version 3 and older | passed on | refused |
//! | retry, fg | passed on | left out |
//! | of mount(8) and fstab alone (_netdev, x-...) | left out | left out |
//! | bg, remount, bind, addr | refused | refused |
//! | anything else | passed on | passed on |

use std::net::IpAddr;

use rustix::mount::MountFlags;

/// Of mount(8) and of fstab, without a meaning here.
const LEFT_OUT: [&str; 11] = [
    "defaults", "_netdev", "nofail", "auto", "noauto", "user", "nouser", "users", "nousers",
    "owner", "group",
];
/// What would make the mount another one than asked for.
const REFUSED: [(&str, &str); 6] = [
    ("bg", "the pod is tried again by itself"),
    ("remount", "volumes are mounted once"),
    ("bind", "an export is mounted"),
    ("rbind", "an export is mounted"),
    ("move", "an export is mounted"),
    ("addr", "the server is named by the volume"),
];
/// Minor versions that are tried, best first.
const MINOR: [u8; 3] = [2, 1, 0];

/// Options, understood.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Options {
    /// For mount(2).
    pub(super) flags: MountFlags,
    /// For mount.nfs, in order.
    helper: Vec<String>,
    /// For the NFS client, without version.
    client: Vec<String>,
    version: Option<u32>,
    minor: Option<u8>,
}

impl Options {
    /// * `words` – an option each, or several with commas.
    /// * `read_only` – whatever they say.
    pub(super) fn parse(words: &[String], read_only: bool) -> Result<Self, String> {
        let mut all = Self {
            flags: MountFlags::empty(),
            helper: Vec::new(),
            client: Vec::new(),
            version: None,
            minor: None,
        };
        let words = words.iter().flat_map(|word| word.split(',')).map(str::trim);
        for word in words.filter(|word| !word.is_empty()) {
            if word.contains(|c: char| c.is_control() || c.is_whitespace()) {
                return Err(format!(
                    "mount option {word:?} has a blank or a control character"
                ));
            }
            all.take(word)?;
        }
        if read_only {
            all.flags |= MountFlags::RDONLY;
            all.helper.push("ro".to_owned());
        }
        Ok(all)
    }

    fn take(&mut self, word: &str) -> Result<(), String> {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        if let Some((_, why)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
            return Err(format!("mount option {word:?}: {why}"));
        }
        if LEFT_OUT.contains(&name) || name.starts_with("x-") {
            return Ok(());
        }
        self.helper.push(word.to_owned());
        if let Some((flag, on)) = flag(word) {
            self.flags.set(flag, on);
        } else if matches!(name, "vers" | "nfsvers" | "minorversion") {
            self.set_version(name, value, word)?;
        } else if let Some(version) = word.strip_prefix('v').filter(|v| is_version(v)) {
            self.set_version("vers", version, word)?;
        } else if !matches!(name, "fg" | "retry") {
            self.client.push(word.to_owned());
        }
        Ok(())
    }

    fn set_version(&mut self, name: &str, value: &str, word: &str) -> Result<(), String> {
        let unknown = || format!("mount option {word:?} is no version of NFS");
        if name == "minorversion" {
            self.minor = Some(value.parse().map_err(|_| unknown())?);
            return Ok(());
        }
        let (major, minor) = value.split_once('.').unwrap_or((value, ""));
        self.version = Some(major.parse().map_err(|_| unknown())?);
        if !minor.is_empty() {
            self.minor = Some(minor.parse().map_err(|_| unknown())?);
        }
        Ok(())
    }

    /// The argument of `-o`; never empty.
    pub(super) fn for_helper(&self) -> String {
        match self.helper.is_empty() {
            true => "rw".to_owned(),
            false => self.helper.join(","),
        }
    }

    /// The options of the kernel's client, one text for each version that is tried.
    pub(super) fn for_kernel(&self, address: IpAddr) -> Result<Vec<String>, String> {
        if let Some(version) = self.version.filter(|version| *version != 4) {
            return Err(format!(
                "version {version} needs mount.nfs on the node: install nfs-common or nfs-utils"
            ));
        }
        let minors = self.minor.map_or(MINOR.to_vec(), |minor| vec![minor]);
        let text = |minor: u8| {
            let mut words = self.client.clone();
            words.extend([format!("vers=4.{minor}"), format!("addr={address}")]);
            words.join(",")
        };
        Ok(minors.into_iter().map(text).collect())
    }
}

fn is_version(text: &str) -> bool {
    matches!(text, "2" | "3" | "4" | "4.0" | "4.1" | "4.2")
}

/// An option of every file system: the flag, and whether it is set.
fn flag(word: &str) -> Option<(MountFlags, bool)> {
    Some(match word {
        "ro" => (MountFlags::RDONLY, true),
        "rw" => (MountFlags::RDONLY, false),
        "nosuid" => (MountFlags::NOSUID, true),
        "suid" => (MountFlags::NOSUID, false),
        "nodev" => (MountFlags::NODEV, true),
        "dev" => (MountFlags::NODEV, false),
        "noexec" => (MountFlags::NOEXEC, true),
        "exec" => (MountFlags::NOEXEC, false),
        "noatime" => (MountFlags::NOATIME, true),
        "atime" => (MountFlags::NOATIME, false),
        "nodiratime" => (MountFlags::NODIRATIME, true),
        "diratime" => (MountFlags::NODIRATIME, false),
        "relatime" => (MountFlags::RELATIME, true),
        "norelatime" => (MountFlags::RELATIME, false),
        "strictatime" => (MountFlags::STRICTATIME, true),
        "nostrictatime" => (MountFlags::STRICTATIME, false),
        "sync" => (MountFlags::SYNCHRONOUS, true),
        "async" => (MountFlags::SYNCHRONOUS, false),
        "dirsync" => (MountFlags::DIRSYNC, true),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str, read_only: bool) -> Result<Options, String> {
        Options::parse(&[text.to_owned()], read_only)
    }

    const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 5));

    #[test]
    fn options_go_where_they_belong() {
        let none = parse("", false).unwrap();
        assert_eq!(none.for_helper(), "rw");
        let tried = none.for_kernel(ADDRESS).unwrap();
        let versions = ["vers=4.2", "vers=4.1", "vers=4.0"];
        assert_eq!(
            tried,
            versions.map(|version| format!("{version},addr=10.0.0.5"))
        );
        for (text, helper, kernel, flags) in [
            (
                "hard,nfsvers=4.1",
                "hard,nfsvers=4.1",
                "hard,vers=4.1",
                MountFlags::empty(),
            ),
            ("v4.2,nosuid", "v4.2,nosuid", "vers=4.2", MountFlags::NOSUID),
            (
                "vers=4,minorversion=0,sec=sys",
                "vers=4,minorversion=0,sec=sys",
                "sec=sys,vers=4.0",
                MountFlags::empty(),
            ),
            (
                "_netdev,vers=4.2,retry=0,noatime,x-systemd.automount",
                "vers=4.2,retry=0,noatime",
                "vers=4.2",
                MountFlags::NOATIME,
            ),
            (
                "ro,rw,vers=4.0",
                "ro,rw,vers=4.0",
                "vers=4.0",
                MountFlags::empty(),
            ),
        ] {
            let options = parse(text, false).unwrap();
            assert_eq!(options.for_helper(), helper);
            assert_eq!(
                options.for_kernel(ADDRESS).unwrap(),
                [format!("{kernel},addr=10.0.0.5")]
            );
            assert_eq!(options.flags, flags, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_in_words() {
        for (text, word) in [
            ("bg", "tried again"),
            ("hard,addr=10.0.0.6", "named by the volume"),
            ("remount", "mounted once"),
            ("nfsvers=x", "no version"),
            ("hard\nsoft", "control character"),
        ] {
            let error = parse(text, false).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        let old = parse("nfsvers=3", false).unwrap();
        assert_eq!(old.for_helper(), "nfsvers=3");
        assert!(old.for_kernel(ADDRESS).unwrap_err().contains("nfs-common"));
    }

    proptest! {
        #[test]
        fn read_only_wins_and_the_server_is_never_another(
            words in proptest::collection::vec("(rw|ro|suid|hard|addr=1|vers=4.1|,|[a-z=.]{0,8})", 0..6)
        ) {
            if let Ok(options) = Options::parse(&words, true) {
                prop_assert!(options.flags.contains(MountFlags::RDONLY));
                let helper = options.for_helper();
                prop_assert!(helper.ends_with("ro"), "{helper}");
                for text in options.for_kernel(ADDRESS).into_iter().flatten() {
                    let addresses = text.split(',').filter(|word| word.starts_with("addr="));
                    prop_assert_eq!(addresses.collect::<Vec<_>>(), ["addr=10.0.0.5"]);
                }
            }
        }
    }
}
