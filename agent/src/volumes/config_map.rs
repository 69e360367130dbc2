//! configMap volumes: a file per key.

use std::path::PathBuf;

use gantry_api::k8s_openapi::api::core::v1::{ConfigMapVolumeSource, Volume};

use super::payload::{self, Selection};
use super::{Context, VolumeError, atomic};

pub(super) fn ensure(
    context: &Context<'_>,
    volume: &Volume,
    source: &ConfigMapVolumeSource,
) -> Result<PathBuf, VolumeError> {
    let directory = context.directory("configmap", volume)?;
    let selection = Selection {
        plural: "configmaps",
        name: &source.name,
        items: source.items.as_deref(),
        default_mode: source.default_mode,
        optional: source.optional.unwrap_or(false),
    };
    let payload = payload::of_object(context, &volume.name, &selection)?;
    atomic::write(&directory, &payload, context.fs_group)?;
    Ok(directory)
}
