//! Names of things on this node: newtypes, so that a pod's UID is never taken for its name.

use std::fmt;
use std::sync::Arc;

/// A pod's UID as the API gives it; never reused. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct PodUid(Arc<str>);

/// The text is no UID that may become part of a path.
#[derive(Debug, thiserror::Error)]
#[error("pod uid {0:?}: want 1 to 64 letters, digits or '-'")]
pub struct InvalidPodUid(String);

impl PodUid {
    /// Takes 1 to 64 ASCII letters, digits or `-`: a UID becomes a file and cgroup name.
    pub fn new(uid: &str) -> Result<Self, InvalidPodUid> {
        let fits = (1..=64).contains(&uid.len())
            && uid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if fits {
            Ok(Self(uid.into()))
        } else {
            Err(InvalidPodUid(uid.into()))
        }
    }

    /// The UID as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One run of one container of a pod: the name and how many runs came before it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ContainerRun {
    /// The pod it belongs to.
    pub pod: PodUid,
    /// `spec.containers[].name`, a DNS label.
    pub name: String,
    /// 0 for the first start, then the restart count.
    pub attempt: u32,
}

impl ContainerRun {
    /// What the API shows as `containerID`: `gantry://<uid>/<name>/<attempt>`.
    pub fn container_id(&self) -> String {
        format!("gantry://{}/{}/{}", self.pod, self.name, self.attempt)
    }
}

impl fmt::Display for ContainerRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.pod, self.name, self.attempt)
    }
}
