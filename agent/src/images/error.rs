//! What can go wrong with an image, with the reason that Kubernetes shows for it.

use std::io;

use super::extract::ExtractError;
use super::reference::{Digest, InvalidName};

/// Why an image is not there. [`ImageError::reason`] is the container's waiting reason.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The name does not parse: no retry helps.
    #[error(transparent)]
    InvalidName(#[from] InvalidName),
    /// imagePullPolicy Never, and the image is not here.
    #[error(
        "image {reference:?} is not present with pull policy Never; import it with: \
         gantry-agent image import FILE"
    )]
    NeverPull {
        /// As the pod names it.
        reference: String,
    },
    /// Getting it from its registry failed: retried with back-off by the caller.
    #[error("failed to pull image {reference:?}: {source}")]
    Pull {
        /// As the pod names it.
        reference: String,
        /// What failed.
        source: Box<ImageError>,
    },
    /// The image is here but its record or its files cannot be read.
    #[error("failed to inspect image {reference:?}: {source}")]
    Inspect {
        /// As the pod names it.
        reference: String,
        /// What failed.
        source: Box<ImageError>,
    },
    /// The registry answered with an error.
    #[error("{0}")]
    Registry(String),
    /// Content is not what its digest, size or format says. Nothing of it was kept.
    #[error("{origin}: {what}: {reason}")]
    Corrupt {
        /// File or registry it came from.
        origin: String,
        /// `layer sha256:...`, `manifest.json`.
        what: String,
        /// What does not match.
        reason: String,
    },
    /// A layer holds what must not be unpacked. Nothing of it was kept.
    #[error("{origin}: layer {layer}: {source}")]
    Layer {
        /// File or registry it came from.
        origin: String,
        /// The layer's diff ID.
        layer: Digest,
        /// The entry and what is wrong with it.
        source: ExtractError,
    },
    /// The file is no image archive.
    #[error("{path}: {reason}")]
    Archive {
        /// The file or directory.
        path: String,
        /// What is missing.
        reason: String,
    },
    /// The root file system could not be mounted.
    #[error("mount overlay on {path}: {reason}")]
    Overlay {
        /// The mount point.
        path: String,
        /// The kernel's answer and what to do.
        reason: String,
    },
    /// What is to come does not fit.
    #[error(
        "{size_bytes} bytes are to come and the disk of the images has {available_bytes} left: remove images with `prune`, or make room on it"
    )]
    DiskFull {
        /// Bytes to come.
        size_bytes: u64,
        /// Bytes free.
        available_bytes: u64,
    },
    /// A system call failed.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, to which path.
        context: String,
        /// The error of the call.
        source: io::Error,
    },
}

impl ImageError {
    /// The reason in `status.containerStatuses[].state.waiting`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InvalidName(_) => "InvalidImageName",
            Self::NeverPull { .. } => "ErrImageNeverPull",
            Self::Inspect { .. } => "ImageInspectError",
            Self::Overlay { .. } => "CreateContainerError",
            _ => "ErrImagePull",
        }
    }

    /// Every registry or mirror that was asked has failed; one alone speaks for itself.
    pub(super) fn of_all(mut failures: Vec<(String, Self)>) -> Self {
        if failures.len() == 1
            && let Some((_, only)) = failures.pop()
        {
            return only;
        }
        let words: Vec<String> = failures
            .iter()
            .map(|(who, e)| format!("{who}: {e}"))
            .collect();
        Self::Registry(words.join("; "))
    }

    /// An error of a call with what was being done.
    pub(super) fn io(context: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let context = context.into();
        move |source| Self::Io { context, source }
    }
}
