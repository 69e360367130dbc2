//! Writes that combine with what is there: `kubectl apply` and the three patch types.

use gantry_api::admission;
use gantry_api::kinds::Kind;
use gantry_api::proto::patch_request::Type;
use gantry_api::status::{Reason, Status};
use gantry_api::{decode, merge};
use serde_json::Value;

use super::object::metadata_mut;
use super::rbac::{Attributes, Judge};
use super::registry::Registry;
use super::rules::Part;
use super::service;
use super::write::{WriteOptions, Written, refuse_mirror, set_namespace};

/// Rounds of create and update before an object that comes and goes is given up.
const ROUND_COUNT_MAX: usize = 4;

/// A patch, parsed.
pub(super) struct Patch {
    kind: Type,
    content: Value,
}

impl Patch {
    /// Reads a patch of this type.
    pub(super) fn parse(kind: Type, bytes: &[u8]) -> Result<Patch, Status> {
        if bytes.len() > decode::OBJECT_BYTES_MAX {
            let text = format!(
                "the patch has {} bytes, the limit is {}",
                bytes.len(),
                decode::OBJECT_BYTES_MAX
            );
            return Err(Status::new(Reason::RequestEntityTooLarge, text));
        }
        let content = decode::parse_value(bytes)
            .map_err(|error| Status::bad_request(format!("the patch is no valid JSON: {error}")))?;
        Ok(Patch { kind, content })
    }

    /// The object with the patch applied.
    pub(super) fn applied(&self, live: &Value) -> Result<Value, Status> {
        let result = match self.kind {
            Type::Strategic => merge::strategic(live, &self.content),
            Type::Merge => Ok(merge::json_merge(live, &self.content)),
            Type::Json => merge::json_patch(live, self.content.clone()),
        };
        result.map_err(|error| Status::bad_request(format!("the patch cannot be applied: {error}")))
    }
}

impl Registry {
    /// `kubectl apply`: creates the object, or merges three ways (last applied, live, new). What it comes to
    /// in the end is what the caller needs the right for.
    pub(crate) async fn apply_value(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        mut object: Value,
        options: &WriteOptions,
        judge: &Judge<'_>,
    ) -> Result<Written, Status> {
        // What is recorded as applied is what the user wrote, with the namespace it went to.
        set_namespace(kind, namespace, &mut object)?;
        let json = serde_json::to_vec(&object)
            .map_err(|error| Status::internal(format!("cannot encode the manifest: {error}")))?;
        for _ in 0..ROUND_COUNT_MAX {
            if self.get_entry(kind, namespace, name).is_none() {
                judge.verb(&Attributes::of("create", kind, namespace, ""))?;
                let prepared = admission::apply(kind, None, &json, options.strict)?;
                refuse_mirror(kind, &prepared.object)?;
                judge.content(kind, namespace, None, &prepared.object)?;
                match self.create_prepared(kind, prepared, options.dry_run).await {
                    Err(status) if status.reason == Reason::AlreadyExists => continue,
                    result => return result,
                }
            }
            judge.verb(&Attributes::of("patch", kind, namespace, name))?;
            let warnings = std::sync::Mutex::new(Vec::new());
            let change = |live: &Value| {
                let seen = without_dropped_fields(kind, live, &object);
                let prepared = admission::apply(kind, Some(&seen), &json, options.strict)?;
                judge.content(kind, namespace, Some(live), &prepared.object)?;
                if let Ok(mut warnings) = warnings.lock() {
                    *warnings = prepared.warnings;
                }
                Ok(prepared.object)
            };
            let written = self
                .change_value(kind, namespace, name, Part::Object, options, change)
                .await;
            match written {
                Err(status) if status.reason == Reason::NotFound => {}
                Err(status) => return Err(status),
                Ok(mut written) => {
                    // The second look, at the merged object, repeats what the first one found.
                    let mut all = warnings.into_inner().unwrap_or_default();
                    written.warnings.retain(|warning| !all.contains(warning));
                    all.append(&mut written.warnings);
                    written.warnings = all;
                    return Ok(written);
                }
            }
        }
        let detail = "it is being created and deleted again and again; please try again";
        Err(Status::conflict(kind, name, detail))
    }
}

/// The live object without what its new type cannot have (node ports, …): nobody asked for it, so it
/// must not fail the merged object.
fn without_dropped_fields(kind: &Kind, live: &Value, new: &Value) -> Value {
    let mut seen = live.clone();
    // A version in the manifest is a precondition; the live one is none.
    if new["metadata"].get("resourceVersion").is_none() {
        metadata_mut(&mut seen).remove("resourceVersion");
    }
    if kind.kind == "Service" {
        service::drop_for_type(&mut seen, new);
    }
    seen
}
