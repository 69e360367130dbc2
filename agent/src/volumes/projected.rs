//! projected volumes: several ConfigMaps, Secrets and pod fields in one directory, on tmpfs.

use std::path::PathBuf;

use gantry_api::k8s_openapi::api::core::v1::{
    ProjectedVolumeSource, ServiceAccountTokenProjection, Volume,
};

use super::payload::{self, DEFAULT_MODE, Payload, PayloadFile, Selection};
use super::{Context, VolumeError, atomic, downward_api, tmpfs, token};

pub(super) fn ensure(
    context: &Context<'_>,
    volume: &Volume,
    source: &ProjectedVolumeSource,
) -> Result<PathBuf, VolumeError> {
    let directory = context.directory("projected", volume)?;
    let mut payload = Payload::new();
    for part in source.sources.iter().flatten() {
        let files = if let Some(part) = &part.config_map {
            let selection = Selection {
                plural: "configmaps",
                name: &part.name,
                items: part.items.as_deref(),
                default_mode: source.default_mode,
                optional: part.optional.unwrap_or(false),
            };
            payload::of_object(context, &volume.name, &selection)?
        } else if let Some(part) = &part.secret {
            let selection = Selection {
                plural: "secrets",
                name: &part.name,
                items: part.items.as_deref(),
                default_mode: source.default_mode,
                optional: part.optional.unwrap_or(false),
            };
            payload::of_object(context, &volume.name, &selection)?
        } else if let Some(part) = &part.downward_api {
            let items = part.items.as_deref().unwrap_or_default();
            let mode = payload::mode(source.default_mode, DEFAULT_MODE);
            downward_api::files(context, volume, items, mode)?
        } else if let Some(part) = &part.service_account_token {
            token_file(context, volume, source, part)?
        } else {
            let value = serde_json::to_value(part).unwrap_or_default();
            let kind = value.as_object().and_then(|o| o.keys().next().cloned());
            return Err(VolumeError::Unsupported {
                volume: volume.name.clone(),
                kind: format!("projected.{}", kind.unwrap_or_default()),
            });
        };
        payload.extend(files); // the later source wins, as in Kubernetes
    }
    tmpfs::ensure(&directory, None)?;
    atomic::write(&directory, &payload, context.fs_group)?;
    Ok(directory)
}

/// The user that all containers run as may read its token, or the pod's group; else the mode says.
fn token_file(
    context: &Context<'_>,
    volume: &Volume,
    source: &ProjectedVolumeSource,
    part: &ServiceAccountTokenProjection,
) -> Result<Payload, VolumeError> {
    let path = payload::check_path(&part.path).map_err(|reason| VolumeError::Invalid {
        volume: volume.name.clone(),
        reason,
    })?;
    let token = context.tokens.get(&(volume.name.clone(), path.clone()));
    if token.is_none() && token::is_automatic(&volume.name) {
        return Ok(Payload::new());
    }
    let token = token
        .ok_or_else(|| VolumeError::Waiting(format!("volume {:?}: no token yet", volume.name)))?;
    let mode = if context.fs_group.is_some() || context.fs_user.is_some() {
        0o600
    } else {
        payload::mode(source.default_mode, DEFAULT_MODE)
    };
    let mut file = PayloadFile::new(token.clone().into_bytes(), mode);
    file.user = context.fs_user;
    Ok(Payload::from([(path, file)]))
}
