//! The spec builder against Kubernetes' rules.

use super::*;
use crate::volumes::{Access, ReadyVolume};
use gantry_api::k8s_openapi::api::core::v1::Pod;
use oci_spec::runtime::Capability;
use proptest::prelude::*;

fn pod(container: serde_json::Value, extra: serde_json::Value) -> Pod {
    let mut spec = json!({ "containers": [container] });
    for (key, value) in extra.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    serde_json::from_value(json!({
        "metadata": { "name": "web", "namespace": "default", "uid": "u1" },
        "spec": spec,
    }))
    .unwrap()
}

fn image(config: serde_json::Value) -> ImageConfiguration {
    serde_json::from_value(json!({
        "architecture": "amd64",
        "os": "linux",
        "rootfs": { "type": "layers", "diff_ids": [] },
        "config": config,
    }))
    .unwrap()
}

fn host() -> Host {
    Host {
        cgroup_v2: true,
        swap_accounting: true,
        capabilities: (0..41).collect(),
        memory_capacity_bytes: 8 << 30,
        devices: Vec::new(),
        unsafe_sysctls: vec!["net.core.*".into(), "kernel.msgmax".into()],
    }
}

fn join(part: &SubPath<'_>) -> std::io::Result<PathBuf> {
    Ok(part.volume.join(part.sub))
}

fn built(pod: &Pod, image: &ImageConfiguration) -> Result<Spec, SpecError> {
    let container = &pod.spec.as_ref().unwrap().containers[0];
    let identity = identity::decide(pod, container, image, PASSWD, GROUP)?;
    let volume = |name: &str, access| {
        let path = PathBuf::from("/vol").join(name);
        (name.to_owned(), ReadyVolume { path, access })
    };
    let volumes = BTreeMap::from([
        volume("data", Access::ReadWrite),
        volume("settings", Access::ReadOnly),
        volume("model", Access::ReadOnlyNoExec),
    ]);
    build(&SpecInput {
        pod,
        container,
        image,
        rootfs: Path::new("/rootfs"),
        identity: &identity,
        env: &[("A".into(), "1".into()), ("PATH".into(), "/own".into())],
        hostname: "web",
        volumes: &volumes,
        mount_sub_path: &join,
        files: PodFiles {
            hosts: Some(Path::new("/f/hosts")),
            ..PodFiles::default()
        },
        namespaces: Namespaces {
            net: Some(Path::new("/ns/net")),
            ..Namespaces::default()
        },
        pod_cgroup: "/gantry/burstable/podu1",
        host: &host(),
        devices: &GivenDevices::default(),
        app_armor: None,
    })
}

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n77:x:0:0:root too:/:/bin/sh\nweb:x:101:102:w:/srv/web:/bin/sh\n";
const GROUP: &str = "root:x:0:\nwww:x:102:\nextra:x:500:web,other\n";

fn process_of(spec: &Spec) -> &oci_spec::runtime::Process {
    spec.process().as_ref().unwrap()
}

fn mounts_at<'a>(spec: &'a Spec, destination: &str) -> Vec<&'a oci_spec::runtime::Mount> {
    let all = spec.mounts().as_ref().unwrap().iter();
    all.filter(|m| m.destination() == Path::new(destination))
        .collect()
}

#[test]
fn a_plain_container_gets_dockers_defaults() {
    let spec = built(
        &pod(json!({"name": "c", "image": "i"}), json!({})),
        &image(json!({"Cmd": ["sh"], "Env": ["X=y", "PATH=/img"], "WorkingDir": "/srv"})),
    )
    .unwrap();
    let process = process_of(&spec);
    assert_eq!(process.args().as_deref().unwrap(), ["sh"]);
    assert_eq!(
        process.env().as_deref().unwrap(),
        ["PATH=/own", "HOME=/root", "HOSTNAME=web", "X=y", "A=1"]
    );
    assert_eq!(process.cwd(), Path::new("/srv"));
    assert_eq!(process.no_new_privileges(), None);
    let caps = process.capabilities().as_ref().unwrap();
    assert_eq!(caps.bounding().as_ref().unwrap().len(), 14);
    assert!(caps.inheritable().is_none() && caps.ambient().is_none());
    let linux = spec.linux().as_ref().unwrap();
    assert!(linux.seccomp().is_none());
    assert_eq!(
        linux.masked_paths().as_ref().unwrap().len(),
        security::MASKED_PATHS.len()
    );
    assert_eq!(
        linux.cgroups_path().as_deref(),
        Some(Path::new("/gantry/burstable/podu1/c"))
    );
    assert_eq!(mounts_at(&spec, "/etc/hosts").len(), 1);
    assert_eq!(mounts_at(&spec, "/sys/fs/cgroup").len(), 1);
}

