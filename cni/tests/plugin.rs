//! `gantry-bridge` as a container runtime drives it: environment, stdin, stdout, exit code.
//!
//! Each test has a network namespace of its own as the node; pods are threads in further ones.

#![allow(clippy::unwrap_used, reason = "a test's panic is its error report")]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;

use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

/// Runs `test` on a thread in a new network namespace; skips without root.
fn on_a_node(test: impl FnOnce(&Path) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let node = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        test(tempfile::tempdir().unwrap().path());
    });
    node.join().unwrap();
}

/// A pod's network namespace: it exists while this value does.
struct Pod {
    netns: String,
    _alive: mpsc::Sender<()>,
}

fn pod() -> Pod {
    let (alive, ended) = mpsc::channel::<()>();
    let (sender, ready) = mpsc::channel();
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        sender.send(nix::unistd::gettid()).unwrap();
        // Ends when the sender is dropped.
        let _ = ended.recv();
    });
    let (pid, tid) = (std::process::id(), ready.recv().unwrap());
    Pod {
        netns: format!("/proc/{pid}/task/{tid}/ns/net"),
        _alive: alive,
    }
}

fn config(dir: &Path, version: &str) -> Value {
    json!({
        "cniVersion": version,
        "name": "test",
        "type": "gantry-bridge",
        "subnets": ["10.66.0.0/29"],
        "leaseDir": dir.join("ipam"),
    })
}

/// Calls the plugin; returns its exit as a bool and what it printed.
fn call(verb: &str, id: &str, netns: &str, config: &Value) -> (bool, Option<Value>) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_gantry-bridge"))
        .env_clear()
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", id)
        .env("CNI_NETNS", netns)
        .env("CNI_IFNAME", "eth0")
        .env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=x")
        .env("CNI_PATH", "/opt/cni/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(config.to_string().as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    (
        output.status.success(),
        serde_json::from_slice(&output.stdout).ok(),
    )
}

fn add(id: &str, pod: &Pod, config: &Value) -> Value {
    let (success, result) = call("ADD", id, &pod.netns, config);
    assert!(success, "{result:?}");
    result.unwrap()
}

fn with(config: &Value, field: &str, value: Value) -> Value {
    let mut config = config.clone();
    config[field] = value;
    config
}

#[test]
fn a_runtimes_whole_sequence_works_in_every_version() {
    on_a_node(|dir| {
        for version in ["0.4.0", "1.0.0", "1.1.0"] {
            let (pod, config) = (pod(), config(dir, version));
            let result = add("c1", &pod, &config);
            assert_eq!(result["cniVersion"], version);
            assert_eq!(result["interfaces"][2]["sandbox"], pod.netns);
            assert_eq!(
                result["ips"][0].get("version").is_some(),
                version == "0.4.0"
            );
            // ADD again: the same.
            assert_eq!(add("c1", &pod, &config), result);
            let cached = with(&config, "prevResult", result.clone());
            assert_eq!(call("CHECK", "c1", &pod.netns, &cached), (true, None));
            let mut forged = result.clone();
            forged["ips"][0]["address"] = json!("10.66.0.6/29");
            let forged = with(&config, "prevResult", forged);
            let (success, error) = call("CHECK", "c1", &pod.netns, &forged);
            assert!(!success);
            assert_eq!(error.unwrap()["code"], 102);
            // DEL: with the result, with nothing, with a namespace that is gone.
            assert_eq!(call("DEL", "c1", &pod.netns, &cached), (true, None));
            let empty = with(&config, "prevResult", Value::Null);
            assert_eq!(call("DEL", "c1", &pod.netns, &empty), (true, None));
            assert_eq!(call("DEL", "c1", "/run/netns/gone", &config), (true, None));
            assert_eq!(call("DEL", "c1", "", &config), (true, None));
            let (success, _) = call("CHECK", "c1", &pod.netns, &cached);
            assert!(!success, "CHECK after DEL");
        }
    });
}

