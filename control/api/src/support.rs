//! Which fields Gantry honours: one table, read by admission and printed into the README.
//!
//! The table is an allow list. A field that Kubernetes knows but this table does not is refused by
//! its path, so nothing is accepted and then ignored in silence:
//! * [`Level::Yes`]: honoured, with everything inside it that no longer path speaks about;
//! * [`Level::Listed`]: only what longer paths list is honoured;
//! * [`Level::Warn`]: accepted and stored, without effect yet; the client gets a warning;
//! * [`Level::No`]: refused, because a pod that runs without it would do something else than asked.
//!
//! Values that mean "off" (null, false, 0, "", [], {}) are always accepted.

use crate::field::{FieldError, Path};
use crate::kinds::Kind;
use serde_json::Value;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::LazyLock;

/// What Gantry does with a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Honoured.
    Yes,
    /// Honoured as far as the paths below it say.
    Listed,
    /// Accepted with a warning; no effect yet.
    Warn,
    /// Refused by path.
    No,
}

/// One line of the table.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// Path without indices; `[]` stands for every element.
    pub path: &'static str,
    /// What Gantry does with it.
    pub level: Level,
    /// Values that are honoured although the level is `Warn` or `No`.
    pub except: &'static [&'static str],
    /// Why, or what to use instead.
    pub note: &'static str,
}

const fn yes(path: &'static str) -> Rule {
    Rule {
        path,
        level: Level::Yes,
        except: &[],
        note: "",
    }
}

const fn listed(path: &'static str) -> Rule {
    Rule {
        path,
        level: Level::Listed,
        except: &[],
        note: "",
    }
}

