//! Which address families a Service has: what it leaves out, and what the cluster cannot give. Pure.
//!
//! ```text
//!  ipFamilyPolicy    a cluster of one family     a cluster of both
//!  SingleStack       one                         one: the first that it names, else IPv4
//!  PreferDualStack   one                         both, the one that it names first
//!  RequireDualStack  refused                     both
//! ```
//! Without a policy it is SingleStack; a headless Service without a selector, whose endpoints somebody
//! else writes, has both where there are both.
//!
//! Source: Kubernetes' `pkg/registry/core/service/storage/alloc.go` (initIPFamilyFields). One difference:
//! a Service that prefers both gets the second with the next write after the cluster has it.

use gantry_api::field::{FieldError, Path};
use serde_json::{Value, json};

use super::service::{cluster_ips, has_cluster_ip};

const V4: &str = "IPv4";
const V6: &str = "IPv6";
const SINGLE: &str = "SingleStack";
const REQUIRE: &str = "RequireDualStack";

/// The families that a Service has, in its order.
pub(super) fn families(service: &Value) -> Vec<&str> {
    let families = service["spec"]["ipFamilies"].as_array();
    families
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect()
}

/// Of which family an address is.
pub(super) fn family_of(address: &str) -> Option<&'static str> {
    let address = address.parse::<std::net::IpAddr>().ok()?;
    Some(if address.is_ipv4() { V4 } else { V6 })
}

/// Writes families and policy into a Service that has cluster IPs, or is headless.
pub(super) fn settle(service: &mut Value, has_v6: bool) -> Result<(), FieldError> {
    if !has_cluster_ip(service) || !service["spec"].is_object() {
        return Ok(());
    }
    let spec = Path::new("spec");
    let ips: Vec<String> = cluster_ips(service)
        .into_iter()
        .map(str::to_owned)
        .collect();
    let is_headless = ips.first().is_some_and(|ip| ip == "None");
    let selector = service["spec"]["selector"].as_object();
    let has_selector = selector.is_some_and(|selector| !selector.is_empty());
    let policy = match service["spec"]["ipFamilyPolicy"].as_str() {
        Some(policy) => policy.to_owned(),
        None if is_headless && !has_selector && has_v6 => REQUIRE.to_owned(),
        None => SINGLE.to_owned(),
    };
    let mut families: Vec<String> = families(service).into_iter().map(str::to_owned).collect();
    let of_ips = ips.iter().filter_map(|ip| family_of(ip));
    if families.is_empty() {
        families = of_ips.map(str::to_owned).collect();
    }
    if families.is_empty() {
        families.push(V4.to_owned());
    }
    if policy == SINGLE && families.len().max(ips.len()) > 1 {
        let detail = "must be 'RequireDualStack' or 'PreferDualStack' when multiple 'clusterIPs' or \
                      'ipFamilies' are specified";
        return Err(FieldError::invalid(
            &spec.child("ipFamilyPolicy"),
            policy,
            detail,
        ));
    }
    if policy == REQUIRE && !has_v6 {
        let detail = "this cluster is not configured for dual-stack services";
        return Err(FieldError::invalid(
            &spec.child("ipFamilyPolicy"),
            policy,
            detail,
        ));
    }
    if let Some(index) = families.iter().position(|family| family == V6 && !has_v6) {
        let path = spec.child("ipFamilies").index(index);
        return Err(FieldError::invalid(
            &path,
            V6,
            "not configured on this cluster",
        ));
    }
    if policy != SINGLE && has_v6 && families.len() == 1 {
        let other = if families[0] == V4 { V6 } else { V4 };
        families.push(other.to_owned());
    }
    for (index, ip) in ips.iter().enumerate().filter(|(_, ip)| *ip != "None") {
        let wanted = families.get(index).map(String::as_str);
        if family_of(ip) != wanted {
            let detail = match wanted {
                Some(family) => {
                    format!("expected an {family} value as indicated by `ipFamilies[{index}]`")
                }
                None => "there is no family for it in `ipFamilies`".to_owned(),
            };
            let path = spec.child("clusterIPs").index(index);
            return Err(FieldError::invalid(&path, ip.as_str(), &detail));
        }
    }
    service["spec"]["ipFamilies"] = json!(families);
    service["spec"]["ipFamilyPolicy"] = json!(policy);
    Ok(())
}

