//! The resize subresource of Pods: a write of which only the containers' resources count. Pure.

use gantry_api::kinds::Kind;
use gantry_api::status::Status;
use serde_json::Value;

/// The stored pod with the resources of `wanted`.
pub(super) fn applied(kind: &Kind, old: &Value, wanted: &Value) -> Result<Value, Status> {
    if kind.kind != "Pod" {
        let text = format!("{} have no resize subresource", kind.qualified_resource());
        return Err(Status::not_served(text));
    }
    let mut new = old.clone();
    let list = new["spec"]["containers"].as_array_mut();
    for container in list.into_iter().flatten() {
        let name = container["name"].clone();
        let others = wanted["spec"]["containers"].as_array();
        let same = others.into_iter().flatten().find(|c| c["name"] == name);
        let (Value::Object(fields), Some(same)) = (container, same) else {
            continue;
        };
        match same.get("resources") {
            Some(resources) => fields.insert("resources".to_owned(), resources.clone()),
            None => fields.remove("resources"),
        };
    }
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_api::kinds;
    use serde_json::json;

    #[test]
    fn only_resources_are_taken_over() {
        let pods = kinds::by_plural("", "pods").unwrap();
        let pod = |image: &str, cpu: &str| {
            json!({"spec": {"containers": [
                {"name": "a", "image": image, "resources": {"limits": {"cpu": cpu}}},
            ]}})
        };
        let got = applied(pods, &pod("x", "1"), &pod("y", "2")).unwrap();
        assert_eq!(got, pod("x", "2"));
        let nodes = kinds::by_plural("", "nodes").unwrap();
        assert!(applied(nodes, &json!({}), &json!({})).is_err());
    }
}
