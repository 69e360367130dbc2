use super::*;
use gantry_api::k8s_openapi::api::core::v1::PodTemplateSpec;
use proptest::prelude::*;
use serde_json::json;

fn pod(spec: Value) -> PodTemplateSpec {
    serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap()
}

fn at(level: Level, minor: u32, pod: &PodTemplateSpec) -> String {
    let of = LevelVersion { level, minor };
    let metadata = pod.metadata.clone().unwrap_or_default();
    details(&violations(of, &metadata, pod.spec.as_ref().unwrap())).unwrap_or_default()
}

fn with(security: Value) -> Value {
    json!([{"name": "a", "securityContext": security}, {"name": "b"}])
}

#[test]
fn a_plain_pod_is_baseline_and_not_restricted() {
    let plain = pod(json!({"containers": [{"name": "c"}]}));
    assert_eq!(at(Level::Baseline, MINOR_LATEST, &plain), "");
    assert_eq!(
        at(Level::Restricted, MINOR_LATEST, &plain),
        "allowPrivilegeEscalation != false (container \"c\" must set \
         securityContext.allowPrivilegeEscalation=false), unrestricted capabilities (container \"c\" \
         must set securityContext.capabilities.drop=[\"ALL\"]), runAsNonRoot != true (pod or container \
         \"c\" must set securityContext.runAsNonRoot=true), seccompProfile (pod or container \"c\" must \
         set securityContext.seccompProfile.type to \"RuntimeDefault\" or \"Localhost\")"
    );
    let hard = pod(json!({
        "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [{"name": "c", "securityContext": {"allowPrivilegeEscalation": false,
            "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}}}],
        "volumes": [{"name": "e", "emptyDir": {}}]}));
    assert_eq!(at(Level::Restricted, MINOR_LATEST, &hard), "");
}

#[test]
fn each_check_of_baseline_has_its_words() {
    for (spec, words) in [
        (
            json!({"hostNetwork": true, "hostIPC": true, "containers": []}),
            "host namespaces (hostNetwork=true, hostIPC=true)",
        ),
        (
            json!({"containers": with(json!({"privileged": true}))}),
            "privileged (container \"a\" must not set securityContext.privileged=true)",
        ),
        (
            json!({"containers": with(json!({"capabilities": {"add": ["SYS_TIME", "CHOWN", "NET_RAW"]}}))}),
            "non-default capabilities (container \"a\" must not include \"NET_RAW\", \"SYS_TIME\" in \
             securityContext.capabilities.add)",
        ),
        (
            json!({"containers": [], "volumes": [{"name": "x", "hostPath": {"path": "/"}},
                {"name": "y", "hostPath": {"path": "/"}}]}),
            "hostPath volumes (volumes \"x\", \"y\")",
        ),
        (
            json!({"containers": [{"name": "a", "ports": [{"containerPort": 1, "hostPort": 80},
                {"containerPort": 2}]}]}),
            "hostPort (container \"a\" uses hostPort 80)",
        ),
        (
            json!({"securityContext": {"seccompProfile": {"type": "Unconfined"}},
                "containers": with(json!({"seccompProfile": {"type": "Unconfined"}}))}),
            "seccompProfile (pod and container \"a\" must not set securityContext.seccompProfile.type \
             to \"Unconfined\")",
        ),
        (
            json!({"containers": with(json!({"procMount": "Unmasked"}))}),
            "procMount (container \"a\" must not set securityContext.procMount to \"Unmasked\")",
        ),
        (
            json!({"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"},
                {"name": "net.ipv4.tcp_syncookies", "value": "1"}]}, "containers": []}),
            "forbidden sysctls (kernel.msgmax)",
        ),
        (
            json!({"securityContext": {"seLinuxOptions": {"type": "x_t", "user": "u"}}, "containers": []}),
            "seLinuxOptions (pod set forbidden securityContext.seLinuxOptions: type \"x_t\"; user may \
             not be set)",
        ),
        (
            json!({"containers": with(json!({"appArmorProfile": {"type": "Unconfined"}}))}),
            "forbidden AppArmor profile (container \"a\" must not set AppArmor profile type to \
             \"Unconfined\")",
        ),
        (
            json!({"containers": with(json!({"windowsOptions": {"hostProcess": true}}))}),
            "hostProcess (container \"a\" must not set securityContext.windowsOptions.hostProcess=true)",
        ),
        (
            json!({"containers": [{"name": "a", "livenessProbe": {"httpGet": {"port": 1, "host": "10.0.0.1"}}}]}),
            "probe or lifecycle host (container \"a\" uses probe or lifecycle host \"10.0.0.1\")",
        ),
    ] {
        assert_eq!(at(Level::Baseline, MINOR_LATEST, &pod(spec)), words);
    }
}

