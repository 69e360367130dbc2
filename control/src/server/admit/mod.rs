//! Admission that depends on the namespace that an object is for: what it may use, and what it may do.
//!
//! ```text
//!  fields, defaults, rules ─► account, priority, class ─► limits ─► quotas, charged in the transaction
//!     (gantry-api)             (pod_admission.rs)     (limit_range.rs)  that writes (charge.rs)
//! ```
//! Each step is a pure decision over the object and what the namespace says; this file only looks up and
//! carries over. What a namespace does not have costs one look into the store's memory.
//!
//! Invariants: a refusal names what refuses, in Kubernetes' words; a mirror pod runs already and is refused
//! nothing; no set of concurrent writes takes more than a quota has.

mod charge;
mod limit_range;
pub(crate) mod quota;

pub(super) use charge::Gates;

use gantry_api::k8s_openapi::api::core::v1::{LimitRange, PersistentVolumeClaim, Pod};
use gantry_api::kinds::Kind;
use gantry_api::status::Status;
use gantry_api::validation::MIRROR_ANNOTATION;
use serde_json::Value;

use super::object::metadata_text;
use super::registry::{Registry, Resource};

/// The object as its type.
fn typed<K: Resource>(object: &Value) -> Result<K, Status> {
    serde_json::from_value(object.clone())
        .map_err(|error| Status::internal(format!("cannot read back a {}: {error}", K::KIND)))
}

/// It stands for a pod that a node runs anyway.
fn is_mirror(object: &Value) -> bool {
    object["metadata"]["annotations"]
        .get(MIRROR_ANNOTATION)
        .is_some()
}

impl Registry {
    /// Objects of a kind in the namespace; nothing is parsed where there are none.
    fn of_namespace<K: Resource>(&self, namespace: &str) -> Result<Vec<K>, Status> {
        Ok(self.list::<K>(Some(namespace))?.1)
    }

    /// A new object: completed and judged by what its namespace says. Returns what its author should know.
    ///
    /// # Errors
    /// Forbidden, with what refuses and why.
    pub(super) fn admit_by_namespace(
        &self,
        kind: &'static Kind,
        object: &mut Value,
    ) -> Result<Vec<String>, Status> {
        if !kind.namespaced || is_mirror(object) {
            return Ok(Vec::new());
        }
        let namespace = metadata_text(object, "namespace").to_owned();
        self.limit(kind, &namespace, None, object)?;
        Ok(Vec::new())
    }

    /// A changed object, judged by what its namespace says. Returns what its author should know.
    ///
    /// # Errors
    /// As [`Registry::admit_by_namespace`].
    pub(super) fn admit_change(
        &self,
        kind: &'static Kind,
        old: &Value,
        new: &mut Value,
    ) -> Result<Vec<String>, Status> {
        if !kind.namespaced || is_mirror(old) {
            return Ok(Vec::new());
        }
        let namespace = metadata_text(old, "namespace").to_owned();
        self.limit(kind, &namespace, Some(old), new)?;
        Ok(Vec::new())
    }

    /// LimitRanges: a new pod gets what it leaves out; what breaks a limit is refused. Of a change only
    /// other resources are judged: a limit does not hold for what was there before it.
    fn limit(
        &self,
        kind: &'static Kind,
        namespace: &str,
        old: Option<&Value>,
        object: &mut Value,
    ) -> Result<(), Status> {
        let is_pod = match kind.kind {
            "Pod" => true,
            "PersistentVolumeClaim" => false,
            _ => return Ok(()),
        };
        let ranges: Vec<LimitRange> = self.of_namespace(namespace)?;
        if ranges.is_empty()
            || old.is_some_and(|old| limit_range::same_resources(is_pod, old, object))
        {
            return Ok(());
        }
        if is_pod && old.is_none() {
            for range in &ranges {
                limit_range::set_defaults(object, range);
            }
        }
        for range in &ranges {
            let errors = if is_pod {
                limit_range::check_pod(&typed::<Pod>(object)?, range)
            } else {
                limit_range::check_claim(&typed::<PersistentVolumeClaim>(object)?, range)
            };
            if !errors.is_empty() {
                let name = metadata_text(object, "name");
                return Err(Status::forbidden(kind, name, &limit_range::joined(&errors)));
            }
        }
        Ok(())
    }
}