const fn warn(path: &'static str, except: &'static [&'static str], note: &'static str) -> Rule {
    Rule {
        path,
        level: Level::Warn,
        except,
        note,
    }
}

const fn no(path: &'static str, except: &'static [&'static str], note: &'static str) -> Rule {
    Rule {
        path,
        level: Level::No,
        except,
        note,
    }
}

/// What to use for a disk of a cloud or a storage system that Kubernetes once had built in.
const BY_CSI: &str = "no storage system is built in: use its CSI driver, or a local volume";
/// What to use for storage that the node would have to attach.
const BY_CSI_OR_HOST: &str =
    "devices are not attached: use a CSI driver, or mount the device on the host and use hostPath";

const TCP_HOOK: &str = "Kubernetes does not run it either: use exec, httpGet or sleep";

/// Fields of a PodSpec.
pub static POD_SPEC: &[Rule] = &[
    yes("activeDeadlineSeconds"),
    yes("affinity"),
    yes("automountServiceAccountToken"),
    listed("containers"),
    yes("dnsConfig"),
    yes("dnsPolicy"),
    yes("enableServiceLinks"),
    listed("ephemeralContainers"), // not in templates or new pods: see validation
    yes("hostAliases"),
    yes("hostIPC"),
    yes("hostNetwork"),
    yes("hostPID"),
    yes("hostUsers"),
    yes("hostname"),
    yes("imagePullSecrets"),
    listed("initContainers"),
    yes("nodeName"),
    yes("nodeSelector"),
    no("os", &["{\"name\":\"linux\"}"], "nodes run Linux only"),
    yes("preemptionPolicy"),
    yes("priority"),
    yes("priorityClassName"),
    yes("readinessGates"),
    listed("resources"),
    yes("resources.limits"),
    yes("resources.requests"),
    no(
        "resources.claims",
        &[],
        "there is no dynamic resource allocation",
    ),
    yes("restartPolicy"),
    yes("schedulerName"),
    yes("schedulingGates"),
    listed("securityContext"),
    yes("serviceAccount"),
    yes("serviceAccountName"),
    yes("setHostnameAsFQDN"),
    yes("shareProcessNamespace"),
    yes("subdomain"),
    yes("terminationGracePeriodSeconds"),
    yes("tolerations"),
    yes("topologySpreadConstraints"),
    listed("volumes"),
    // --- security of the pod
    yes("securityContext.appArmorProfile"),
    yes("securityContext.fsGroup"),
    yes("securityContext.fsGroupChangePolicy"),
    yes("securityContext.runAsGroup"),
    yes("securityContext.runAsNonRoot"),
    yes("securityContext.runAsUser"),
    no(
        "securityContext.seLinuxOptions",
        &[],
        "SELinux labels are not set",
    ),
    yes("securityContext.seccompProfile"),
    yes("securityContext.supplementalGroups"),
    yes("securityContext.supplementalGroupsPolicy"),
    yes("securityContext.sysctls"),
    // --- volumes
    yes("volumes[].name"),
    yes("volumes[].configMap"),
    yes("volumes[].emptyDir"),
    yes("volumes[].hostPath"),
    yes("volumes[].image"),
    yes("volumes[].secret"),
    yes("volumes[].csi"),
    yes("volumes[].downwardAPI"),
    yes("volumes[].ephemeral"),
    yes("volumes[].nfs"),
    yes("volumes[].persistentVolumeClaim"),
    listed("volumes[].projected"),
    yes("volumes[].projected.defaultMode"),
    listed("volumes[].projected.sources"),
    yes("volumes[].projected.sources[].configMap"),
    yes("volumes[].projected.sources[].downwardAPI"),
    yes("volumes[].projected.sources[].secret"),
    yes("volumes[].projected.sources[].serviceAccountToken"),
    no("volumes[].awsElasticBlockStore", &[], BY_CSI),
    no("volumes[].azureDisk", &[], BY_CSI),
    no("volumes[].azureFile", &[], BY_CSI),
    no("volumes[].cephfs", &[], BY_CSI),
    no("volumes[].cinder", &[], BY_CSI),
    no("volumes[].fc", &[], BY_CSI_OR_HOST),
    no(
        "volumes[].flexVolume",
        &[],
        "FlexVolume drivers are not run: use a CSI driver",
    ),
    no("volumes[].flocker", &[], BY_CSI),
    no("volumes[].gcePersistentDisk", &[], BY_CSI),
    no(
        "volumes[].gitRepo",
        &[],
        "use an init container that clones into an emptyDir",
    ),
    no("volumes[].glusterfs", &[], BY_CSI),
    no("volumes[].iscsi", &[], BY_CSI_OR_HOST),
    no("volumes[].photonPersistentDisk", &[], BY_CSI),
    no("volumes[].portworxVolume", &[], BY_CSI),
    no("volumes[].quobyte", &[], BY_CSI),
    no("volumes[].rbd", &[], BY_CSI),
    no("volumes[].scaleIO", &[], BY_CSI),
    no("volumes[].storageos", &[], BY_CSI),
    no("volumes[].vsphereVolume", &[], BY_CSI),
];

/// Fields of a container; the same table serves init containers.
pub static CONTAINER: &[Rule] = &[
    yes("args"),
    yes("command"),
    listed("env"),
    yes("env[].name"),
    yes("env[].value"),
    listed("env[].valueFrom"),
    yes("env[].valueFrom.configMapKeyRef"),
    yes("env[].valueFrom.fieldRef"),
    yes("env[].valueFrom.resourceFieldRef"),
    yes("env[].valueFrom.secretKeyRef"),
    yes("envFrom"),
    yes("image"),
    yes("imagePullPolicy"),
    listed("lifecycle"),
    listed("lifecycle.postStart"),
    yes("lifecycle.postStart.exec"),
    yes("lifecycle.postStart.httpGet"),
    yes("lifecycle.postStart.sleep"),
    no("lifecycle.postStart.tcpSocket", &[], TCP_HOOK),
    listed("lifecycle.preStop"),
    yes("lifecycle.preStop.exec"),
    yes("lifecycle.preStop.httpGet"),
    yes("lifecycle.preStop.sleep"),
    no("lifecycle.preStop.tcpSocket", &[], TCP_HOOK),
    yes("lifecycle.stopSignal"),
    listed("livenessProbe"),
    yes("name"),
    listed("ports"),
    yes("ports[].containerPort"),
    Rule {
        note: "TCP and UDP, at the addresses of the node but not at loopback ones",
        ..yes("ports[].hostPort") // see `check`
    },
    yes("ports[].name"),
    yes("ports[].protocol"),
    yes("ports[].hostIP"),
    listed("readinessProbe"),
    listed("resources"),
    yes("resources.limits"),
    yes("resources.requests"),
    no(
        "resources.claims",
        &[],
        "there is no dynamic resource allocation",
    ),
    yes("resizePolicy"),
    yes("restartPolicy"), // of init containers: sidecars
    listed("securityContext"),
    yes("securityContext.allowPrivilegeEscalation"),
    yes("securityContext.appArmorProfile"),
    yes("securityContext.capabilities"),
    yes("securityContext.privileged"),
    yes("securityContext.procMount"),
    yes("securityContext.readOnlyRootFilesystem"),
    yes("securityContext.runAsGroup"),
    yes("securityContext.runAsNonRoot"),
    yes("securityContext.runAsUser"),
    no(
        "securityContext.seLinuxOptions",
        &[],
        "SELinux labels are not set",
    ),
    yes("securityContext.seccompProfile"),
    listed("startupProbe"),
    yes("stdin"),
    yes("stdinOnce"),
    yes("targetContainerName"), // of ephemeral containers
    yes("terminationMessagePath"),
    yes("terminationMessagePolicy"),
    yes("tty"),
    no("volumeDevices", &[], "there are no block volumes yet"),
    listed("volumeMounts"),
    yes("volumeMounts[].mountPath"),
    yes("volumeMounts[].mountPropagation"),
    yes("volumeMounts[].name"),
    yes("volumeMounts[].readOnly"),
    yes("volumeMounts[].recursiveReadOnly"),
    yes("volumeMounts[].subPath"),
    yes("volumeMounts[].subPathExpr"),
    yes("workingDir"),
];

/// Fields of a probe.
pub static PROBE: &[Rule] = &[
    yes("exec"),
    yes("failureThreshold"),
    yes("grpc"),
    yes("httpGet"),
    yes("initialDelaySeconds"),
    yes("periodSeconds"),
    yes("successThreshold"),
    yes("tcpSocket"),
    yes("terminationGracePeriodSeconds"),
    yes("timeoutSeconds"),
];

/// Fields of a Service's spec.
pub static SERVICE_SPEC: &[Rule] = &[
    yes("allocateLoadBalancerNodePorts"),
    yes("clusterIP"),
    yes("clusterIPs"),
    yes("externalIPs"),
    yes("externalName"),
    yes("externalTrafficPolicy"),
    yes("healthCheckNodePort"),
    yes("internalTrafficPolicy"),
    yes("ipFamilies"),
    yes("ipFamilyPolicy"),
    yes("loadBalancerClass"),
    yes("loadBalancerIP"),
    Rule {
        note: "for clients outside of the nodes; those on them are never kept out",
        ..yes("loadBalancerSourceRanges")
    },
    listed("ports"),
    yes("ports[].appProtocol"),
    yes("ports[].name"),
    yes("ports[].nodePort"),
    yes("ports[].port"),
    no(
        "ports[].protocol",
        &["\"TCP\"", "\"UDP\""],
        "SCTP is not balanced; give the pods hostNetwork or use a headless Service without ports",
    ),
    yes("ports[].targetPort"),
    yes("publishNotReadyAddresses"),
    yes("selector"),
    yes("sessionAffinity"),
    yes("sessionAffinityConfig"),
    yes("trafficDistribution"),
    Rule {
        note: "a LoadBalancer without a class gets its address from `gantry-control --load-balancer-pool`",
        ..yes("type")
    },
];

/// Fields of a Deployment's spec, beside its template.
pub static DEPLOYMENT_SPEC: &[Rule] = &[
    yes("minReadySeconds"),
    yes("paused"),
    yes("progressDeadlineSeconds"),
    yes("replicas"),
    yes("revisionHistoryLimit"),
    yes("selector"),
    yes("strategy"),
    yes("template"),
];

/// Fields of a ReplicaSet's spec, beside its template.
pub static REPLICA_SET_SPEC: &[Rule] = &[
    yes("minReadySeconds"),
    yes("replicas"),
    yes("selector"),
    yes("template"),
];

/// Fields of a DaemonSet's spec, beside its template.
pub static DAEMON_SET_SPEC: &[Rule] = &[
    yes("minReadySeconds"),
    yes("revisionHistoryLimit"),
    yes("selector"),
    yes("template"),
    yes("updateStrategy"),
];

/// Fields of a StatefulSet's spec, beside its template.
pub static STATEFUL_SET_SPEC: &[Rule] = &[
    yes("minReadySeconds"),
    yes("ordinals"),
    yes("persistentVolumeClaimRetentionPolicy"),
    yes("podManagementPolicy"),
    yes("replicas"),
    yes("revisionHistoryLimit"),
    yes("selector"),
    yes("serviceName"),
    yes("template"),
    yes("updateStrategy.type"),
    listed("updateStrategy"),
    listed("updateStrategy.rollingUpdate"),
    yes("updateStrategy.rollingUpdate.partition"),
    yes("updateStrategy.rollingUpdate.maxUnavailable"),
    yes("volumeClaimTemplates"),
];

/// Fields of a ReplicationController's spec, beside its template.
pub static REPLICATION_CONTROLLER_SPEC: &[Rule] = REPLICA_SET_SPEC;

/// Fields of a Job's spec, beside its template.
pub static JOB_SPEC: &[Rule] = &[
    yes("activeDeadlineSeconds"),
    yes("backoffLimit"),
    yes("backoffLimitPerIndex"),
    yes("completionMode"),
    yes("completions"),
    no(
        "managedBy",
        &["\"kubernetes.io/job-controller\""],
        "Jobs are run by Gantry",
    ),
    yes("manualSelector"),
    yes("maxFailedIndexes"),
    yes("parallelism"),
    yes("podFailurePolicy"),
    yes("podReplacementPolicy"),
    yes("selector"),
    yes("successPolicy"),
    yes("suspend"),
    yes("template"),
    yes("ttlSecondsAfterFinished"),
];

/// Fields of a CronJob's spec, beside its template.
pub static CRON_JOB_SPEC: &[Rule] = &[
    yes("concurrencyPolicy"),
    yes("failedJobsHistoryLimit"),
    yes("jobTemplate"),
    yes("schedule"),
    yes("startingDeadlineSeconds"),
    yes("successfulJobsHistoryLimit"),
    yes("suspend"),
    yes("timeZone"),
];

/// Fields of a PersistentVolume's spec.
pub static PERSISTENT_VOLUME_SPEC: &[Rule] = &[
    yes("accessModes"),
    yes("capacity"),
    yes("claimRef"),
    listed("csi"),
    warn(
        "csi.controllerExpandSecretRef",
        &[],
        "volumes are not expanded",
    ),
    no(
        "csi.controllerPublishSecretRef",
        &[],
        "volumes are not attached: only drivers without ControllerPublishVolume work",
    ),
    yes("csi.driver"),
    yes("csi.fsType"),
    warn("csi.nodeExpandSecretRef", &[], "volumes are not expanded"),
    yes("csi.nodePublishSecretRef"),
    yes("csi.nodeStageSecretRef"),
    yes("csi.readOnly"),
    yes("csi.volumeAttributes"),
    yes("csi.volumeHandle"),
    yes("hostPath"),
    yes("local.path"),
    listed("local"),
    Rule {
        note: "of nfs and csi; directories (local, hostPath) are mounted as they are, with a warning",
        ..yes("mountOptions")
    },
    yes("nfs"),
    yes("nodeAffinity"),
    warn(
        "persistentVolumeReclaimPolicy",
        &["\"Retain\""],
        "volumes that Gantry made are deleted; one made by hand stays, as Failed",
    ),
    yes("storageClassName"),
    no(
        "volumeMode",
        &["\"Filesystem\""],
        "there are no block volumes yet",
    ),
    no("awsElasticBlockStore", &[], BY_CSI),
    no("azureDisk", &[], BY_CSI),
    no("azureFile", &[], BY_CSI),
    no("cephfs", &[], BY_CSI),
    no("cinder", &[], BY_CSI),
    no("fc", &[], BY_CSI_OR_HOST),
    no(
        "flexVolume",
        &[],
        "FlexVolume drivers are not run: use a CSI driver",
    ),
    no("flocker", &[], BY_CSI),
    no("gcePersistentDisk", &[], BY_CSI),
    no("glusterfs", &[], BY_CSI),
    no("iscsi", &[], BY_CSI_OR_HOST),
    no("photonPersistentDisk", &[], BY_CSI),
    no("portworxVolume", &[], BY_CSI),
    no("quobyte", &[], BY_CSI),
    no("rbd", &[], BY_CSI),
    no("scaleIO", &[], BY_CSI),
    no("storageos", &[], BY_CSI),
    no("vsphereVolume", &[], BY_CSI),
];

/// Fields of a PersistentVolumeClaim's spec.
pub static PERSISTENT_VOLUME_CLAIM_SPEC: &[Rule] = &[
    yes("accessModes"),
    no("dataSource", &[], "volumes start empty"),
    no("dataSourceRef", &[], "volumes start empty"),
    yes("resources"),
    yes("selector"),
    yes("storageClassName"),
    no(
        "volumeMode",
        &["\"Filesystem\""],
        "there are no block volumes yet",
    ),
    yes("volumeName"),
];

/// Fields of a NetworkPolicy's spec.
pub static NETWORK_POLICY_SPEC: &[Rule] = &[
    listed("egress"),
    yes("egress[].to"),
    listed("egress[].ports"),
    yes("egress[].ports[].endPort"),
    yes("egress[].ports[].port"),
    no("egress[].ports[].protocol", TCP_OR_UDP, NO_SCTP),
    listed("ingress"),
    yes("ingress[].from"),
    listed("ingress[].ports"),
    yes("ingress[].ports[].endPort"),
    yes("ingress[].ports[].port"),
    no("ingress[].ports[].protocol", TCP_OR_UDP, NO_SCTP),
    Rule {
        note: "pods with hostNetwork are never selected: their traffic is the node's",
        ..yes("podSelector")
    },
    yes("policyTypes"),
];

/// Fields of a HorizontalPodAutoscaler's spec.
pub static HORIZONTAL_POD_AUTOSCALER_SPEC: &[Rule] = &[
    yes("behavior"),
    yes("maxReplicas"),
    listed("metrics"),
    yes("metrics[].containerResource"),
    no("metrics[].external", &[], ONLY_MEASURED),
    no("metrics[].object", &[], ONLY_MEASURED),
    no("metrics[].pods", &[], ONLY_MEASURED),
    yes("metrics[].resource"),
    yes("metrics[].type"),
    yes("minReplicas"),
    yes("scaleTargetRef"),
];

const ONLY_MEASURED: &str = "there is no metrics adapter: cpu and memory, of pods or containers, as the agents measure them";

const TCP_OR_UDP: &[&str] = &["\"TCP\"", "\"UDP\""];
const NO_SCTP: &str = "SCTP is not tracked; a policy without ports speaks of every protocol";

/// What the support table says about one object.
#[derive(Debug, Default)]
pub struct Findings {
    /// Refused fields.
    pub errors: Vec<FieldError>,
    /// Accepted fields without effect: `spec.affinity: the scheduler does not read it yet`.
    pub warnings: Vec<String>,
}

struct Table(HashMap<&'static str, &'static Rule>);

impl Table {
    fn new(rules: &'static [Rule]) -> Self {
        Self(rules.iter().map(|rule| (rule.path, rule)).collect())
    }
}

static POD_SPEC_TABLE: LazyLock<Table> = LazyLock::new(|| Table::new(POD_SPEC));
static CONTAINER_TABLE: LazyLock<Table> = LazyLock::new(|| Table::new(CONTAINER));
static PROBE_TABLE: LazyLock<Table> = LazyLock::new(|| Table::new(PROBE));
static SERVICE_TABLE: LazyLock<Table> = LazyLock::new(|| Table::new(SERVICE_SPEC));
static DEPLOYMENT_TABLE: LazyLock<Table> = LazyLock::new(|| Table::new(DEPLOYMENT_SPEC));
static REPLICA_SET_TABLE: LazyLock<Table> = LazyLock::new(|| Table::new(REPLICA_SET_SPEC));
static DAEMON_SET_TABLE: LazyLock<Table> = LazyLock::new(|| Table::new(DAEMON_SET_SPEC));
static STATEFUL_SET_TABLE: LazyLock<Table> = LazyLock::new(|| Table::new(STATEFUL_SET_SPEC));
static VOLUME_TABLE: LazyLock<Table> = LazyLock::new(|| Table::new(PERSISTENT_VOLUME_SPEC));
static CLAIM_TABLE: LazyLock<Table> = LazyLock::new(|| Table::new(PERSISTENT_VOLUME_CLAIM_SPEC));
static JOB_TABLE: LazyLock<Table> = LazyLock::new(|| Table::new(JOB_SPEC));
static CRON_JOB_TABLE: LazyLock<Table> = LazyLock::new(|| Table::new(CRON_JOB_SPEC));
static SCALER_TABLE: LazyLock<Table> = LazyLock::new(|| Table::new(HORIZONTAL_POD_AUTOSCALER_SPEC));
static POLICY_TABLE: LazyLock<Table> = LazyLock::new(|| Table::new(NETWORK_POLICY_SPEC));

/// The table of a workload's spec.
fn workload_table(kind: &Kind) -> Option<&'static Table> {
    Some(match kind.kind {
        "Deployment" => &DEPLOYMENT_TABLE,
        "ReplicaSet" | "ReplicationController" => &REPLICA_SET_TABLE,
        "DaemonSet" => &DAEMON_SET_TABLE,
        "StatefulSet" => &STATEFUL_SET_TABLE,
        "Job" => &JOB_TABLE,
        "CronJob" => &CRON_JOB_TABLE,
        "PersistentVolume" => &VOLUME_TABLE,
        "PersistentVolumeClaim" => &CLAIM_TABLE,
        "HorizontalPodAutoscaler" => &SCALER_TABLE,
        _ => return None,
    })
}

/// A workload's own fields, then those of its pods. The templates themselves are honoured as a whole.
fn check_workload(table: &Table, spec: &Value, path: &Path, findings: &mut Findings) {
    walk(table, "", spec, path, Level::Listed, findings);
    if let Some(pod) = spec.pointer("/template/spec") {
        check_pod_spec(pod, &path.child("template").child("spec"), findings);
    }
    let claims = spec.get("volumeClaimTemplates").and_then(Value::as_array);
    for (i, claim) in claims.into_iter().flatten().enumerate() {
        let path = path.child("volumeClaimTemplates").index(i);
        check_claim(claim, &path, findings);
    }
    if let Some(job) = spec.pointer("/jobTemplate/spec") {
        let path = path.child("jobTemplate").child("spec");
        check_workload(&JOB_TABLE, job, &path, findings);
    }
}

/// The spec of a claim inside something else.
fn check_claim(claim: &Value, path: &Path, findings: &mut Findings) {
    if let Some(spec) = claim.get("spec") {
        let path = path.child("spec");
        walk(&CLAIM_TABLE, "", spec, &path, Level::Listed, findings);
    }
}

/// Judges a decoded object (unknown fields are already gone) by the table.
#[must_use]
pub fn check(kind: &Kind, object: &Value) -> Findings {
    let mut findings = Findings::default();
    let Some(spec) = object.get("spec") else {
        return findings;
    };
    let path = Path::new("spec");
    match kind.kind {
        "Pod" => check_pod_spec(spec, &path, &mut findings),
        "Service" => walk(
            &SERVICE_TABLE,
            "",
            spec,
            &path,
            Level::Listed,
            &mut findings,
        ),
        "NetworkPolicy" => walk(&POLICY_TABLE, "", spec, &path, Level::Listed, &mut findings),
        _ => {
            if let Some(table) = workload_table(kind) {
                check_workload(table, spec, &path, &mut findings);
            }
        }
    }
    if kind.kind == "PersistentVolume" {
        check_mount_options(spec, &path, &mut findings);
    }
    findings
}

/// A directory of the node is bind-mounted: options of a mount have no place there.
fn check_mount_options(spec: &Value, path: &Path, findings: &mut Findings) {
    let is_directory = ["hostPath", "local"].iter().any(|f| spec.get(f).is_some());
    if is_directory && spec.get("mountOptions").is_some_and(|o| !is_off(o)) {
        let path = path.child("mountOptions");
        findings.warnings.push(format!(
            "{path}: accepted without effect: directories are mounted as they are"
        ));
    }
}

fn check_pod_spec(spec: &Value, path: &Path, findings: &mut Findings) {
    walk(&POD_SPEC_TABLE, "", spec, path, Level::Listed, findings);
    let volumes = spec.get("volumes").and_then(Value::as_array);
    for (i, volume) in volumes.into_iter().flatten().enumerate() {
        if let Some(claim) = volume.pointer("/ephemeral/volumeClaimTemplate") {
            let path = path.child("volumes").index(i).child("ephemeral");
            check_claim(claim, &path.child("volumeClaimTemplate"), findings);
        }
    }
    let host_network = spec.get("hostNetwork") == Some(&Value::Bool(true));
    for list in ["containers", "initContainers", "ephemeralContainers"] {
        let containers = spec.get(list).and_then(Value::as_array);
        for (i, container) in containers.into_iter().flatten().enumerate() {
            let path = path.child(list).index(i);
            walk(
                &CONTAINER_TABLE,
                "",
                container,
                &path,
                Level::Listed,
                findings,
            );
            check_ports(container, &path, host_network, findings);
            check_resources(container, &path, findings);
            for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
                if let Some(value) = container.get(probe) {
                    let path = path.child(probe);
                    walk(&PROBE_TABLE, "", value, &path, Level::Listed, findings);
                }
            }
        }
    }
}

