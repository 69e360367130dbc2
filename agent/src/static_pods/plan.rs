//! Which static pods there are now: what the files say, against what was there before. Pure.
//!
//! ```text
//! file appears ─► running ─── file gone, or its content another ──► leaving ─── nothing is left ──► away
//!                    ▲ bad file: stays as it was                       │
//!                    └── a pod of the same name is held back until then ┘
//! ```
//! A pod's UID is a digest of node, path and content, so that an agent that lost its list finds its
//! pods again. A UID that has gone is not given again: the digest then counts on.
//!
//! Invariants: of one namespace and name there is at most one pod that is not away; a pod that is
//! leaving never comes back (a restored file is a new pod); a bad file changes nothing.

use std::path::{Path, PathBuf};

use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// UIDs of pods that have gone, the newest: an older one can be given again without harm.
const GONE_MAX: usize = 1_024;
/// The pod's UID, as the kubelet says it.
const HASH_ANNOTATION: &str = "kubernetes.io/config.hash";

/// One static pod; the list of them is kept on disk.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct StaticPod {
    /// Its manifest.
    pub path: PathBuf,
    /// Of the manifest as it is written, so that a newer agent's defaults restart nothing.
    pub digest: String,
    /// Complete, with its UID.
    pub pod: Pod,
}

impl StaticPod {
    /// It is being stopped.
    pub fn is_leaving(&self) -> bool {
        self.pod.metadata.deletion_timestamp.is_some()
    }

    /// Its UID; "" never happens.
    pub fn uid(&self) -> &str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }

    fn name(&self) -> (Option<&str>, Option<&str>) {
        name_of(&self.pod)
    }

    fn leave(mut self, now: Timestamp) -> Self {
        let spec = self.pod.spec.as_ref();
        let grace = spec.and_then(|spec| spec.termination_grace_period_seconds);
        let metadata = &mut self.pod.metadata;
        metadata.deletion_grace_period_seconds = grace.or(Some(30));
        metadata.deletion_timestamp.get_or_insert(Time(now));
        self
    }
}

fn name_of(pod: &Pod) -> (Option<&str>, Option<&str>) {
    let metadata = &pod.metadata;
    (metadata.namespace.as_deref(), metadata.name.as_deref())
}

/// All static pods, as they are kept on disk.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct List {
    /// Running and leaving.
    pub pods: Vec<StaticPod>,
    /// UIDs that were given and have gone, the newest last.
    pub gone: Vec<String>,
}

/// A pod that a manifest wants, without a UID.
#[derive(Clone, PartialEq, Debug)]
pub struct Wanted {
    /// Of the document.
    pub digest: String,
    /// Defaulted and validated.
    pub pod: Pod,
}

/// A manifest that was read, or why not.
pub type Manifest = (PathBuf, Result<Vec<Wanted>, String>);

/// What is found beside the pods themselves.
pub struct Surroundings<'a> {
    /// The wall clock.
    pub now: Timestamp,
    /// This node's name.
    pub node: &'a str,
    /// Nothing of the pod of this UID is left.
    pub is_away: &'a dyn Fn(&str) -> bool,
    /// The machine's shutdown has ended it, and that is over: it is to run again.
    pub is_due_again: &'a dyn Fn(&str) -> bool,
}

/// The next list, and a sentence for each pod that cannot be.
pub fn plan(
    before: &List,
    manifests: &[Manifest],
    around: &Surroundings<'_>,
) -> (List, Vec<(PathBuf, String)>) {
    let (wanted, refused) = unique(manifests);
    let is_bad = |path: &Path| manifests.iter().any(|(p, pods)| p == path && pods.is_err());
    let mut next = List {
        pods: Vec::new(),
        gone: before.gone.clone(),
    };
    for old in &before.pods {
        let stays = || {
            let same = |(path, pod): &(&PathBuf, &Wanted)| {
                **path == old.path && pod.digest == old.digest && name_of(&pod.pod) == old.name()
            };
            wanted.iter().any(same)
        };
        if old.is_leaving() {
            if (around.is_away)(old.uid()) {
                next.gone.push(old.uid().to_owned());
            } else {
                next.pods.push(old.clone());
            }
        } else if (is_bad(&old.path) || stays()) && !(around.is_due_again)(old.uid()) {
            next.pods.push(old.clone());
        } else {
            next.pods.push(old.clone().leave(around.now));
        }
    }
    let surplus = next.gone.len().saturating_sub(GONE_MAX);
    next.gone.drain(..surplus);
    for (path, pod) in wanted {
        // There already, or held back until the other one is away.
        let is_taken = |other: &StaticPod| other.name() == name_of(&pod.pod);
        if !next.pods.iter().any(is_taken) {
            let new = begin(path, pod, &next, around);
            next.pods.push(new);
        }
    }
    (next, refused)
}