/// Takes over from `old` what `new` leaves out; a change to one family drops the second, unless the
/// client has written something else there.
pub(super) fn carry(old: &Value, new: &mut Value) {
    let Some(spec) = new["spec"].as_object_mut() else {
        return;
    };
    let old = &old["spec"];
    let says = |spec: &serde_json::Map<String, Value>, field: &str| {
        spec.get(field)
            .is_some_and(|value| !value.is_null() && *value != json!([]) && *value != json!(""))
    };
    let keeps_ip = !says(spec, "clusterIP") || spec["clusterIP"] == old["clusterIP"];
    if keeps_ip && !says(spec, "clusterIPs") && !old["clusterIPs"].is_null() {
        spec.insert("clusterIPs".to_owned(), old["clusterIPs"].clone());
    }
    for field in ["clusterIP", "ipFamilies", "ipFamilyPolicy"] {
        let goes_with_ip = field != "ipFamilyPolicy" && !keeps_ip;
        if !says(spec, field) && !old[field].is_null() && !goes_with_ip {
            spec.insert(field.to_owned(), old[field].clone());
        }
    }
    if spec.get("ipFamilyPolicy") == Some(&json!(SINGLE)) && old["ipFamilyPolicy"] != SINGLE {
        for field in ["clusterIPs", "ipFamilies"] {
            let is_old = spec.get(field) == Some(&old[field]);
            if let Some(Value::Array(list)) = spec.get_mut(field)
                && is_old
            {
                list.truncate(1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn settled(spec: Value, has_v6: bool) -> Result<(Vec<String>, String), String> {
        let mut service = json!({"spec": spec});
        settle(&mut service, has_v6).map_err(|error| error.field)?;
        let policy = service["spec"]["ipFamilyPolicy"]
            .as_str()
            .unwrap_or_default();
        let families = families(&service).into_iter().map(str::to_owned);
        Ok((families.collect(), policy.to_owned()))
    }

    fn families_of(spec: Value, has_v6: bool) -> Vec<String> {
        settled(spec, has_v6).unwrap().0
    }

    #[test]
    fn what_is_left_out_is_as_kubernetes_has_it() {
        assert_eq!(families_of(json!({}), true), ["IPv4"]);
        let prefer = json!({"ipFamilyPolicy": "PreferDualStack"});
        assert_eq!(families_of(prefer.clone(), true), ["IPv4", "IPv6"]);
        assert_eq!(families_of(prefer, false), ["IPv4"]);
        let six_first = json!({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6"]});
        assert_eq!(families_of(six_first, true), ["IPv6", "IPv4"]);
        assert_eq!(families_of(json!({"clusterIP": "fd96::7"}), true), ["IPv6"]);
        let headless = json!({"clusterIP": "None"});
        assert_eq!(
            settled(headless.clone(), true).unwrap(),
            (vec!["IPv4".into(), "IPv6".into()], REQUIRE.into())
        );
        assert_eq!(settled(headless, false).unwrap().1, SINGLE);
        let selected = json!({"clusterIP": "None", "selector": {"app": "a"}});
        assert_eq!(settled(selected, true).unwrap().1, SINGLE);
        assert!(families_of(json!({"type": "ExternalName"}), true).is_empty());
    }

    #[test]
    fn what_the_cluster_cannot_give_is_refused_at_its_field() {
        for (spec, has_v6, field) in [
            (
                json!({"ipFamilyPolicy": "RequireDualStack"}),
                false,
                "spec.ipFamilyPolicy",
            ),
            (json!({"ipFamilies": ["IPv6"]}), false, "spec.ipFamilies[0]"),
            (
                json!({"ipFamilies": ["IPv4", "IPv6"]}),
                true,
                "spec.ipFamilyPolicy",
            ),
            (
                json!({"clusterIPs": ["10.96.0.7", "fd96::7"]}),
                true,
                "spec.ipFamilyPolicy",
            ),
            (
                json!({"clusterIP": "10.96.0.7", "ipFamilies": ["IPv6"]}),
                true,
                "spec.clusterIPs[0]",
            ),
        ] {
            assert_eq!(settled(spec.clone(), has_v6).unwrap_err(), field, "{spec}");
        }
    }

    #[test]
    fn a_service_goes_from_one_family_to_both_and_back() {
        let old = json!({"spec": {"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"],
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack"}});
        let mut both = json!({"spec": {"ipFamilyPolicy": "PreferDualStack"}});
        carry(&old, &mut both);
        settle(&mut both, true).unwrap();
        assert_eq!(families(&both), ["IPv4", "IPv6"]);
        assert_eq!(cluster_ips(&both), ["10.96.0.7"], "the second is drawn");
        both["spec"]["clusterIPs"] = json!(["10.96.0.7", "fd96::7"]);
        let mut same = json!({"spec": {}});
        carry(&both, &mut same);
        assert_eq!(cluster_ips(&same), ["10.96.0.7", "fd96::7"]);
        for mut one in [both.clone(), json!({"spec": {}})] {
            one["spec"]["ipFamilyPolicy"] = json!("SingleStack");
            carry(&both, &mut one);
            settle(&mut one, true).unwrap();
            assert_eq!(
                (families(&one), cluster_ips(&one)),
                (vec!["IPv4"], vec!["10.96.0.7"])
            );
        }
    }

    proptest! {
        #[test]
        fn what_is_settled_is_settled(
            policy in prop_oneof![Just(Value::Null), Just(json!("SingleStack")),
                Just(json!("PreferDualStack")), Just(json!("RequireDualStack"))],
            families_in in prop_oneof![Just(Value::Null), Just(json!(["IPv4"])), Just(json!(["IPv6"])),
                Just(json!(["IPv4", "IPv6"])), Just(json!(["IPv6", "IPv4"]))],
            ip in prop_oneof![Just(Value::Null), Just(json!("None")), Just(json!("10.96.0.7")),
                Just(json!("fd96::7"))],
            has_v6 in any::<bool>(),
        ) {
            let mut service = json!({"spec": {
                "ipFamilyPolicy": policy, "ipFamilies": families_in, "clusterIP": ip,
            }});
            if settle(&mut service, has_v6).is_err() {
                return Ok(());
            }
            let once = service.clone();
            prop_assert!(settle(&mut service, has_v6).is_ok());
            prop_assert_eq!(&once, &service);
            let families = families(&service);
            prop_assert!(has_v6 || families == ["IPv4"]);
            prop_assert!(matches!(families.len(), 1 | 2));
            prop_assert!(families.len() == 1 || families[0] != families[1]);
            if has_v6 && service["spec"]["ipFamilyPolicy"] != "SingleStack" {
                prop_assert_eq!(families.len(), 2);
            }
        }
    }
}