fn check_ports(container: &Value, path: &Path, host_network: bool, findings: &mut Findings) {
    let ports = container.get("ports").and_then(Value::as_array);
    for (i, port) in ports.into_iter().flatten().enumerate() {
        let of_sctp = port.get("protocol").is_some_and(|name| name == "SCTP");
        if of_sctp && !host_network && port.get("hostPort").is_some_and(|p| !is_off(p)) {
            let path = path.child("ports").index(i).child("hostPort");
            let note = "host ports are of TCP or UDP: use hostNetwork for SCTP";
            findings.errors.push(FieldError::forbidden(&path, note));
        }
    }
}

fn check_resources(container: &Value, path: &Path, findings: &mut Findings) {
    for list in ["limits", "requests"] {
        let entries = container
            .pointer(&format!("/resources/{list}"))
            .and_then(Value::as_object);
        for name in entries.into_iter().flat_map(|map| map.keys()) {
            let path = path.child("resources").child(list).key(name);
            match name.as_str() {
                "cpu" | "memory" | "ephemeral-storage" => {}
                // Offered where the node can limit them: elsewhere the pod waits for such a node.
                pages if pages.starts_with("hugepages-") => {}
                // Offered by device plugins, on nodes that have one.
                device if device.contains('/') && !device.contains("kubernetes.io/") => {}
                _ => {
                    let note = "not supported by Gantry: nodes offer cpu, memory, local storage, huge pages and \
                                what device plugins name (vendor.example/kind)";
                    findings.errors.push(FieldError::forbidden(&path, note));
                }
            }
        }
    }
}

