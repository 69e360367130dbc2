//! secret volumes: a file per key, on tmpfs so that no disk ever holds them.

use std::path::PathBuf;

use gantry_api::k8s_openapi::api::core::v1::{SecretVolumeSource, Volume};

use super::payload::{self, Selection};
use super::{Context, VolumeError, atomic, tmpfs};

pub(super) fn ensure(
    context: &Context<'_>,
    volume: &Volume,
    source: &SecretVolumeSource,
) -> Result<PathBuf, VolumeError> {
    let directory = context.directory("secret", volume)?;
    let name = source.secret_name.as_deref().unwrap_or_default();
    let selection = Selection {
        plural: "secrets",
        name,
        items: source.items.as_deref(),
        default_mode: source.default_mode,
        optional: source.optional.unwrap_or(false),
    };
    let payload = payload::of_object(context, &volume.name, &selection)?;
    tmpfs::ensure(&directory, None)?;
    atomic::write(&directory, &payload, context.fs_group)?;
    Ok(directory)
}
