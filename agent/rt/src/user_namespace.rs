//! Commands in a container with a user namespace: libcontainer's exec joins all namespaces but that
//! one, and would leave the command with the host's ids.
//!
//! ```text
//! process document ─► take: who, which rights ─► document of the host's root, nothing dropped ─► libcontainer: the other namespaces
//!                                                          executor ─► enter: user namespace ─► groups, gid, uid ─► (seccomp, capabilities)
//! ```
//! Invariant: between libcontainer and [`Entry::enter`] nothing of the container runs; what `take`
//! leaves out of the document, `enter` and the executor do. Nobody in the container can look into
//! the process meanwhile: its credentials are those of a namespace above theirs.

use std::fs::{self, File};
use std::path::Path;

use anyhow::Context;
use caps::{CapSet, Capability};
use libcontainer::oci_spec::runtime::{LinuxNamespaceType, Process, Spec, User};
use nix::sched::{CloneFlags, setns};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

/// What is left to be done inside the user namespace.
pub(crate) struct Entry {
    namespace: File,
    uid: u32,
    gid: u32,
    groups: Vec<Gid>,
    no_new_privileges: bool,
    /// Of the document; none: the executor has them from elsewhere.
    pub(crate) capabilities: Option<u64>,
}

impl Entry {
    /// Takes out of the document at `process` what must be done inside; none: there is no user
    /// namespace of the container's own.
    pub(crate) fn take(spec: &Spec, process: &Path) -> anyhow::Result<Option<Self>> {
        let Some(path) = pinned(spec) else {
            return Ok(None);
        };
        let namespace =
            File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let text =
            fs::read(process).with_context(|| format!("cannot read {}", process.display()))?;
        let mut document: Process = serde_json::from_slice(&text)
            .with_context(|| format!("{} is no OCI process", process.display()))?;
        let user = document.user().clone();
        let bounding = document
            .capabilities()
            .as_ref()
            .map(|c| c.bounding().clone().unwrap_or_default());
        let capabilities =
            bounding.map(|names| names.iter().map(mask).sum::<anyhow::Result<u64>>());
        let entry = Self {
            namespace,
            uid: user.uid(),
            gid: user.gid(),
            groups: user
                .additional_gids()
                .iter()
                .flatten()
                .map(|gid| Gid::from_raw(*gid))
                .collect(),
            no_new_privileges: document.no_new_privileges().unwrap_or(false),
            capabilities: capabilities.transpose()?,
        };
        document.set_user(User::default());
        document.set_capabilities(None);
        document.set_no_new_privileges(None);
        fs::write(process, serde_json::to_vec(&document)?)
            .with_context(|| format!("cannot rewrite {}", process.display()))?;
        Ok(Some(entry))
    }

    /// From the host's root to the container's user, with every capability over the namespace: the
    /// executor drops them after it has loaded the filters.
    pub(crate) fn enter(&self) -> Result<(), String> {
        let failed = |what: &str, why: &dyn std::fmt::Display| format!("{what}: {why}");
        setns(&self.namespace, CloneFlags::CLONE_NEWUSER)
            .map_err(|e| failed("join the user namespace", &e))?;
        nix::sys::prctl::set_keepcaps(true).map_err(|e| failed("keep capabilities", &e))?;
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        setgroups(&self.groups).map_err(|e| failed("set groups", &e))?;
        setresgid(gid, gid, gid).map_err(|e| failed("set the group", &e))?;
        setresuid(uid, uid, uid).map_err(|e| failed("set the user", &e))?;
        // Leaving uid 0 has cleared the effective set.
        caps::read(None, CapSet::Permitted)
            .and_then(|all| caps::set(None, CapSet::Effective, &all))
            .map_err(|e| failed("raise capabilities", &e))?;
        if self.no_new_privileges {
            nix::sys::prctl::set_no_new_privs().map_err(|e| failed("set no_new_privs", &e))?;
        }
        Ok(())
    }
}

/// Where the container's user namespace is pinned.
fn pinned(spec: &Spec) -> Option<&Path> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    let user = namespaces
        .iter()
        .find(|n| n.typ() == LinuxNamespaceType::User)?;
    user.path().as_deref()
}

fn mask(name: &libcontainer::oci_spec::runtime::Capability) -> anyhow::Result<u64> {
    let name = format!("CAP_{name}");
    let known: Capability = name
        .parse()
        .map_err(|_| anyhow::anyhow!("unknown capability {name}"))?;
    Ok(known.bitmask())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_document_loses_what_must_wait_and_only_with_a_user_namespace() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("process.json");
        let document = json!({
            "user": { "uid": 7, "gid": 8, "additionalGids": [9] }, "args": ["x"], "cwd": "/",
            "noNewPrivileges": true,
            "capabilities": { "bounding": ["CAP_CHOWN", "CAP_KILL"] },
        });
        fs::write(&file, document.to_string()).unwrap();
        let spec = |namespaces: serde_json::Value| -> Spec {
            let linux = json!({ "namespaces": namespaces });
            let text = json!({ "ociVersion": "1.0.2", "linux": linux }).to_string();
            serde_json::from_str(&text).unwrap()
        };
        let host = spec(json!([{ "type": "mount" }]));
        assert!(Entry::take(&host, &file).unwrap().is_none());
        assert_eq!(fs::read_to_string(&file).unwrap(), document.to_string());

        let own = spec(json!([{ "type": "user", "path": "/proc/self/ns/user" }]));
        let entry = Entry::take(&own, &file).unwrap().unwrap();
        assert_eq!((entry.uid, entry.gid, entry.groups.len()), (7, 8, 1));
        assert!(entry.no_new_privileges);
        assert_eq!(entry.capabilities, Some(0b10_0001));
        let left: Process = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert_eq!((left.user().uid(), left.user().gid()), (0, 0));
        assert!(left.capabilities().is_none() && left.no_new_privileges().is_none());
    }
}