#[test]
fn what_restricted_asks_more_sharply_is_said_once() {
    let bad = pod(json!({
        "securityContext": {"runAsUser": 0, "runAsNonRoot": false},
        "initContainers": [{"name": "i", "securityContext": {"allowPrivilegeEscalation": false,
            "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "Localhost"}}}],
        "containers": [{"name": "c", "securityContext": {"allowPrivilegeEscalation": false,
            "runAsUser": 0, "capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]},
            "seccompProfile": {"type": "Unconfined"}}}],
        "volumes": [{"name": "h", "hostPath": {"path": "/"}}, {"name": "n", "nfs": {"path": "/", "server": "s"}}]}));
    assert_eq!(
        at(Level::Restricted, MINOR_LATEST, &bad),
        "unrestricted capabilities (container \"c\" must not include \"SYS_ADMIN\" in \
         securityContext.capabilities.add), restricted volume types (volumes \"h\", \"n\" use restricted \
         volume types \"hostPath\", \"nfs\"), runAsNonRoot != true (pod must not set \
         securityContext.runAsNonRoot=false), runAsUser=0 (pod and container \"c\" must not set \
         runAsUser=0), seccompProfile (container \"c\" must not set securityContext.seccompProfile.type to \
         \"Unconfined\")"
    );
}

#[test]
fn older_versions_ask_less() {
    let plain = pod(json!({"containers": [{"name": "c"}]}));
    let text = at(Level::Restricted, 7, &plain);
    assert_eq!(
        text,
        "runAsNonRoot != true (pod or container \"c\" must set securityContext.runAsNonRoot=true)"
    );
    let tuned = pod(json!({"containers": [], "securityContext": {"sysctls": [
        {"name": "net.ipv4.tcp_rmem", "value": "1"}]}}));
    assert_eq!(
        at(Level::Baseline, 31, &tuned),
        "forbidden sysctls (net.ipv4.tcp_rmem)"
    );
    assert_eq!(at(Level::Baseline, 32, &tuned), "");
    let probed = pod(
        json!({"containers": [{"name": "a", "readinessProbe": {"tcpSocket": {"port": 1, "host": "h"}}}]}),
    );
    assert_eq!(at(Level::Baseline, 33, &probed), "");
    let root_inside = pod(
        json!({"hostUsers": false, "securityContext": {"runAsUser": 0,
        "seccompProfile": {"type": "RuntimeDefault"}}, "containers": [{"name": "c",
        "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}]}),
    );
    assert_eq!(at(Level::Restricted, MINOR_LATEST, &root_inside), "");
    assert!(at(Level::Restricted, 34, &root_inside).contains("runAsUser=0"));
}

#[test]
fn labels_say_what_happens() {
    let labels = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        let prefix = "pod-security.kubernetes.io/";
        let own = pairs.iter();
        own.map(|(key, value)| (format!("{prefix}{key}"), (*value).to_owned()))
            .collect()
    };
    assert!(Policy::of(&labels(&[])).is_idle());
    let plain =
        pod(json!({"containers": [{"name": "c", "securityContext": {"privileged": true}}]}));
    let judged = |pairs: &[(&str, &str)], is_template| {
        let policy = Policy::of(&labels(pairs));
        let metadata = plain.metadata.clone().unwrap_or_default();
        judge(
            &policy,
            &metadata,
            plain.spec.as_ref().unwrap(),
            is_template,
        )
    };
    let refused = judged(
        &[("enforce", "baseline"), ("enforce-version", "v1.30")],
        false,
    );
    assert_eq!(
        refused.refusal.as_deref(),
        Some(
            "violates PodSecurity \"baseline:v1.30\": privileged (container \"c\" must not set \
             securityContext.privileged=true)"
        )
    );
    assert_eq!(refused.warning, None);
    // A template is not refused; its author is told what becomes of its pods.
    let told = judged(&[("enforce", "baseline")], true);
    assert_eq!(told.refusal, None);
    let warning = told.warning.unwrap();
    assert!(
        warning.starts_with("would violate PodSecurity \"baseline:latest\": privileged"),
        "{warning}"
    );
    let told = judged(&[("warn", "restricted"), ("audit", "baseline")], false);
    assert_eq!(told.refusal, None);
    assert!(told.warning.unwrap().contains("restricted:latest"));
    assert!(told.audit.unwrap().contains("baseline:latest"));
    assert!(judged(&[("enforce", "nonsense")], false).refusal.is_some());
}

#[test]
fn existing_pods_are_named_by_what_they_do() {
    let named = |name: &str, spec: Value| -> Pod {
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).unwrap()
    };
    let host = json!({"hostNetwork": true, "containers": []});
    let pods = [
        named("b", host.clone()),
        named("a", host.clone()),
        named("c", host),
        named(
            "d",
            json!({"hostPID": true, "containers": [{"name": "x", "securityContext": {"privileged": true}}]}),
        ),
        named("fine", json!({"containers": []})),
    ];
    let baseline = LevelVersion {
        level: Level::Baseline,
        minor: MINOR_LATEST,
    };
    assert_eq!(
        existing("n", baseline, &pods),
        [
            "existing pods in namespace \"n\" violate the new PodSecurity enforce level \
             \"baseline:latest\"",
            "a (and 2 other pods): host namespaces",
            "d: host namespaces, privileged",
        ]
    );
}

proptest! {
    /// What restricted allows, baseline allows; what a version allows with every check, so does privileged.
    #[test]
    fn levels_are_ordered(
        flags in proptest::collection::vec(any::<bool>(), 8), minor in 0..40_u32,
        user in proptest::option::of(0..2_i64),
    ) {
        let security = json!({
            "privileged": flags[0], "allowPrivilegeEscalation": flags[1],
            "capabilities": {"drop": if flags[2] { json!(["ALL"]) } else { json!([]) },
                "add": if flags[3] { json!(["NET_RAW"]) } else { json!([]) }},
            "runAsNonRoot": flags[4], "runAsUser": user,
            "seccompProfile": {"type": if flags[5] { "RuntimeDefault" } else { "Unconfined" }},
        });
        let pod = pod(json!({"hostNetwork": flags[6], "hostUsers": flags[7],
            "containers": [{"name": "c", "securityContext": security}]}));
        prop_assert_eq!(at(Level::Privileged, minor, &pod), "");
        if minor >= 22 && at(Level::Restricted, minor, &pod).is_empty() {
            prop_assert_eq!(at(Level::Baseline, minor, &pod), "");
        }
    }
}
