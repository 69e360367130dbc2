//! `describe` of a NetworkPolicy, in kubectl's words: what each rule allows, and what it does not.

use super::text::{Text, field, items, scalar};
use super::{common, labels};
use gantry_api::table;
use serde_json::Value;

pub(super) fn describe(object: &Value, text: &mut Text) {
    common(object, true, text);
    labels(object, text);
    text.head(0, "Spec");
    let pods = match selector(object.pointer("/spec/podSelector")) {
        selected if selected == ALL => {
            "<none> (Allowing the specific traffic to all pods in this namespace)".to_owned()
        }
        selected => selected,
    };
    text.line(2, "PodSelector", &pods);
    let types: Vec<&str> = items(object, "/spec/policyTypes")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    for (kind, pointer, peers, word) in [
        ("Ingress", "/spec/ingress", "/from", "From"),
        ("Egress", "/spec/egress", "/to", "To"),
    ] {
        let (lower, rules) = (kind.to_lowercase(), items(object, pointer));
        if !types.contains(&kind) {
            text.raw(&format!("  Not affecting {lower} traffic\n"));
            continue;
        }
        text.head(2, &format!("Allowing {lower} traffic"));
        if rules.is_empty() {
            let how = format!("    <none> (Selected pods are isolated for {lower} connectivity)\n");
            text.raw(&how);
        }
        for (i, rule) in rules.iter().enumerate() {
            if i > 0 {
                text.raw("    ----------\n");
            }
            self::rule(rule, peers, word, text);
        }
    }
    text.line(2, "Policy Types", &types.join(", "));
}

const ALL: &str = "<none>";

fn selector(value: Option<&Value>) -> String {
    table::label_selector_text(value)
}

fn rule(rule: &Value, peers: &str, word: &str, text: &mut Text) {
    let ports = items(rule, "/ports");
    if ports.is_empty() {
        text.line(4, "To Port", "<any> (traffic allowed to all ports)");
    }
    for port in ports {
        let number = port.get("port").map_or_else(|| "<any>".to_owned(), scalar);
        let end = port.get("endPort").map(|end| format!("-{}", scalar(end)));
        let protocol = match field(port, "/protocol") {
            "" => "TCP",
            protocol => protocol,
        };
        let shown = format!("{number}{}/{protocol}", end.unwrap_or_default());
        text.line(4, "To Port", &shown);
    }
    let peers = items(rule, peers);
    if peers.is_empty() {
        text.line(4, word, "<any> (traffic not restricted by peer)");
    }
    for peer in peers {
        text.head(4, word);
        if let Some(block) = peer.get("ipBlock") {
            text.line(6, "IPBlock", field(block, "/cidr"));
            let except: Vec<&str> = items(block, "/except")
                .iter()
                .filter_map(Value::as_str)
                .collect();
            text.line(6, "Except", &except.join(", "));
        }
        for (key, label) in [
            ("namespaceSelector", "NamespaceSelector"),
            ("podSelector", "PodSelector"),
        ] {
            if let Some(chosen) = peer.get(key) {
                text.line(6, label, &selector(Some(chosen)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_policy_says_what_it_allows() {
        let policy = json!({"metadata": {"name": "p", "namespace": "d"}, "spec": {
            "podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [
                {"podSelector": {"matchLabels": {"app": "web"}}, "namespaceSelector": {}},
                {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16", "10.2.0.0/16"]}}],
                "ports": [{"port": 80, "endPort": 90}, {"port": "dns", "protocol": "UDP"}]}, {}]}});
        let mut text = Text::default();
        describe(&policy, &mut text);
        let text = text.finish();
        for line in [
            "  PodSelector:   app=db\n",
            "    To Port:  80-90/TCP\n    To Port:  dns/UDP\n",
            "      NamespaceSelector:  <none>\n      PodSelector:        app=web\n",
            "      Except:             10.1.0.0/16, 10.2.0.0/16\n",
            "    ----------\n    To Port:  <any> (traffic allowed to all ports)\n",
            "    From:     <any> (traffic not restricted by peer)\n",
            "  Allowing egress traffic:\n    <none> (Selected pods are isolated for egress",
            "  Policy Types:  Ingress, Egress\n",
        ] {
            assert!(text.contains(line), "{line:?} in\n{text}");
        }
        let mut text = Text::default();
        describe(&json!({}), &mut text);
        text.finish();
    }
}
