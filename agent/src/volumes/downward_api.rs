//! downwardAPI volumes: the pod's own fields as files.

use std::path::PathBuf;

use gantry_api::k8s_openapi::api::core::v1::{
    Container, DownwardAPIVolumeFile, DownwardAPIVolumeSource, Volume,
};

use super::payload::{self, DEFAULT_MODE, Payload, PayloadFile};
use super::{Context, VolumeError, atomic, field};

pub(super) fn ensure(
    context: &Context<'_>,
    volume: &Volume,
    source: &DownwardAPIVolumeSource,
) -> Result<PathBuf, VolumeError> {
    let directory = context.directory("downward-api", volume)?;
    let items = source.items.as_deref().unwrap_or_default();
    let payload = files(
        context,
        volume,
        items,
        payload::mode(source.default_mode, DEFAULT_MODE),
    )?;
    atomic::write(&directory, &payload, context.fs_group)?;
    Ok(directory)
}

/// The files of a list of items; also used by projected volumes.
pub(super) fn files(
    context: &Context<'_>,
    volume: &Volume,
    items: &[DownwardAPIVolumeFile],
    default_mode: u32,
) -> Result<Payload, VolumeError> {
    let invalid = |reason: String| VolumeError::Invalid {
        volume: volume.name.clone(),
        reason,
    };
    let mut payload = Payload::new();
    for item in items {
        let path = payload::check_path(&item.path).map_err(&invalid)?;
        let text = match (&item.field_ref, &item.resource_field_ref) {
            (Some(reference), _) => {
                field::of_metadata(context.pod, &reference.field_path).map_err(&invalid)?
            }
            (None, Some(reference)) => {
                let name = reference.container_name.as_deref().unwrap_or_default();
                let container = container(context, name)
                    .ok_or_else(|| invalid(format!("no container {name:?} in the pod")))?;
                let divisor = reference.divisor.as_ref().map(|d| d.0.as_str());
                field::of_resource(container, &reference.resource, divisor).map_err(&invalid)?
            }
            (None, None) => return Err(invalid(format!("item {path:?} names no field"))),
        };
        let mode = payload::mode(item.mode, default_mode);
        payload.insert(path, PayloadFile::new(text.into_bytes(), mode));
    }
    Ok(payload)
}

fn container<'a>(context: &Context<'a>, name: &str) -> Option<&'a Container> {
    let spec = context.pod.spec.as_ref()?;
    let all = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten());
    all.into_iter().find(|c| c.name == name)
}