/// A wanted pod and its file.
type InFile<'a> = (&'a PathBuf, &'a Wanted);

/// Wanted pods, one of each name: the first file has it.
fn unique(manifests: &[Manifest]) -> (Vec<InFile<'_>>, Vec<(PathBuf, String)>) {
    let (mut wanted, mut refused) = (Vec::<InFile<'_>>::new(), Vec::new());
    for (path, pods) in manifests {
        for pod in pods.iter().flatten() {
            let is_same = |(_, other): &&InFile<'_>| name_of(&other.pod) == name_of(&pod.pod);
            if let Some((first, _)) = wanted.iter().find(is_same) {
                let name = pod.pod.metadata.name.as_deref().unwrap_or_default();
                let words = format!("pod {name} is in {} already", first.display());
                refused.push((path.clone(), words));
            } else {
                wanted.push((path, pod));
            }
        }
    }
    (wanted, refused)
}

fn begin(path: &Path, wanted: &Wanted, list: &List, around: &Surroundings<'_>) -> StaticPod {
    let given =
        |uid: &String| list.gone.contains(uid) || list.pods.iter().any(|other| other.uid() == uid);
    // Ends: one more number than there are UIDs to differ from is enough.
    let uid = (0_u32..)
        .map(|count| uid(around.node, path, wanted, count))
        .find(|uid| !given(uid))
        .unwrap_or_default();
    let mut pod = wanted.pod.clone();
    let annotations = pod.metadata.annotations.get_or_insert_default();
    annotations.insert(HASH_ANNOTATION.into(), uid.clone());
    pod.metadata.uid = Some(uid);
    pod.metadata.creation_timestamp = Some(Time(around.now));
    StaticPod {
        path: path.to_owned(),
        digest: wanted.digest.clone(),
        pod,
    }
}

/// A UUID of our own making (version 8) from what the pod is.
fn uid(node: &str, path: &Path, wanted: &Wanted, count: u32) -> String {
    let (namespace, name) = name_of(&wanted.pod);
    let mut hash = Sha256::new();
    for part in [
        node.as_bytes(),
        path.as_os_str().as_encoded_bytes(),
        namespace.unwrap_or_default().as_bytes(),
        name.unwrap_or_default().as_bytes(),
        wanted.digest.as_bytes(),
        &count.to_be_bytes(),
    ] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.finalize()[..16]);
    let random = u128::from_be_bytes(bytes);
    let version = (random & !(0xf << 76)) | (8 << 76);
    let id = (version & !(0b11 << 62)) | (0b10 << 62);
    let text = format!("{id:032x}");
    let parts = [
        &text[..8],
        &text[8..12],
        &text[12..16],
        &text[16..20],
        &text[20..],
    ];
    parts.join("-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::cell::RefCell;
    use std::collections::BTreeSet;

    fn pod(name: &str, image: &str) -> Wanted {
        let pod = json!({"metadata": {"name": name, "namespace": "default"},
            "spec": {"containers": [{"name": "c", "image": image}]}});
        Wanted {
            digest: image.to_owned(),
            pod: serde_json::from_value(pod).unwrap(),
        }
    }

    /// A machine on which pods go away when they are told to.
    #[derive(Default)]
    struct Machine {
        away: RefCell<BTreeSet<String>>,
        list: List,
    }

    impl Machine {
        fn turn(&mut self, manifests: &[Manifest]) -> Vec<(PathBuf, String)> {
            let around = Surroundings {
                now: Timestamp::UNIX_EPOCH,
                node: "n",
                is_away: &|uid| self.away.borrow().contains(uid),
                is_due_again: &|_| false,
            };
            let (list, refused) = plan(&self.list, manifests, &around);
            self.list = list;
            refused
        }

        /// Images; of those that leave with a minus.
        fn shown(&self) -> Vec<String> {
            let shown = |s: &StaticPod| {
                let leaving = if s.is_leaving() { "-" } else { "" };
                format!("{leaving}{}", s.digest)
            };
            self.list.pods.iter().map(shown).collect()
        }

        fn all_away(&self) {
            let uids = self.list.pods.iter().map(|pod| pod.uid().to_owned());
            self.away.borrow_mut().extend(uids);
        }
    }

    fn file(name: &str, pods: &[Wanted]) -> Manifest {
        (name.into(), Ok(pods.to_vec()))
    }

    #[test]
    fn a_changed_file_is_a_new_pod_once_the_old_one_is_away() {
        let mut machine = Machine::default();
        let first = [file("a", &[pod("web", "1")])];
        machine.turn(&first);
        machine.turn(&first);
        assert_eq!(machine.shown(), ["1"]);
        let uid = machine.list.pods[0].uid().to_owned();
        assert_eq!(&uid[14..15], "8", "{uid}");
        let changed = [file("a", &[pod("web", "2")])];
        machine.turn(&changed);
        machine.turn(&changed);
        assert_eq!(machine.shown(), ["-1"]);
        machine.all_away();
        machine.turn(&changed);
        assert_eq!(machine.shown(), ["2"]);
        // Restored to what it was: another pod again, under another UID.
        machine.turn(&first);
        machine.all_away();
        machine.turn(&first);
        assert_eq!(machine.shown(), ["1"]);
        assert_ne!(machine.list.pods[0].uid(), uid);
        machine.turn(&[]);
        assert_eq!(machine.shown(), ["-1"]);
        machine.all_away();
        machine.turn(&[]);
        assert!(machine.list.pods.is_empty());
    }

    #[test]
    fn a_lost_list_finds_the_same_pods() {
        let (mut one, mut other) = (Machine::default(), Machine::default());
        let files = [file("a", &[pod("web", "1"), pod("db", "1")])];
        one.turn(&files);
        other.turn(&files);
        assert_eq!(one.list, other.list);
        assert_ne!(one.list.pods[0].uid(), one.list.pods[1].uid());
    }

    #[test]
    fn a_bad_file_changes_nothing_and_a_second_file_cannot_take_a_name() {
        let mut machine = Machine::default();
        machine.turn(&[file("a", &[pod("web", "1")]), file("b", &[pod("db", "2")])]);
        let bad = ("a".into(), Err("no YAML".into()));
        let refused = machine.turn(&[
            bad,
            file("b", &[pod("db", "2")]),
            file("c", &[pod("db", "3")]),
        ]);
        assert_eq!(machine.shown(), ["1", "2"]);
        assert_eq!(refused.len(), 1);
        assert!(refused[0].1.contains("is in b already"), "{refused:?}");
    }

    proptest! {
        #[test]
        fn there_is_never_a_second_pod_of_a_name_or_uid(
            turns in proptest::collection::vec((0_u8..3, 0_u8..3, any::<bool>(), any::<bool>()), 1..30)
        ) {
            let mut machine = Machine::default();
            let mut given = BTreeSet::new();
            for (a, b, bad, away) in turns {
                if away {
                    machine.all_away();
                }
                let before: BTreeSet<String> =
                    machine.list.pods.iter().map(|p| p.uid().to_owned()).collect();
                let mut manifests = vec![file("b", &[pod("x", &b.to_string())])];
                manifests.push(match bad {
                    true => ("a".into(), Err("bad".into())),
                    false => file("a", &[pod("y", &a.to_string()), pod("x", "9")]),
                });
                machine.turn(&manifests);
                let names: BTreeSet<_> = machine.list.pods.iter().map(|s| s.name()).collect();
                prop_assert_eq!(names.len(), machine.list.pods.len());
                for pod in &machine.list.pods {
                    let uid = pod.uid().to_owned();
                    // A new pod has a UID that was never given before.
                    prop_assert!(before.contains(&uid) || given.insert(uid));
                }
            }
        }
    }
}
