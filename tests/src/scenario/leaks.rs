//! A node that has done much holds no more than before.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::cluster::{Cluster, is_ready};
use crate::inventory;

const POD_COUNT: usize = 50;
/// The same where this process is init: of a virtual machine, which may be an emulated one.
const VIRTUAL_POD_COUNT: usize = 12;
/// So many of them have an exec probe: few a second, with a patience that outlasts a busy machine.
/// Probes that time out and are begun again would only keep it busy.
const PROBED_COUNT: usize = 20;
/// For fifty pods on a machine that is busy with other things.
const LIMIT: Duration = Duration::from_secs(120);

/// Fifty pods, as many execs, and exec probes: afterwards no more descriptors, zombies, links,
/// mounts, cgroups, leases, files and map entries than before.
pub(super) fn leaks(cluster: &mut Cluster) -> Result<()> {
    let is_virtual = std::process::id() == 1;
    let count = if is_virtual {
        VIRTUAL_POD_COUNT
    } else {
        POD_COUNT
    };
    let names: Vec<String> = (0..count).map(|n| format!("leak-{n}")).collect();
    // What the first pods make for all: filters, connections, ready namespaces.
    round(cluster, &names[..4])?;
    let agent = cluster.agent_pid()?;
    let before = inventory::settled(agent, LIMIT)?;
    round(cluster, &names)?;
    ensure!(cluster.agent_pid()? == agent, "the agent was started again");
    inventory::wait_for_no_more(&before, agent, LIMIT)
}

/// Makes them, runs a command in each, deletes them.
fn round(cluster: &Cluster, names: &[String]) -> Result<()> {
    cluster.apply_ok(&manifest(names))?;
    let count = names.len();
    cluster.wait(&format!("{count} ready pods"), LIMIT, |c| {
        let list = c.get(&["pods"])?;
        let pods = list["items"].as_array().into_iter().flatten();
        Ok(pods.filter(|pod| is_ready(pod)).count() == count)
    })?;
    for name in names {
        let output = cluster.gantry(&["exec", name, "--", "sh", "-c", "echo here; exit 3"])?;
        ensure!(output.code == 3 && output.stdout == "here\n", "{output:?}");
    }
    let mut delete = vec!["delete", "pod", "--timeout=120s"];
    delete.extend(names.iter().map(String::as_str));
    cluster.ok(&delete).map(drop)
}

/// All are backends of one Service.
fn manifest(names: &[String]) -> String {
    let mut text = String::from(
        "apiVersion: v1
kind: Service
metadata: {name: leaks}
spec:
  selector: {app: leaks}
  ports: [{port: 80}]
",
    );
    for (number, name) in names.iter().enumerate() {
        let _ = write!(
            text,
            "---
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  labels: {{app: leaks}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sh\", \"-c\", \"trap 'exit 0' TERM; sleep 3600 & wait\"]
"
        );
        if number < PROBED_COUNT {
            text.push_str(
                "      readinessProbe: {exec: {command: [\"true\"]}, periodSeconds: 4, timeoutSeconds: 60}\n",
            );
        }
    }
    text
}