#[test]
fn the_default_capabilities_are_dockers_mask() {
    let mask = security::DEFAULT_CAPABILITIES
        .iter()
        .fold(0u64, |m, c| m | c.bitmask());
    assert_eq!(mask, 0xa804_25fb);
}

#[test]
fn command_and_args_replace_what_kubernetes_says_they_replace() {
    let image = image(json!({"Entrypoint": ["/e"], "Cmd": ["c1", "c2"]}));
    let args = |container: serde_json::Value| {
        let spec = built(&pod(container, json!({})), &image).unwrap();
        process_of(&spec).args().clone().unwrap()
    };
    assert_eq!(args(json!({"name": "c"})), ["/e", "c1", "c2"]);
    assert_eq!(args(json!({"name": "c", "command": ["x"]})), ["x"]);
    assert_eq!(args(json!({"name": "c", "args": ["y"]})), ["/e", "y"]);
    assert_eq!(
        args(json!({"name": "c", "command": ["x"], "args": ["$(A)"]})),
        ["x", "1"]
    );
    let nothing = self::image(json!({}));
    let error = built(&pod(json!({"name": "c"}), json!({})), &nothing).unwrap_err();
    assert_eq!(error.to_string(), "no command specified");
}

#[test]
fn variables_expand_as_in_kubernetes() {
    let value = |name: &str| match name {
        "A" => Some("1"),
        "EMPTY" => Some(""),
        _ => None,
    };
    for (text, wanted) in [
        ("$(A)", "1"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("x$(A)y$(A)", "x1y1"),
        ("$(B)", "$(B)"),
        ("$(EMPTY)", ""),
        ("$A", "$A"),
        ("$(A", "$(A"),
        ("$", "$"),
        ("", ""),
    ] {
        assert_eq!(command::expand(text, value), wanted, "{text}");
    }
}

#[test]
fn capabilities_are_added_and_dropped() {
    let caps = |context: serde_json::Value| {
        let container = json!({"name": "c", "command": ["x"], "securityContext": context});
        let spec = built(&pod(container, json!({})), &image(json!({}))).unwrap();
        let caps = process_of(&spec).capabilities().clone().unwrap();
        caps.bounding().clone().unwrap_or_default()
    };
    let got = caps(json!({"capabilities": {"add": ["NET_ADMIN"], "drop": ["MKNOD"]}}));
    assert!(got.contains(&Capability::NetAdmin) && !got.contains(&Capability::Mknod));
    let got = caps(json!({"capabilities": {"add": ["CAP_NET_ADMIN"], "drop": ["ALL"]}}));
    assert_eq!(got, [Capability::NetAdmin].into());
    assert_eq!(caps(json!({"capabilities": {"drop": ["all"]}})).len(), 0);
    assert_eq!(caps(json!({"capabilities": {"add": ["ALL"]}})).len(), 41);
    assert_eq!(caps(json!({"privileged": true})).len(), 41);
}

#[test]
fn privileged_has_no_masks_and_every_device() {
    let container = json!({"name": "c", "command": ["x"], "securityContext": {"privileged": true}});
    let pod = pod(container, json!({}));
    let spec = built(&pod, &image(json!({}))).unwrap();
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(linux.masked_paths().as_ref().map(Vec::len), Some(0));
    let rules = linux
        .resources()
        .as_ref()
        .unwrap()
        .devices()
        .clone()
        .unwrap();
    assert!(rules.len() == 1 && rules[0].allow());
    let container = &pod.spec.as_ref().unwrap().containers[0];
    assert_eq!(seccomp_of(&pod, container), Seccomp::Unconfined);
    assert!(allows_privilege_escalation(container));
}

#[test]
fn no_new_privileges_is_true_or_absent() {
    for (allow, wanted) in [
        (json!(true), None),
        (json!(null), None),
        (json!(false), Some(true)),
    ] {
        let context = json!({"allowPrivilegeEscalation": allow});
        let container = json!({"name": "c", "command": ["x"], "securityContext": context});
        let spec = built(&pod(container, json!({})), &image(json!({}))).unwrap();
        assert_eq!(process_of(&spec).no_new_privileges(), wanted);
    }
}

#[test]
fn the_user_comes_from_contexts_then_from_the_image() {
    let identity = |context: serde_json::Value, pods: serde_json::Value, user: &str| {
        let container = json!({"name": "c", "securityContext": context});
        let pod = pod(container, json!({ "securityContext": pods }));
        let image = image(json!({ "User": user }));
        identity::decide(
            &pod,
            &pod.spec.as_ref().unwrap().containers[0],
            &image,
            PASSWD,
            GROUP,
        )
    };
    let ids = |i: Identity| (i.uid, i.gid, i.groups, i.home);
    let got = ids(identity(json!({}), json!({}), "web").unwrap());
    assert_eq!(got, (101, 102, vec![500], "/srv/web".into()));
    let got = ids(identity(json!({}), json!({}), "web:root").unwrap());
    assert_eq!((got.0, got.1), (101, 0));
    let got = ids(identity(json!({}), json!({}), "7:8").unwrap());
    assert_eq!(got, (7, 8, vec![], "/".into()));
    let pods = json!({"runAsUser": 5, "runAsGroup": 6, "fsGroup": 9, "supplementalGroups": [3, 9]});
    let got = ids(identity(json!({}), pods.clone(), "web").unwrap());
    assert_eq!(got, (5, 6, vec![3, 9], "/".into()));
    let got = ids(identity(json!({"runAsUser": 101}), pods, "").unwrap());
    assert_eq!(got, (101, 6, vec![3, 9, 500], "/srv/web".into()));
    assert!(identity(json!({}), json!({}), "nobody").is_err());
    assert!(identity(json!({"runAsUser": -1}), json!({}), "").is_err());
    assert!(identity(json!({"runAsUser": 4_294_967_295i64}), json!({}), "").is_err());
}

#[test]
fn run_as_non_root_refuses_in_kubelets_words() {
    let message = |context: serde_json::Value, user: &str| {
        let container = json!({"name": "c", "command": ["x"], "securityContext": context});
        built(&pod(container, json!({})), &image(json!({ "User": user })))
            .err()
            .map(|e| e.to_string())
    };
    let place = "(pod: \"web_default(u1)\", container: c)";
    assert_eq!(
        message(json!({"runAsNonRoot": true}), ""),
        Some(format!(
            "container has runAsNonRoot and image will run as root {place}"
        ))
    );
    assert_eq!(
        message(json!({"runAsNonRoot": true}), "77"),
        Some(format!(
            "container has runAsNonRoot and image will run as root (its user 77 has uid 0) {place}"
        ))
    );
    assert_eq!(message(json!({"runAsNonRoot": true}), "web"), None);
    assert_eq!(
        message(json!({"runAsNonRoot": true, "runAsUser": 0}), "101"),
        Some(format!(
            "container's runAsUser breaks non-root policy {place}"
        ))
    );
    assert_eq!(message(json!({"runAsNonRoot": true}), "101"), None);
}

#[test]
fn volumes_are_mounted_read_only_and_by_sub_path() {
    let with = |mount: serde_json::Value| {
        let container = json!({"name": "c", "command": ["x"], "volumeMounts": [mount]});
        built(&pod(container, json!({})), &image(json!({})))
    };
    let spec = with(json!({"name": "data", "mountPath": "/d", "readOnly": true})).unwrap();
    let mount = mounts_at(&spec, "/d")[0];
    assert_eq!(mount.source().as_deref(), Some(Path::new("/vol/data")));
    assert!(mount.options().as_ref().unwrap().contains(&"ro".to_owned()));
    let spec = with(json!({"name": "data", "mountPath": "/d", "subPathExpr": "x/$(A)"})).unwrap();
    assert_eq!(
        mounts_at(&spec, "/d")[0].source().as_deref(),
        Some(Path::new("/vol/data/x/1"))
    );
    let options = |mount: serde_json::Value| {
        let spec = with(mount).unwrap();
        mounts_at(&spec, "/d")[0].options().clone().unwrap()
    };
    let recursive = json!({"name": "data", "mountPath": "/d", "readOnly": true,
        "recursiveReadOnly": "Enabled"});
    assert_eq!(options(recursive), ["rbind", "rprivate", "ro", "rro"]);
    // What the agent writes is never written by a container, and an image's files never run.
    let settings =
        json!({"name": "settings", "mountPath": "/d", "mountPropagation": "HostToContainer"});
    assert_eq!(options(settings), ["rbind", "rslave", "ro"]);
    let model = options(json!({"name": "model", "mountPath": "/d"}));
    assert!(model.contains(&"rro".into()) && model.contains(&"noexec".into()));
    let spec = with(json!({"name": "data", "mountPath": "/etc/hosts"})).unwrap();
    assert_eq!(mounts_at(&spec, "/etc/hosts").len(), 1);
    for bad in [
        json!({"name": "data", "mountPath": "/d", "subPath": "../x"}),
        json!({"name": "data", "mountPath": "/d", "subPath": "/x"}),
        json!({"name": "data", "mountPath": "d"}),
        json!({"name": "data", "mountPath": "/d/../x"}),
        json!({"name": "none", "mountPath": "/d"}),
        json!({"name": "data", "mountPath": "/d", "subPathExpr": "$(NONE)"}),
    ] {
        assert!(with(bad.clone()).is_err(), "{bad}");
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let sysctl = |name: &str| {
        let context = json!({"sysctls": [{"name": name, "value": "1"}]});
        let pod = pod(
            json!({"name": "c", "command": ["x"]}),
            json!({ "securityContext": context }),
        );
        built(&pod, &image(json!({}))).err().map(|e| e.to_string())
    };
    assert_eq!(sysctl("net.ipv4.tcp_syncookies"), None);
    let forbidden = sysctl("kernel.msgmnb").unwrap();
    assert!(
        forbidden.starts_with("forbidden sysctl: \"kernel.msgmnb\" not allowlisted"),
        "{forbidden}"
    );
    for allowed in ["kernel.msgmax", "net/core/somaxconn"] {
        assert_eq!(sysctl(allowed), None);
    }
    let check = |name: &str| security::check_unsafe_sysctls(&[name.to_owned()]);
    assert!(check("net.core.*").is_ok() && check("kernel.msg*").is_ok());
    for bad in ["vm.swappiness", "net.*.x", "*", "kernel.*"] {
        assert!(check(bad).is_err(), "{bad}");
    }
}

#[test]
fn limits_become_resources() {
    let resources = json!({"requests": {"cpu": "500m"}, "limits": {"cpu": "1", "memory": "64Mi"}});
    let container = json!({"name": "c", "command": ["x"], "resources": resources});
    let spec = built(&pod(container, json!({})), &image(json!({}))).unwrap();
    let got = spec.linux().as_ref().unwrap().resources().clone().unwrap();
    let memory = got.memory().unwrap();
    assert_eq!(
        (memory.limit(), memory.swap()),
        (Some(64 << 20), Some(64 << 20))
    );
    let cpu = got.cpu().as_ref().unwrap().clone();
    assert_eq!(
        (cpu.shares(), cpu.quota(), cpu.period()),
        (Some(512), Some(100_000), Some(100_000))
    );
}

proptest! {
    #[test]
    fn expansion_never_panics_and_keeps_text_without_dollars(text in "[^$]*", any in ".*") {
        prop_assert_eq!(command::expand(&text, |_| None), text.as_str());
        let _ = command::expand(&any, |_| Some("$(x)"));
    }

    #[test]
    fn passwd_lines_of_any_shape_are_survived(passwd in "[a-z:0-9\n]{0,200}", user in "[a-z0-9]{0,4}") {
        let pod = pod(json!({"name": "c"}), json!({}));
        let image = image(json!({ "User": user }));
        let container = &pod.spec.as_ref().unwrap().containers[0];
        let _ = identity::decide(&pod, container, &image, &passwd, &passwd);
    }
}