/// Whether a value asks for nothing.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(b) => !b,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
    }
}

fn walk(table: &Table, at: &str, value: &Value, path: &Path, level: Level, out: &mut Findings) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let at = if at.is_empty() {
                    key.clone()
                } else {
                    format!("{at}.{key}")
                };
                judge(table, &at, value, &path.child(key), level, out);
            }
        }
        Value::Array(list) => {
            let at = format!("{at}[]");
            for (i, value) in list.iter().enumerate() {
                walk(table, &at, value, &path.index(i), level, out);
            }
        }
        _ => {}
    }
}

fn judge(table: &Table, at: &str, value: &Value, path: &Path, level: Level, out: &mut Findings) {
    // An empty volume source is a real request (`emptyDir: {}`); a refused one stays refused.
    let source = at.starts_with("volumes[].") && value.is_object();
    if is_off(value) && !source {
        return;
    }
    let rule = table.0.get(at);
    let (level, note) = match rule {
        Some(rule) => (rule.level, rule.note),
        None if level == Level::Yes => (Level::Yes, ""),
        None => (Level::No, "unknown to this version"),
    };
    // Containers and probes have tables of their own.
    let elsewhere = level == Level::Listed
        && matches!(
            at,
            "containers"
                | "ephemeralContainers"
                | "initContainers"
                | "livenessProbe"
                | "readinessProbe"
                | "startupProbe"
        );
    match level {
        Level::Yes => {}
        Level::Listed if elsewhere => {}
        Level::Listed => walk(table, at, value, path, level, out),
        Level::Warn | Level::No => {
            let text = value.to_string();
            if rule.is_some_and(|rule| rule.except.contains(&text.as_str())) {
                return;
            }
            if level == Level::Warn {
                out.warnings
                    .push(format!("{path}: accepted without effect: {note}"));
            } else {
                let text = format!("not supported by Gantry yet: {note}");
                out.errors.push(FieldError::forbidden(path, &text));
            }
        }
    }
}

