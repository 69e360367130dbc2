//! The token of a pod's service account: what it opens, and that it is a new one in time.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::life_cycle::host_pid;
use super::sleeper;
use crate::cluster::{Cluster, KUBECONFIG, Output, run};

/// The shortest life that the control plane may be told.
const LIFE_S: &str = "30";
/// Its life, and a busy machine.
const LIMIT: Duration = Duration::from_secs(90);
const TOKEN: &str = "var/run/secrets/kubernetes.io/serviceaccount/token";

const RIGHTS: &str = "apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: readers}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}
subjects: [{kind: ServiceAccount, name: default, namespace: default}]
";

/// While the pod runs its file has a token that is good; an old one is refused when its time is over,
/// and a good one when its pod has gone.
pub(super) fn tokens(cluster: &mut Cluster) -> Result<()> {
    cluster.kill_control()?;
    cluster.start_control_with(&["--service-account-max-token-expiration-s", LIFE_S])?;
    cluster.apply_ok(RIGHTS)?;
    cluster.apply_ok(&sleeper("caller", ""))?;
    cluster.wait_ready("default", "caller")?;
    let pid = host_pid(cluster, "caller", "main", 0)?;
    let file = Path::new("/proc")
        .join(pid.to_string())
        .join("root")
        .join(TOKEN);
    let first = std::fs::read_to_string(&file).context("the pod's token")?;
    let directory = tempfile::tempdir()?;
    let old = kubeconfig(directory.path(), "old", &first)?;
    let as_pod = |config: &Path, words: &[&str]| -> Result<Output> {
        run(cluster.command(words).env("KUBECONFIG", config))
    };
    let who = as_pod(&old, &["auth", "whoami"])?;
    let name = "system:serviceaccount:default:default";
    ensure!(who.code == 0 && who.stdout.contains(name), "{who:?}");
    ensure!(as_pod(&old, &["get", "pods"])?.code == 0);
    let secrets = as_pod(&old, &["get", "secrets"])?;
    ensure!(secrets.stderr.contains("forbidden"), "{secrets:?}");

    cluster.wait("another token in the pod", LIMIT, |_| {
        Ok(std::fs::read_to_string(&file)? != first)
    })?;
    let new = kubeconfig(directory.path(), "new", &std::fs::read_to_string(&file)?)?;
    ensure!(as_pod(&new, &["get", "pods"])?.code == 0);
    cluster.wait("the old token to be refused", LIMIT, |_| {
        let refused = as_pod(&old, &["get", "pods"])?;
        Ok(refused.code != 0 && refused.stderr.contains("it has expired"))
    })?;
    let log = String::from_utf8_lossy(&cluster.log("gantry-agent")?).into_owned();
    ensure!(!log.contains(first.trim()), "the agent has logged a token");

    let last = kubeconfig(directory.path(), "last", &std::fs::read_to_string(&file)?)?;
    cluster.ok(&["delete", "pod", "caller", "--timeout=60s"])?;
    let gone = as_pod(&last, &["get", "pods"])?;
    ensure!(gone.stderr.contains("its pod is gone"), "{gone:?}");
    Ok(())
}

/// The administrator's file with a token in the place of the certificate.
fn kubeconfig(directory: &Path, name: &str, token: &str) -> Result<PathBuf> {
    let admin = std::fs::read_to_string(KUBECONFIG)?;
    let mut text = String::new();
    for line in admin.lines() {
        match line.trim_start() {
            data if data.starts_with("client-key-data:") => continue,
            data if data.starts_with("client-certificate-data:") => {
                text += &format!("    token: {token}\n");
            }
            _ => text += &format!("{line}\n"),
        }
    }
    let path = directory.join(name);
    std::fs::write(&path, text)?;
    Ok(path)
}
