//! Device plugins: a pod gets the device and nobody else does, and it keeps it.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::Value;
use tokio::sync::watch;

use super::sleeper;
use crate::cluster::{Cluster, NODE, is_ready};
use crate::device_plugin::{self, CDI_SPEC, HOOK_FILE, HOST_PATH, RESOURCE};

const LIMIT: Duration = Duration::from_secs(120);
const SPEC: &str = "/var/run/cdi/gantry-tests.json";

/// The plugin, and its files, for as long as the scenario runs.
struct Plugin {
    _runtime: tokio::runtime::Runtime,
    healthy: watch::Sender<bool>,
}

impl Plugin {
    fn start() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let (healthy, receiver) = watch::channel(true);
        let mode = Mode::from_bits_truncate(0o666);
        let _ = std::fs::remove_file(HOST_PATH);
        mknod(HOST_PATH, SFlag::S_IFCHR, mode, makedev(10, 229)).context("make a device node")?;
        // The hook runs in the container's namespaces, its users among them.
        std::fs::write(HOOK_FILE, "")?;
        std::fs::set_permissions(HOOK_FILE, Permissions::from_mode(0o666))?;
        std::fs::create_dir_all("/var/run/cdi")?;
        std::fs::write(SPEC, CDI_SPEC)?;
        runtime.spawn(async move {
            let directory = Path::new(gantry_agent::devices::DIRECTORY);
            if let Err(error) = device_plugin::serve(directory, receiver).await {
                eprintln!("the example device plugin: {error:#}");
            }
        });
        Ok(Self {
            _runtime: runtime,
            healthy,
        })
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(SPEC);
        let _ = std::fs::remove_file(HOST_PATH);
        let _ = std::fs::remove_file(HOOK_FILE);
        let _ = std::fs::remove_dir("/var/run/cdi");
        let _ = std::fs::remove_dir_all(gantry_agent::devices::DIRECTORY);
        let _ = std::fs::remove_dir("/var/lib/kubelet");
    }
}

fn user(name: &str) -> String {
    sleeper(
        name,
        &format!("      resources: {{limits: {{{RESOURCE}: 1}}}}\n"),
    )
}

fn offered(cluster: &Cluster) -> Result<(Value, Value)> {
    let status = cluster.get(&["node", NODE])?["status"].take();
    Ok((
        status["capacity"][RESOURCE].clone(),
        status["allocatable"][RESOURCE].clone(),
    ))
}

fn held(cluster: &Cluster, pod: &str) -> Result<String> {
    // Where the kernel lacks the driver, the device is permitted and not there.
    let script = "echo $EXAMPLE_DEVICES; ls -l /dev/example; \
                  dd if=/dev/example of=/dev/null count=0 2>&1 | grep permitted; true";
    let said = cluster.ok(&["exec", pod, "--", "sh", "-c", script])?;
    ensure!(
        !said.contains("permitted"),
        "pod {pod} cannot open its device: {said}"
    );
    Ok(said)
}

/// `hostUsers: false`: no node can be made there, so the device is mounted. Where the kernel has no
/// id-mapped mounts of the pod's files, there are no such pods, and nothing to see.
fn in_a_user_namespace(cluster: &Cluster) -> Result<()> {
    cluster.apply_ok(&format!("{}  hostUsers: false\n", user("mapped")))?;
    let refused = |c: &Cluster| -> Result<bool> {
        Ok(c.ok(&["describe", "pod", "mapped"])?
            .contains("show the pod's ids"))
    };
    cluster.wait("a pod with users of its own to run", LIMIT, |c| {
        Ok(is_ready(&c.get(&["pod", "mapped"])?) || refused(c)?)
    })?;
    if refused(cluster)? {
        eprintln!(
            "    no pods with users of their own on this kernel: their devices are not looked at"
        );
        return Ok(());
    }
    let said = held(cluster, "mapped")?;
    ensure!(said.contains("10, 229"), "in a user namespace: {said:?}");
    Ok(())
}

/// Two devices and three pods: two run, with a device each that the kernel lets them open, and the
/// third waits; an agent restart changes nothing; sick devices are not offered.
pub(super) fn device_plugins(cluster: &mut Cluster) -> Result<()> {
    let plugin = Plugin::start()?;
    cluster.wait("the node to offer two devices", LIMIT, |c| {
        Ok(offered(c)? == ("2".into(), "2".into()))
    })?;
    for name in ["one", "two"] {
        cluster.apply_ok(&user(name))?;
        cluster.wait_ready("default", name)?;
    }
    let (one, two) = (held(cluster, "one")?, held(cluster, "two")?);
    ensure!(
        one.contains("10, 229")
            && two.contains("10, 229")
            && one.lines().next() != two.lines().next(),
        "devices of the two pods: {one:?} {two:?}"
    );

    // One of them came by a CDI name, whose hook was told of the container.
    let state = std::fs::read_to_string(HOOK_FILE).context("the hook has left nothing")?;
    let state: Value = serde_json::from_str(&state).context("what the hook was told")?;
    let bundle = state["bundle"].as_str().unwrap_or_default();
    ensure!(
        Path::new(bundle).join("config.json").exists() && state["status"] == "creating",
        "the hook was told {state}"
    );

    cluster.apply_ok(&user("three"))?;
    cluster.wait("the third pod to be told why it waits", LIMIT, |c| {
        let pod = c.get(&["pod", "three"])?;
        Ok(pod
            .to_string()
            .contains(&format!("Insufficient {RESOURCE}")))
    })?;
    // A pod that was given none cannot open it, though it may make the node.
    cluster.apply_ok(&sleeper("none", ""))?;
    cluster.wait_ready("default", "none")?;
    let script = "mknod /tmp/f c 10 229; dd if=/tmp/f of=/dev/null count=0 2>&1; rm /tmp/f";
    let output = cluster.gantry(&["exec", "none", "--", "sh", "-c", script])?;
    ensure!(
        output.stdout.contains("not permitted"),
        "a pod opened a device of others: {output:?}"
    );

    cluster.kill_agent()?;
    cluster.start_agent()?;
    cluster.wait("both pods to have what they had", LIMIT, |c| {
        Ok(held(c, "one")? == one && held(c, "two")? == two)
    })?;
    cluster.wait("the node to offer them again", LIMIT, |c| {
        Ok(offered(c)? == ("2".into(), "2".into()))
    })?;
    cluster.ok(&["delete", "pod", "two"])?;
    cluster.wait_ready("default", "three")?;
    let three = held(cluster, "three")?;
    ensure!(
        three.lines().next() == two.lines().next(),
        "{three:?}, wanted what two had: {two:?}"
    );

    cluster.ok(&["delete", "pod", "three"])?;
    in_a_user_namespace(cluster)?;

    plugin.healthy.send_replace(false);
    cluster.wait("sick devices not to be offered", LIMIT, |c| {
        Ok(offered(c)? == ("2".into(), "0".into()))
    })?;
    let node = cluster.get(&["node", NODE])?;
    node["status"]["allocatable"]["cpu"]
        .as_str()
        .context("no cpu is allocatable any more")?;
    Ok(())
}
