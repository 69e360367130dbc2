//! The CNI plugin protocol: a verb in the environment, a configuration on stdin, JSON on stdout.
//!
//! Specification 1.1.0, results also as 0.4.0 and 1.0.0. Unknown `CNI_ARGS` are ignored: none mean
//! anything to this plugin. DEL succeeds when there is nothing to delete, whatever is missing.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::bridge;
use crate::config::{
    PluginConfig, SUPPORTED_VERSIONS, check_container_id, check_ifname, version_of,
};
use crate::error::CniError;
use crate::ipam::Owner;
use crate::netlink::Netlink;
use crate::netns::Netns;
use crate::result::{addresses_of, error_json};
use crate::sysctl;

/// The `CNI_*` variables of one call.
#[derive(Clone, Debug, Default)]
pub struct Environment(HashMap<String, String>);

impl Environment {
    /// Takes the variables that start with `CNI_`.
    pub fn new(variables: impl Iterator<Item = (String, String)>) -> Self {
        Self(
            variables
                .filter(|(name, _)| name.starts_with("CNI_"))
                .collect(),
        )
    }

    fn get(&self, variable: &'static str) -> Result<&str, CniError> {
        match self.0.get(variable).map(String::as_str) {
            None | Some("") => Err(CniError::Environment {
                variable,
                message: "missing".into(),
            }),
            Some(value) => Ok(value),
        }
    }

    fn owner(&self) -> Result<Owner, CniError> {
        let container_id = self.get("CNI_CONTAINERID")?;
        check_container_id(container_id)?;
        let ifname = self.get("CNI_IFNAME")?;
        check_ifname(ifname).map_err(|message| CniError::Environment {
            variable: "CNI_IFNAME",
            message,
        })?;
        Ok(Owner {
            container_id: container_id.into(),
            ifname: ifname.into(),
        })
    }

    fn netns(&self) -> Result<Netns, CniError> {
        Netns::open(&PathBuf::from(self.get("CNI_NETNS")?))
    }
}

/// What to print and how to exit.
#[derive(Clone, PartialEq, Debug)]
pub struct Outcome {
    /// For stdout; none: print nothing.
    pub output: Option<Value>,
    /// Exit with 0, else 1.
    pub success: bool,
}

/// Performs one call. Never fails: an error is an outcome.
pub async fn run(environment: &Environment, stdin: &[u8]) -> Outcome {
    match perform(environment, stdin).await {
        Ok(output) => Outcome {
            output,
            success: true,
        },
        Err(error) => {
            let asked = version_of(stdin);
            let version = (SUPPORTED_VERSIONS.iter())
                .find(|version| **version == asked)
                .unwrap_or(&"1.1.0");
            Outcome {
                output: Some(error_json(version, &error)),
                success: false,
            }
        }
    }
}

async fn perform(environment: &Environment, stdin: &[u8]) -> Result<Option<Value>, CniError> {
    let command = environment.get("CNI_COMMAND")?;
    if command == "VERSION" {
        return Ok(Some(json!({
            "cniVersion": "1.1.0",
            "supportedVersions": SUPPORTED_VERSIONS,
        })));
    }
    if !["ADD", "DEL", "CHECK", "STATUS", "GC"].contains(&command) {
        return Err(CniError::Environment {
            variable: "CNI_COMMAND",
            message: format!("{command:?}: want ADD, DEL, CHECK, STATUS, GC or VERSION"),
        });
    }
    let config = PluginConfig::parse(stdin)?;
    let network = &config.network;
    let needs_1_1 = matches!(command, "STATUS" | "GC");
    if needs_1_1 && config.version != "1.1.0" {
        return Err(CniError::Environment {
            variable: "CNI_COMMAND",
            message: format!("{command} needs cniVersion 1.1.0, not {}", config.version),
        });
    }
    let host = Netlink::open()?;
    match command {
        "ADD" => {
            let (owner, netns) = (environment.owner()?, environment.netns()?);
            ensure_forwarding(&config)?;
            let attached = bridge::add(&host, network, &owner, &netns).await?;
            Ok(Some(chain(&config, attached.to_json(&config.version))))
        }
        "DEL" => {
            bridge::remove(&host, network, &environment.owner()?, &[]).await?;
            Ok(None)
        }
        "CHECK" => {
            let (owner, netns) = (environment.owner()?, environment.netns()?);
            let expected = expected(&config, &owner, netns.path())?;
            bridge::check(&host, network, &owner, &netns, &expected).await?;
            Ok(None)
        }
        "STATUS" => {
            bridge::status(&host, network).await?;
            Ok(None)
        }
        _ => {
            let Some(valid) = &config.valid_attachments else {
                return Err(CniError::Config {
                    field: "cni.dev/valid-attachments".into(),
                    message: "missing: GC needs the list of attachments that stay".into(),
                });
            };
            let valid: HashSet<Owner> = (valid.iter().cloned())
                .map(|(container_id, ifname)| Owner {
                    container_id,
                    ifname,
                })
                .collect();
            bridge::collect(&host, network, &valid).await?;
            Ok(None)
        }
    }
}

/// A gateway must forward. The agent does this itself, once; a foreign runtime expects it of us.
fn ensure_forwarding(config: &PluginConfig) -> Result<(), CniError> {
    for range in &config.network.ranges {
        let name = if range.gateway().is_ipv4() {
            sysctl::IPV4_FORWARDING
        } else {
            sysctl::IPV6_FORWARDING
        };
        sysctl::ensure(name, "1")?;
    }
    Ok(())
}

