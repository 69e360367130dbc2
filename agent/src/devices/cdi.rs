//! CDI: what a device's name stands for, from the files that its vendor has put on this machine.
//!
//! `vendor.example/class=name` is looked up in the specs of `/etc/cdi` and `/var/run/cdi`; of two
//! files that define one device, the later directory's counts, and within a directory they are a
//! conflict. Hooks are programs of the host that run as root while the container is made, each for a
//! bounded time; one that would run after the container's end is refused in words, for then nobody
//! of OCI's runtime is left to run it.
//!
//! Source: the CNCF's container-device-interface, SPEC.md 0.8.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::plan::{Grant, Hook, Mount, Node};

/// Where specs are; the later ones count more.
pub const DIRECTORIES: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];
/// The longest spec.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Specs of one directory.
const FILE_COUNT_MAX: usize = 256;
/// The moments at which a hook can be run, by OCI's names.
const MOMENTS: [&str; 5] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
];
/// How long a hook may take whose spec does not say it; a longer time in a spec is cut to it.
const HOOK_TIMEOUT_S: u32 = 30;

#[derive(Deserialize, Debug)]
#[serde(rename_all = "camelCase")]
struct Spec {
    kind: String,
    #[serde(default)]
    devices: Vec<Device>,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Deserialize, Debug)]
#[serde(rename_all = "camelCase")]
struct Device {
    name: String,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Deserialize, Debug, Default, Clone)]
#[serde(rename_all = "camelCase", default)]
struct Edits {
    env: Vec<String>,
    device_nodes: Vec<DeviceNode>,
    mounts: Vec<SpecMount>,
    hooks: Vec<SpecHook>,
}

#[derive(Deserialize, Debug, Clone)]
#[serde(rename_all = "camelCase")]
struct DeviceNode {
    path: String,
    host_path: Option<String>,
    permissions: Option<String>,
}

#[derive(Deserialize, Debug, Clone)]
#[serde(rename_all = "camelCase")]
struct SpecMount {
    host_path: String,
    container_path: String,
    #[serde(default)]
    options: Vec<String>,
}

#[derive(Deserialize, Debug, Clone)]
#[serde(rename_all = "camelCase")]
struct SpecHook {
    hook_name: String,
    path: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    timeout: Option<u32>,
}

/// What these devices need.
///
/// # Errors
/// In words: a name that no spec defines, a spec that cannot be read, what is not supported.
pub fn resolve(names: &[String], directories: &[PathBuf]) -> Result<Grant, String> {
    let mut found = BTreeMap::<String, (usize, Grant)>::new();
    let mut broken = Vec::new();
    for (rank, directory) in directories.iter().enumerate() {
        for path in files(directory) {
            let spec = match read(&path) {
                Ok(spec) => spec,
                Err(words) => {
                    broken.push(format!("{}: {words}", path.display()));
                    continue;
                }
            };
            for device in &spec.devices {
                let name = format!("{}={}", spec.kind, device.name);
                if !names.contains(&name) {
                    continue;
                }
                if found.get(&name).is_some_and(|(before, _)| *before == rank) {
                    return Err(format!(
                        "CDI device {name} is defined twice in {}",
                        directory.display()
                    ));
                }
                let mut grant = edits(&spec.container_edits, &name)?;
                grant.add(edits(&device.container_edits, &name)?);
                found.insert(name, (rank, grant));
            }
        }
    }
    let mut all = Grant::default();
    for name in names {
        let Some((_, grant)) = found.remove(name) else {
            let unread = match broken.is_empty() {
                true => String::new(),
                false => format!("; specs that cannot be read: {}", broken.join(", ")),
            };
            return Err(format!("no CDI spec defines {name}{unread}"));
        };
        all.add(grant);
    }
    Ok(all)
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let is_spec = |path: &PathBuf| {
        let end = path.extension().and_then(|end| end.to_str());
        matches!(end, Some("json" | "yaml"))
    };
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_spec).collect();
    files.sort();
    files.truncate(FILE_COUNT_MAX);
    files
}

fn read(path: &Path) -> Result<Spec, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let mut text = String::new();
    let read = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text);
    read.map_err(|error| error.to_string())?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("is longer than {FILE_BYTES_MAX} bytes"));
    }
    // JSON is YAML.
    serde_saphyr::from_str(&text).map_err(|error| error.to_string())
}

