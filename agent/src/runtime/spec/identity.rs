//! Who a container runs as: security contexts, the image's `USER`, the image's passwd and group.

use std::path::Path;

use gantry_api::k8s_openapi::api::core::v1::{Container, Pod, PodSecurityContext};
use oci_spec::image::ImageConfiguration;

use super::{SpecError, mounts};

/// Longest passwd or group file that is looked at.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Supplementary groups a process can have on Linux.
const GROUP_COUNT_MAX: usize = 65_536;

/// A user as the kernel knows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary groups, ascending: the image's, the pod's, fsGroup.
    pub groups: Vec<u32>,
    /// `HOME`.
    pub home: String,
}

/// Reads `/etc/passwd` and `/etc/group` of the image (never through a link that leaves it) and
/// decides.
///
/// # Errors
/// [`SpecError::Refused`] in kubelet's words when `runAsNonRoot` forbids the user, or in
/// containerd's when the image names a user it does not have.
pub fn resolve(
    pod: &Pod,
    container: &Container,
    image: &ImageConfiguration,
    rootfs: &Path,
) -> Result<Identity, SpecError> {
    let read = |path: &str| {
        mounts::read_in_root(rootfs, path, FILE_BYTES_MAX).map_err(|source| SpecError::Io {
            context: format!("cannot read {path} of the image in {}", rootfs.display()),
            source,
        })
    };
    let passwd = read("etc/passwd")?.unwrap_or_default();
    let group = read("etc/group")?.unwrap_or_default();
    decide(pod, container, image, &passwd, &group)
}

/// The pure part of [`resolve`].
pub fn decide(
    pod: &Pod,
    container: &Container,
    image: &ImageConfiguration,
    passwd: &str,
    group: &str,
) -> Result<Identity, SpecError> {
    let own = container.security_context.clone().unwrap_or_default();
    let pods = pod
        .spec
        .as_ref()
        .and_then(|s| s.security_context.clone())
        .unwrap_or_default();
    let image_user = image
        .config()
        .as_ref()
        .and_then(|c| c.user().clone())
        .unwrap_or_default();
    let (image_name, image_group) = match image_user.split_once(':') {
        Some((user, group)) => (user.to_owned(), Some(group.to_owned())),
        None => (image_user.clone(), None),
    };
    let run_as_user = own.run_as_user.or(pods.run_as_user);
    let user = match run_as_user {
        Some(uid) => User::of_uid(id("runAsUser", uid)?, passwd),
        None => User::of_text(&image_name, passwd)?,
    };
    check_non_root(pod, container, run_as_user, &user, &image_name)?;
    let run_as_group = own.run_as_group.or(pods.run_as_group);
    let gid = match (run_as_group, image_group) {
        (Some(gid), _) => id("runAsGroup", gid)?,
        // The image's group belongs to the image's user only.
        (None, Some(text)) if run_as_user.is_none() && !text.is_empty() => group_id(&text, group)?,
        _ => user.gid,
    };
    Ok(Identity {
        uid: user.uid,
        gid,
        groups: groups(&pods, &user, group)?,
        home: user.home,
    })
}

fn id(field: &str, value: i64) -> Result<u32, SpecError> {
    // 2^32 - 1 means "leave as it is" to the kernel.
    u32::try_from(value)
        .ok()
        .filter(|&v| v != u32::MAX)
        .ok_or_else(|| {
            SpecError::invalid(
                format!("securityContext.{field}"),
                format!("{value} is no id"),
            )
        })
}

/// Asks for the user the container will really have: a name is looked up in the image's passwd,
/// where kubelet, which cannot look, refuses it; and a number that passwd maps to root is root.
/// Source: kubelet `pkg/kubelet/kuberuntime/security_context.go`, verifyRunAsNonRoot.
fn check_non_root(
    pod: &Pod,
    container: &Container,
    run_as_user: Option<i64>,
    user: &User,
    image_name: &str,
) -> Result<(), SpecError> {
    let own = container.security_context.as_ref();
    let pods = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let asked = own
        .and_then(|c| c.run_as_non_root)
        .or(pods.and_then(|c| c.run_as_non_root));
    if asked != Some(true) || user.uid != 0 {
        return Ok(());
    }
    let why = match (run_as_user, image_name) {
        (Some(_), _) => "container's runAsUser breaks non-root policy".to_owned(),
        (None, "" | "0" | "root") => {
            "container has runAsNonRoot and image will run as root".to_owned()
        }
        (None, name) => format!(
            "container has runAsNonRoot and image will run as root (its user {name} has uid 0)"
        ),
    };
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    Err(SpecError::Refused(format!(
        "{why} (pod: \"{name}_{namespace}({uid})\", container: {})",
        container.name
    )))
}

struct User {
    name: Option<String>,
    uid: u32,
    gid: u32,
    home: String,
}

impl User {
    /// A uid need not be in the image: it then has group 0 and home `/`.
    fn of_uid(uid: u32, passwd: &str) -> Self {
        Self::find(passwd, |_, found| found == uid).unwrap_or_else(|| Self {
            name: None,
            uid,
            gid: 0,
            home: if uid == 0 { "/root".into() } else { "/".into() },
        })
    }

    fn of_text(text: &str, passwd: &str) -> Result<Self, SpecError> {
        if text.is_empty() {
            return Ok(Self::of_uid(0, passwd));
        }
        // A name wins over a number of the same spelling, as in Docker.
        if let Some(user) = Self::find(passwd, |name, _| name == text) {
            return Ok(user);
        }
        match text.parse::<u32>() {
            Ok(uid) => Ok(Self::of_uid(id("runAsUser", i64::from(uid))?, passwd)),
            Err(_) => Err(SpecError::Refused(format!(
                "unable to find user {text}: no matching entries in passwd file"
            ))),
        }
    }

    fn find(passwd: &str, wanted: impl Fn(&str, u32) -> bool) -> Option<Self> {
        passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            let home = fields.nth(1).filter(|h| !h.is_empty()).unwrap_or("/");
            wanted(name, uid).then(|| Self {
                name: Some(name.to_owned()),
                uid,
                gid,
                home: home.to_owned(),
            })
        })
    }
}

fn group_id(text: &str, group: &str) -> Result<u32, SpecError> {
    let named = group.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == text)
            .then(|| fields.nth(1)?.parse().ok())
            .flatten()
    });
    named.or_else(|| text.parse().ok()).ok_or_else(|| {
        SpecError::Refused(format!(
            "unable to find group {text}: no matching entries in group file"
        ))
    })
}

fn groups(pods: &PodSecurityContext, user: &User, group: &str) -> Result<Vec<u32>, SpecError> {
    let mut groups = Vec::new();
    // `Strict` means: only what the pod says.
    if pods.supplemental_groups_policy.as_deref() != Some("Strict")
        && let Some(name) = &user.name
    {
        for line in group.lines() {
            let mut fields = line.split(':');
            let gid = fields.nth(2).and_then(|g| g.parse::<u32>().ok());
            let members = fields.next().unwrap_or_default();
            if let Some(gid) = gid
                && members.split(',').any(|m| m.trim() == name)
            {
                groups.push(gid);
            }
        }
    }
    for value in pods.supplemental_groups.iter().flatten() {
        groups.push(id("supplementalGroups", *value)?);
    }
    if let Some(value) = pods.fs_group {
        groups.push(id("fsGroup", value)?);
    }
    groups.sort_unstable();
    groups.dedup();
    groups.truncate(GROUP_COUNT_MAX);
    Ok(groups)
}