/// The addresses that prevResult says our interface has.
fn expected(
    config: &PluginConfig,
    owner: &Owner,
    netns: &Path,
) -> Result<Vec<ipnet::IpNet>, CniError> {
    let missing = |message: String| CniError::Config {
        field: "prevResult".into(),
        message,
    };
    let Some(result) = &config.prev_result else {
        return Err(missing("missing: CHECK needs the result of ADD".into()));
    };
    let interfaces = result.get("interfaces").and_then(Value::as_array);
    let index = interfaces.into_iter().flatten().position(|interface| {
        let text = |field: &str| interface.get(field).and_then(Value::as_str);
        text("name") == Some(owner.ifname.as_str())
            && text("sandbox").is_some_and(|sandbox| Path::new(sandbox) == netns)
    });
    let Some(index) = index else {
        let (ifname, at) = (&owner.ifname, netns.display());
        return Err(missing(format!("no interface {ifname} with sandbox {at}")));
    };
    let ours = result.get("ips").and_then(Value::as_array);
    let ours: Vec<Value> = (ours.into_iter().flatten())
        .filter(|ip| ip.get("interface").and_then(Value::as_u64) == Some(index as u64))
        .cloned()
        .collect();
    addresses_of(&json!({ "ips": ours })).map_err(missing)
}

/// In a chain, what the plugins before us made stays in the result.
fn chain(config: &PluginConfig, ours: Value) -> Value {
    let Some(Value::Object(before)) = &config.prev_result else {
        return ours;
    };
    let Value::Object(mut merged) = ours else {
        return ours;
    };
    let list = |value: Option<&Value>| value.and_then(Value::as_array).cloned().unwrap_or_default();
    let first = list(merged.get("interfaces"));
    let offset = first.len() as u64;
    for field in ["interfaces", "ips", "routes"] {
        let mut entries = list(merged.get(field));
        for mut entry in list(before.get(field)) {
            // Indices of the earlier result move behind our interfaces.
            if field == "ips"
                && let Some(index) = entry.get("interface").and_then(Value::as_u64)
            {
                entry["interface"] = json!(index + offset);
            }
            entries.push(entry);
        }
        merged.insert(field.into(), Value::Array(entries));
    }
    if let Some(dns) = before.get("dns") {
        merged.insert("dns".into(), dns.clone());
    }
    Value::Object(merged)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(variables: &[(&str, &str)], stdin: &str) -> Outcome {
        let environment = Environment::new(
            (variables.iter()).map(|(name, value)| ((*name).into(), (*value).into())),
        );
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(run(&environment, stdin.as_bytes()))
    }

    fn error(variables: &[(&str, &str)], stdin: &str) -> (u64, String) {
        let outcome = call(variables, stdin);
        assert!(!outcome.success);
        let output = outcome.output.unwrap();
        (
            output["code"].as_u64().unwrap(),
            output["msg"].as_str().unwrap().into(),
        )
    }

    const CONFIG: &str = r#"{"cniVersion":"1.0.0","name":"n","type":"gantry-bridge",
        "subnets":["10.0.0.0/24"]}"#;

    #[test]
    fn version_needs_no_configuration() {
        let outcome = call(&[("CNI_COMMAND", "VERSION")], "");
        assert!(outcome.success);
        let output = outcome.output.unwrap();
        assert_eq!(
            output["supportedVersions"],
            json!(["0.4.0", "1.0.0", "1.1.0"])
        );
    }

    #[test]
    fn bad_calls_are_answered_in_words() {
        assert_eq!(error(&[], CONFIG), (4, "CNI_COMMAND: missing".into()));
        let (code, message) = error(&[("CNI_COMMAND", "GO")], CONFIG);
        assert_eq!(code, 4);
        assert!(message.contains("\"GO\""), "{message}");
        let add = [("CNI_COMMAND", "ADD")];
        assert_eq!(error(&add, CONFIG), (4, "CNI_CONTAINERID: missing".into()));
        assert_eq!(error(&add, "{").0, 6);
        let bad = [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "../x"),
            ("CNI_IFNAME", "eth0"),
        ];
        assert!(error(&bad, CONFIG).1.contains("CNI_CONTAINERID: \"../x\""));
        let bad = [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "x"),
            ("CNI_IFNAME", "a/b"),
        ];
        assert!(error(&bad, CONFIG).1.contains("CNI_IFNAME: \"a/b\""));
        let (code, message) = error(&[("CNI_COMMAND", "GC")], CONFIG);
        assert_eq!(
            (code, message.contains("needs cniVersion 1.1.0")),
            (4, true)
        );
    }

    #[test]
    fn results_of_earlier_plugins_are_kept() {
        let mut config = PluginConfig::parse(CONFIG.as_bytes()).unwrap();
        config.prev_result = Some(json!({
            "interfaces": [{ "name": "lo" }],
            "ips": [{ "address": "127.0.0.1/8", "interface": 0 }],
        }));
        let ours = json!({ "interfaces": [1, 2, 3], "ips": [{ "interface": 2 }], "routes": [] });
        let merged = chain(&config, ours);
        assert_eq!(merged["interfaces"].as_array().unwrap().len(), 4);
        assert_eq!(merged["ips"][1]["interface"], 3);
    }
}
