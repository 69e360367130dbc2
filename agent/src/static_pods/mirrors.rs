//! Mirror pods: how the API shows the static pods of this node.
//!
//! ```text
//!  list of static pods ─► asked for (all of them, again until the view has them) ─► control plane
//!  view's mirror pods ──► status of the static pod goes up under the mirror's UID
//!                    └──► being deleted: let go at once, and asked for again
//! ```
//! Deleting a mirror stops nothing: only the file ends a static pod.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::validation::MIRROR_ANNOTATION;
use tracing::warn;

use super::plan::List;
use crate::feed::Reporter;
use crate::ids::PodUid;
use crate::view::View;

/// Between two requests for the same mirror pods: a namespace may not exist yet.
const AGAIN: Duration = Duration::from_secs(5);
/// All mirror pods of one request; the stream takes no larger message.
const REQUEST_BYTES_MAX: usize = 3 << 20;

/// Which static pod is behind a mirror pod.
#[derive(Clone, Debug, Default)]
pub struct Mirrors(Arc<Mutex<BTreeMap<PodUid, PodUid>>>);

impl Mirrors {
    /// The UID that this node knows the pod by.
    pub fn behind(&self, pod: PodUid) -> PodUid {
        let map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        map.get(&pod).cloned().unwrap_or(pod)
    }

    /// The UID that the API knows the pod by.
    pub fn shown(&self, pod: &str) -> Option<PodUid> {
        let map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = map.iter().find(|(_, own)| own.as_str() == pod);
        found.map(|(mirror, _)| mirror.clone())
    }
}

/// The UID of the static pod that this object only shows.
pub(super) fn mirror_of(pod: &Pod) -> Option<&str> {
    let annotations = pod.metadata.annotations.as_ref()?;
    annotations.get(MIRROR_ANNOTATION).map(String::as_str)
}

/// What was asked for last.
pub(super) struct Shown {
    mirrors: Mirrors,
    asked: Vec<Bytes>,
    at: Option<Instant>,
}

impl Shown {
    pub(super) fn new(mirrors: Mirrors) -> Self {
        Self {
            mirrors,
            asked: Vec::new(),
            at: None,
        }
    }

    /// Tells the control plane which static pods there are, and lets deleted mirrors go. True when
    /// the view shows exactly those of the list.
    pub(super) fn update(&mut self, list: &List, view: &View, reporter: &Reporter) -> bool {
        let mirrors: Vec<_> = view
            .pods
            .iter()
            .filter_map(|(uid, pod)| Some((mirror_of(pod)?, uid, pod)))
            .collect();
        for (_, uid, pod) in &mirrors {
            if pod.metadata.deletion_timestamp.is_some() {
                let part = |text: &Option<String>| text.clone().unwrap_or_default();
                let (namespace, name) = (part(&pod.metadata.namespace), part(&pod.metadata.name));
                let status = pod.status.clone().unwrap_or_default();
                reporter.release_mirror(uid, &namespace, &name, status);
            }
        }
        let (wanted, names) = wanted(list, &mirrors);
        let is_complete = names.iter().all(|(_, mirror)| mirror.is_some());
        let is_complete = is_complete && mirrors.len() == names.len();
        let behind = names.iter();
        let behind = behind.filter_map(|(own, mirror)| Some((mirror.clone()?, own.clone())));
        *self
            .mirrors
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = behind.collect();
        reporter.static_pods(names);
        let is_recent = self.at.is_some_and(|at| at.elapsed() < AGAIN);
        if !is_complete && (!is_recent || self.asked != wanted) {
            reporter.mirror(wanted.clone());
            (self.asked, self.at) = (wanted, Some(Instant::now()));
        }
        is_complete
    }
}

/// What the API is to show, and each static pod with the mirror that it has.
fn wanted(
    list: &List,
    mirrors: &[(&str, &PodUid, &Arc<Pod>)],
) -> (Vec<Bytes>, Vec<(PodUid, Option<PodUid>)>) {
    let (mut wanted, mut names, mut size) = (Vec::new(), Vec::new(), 0);
    for entry in list.pods.iter().filter(|entry| !entry.is_leaving()) {
        let Ok(own) = PodUid::new(entry.uid()) else {
            continue;
        };
        let mut shown = entry.pod.clone();
        let annotations = shown.metadata.annotations.get_or_insert_default();
        annotations.insert(MIRROR_ANNOTATION.into(), entry.uid().into());
        let Ok(json) = serde_json::to_vec(&shown) else {
            continue;
        };
        size += json.len();
        if size > REQUEST_BYTES_MAX {
            let name = entry.pod.metadata.name.as_deref().unwrap_or_default();
            warn!(
                name,
                "static pods of more than {REQUEST_BYTES_MAX} bytes: not shown"
            );
            break;
        }
        wanted.push(Bytes::from(json));
        let of_this = |(of, _, pod): &&(&str, &PodUid, &Arc<Pod>)| {
            *of == entry.uid() && pod.metadata.deletion_timestamp.is_none()
        };
        let mirror = mirrors.iter().find(of_this);
        names.push((own, mirror.map(|(_, uid, _)| (*uid).clone())));
    }
    (wanted, names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::static_pods::plan::StaticPod;
    use serde_json::json;

    #[test]
    fn a_mirror_that_is_being_deleted_counts_for_nothing() {
        let pod = |more: serde_json::Value| -> Pod {
            let mut metadata = json!({"name": "a", "namespace": "default", "uid": "s"});
            metadata
                .as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            serde_json::from_value(json!({"metadata": metadata})).unwrap()
        };
        let list = List {
            pods: vec![StaticPod {
                path: "/a".into(),
                digest: String::new(),
                pod: pod(json!({})),
            }],
            gone: Vec::new(),
        };
        let shown = json!({"annotations": {MIRROR_ANNOTATION: "s"}});
        let mirror = Arc::new(pod(shown));
        let mut going = Pod::clone(&mirror);
        going.metadata.deletion_timestamp =
            serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        let going = Arc::new(going);
        let (one, two) = (PodUid::new("m1").unwrap(), PodUid::new("m2").unwrap());
        let found = |mirrors: &[(&str, &PodUid, &Arc<Pod>)]| wanted(&list, mirrors).1[0].1.clone();
        assert_eq!(found(&[]), None);
        assert_eq!(found(&[("s", &one, &going)]), None);
        assert_eq!(found(&[("other", &one, &mirror)]), None);
        assert_eq!(
            found(&[("s", &one, &going), ("s", &two, &mirror)]),
            Some(two.clone())
        );
        let sent: Pod = serde_json::from_slice(&wanted(&list, &[]).0[0]).unwrap();
        assert_eq!(mirror_of(&sent), Some("s"));
    }
}