/// The table as Markdown, for the README.
#[must_use]
pub fn matrix() -> String {
    let mut text = String::from("| Field | Gantry | Note |\n|---|---|---|\n");
    let parts: [(&str, &[Rule]); 15] = [
        ("pod.spec", POD_SPEC),
        ("pod.spec.containers[]", CONTAINER),
        ("pod.spec.containers[].*Probe", PROBE),
        ("service.spec", SERVICE_SPEC),
        ("deployment.spec", DEPLOYMENT_SPEC),
        ("replicaset.spec", REPLICA_SET_SPEC),
        ("replicationcontroller.spec", REPLICATION_CONTROLLER_SPEC),
        ("daemonset.spec", DAEMON_SET_SPEC),
        ("statefulset.spec", STATEFUL_SET_SPEC),
        ("job.spec", JOB_SPEC),
        ("cronjob.spec", CRON_JOB_SPEC),
        ("persistentvolume.spec", PERSISTENT_VOLUME_SPEC),
        ("persistentvolumeclaim.spec", PERSISTENT_VOLUME_CLAIM_SPEC),
        ("networkpolicy.spec", NETWORK_POLICY_SPEC),
        (
            "horizontalpodautoscaler.spec",
            HORIZONTAL_POD_AUTOSCALER_SPEC,
        ),
    ];
    for (prefix, rules) in parts {
        for rule in rules.iter().filter(|r| r.level != Level::Listed) {
            let level = match rule.level {
                Level::Yes | Level::Listed => "yes",
                Level::Warn => "warned",
                Level::No => "refused",
            };
            let mut note = rule.note.to_owned();
            if !rule.except.is_empty() {
                let _ = write!(note, " (accepted: {})", rule.except.join(", "));
            }
            let _ = writeln!(text, "| `{prefix}.{}` | {level} | {note} |", rule.path);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::resolve;
    use serde_json::json;

    fn pod(spec: &Value) -> Findings {
        check(resolve("pod").unwrap(), &json!({"spec": spec}))
    }

    /// The README's table is this one: `GANTRY_BLESS=1 cargo test -p gantry-api readme` rewrites it.
    #[test]
    fn the_readme_has_this_matrix() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md");
        let readme = std::fs::read_to_string(path).unwrap();
        let (begin, end) = ("<!-- fields: begin -->\n", "<!-- fields: end -->");
        let from = readme.find(begin).unwrap() + begin.len();
        let to = readme.find(end).unwrap();
        if std::env::var_os("GANTRY_BLESS").is_some() {
            let text = format!("{}{}{}", &readme[..from], matrix(), &readme[to..]);
            std::fs::write(path, text).unwrap();
            return;
        }
        assert!(
            readme[from..to] == matrix(),
            "README.md: GANTRY_BLESS=1 rewrites the matrix"
        );
    }

    #[test]
    fn refused_fields_are_named_by_path() {
        let findings = pod(&json!({
            "hostUsers": false,
            "containers": [{"name": "a", "lifecycle": {"preStop": {"tcpSocket": {"port": 1}}},
                "ports": [{"containerPort": 80, "hostPort": 80, "protocol": "SCTP"}],
                "resources": {"limits": {"nvidia.com/gpu": "1", "disk": "1"}},
                "volumeDevices": [{"name": "b", "devicePath": "/dev/b"}]}],
            "volumes": [{"name": "v", "gcePersistentDisk": {"pdName": "x"}},
                {"name": "g", "gitRepo": {}}, {"name": "e", "emptyDir": {}},
                {"name": "c", "csi": {"driver": "x"}},
                {"name": "n", "nfs": {"server": "s", "path": "/"}}]
        }));
        let fields: Vec<&str> = findings.errors.iter().map(|e| e.field.as_str()).collect();
        for field in [
            "spec.containers[0].lifecycle.preStop.tcpSocket",
            "spec.containers[0].ports[0].hostPort",
            "spec.containers[0].resources.limits[disk]",
            "spec.containers[0].volumeDevices",
            "spec.volumes[0].gcePersistentDisk",
            "spec.volumes[1].gitRepo",
        ] {
            assert!(fields.contains(&field), "{field} in {fields:?}");
        }
        assert_eq!(fields.len(), 6, "{fields:?}");
        let disk = findings.errors.iter().find(|e| e.field.contains("Disk"));
        let words = disk.unwrap().to_string();
        assert!(words.contains("use its CSI driver"), "{words}");
    }

    #[test]
    fn harmless_fields_warn_and_defaults_do_not() {
        let findings = pod(&json!({
            "affinity": {"nodeAffinity": {"x": 1}}, "priorityClassName": "high",
            "serviceAccountName": "web", "schedulerName": "mine",
            "automountServiceAccountToken": true, "hostPID": false, "securityContext": {},
            "containers": [{"name": "a", "terminationMessagePath": "/dev/termination-log"}]
        }));
        assert!(findings.errors.is_empty(), "{:?}", findings.errors);
        assert!(findings.warnings.is_empty(), "{:?}", findings.warnings);
        let claim = json!({"spec": {"persistentVolumeReclaimPolicy": "Recycle"}});
        let findings = check(resolve("persistentvolume").unwrap(), &claim);
        assert!(
            findings.warnings[0].starts_with("spec.persistentVolumeReclaimPolicy: "),
            "{findings:?}"
        );
    }

    #[test]
    fn what_the_table_does_not_know_is_refused() {
        let findings = pod(&json!({"overhead": {"cpu": "1"}, "containers": [{"name": "a"}]}));
        assert_eq!(findings.errors[0].field, "spec.overhead");
    }

    #[test]
    fn a_volumes_source_is_judged_by_field() {
        let volume = |spec: Value| {
            let findings = check(resolve("pv").unwrap(), &json!({"spec": spec}));
            let refused = findings.errors.into_iter().map(|e| e.field);
            (refused.collect::<Vec<_>>(), findings.warnings)
        };
        let csi = json!({"driver": "x", "volumeHandle": "h", "volumeAttributes": {"a": "b"},
            "nodeStageSecretRef": {"name": "s", "namespace": "n"}});
        let fine = json!({"csi": csi, "mountOptions": ["ro"]});
        assert_eq!(volume(fine), (vec![], vec![]));
        let attached = json!({"csi": {"controllerPublishSecretRef": {"name": "s"}}});
        assert_eq!(volume(attached).0, ["spec.csi.controllerPublishSecretRef"]);
        assert_eq!(volume(json!({"iscsi": {"lun": 1}})).0, ["spec.iscsi"]);
        let nfs = json!({"nfs": {"server": "s", "path": "/"}, "mountOptions": ["nfsvers=4.1"]});
        assert_eq!(volume(nfs), (vec![], vec![]));
        let local = json!({"local": {"path": "/x"}, "mountOptions": ["ro"]});
        assert!(volume(local).1[0].starts_with("spec.mountOptions: "));
    }

    #[test]
    fn sctp_is_refused_in_policies() {
        let policy = json!({"spec": {
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"a": "b"}}}],
                "ports": [{"protocol": "UDP", "port": 53, "endPort": 54}]}],
            "egress": [{"ports": [{"port": "http"}, {"protocol": "SCTP", "port": 1}]}],
            "podSelector": {}, "policyTypes": ["Ingress"]}});
        let findings = check(resolve("netpol").unwrap(), &policy);
        let errors: Vec<String> = findings.errors.iter().map(ToString::to_string).collect();
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(
            errors[0].starts_with("spec.egress[0].ports[1].protocol: Forbidden: not supported"),
            "{errors:?}"
        );
    }

    #[test]
    fn templates_are_judged_too() {
        let object = json!({"spec": {"template": {"spec": {"containers": [
            {"name": "a", "volumeDevices": [{"name": "v"}]}]}}}});
        let findings = check(resolve("deploy").unwrap(), &object);
        assert_eq!(
            findings.errors[0].field,
            "spec.template.spec.containers[0].volumeDevices"
        );
    }

    #[test]
    fn claims_inside_pods_and_sets_are_judged_too() {
        let claim = json!({"spec": {"volumeMode": "Block", "accessModes": ["ReadWriteOnce"]}});
        let findings = pod(&json!({"containers": [{"name": "a"}], "volumes": [
            {"name": "v", "ephemeral": {"volumeClaimTemplate": claim}},
            {"name": "c", "persistentVolumeClaim": {"claimName": "c"}}]}));
        let fields: Vec<&str> = findings.errors.iter().map(|e| e.field.as_str()).collect();
        let at = "spec.volumes[0].ephemeral.volumeClaimTemplate.spec.volumeMode";
        assert_eq!(fields, [at]);
        let object = json!({"spec": {"volumeClaimTemplates": [claim]}});
        let findings = check(resolve("sts").unwrap(), &object);
        let at = "spec.volumeClaimTemplates[0].spec.volumeMode";
        assert_eq!(findings.errors[0].field, at);
    }

    #[test]
    fn no_path_is_listed_twice_and_the_matrix_shows_all() {
        for rules in [POD_SPEC, CONTAINER, PROBE, SERVICE_SPEC, DEPLOYMENT_SPEC] {
            assert_eq!(Table::new(rules).0.len(), rules.len());
        }
        assert!(
            matrix().contains("| `pod.spec.containers[].lifecycle.preStop.tcpSocket` | refused |")
        );
    }
}