#[test]
fn status_and_gc_keep_the_range_usable() {
    on_a_node(|dir| {
        let config = config(dir, "1.1.0");
        let pods: Vec<Pod> = (0..5).map(|_| pod()).collect();
        assert_eq!(call("STATUS", "", "", &config), (true, None));
        for (n, pod) in pods.iter().enumerate() {
            add(&format!("c{n}"), pod, &config);
        }
        let (success, error) = call("STATUS", "", "", &config);
        assert_eq!((success, &error.unwrap()["code"]), (false, &json!(50)));
        let late = pod();
        let (success, error) = call("ADD", "late", &late.netns, &config);
        let error = error.unwrap();
        assert_eq!((success, &error["code"]), (false, &json!(101)));
        assert!(
            error["msg"].as_str().unwrap().contains("10.66.0.0/29"),
            "{error}"
        );

        let valid = json!([{ "containerID": "c1", "ifname": "eth0" }]);
        let valid = with(&config, "cni.dev/valid-attachments", valid);
        assert_eq!(call("GC", "", "", &valid), (true, None));
        assert_eq!(call("GC", "", "", &valid), (true, None));
        add("late", &late, &config);
        let leases = std::fs::read_dir(dir.join("ipam/test/leases"))
            .unwrap()
            .count();
        assert_eq!(leases, 2, "c1 and late");
    });
}

#[test]
fn wrong_calls_are_refused_with_the_specifications_codes() {
    on_a_node(|dir| {
        let config = config(dir, "1.1.0");
        let pod = pod();
        let code = |verb: &str, id: &str, netns: &str, config: &Value| {
            let (success, error) = call(verb, id, netns, config);
            assert!(!success);
            error.unwrap()["code"].as_u64().unwrap()
        };
        assert_eq!(
            code(
                "ADD",
                "c",
                &pod.netns,
                &with(&config, "cniVersion", json!("9.0.0"))
            ),
            1
        );
        assert_eq!(
            code(
                "ADD",
                "c",
                &pod.netns,
                &with(&config, "ipMasq", json!(true))
            ),
            2
        );
        assert_eq!(code("ADD", "", &pod.netns, &config), 4);
        assert_eq!(code("ADD", "c", "", &config), 4);
        assert_eq!(code("ADD", "c", "/run/netns/gone", &config), 5);
        assert_eq!(
            code("ADD", "c", &pod.netns, &with(&config, "mtu", json!("x"))),
            6
        );
        assert_eq!(
            code("ADD", "c", &pod.netns, &with(&config, "subnets", json!([]))),
            7
        );
        assert_eq!(code("EXPLODE", "c", &pod.netns, &config), 4);
        assert_eq!(code("GC", "", "", &config), 7);
        let (success, output) = call("VERSION", "", "", &json!({}));
        assert!(success);
        assert_eq!(
            output.unwrap()["supportedVersions"],
            json!(["0.4.0", "1.0.0", "1.1.0"])
        );
    });
}

#[test]
fn parallel_calls_get_distinct_addresses() {
    on_a_node(|dir| {
        let config = with(&config(dir, "1.0.0"), "subnets", json!(["10.67.0.0/24"]));
        let pods: Vec<Pod> = (0..20).map(|_| pod()).collect();
        let addresses = std::thread::scope(|scope| {
            let threads: Vec<_> = (pods.iter().enumerate())
                .map(|(n, pod)| {
                    let config = &config;
                    scope.spawn(move || add(&format!("c{n}"), pod, config)["ips"][0].to_string())
                })
                .collect();
            let joined = threads.into_iter().map(|thread| thread.join().unwrap());
            joined.collect::<std::collections::HashSet<_>>()
        });
        assert_eq!(addresses.len(), 20);
    });
}

/// Not a claim but a figure; run with `--ignored --nocapture`.
#[test]
#[ignore = "a measurement: takes seconds and asserts nothing about time"]
fn measure_the_plugin() {
    on_a_node(|dir| {
        let config = with(&config(dir, "1.0.0"), "subnets", json!(["10.67.0.0/24"]));
        let pods: Vec<Pod> = (0..60).map(|_| pod()).collect();
        let mut times = [Vec::new(), Vec::new()];
        for (n, pod) in pods.iter().enumerate() {
            let id = format!("c{n}");
            let begun = std::time::Instant::now();
            add(&id, pod, &config);
            times[0].push(begun.elapsed());
        }
        for (n, pod) in pods.iter().enumerate() {
            let begun = std::time::Instant::now();
            call("DEL", &format!("c{n}"), &pod.netns, &config);
            times[1].push(begun.elapsed());
        }
        for (verb, times) in ["ADD", "DEL"].iter().zip(&mut times) {
            times.sort();
            eprintln!("{verb} p50 {:?} min {:?}", times[30], times[0]);
        }
    });
}
