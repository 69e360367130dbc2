//! The labels by which a namespace says what its pods may do, and what may stand in them.
//!
//! Source: Kubernetes `k8s.io/pod-security-admission/api`.

use std::collections::BTreeMap;
use std::fmt;

use crate::field::{FieldError, Path};

/// What all labels begin with.
const PREFIX: &str = "pod-security.kubernetes.io/";
/// The minor version that stands for the newest definition.
pub const MINOR_LATEST: u32 = u32::MAX;

/// How much pods may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Everything.
    Privileged,
    /// Nothing by which a pod is known to leave its container.
    Baseline,
    /// As baseline, and hardened.
    Restricted,
}

impl Level {
    /// The level of this name.
    #[must_use]
    pub fn parse(text: &str) -> Option<Level> {
        match text {
            "privileged" => Some(Level::Privileged),
            "baseline" => Some(Level::Baseline),
            "restricted" => Some(Level::Restricted),
            _ => None,
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Privileged => "privileged",
            Level::Baseline => "baseline",
            Level::Restricted => "restricted",
        })
    }
}

/// What happens to a pod that does more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It is refused.
    Enforce,
    /// It is logged.
    Audit,
    /// Its author is told.
    Warn,
}

impl Mode {
    fn word(self) -> &'static str {
        match self {
            Mode::Enforce => "enforce",
            Mode::Audit => "audit",
            Mode::Warn => "warn",
        }
    }

    /// The label with the level.
    #[must_use]
    pub fn label(self) -> String {
        format!("{PREFIX}{}", self.word())
    }

    /// The label with the version.
    #[must_use]
    pub fn version_label(self) -> String {
        format!("{PREFIX}{}-version", self.word())
    }
}

/// The minor version in `v1.N`; [`MINOR_LATEST`] for `latest`.
#[must_use]
pub fn version(text: &str) -> Option<u32> {
    if text == "latest" {
        return Some(MINOR_LATEST);
    }
    let minor = text.strip_prefix("v1.")?;
    let is_plain = minor == "0" || !minor.starts_with(['0', '+']);
    minor.parse().ok().filter(|_| is_plain)
}

/// What of a namespace's labels cannot be read.
#[must_use]
pub fn validate(labels: Option<&BTreeMap<String, String>>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let path = Path::new("metadata").child("labels");
    let Some(labels) = labels else { return errors };
    for mode in [Mode::Enforce, Mode::Audit, Mode::Warn] {
        for (label, is_fine, detail) in [
            (
                mode.label(),
                (|text| Level::parse(text).is_some()) as fn(&str) -> bool,
                "must be one of privileged, baseline, restricted",
            ),
            (
                mode.version_label(),
                |text| version(text).is_some(),
                "must be \"latest\" or \"v1.x\"",
            ),
        ] {
            if let Some(text) = labels.get(&label).filter(|text| !is_fine(text)) {
                errors.push(FieldError::invalid(
                    &path.key(&label),
                    text.as_str(),
                    detail,
                ));
            }
        }
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_versions_are_read_exactly() {
        assert_eq!(version("latest"), Some(MINOR_LATEST));
        assert_eq!(version("v1.24"), Some(24));
        for text in [
            "",
            "1.24",
            "v1.",
            "v2.1",
            "v1.024",
            "v1.+4",
            "v1.-1",
            "v1.99999999999",
        ] {
            assert_eq!(version(text), None, "{text}");
        }
        let labels = BTreeMap::from([
            (Mode::Enforce.label(), "strict".to_owned()),
            (Mode::Warn.version_label(), "v1".to_owned()),
            (Mode::Audit.label(), "baseline".to_owned()),
        ]);
        let errors: Vec<String> = validate(Some(&labels))
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            errors,
            [
                "metadata.labels[pod-security.kubernetes.io/enforce]: Invalid value: \"strict\": must be \
                 one of privileged, baseline, restricted",
                "metadata.labels[pod-security.kubernetes.io/warn-version]: Invalid value: \"v1\": must \
                 be \"latest\" or \"v1.x\"",
            ]
        );
    }
}
