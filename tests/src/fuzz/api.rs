//! Targets that need the API's rules alone: manifests, patches, selectors, quantities.

use gantry_api::admission::{self, PatchType};
use gantry_api::cron::Schedule;
use gantry_api::kinds::{self, Kind};
use gantry_api::merge;
use gantry_api::quantity::Quantity;
use gantry_api::selector::{FieldSelector, Selector};
use gantry_api::{decode, manifest};
use serde_json::Value;

fn kind_of(object: &Value) -> Option<&'static Kind> {
    let text = |field: &str| object[field].as_str().unwrap_or_default();
    kinds::by_api_version(text("apiVersion"), text("kind"))
}

/// A text of manifests, as `gantry apply -f` reads it and the server takes each object.
pub fn manifests(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let Ok(documents) = manifest::documents("fuzz", &text) else {
        return;
    };
    for object in documents {
        let Some(kind) = kind_of(&object) else {
            continue;
        };
        let _ = admission::prepare_create_value(kind, object.clone(), true);
        let Ok(prepared) = admission::prepare_create_value(kind, object, false) else {
            continue;
        };
        // What was defaulted is not defaulted differently the next time.
        let again = admission::prepare_create_value(kind, prepared.object.clone(), true);
        let again = again.map(|again| again.object);
        assert_eq!(
            again.as_ref(),
            Ok(&prepared.object),
            "it is taken as it was shown"
        );
        let yaml = manifest::to_yaml(&prepared.object);
        let read = manifest::documents("shown", &yaml);
        let read = read.map(|mut documents| documents.pop());
        assert_eq!(
            read.ok().flatten().as_ref(),
            Some(&prepared.object),
            "{yaml}"
        );
    }
}

/// `type`, an object and a patch, with zero bytes between them.
pub fn patches(data: &[u8]) {
    let mut parts = data.splitn(3, |byte| *byte == 0);
    let type_ = match parts.next() {
        Some(b"json") => PatchType::Json,
        Some(b"merge") => PatchType::Merge,
        _ => PatchType::Strategic,
    };
    let (Some(live), Some(patch)) = (parts.next(), parts.next()) else {
        return;
    };
    let Ok(live) = decode::parse(live) else {
        return;
    };
    if let Ok(patch) = decode::parse_value(patch) {
        let _ = merge::strategic(&live, &patch);
        let _ = merge::json_patch(&live, patch.clone());
        let merged = merge::json_merge(&live, &patch);
        assert_eq!(merge::json_merge(&merged, &patch), merged, "RFC 7396 twice");
        if patch.is_object()
            && let Ok(applied) = merge::three_way_apply(&live, &patch)
        {
            let again = merge::three_way_apply(&applied, &patch);
            assert_eq!(again.as_ref(), Ok(&applied), "applied twice");
        }
    }
    if let Some(kind) = kind_of(&live) {
        let _ = admission::patch(kind, &live, type_, patch);
        let _ = admission::patch_status(kind, &live, type_, patch);
        let _ = admission::apply(kind, Some(&live), patch, false);
    }
}

/// Label and field selectors as text, and a LabelSelector as JSON.
pub fn selectors(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let labels = [("app".to_owned(), "web".to_owned())].into();
    if let Ok(selector) = Selector::parse(&text) {
        let _ = (selector.matches(&labels), selector.certain_label());
        if selector.is_empty() {
            assert!(selector.matches(&labels), "nothing is asked for");
        }
    }
    for kind in kinds::KINDS {
        if let Ok(selector) = FieldSelector::parse(kind, &text) {
            let _ = selector.matches(&serde_json::json!({"metadata": {"name": "web"}}));
        }
    }
    if let Ok(selector) = serde_json::from_slice(data)
        && let Ok(selector) = Selector::from_api(&selector)
    {
        let _ = selector.matches(&labels);
    }
}

/// A quantity, or the schedule of a CronJob.
pub fn quantities(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(quantity) = Quantity::parse(&text) {
        let shown = quantity.to_string();
        let read = Quantity::parse(&shown).expect("what is shown is a quantity");
        assert_eq!(
            read.to_string(),
            shown,
            "{text:?} is shown in its last form"
        );
        // As in Kubernetes, a part of a byte is shown as a byte.
        assert!(
            read == quantity || !quantity.is_whole(),
            "{text:?} is shown as {shown:?}"
        );
        let one = Quantity::from_units(1);
        let _ = (quantity.plus(one), quantity.minus(one), quantity.as_f64());
        let _ = (quantity.units(), quantity.milli(), quantity.is_whole());
    }
    let _ = Schedule::parse(&text);
}
