//! A pod's annotations about its network: how many bits per second it may be sent, and may send.
//!
//! Source: Kubernetes' `pkg/util/bandwidth`, with its limits and texts.

use std::collections::BTreeMap;

use crate::field::{FieldError, Path};
use crate::quantity::Quantity;

/// What the pod may be sent.
pub const INGRESS_ANNOTATION: &str = "kubernetes.io/ingress-bandwidth";
/// What it may send.
pub const EGRESS_ANNOTATION: &str = "kubernetes.io/egress-bandwidth";

const BITS_MIN: i64 = 1_000;
const BITS_MAX: i64 = 1_000_000_000_000_000;

/// The bits per second that an annotation says.
///
/// # Errors
/// Why it says nothing.
pub fn bits_per_second(text: &str) -> Result<u64, String> {
    let quantity = Quantity::parse(text).map_err(|error| error.to_string())?;
    match quantity.units() {
        ..BITS_MIN => Err("resource is unreasonably small (< 1kbit)".into()),
        bits if bits > BITS_MAX => Err("resource is unreasonably large (> 1Pbit)".into()),
        bits => Ok(bits.unsigned_abs()),
    }
}

/// Faults of both annotations.
pub(crate) fn validate(
    annotations: Option<&BTreeMap<String, String>>,
    errors: &mut Vec<FieldError>,
) {
    for name in [INGRESS_ANNOTATION, EGRESS_ANNOTATION] {
        let Some(text) = annotations.and_then(|all| all.get(name)) else {
            continue;
        };
        if let Err(detail) = bits_per_second(text) {
            let path = Path::new("metadata").child("annotations").key(name);
            errors.push(FieldError::invalid(&path, text.as_str(), &detail));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_bits_per_second() {
        assert_eq!(bits_per_second("10M"), Ok(10_000_000));
        assert_eq!(bits_per_second("1k"), Ok(1_000));
        assert_eq!(bits_per_second("1Gi"), Ok(1 << 30));
        assert_eq!(bits_per_second("1P"), Ok(1_000_000_000_000_000));
        for text in ["999", "1001T", "-1M", "", "10 M", "fast"] {
            assert!(bits_per_second(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_fault_names_its_annotation() {
        let annotations = [
            (INGRESS_ANNOTATION.to_owned(), "10M".to_owned()),
            (EGRESS_ANNOTATION.to_owned(), "10".to_owned()),
        ];
        let mut errors = Vec::new();
        validate(Some(&annotations.into()), &mut errors);
        let shown: Vec<String> = errors.iter().map(ToString::to_string).collect();
        let [only] = &shown[..] else {
            panic!("{shown:?}");
        };
        assert!(
            only.starts_with("metadata.annotations[kubernetes.io/egress-bandwidth]: Invalid value"),
            "{only}"
        );
        let mut errors = Vec::new();
        validate(None, &mut errors);
        assert!(errors.is_empty());
    }
}