fn edits(edits: &Edits, name: &str) -> Result<Grant, String> {
    let mut grant = Grant::default();
    for variable in &edits.env {
        let Some((key, value)) = variable.split_once('=') else {
            return Err(format!("CDI device {name}: {variable:?} is no variable"));
        };
        grant.env.insert(key.into(), value.into());
    }
    for node in &edits.device_nodes {
        grant.nodes.push(Node {
            host_path: node.host_path.clone().unwrap_or_else(|| node.path.clone()),
            container_path: node.path.clone(),
            permissions: node.permissions.clone().unwrap_or_else(|| "rw".into()),
        });
    }
    for mount in &edits.mounts {
        let known = [
            "ro", "rw", "bind", "rbind", "nosuid", "nodev", "private", "rprivate",
        ];
        let unknown = mount.options.iter().find(|o| !known.contains(&o.as_str()));
        if let Some(option) = unknown {
            let path = &mount.container_path;
            return Err(format!(
                "CDI device {name}: option {option} of mount {path} is not supported"
            ));
        }
        grant.mounts.push(Mount {
            host_path: mount.host_path.clone(),
            container_path: mount.container_path.clone(),
            read_only: mount.options.iter().any(|option| option == "ro"),
        });
    }
    for hook in &edits.hooks {
        grant
            .hooks
            .push(hook_of(hook).map_err(|words| format!("CDI device {name}: {words}"))?);
    }
    Ok(grant)
}

fn hook_of(hook: &SpecHook) -> Result<Hook, String> {
    let SpecHook {
        hook_name: moment,
        path,
        ..
    } = hook;
    if !MOMENTS.contains(&moment.as_str()) {
        return Err(format!(
            "hooks at {moment} are not run (those at {} are): use a spec without it",
            MOMENTS.join(", ")
        ));
    }
    if !path.starts_with('/') {
        return Err(format!("hook {path} is no absolute path"));
    }
    let bounded = |timeout: u32| timeout.clamp(1, HOOK_TIMEOUT_S);
    Ok(Hook {
        moment: moment.clone(),
        path: path.clone(),
        args: hook.args.clone(),
        env: hook.env.clone(),
        timeout_s: hook.timeout.map_or(HOOK_TIMEOUT_S, bounded),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: &str = r#"cdiVersion: "0.6.0"
kind: example.com/thing
containerEdits:
  env: ["ALL=1"]
devices:
  - name: one
    containerEdits:
      env: ["ONE=a=b"]
      deviceNodes:
        - {path: /dev/thing, hostPath: /dev/null}
        - {path: /dev/fuse, permissions: r}
      mounts:
        - {hostPath: /usr, containerPath: /opt, options: [ro, nosuid]}
  - name: hooked
    containerEdits:
      hooks:
        - {hookName: createContainer, path: /bin/true, args: ["true", "-x"], env: [A=1]}
        - {hookName: prestart, path: /bin/true, timeout: 900}
  - name: late
    containerEdits:
      hooks: [{hookName: poststop, path: /bin/true}]
"#;

    #[test]
    fn a_name_stands_for_its_edits_and_those_of_all() {
        let directory = tempfile::tempdir().unwrap();
        let directories = [directory.path().to_owned()];
        std::fs::write(directory.path().join("a.yaml"), SPEC).unwrap();
        std::fs::write(directory.path().join("broken.json"), "{").unwrap();
        let of = |name: &str| resolve(&[format!("example.com/thing={name}")], &directories);
        let grant = of("one").unwrap();
        assert_eq!(grant.env["ALL"], "1");
        assert_eq!(grant.env["ONE"], "a=b");
        assert_eq!(grant.nodes[0].host_path, "/dev/null");
        assert_eq!(grant.nodes[0].permissions, "rw");
        assert_eq!(grant.nodes[1].host_path, "/dev/fuse");
        assert!(grant.mounts[0].read_only);
        let hooks = of("hooked").unwrap().hooks;
        assert_eq!(hooks[0].args, ["true", "-x"]);
        assert_eq!((hooks[0].timeout_s, hooks[1].timeout_s), (30, 30));
        assert!(of("late").unwrap_err().contains("poststop"));
        let none = of("none").unwrap_err();
        assert!(
            none.contains("no CDI spec defines") && none.contains("broken.json"),
            "{none}"
        );
        std::fs::write(directory.path().join("b.yaml"), SPEC).unwrap();
        assert!(of("one").unwrap_err().contains("twice"));
        // A later directory counts more.
        let later = tempfile::tempdir().unwrap();
        std::fs::remove_file(directory.path().join("b.yaml")).unwrap();
        let other = SPEC.replace("ALL=1", "ALL=2");
        std::fs::write(later.path().join("a.yaml"), other).unwrap();
        let both = [directory.path().to_owned(), later.path().to_owned()];
        let grant = resolve(&["example.com/thing=one".into()], &both).unwrap();
        assert_eq!(grant.env["ALL"], "2");
    }
}
