//! From a mount of the spec to what the kernel's mount calls take: pure.
//!
//! Source: runtime-spec `config.md#linux-mount-options`; libcontainer reads the option words.

use std::path::PathBuf;

use anyhow::{Context, bail};
use libcontainer::oci_spec::runtime::Mount as OciMount;
use libcontainer::rootfs::utils::{is_bind, parse_mount};
use nix::mount::MsFlags;

/// One mount, ready to be made.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Mount {
    /// Absolute, inside the container.
    pub(crate) destination: PathBuf,
    pub(crate) what: What,
    /// What the mount table names as the source of a new file system.
    pub(crate) source: Option<String>,
    /// `MOUNT_ATTR_*` of the top mount.
    pub(crate) attributes: u64,
    /// `MOUNT_ATTR_*` of the whole tree, and what they replace.
    pub(crate) recursive: Option<(u64, u64)>,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE` or `MS_UNBINDABLE`; none is private.
    pub(crate) propagation: Option<u64>,
}

/// Where a mount's content comes from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum What {
    /// A directory or file of the host, with the mounts below it or without.
    Bind { source: PathBuf, tree: bool },
    /// A file system of this type with these options.
    New {
        kind: String,
        options: Vec<(String, Option<String>)>,
    },
}

impl Mount {
    pub(crate) fn parse(mount: &OciMount) -> anyhow::Result<Self> {
        let destination = mount.destination().clone();
        Self::read(mount).with_context(|| format!("mount at {}", destination.display()))
    }

    fn read(mount: &OciMount) -> anyhow::Result<Self> {
        let words = mount.options().as_deref().unwrap_or_default();
        if words.iter().any(|w| w == "idmap" || w == "ridmap") {
            bail!("id-mapped mounts are made before the container, not with it");
        }
        let parsed = parse_mount(mount).map_err(|e| anyhow::anyhow!("{e}"))?;
        if !mount.destination().is_absolute() {
            bail!("the path is not absolute");
        }
        // libcontainer's nix is another version of the crate: the numbers are the kernel's.
        let flags = MsFlags::from_bits_retain(parsed.flags.bits());
        let source = || mount.source().clone().context("a bind needs a source");
        let what = if is_bind(mount) {
            if let Some(word) = parsed.data.first() {
                bail!("unknown option {word:?} of a bind");
            }
            What::Bind {
                source: source()?,
                tree: words.iter().any(|w| w == "rbind"),
            }
        } else {
            let kind = mount.typ().clone().context("a mount needs a type")?;
            What::New {
                // The hybrid's and v1's mounts are many; the agent asks for them on v2 only.
                kind: if kind == "cgroup" {
                    "cgroup2".to_owned()
                } else {
                    kind
                },
                options: parsed.data.iter().map(|word| key_value(word)).collect(),
            }
        };
        Ok(Self {
            destination: mount.destination().clone(),
            what,
            source: mount
                .source()
                .as_ref()
                .map(|s| s.to_string_lossy().into_owned()),
            attributes: attributes(flags)?,
            recursive: parsed.rec_attr.map(|a| (a.attr_set, a.attr_clr)),
            propagation: propagation(words),
        })
    }

    /// It takes part in what the host mounts or sees later: its copy must be made while this
    /// namespace's mounts still do.
    pub(crate) fn follows_host(&self) -> bool {
        matches!(self.propagation, Some(libc::MS_SHARED | libc::MS_SLAVE))
    }
}

fn key_value(word: &str) -> (String, Option<String>) {
    match word.split_once('=') {
        Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
        None => (word.to_owned(), None),
    }
}

/// By the words: libcontainer reads `rslave` as no propagation at all.
fn propagation(words: &[String]) -> Option<u64> {
    words.iter().rev().find_map(|word| match word.as_str() {
        "shared" | "rshared" => Some(libc::MS_SHARED),
        "slave" | "rslave" => Some(libc::MS_SLAVE),
        "private" | "rprivate" => Some(libc::MS_PRIVATE),
        "unbindable" | "runbindable" => Some(libc::MS_UNBINDABLE),
        _ => None,
    })
}

/// mount(2)'s flags as fsmount(2) and mount_setattr(2) know them.
fn attributes(flags: MsFlags) -> anyhow::Result<u64> {
    let known = [
        (MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
        (MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
        (MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV),
        (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
        (MsFlags::MS_NOATIME, libc::MOUNT_ATTR_NOATIME),
        (MsFlags::MS_STRICTATIME, libc::MOUNT_ATTR_STRICTATIME),
        (MsFlags::MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
    ];
    let elsewhere = MsFlags::MS_BIND
        | MsFlags::MS_REC
        | MsFlags::MS_RELATIME
        | MsFlags::MS_SHARED
        | MsFlags::MS_SLAVE
        | MsFlags::MS_PRIVATE
        | MsFlags::MS_UNBINDABLE;
    let mut bits = 0;
    let mut rest = flags - elsewhere;
    for (flag, bit) in known {
        if flags.contains(flag) {
            bits |= bit;
            rest -= flag;
        }
    }
    if !rest.is_empty() {
        bail!("options {rest:?} are not supported");
    }
    Ok(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: serde_json::Value) -> anyhow::Result<Mount> {
        Mount::parse(&serde_json::from_value(value).unwrap())
    }

    #[test]
    fn a_file_system_keeps_its_options_and_attributes() {
        let devpts = parse(serde_json::json!({
            "destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "gid=5"],
        }))
        .unwrap();
        assert_eq!(
            devpts.attributes,
            libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC
        );
        let What::New { kind, options } = devpts.what else {
            panic!("not new")
        };
        assert_eq!(kind, "devpts");
        let wanted = [
            ("newinstance", None),
            ("ptmxmode", Some("0666")),
            ("gid", Some("5")),
        ];
        assert_eq!(
            options,
            wanted.map(|(k, v)| (k.to_owned(), v.map(str::to_owned)))
        );
    }

    #[test]
    fn a_bind_says_how_deep_it_goes_and_what_it_follows() {
        let bind = |options: &[&str]| {
            parse(serde_json::json!({
                "destination": "/data", "type": "bind", "source": "/srv", "options": options,
            }))
        };
        let plain = bind(&["rbind", "rprivate", "ro"]).unwrap();
        assert!(!plain.follows_host() && plain.recursive.is_none());
        assert_eq!(plain.attributes, libc::MOUNT_ATTR_RDONLY);
        assert_eq!(
            plain.what,
            What::Bind {
                source: "/srv".into(),
                tree: true
            }
        );
        assert!(bind(&["rbind", "rslave", "rw"]).unwrap().follows_host());
        assert!(bind(&["rbind", "rshared", "rw"]).unwrap().follows_host());
        let all = bind(&["rbind", "rprivate", "rro"]).unwrap();
        assert_eq!(all.attributes, 0);
        assert_eq!(all.recursive.unwrap().0, libc::MOUNT_ATTR_RDONLY);
        let flat = bind(&["bind", "rprivate"]).unwrap();
        assert!(matches!(flat.what, What::Bind { tree: false, .. }));
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let bind = |option: &str| {
            parse(serde_json::json!({
                "destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind", option],
            }))
        };
        for option in ["idmap", "nonsense", "remount", "sync"] {
            assert!(bind(option).is_err(), "{option}");
        }
        let relative = serde_json::json!({"destination": "data", "type": "tmpfs"});
        assert!(parse(relative).is_err());
    }
}
